//! The store of a single router. Records and numbers end with the process unless there is a snapshot; numbers also come
//! back from those who hold them.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use antiphon_core::id::{Incarnation, WorkerNumber};
use antiphon_proto::v1;
use antiphon_runtime::Tasks;
use bytes::Bytes;
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::{sync::watch, time::Instant};

use super::{
    Holder, Store, StoreError, WorkerClaim,
    claims::{Claim, Kind},
    snapshot::{Snapshot, SnapshotDir, disk::Found},
};
use crate::records::Records;

/// Keeps records and numbers in memory.
#[derive(Debug)]
pub struct Memory {
    records: watch::Sender<Arc<Records>>,
    snapshot: watch::Sender<Snapshot>,
    newcomers_from: Instant,
    write_errors: Counter,
}

/// A store that begins: nobody holds anything.
impl Default for Memory {
    fn default() -> Self {
        Self::of(Snapshot::default(), Instant::now())
    }
}

impl Memory {
    /// A store that goes on from what the directory has, and keeps it there. If it has anything, this is a restart:
    /// workers and relays that were numbered after the last write come with their numbers, so newcomers wait that long.
    #[must_use]
    pub fn kept(dir: SnapshotDir, newcomers_wait: Duration, tasks: &Tasks) -> Self {
        let (snapshot, wait) = match dir.load() {
            Found::Nothing => (Snapshot::default(), Duration::ZERO),
            Found::Unusable => (Snapshot::default(), newcomers_wait),
            Found::Snapshot(snapshot) => {
                (Snapshot { claims: snapshot.claims.clone().doubted(), ..*snapshot }, newcomers_wait)
            }
        };
        let store = Self::of(snapshot, Instant::now() + wait);
        let latest = store.snapshot.subscribe();
        let latest = move || Some(latest.borrow().clone());
        dir.keep(store.snapshot.subscribe(), latest, store.write_errors.clone(), tasks);
        // The first start leaves a trace too: the next one is a restart.
        store.snapshot.send_modify(|snapshot| snapshot.contact = SystemTime::now());
        store
    }

    fn of(snapshot: Snapshot, newcomers_from: Instant) -> Self {
        let records = watch::Sender::new(Arc::clone(&snapshot.records));
        Self { records, snapshot: watch::Sender::new(snapshot), newcomers_from, write_errors: Counter::default() }
    }

    fn claim(&self, claim: &Claim) -> Result<u16, StoreError> {
        let newcomers = Instant::now() >= self.newcomers_from;
        let mut outcome = Err(StoreError::Settling);
        self.snapshot.send_if_modified(|snapshot| {
            outcome = snapshot.claims.choose(claim, newcomers);
            let Ok(number) = &outcome else {
                return false;
            };
            snapshot.claims.of_mut(claim.kind).put(*number, claim.holder());
            snapshot.contact = SystemTime::now();
            true
        });
        outcome
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
                Ok(next) => {
                    *records = Arc::new(next);
                    let kept = Arc::clone(records);
                    self.snapshot.send_modify(|s| (s.records, s.contact) = (kept, SystemTime::now()));
                }
                Err(error) => outcome = Err(error.into()),
            }
            outcome.is_ok()
        });
        outcome
    }

    async fn claim_worker(&self, claim: &WorkerClaim) -> Result<WorkerNumber, StoreError> {
        let number = self.claim(&claim.into())?;
        Ok(WorkerNumber::new(number).expect("every u16 is a worker number"))
    }

    async fn release_worker(&self, number: WorkerNumber, incarnation: Incarnation) {
        self.snapshot.send_if_modified(|snapshot| {
            let workers = snapshot.claims.of_mut(Kind::Worker);
            let theirs = workers.holder(number.value()).is_some_and(|holder| holder.incarnation == incarnation);
            if theirs {
                workers.remove(number.value());
            }
            theirs
        });
    }

    async fn claim_relay(&self, name: &str, held: Option<u8>) -> Result<u8, StoreError> {
        let index = self.claim(&Claim::of_relay(name, held))?;
        Ok(u8::try_from(index).expect("a region numbers 64 relays"))
    }

    async fn release_relay(&self, name: &str) {
        self.snapshot.send_if_modified(|snapshot| {
            let relays = snapshot.claims.of_mut(Kind::Relay);
            let index = relays.number_of(name);
            index.into_iter().for_each(|index| relays.remove(index));
            index.is_some()
        });
    }

    fn holders(&self, tell: &mut dyn FnMut(Kind, u16, &Holder)) {
        self.snapshot.borrow().claims.all().for_each(|(kind, number, holder)| tell(kind, number, holder));
    }

    fn age(&self) -> Duration {
        Duration::ZERO
    }

    fn remembered(&self) -> Bytes {
        self.snapshot.borrow().known.clone()
    }

    fn remember(&self, known: Bytes) {
        self.snapshot.send_if_modified(|snapshot| {
            let news = snapshot.known != known;
            snapshot.known = known;
            news
        });
    }

    fn register(&self, registry: &mut Registry) {
        super::register_snapshot(registry, &self.write_errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::snapshot::tests::owner;

    fn worker(name: &str, held: Option<u16>) -> WorkerClaim {
        WorkerClaim {
            name: name.into(),
            agent: "shop/desk".into(),
            incarnation: Incarnation::new(1).unwrap(),
            held: held.map(|n| WorkerNumber::new(n).unwrap()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_restart_newcomers_wait_for_those_who_hold_a_number() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let wait = Duration::from_secs(6);
        let tasks = Tasks::new();
        let first = Memory::kept(SnapshotDir::open(&path, owner()).unwrap(), wait, &tasks);
        let number = first.claim_worker(&worker("w-1", None)).await.unwrap();
        first.remember(Bytes::from_static(b"routes"));
        tasks.wait(std::future::ready(())).await.unwrap();
        drop(first);

        let tasks = Tasks::new();
        let second = Memory::kept(SnapshotDir::open(&path, owner()).unwrap(), wait, &tasks);
        assert_eq!(second.remembered(), "routes");
        assert_eq!(second.claim_worker(&worker("w-2", None)).await, Err(StoreError::Settling));
        // Numbered just before the crash and not on disk any more.
        let late = second.claim_worker(&worker("w-3", Some(7))).await.unwrap();
        assert_eq!(late.value(), 7);
        assert_eq!(second.claim_worker(&worker("w-1", None)).await, Ok(number));
        tokio::time::advance(wait).await;
        assert!(second.claim_worker(&worker("w-2", None)).await.is_ok());
        tasks.wait(std::future::ready(())).await.unwrap();
    }

    #[tokio::test]
    async fn after_a_restart_a_number_that_is_held_is_kept() {
        let number = Memory::default().claim_worker(&worker("w-9", Some(4711))).await.unwrap();
        assert_eq!(number.value(), 4711);
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
