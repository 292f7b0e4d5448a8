//! What this worker has promised to whom: the lease table, the doors of its shards, and who may end what.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use antiphon_core::{
    cid::{CidMinter, SessionCid, SessionNonce},
    clock::Millis,
    id::{Epoch, KeyGeneration, RelayNumber, ServerId, SessionId},
    lease::{ActivateError, Lease, LeaseId, LeaseRequest, LeaseTable, ReserveRefusal},
};
use antiphon_proto::v1::{AgentBehaviour, Codec, EndCode, Phase};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    gate::{Attempt, Gate},
    measured::Measured,
    metrics::Metrics,
    phase::PhaseMachine,
    rotation::Rotation,
    session::history::PathHistory,
};

mod orders;

/// What a lease is for, and the live facts of its session.
#[derive(Debug)]
pub(crate) struct Terms {
    pub(crate) session: SessionId,
    pub(crate) epoch: Epoch,
    pub(crate) lease: LeaseId,
    pub(crate) tenant: String,
    pub(crate) client_key: [u8; 32],
    pub(crate) codec: Codec,
    neighbourhood: u32,
    pub(crate) behaviour: Arc<AgentBehaviour>,
    pub(crate) shard: usize,
    pub(crate) server_id: ServerId,
    pub(crate) attempts: Vec<(SessionCid, SessionNonce)>,
    pub(crate) expires_at: SystemTime,
    pub(crate) since: SystemTime,
    granted: Instant,
    /// Key generation that its first connection IDs are minted with.
    minted: KeyGeneration,
    /// Oldest key generation that its connection may still use; 0: it has none.
    generation: AtomicU32,
    /// The way of its packets.
    pub(crate) path: Mutex<PathHistory>,
    /// Set once, when somebody ends the session from outside.
    pub(crate) end: watch::Sender<Option<EndCode>>,
    pub(crate) turns: AtomicU32,
    /// Number of the ingress relay in use.
    pub(crate) relay: AtomicU32,
    /// Of the connection that owns the session now.
    owner: Mutex<Option<CancellationToken>>,
}

/// What a router asks for, checked.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) session: SessionId,
    pub(crate) epoch: Epoch,
    pub(crate) agent: String,
    pub(crate) tenant: String,
    pub(crate) client_key: [u8; 32],
    pub(crate) codec: Codec,
    pub(crate) ttl: Duration,
    /// Where the caller is, coarsely; 0: nobody knows.
    pub(crate) neighbourhood: u32,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Lease(#[from] ReserveRefusal),
    #[error("this worker serves {0}")]
    WrongAgent(String),
    #[error("not registered yet")]
    NotReady,
    #[error("this session belongs to another client")]
    OtherClient,
}

impl Refusal {
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Lease(refusal) => refusal.label(),
            Self::WrongAgent(_) => "wrong_agent",
            Self::NotReady => "not_ready",
            Self::OtherClient => "other_client",
        }
    }
}

/// How a shard's first connection IDs are made and let in.
#[derive(Debug, Clone)]
pub(crate) struct Door {
    pub(crate) server_id: ServerId,
    pub(crate) minter: Arc<Mutex<CidMinter>>,
    pub(crate) gate: Arc<Mutex<Gate>>,
    pub(crate) rotation: Arc<Rotation>,
}

#[derive(Debug)]
struct Inner {
    table: LeaseTable<Arc<Terms>>,
    doors: Vec<Door>,
    behaviour: Option<Arc<AgentBehaviour>>,
    phase: PhaseMachine,
}

/// The worker's promises; shared by the service, the shards and the registration.
#[derive(Debug)]
pub(crate) struct Capacity {
    started: Instant,
    agent: String,
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
    metrics: Metrics,
    measured: Mutex<Measured>,
}

/// Numbers for a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) slots: u32,
    pub(crate) reserved: u32,
    pub(crate) active: u32,
    pub(crate) free: u32,
    pub(crate) phase: Phase,
    /// Of the order that it follows; 0: none.
    pub(crate) ordered_unix_ms: u64,
}

impl Capacity {
    pub(crate) fn new(agent: String, slots: u32, metrics: Metrics) -> Self {
        metrics.slots.set(slots.into());
        let table = LeaseTable::new(slots);
        let inner = Inner { table, doors: Vec::new(), behaviour: None, phase: PhaseMachine::default() };
        let (changed, measured) = (watch::Sender::new(()), Mutex::default());
        Self { started: Instant::now(), agent, inner: Mutex::new(inner), changed, metrics, measured }
    }

    /// Opens the doors once the router has numbered this worker.
    pub(crate) fn open(&self, doors: Vec<Door>) {
        self.inner.lock().doors = doors;
    }

    /// New sessions begin with this behaviour; sessions that live keep theirs.
    pub(crate) fn set_behaviour(&self, behaviour: AgentBehaviour) {
        self.inner.lock().behaviour = Some(Arc::new(behaviour));
    }

    fn now(&self) -> Millis {
        Millis(0).after(self.started.elapsed())
    }

    /// Grants a lease or says why not.
    pub(crate) fn reserve(&self, request: &Request) -> Result<Arc<Terms>, Refusal> {
        let outcome = self.try_reserve(request);
        match &outcome {
            Ok(_) => self.metrics.granted(),
            Err(Refusal::Lease(refusal)) => self.metrics.refused(*refusal),
            Err(_) => {}
        }
        outcome
    }

    fn try_reserve(&self, request: &Request) -> Result<Arc<Terms>, Refusal> {
        if request.agent != self.agent {
            return Err(Refusal::WrongAgent(self.agent.clone()));
        }
        let now = self.now();
        let inner = &mut *self.inner.lock();
        inner.forget_expired(now);
        // Whoever knows a session's id must get neither its connection IDs nor a newer epoch of it: epochs are the
        // client's own (invariant I6).
        let foreign = |terms: &Terms| terms.client_key != request.client_key || terms.tenant != request.tenant;
        if inner.table.of(request.session).any(|lease| foreign(&lease.attachment)) {
            return Err(Refusal::OtherClient);
        }
        let behaviour = inner.behaviour.clone().ok_or(Refusal::NotReady)?;
        let shard = inner.emptiest_shard().ok_or(Refusal::NotReady)?;
        let door = inner.doors[shard].clone();
        let wanted = LeaseRequest { session: request.session, epoch: request.epoch, ttl: request.ttl };
        let lease = inner.table.reserve(now, &wanted, |lease, expires| {
            let expires_at = SystemTime::now() + expires.since(now);
            Arc::new(door.terms(request, shard, lease, expires_at, behaviour))
        })?;
        // A newer epoch may have replaced an older reservation.
        inner.forget_expired(now);
        self.publish(inner);
        Ok(lease.attachment)
    }

    /// The lease behind an attempt to connect.
    pub(crate) fn terms(&self, attempt: Attempt) -> Option<Arc<Terms>> {
        let inner = self.inner.lock();
        let mut leases = inner.table.iter().filter(|(session, ..)| *session == attempt.session);
        leases.find(|(_, lease, _)| lease.epoch == attempt.epoch).map(|(_, lease, _)| lease.attachment.clone())
    }

    /// The client has proved itself. An older owner of the session on this worker is told to stop.
    pub(crate) fn activate(&self, terms: &Terms) -> Result<(), ActivateError> {
        let inner = &mut *self.inner.lock();
        // The session may hold another lease by now than the one that this connection came with.
        if inner.table.of(terms.session).all(|lease| lease.id != terms.lease) {
            return Err(ActivateError::Gone);
        }
        let activation = inner.table.activate(self.now(), terms.session, terms.epoch)?;
        if let Some(older) = activation.superseded {
            older.attachment.end.send_replace(Some(EndCode::Superseded));
            inner.forget(&older.attachment);
        }
        self.publish(inner);
        Ok(())
    }

    /// A session's own task is over, or its handshake led to nothing.
    pub(crate) fn ended(&self, terms: &Terms) {
        let inner = &mut *self.inner.lock();
        if inner.table.end(terms.session, terms.lease) {
            inner.forget(terms);
        }
        self.publish(inner);
    }

    /// Ends a session or gives its lease back; says whether there was one. `tenant` empty: whoever's it is.
    pub(crate) fn release(&self, session: SessionId, epoch: Option<Epoch>, tenant: &str) -> bool {
        let inner = &mut *self.inner.lock();
        let foreign = |lease: &Lease<Arc<Terms>>| !tenant.is_empty() && lease.attachment.tenant != tenant;
        if inner.table.iter().any(|(of, lease, _)| of == session && foreign(lease)) {
            return false;
        }
        let ended = inner.table.release(session, epoch);
        for lease in &ended {
            lease.attachment.end.send_replace(Some(EndCode::Released));
            inner.forget(&lease.attachment);
        }
        self.publish(inner);
        !ended.is_empty()
    }

    /// The process stops: takes nothing new from now on.
    pub(crate) fn drain(&self) {
        let inner = &mut *self.inner.lock();
        inner.phase.stop();
        inner.table.accept(false);
        self.publish(inner);
    }

    /// Ends every session with this code and takes every unused lease back.
    pub(crate) fn end_all(&self, code: EndCode) {
        let inner = &mut *self.inner.lock();
        inner.end_all(code);
        self.publish(inner);
    }

    /// Drops leases whose time is over, and everything once the time that an order left is.
    pub(crate) fn expire(&self) {
        let now = self.now();
        let inner = &mut *self.inner.lock();
        inner.forget_expired(now);
        if inner.phase.is_over(now) && inner.table.taken() > 0 {
            tracing::warn!(sessions = inner.table.active(), "the deadline has come: ending what is still here");
            inner.end_all(EndCode::WorkerStopping);
        }
        self.publish(inner);
    }

    pub(crate) fn counts(&self) -> Counts {
        self.inner.lock().counts()
    }

    /// Sessions and reservations: terms, and whether active.
    pub(crate) fn sessions(&self) -> Vec<(Arc<Terms>, bool)> {
        self.inner.lock().table.iter().map(|(_, lease, active)| (lease.attachment.clone(), active)).collect()
    }

    /// The oldest key generation that a lease or connection still uses.
    pub(crate) fn oldest_generation(&self) -> Option<KeyGeneration> {
        let now = SystemTime::now();
        self.inner.lock().table.iter().filter_map(|(_, lease, _)| lease.attachment.oldest_generation(now)).min()
    }

    /// Changes when the counts may have.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn publish(&self, inner: &Inner) {
        let counts = inner.counts();
        self.metrics.reserved.set(counts.reserved.into());
        self.metrics.active.set(counts.active.into());
        self.changed.send_replace(());
    }
}

impl Inner {
    fn counts(&self) -> Counts {
        let (taken, active) = (self.table.taken(), self.table.active());
        Counts {
            slots: self.table.slots(),
            reserved: taken - active,
            active,
            free: self.table.free(),
            phase: self.phase.phase(),
            ordered_unix_ms: self.phase.ordered_unix_ms(),
        }
    }

    fn end_all(&mut self, code: EndCode) {
        let leases = self.table.iter().map(|(_, lease, active)| (lease.attachment.clone(), active));
        for (terms, active) in leases.collect::<Vec<_>>() {
            // Whoever gave another reason before was first.
            terms.end.send_if_modified(|end| end.is_none().then(|| *end = Some(code)).is_some());
            if !active && self.table.end(terms.session, terms.lease) {
                self.forget(&terms);
            }
        }
    }

    fn emptiest_shard(&self) -> Option<usize> {
        let load = |shard: usize| self.table.iter().filter(|(_, lease, _)| lease.attachment.shard == shard).count();
        (0..self.doors.len()).min_by_key(|shard| load(*shard))
    }

    fn forget_expired(&mut self, now: Millis) {
        for (_, lease) in self.table.poll_expired(now) {
            self.forget(&lease.attachment);
        }
    }

    /// The lease's first connection IDs are worth nothing any more.
    fn forget(&self, terms: &Terms) {
        self.doors[terms.shard].gate.lock().forget(terms.attempts.iter().map(|(_, nonce)| *nonce));
    }
}

impl Door {
    fn terms(
        &self,
        request: &Request,
        shard: usize,
        lease: LeaseId,
        expires_at: SystemTime,
        behaviour: Arc<AgentBehaviour>,
    ) -> Terms {
        let expires_s = expires_at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs() + 1);
        let attempts: Vec<_> = {
            let mut minter = self.minter.lock();
            (0..ATTEMPTS).map(|_| minter.mint_initial(expires_s)).collect()
        };
        let attempt = Attempt { session: request.session, epoch: request.epoch };
        self.gate.lock().expect(attempts.iter().map(|(_, nonce)| *nonce), attempt);
        Terms {
            session: request.session,
            epoch: request.epoch,
            lease,
            tenant: request.tenant.clone(),
            client_key: request.client_key,
            codec: request.codec,
            neighbourhood: request.neighbourhood,
            behaviour,
            shard,
            server_id: self.server_id,
            attempts,
            expires_at,
            since: SystemTime::now(),
            granted: Instant::now(),
            minted: self.rotation.minting(),
            generation: AtomicU32::new(0),
            path: Mutex::default(),
            end: watch::Sender::new(None),
            turns: AtomicU32::new(0),
            relay: AtomicU32::new(0),
            owner: Mutex::new(None),
        }
    }
}

impl Terms {
    /// Makes a new connection the owner; the one before it, if any, is told to stop.
    pub(crate) fn take_over(&self) -> CancellationToken {
        let owner = CancellationToken::new();
        if let Some(before) = self.owner.lock().replace(owner.clone()) {
            before.cancel();
        }
        owner
    }

    pub(crate) fn set_relay(&self, relay: Option<RelayNumber>) {
        self.relay.store(relay.map_or(0, RelayNumber::value).into(), Ordering::Relaxed);
    }

    /// The oldest key generation that its connection may still use.
    pub(crate) fn set_generation(&self, generation: KeyGeneration) {
        self.generation.store(generation.value(), Ordering::Relaxed);
    }

    /// Time since the lease was granted.
    pub(crate) fn age(&self) -> Duration {
        self.granted.elapsed()
    }

    /// The oldest generation that anybody may use for this session: its connection, or an attempt to connect.
    fn oldest_generation(&self, now: SystemTime) -> Option<KeyGeneration> {
        let attempts = (now <= self.expires_at + CLOCKS_DIFFER).then_some(self.minted);
        self.connection_generation().into_iter().chain(attempts).min()
    }

    /// The oldest generation that its connection may still use; none before its first second.
    pub(crate) fn connection_generation(&self) -> Option<KeyGeneration> {
        KeyGeneration::new(self.generation.load(Ordering::Relaxed)).ok().filter(|generation| generation.value() > 0)
    }
}

/// A lease's first connection IDs are worth something for this much longer where the clock is behind.
const CLOCKS_DIFFER: Duration = Duration::from_secs(30);
/// First connection IDs per lease: one per attempt, each good for one connection.
const ATTEMPTS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{KeySet, tests::material};
    use antiphon_core::{
        cid::{CidCodec, ConfigId, NonceCounter},
        id::{Incarnation, RegionNumber, ShardNumber, WorkerNumber},
    };
    use antiphon_proto::v1::{PhaseOrder, RevisionSessions};

    fn door() -> Door {
        let server_id = ServerId {
            region: RegionNumber::new(1).unwrap(),
            worker: WorkerNumber::new(1).unwrap(),
            shard: ShardNumber::new(0).unwrap(),
            incarnation: Incarnation::new(1).unwrap(),
        };
        let config = ConfigId::new(0).unwrap();
        let minter = CidMinter::new(server_id, config, [1; 16], NonceCounter::starting_at(0));
        let mut codec = CidCodec::new();
        codec.insert(config, [1; 16]);
        let gate = Gate::new(server_id, codec, 4);
        let (configs, resets) = material(&[7], 7, 1);
        let keys = KeySet::new(&configs, &[[1; 32]], &resets, 1).unwrap();
        let rotation = Arc::new(Rotation::new(&keys, Duration::from_secs(60), Instant::now()));
        Door { server_id, minter: Arc::new(Mutex::new(minter)), gate: Arc::new(Mutex::new(gate)), rotation }
    }

    fn capacity(slots: u32) -> Capacity {
        let metrics = Metrics::new(&mut prometheus_client::registry::Registry::default());
        let capacity = Capacity::new("default/a".into(), slots, metrics);
        capacity.open(vec![door()]);
        capacity.set_behaviour(AgentBehaviour::default());
        capacity
    }

    fn request(n: u8) -> Request {
        Request {
            session: SessionId::from_bytes([n; 16]),
            epoch: Epoch::FIRST,
            agent: "default/a".into(),
            tenant: "t".into(),
            client_key: [n; 32],
            codec: Codec::Opus,
            ttl: Duration::from_secs(30),
            neighbourhood: 0,
        }
    }

    #[test]
    fn a_thousand_askers_get_exactly_the_slots() {
        let capacity = Arc::new(capacity(100));
        let granted = std::thread::scope(|scope| {
            let askers: Vec<_> = (0..4_u32)
                .map(|t| {
                    let capacity = &capacity;
                    scope.spawn(move || {
                        let ask = |i: u32| {
                            let mut id = [0; 16];
                            id[..4].copy_from_slice(&(t * 250 + i).to_be_bytes());
                            capacity.reserve(&Request { session: SessionId::from_bytes(id), ..request(0) })
                        };
                        (0..250).filter(|i| ask(*i).is_ok()).count()
                    })
                })
                .collect();
            askers.into_iter().map(|a| a.join().unwrap()).sum::<usize>()
        });
        assert_eq!(granted, 100);
        assert_eq!(capacity.counts().free, 0);
    }

    #[test]
    fn a_repeat_gets_the_same_connection_ids_but_not_with_another_key() {
        let capacity = capacity(1);
        let first = capacity.reserve(&request(1)).unwrap();
        let again = capacity.reserve(&request(1)).unwrap();
        assert_eq!(first.attempts, again.attempts);
        let thief = Request { client_key: [9; 32], ..request(1) };
        assert_eq!(capacity.reserve(&thief).unwrap_err(), Refusal::OtherClient);
        let newer = Request { epoch: Epoch::new(2).unwrap(), ..thief };
        assert_eq!(capacity.reserve(&newer).unwrap_err(), Refusal::OtherClient);
        let other_tenant = Request { tenant: "other".into(), epoch: Epoch::new(2).unwrap(), ..request(1) };
        assert_eq!(capacity.reserve(&other_tenant).unwrap_err(), Refusal::OtherClient);
        let own = Request { epoch: Epoch::new(2).unwrap(), ..request(1) };
        assert!(capacity.reserve(&own).is_ok(), "the session's own client goes on to a newer epoch");
    }

    #[test]
    fn rising_epochs_leave_nothing_behind_at_the_gate() {
        let capacity = capacity(1);
        for epoch in 1..200 {
            capacity.reserve(&Request { epoch: Epoch::new(epoch).unwrap(), ..request(1) }).unwrap();
        }
        let gate = capacity.inner.lock().doors[0].gate.clone();
        assert_eq!(gate.lock().attempts(), ATTEMPTS);
    }

    #[test]
    fn an_old_connection_does_not_end_its_successors_lease() {
        let capacity = capacity(1);
        let old = capacity.reserve(&request(1)).unwrap();
        assert!(capacity.release(old.session, None, "t"));
        let new = capacity.reserve(&request(1)).unwrap();
        capacity.ended(&old);
        assert_eq!(capacity.counts().reserved, 1);
        assert_eq!(capacity.activate(&old), Err(ActivateError::Gone));
        assert_eq!(capacity.activate(&new), Ok(()));
    }

    #[test]
    fn a_released_lease_closes_the_gate_and_tells_its_session() {
        let capacity = capacity(1);
        let terms = capacity.reserve(&request(1)).unwrap();
        let gate = capacity.inner.lock().doors[0].gate.clone();
        let cid = terms.attempts[0].0;
        assert!(gate.lock().attempt(cid.as_bytes()).is_some());
        assert!(!capacity.release(terms.session, None, "somebody else"));
        assert!(capacity.release(terms.session, None, "t"));
        assert!(gate.lock().attempt(cid.as_bytes()).is_none());
        assert_eq!(*terms.end.borrow(), Some(EndCode::Released));
        assert!(!capacity.release(terms.session, None, "t"), "twice is not an error");
    }

    #[test]
    fn orders_close_and_open_the_door_and_a_deadline_clears_the_room() {
        let capacity = capacity(3);
        let revision = |revision: &str| AgentBehaviour { revision: revision.into(), ..AgentBehaviour::default() };
        let order = |phase: Phase, ordered_unix_ms| {
            capacity.order(&PhaseOrder { phase: phase.into(), ordered_unix_ms, ..PhaseOrder::default() });
        };
        capacity.set_behaviour(revision("old"));
        let talking = capacity.reserve(&request(1)).unwrap();
        capacity.activate(&talking).unwrap();
        capacity.set_behaviour(revision("new"));
        let waiting = capacity.reserve(&request(2)).unwrap();
        order(Phase::Cordoned, 1);
        assert_eq!(capacity.reserve(&request(3)).unwrap_err().label(), "draining");
        capacity.expire();
        assert_eq!(*talking.end.borrow(), None);
        order(Phase::Active, 2);
        let third = capacity.reserve(&request(3)).unwrap();
        capacity.activate(&third).unwrap();
        let of = |r: &str| RevisionSessions { revision: r.into(), sessions: 1 };
        assert_eq!(capacity.revisions(), [of("new"), of("old")]);
        // No time left for anybody.
        order(Phase::Draining, 3);
        capacity.expire();
        assert_eq!(*talking.end.borrow(), Some(EndCode::WorkerStopping));
        assert_eq!(capacity.activate(&waiting), Err(ActivateError::Gone), "an unused lease is worth nothing any more");
        let counts = capacity.counts();
        assert_eq!(
            (counts.phase, counts.reserved, counts.active),
            (Phase::Draining, 0, 2),
            "sessions end by themselves"
        );
        assert_eq!(counts.ordered_unix_ms, 3);
        order(Phase::Active, 4);
        capacity.drain();
        order(Phase::Active, 5);
        assert_eq!(capacity.counts().phase, Phase::Draining, "a stop is not undone");
        assert_eq!(capacity.reserve(&request(4)).unwrap_err().label(), "draining");
    }

    #[test]
    fn the_wrong_agent_and_an_unregistered_worker_are_refused() {
        let metrics = Metrics::new(&mut prometheus_client::registry::Registry::default());
        let unready = Capacity::new("default/a".into(), 1, metrics);
        assert_eq!(unready.reserve(&request(1)).unwrap_err(), Refusal::NotReady);
        let other = Request { agent: "default/b".into(), ..request(1) };
        assert_eq!(unready.reserve(&other).unwrap_err().label(), "wrong_agent");
    }
}
