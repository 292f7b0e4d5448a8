//! What the planner looks at, arranged so that a decision is a few passes over plain numbers.

use std::{collections::BTreeMap, time::Duration};

use super::{RELAX_OVER, Verdict, WEIGHT_COST};
use crate::{
    clock::Millis,
    geo::{Location, UnitVector},
    id::RegionNumber,
};

/// Whether something takes new sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Phase {
    /// Takes new sessions.
    #[default]
    Active,
    /// Keeps what it has, gets nothing new.
    Cordoned,
    /// Is being emptied.
    Draining,
}

impl Phase {
    pub(super) const fn objection(self) -> Option<Verdict> {
        match self {
            Self::Active => None,
            Self::Cordoned => Some(Verdict::Cordoned),
            Self::Draining => Some(Verdict::Draining),
        }
    }
}

/// How current the knowledge about something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// It is our own.
    Own,
    /// It reports, and each report holds for `lease`.
    Reported {
        /// Time of the last report.
        at: Millis,
        /// How long a report holds.
        lease: Duration,
    },
    /// Nothing was heard yet.
    Never,
    /// Its control stream is broken.
    Disconnected,
    /// It reports, but its clock is so far behind that it takes new tickets for ones from the future.
    ClockBehind {
        /// How far.
        by: Duration,
    },
}

impl Freshness {
    /// Until when [`Self::objection`] has nothing to say, as a number that is cheap to compare; `None`: it has now.
    fn current_until(self) -> Option<Millis> {
        match self {
            Self::Own => Some(Millis(u64::MAX)),
            Self::Reported { at, lease } => Some(at.after(lease)),
            Self::Never | Self::Disconnected | Self::ClockBehind { .. } => None,
        }
    }

    pub(super) fn objection(self, now: Millis) -> Option<Verdict> {
        match self {
            Self::Own => None,
            Self::Never => Some(Verdict::Stale { age: None }),
            Self::Disconnected => Some(Verdict::Disconnected),
            Self::ClockBehind { by } => Some(Verdict::ClockBehind { by }),
            Self::Reported { at, lease } => {
                let age = now.since(at);
                (age > lease).then_some(Verdict::Stale { age: Some(age) })
            }
        }
    }
}

/// What placement needs of an agent.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentPolicy {
    /// GPU class that its workers need; empty: any.
    pub gpu_class: String,
    /// Preferred ceiling on the round trip.
    pub rtt_ceiling: Duration,
    /// The ceiling after waiting for `relax_over`; not below `rtt_ceiling`.
    pub rtt_ceiling_max: Duration,
    /// Time over which the ceiling relaxes.
    pub relax_over: Duration,
    /// Regions that it runs in with their relative weight, 1..=1000; `None`: all regions alike.
    pub regions: Option<Vec<(String, u32)>>,
}

/// Any GPU, any distance, all regions.
impl Default for AgentPolicy {
    fn default() -> Self {
        Self {
            gpu_class: String::new(),
            rtt_ceiling: UNLIMITED_RTT,
            rtt_ceiling_max: UNLIMITED_RTT,
            relax_over: RELAX_OVER,
            regions: None,
        }
    }
}

/// A region as its router or its digest describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionView {
    /// Name, unique in the fleet.
    pub name: String,
    /// Number, unique in the fleet.
    pub number: RegionNumber,
    /// Where it is; without it distance is not judged.
    pub location: Option<Location>,
    /// Whether it takes new sessions.
    pub phase: Phase,
    /// Residency zones that it is in.
    pub residency: Vec<String>,
    /// How current this is. [`Freshness::Own`] means that the snapshot lists its workers and `pools` is empty.
    pub freshness: Freshness,
    /// Capacity by agent and GPU class, of a region whose workers are not listed.
    pub pools: Vec<PoolView>,
}

impl RegionView {
    pub(super) fn lists_workers(&self) -> bool {
        self.freshness == Freshness::Own
    }
}

/// The workers of one agent and GPU class in one region, added up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolView {
    /// `namespace/name` of the agent.
    pub agent: String,
    /// GPU class; empty: none.
    pub gpu_class: String,
    /// Workers that take new sessions.
    pub workers: u32,
    /// Sessions that they hold at most.
    pub slots: u32,
    /// Free leases.
    pub free: u32,
}

/// One worker of a region with [`Freshness::Own`].
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// Name of its region.
    pub region: String,
    /// `namespace/name` of the agent it serves.
    pub agent: String,
    /// GPU class; empty: none.
    pub gpu_class: String,
    /// Whether it takes new sessions.
    pub phase: Phase,
    /// How current this is.
    pub freshness: Freshness,
    /// Sessions that it holds at most.
    pub slots: u32,
    /// Free leases; above `slots` counts as `slots`.
    pub free: u32,
}

/// Why a snapshot cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Two regions share a name or a number.
    #[error("region {0} is there twice, by name or by number")]
    DuplicateRegion(String),
    /// A worker of a region that is not there or does not list workers.
    #[error("worker {worker} is in region {region}, which lists no workers")]
    NoSuchRegion {
        /// Index of the worker.
        worker: usize,
        /// The region's name.
        region: String,
    },
}

/// The fleet at one moment. Regions and workers keep the indices of the lists it was made from.
#[derive(Clone, Debug, Default)]
pub struct FleetSnapshot {
    regions: Vec<Region>,
    workers: Vec<Worker>,
    agents: Vec<Agent>,
    by_name: BTreeMap<String, usize>,
}

#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) view: RegionView,
    pub(super) place: Option<UnitVector>,
    open_until: Option<Millis>,
}

impl Region {
    /// Why nothing is placed there, whatever its room is.
    pub(super) fn objection(&self, now: Millis) -> Option<Verdict> {
        if self.open_until.is_some_and(|until| now <= until) {
            return None;
        }
        self.view.phase.objection().or_else(|| self.view.freshness.objection(now))
    }
}

/// Until when something takes new sessions if it has room; `None`: it does not.
fn open_until(phase: Phase, freshness: Freshness) -> Option<Millis> {
    freshness.current_until().filter(|_| phase == Phase::Active)
}

#[derive(Clone, Debug)]
pub(super) struct Agent {
    pub(super) policy: AgentPolicy,
    /// One per region.
    pub(super) served: Vec<Served>,
}

/// One agent in one region.
#[derive(Clone, Debug, Default)]
pub(super) struct Served {
    /// 0: the agent does not run there.
    pub(super) weight: u32,
    pub(super) weight_cost: f64,
    /// There are workers, but none of the agent's GPU class.
    pub(super) wrong_gpu_class: bool,
    pub(super) count: u32,
    pub(super) slots: u32,
    pub(super) free: u32,
    /// Indices of its workers, where listed.
    pub(super) workers: Vec<usize>,
}

/// The numbers of a worker that a decision reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Worker {
    agent: Option<usize>,
    region: usize,
    right_gpu_class: bool,
    phase: Phase,
    freshness: Freshness,
    /// From the three above, once per report.
    open_until: Option<Millis>,
    slots: u32,
    pub(super) free: u32,
    /// Free leases per slot, in 1/65,536; divided once per report, not per decision.
    pub(super) free_share: u32,
}

impl Worker {
    fn set_free(&mut self, free: u32) {
        self.free = free.min(self.slots);
        let share = (u64::from(self.free) << 16) / u64::from(self.slots.max(1));
        self.free_share = u32::try_from(share).unwrap_or(u32::MAX);
    }

    fn set_state(&mut self, phase: Phase, freshness: Freshness) {
        (self.phase, self.freshness) = (phase, freshness);
        self.open_until = open_until(phase, freshness).filter(|_| self.right_gpu_class);
    }

    #[inline]
    pub(super) fn objection(&self, now: Millis) -> Option<Verdict> {
        if self.open_until.is_some_and(|until| now <= until) {
            return (self.free == 0).then_some(Verdict::Full);
        }
        if !self.right_gpu_class {
            return Some(Verdict::WrongGpuClass);
        }
        if let Some(verdict) = self.phase.objection() {
            return Some(verdict);
        }
        if let Some(verdict) = self.freshness.objection(now) {
            return Some(verdict);
        }
        (self.free == 0).then_some(Verdict::Full)
    }
}

impl FleetSnapshot {
    /// Arranges agents (by `namespace/name`), regions and workers.
    ///
    /// # Errors
    /// [`SnapshotError`] when regions are not unique or a worker's region lists no workers.
    pub fn new(
        agents: impl IntoIterator<Item = (String, AgentPolicy)>,
        regions: Vec<RegionView>,
        workers: Vec<WorkerView>,
    ) -> Result<Self, SnapshotError> {
        let mut snapshot = Self::default();
        let mut by_region = BTreeMap::new();
        for (index, view) in regions.into_iter().enumerate() {
            let same = |r: &Region| r.view.name == view.name || r.view.number == view.number;
            if snapshot.regions.iter().any(same) {
                return Err(SnapshotError::DuplicateRegion(view.name));
            }
            by_region.insert(view.name.clone(), index);
            let place = view.location.map(Location::unit_vector);
            let open_until = open_until(view.phase, view.freshness);
            snapshot.regions.push(Region { view, place, open_until });
        }
        for (name, policy) in agents {
            let index = snapshot.agents.len();
            let agent = snapshot.arrange(&name, policy);
            snapshot.agents.push(agent);
            snapshot.by_name.insert(name, index);
        }
        for (index, view) in workers.into_iter().enumerate() {
            let region = by_region.get(&view.region).copied();
            let listed = region.filter(|region| snapshot.regions[*region].view.lists_workers());
            let Some(region) = listed else {
                return Err(SnapshotError::NoSuchRegion { worker: index, region: view.region });
            };
            snapshot.add_worker(index, region, &view);
        }
        snapshot.mark_wrong_gpu_classes();
        Ok(snapshot)
    }

    fn arrange(&self, name: &str, policy: AgentPolicy) -> Agent {
        let weight_of = |region: &str| {
            let Some(regions) = &policy.regions else {
                return 1;
            };
            let named = regions.iter().find(|(name, _)| name == region);
            named.map_or(0, |(_, weight)| (*weight).max(1))
        };
        let weights: Vec<u32> = self.regions.iter().map(|r| weight_of(&r.view.name)).collect();
        let greatest = f64::from(weights.iter().copied().max().unwrap_or(1).max(1));
        let serve = |(region, weight): (&Region, u32)| {
            let mut served = Served {
                weight,
                weight_cost: WEIGHT_COST * (greatest / f64::from(weight.max(1))).log2(),
                ..Served::default()
            };
            let pools = region.view.pools.iter().filter(|pool| pool.agent == name);
            for pool in pools {
                if !policy.gpu_class.is_empty() && pool.gpu_class != policy.gpu_class {
                    served.wrong_gpu_class = true;
                    continue;
                }
                served.count = served.count.saturating_add(pool.workers);
                served.slots = served.slots.saturating_add(pool.slots);
                served.free = served.free.saturating_add(pool.free);
            }
            served
        };
        let served = self.regions.iter().zip(weights).map(serve).collect();
        Agent { policy, served }
    }

    fn add_worker(&mut self, index: usize, region: usize, view: &WorkerView) {
        let agent = self.by_name.get(&view.agent).copied();
        let needed = agent.map_or("", |a| self.agents[a].policy.gpu_class.as_str());
        let mut worker = Worker {
            agent,
            region,
            right_gpu_class: needed.is_empty() || needed == view.gpu_class,
            phase: view.phase,
            freshness: view.freshness,
            open_until: None,
            slots: view.slots,
            free: 0,
            free_share: 0,
        };
        worker.set_state(view.phase, view.freshness);
        worker.set_free(view.free);
        self.workers.push(worker);
        if let Some(agent) = agent {
            let served = &mut self.agents[agent].served[region];
            served.workers.push(index);
            if worker.right_gpu_class {
                served.count = served.count.saturating_add(1);
                served.slots = served.slots.saturating_add(worker.slots);
                served.free = served.free.saturating_add(worker.free);
            } else {
                served.wrong_gpu_class = true;
            }
        }
    }

    fn mark_wrong_gpu_classes(&mut self) {
        for served in self.agents.iter_mut().flat_map(|a| &mut a.served) {
            served.wrong_gpu_class &= served.count == 0;
        }
    }

    /// Takes a worker's newest numbers without arranging anything anew.
    ///
    /// # Panics
    /// `worker` is not an index of this snapshot.
    pub fn update_worker(&mut self, worker: usize, phase: Phase, freshness: Freshness, free: u32) {
        let entry = &mut self.workers[worker];
        let before = entry.free;
        entry.set_state(phase, freshness);
        entry.set_free(free);
        let free = entry.free;
        if let Some(agent) = entry.agent.filter(|_| entry.right_gpu_class) {
            let served = &mut self.agents[agent].served[entry.region];
            served.free = served.free.saturating_sub(before).saturating_add(free);
        }
    }

    /// Counts one lease as taken in a region whose workers are not listed, until its next digest says what is true.
    ///
    /// # Panics
    /// `region` is not an index of this snapshot.
    pub fn debit_region(&mut self, region: usize, agent: &str) {
        if let Some(agent) = self.by_name.get(agent) {
            let served = &mut self.agents[*agent].served[region];
            served.free = served.free.saturating_sub(1);
        }
    }

    /// A region as it was given.
    ///
    /// # Panics
    /// `region` is not an index of this snapshot.
    #[must_use]
    pub fn region(&self, region: usize) -> &RegionView {
        &self.regions[region].view
    }

    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    pub(super) fn workers(&self) -> &[Worker] {
        &self.workers
    }

    pub(super) fn agent(&self, name: &str) -> Option<(usize, &Agent)> {
        let index = *self.by_name.get(name)?;
        Some((index, &self.agents[index]))
    }

    pub(super) fn agent_at(&self, index: usize) -> Option<&Agent> {
        self.agents.get(index)
    }
}

/// No ceiling: light needs less for any way around the earth.
const UNLIMITED_RTT: Duration = Duration::from_secs(3600);
