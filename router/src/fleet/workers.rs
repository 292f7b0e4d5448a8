//! Workers of the own region: registration, reports, claims on their free leases.

use std::{sync::Arc, time::Duration};

use antiphon_core::{
    clock::Millis,
    id::{RegionNumber, ServerId, ShardNumber, WorkerNumber},
    placement::{Freshness, Phase, WorkerView},
};
use antiphon_proto::v1;
use antiphon_runtime::{pki::Role, tls};
use tokio::sync::watch;
use tonic::transport::Channel;

use super::{
    Fleet, State, Target,
    claim::Claim,
    clock,
    hello::WorkerHello,
    keys::MemberKeys,
    measured,
    orders::Order,
    standing::{RegisterError, Standing},
};
use crate::{records, store::WorkerClaim};

/// A registered worker. It stays until it deregisters or a newer incarnation takes its place.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) hello: WorkerHello,
    pub(crate) number: WorkerNumber,
    /// Its open control stream; `None`: broken.
    pub(crate) stream: Option<u64>,
    pub(crate) report: Option<Report>,
    /// What it was told to do; `None`: nothing, or another router said something newer.
    pub(super) order: watch::Sender<Option<Order>>,
    /// Leases that it has given, as far as we know.
    pub(crate) taken: u32,
    /// Leases that we are asking it for.
    pub(crate) claims: u32,
    pub(crate) channel: Channel,
    pub(super) keys: MemberKeys,
}

/// The newest report.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) at: Millis,
    pub(crate) phase: Phase,
    pub(crate) slots: u32,
    pub(crate) reserved: u32,
    pub(crate) active: u32,
    /// Its clock minus ours.
    pub(crate) clock_ahead_ms: i64,
    /// Round trips of its callers.
    pub(crate) measured: Vec<v1::MeasuredRtt>,
    /// Sessions by agent revision.
    pub(crate) revisions: Vec<v1::RevisionSessions>,
    /// Of the order that it follows; 0: it has had none.
    pub(crate) ordered_unix_ms: u64,
}

impl Worker {
    pub(crate) fn slots(&self) -> u32 {
        self.report.as_ref().map_or(self.hello.slots, |r| r.slots)
    }

    /// What it says it is in.
    pub(crate) fn said_phase(&self) -> Phase {
        self.report.as_ref().map_or(Phase::Active, |r| r.phase)
    }

    pub(crate) fn free(&self) -> u32 {
        self.slots().saturating_sub(self.taken.saturating_add(self.claims))
    }

    pub(crate) fn freshness(&self) -> Freshness {
        match (self.stream, &self.report) {
            (None, _) => Freshness::Disconnected,
            (Some(_), None) => Freshness::Never,
            (Some(_), Some(report)) => match clock::too_far_behind(report.clock_ahead_ms) {
                Some(by) => Freshness::ClockBehind { by },
                None => Freshness::Reported { at: report.at, lease: WORKER_LEASE },
            },
        }
    }

    /// Whether it takes part in placement now, room aside.
    pub(crate) fn in_service(&self, now: Millis) -> bool {
        let lease = match self.freshness() {
            Freshness::Reported { at, lease } => now.since(at) <= lease,
            _ => false,
        };
        lease && self.phase() == Phase::Active
    }

    pub(crate) fn view(&self, region: &str) -> WorkerView {
        WorkerView {
            region: region.to_owned(),
            agent: self.hello.agent.clone(),
            gpu_class: self.hello.gpu_class.clone(),
            phase: self.phase(),
            freshness: self.freshness(),
            slots: self.slots(),
            free: self.free(),
        }
    }

    /// Its routes: server ID and address of each shard.
    pub(crate) fn routes(&self, region: RegionNumber) -> impl Iterator<Item = (u64, Arc<str>)> {
        let addresses = self.hello.shards.iter().map(|(_, address)| address.as_str().into());
        self.shard_ids(region).into_iter().map(|(_, id)| id.to_u64()).zip(addresses)
    }

    /// The server ID of each shard.
    pub(crate) fn shard_ids(&self, region: RegionNumber) -> Vec<(ShardNumber, ServerId)> {
        let (worker, incarnation) = (self.number, self.hello.incarnation);
        let shards = self.hello.shards.iter().map(|(shard, _)| *shard);
        shards.map(|shard| (shard, ServerId { region, worker, shard, incarnation })).collect()
    }
}

impl Fleet {
    /// Registers a worker and its routes.
    pub(crate) async fn register_worker(&self, hello: WorkerHello) -> Result<Standing<WorkerNumber>, RegisterError> {
        // One at a time: looking for a living namesake and taking its number must not interleave.
        let _turn = self.registering.lock().await;
        {
            let state = self.state.lock();
            if self.own_number(&state).is_none() {
                return Err(RegisterError::NoRegion(self.region.clone()));
            }
            if !state.records.agents.contains_key(&hello.agent) {
                return Err(RegisterError::NoAgent(hello.agent));
            }
            let now = self.clock.now();
            let heard = |w: &Worker| w.report.as_ref().is_none_or(|r| now.since(r.at) <= WORKER_LEASE);
            let lives = |w: &&Worker| {
                w.hello.name == hello.name && w.hello.incarnation != hello.incarnation && w.stream.is_some() && heard(w)
            };
            if state.workers.values().any(|w| lives(&w)) {
                return Err(RegisterError::Alive(hello.name));
            }
            let others = state.workers.values().filter(|w| w.hello.agent == hello.agent && w.hello.name != hello.name);
            if others.count() >= MAX_WORKERS_OF_AGENT {
                return Err(RegisterError::TooMany(hello.agent));
            }
        }
        let channel = tls::channel(&hello.control_address, &self.identity, Role::Worker, &self.region)?;
        let claim = WorkerClaim {
            name: hello.name.clone(),
            agent: hello.agent.clone(),
            incarnation: hello.incarnation,
            held: hello.held,
        };
        let number = self.store.claim_worker(&claim).await?;
        let mut state = self.state.lock();
        let stream = state.next_stream();
        let former = state.workers.get(&number).filter(|w| w.hello.incarnation == hello.incarnation);
        // A new process uses no keys yet; one that was here before does what it last said; of one that was elsewhere
        // (this router may have started after it) nothing is known.
        let oldest = match (former, hello.held) {
            (Some(former), _) => former.keys.oldest,
            (None, Some(_)) => None,
            (None, None) => Some(0),
        };
        let keys = MemberKeys::unreported(oldest);
        // The former incarnation is gone: its successor is here. Its reports do not speak for the new one.
        let same = |w: &Worker| w.number == number || w.hello.name == hello.name;
        let former: Vec<WorkerNumber> = state.workers.values().filter(|w| same(w)).map(|w| w.number).collect();
        let order = state.order_of(&hello);
        for former in former {
            // Who takes a number over from another name proves nothing of that one.
            let successor = |w: &Worker| w.hello.name == hello.name && w.hello.incarnation != hello.incarnation;
            let proven = state.workers.get(&former).is_some_and(successor);
            self.remove_worker(&mut state, former, proven);
        }
        let worker = Worker {
            hello,
            number,
            stream: Some(stream),
            report: None,
            order: watch::Sender::new(order),
            taken: 0,
            claims: 0,
            channel,
            keys,
        };
        tracing::info!(worker = worker.hello.name, %number, "worker registered");
        if let Some(region) = self.own_number(&state) {
            worker.shard_ids(region).iter().for_each(|(_, id)| state.dead.revive(id.to_u64()));
        }
        state.workers.insert(number, worker);
        self.routes_changed(&mut state);
        Ok(Standing { number, stream })
    }

    /// Takes a report. `false`: another stream speaks for the worker now.
    pub(crate) fn worker_reported(&self, standing: Standing<WorkerNumber>, report: &v1::WorkerReport) -> bool {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let Some(worker) = state.worker_of(standing) else {
            return false;
        };
        let clock_ahead_ms = clock::ahead_ms(report.unix_ms, clock::unix_ms());
        let before = worker.report.as_ref().map_or(0, |r| r.clock_ahead_ms);
        clock::tell("worker", &worker.hello.name, before, clock_ahead_ms);
        worker.report = Some(Report {
            at: now,
            phase: records::phase(report.phase),
            slots: report.slots.min(worker.hello.slots),
            reserved: report.reserved,
            active: report.active,
            clock_ahead_ms,
            measured: measured::taken(&report.measured, measured::MOST_OF_WORKER),
            revisions: report.revisions.iter().take(MAX_REVISIONS).cloned().collect(),
            ordered_unix_ms: report.ordered_unix_ms,
        });
        worker.drop_older_order();
        worker.taken = report.reserved.saturating_add(report.active);
        worker.keys =
            MemberKeys::reported(&report.loaded_generations, report.oldest_generation, report.minting_generation);
        let slots = worker.slots();
        if state.slots_in_view(standing.number) == slots {
            state.refresh_worker(standing.number);
        } else {
            state.view = None;
        }
        drop(state);
        self.capacity.send_modify(|n| *n += 1);
        true
    }

    /// Whether this stream still speaks for the worker.
    pub(crate) fn worker_stands(&self, standing: Standing<WorkerNumber>) -> bool {
        self.state.lock().worker_of(standing).is_some()
    }

    /// The worker's stream is broken: out of placement, its routes stay.
    pub(crate) fn worker_disconnected(&self, standing: Standing<WorkerNumber>) {
        let mut state = self.state.lock();
        if let Some(worker) = state.worker_of(standing) {
            worker.stream = None;
            tracing::warn!(worker = worker.hello.name, "worker disconnected, its routes stay");
            state.refresh_worker(standing.number);
            drop(state);
            self.capacity.send_modify(|n| *n += 1);
            self.settled.send_modify(|n| *n += 1);
        }
    }

    /// The worker says that it is gone for good: its routes go and its number is free.
    pub(crate) async fn worker_deregistered(&self, standing: Standing<WorkerNumber>) {
        let gone = {
            let mut state = self.state.lock();
            if state.worker_of(standing).is_none() {
                return;
            }
            let gone = self.remove_worker(&mut state, standing.number, true);
            self.routes_changed(&mut state);
            gone
        };
        if let Some(worker) = gone {
            tracing::info!(worker = worker.hello.name, "worker deregistered");
            let incarnation = worker.hello.incarnation;
            self.store.release_worker(standing.number, incarnation).await;
        }
    }

    /// Somebody who must know says that a worker is gone; an incarnation of 0 means whichever is registered. `false`:
    /// no such worker is registered.
    pub(crate) async fn worker_gone(&self, name: &str, incarnation: u32) -> bool {
        let gone = {
            let mut state = self.state.lock();
            let found = state
                .workers
                .values()
                .find(|w| w.hello.name == name && (incarnation == 0 || w.hello.incarnation.value() == incarnation));
            let Some(number) = found.map(|w| w.number) else {
                return false;
            };
            let gone = self.remove_worker(&mut state, number, true);
            self.routes_changed(&mut state);
            gone
        };
        if let Some(worker) = gone {
            self.store.release_worker(worker.number, worker.hello.incarnation).await;
        }
        true
    }

    /// Another router of this region knows that workers are gone.
    pub(super) fn sibling_reported(&self, dead: &[v1::DeadServer]) {
        let gone = |w: &Worker, id: ServerId| w.number == id.worker && w.hello.incarnation == id.incarnation;
        let mut state = self.state.lock();
        let mut removed = false;
        for server in dead {
            let id = ServerId::from_u64(server.server_id);
            let of_ours = self.own_number(&state) == Some(id.region);
            if of_ours && state.workers.get(&id.worker).is_some_and(|w| gone(w, id)) {
                removed |= self.remove_worker(&mut state, id.worker, true).is_some();
            }
        }
        if removed {
            self.routes_changed(&mut state);
        }
    }

    /// Takes a worker out; with proof that this life of it is over, its clients are told so.
    fn remove_worker(&self, state: &mut State, number: WorkerNumber, proven: bool) -> Option<Worker> {
        let worker = state.workers.remove(&number)?;
        if let (true, Some(region)) = (proven, self.own_number(state)) {
            let now = self.clock.now();
            for shard in worker.shard_ids(region) {
                let reset_keys = self.reset_keys(&[shard], &state.keys);
                let server = v1::DeadServer { server_id: shard.1.to_u64(), reset_keys };
                state.dead.insert(server, true, now);
            }
        }
        Some(worker)
    }

    /// Counts a lease as taken while its worker is being asked. `None`: there is none free, or it is gone.
    pub(crate) fn claim(self: &Arc<Self>, number: WorkerNumber) -> Option<Claim> {
        self.claim_in(&mut self.state.lock(), number)
    }

    pub(super) fn claim_in(self: &Arc<Self>, state: &mut State, number: WorkerNumber) -> Option<Claim> {
        let worker = state.workers.get_mut(&number)?;
        if worker.free() == 0 {
            return None;
        }
        worker.claims += 1;
        let claim = Claim {
            fleet: Arc::clone(self),
            number,
            name: worker.hello.name.clone(),
            server_name: worker.hello.server_name.clone(),
            incarnation: worker.hello.incarnation,
            channel: worker.channel.clone(),
        };
        state.refresh_worker(number);
        Some(claim)
    }

    /// The worker gave a lease or session up on our word; its next report says what is true.
    pub(crate) fn released(&self, number: WorkerNumber) {
        let mut state = self.state.lock();
        if let Some(worker) = state.workers.get_mut(&number) {
            worker.taken = worker.taken.saturating_sub(1);
            state.refresh_worker(number);
        }
        drop(state);
        self.settled.send_modify(|n| *n += 1);
    }

    /// The channel of a registered worker.
    pub(crate) fn worker_channel(&self, number: WorkerNumber) -> Option<Channel> {
        let state = self.state.lock();
        state.workers.get(&number).map(|w| w.channel.clone())
    }

    /// All registered workers.
    pub(crate) fn worker_targets(&self) -> Vec<Target> {
        let state = self.state.lock();
        let target = |w: &Worker| Target::Worker(w.number, w.hello.name.clone());
        state.workers.values().map(target).collect()
    }

    /// Channels of all connected workers, with their names.
    pub(crate) fn worker_channels(&self) -> Vec<(String, Channel)> {
        let state = self.state.lock();
        let connected = state.workers.values().filter(|w| w.stream.is_some());
        connected.map(|w| (w.hello.name.clone(), w.channel.clone())).collect()
    }
}

impl State {
    /// The worker, if this stream still speaks for it.
    pub(super) fn worker_of(&mut self, standing: Standing<WorkerNumber>) -> Option<&mut Worker> {
        let worker = self.workers.get_mut(&standing.number)?;
        (worker.stream == Some(standing.stream)).then_some(worker)
    }

    /// Whether a worker of the agent is being asked for a lease.
    pub(super) fn is_asking(&self, agent: &str) -> bool {
        let mut workers = self.workers.values();
        workers.any(|w| w.claims > 0 && w.hello.agent == agent)
    }

    /// Brings a worker's newest numbers into the planner's view, if there is one.
    pub(super) fn refresh_worker(&mut self, number: WorkerNumber) {
        let (Some(view), Some(worker)) = (&mut self.view, self.workers.get(&number)) else {
            return;
        };
        match view.workers.binary_search(&number) {
            Ok(index) => {
                let (phase, freshness) = (worker.phase(), worker.freshness());
                view.snapshot.update_worker(index, phase, freshness, worker.free());
            }
            Err(_) => self.view = None,
        }
    }

    fn slots_in_view(&self, number: WorkerNumber) -> u32 {
        let view = self.view.as_ref();
        let index = view.and_then(|v| v.workers.binary_search(&number).ok());
        view.zip(index).map_or(0, |(v, index)| v.slots[index])
    }
}

/// How long a worker's report holds for placement.
pub(crate) const WORKER_LEASE: Duration = Duration::from_secs(3);
/// As many as a pool may have: one certificate stands for all of an agent's workers, and nobody is to take all numbers.
const MAX_WORKERS_OF_AGENT: usize = 10_000;
/// Agent revisions of one worker's sessions; those of years, for one that lasts that long.
const MAX_REVISIONS: usize = 64;
