use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::geo::Location;

const NOW: Millis = Millis(1_000_000);
const LEASE: Duration = Duration::from_secs(3);
const AGENT: &str = "shop/receptionist";
const FRANKFURT: (f64, f64) = (50.11, 8.68);
const VIRGINIA: (f64, f64) = (38.95, -77.45);
const SINGAPORE: (f64, f64) = (1.35, 103.82);

fn at(place: (f64, f64)) -> Location {
    Location::new(place.0, place.1).unwrap()
}

fn number(n: u16) -> RegionNumber {
    RegionNumber::new(n).unwrap()
}

fn pool(free: u32) -> PoolView {
    PoolView { agent: AGENT.into(), gpu_class: "l4".into(), workers: 2, slots: 10, free }
}

fn region(name: &str, n: u16, place: (f64, f64), free: u32) -> RegionView {
    RegionView {
        name: name.into(),
        number: number(n),
        location: Some(at(place)),
        phase: Phase::Active,
        residency: vec![],
        freshness: Freshness::Reported { at: NOW, lease: LEASE },
        pools: vec![pool(free)],
    }
}

fn worker(free: u32) -> WorkerView {
    WorkerView {
        region: "frankfurt".into(),
        agent: AGENT.into(),
        gpu_class: "l4".into(),
        phase: Phase::Active,
        freshness: Freshness::Reported { at: NOW, lease: LEASE },
        slots: 10,
        free,
    }
}

fn fleet() -> Vec<RegionView> {
    vec![region("frankfurt", 1, FRANKFURT, 5), region("virginia", 2, VIRGINIA, 5), region("singapore", 3, SINGAPORE, 5)]
}

fn policy() -> AgentPolicy {
    AgentPolicy {
        gpu_class: "l4".into(),
        rtt_ceiling: Duration::from_millis(60),
        rtt_ceiling_max: Duration::from_millis(120),
        ..AgentPolicy::default()
    }
}

fn snapshot(policy: AgentPolicy, regions: Vec<RegionView>) -> FleetSnapshot {
    FleetSnapshot::new([(AGENT.to_owned(), policy)], regions, vec![]).unwrap()
}

fn local(workers: Vec<WorkerView>) -> FleetSnapshot {
    let mut regions = fleet();
    regions[0].freshness = Freshness::Own;
    regions[0].pools.clear();
    FleetSnapshot::new([(AGENT.to_owned(), policy())], regions, workers).unwrap()
}

fn from(place: (f64, f64)) -> Request<'static> {
    Request { agent: AGENT, location: Some(at(place).unit_vector()), ..Request::default() }
}

/// Verdict labels by region name, of the regions as a whole.
fn labels(snapshot: &FleetSnapshot, candidates: &[Candidate]) -> Vec<(String, &'static str)> {
    let whole = candidates.iter().filter(|c| c.worker.is_none());
    let mut labels: Vec<_> = whole.map(|c| (snapshot.region(c.region).name.clone(), c.verdict.label())).collect();
    labels.sort();
    labels
}

fn verdict_of_first(change: impl FnOnce(&mut RegionView)) -> Verdict {
    let mut regions = fleet();
    change(&mut regions[0]);
    let snapshot = snapshot(policy(), regions);
    let candidates = match plan(&snapshot, &from(FRANKFURT), NOW) {
        Ok(placement) => placement.candidates(&snapshot),
        Err(refusal) => refusal.candidates(&snapshot),
    };
    let first = candidates.iter().find(|c| c.region == 0).unwrap();
    first.verdict
}

#[test]
fn the_near_region_wins_and_far_ones_say_so() {
    let snapshot = snapshot(policy(), fleet());
    let placement = plan(&snapshot, &from((48.86, 2.35)), NOW).unwrap();
    assert_eq!(placement.choices.len(), 1);
    assert_eq!(placement.choices[0].region, 0);
    assert_eq!(placement.choices[0].rtt.unwrap().as_millis(), 16);
    let candidates = placement.candidates(&snapshot);
    assert_eq!(candidates[0].verdict, Verdict::Eligible { rank: 1 });
    let far = candidates.iter().find(|c| c.region == 1).unwrap();
    assert_eq!(far.verdict.to_string(), "above rttCeiling, 60 ms");
    assert_eq!(far.cost, None);
}

#[test]
fn each_objection_has_its_verdict() {
    let ms = Duration::from_millis;
    assert_eq!(verdict_of_first(|_| ()), Verdict::Eligible { rank: 1 });
    assert_eq!(verdict_of_first(|r| r.pools[0].free = 0), Verdict::Full);
    assert_eq!(verdict_of_first(|r| r.pools.clear()), Verdict::NoWorkers);
    assert_eq!(verdict_of_first(|r| r.pools[0].gpu_class = "h100".into()), Verdict::WrongGpuClass);
    assert_eq!(verdict_of_first(|r| r.phase = Phase::Cordoned), Verdict::Cordoned);
    assert_eq!(verdict_of_first(|r| r.phase = Phase::Draining), Verdict::Draining);
    assert_eq!(verdict_of_first(|r| r.freshness = Freshness::Never), Verdict::Stale { age: None });
    let at = Millis(NOW.0 - 3001);
    assert_eq!(
        verdict_of_first(|r| r.freshness = Freshness::Reported { at, lease: LEASE }),
        Verdict::Stale { age: Some(ms(3001)) }
    );
    // Exactly its lease old is still good.
    let at = Millis(NOW.0 - 3000);
    assert_eq!(
        verdict_of_first(|r| r.freshness = Freshness::Reported { at, lease: LEASE }),
        Verdict::Eligible { rank: 1 }
    );
}

#[test]
fn constraints_leave_only_what_they_name() {
    let mut regions = fleet();
    regions[0].residency = vec!["eu".into()];
    let snapshot = snapshot(AgentPolicy::default(), regions);
    let (eu, named) = (["eu".to_owned()], ["virginia".to_owned()]);
    let request = Request { residency: &eu, ..from(SINGAPORE) };
    let placement = plan(&snapshot, &request, NOW).unwrap();
    let expected = [
        ("frankfurt".to_owned(), "eligible"),
        ("singapore".to_owned(), "residency"),
        ("virginia".to_owned(), "residency"),
    ];
    assert_eq!(labels(&snapshot, &placement.candidates(&snapshot)), expected);
    let request = Request { regions: &named, ..from(SINGAPORE) };
    let placement = plan(&snapshot, &request, NOW).unwrap();
    assert_eq!(placement.choices[0].region, 1);
    let both = Request { residency: &eu, ..request };
    let refusal = plan(&snapshot, &both, NOW).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::NoRegionMatches);
    assert_eq!(refusal.retry_after, None);
}

#[test]
fn an_agent_runs_only_in_its_regions_and_weights_count() {
    let policy = AgentPolicy {
        regions: Some(vec![("virginia".into(), 100), ("singapore".into(), 25)]),
        ..AgentPolicy::default()
    };
    let snapshot = snapshot(policy, fleet());
    let placement = plan(&snapshot, &Request { location: None, ..from(FRANKFURT) }, NOW).unwrap();
    let order: Vec<usize> = placement.choices.iter().map(|c| c.region).collect();
    assert_eq!(order, [1, 2]);
    let difference = placement.choices[1].cost - placement.choices[0].cost;
    assert!((difference - 2.0 * WEIGHT_COST).abs() < 1e-9);
    let candidates = placement.candidates(&snapshot);
    assert!(candidates.iter().any(|c| c.region == 0 && c.verdict == Verdict::NotServed));
}

#[test]
fn the_ceiling_relaxes_in_a_straight_line() {
    let policy = policy();
    for (waited_s, ceiling_ms) in [(0, 60), (5, 90), (10, 120), (1000, 120)] {
        let ceiling = rtt_ceiling(&policy, Duration::from_secs(waited_s));
        assert_eq!(ceiling.as_millis(), ceiling_ms);
    }
}

#[test]
fn the_nearest_region_is_not_too_far_unless_beyond_the_hard_ceiling() {
    let snapshot = snapshot(policy(), fleet());
    let from_dubai = from((25.2, 55.3));
    let placement = plan(&snapshot, &from_dubai, NOW).unwrap();
    assert_eq!(placement.choices.len(), 1, "the others are too far as yet");
    let nearest = placement.choices[0].rtt.unwrap();
    assert!(nearest > policy().rtt_ceiling);
    let says = |placed: &Placement, end: &str| {
        placed.candidates(&snapshot).iter().any(|c| c.verdict.to_string().ends_with(end))
    };
    assert!(says(&placement, &format!("farther than the nearest region, {} ms away", nearest.as_millis())));
    // The caller's own ceiling is hard.
    let hard = Request { max_rtt: Some(Duration::from_millis(20)), ..from_dubai };
    let refusal = plan(&snapshot, &hard, NOW).unwrap_err();
    assert_eq!((refusal.reason, refusal.retry_after), (RefusalReason::TooFar, None));
    let verdict = refusal.candidates(&snapshot)[0].verdict.to_string();
    assert!(verdict.ends_with("above maxRttMs of the request, 20 ms"), "{verdict}");
    let antipode = plan(&snapshot, &from((-45.0, -175.0)), NOW).unwrap_err();
    let verdict = antipode.candidates(&snapshot)[0].verdict.to_string();
    assert!(verdict.ends_with("above rttCeilingMax, 120 ms"), "{verdict}");
    let waited = Request { waited: RELAX_OVER / 2, ..from((48.86, 2.35)) };
    assert!(says(&plan(&snapshot, &waited, NOW).unwrap(), "above rttCeiling, risen to 90 ms with the wait"));
}

#[test]
fn a_full_near_region_is_worth_a_wait_before_a_far_one_is_taken() {
    let mut regions = fleet();
    regions[0].pools[0].free = 0;
    let snapshot = snapshot(policy(), regions);
    let from_dubai = from((25.2, 55.3));
    let refusal = plan(&snapshot, &from_dubai, NOW).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::NoCapacity);
    let wait = refusal.retry_after.unwrap();
    assert!(wait > Duration::ZERO && wait <= CAPACITY_RETRY, "{wait:?}");
    let patient = Request { waited: RELAX_OVER, ..from_dubai };
    assert_ne!(
        plan(&snapshot, &patient, NOW).unwrap().choices[0].region,
        0,
        "after a while a far region is better than none"
    );
}

#[test]
fn a_measured_round_trip_overrides_the_estimate() {
    let snapshot = snapshot(policy(), fleet());
    let measured = [(number(1), Duration::from_millis(200)), (number(3), Duration::from_millis(7))];
    let request = Request { measured: &measured, ..from(FRANKFURT) };
    let placement = plan(&snapshot, &request, NOW).unwrap();
    assert_eq!(placement.choices[0].region, 2);
    assert_eq!(placement.choices[0].rtt, Some(Duration::from_millis(7)));
}

#[test]
fn near_equal_regions_do_not_flap() {
    let mut regions = fleet();
    regions[1] = region("mainz", 2, (50.0, 8.27), 5);
    let choose = |regions: &[RegionView], incumbent| {
        let request = Request { incumbent, ..from(FRANKFURT) };
        let snapshot = snapshot(policy(), regions.to_vec());
        plan(&snapshot, &request, NOW).unwrap().choices[0].region
    };
    assert_eq!(choose(&regions, None), 0);
    // A little more load moves newcomers, not neighbours of the last call.
    regions[0].pools[0].free = 4;
    assert_eq!(choose(&regions, None), 1);
    assert_eq!(choose(&regions, Some(number(1))), 0);
    // A clear difference moves everybody.
    regions[0].pools[0].free = 1;
    assert_eq!(choose(&regions, Some(number(1))), 1);
}

#[test]
fn workers_with_the_greatest_free_share_come_first() {
    let mut stale = worker(10);
    stale.freshness = Freshness::Reported { at: Millis(NOW.0 - 3001), lease: LEASE };
    let mut gone = worker(10);
    gone.freshness = Freshness::Disconnected;
    let mut cordoned = worker(10);
    cordoned.phase = Phase::Cordoned;
    let mut other_agent = worker(10);
    other_agent.agent = "shop/other".into();
    let mut other_gpu = worker(10);
    other_gpu.gpu_class = "t4".into();
    let mut small = worker(3);
    small.slots = 3;
    let workers = vec![worker(2), stale, small, cordoned, worker(0), other_agent, gone, worker(7), other_gpu];
    let snapshot = local(workers);
    let placement = plan(&snapshot, &from(FRANKFURT), NOW).unwrap();
    assert_eq!(placement.choices[0].workers, [2, 7, 0]);
    let candidates = placement.candidates(&snapshot);
    let region = candidates.iter().find(|c| c.region == 0).unwrap();
    assert_eq!(region.free, 12);
    let workers: BTreeSet<_> = candidates.iter().filter_map(|c| Some((c.worker?, c.verdict.label()))).collect();
    let expected = [
        (0, "eligible"),
        (1, "stale"),
        (2, "eligible"),
        (3, "cordoned"),
        (4, "full"),
        (6, "disconnected"),
        (7, "eligible"),
        (8, "wrong_gpu_class"),
    ];
    assert_eq!(workers, BTreeSet::from(expected));
}

#[test]
fn a_listed_region_is_full_when_its_workers_are() {
    let mut snapshot = local(vec![worker(1), worker(0)]);
    let only = ["frankfurt".to_owned()];
    let request = Request { regions: &only, ..from(FRANKFURT) };
    let placement = plan(&snapshot, &request, NOW).unwrap();
    assert_eq!(placement.choices[0].workers, [0]);
    let freshness = Freshness::Reported { at: NOW, lease: LEASE };
    snapshot.update_worker(0, Phase::Active, freshness, 0);
    let refusal = plan(&snapshot, &request, NOW).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::NoCapacity);
    assert_eq!(refusal.retry_after, Some(CAPACITY_RETRY));
    let candidates = refusal.candidates(&snapshot);
    assert_eq!(candidates.iter().filter(|c| c.worker.is_some()).count(), 2);
    let first = candidates.iter().find(|c| c.region == 0).unwrap();
    assert_eq!(first.verdict, Verdict::Full);
}

#[test]
fn an_agent_without_regions_runs_nowhere() {
    let policy = AgentPolicy { regions: Some(vec![]), ..policy() };
    let refusal = plan(&snapshot(policy, fleet()), &from(FRANKFURT), NOW).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::NoRegionMatches);
}

#[test]
fn debits_of_a_remote_region_count_until_it_is_full() {
    let mut snapshot = snapshot(policy(), fleet());
    for _ in 0..5 {
        assert!(plan(&snapshot, &from(FRANKFURT), NOW).is_ok());
        snapshot.debit_region(0, AGENT);
    }
    let refusal = plan(&snapshot, &from(FRANKFURT), NOW).unwrap_err();
    assert_eq!(refusal.candidates(&snapshot)[0].verdict, Verdict::Full);
}

#[test]
fn ties_between_workers_spread_with_the_seed() {
    let snapshot = local((0..20).map(|_| worker(10)).collect());
    let first: BTreeSet<usize> = (0..100)
        .map(|seed| {
            let request = Request { seed, ..from(FRANKFURT) };
            let placement = plan(&snapshot, &request, NOW).unwrap();
            assert_eq!(placement.choices[0].workers.len(), WORKER_CHOICES);
            placement.choices[0].workers[0]
        })
        .collect();
    assert!(first.len() > 15, "{first:?}");
}

#[test]
fn an_unknown_agent_and_an_impossible_fleet_are_refused() {
    let known = snapshot(policy(), fleet());
    let request = Request { agent: "shop/nobody", ..from(FRANKFURT) };
    let refusal = plan(&known, &request, NOW).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::NoSuchAgent);
    assert!(refusal.candidates(&known).is_empty());
    let mut twice = fleet();
    twice[2].number = number(1);
    assert_eq!(FleetSnapshot::new([], twice, vec![]).unwrap_err(), SnapshotError::DuplicateRegion("singapore".into()));
    assert!(FleetSnapshot::new([], fleet(), vec![worker(1)]).is_err());
}

prop_compose! {
    fn any_region(index: u16)(
        latitude in -90.0..=90.0, longitude in -180.0..=180.0,
        phase in prop_oneof![4 => Just(Phase::Active), 1 => Just(Phase::Cordoned), 1 => Just(Phase::Draining)],
        eu: bool, age in 0_u64..6000, free in 0_u32..4, gpu in prop_oneof![4 => Just("l4"), 1 => Just("t4")],
    ) -> RegionView {
        let mut view = region(&format!("r{index}"), index, (latitude, longitude), free);
        view.phase = phase;
        view.residency = if eu { vec!["eu".into()] } else { vec![] };
        view.freshness = Freshness::Reported { at: Millis(NOW.0 - age), lease: LEASE };
        view.pools[0].gpu_class = gpu.into();
        view
    }
}

fn any_fleet() -> impl Strategy<Value = Vec<RegionView>> {
    let first = any_region(0).prop_map(|mut view| {
        view.name = "frankfurt".into();
        view.freshness = Freshness::Own;
        view.pools.clear();
        view
    });
    (first, any_region(1), any_region(2), any_region(3), any_region(4), any_region(5))
        .prop_map(|(a, b, c, d, e, f)| vec![a, b, c, d, e, f])
}

fn any_workers() -> impl Strategy<Value = Vec<WorkerView>> {
    let one = (0_u32..4, any::<bool>(), 0_u64..6000).prop_map(|(free, active, age)| WorkerView {
        phase: if active { Phase::Active } else { Phase::Draining },
        freshness: Freshness::Reported { at: Millis(NOW.0 - age), lease: LEASE },
        ..worker(free)
    });
    proptest::collection::vec(one, 0..12)
}

proptest! {
    #[test]
    fn what_is_chosen_is_eligible_and_every_candidate_is_listed(
        regions in any_fleet(), workers in any_workers(),
        latitude in -90.0..=90.0, longitude in -180.0..=180.0,
        waited in 0_u64..20_000, eu: bool, seed: u64,
    ) {
        let snapshot = FleetSnapshot::new(
            [(AGENT.to_owned(), policy())], regions.clone(), workers.clone(),
        ).unwrap();
        let residency = if eu { vec!["eu".to_owned()] } else { vec![] };
        let request = Request {
            residency: &residency, waited: Duration::from_millis(waited), seed,
            ..from((latitude, longitude))
        };
        let outcome = plan(&snapshot, &request, NOW);
        prop_assert_eq!(&outcome, &plan(&snapshot, &request, NOW));
        let candidates = match &outcome {
            Ok(placement) => placement.candidates(&snapshot),
            Err(refusal) => refusal.candidates(&snapshot),
        };
        let listed: BTreeSet<usize> =
            candidates.iter().filter(|c| c.worker.is_none()).map(|c| c.region).collect();
        prop_assert_eq!(listed.len(), regions.len());
        for choice in outcome.iter().flat_map(|p| &p.choices) {
            let view = &regions[choice.region];
            prop_assert_eq!(view.phase, Phase::Active);
            prop_assert!(!eu || view.residency.contains(&"eu".to_owned()));
            let nearest = choice.rtt.unwrap() <= candidates.iter()
                .filter(|c| c.worker.is_none() && c.cost.is_some())
                .filter_map(|c| c.rtt).min().unwrap();
            let ceiling = rtt_ceiling(&policy(), request.waited);
            prop_assert!(nearest || choice.rtt.unwrap() <= ceiling);
            prop_assert!(choice.rtt.unwrap() <= policy().rtt_ceiling_max);
            if choice.region == 0 {
                prop_assert!(!choice.workers.is_empty());
                for index in &choice.workers {
                    prop_assert!(workers[*index].free > 0);
                    prop_assert_eq!(workers[*index].phase, Phase::Active);
                    prop_assert_eq!(workers[*index].freshness.objection(NOW), None);
                }
            } else {
                prop_assert!(view.pools[0].free > 0 && view.pools[0].gpu_class == "l4");
                prop_assert_eq!(view.freshness.objection(NOW), None);
            }
        }
        let costs: Vec<f64> = outcome.iter().flat_map(|p| &p.choices).map(|c| c.cost).collect();
        prop_assert!(costs.is_sorted());
    }

    #[test]
    fn waiting_longer_never_shrinks_the_candidate_set(
        regions in any_fleet(), workers in any_workers(),
        latitude in -90.0..=90.0, longitude in -180.0..=180.0,
        waited in 0_u64..12_000, more in 0_u64..12_000,
    ) {
        let snapshot =
            FleetSnapshot::new([(AGENT.to_owned(), policy())], regions, workers).unwrap();
        let eligible = |waited: u64| -> BTreeSet<usize> {
            let request = Request {
                waited: Duration::from_millis(waited), ..from((latitude, longitude))
            };
            let candidates = plan(&snapshot, &request, NOW)
                .map_or_else(|r| r.candidates(&snapshot), |p| p.candidates(&snapshot));
            candidates.iter()
                .filter(|c| c.worker.is_none() && c.cost.is_some())
                .map(|c| c.region).collect()
        };
        prop_assert!(eligible(waited).is_subset(&eligible(waited + more)));
    }

    #[test]
    fn updating_a_worker_equals_arranging_anew(
        regions in any_fleet(), workers in any_workers(), free in 0_u32..20, at: prop::sample::Index,
    ) {
        prop_assume!(!workers.is_empty());
        let agents = || [(AGENT.to_owned(), policy())];
        let mut updated =
            FleetSnapshot::new(agents(), regions.clone(), workers.clone()).unwrap();
        let index = at.index(workers.len());
        let freshness = Freshness::Reported { at: NOW, lease: LEASE };
        updated.update_worker(index, Phase::Active, freshness, free);
        let mut anew = workers;
        anew[index].phase = Phase::Active;
        anew[index].freshness = freshness;
        anew[index].free = free;
        let anew = FleetSnapshot::new(agents(), regions, anew).unwrap();
        prop_assert_eq!(
            plan(&updated, &from(FRANKFURT), NOW), plan(&anew, &from(FRANKFURT), NOW)
        );
    }
}
