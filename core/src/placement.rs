//! Which region, then which worker: a pure planner that explains itself.
//!
//! [`plan`] looks at a [`FleetSnapshot`] and orders first the regions that may take the session, best first, then, in
//! each region whose workers the snapshot lists (a router lists those of its own), the workers to ask. It promises
//! nothing: capacity is the worker's, and one that refuses only sends the caller of this planner to the next (I4).
//!
//! A region is judged in this order, and the first objection is its [`Verdict`]: does the agent run there, do the
//! request's constraints allow it, is it near enough, is it in service, has it room. The regions that remain are
//! ordered by a cost in milliseconds, lower first:
//!
//! ```text
//! cost = round trip + LOAD_COST · utilisation² + WEIGHT_COST · log₂(greatest weight / weight) − incumbent's margin
//! ```
//!
//! Nothing here allocates per worker, compares names per region or makes text unless it is asked to explain.

mod judge;
mod snapshot;
mod verdict;

use std::time::Duration;

pub use snapshot::{AgentPolicy, FleetSnapshot, Freshness, Phase, PoolView, RegionView, SnapshotError, WorkerView};
pub use verdict::{Candidate, CeilingSetBy, RefusalReason, Verdict};

use crate::{clock::Millis, geo::UnitVector, id::RegionNumber};
use judge::{Judge, liking};
use snapshot::Agent;

/// What is to be placed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// `namespace/name` of the agent.
    pub agent: &'a str,
    /// Where the caller is; without it distance is not judged.
    pub location: Option<UnitVector>,
    /// Only these regions, by name; empty: any.
    pub regions: &'a [String],
    /// Only regions in one of these residency zones; empty: any.
    pub residency: &'a [String],
    /// The caller's own hard ceiling, on top of the agent's.
    pub max_rtt: Option<Duration>,
    /// How long the caller has been trying; relaxes the agent's ceiling.
    pub waited: Duration,
    /// Round trips that were measured; they override the estimates.
    pub measured: &'a [(RegionNumber, Duration)],
    /// The region chosen lately for this agent and neighbourhood; another has to be better by [`INCUMBENT_MARGIN`].
    pub incumbent: Option<RegionNumber>,
    /// Breaks ties between workers; the same seed gives the same answer.
    pub seed: u64,
}

/// Where to try, in order. Indices are those of the snapshot that was planned on.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Regions, best first, at most [`REGION_CHOICES`].
    pub choices: Vec<RegionChoice>,
    assessment: Assessment,
}

/// One region to try.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionChoice {
    /// Index of the region.
    pub region: usize,
    /// Indices of the workers to ask, in order, at most [`WORKER_CHOICES`]; empty if the snapshot does not list this
    /// region's workers: its own router knows them.
    pub workers: Vec<usize>,
    /// Measured or estimated round trip; `None` without a location.
    pub rtt: Option<Duration>,
    /// The cost, milliseconds.
    pub cost: f64,
}

/// Why nothing can be placed now.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// The closed reason.
    pub reason: RefusalReason,
    /// After which time a new attempt may succeed; `None`: waiting does not help.
    pub retry_after: Option<Duration>,
    assessment: Assessment,
}

/// What the planner found about every region, kept for the explanation.
#[derive(Clone, Debug, PartialEq, Default)]
struct Assessment {
    agent: Option<usize>,
    now: Millis,
    seed: u64,
    /// One per region of the snapshot.
    regions: Vec<Assessed>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Assessed {
    /// `None`: eligible.
    objection: Option<Verdict>,
    rtt: Option<Duration>,
    free: u32,
    cost: f64,
}

/// Orders regions and workers for a request, or says why there are none.
///
/// `now` is on the clock of the snapshot's timestamps.
///
/// # Errors
/// [`Refusal`], with a verdict on every region and worker in [`Refusal::candidates`].
pub fn plan(snapshot: &FleetSnapshot, request: &Request<'_>, now: Millis) -> Result<Placement, Refusal> {
    let Some((agent_index, agent)) = snapshot.agent(request.agent) else {
        return Err(Refusal {
            reason: RefusalReason::NoSuchAgent,
            retry_after: None,
            assessment: Assessment::default(),
        });
    };
    let judge = Judge::new(snapshot, agent, request, now);
    let count = snapshot.regions().len();
    let mut choices: Vec<RegionChoice> = Vec::with_capacity(REGION_CHOICES + 1);
    let mut regions = Vec::with_capacity(count);
    let mut shortlists = Vec::new();
    for (region, served) in agent.served.iter().enumerate() {
        let (assessed, workers) = judge.assess(region, served);
        if !workers.is_empty() {
            shortlists.push((region, workers));
        }
        regions.push(assessed);
    }
    let ceiling = judge.ceiling(&regions);
    for (region, assessed) in regions.iter_mut().enumerate() {
        assessed.apply(ceiling);
        if assessed.objection.is_none() {
            let listed = shortlists.iter().find(|(of, _)| *of == region);
            insert_bounded(
                &mut choices,
                REGION_CHOICES,
                |c| c.cost > assessed.cost,
                || RegionChoice {
                    region,
                    workers: listed
                        .map_or_else(Vec::new, |(_, workers)| workers.iter().map(|(_, index)| *index).collect()),
                    rtt: assessed.rtt,
                    cost: assessed.cost,
                },
            );
        }
    }
    let assessment = Assessment { agent: Some(agent_index), now, seed: request.seed, regions };
    if choices.is_empty() {
        return Err(judge.refusal(assessment));
    }
    Ok(Placement { choices, assessment })
}

/// The ceiling on the round trip after a time of waiting: the preferred one, relaxing in a straight line to the hard
/// one over `relax_over`.
#[must_use]
pub fn rtt_ceiling(policy: &AgentPolicy, waited: Duration) -> Duration {
    let spread = policy.rtt_ceiling_max.saturating_sub(policy.rtt_ceiling);
    if waited >= policy.relax_over {
        return policy.rtt_ceiling + spread;
    }
    policy.rtt_ceiling + spread.mul_f64(waited.as_secs_f64() / policy.relax_over.as_secs_f64())
}

impl Placement {
    /// A verdict on every region and, where listed, every worker of the agent. Eligible regions carry their rank;
    /// nothing is [`Verdict::Chosen`] yet, for that is known only when a worker has granted.
    #[must_use]
    pub fn candidates(&self, snapshot: &FleetSnapshot) -> Vec<Candidate> {
        self.assessment.candidates(snapshot)
    }
}

impl Refusal {
    /// A verdict on every region and, where listed, every worker of the agent.
    #[must_use]
    pub fn candidates(&self, snapshot: &FleetSnapshot) -> Vec<Candidate> {
        self.assessment.candidates(snapshot)
    }
}

impl Assessed {
    /// Distance outranks a lack of room: what is too far would not be used if it had some.
    fn apply(&mut self, (ceiling, set_by): (Duration, CeilingSetBy)) {
        if let Some(rtt) = self.rtt.filter(|rtt| *rtt > ceiling)
            && self.objection.is_none_or(Verdict::is_about_capacity)
        {
            self.objection = Some(Verdict::TooFar { rtt, ceiling, set_by });
            self.cost = f64::INFINITY;
        }
    }
}

impl Assessment {
    fn candidates(&self, snapshot: &FleetSnapshot) -> Vec<Candidate> {
        let Some(agent) = self.agent.and_then(|index| snapshot.agent_at(index)) else {
            return Vec::new();
        };
        let mut order: Vec<usize> = (0..self.regions.len()).collect();
        order.sort_by(|a, b| self.regions[*a].cost.total_cmp(&self.regions[*b].cost));
        let mut rank = 0;
        let mut candidates = Vec::with_capacity(order.len());
        for region in order {
            let assessed = &self.regions[region];
            let verdict = assessed.objection.unwrap_or_else(|| {
                rank += 1;
                Verdict::Eligible { rank }
            });
            candidates.push(Candidate {
                region,
                worker: None,
                verdict,
                rtt: assessed.rtt,
                free: assessed.free,
                cost: assessed.objection.is_none().then_some(assessed.cost),
            });
            if assessed.objection.is_none_or(Verdict::is_about_capacity) {
                self.workers(snapshot, agent, region, &mut candidates);
            }
        }
        candidates
    }

    fn workers(&self, snapshot: &FleetSnapshot, agent: &Agent, region: usize, candidates: &mut Vec<Candidate>) {
        let first = candidates.len();
        for index in &agent.served[region].workers {
            let worker = &snapshot.workers()[*index];
            candidates.push(Candidate {
                region,
                worker: Some(*index),
                verdict: worker.objection(self.now).unwrap_or(Verdict::Eligible { rank: 0 }),
                rtt: self.regions[region].rtt,
                free: worker.free,
                cost: None,
            });
        }
        let ours = &mut candidates[first..];
        let key = |c: &Candidate| c.worker.map(|index| liking(snapshot, index, self.seed));
        ours.sort_by_key(|c| std::cmp::Reverse(key(c)));
        let eligible = ours.iter_mut().filter(|c| matches!(c.verdict, Verdict::Eligible { .. }));
        for (candidate, rank) in eligible.zip(1..) {
            candidate.verdict = Verdict::Eligible { rank };
        }
    }
}

/// Inserts into a short sorted list in front of the first element that is `worse`, and drops what exceeds `bound`.
fn insert_bounded<T>(list: &mut Vec<T>, bound: usize, worse: impl FnMut(&T) -> bool, make: impl FnOnce() -> T) {
    let at = list.iter().position(worse).unwrap_or(list.len());
    if at >= bound {
        return;
    }
    list.insert(at, make());
    list.truncate(bound);
}

/// Regions that a placement lists to try.
pub const REGION_CHOICES: usize = 4;
/// Workers that a placement lists to try in one region.
pub const WORKER_CHOICES: usize = 8;
/// What a full region costs more than an empty one, milliseconds.
pub const LOAD_COST: f64 = 30.0;
/// What each halving of a region's weight costs, milliseconds.
pub const WEIGHT_COST: f64 = 20.0;
/// By how much another region has to be better than the one chosen lately, milliseconds.
pub const INCUMBENT_MARGIN: f64 = 10.0;
/// Default time over which the ceiling relaxes.
pub const RELAX_OVER: Duration = Duration::from_secs(10);
/// What a refusal for lack of room suggests.
pub const CAPACITY_RETRY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
