//! Placement decisions per second, with 10,000 workers in 100 regions.

use std::time::Duration;

use antiphon_core::{
    clock::Millis,
    geo::Location,
    id::RegionNumber,
    placement::{AgentPolicy, FleetSnapshot, Freshness, Phase, PoolView, RegionView, Request, WorkerView, plan},
};

use crate::{
    measure::ns_per_call,
    report::{Goal, Row},
};

/// Decides for callers all over the world, on one core.
pub(crate) fn decisions() -> anyhow::Result<Vec<Row>> {
    let places = places()?;
    let per_second = |listed| -> anyhow::Result<f64> {
        let snapshot = fleet(listed)?;
        let ns = ns_per_call(|n| {
            let location = places.get(n % places.len()).map(|place| place.unit_vector());
            plan(&snapshot, &Request { agent: AGENT, location, seed: n as u64, ..Request::default() }, Millis(1000))
        })?;
        Ok(1e9 / ns)
    };
    Ok(vec![
        Row::new("placement", per_second(WORKERS / REGIONS)?, "1/s").goal(Goal::AtLeast(200_000.0)),
        Row::new("placement-10000-in-own-region", per_second(WORKERS)?, "1/s"),
    ])
}

/// Regions all around the world as the first one's router sees them: `listed` workers of its own one by one, those of
/// the others, 100 each, added up.
fn fleet(listed: usize) -> anyhow::Result<FleetSnapshot> {
    let freshness = Freshness::Reported { at: Millis(0), lease: Duration::from_secs(3) };
    let mut regions = Vec::with_capacity(REGIONS);
    for (index, place) in (0..).zip(places()?) {
        let pool = PoolView {
            agent: AGENT.into(),
            gpu_class: String::new(),
            workers: (WORKERS / REGIONS) as u32,
            slots: 1000,
            free: u32::from(index) * 10,
        };
        regions.push(RegionView {
            name: format!("region-{index}"),
            number: RegionNumber::new(index)?,
            location: Some(place),
            phase: Phase::Active,
            residency: vec![],
            freshness: if index == 0 { Freshness::Own } else { freshness },
            pools: if index == 0 { vec![] } else { vec![pool] },
        });
    }
    let worker = |index: usize| WorkerView {
        region: "region-0".into(),
        agent: AGENT.into(),
        gpu_class: String::new(),
        phase: Phase::Active,
        freshness,
        slots: 10,
        free: (index % 11) as u32,
    };
    let workers = (0..listed).map(worker).collect();
    Ok(FleetSnapshot::new([(AGENT.to_owned(), AgentPolicy::default())], regions, workers)?)
}

/// A grid of one place per region.
fn places() -> anyhow::Result<Vec<Location>> {
    let place = |n: usize| Location::new((n % 10) as f64 * 14.0 - 63.0, (n / 10) as f64 * 36.0 - 170.0);
    Ok((0..REGIONS).map(place).collect::<Result<_, _>>()?)
}

const AGENT: &str = "a/b";
const REGIONS: usize = 100;
const WORKERS: usize = 10_000;
