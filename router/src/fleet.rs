//! The state of one region's router: who is registered, what peers tell, and the planner's view of both.
//!
//! One lock, held for computations only. Three counters wake those who wait: `topology` (routes, relays, records),
//! `capacity` (free leases) and `settled` (an answer that someone's placement may depend on).

mod claim;
mod clock;
mod dead;
mod hello;
mod keys;
mod measured;
mod orders;
mod peers;
mod relays;
mod remembered;
mod routes;
mod standing;
mod status;
mod strangers;
mod tiers;
mod welcome;
mod workers;

use std::{collections::BTreeMap, sync::Arc};

use antiphon_core::{
    clock::Millis,
    id::{RegionNumber, RelayNumber, WorkerNumber},
    keys::FleetRoot,
    placement::{self, Candidate, FleetSnapshot, Freshness, RegionView, Verdict},
};
use antiphon_proto::v1;
use antiphon_runtime::pki::Identity;
use parking_lot::Mutex;
use tokio::sync::watch;

pub(crate) use claim::Claim;
pub(crate) use clock::{Clock, Furthest, unix_ms};
pub(crate) use hello::{RelayHello, WorkerHello};
pub(crate) use routes::{RouteMap, delta, full};
pub(crate) use standing::Standing;
pub(crate) use tiers::{RegionMap, tell_regions};

use crate::{create::Create, records::Records, store::Store};
use dead::Dead;
use keys::Keys;
pub(crate) use keys::follow as follow_keys;
pub(crate) use measured::neighbourhood;
pub(crate) use orders::{Order, SetPhase};
use peers::Peer;
use relays::Relay;
pub(crate) use remembered::follow as remember;
use workers::Worker;

/// Shared by everything that the router serves.
#[derive(Debug)]
pub(crate) struct Fleet {
    pub(crate) region: String,
    pub(crate) identity: Identity,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: Clock,
    /// Counts changes of routes, relays and records.
    pub(crate) topology: watch::Sender<u64>,
    /// Counts changes of free leases.
    pub(crate) capacity: watch::Sender<u64>,
    /// Counts answers of workers and peers.
    pub(crate) settled: watch::Sender<u64>,
    root: FleetRoot,
    state: Mutex<State>,
    registering: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    records: Arc<Records>,
    workers: BTreeMap<WorkerNumber, Worker>,
    relays: BTreeMap<RelayNumber, Relay>,
    /// Numbers whose relays are known to be gone, and since when; and what other routers of the region last said of that,
    /// by address.
    gone_relays: BTreeMap<RelayNumber, Millis>,
    siblings_gone_relays: BTreeMap<String, Vec<u32>>,
    /// What other routers of the region said of their keys, by address.
    siblings_keys: BTreeMap<String, keys::SiblingKeys>,
    peers: BTreeMap<String, Peer>,
    /// Routes of the own workers, and those together with the peers'.
    own_routes: Arc<RouteMap>,
    all_routes: Arc<RouteMap>,
    /// Regions that are reached through their relays only; their workers are not among the routes.
    region_routes: Arc<RegionMap>,
    dead: Dead,
    /// `None`: something changed that it cannot follow; made anew when it is needed.
    view: Option<View>,
    records_hash: String,
    last_stream: u64,
    keys: Keys,
    measured: measured::Measured,
}

/// The planner's snapshot and what its indices stand for.
#[derive(Debug)]
struct View {
    snapshot: FleetSnapshot,
    /// In order of their indices, which is ascending.
    workers: Vec<WorkerNumber>,
    slots: Vec<u32>,
}

/// Whom to ask, in order, and why.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) targets: Vec<Target>,
    /// The first target's lease, if that is a worker of this region.
    pub(crate) claim: Option<Claim>,
    pub(crate) candidates: Vec<v1::Candidate>,
}

/// One to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A worker of this region.
    Worker(WorkerNumber, String),
    /// The routers of another region.
    Region { name: String },
}

/// Why nothing can be placed now.
#[derive(Debug)]
pub(crate) struct NoPlace {
    pub(crate) refusal: placement::Refusal,
    pub(crate) candidates: Vec<v1::Candidate>,
    /// A worker of the agent is being asked: the answer may change this.
    pub(crate) unsettled: bool,
}

impl Fleet {
    /// A fleet as the store knows it.
    pub(crate) fn new(identity: Identity, root: FleetRoot, store: Arc<dyn Store>) -> Arc<Self> {
        let records = Arc::clone(&store.watch().borrow());
        let state = State { records_hash: records.hash(), records, ..State::default() };
        let fleet = Arc::new(Self {
            region: identity.peer().region.clone(),
            identity,
            store,
            clock: Clock::start(),
            topology: watch::Sender::new(0),
            capacity: watch::Sender::new(0),
            settled: watch::Sender::new(0),
            root,
            state: Mutex::new(state),
            registering: tokio::sync::Mutex::default(),
        });
        fleet.recall();
        fleet
    }

    /// Takes new records.
    pub(crate) fn records_changed(&self, records: Arc<Records>) {
        let hash = records.hash();
        let mut state = self.state.lock();
        state.records_hash = hash;
        state.records = records;
        self.keep_peers(&mut state);
        self.routes_changed(&mut state);
        drop(state);
        // What it asks to write down, the next tick asks again.
        let _ = self.replan_keys();
        for counter in [&self.topology, &self.capacity, &self.settled] {
            counter.send_modify(|n| *n += 1);
        }
    }

    pub(crate) fn records(&self) -> Arc<Records> {
        Arc::clone(&self.state.lock().records)
    }

    /// What [`Records::hash`] says of the present ones.
    pub(crate) fn records_hash(&self) -> String {
        self.state.lock().records_hash.clone()
    }

    /// Whether this region has its record.
    pub(crate) fn has_region(&self) -> bool {
        self.own_number(&self.state.lock()).is_some()
    }

    /// Routes of the own workers.
    pub(crate) fn own_routes(&self) -> Arc<RouteMap> {
        Arc::clone(&self.state.lock().own_routes)
    }

    /// Routes of the whole fleet.
    pub(crate) fn all_routes(&self) -> Arc<RouteMap> {
        Arc::clone(&self.state.lock().all_routes)
    }

    /// Servers known to be dead that were added after `serial`, and the newest serial.
    pub(crate) fn dead_since(&self, serial: u64, own_only: bool) -> (Vec<v1::DeadServer>, u64) {
        self.state.lock().dead.since(serial, own_only, self.clock.now())
    }

    fn own_number(&self, state: &State) -> Option<RegionNumber> {
        state.records.regions.get(&self.region).map(|r| r.number)
    }

    /// Rebuilds the route tables; the view goes too, as workers may have come or gone.
    fn routes_changed(&self, state: &mut State) {
        if let Some(region) = self.own_number(state) {
            let own = state.workers.values().flat_map(|w| w.routes(region));
            state.own_routes = Arc::new(own.collect());
        }
        let mut all = RouteMap::clone(&state.own_routes);
        let now = self.clock.now();
        for (region, peer) in &state.peers {
            if !self.is_via_relays(state, region, now) {
                all.extend(peer.routes.iter().map(|(id, a)| (*id, Arc::clone(a))));
            }
        }
        state.all_routes = Arc::new(all);
        state.region_routes = Arc::new(self.regions_via_relays(state, now));
        state.view = None;
        self.topology.send_modify(|n| *n += 1);
        self.capacity.send_modify(|n| *n += 1);
    }

    /// Plans a request and, if its best target is a worker, claims a lease there before anybody else plans.
    ///
    /// `incumbent` is the region chosen lately for this agent and neighbourhood. With `here_only` only this region
    /// counts.
    pub(crate) fn plan(
        self: &Arc<Self>,
        create: &Create,
        here_only: bool,
        incumbent: Option<RegionNumber>,
        seed: u64,
    ) -> Result<Planned, NoPlace> {
        let here = [self.region.clone()];
        let now = self.clock.now();
        let mut state = self.state.lock();
        let view = match state.view.take() {
            Some(view) => view,
            None => self.arrange(&state),
        };
        let measured = create.location.map(|place| state.measured_from(place, &self.region, now)).unwrap_or_default();
        let request = placement::Request {
            agent: &create.agent,
            location: create.location.map(|l| l.unit_vector()),
            regions: if here_only { &here } else { &create.regions },
            residency: &create.residency,
            max_rtt: create.max_rtt,
            waited: create.waited,
            measured: &measured,
            incumbent,
            seed,
        };
        let outcome = placement::plan(&view.snapshot, &request, now);
        let planned = outcome.map(|placement| {
            let lines = placement.candidates(&view.snapshot);
            let candidates = state.describe(&view, &lines);
            (state.targets(&view, &placement.choices), candidates)
        });
        let planned = planned.map_err(|refusal| {
            let lines = refusal.candidates(&view.snapshot);
            NoPlace { candidates: state.describe(&view, &lines), unsettled: state.is_asking(&create.agent), refusal }
        });
        state.view = Some(view);
        let (targets, candidates) = planned?;
        let claim = match targets.first() {
            Some(Target::Worker(number, _)) => self.claim_in(&mut state, *number),
            _ => None,
        };
        Ok(Planned { targets, claim, candidates })
    }

    /// Counts a lease as taken in another region until its next digest.
    pub(crate) fn debit(&self, region: &str, agent: &str) {
        let mut state = self.state.lock();
        let index = state.records.regions.keys().position(|name| name == region);
        if let (Some(view), Some(index)) = (&mut state.view, index) {
            view.snapshot.debit_region(index, agent);
        }
    }

    fn arrange(&self, state: &State) -> View {
        let now = self.clock.now();
        let agents = state.records.agents.iter();
        let agents = agents.map(|(name, agent)| (name.clone(), agent.policy.clone()));
        let regions = state.records.regions.values().map(|record| {
            if record.name != self.region {
                return Peer::view(record, state.peers.get(&record.name), now);
            }
            RegionView {
                name: record.name.clone(),
                number: record.number,
                location: record.location,
                phase: record.phase,
                residency: record.residency.clone(),
                freshness: Freshness::Own,
                pools: vec![],
            }
        });
        let own = state.records.regions.contains_key(&self.region);
        let workers = || state.workers.values().filter(|_| own);
        let snapshot = FleetSnapshot::new(agents, regions.collect(), workers().map(|w| w.view(&self.region)).collect());
        View {
            snapshot: snapshot.expect("records keep names and numbers unique, workers are ours"),
            workers: workers().map(|w| w.number).collect(),
            slots: workers().map(Worker::slots).collect(),
        }
    }
}

impl State {
    fn next_stream(&mut self) -> u64 {
        self.last_stream += 1;
        self.last_stream
    }

    fn targets(&self, view: &View, choices: &[placement::RegionChoice]) -> Vec<Target> {
        let mut targets = Vec::new();
        for choice in choices {
            let region = view.snapshot.region(choice.region);
            if region.freshness == Freshness::Own {
                let numbers = choice.workers.iter().map(|index| view.workers[*index]);
                targets.extend(numbers.take(WORKERS_ASKED).filter_map(|number| {
                    let worker = self.workers.get(&number)?;
                    Some(Target::Worker(number, worker.hello.name.clone()))
                }));
            } else if self.records.regions.contains_key(&region.name) {
                targets.push(Target::Region { name: region.name.clone() });
            }
        }
        targets
    }

    /// An explanation in names instead of indices: all regions, and the first [`WORKERS_EXPLAINED`] workers.
    fn describe(&self, view: &View, lines: &[Candidate]) -> Vec<v1::Candidate> {
        let millis = |d: std::time::Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX);
        let mut workers = 0;
        let mut candidates = Vec::new();
        for line in lines {
            workers += usize::from(line.worker.is_some());
            if line.worker.is_some() && workers > WORKERS_EXPLAINED {
                continue;
            }
            let number = line.worker.map(|index| view.workers[index]);
            let worker = number.and_then(|number| self.workers.get(&number));
            candidates.push(v1::Candidate {
                region: view.snapshot.region(line.region).name.clone(),
                worker: worker.map_or_else(String::new, |w| w.hello.name.clone()),
                verdict: line.verdict.label().to_owned(),
                detail: line.verdict.to_string(),
                estimated_rtt_ms: line.rtt.map_or(0, millis),
                free: line.free,
                score: line.cost,
            });
        }
        candidates
    }
}

/// Puts another verdict on the line of a worker, or of a region as a whole (empty `worker`).
pub(crate) fn amend(
    candidates: &mut [v1::Candidate],
    region: &str,
    worker: &str,
    verdict: Verdict,
    detail: Option<String>,
) {
    let line = candidates.iter_mut().find(|c| c.region == region && c.worker == worker);
    if let Some(line) = line {
        line.verdict = verdict.label().to_owned();
        line.detail = detail.unwrap_or_else(|| verdict.to_string());
    }
}

/// Workers of this region to ask for one request.
const WORKERS_ASKED: usize = 4;
/// Workers in one explanation; a region's own line sums them up.
const WORKERS_EXPLAINED: usize = 64;
