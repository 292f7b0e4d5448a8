//! The store of several routers: an etcd of the region's own.
//!
//! Every router keeps a copy of all that is below its prefix, by list and watch, and answers from it. A write is a
//! transaction that rests on the keys it was decided by being as they are in the copy; if one is not, it is read again
//! and the decision is made again. Without etcd the copy goes on serving, and so does the [`Snapshot`] after a restart.
//!
//! Numbers have no lease: silence is no evidence that their holder is gone (invariant I8).

mod connect;
mod follow;
mod keys;
mod mirror;
mod plan;

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_core::id::{Incarnation, WorkerNumber};
use antiphon_proto::v1;
use antiphon_runtime::Tasks;
use bytes::Bytes;
use etcd_client::{KvClient, ResponseHeader};
use parking_lot::Mutex;
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout},
};

use self::{
    connect::told,
    mirror::{Done, Mirror, Step},
    plan::Change,
};
use super::{
    Holder, Owner, Reached, Snapshot, SnapshotDir, Store, StoreError, WorkerClaim,
    claims::{Claim, Claims, Kind},
    snapshot::disk::Found,
};
use crate::records::Records;

pub use connect::EtcdConfig;

/// The store of several routers.
pub struct Etcd {
    config: EtcdConfig,
    owner: Owner,
    newcomers_wait: Duration,
    started: Instant,
    records: watch::Sender<Arc<Records>>,
    /// Counts what the snapshot on disk should know.
    news: watch::Sender<u64>,
    connected: watch::Sender<bool>,
    /// A transaction found that the connection is of no use.
    lost: Notify,
    state: Mutex<State>,
    write_errors: Counter,
    reconnects: Counter,
}

#[derive(Default)]
struct State {
    /// In force, also while etcd cannot be reached.
    mirror: Mirror,
    /// With what was claimed and released meanwhile.
    offline: Option<Claims>,
    /// That, for when etcd is back.
    pending: BTreeMap<(Kind, String), Pending>,
    known: Bytes,
    /// To reach etcd with; `None`: it cannot be reached.
    client: Option<KvClient>,
    /// Counts connections; a transaction of an earlier one says nothing about a later one's mirror.
    session: u64,
    /// How far etcd had come when it was last heard.
    reached: Reached,
    contact: Option<Instant>,
    /// The same for people and for the disk.
    contacted: Option<SystemTime>,
    /// Whether this process was ever connected: before that the numbers are an old snapshot's.
    live: bool,
    reason: String,
}

/// Done without etcd, to be told to it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Pending {
    Claim(Claim),
    Release(Incarnation),
}

impl State {
    fn claims(&self) -> &Claims {
        self.offline.as_ref().unwrap_or(&self.mirror.claims)
    }

    fn offline_claims(&mut self) -> &mut Claims {
        self.offline.get_or_insert_with(|| self.mirror.claims.clone())
    }

    /// etcd has said something, and how far it has come. The watch may tell of that only later.
    fn heard(&mut self, header: Option<&ResponseHeader>) {
        let revision = header.map_or(0, ResponseHeader::revision);
        self.reached.revision = self.reached.revision.max(revision);
        self.contact = Some(Instant::now());
        self.contacted = Some(SystemTime::now());
    }
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Etcd").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Etcd {
    /// A store that starts from what the directory has, if there is one, and follows etcd for as long as the tasks live.
    #[must_use]
    pub fn start(
        config: EtcdConfig,
        owner: Owner,
        dir: Option<SnapshotDir>,
        newcomers_wait: Duration,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let mut state = State { reason: "not connected yet".into(), ..State::default() };
        if let Some(Found::Snapshot(snapshot)) = dir.as_ref().map(SnapshotDir::load) {
            let Snapshot { contact, records, claims, etcd, known } = *snapshot;
            state.mirror = Mirror::of_snapshot(&records, claims);
            state.reached = etcd.unwrap_or_default();
            state.known = known;
            state.contacted = (contact > UNIX_EPOCH).then_some(contact);
        }
        let store = Arc::new(Self {
            config,
            owner,
            newcomers_wait,
            started: Instant::now(),
            records: watch::Sender::new(Arc::new(state.mirror.records())),
            news: watch::Sender::new(0),
            connected: watch::Sender::new(false),
            lost: Notify::new(),
            state: Mutex::new(state),
            write_errors: Counter::default(),
            reconnects: Counter::default(),
        });
        if let Some(dir) = dir {
            let of = Arc::downgrade(&store);
            let latest = move || of.upgrade().map(|store| store.snapshot());
            dir.keep(store.news.subscribe(), latest, store.write_errors.clone(), tasks);
        }
        let (follower, stopping) = (Arc::clone(&store), tasks.stopping());
        tasks.service("etcd", async move {
            stopping.run_until_cancelled(follower.follow()).await;
            Ok(())
        });
        store
    }

    /// Waits until etcd has answered once, but no longer than this.
    pub async fn connected_within(&self, longest: Duration) -> bool {
        let mut connected = self.connected.subscribe();
        timeout(longest, connected.wait_for(|connected| *connected)).await.is_ok()
    }

    fn snapshot(&self) -> Snapshot {
        let state = self.state.lock();
        Snapshot {
            contact: state.contacted.unwrap_or(UNIX_EPOCH),
            records: Arc::clone(&self.records.borrow()),
            claims: state.claims().clone(),
            etcd: (state.reached.revision > 0).then(|| state.reached.clone()),
            known: state.known.clone(),
        }
    }

    /// Tells watchers and the disk what is new in the mirror.
    fn publish(&self, state: &State) {
        self.records.send_if_modified(|records| {
            // Keys of one change come together, the revision among them.
            let news = state.mirror.identity.is_some() && state.mirror.base.revision > records.revision;
            if news {
                *records = Arc::new(state.mirror.records());
            }
            news
        });
        self.news.send_modify(|n| *n += 1);
    }

    fn unavailable(&self, state: &State) -> StoreError {
        StoreError::Unavailable { since: self.age_of(state), reason: state.reason.clone() }
    }

    fn age_of(&self, state: &State) -> Duration {
        let since = |at: SystemTime| SystemTime::now().duration_since(at).unwrap_or_default();
        match (&state.client, state.contact, state.contacted) {
            (Some(_), ..) => Duration::ZERO,
            (None, Some(contact), _) => contact.elapsed(),
            (None, None, Some(contacted)) => since(contacted),
            (None, None, None) => self.started.elapsed(),
        }
    }

    /// Does what `plan` says, however often something else comes first.
    async fn transact<T>(&self, plan: impl Fn(&Mirror) -> Result<Step<T>, StoreError>) -> Result<T, StoreError> {
        for _ in 0..ATTEMPTS {
            let (mut client, session, step, transaction) = {
                let state = self.state.lock();
                let client = state.client.clone().ok_or_else(|| self.unavailable(&state))?;
                let step = plan(&state.mirror)?;
                let transaction = state.mirror.transaction(&step, &self.config.prefix);
                (client, state.session, step, transaction)
            };
            let answer = match timeout(OPERATION, client.txn(transaction)).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(error)) => return Err(self.lose(session, &told(&error))),
                Err(_) => return Err(self.lose(session, &format!("no answer within {} s", OPERATION.as_secs()))),
            };
            let mut state = self.state.lock();
            if state.session != session {
                if answer.succeeded() {
                    return Ok(step.outcome);
                }
                continue;
            }
            state.heard(answer.header());
            let done = state.mirror.transacted(&step, &answer, &self.config.prefix);
            self.publish(&state);
            match done {
                Done::Yes => return Ok(step.outcome),
                Done::No => {}
                Done::Emptied => {
                    drop(state);
                    return Err(self.lose(session, "everything was deleted"));
                }
            }
        }
        let reason = format!("{ATTEMPTS} attempts came too late: others change the same things");
        Err(StoreError::Unavailable { since: Duration::ZERO, reason })
    }

    /// The connection is of no use; the follower makes another.
    fn lose(&self, session: u64, reason: &str) -> StoreError {
        let mut state = self.state.lock();
        if state.session == session {
            reason.clone_into(&mut state.reason);
            if state.client.take().is_some() {
                self.lost.notify_one();
                self.connected.send_replace(false);
            }
        }
        StoreError::Unavailable { since: self.age_of(&state), reason: reason.to_owned() }
    }

    async fn claim(&self, claim: &Claim) -> Result<u16, StoreError> {
        match self.transact(|mirror| plan::claim(mirror, claim)).await {
            Err(error @ StoreError::Unavailable { .. }) => self.claim_offline(claim, error),
            outcome => outcome,
        }
    }

    /// Without etcd: who has a number keeps it, and who says that it holds one is believed if nobody else does. Anybody
    /// else might get what another router gives away at the same time.
    fn claim_offline(&self, claim: &Claim, error: StoreError) -> Result<u16, StoreError> {
        let mut state = self.state.lock();
        if state.client.is_some() {
            return Err(error);
        }
        let number = state.claims().choose(claim, false).ok();
        // There are few numbers for relays: an old snapshot's may be another's by now.
        let sure = |number: &u16| claim.kind == Kind::Worker || state.live || claim.held == Some(*number);
        let number = number.filter(sure).ok_or(error)?;
        state.offline_claims().of_mut(claim.kind).put(number, claim.holder());
        let claim = Claim { held: Some(number), ..claim.clone() };
        state.pending.insert((claim.kind, claim.name.clone()), Pending::Claim(claim));
        self.publish(&state);
        Ok(number)
    }

    async fn release(&self, kind: Kind, name: &str, incarnation: Incarnation) {
        if self.transact(|mirror| Ok(plan::release(mirror, kind, name, incarnation))).await.is_ok() {
            return;
        }
        let mut state = self.state.lock();
        if state.client.is_some() {
            state.pending.insert((kind, name.to_owned()), Pending::Release(incarnation));
            return;
        }
        let claims = state.offline_claims().of_mut(kind);
        if let Some(number) = claims.number_of(name)
            && claims.holder(number).is_some_and(|holder| holder.incarnation == incarnation)
        {
            claims.remove(number);
            state.pending.insert((kind, name.to_owned()), Pending::Release(incarnation));
            self.publish(&state);
        }
    }

    /// Spreads a pending change over the records.
    async fn spread(&self) -> Result<(), StoreError> {
        while !self.transact(|mirror| Ok(plan::spread(mirror))).await? {}
        Ok(())
    }
}

#[tonic::async_trait]
impl Store for Etcd {
    fn watch(&self) -> watch::Receiver<Arc<Records>> {
        self.records.subscribe()
    }

    async fn apply(&self, change: &v1::ApplyRequest) -> Result<(), StoreError> {
        loop {
            let floor = self.records.borrow().revision;
            match self.transact(|mirror| plan::change(mirror, change, floor)).await? {
                Change::Made => return Ok(()),
                Change::Blocked => self.spread().await?,
                Change::Pending => {
                    // The change is made; somebody will spread it.
                    if let Err(error) = self.spread().await {
                        tracing::warn!("a large change is in force and not spread yet: {error}");
                    }
                    return Ok(());
                }
            }
        }
    }

    async fn claim_worker(&self, claim: &WorkerClaim) -> Result<WorkerNumber, StoreError> {
        let number = self.claim(&claim.into()).await?;
        Ok(WorkerNumber::new(number).expect("every u16 is a worker number"))
    }

    async fn release_worker(&self, number: WorkerNumber, incarnation: Incarnation) {
        let name = {
            let state = self.state.lock();
            state.claims().of(Kind::Worker).holder(number.value()).map(|holder| holder.name.clone())
        };
        if let Some(name) = name {
            self.release(Kind::Worker, &name, incarnation).await;
        }
    }

    async fn claim_relay(&self, name: &str, held: Option<u8>) -> Result<u8, StoreError> {
        let index = self.claim(&Claim::of_relay(name, held)).await?;
        Ok(u8::try_from(index).expect("a region numbers 64 relays"))
    }

    async fn release_relay(&self, name: &str) {
        self.release(Kind::Relay, name, Claim::of_relay(name, None).incarnation).await;
    }

    fn holders(&self, tell: &mut dyn FnMut(Kind, u16, &Holder)) {
        let state = self.state.lock();
        state.claims().all().for_each(|(kind, number, holder)| tell(kind, number, holder));
    }

    fn age(&self) -> Duration {
        self.age_of(&self.state.lock())
    }

    fn remembered(&self) -> Bytes {
        self.state.lock().known.clone()
    }

    fn remember(&self, known: Bytes) {
        let mut state = self.state.lock();
        if state.known != known {
            state.known = known;
            self.news.send_modify(|n| *n += 1);
        }
    }

    fn register(&self, registry: &mut Registry) {
        super::register_snapshot(registry, &self.write_errors);
        let help = "Connections to etcd that were made again";
        registry.register("store_reconnects", help, self.reconnects.clone());
    }
}

/// Longest wait for one answer of etcd.
const OPERATION: Duration = Duration::from_secs(2);
/// How often a transaction is tried while others change the same things.
const ATTEMPTS: usize = 32;
