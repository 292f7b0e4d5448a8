//! Decisions per second with 10,000 workers in 100 regions, as a router of one region sees them, and with all of them
//! in its own region.
#![forbid(unsafe_code)]

use std::{hint::black_box, time::Duration};

use antiphon_core::{
    clock::Millis,
    geo::Location,
    id::RegionNumber,
    placement::{AgentPolicy, FleetSnapshot, Freshness, Phase, PoolView, RegionView, Request, WorkerView, plan},
};
use divan::{Bencher, counter::ItemsCount};

fn main() {
    divan::main();
}

/// 100 regions around the world; `listed` workers in the own one, 100 in each of the others.
fn fleet(listed: usize) -> FleetSnapshot {
    let freshness = Freshness::Reported { at: Millis(0), lease: Duration::from_secs(3) };
    let region = |index: u16| RegionView {
        name: format!("region-{index}"),
        number: RegionNumber::new(index).expect("below 1024"),
        location: Location::new(
            f64::from(index % 10).mul_add(14.0, -63.0),
            f64::from(index / 10).mul_add(36.0, -170.0),
        )
        .ok(),
        phase: Phase::Active,
        residency: vec![],
        freshness: if index == 0 { Freshness::Own } else { freshness },
        pools: if index == 0 {
            vec![]
        } else {
            vec![PoolView {
                agent: "a/b".into(),
                gpu_class: String::new(),
                workers: 100,
                slots: 1000,
                free: u32::from(index) * 10,
            }]
        },
    };
    let worker = |index: usize| WorkerView {
        region: "region-0".into(),
        agent: "a/b".into(),
        gpu_class: String::new(),
        phase: Phase::Active,
        freshness,
        slots: 10,
        free: u32::try_from(index % 11).expect("below 11"),
    };
    FleetSnapshot::new(
        [("a/b".to_owned(), AgentPolicy::default())],
        (0..100).map(region).collect(),
        (0..listed).map(worker).collect(),
    )
    .expect("unique regions")
}

#[divan::bench(args = [100, 10_000])]
fn decisions(bencher: Bencher<'_, '_>, listed: usize) {
    let snapshot = fleet(listed);
    let location = Location::new(-60.0, -165.0).ok().map(Location::unit_vector);
    let mut seed = 0;
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
        seed += 1;
        let request = Request { agent: "a/b", location, seed, ..Request::default() };
        plan(black_box(&snapshot), black_box(&request), Millis(1000))
    });
}
