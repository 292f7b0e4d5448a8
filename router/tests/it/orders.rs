//! Orders to workers, and the status as a stream.

use antiphon_proto::v1::{self, Phase, worker_directive::Directive};
use tokio::sync::mpsc;
use tonic::Code;

use crate::world::{Region, World, create, eventually, soon, with_key};

fn order(name: &str, phase: Phase, deadline_ms: u32) -> v1::SetWorkerPhaseRequest {
    v1::SetWorkerPhaseRequest {
        name: name.into(),
        phase: phase.into(),
        deadline_ms,
        reason: "a test".into(),
        ..v1::SetWorkerPhaseRequest::default()
    }
}

async fn give(world: &World, region: &Region, order: v1::SetWorkerPhaseRequest) -> v1::SetWorkerPhaseResponse {
    world.operator(region).set_worker_phase(order).await.unwrap().into_inner()
}

/// The next order on a worker's stream.
async fn next(directives: &mut mpsc::Receiver<v1::WorkerDirective>) -> v1::PhaseOrder {
    soon("an order", async {
        loop {
            if let Some(Directive::Phase(order)) = directives.recv().await.unwrap().directive {
                return order;
            }
        }
    })
    .await
}

async fn worker(world: &World, region: &Region, name: &str) -> Option<v1::WorkerStatus> {
    let status = world.status(region).await;
    status.regions.into_iter().flat_map(|r| r.workers).find(|w| w.name == name)
}

async fn says(world: &World, region: &Region, name: &str, phase: Phase) {
    eventually("the worker says its phase", async || {
        worker(world, region, name).await.is_some_and(|w| w.phase() == phase)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_holds_over_a_broken_stream_until_it_is_undone() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let unknown = give(&world, &region, order("w-1", Phase::Cordoned, 0)).await;
    assert_eq!(unknown, v1::SetWorkerPhaseResponse::default());
    let desk = world.stand_in(&region, "w-1", 10).await;
    let mut registered = desk.register(&world, &region).await.unwrap();
    eventually("it is placed", async || world.placeable(&region, "w-1").await).await;
    let answer = give(&world, &region, order("w-1", Phase::Draining, 60_000)).await;
    assert!(answer.known && answer.connected);
    // At once, without waiting for the worker to say so.
    assert!(!world.placeable(&region, "w-1").await);
    let first = next(&mut registered.directives).await;
    assert_eq!((first.phase(), first.reason.as_str()), (Phase::Draining, "a test"));
    assert!((55_000..=60_000).contains(&first.deadline_ms), "{}", first.deadline_ms);
    says(&world, &region, "w-1", Phase::Draining).await;
    // The stream breaks; the order is said again, with what is left of the time.
    desk.disconnect();
    eventually("it is disconnected", async || worker(&world, &region, "w-1").await.is_some_and(|w| !w.connected)).await;
    let away = give(&world, &region, order("w-1", Phase::Draining, 60_000)).await;
    assert!(away.known && !away.connected);
    let mut registered = desk.register(&world, &region).await.unwrap();
    let again = next(&mut registered.directives).await;
    assert_eq!((again.phase(), again.ordered_unix_ms), (Phase::Draining, first.ordered_unix_ms));
    let undone = give(&world, &region, order("w-1", Phase::Active, 0)).await;
    assert!(undone.known);
    assert!(next(&mut registered.directives).await.ordered_unix_ms > first.ordered_unix_ms);
    eventually("it is placed again", async || world.placeable(&region, "w-1").await).await;
    assert_eq!(worker(&world, &region, "w-1").await.unwrap().phase(), Phase::Active);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_for_one_life_ends_with_it_and_one_for_a_name_does_not() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let desk = world.stand_in(&region, "w-1", 10).await;
    desk.register(&world, &region).await.unwrap();
    let life = |n| antiphon_core::id::Incarnation::new(n).unwrap();
    let this = v1::SetWorkerPhaseRequest { incarnation: 77, ..order("w-1", Phase::Cordoned, 0) };
    assert!(!give(&world, &region, this).await.known, "that life is not here");
    let incarnation = desk.incarnation.lock().value();
    let this = v1::SetWorkerPhaseRequest { incarnation, ..order("w-1", Phase::Cordoned, 0) };
    assert!(give(&world, &region, this).await.known);
    says(&world, &region, "w-1", Phase::Cordoned).await;
    desk.begin_life(life(78));
    eventually("its stream is broken", async || desk.register(&world, &region).await.is_ok()).await;
    eventually("the next life is placed", async || world.placeable(&region, "w-1").await).await;
    assert_eq!(worker(&world, &region, "w-1").await.unwrap().incarnation, 78);
    assert!(give(&world, &region, order("w-1", Phase::Cordoned, 0)).await.known);
    says(&world, &region, "w-1", Phase::Cordoned).await;
    desk.begin_life(life(79));
    eventually("its stream is broken", async || desk.register(&world, &region).await.is_ok()).await;
    eventually("the third life is cordoned", async || {
        let status = worker(&world, &region, "w-1").await;
        status.is_some_and(|w| w.incarnation == 79 && w.phase() == Phase::Cordoned)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_comes_back_with_an_older_order_changes_nothing() {
    let world = World::new();
    let [one, two] = world.siblings("frankfurt").await;
    let desk = world.stand_in(&one, "w-1", 10).await;
    desk.register(&world, &one).await.unwrap();
    desk.register(&world, &two).await.unwrap();
    for region in [&one, &two] {
        eventually("both know it", async || world.placeable(region, "w-1").await).await;
    }
    assert!(give(&world, &one, order("w-1", Phase::Draining, 60_000)).await.known);
    for region in [&one, &two] {
        says(&world, region, "w-1", Phase::Draining).await;
    }
    // The other one undoes it. The first hears so from the worker, and its own order is over.
    assert!(give(&world, &two, order("w-1", Phase::Active, 0)).await.known);
    for region in [&one, &two] {
        eventually("it is placed again", async || world.placeable(region, "w-1").await).await;
    }
    let mut registered = desk.register(&world, &one).await.unwrap();
    eventually("it is placed by the first", async || world.placeable(&one, "w-1").await).await;
    while let Ok(directive) = registered.directives.try_recv() {
        assert!(!matches!(directive.directive, Some(Directive::Phase(_))), "{directive:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_order_is_refused() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let _desk = world.worker(&region, "w-1", 10).await;
    let mut admin = world.operator(&region);
    let none = admin.set_worker_phase(order("w-1", Phase::Unspecified, 0)).await.unwrap_err();
    assert_eq!((none.code(), none.message()), (Code::InvalidArgument, "phase: expected ACTIVE, CORDONED or DRAINING"));
    let long = v1::SetWorkerPhaseRequest { reason: "x".repeat(257), ..order("w-1", Phase::Cordoned, 0) };
    let long = admin.set_worker_phase(long).await.unwrap_err();
    assert_eq!(long.message(), "reason: has 257 bytes, at most 256");
    let channel = world.channel(&region, "w-1", antiphon_runtime::pki::Role::Worker, "frankfurt");
    let mut admin = v1::admin_client::AdminClient::new(channel);
    let stranger = admin.set_worker_phase(order("w-1", Phase::Cordoned, 0)).await.unwrap_err();
    assert_eq!(stranger.code(), Code::PermissionDenied);
    let stranger = admin.watch_fleet(v1::WatchFleetRequest {}).await.unwrap_err();
    assert_eq!(stranger.code(), Code::PermissionDenied);
    assert!(world.placeable(&region, "w-1").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_watches_is_told_at_once_and_of_what_changes() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let watching = world.operator(&region).watch_fleet(v1::WatchFleetRequest {}).await;
    let mut updates = watching.unwrap().into_inner();
    let first = soon("the first status", updates.message()).await.unwrap().unwrap();
    assert!(first.regions[0].workers.is_empty());
    let desk = world.worker(&region, "w-1", 10).await;
    let session = region.sessions().create_session(with_key(&world.key, create())).await.unwrap().into_inner();
    assert!(!session.session.is_empty());
    let told = soon("the worker and its session", async {
        loop {
            let status = updates.message().await.unwrap().unwrap();
            if let Some(worker) = status.regions[0].workers.first().filter(|w| w.reserved == 1) {
                return (worker.clone(), status.records_hash);
            }
        }
    })
    .await;
    let (worker, hash) = told;
    assert!(worker.connected && worker.incarnation == desk.incarnation.lock().value());
    assert_eq!(worker.revisions, [v1::RevisionSessions { revision: "r1".into(), sessions: 1 }]);
    // The hash is the records': it moves with them and with nothing else.
    assert_eq!(hash, first.records_hash);
    let applied = world.apply(&region, world.agent(&["frankfurt"])).await.unwrap();
    assert_eq!(applied.records_hash, hash, "the same again");
    let mut change = world.agent(&["frankfurt"]);
    change.agents[0].sessions_per_tenant = 9;
    let applied = world.apply(&region, change).await.unwrap();
    assert_ne!(applied.records_hash, hash);
    soon("the new hash", async {
        while updates.message().await.unwrap().unwrap().records_hash != applied.records_hash {}
    })
    .await;
}
