//! What routers of a region share: records, and who holds which number.
//!
//! [`Memory`] is the store of a router that is alone in its region, [`Etcd`] that of several. Both keep a [`Snapshot`] on
//! disk if they are given a directory, and start from it: a router that finds nobody to ask still knows whom it knew.

mod claims;
mod etcd;
mod memory;
mod open;
mod snapshot;

use std::{fmt, sync::Arc, time::Duration};

use antiphon_core::id::{Incarnation, WorkerNumber};
use antiphon_proto::v1;
use bytes::Bytes;
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::sync::watch;

pub use claims::{Claims, Holder, Kind};
pub use etcd::{Etcd, EtcdConfig};
pub use memory::Memory;
pub(crate) use open::open;
pub use snapshot::{
    DecodeError, Owner, Reached, Snapshot, SnapshotDir,
    disk::{Found, OpenError},
};

use crate::{field::FieldError, records::Records};

/// A worker asks for its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerClaim {
    /// Its name, unique in the region at one time.
    pub name: String,
    /// The agent that it serves, `namespace/name`: tells those who look after processes where to look for it.
    pub agent: String,
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
    /// The change does not fit into one transaction.
    #[error("the change has {bytes} bytes, the store takes {max} at once: apply it in parts")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The largest one possible.
        max: usize,
    },
    /// Every number is held.
    #[error("all {0} numbers are held; deregister what is gone")]
    Exhausted(u32),
    /// The store has lost its memory: who holds a number says so first, newcomers come after.
    #[error("the store is new or was lost: numbers go to those who hold one already for some seconds, try again")]
    Settling,
    /// It cannot be reached; nothing was done, or nobody knows what was.
    #[error("store unavailable since {} s: {reason}", .since.as_secs())]
    Unavailable {
        /// How long it has been out of reach.
        since: Duration,
        /// What the last attempt met.
        reason: String,
    },
}

impl From<StoreError> for tonic::Status {
    fn from(error: StoreError) -> Self {
        let text = error.to_string();
        match error {
            StoreError::Invalid(error) => error.into(),
            StoreError::TooLarge { .. } => Self::invalid_argument(text),
            StoreError::Exhausted(_) => Self::resource_exhausted(text),
            StoreError::Settling | StoreError::Unavailable { .. } => Self::unavailable(text),
        }
    }
}

/// The region's store.
#[tonic::async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// The records now and whenever they change. A receiver may skip revisions, never go back.
    fn watch(&self) -> watch::Receiver<Arc<Records>>;

    /// Changes records, all of it or nothing.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] names the field. After [`StoreError::Unavailable`] the change may have been made; making
    /// it again does no harm.
    async fn apply(&self, change: &v1::ApplyRequest) -> Result<(), StoreError>;

    /// Gives a worker its number. The same name keeps the number that it holds, whatever its incarnation (the caller
    /// makes sure that the former one is gone); `held` is honoured if nobody else holds it; otherwise a free one.
    ///
    /// # Errors
    /// [`StoreError::Exhausted`]; for those who hold no number [`StoreError::Settling`] and [`StoreError::Unavailable`].
    async fn claim_worker(&self, claim: &WorkerClaim) -> Result<WorkerNumber, StoreError>;

    /// Gives a number back, if this incarnation still holds it; later, if the store cannot be reached.
    async fn release_worker(&self, number: WorkerNumber, incarnation: Incarnation);

    /// Gives a relay its index (0..=63) in the region, by the same rules.
    ///
    /// # Errors
    /// As [`Self::claim_worker`].
    async fn claim_relay(&self, name: &str, held: Option<u8>) -> Result<u8, StoreError>;

    /// Gives a relay's index back; later, if the store cannot be reached.
    async fn release_relay(&self, name: &str);

    /// Tells who holds which number: all workers and relays of the region that are not known to be gone, whether or
    /// not they ever spoke to this router. A relay's number is its index in the region.
    fn holders(&self, tell: &mut dyn FnMut(Kind, u16, &Holder));

    /// How old the records may be: zero while the store is in reach.
    fn age(&self) -> Duration;

    /// What [`Self::remember`] was told last, also before a restart ([`Snapshot::known`]); empty: nothing.
    fn remembered(&self) -> Bytes;

    /// Keeps what the router knows of its fleet (routes, relays, peers' digests), in a form of its own. It is on disk
    /// about a second later, with one write for all that came in between; nothing is kept without a directory.
    fn remember(&self, known: Bytes);

    /// Registers the store's metrics.
    fn register(&self, registry: &mut Registry);
}

/// Registers what there is to say of the snapshot on disk.
fn register_snapshot(registry: &mut Registry, write_errors: &Counter) {
    let help = "Writes of the snapshot that failed and were tried again";
    registry.register("snapshot_write_errors", help, write_errors.clone());
}
