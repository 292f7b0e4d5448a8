//! What routers of a region share: records, and who holds which number.
//!
//! The trait speaks in the domain's terms and is shaped so that a store with leases, transactions and watches (etcd)
//! can implement it; [`Memory`] is the store of one process.

mod memory;

use std::{fmt, sync::Arc};

use antiphon_core::id::{Incarnation, WorkerNumber};
use antiphon_proto::v1;
use tokio::sync::watch;

pub use memory::Memory;

use crate::{field::FieldError, records::Records};

/// A worker asks for its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerClaim {
    /// Its name, unique in the region at one time.
    pub name: String,
    /// Which life of the process.
    pub incarnation: Incarnation,
    /// The number that it holds already.
    pub held: Option<WorkerNumber>,
}

/// Why the store did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The change is refused.
    #[error(transparent)]
    Invalid(#[from] FieldError),
    /// Every number is held.
    #[error("all {0} numbers are held; deregister what is gone")]
    Exhausted(u32),
}

/// The region's store.
#[tonic::async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// The records now and whenever they change. A receiver may skip revisions, never go back.
    fn watch(&self) -> watch::Receiver<Arc<Records>>;

    /// Changes records, all of it or nothing.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] names the field.
    async fn apply(&self, change: &v1::ApplyRequest) -> Result<(), StoreError>;

    /// Gives a worker its number. The same name keeps the number that it holds, whatever its incarnation (the caller
    /// makes sure that the former one is gone); `held` is honoured if nobody else holds it; otherwise a free one.
    ///
    /// # Errors
    /// [`StoreError::Exhausted`].
    async fn claim_worker(&self, claim: &WorkerClaim) -> Result<WorkerNumber, StoreError>;

    /// Gives a number back, if this incarnation still holds it.
    async fn release_worker(&self, number: WorkerNumber, incarnation: Incarnation);

    /// Gives a relay its index (0..=63) in the region, by the same rules.
    ///
    /// # Errors
    /// [`StoreError::Exhausted`].
    async fn claim_relay(&self, name: &str, held: Option<u8>) -> Result<u8, StoreError>;

    /// Gives a relay's index back.
    async fn release_relay(&self, name: &str);
}
