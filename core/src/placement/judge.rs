//! One region at a time: objections, cost and the workers to ask.

use std::time::Duration;

use super::{
    Assessed, Assessment, CAPACITY_RETRY, CeilingSetBy, FleetSnapshot, INCUMBENT_MARGIN, LOAD_COST, Refusal,
    RefusalReason, Request, Verdict, WORKER_CHOICES, insert_bounded, rtt_ceiling,
    snapshot::{Agent, Served},
};
use crate::{clock::Millis, geo};

/// The request in the form that is cheap to compare.
pub(super) struct Judge<'a> {
    snapshot: &'a FleetSnapshot,
    agent: &'a Agent,
    request: &'a Request<'a>,
    now: Millis,
}

/// Workers to ask with their keys, best first.
pub(super) type Shortlist = Vec<(u64, usize)>;

impl<'a> Judge<'a> {
    pub(super) fn new(snapshot: &'a FleetSnapshot, agent: &'a Agent, request: &'a Request<'a>, now: Millis) -> Self {
        Self { snapshot, agent, request, now }
    }

    /// Above which round trip a region is too far, and what sets it.
    ///
    /// The agent's ceiling, relaxed by waiting; but the nearest region that could serve the caller is never too far
    /// unless it is beyond a hard ceiling: waiting brings no region nearer, only room in a near one.
    pub(super) fn ceiling(&self, regions: &[Assessed]) -> (Duration, CeilingSetBy) {
        let hard = self.hard_ceiling();
        let could_serve = |assessed: &&Assessed| assessed.objection.is_none_or(|v| v == Verdict::Full);
        let nearest = regions.iter().filter(could_serve).filter_map(|r| r.rtt).min();
        let nearest = nearest.unwrap_or_default();
        let relaxed = rtt_ceiling(&self.agent.policy, self.request.waited);
        if relaxed.max(nearest) >= hard {
            let of_request = self.request.max_rtt.is_some_and(|max| max <= hard);
            return (hard, if of_request { CeilingSetBy::Request } else { CeilingSetBy::AgentMax });
        }
        match () {
            () if nearest > relaxed => (nearest, CeilingSetBy::NearestRegion),
            () if relaxed > self.agent.policy.rtt_ceiling => (relaxed, CeilingSetBy::Waiting),
            () => (relaxed, CeilingSetBy::Agent),
        }
    }

    fn hard_ceiling(&self) -> Duration {
        let own = rtt_ceiling(&self.agent.policy, Duration::MAX);
        self.request.max_rtt.map_or(own, |max| max.min(own))
    }

    /// The verdict on one region and, where its workers are listed, whom to ask there.
    pub(super) fn assess(&self, region: usize, served: &Served) -> (Assessed, Shortlist) {
        let rtt = self.rtt(region);
        let mut assessed = Assessed {
            objection: self.mismatch(region, served),
            rtt,
            free: served.free,
            // Sorts behind every eligible one.
            cost: f64::INFINITY,
        };
        let mut workers = Shortlist::new();
        if assessed.objection.is_none() {
            assessed.objection = self.out_of_service(region, served, &mut assessed.free, &mut workers);
        }
        if assessed.objection.is_none() {
            assessed.cost = self.cost(region, served, &assessed);
        }
        (assessed, workers)
    }

    /// What no waiting changes.
    fn mismatch(&self, region: usize, served: &Served) -> Option<Verdict> {
        let view = &self.snapshot.regions()[region].view;
        let named = |list: &[String]| list.contains(&view.name);
        let zoned = |list: &[String]| list.iter().any(|zone| view.residency.contains(zone));
        if served.weight == 0 {
            return Some(Verdict::NotServed);
        }
        if !self.request.regions.is_empty() && !named(self.request.regions) {
            return Some(Verdict::NotAllowed);
        }
        if !self.request.residency.is_empty() && !zoned(self.request.residency) {
            return Some(Verdict::Residency);
        }
        served.wrong_gpu_class.then_some(Verdict::WrongGpuClass)
    }

    /// What may be otherwise in a moment. Lists workers where the snapshot has them.
    fn out_of_service(
        &self,
        region: usize,
        served: &Served,
        free: &mut u32,
        workers: &mut Shortlist,
    ) -> Option<Verdict> {
        let region = &self.snapshot.regions()[region];
        if let Some(verdict) = region.objection(self.now) {
            return Some(verdict);
        }
        if served.count == 0 {
            return Some(Verdict::NoWorkers);
        }
        if region.view.lists_workers() {
            return self.shortlist(served, free, workers);
        }
        (served.free == 0).then_some(Verdict::Full)
    }

    /// The workers with the greatest free share; ties by a hash of the seed, so that routers do not all ask the same
    /// one.
    fn shortlist(&self, served: &Served, free: &mut u32, workers: &mut Shortlist) -> Option<Verdict> {
        let (mut objection, mut room) = (Verdict::NoWorkers, 0_u32);
        for index in &served.workers {
            let worker = &self.snapshot.workers()[*index];
            match worker.objection(self.now) {
                // "Full" says more about the region than that another worker is stale.
                Some(Verdict::Full) => objection = Verdict::Full,
                Some(Verdict::WrongGpuClass) => {}
                Some(other) if objection == Verdict::NoWorkers => objection = other,
                Some(_) => {}
                None => {
                    room = room.saturating_add(worker.free);
                    // Most workers of a great region end here.
                    if workers.len() == WORKER_CHOICES
                        && workers.last().is_some_and(|w| w.0 >> 32 > worker.free_share.into())
                    {
                        continue;
                    }
                    let key = liking(self.snapshot, *index, self.request.seed);
                    insert_bounded(workers, WORKER_CHOICES, |w| w.0 < key, || (key, *index));
                }
            }
        }
        *free = room;
        workers.is_empty().then_some(objection)
    }

    fn rtt(&self, region: usize) -> Option<Duration> {
        let region = &self.snapshot.regions()[region];
        let measured = self.request.measured.iter();
        let mut of_region = measured.filter(|(number, _)| *number == region.view.number);
        if let Some((_, rtt)) = of_region.next() {
            return Some(*rtt);
        }
        let distance = self.request.location?.distance_km(region.place?);
        Some(geo::estimated_rtt(distance))
    }

    fn cost(&self, region: usize, served: &Served, assessed: &Assessed) -> f64 {
        // Products, as a quotient costs as much as all the rest.
        let seconds = |rtt: Duration| f64::from(u32::try_from(rtt.as_secs()).unwrap_or(u32::MAX));
        let rtt_ms = assessed.rtt.map_or(0.0, |rtt| seconds(rtt) * 1e3 + f64::from(rtt.subsec_nanos()) * 1e-6);
        let slots = f64::from(served.slots.max(assessed.free).max(1));
        let used = 1.0 - f64::from(assessed.free) / slots;
        let incumbent = self.request.incumbent == Some(self.snapshot.regions()[region].view.number);
        let margin = if incumbent { INCUMBENT_MARGIN } else { 0.0 };
        rtt_ms + LOAD_COST * used * used + served.weight_cost - margin
    }

    /// Sums the objections up.
    pub(super) fn refusal(&self, assessment: Assessment) -> Refusal {
        let objections = || assessment.regions.iter().filter_map(|r| r.objection);
        let (reason, retry_after) = if objections().any(Verdict::is_about_capacity) {
            let relaxed = self.relaxes_in(&assessment).unwrap_or(CAPACITY_RETRY);
            (RefusalReason::NoCapacity, Some(relaxed.min(CAPACITY_RETRY)))
        } else if objections().any(|v| matches!(v, Verdict::TooFar { .. })) {
            // Beyond the hard ceiling, or a nearer region would have set it.
            (RefusalReason::TooFar, None)
        } else {
            (RefusalReason::NoRegionMatches, None)
        };
        Refusal { reason, retry_after, assessment }
    }

    /// When the ceiling reaches the nearest region with room that is too far now.
    fn relaxes_in(&self, assessment: &Assessment) -> Option<Duration> {
        let rtts = assessment.regions.iter().filter_map(|r| match r.objection {
            Some(Verdict::TooFar { rtt, .. }) if r.free > 0 => Some(rtt),
            _ => None,
        });
        let nearest = rtts.min()?;
        let policy = &self.agent.policy;
        if nearest > self.hard_ceiling() {
            return None;
        }
        let hard = rtt_ceiling(policy, Duration::MAX);
        let missing = nearest.saturating_sub(policy.rtt_ceiling).as_secs_f64();
        let spread = hard.saturating_sub(policy.rtt_ceiling).as_secs_f64();
        let at = policy.relax_over.mul_f64((missing / spread.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0));
        // One step more: both ends are rounded.
        Some((at + Duration::from_millis(1)).saturating_sub(self.request.waited))
    }
}

/// How much a worker is preferred: its free share, then a hash of the seed.
pub(super) fn liking(snapshot: &FleetSnapshot, worker: usize, seed: u64) -> u64 {
    let tie = mix(seed ^ worker as u64) >> 32;
    u64::from(snapshot.workers()[worker].free_share) << 32 | tie
}

/// Finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the input moves every bit of the output.
const fn mix(v: u64) -> u64 {
    let v = v.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let v = (v ^ v >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let v = (v ^ v >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    v ^ v >> 31
}
