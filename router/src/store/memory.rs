//! The store of a single router: everything is gone with the process, and comes back from those who hold it.

use std::{collections::BTreeMap, sync::Arc};

use antiphon_core::id::{Incarnation, RelayNumber, WorkerNumber};
use antiphon_proto::v1;
use parking_lot::Mutex;
use siphasher::sip::SipHasher24;
use tokio::sync::watch;

use super::{Store, StoreError, WorkerClaim};
use crate::records::Records;

/// Keeps records and numbers in memory.
#[derive(Debug)]
pub struct Memory {
    records: watch::Sender<Arc<Records>>,
    workers: Mutex<BTreeMap<u16, (String, Incarnation)>>,
    relays: Mutex<BTreeMap<u8, String>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { records: watch::Sender::new(Arc::default()), workers: Mutex::default(), relays: Mutex::default() }
    }
}

#[tonic::async_trait]
impl Store for Memory {
    fn watch(&self) -> watch::Receiver<Arc<Records>> {
        self.records.subscribe()
    }

    async fn apply(&self, change: &v1::ApplyRequest) -> Result<(), StoreError> {
        let mut outcome = Ok(());
        self.records.send_if_modified(|records| {
            match records.apply(change) {
                Ok(next) => *records = Arc::new(next),
                Err(error) => outcome = Err(error.into()),
            }
            outcome.is_ok()
        });
        outcome
    }

    async fn claim_worker(&self, claim: &WorkerClaim) -> Result<WorkerNumber, StoreError> {
        let mut workers = self.workers.lock();
        let owned = workers.iter().find(|(_, (name, _))| *name == claim.name);
        let held = claim.held.map(WorkerNumber::value);
        let number = owned
            .map(|(number, _)| *number)
            .or_else(|| held.filter(|number| !workers.contains_key(number)))
            // Scattered by name: after a restart a newcomer seldom takes what someone still holds and will ask for.
            .or_else(|| free(hash(&claim.name), 0x1_0000, |n| !workers.contains_key(&n)))
            .ok_or(StoreError::Exhausted(0x1_0000))?;
        workers.insert(number, (claim.name.clone(), claim.incarnation));
        Ok(WorkerNumber::new(number).expect("every u16 is a worker number"))
    }

    async fn release_worker(&self, number: WorkerNumber, incarnation: Incarnation) {
        let mut workers = self.workers.lock();
        if workers.get(&number.value()).is_some_and(|(_, i)| *i == incarnation) {
            workers.remove(&number.value());
        }
    }

    async fn claim_relay(&self, name: &str, held: Option<u8>) -> Result<u8, StoreError> {
        let mut relays = self.relays.lock();
        let owned = relays.iter().find(|(_, owner)| *owner == name);
        let legal = |n: u8| u16::from(n) < RelayNumber::PER_REGION && !relays.contains_key(&n);
        let start = hash(name) % u64::from(RelayNumber::PER_REGION);
        let index = owned
            .map(|(index, _)| *index)
            .or_else(|| held.filter(|index| legal(*index)))
            .or_else(|| {
                let free = free(start, RelayNumber::PER_REGION.into(), |n| u8::try_from(n).is_ok_and(legal));
                free.and_then(|n| u8::try_from(n).ok())
            })
            .ok_or(StoreError::Exhausted(RelayNumber::PER_REGION.into()))?;
        relays.insert(index, name.to_owned());
        Ok(index)
    }

    async fn release_relay(&self, name: &str) {
        self.relays.lock().retain(|_, owner| owner != name);
    }
}

/// The first number from `start` on, wrapping around at `count`, that is free.
fn free(start: u64, count: u64, is_free: impl Fn(u16) -> bool) -> Option<u16> {
    (0..count).filter_map(|step| u16::try_from((start + step) % count).ok()).find(|n| is_free(*n))
}

fn hash(name: &str) -> u64 {
    // The key is public: this spreads, it protects nothing. 32 bits, so that adding a step never overflows.
    SipHasher24::new().hash(name.as_bytes()) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(name: &str, incarnation: u32, held: Option<u16>) -> WorkerClaim {
        WorkerClaim {
            name: name.into(),
            incarnation: Incarnation::new(incarnation).unwrap(),
            held: held.map(|n| WorkerNumber::new(n).unwrap()),
        }
    }

    #[tokio::test]
    async fn a_name_keeps_its_number_until_it_gives_it_back() {
        let store = Memory::default();
        let first = store.claim_worker(&claim("w-1", 1, None)).await.unwrap();
        assert_eq!(store.claim_worker(&claim("w-1", 1, None)).await, Ok(first));
        assert_eq!(store.claim_worker(&claim("w-1", 2, None)).await, Ok(first));
        // The former incarnation cannot give back what its successor holds.
        store.release_worker(first, Incarnation::new(1).unwrap()).await;
        let other = store.claim_worker(&claim("w-2", 3, Some(first.value()))).await.unwrap();
        assert_ne!(other, first);
        store.release_worker(first, Incarnation::new(2).unwrap()).await;
        let taken = store.claim_worker(&claim("w-3", 4, Some(first.value()))).await;
        assert_eq!(taken, Ok(first));
    }

    #[tokio::test]
    async fn after_a_restart_a_number_that_is_held_is_kept() {
        let store = Memory::default();
        let number = store.claim_worker(&claim("w-9", 7, Some(4711))).await.unwrap();
        assert_eq!(number.value(), 4711);
    }

    #[tokio::test]
    async fn a_region_numbers_64_relays_and_no_more() {
        let store = Memory::default();
        let mut seen = std::collections::BTreeSet::new();
        for i in 0..64 {
            seen.insert(store.claim_relay(&format!("r-{i}"), None).await.unwrap());
        }
        assert_eq!(seen.len(), 64);
        assert_eq!(store.claim_relay("r-64", None).await, Err(StoreError::Exhausted(64)));
        store.release_relay("r-3").await;
        assert!(store.claim_relay("r-64", Some(200)).await.is_ok());
    }

    #[tokio::test]
    async fn a_refused_change_leaves_the_records_alone() {
        let store = Memory::default();
        let watch = store.watch();
        let bad = v1::ApplyRequest { regions: vec![v1::RegionRecord::default()], ..v1::ApplyRequest::default() };
        assert!(matches!(store.apply(&bad).await, Err(StoreError::Invalid(_))));
        assert!(!watch.has_changed().unwrap());
        assert_eq!(watch.borrow().revision, 0);
    }
}
