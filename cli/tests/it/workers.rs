//! Workers that go, planned and not.

use antiphon_cli::fleet::Kind;
use antiphon_client::CallError;
use antiphon_proto::v1::{Codec, FleetStatusRequest};

use crate::support::{Caller, PATIENCE, Shape, TestFleet, eventually, start, until};

fn worker_index(name: &str) -> usize {
    name.rsplit_once('-').unwrap().1.parse().unwrap()
}

async fn placeable(fleet: &TestFleet) -> Vec<String> {
    let mut admin = fleet.fleet.admin(&fleet.fleet.context().routers[0]).unwrap();
    let status = admin.fleet_status(FleetStatusRequest {}).await.unwrap().into_inner();
    let workers = status.regions.into_iter().flat_map(|region| region.workers);
    workers.filter(|worker| worker.placeable).map(|worker| worker.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_gets_no_more_calls_and_its_caller_is_told() {
    let mut fleet = start(Shape { relays: 1, workers: 2, slots: 10 }).await;
    let (session, call) = fleet.dial(Codec::Opus).await;
    let (caller, mut seen) = Caller::new(1, call.sample_rate(), 3);
    let running = tokio::spawn(caller.run(call));
    until(&mut seen, |seen| seen.answers_begun >= 1).await;

    let victim = worker_index(&session.worker);
    fleet.fleet.process(Kind::Worker, "north", victim).unwrap().kill().unwrap();
    eventually("the dead worker is out of placement", async || !placeable(&fleet).await.contains(&session.worker))
        .await;
    for _ in 0..5 {
        let (other, _) = fleet.ticket(Codec::Opus).await;
        assert_ne!(other.worker, session.worker);
    }
    // Silence is no evidence that its route may go.
    assert_eq!(fleet.metric(Kind::Relay, 0, "antiphon_relay_routes").await, 2.0);

    let finished = tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap();
    let error = finished.outcome.unwrap_err();
    assert!(matches!(error, CallError::WorkerSilent { .. }), "{error:?}");
    assert!(error.to_string().contains(&session.worker), "{error}");
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_asked_to_stop_ends_its_calls_first_and_leaves_the_route_table() {
    let mut fleet = start(Shape { relays: 1, workers: 1, slots: 10 }).await;
    let (_, call) = fleet.dial(Codec::Opus).await;
    let handle = call.handle();
    let (caller, mut seen) = Caller::new(2, call.sample_rate(), 5);
    let running = tokio::spawn(caller.run(call));
    until(&mut seen, |seen| seen.answers_begun >= 1).await;

    let worker = fleet.fleet.process(Kind::Worker, "north", 0).unwrap();
    worker.terminate().unwrap();
    eventually("a draining worker takes no calls", async || placeable(&fleet).await.is_empty()).await;
    handle.hang_up();
    assert!(running.await.unwrap().outcome.is_ok(), "the call goes on until the caller hangs up");
    let status = fleet.fleet.process(Kind::Worker, "north", 0).unwrap().ended(PATIENCE).await.unwrap();
    assert!(status.success(), "{status}");
    let mut routes = 1.0;
    while routes > 0.0 {
        routes = fleet.metric(Kind::Relay, 0, "antiphon_relay_routes").await;
    }
    fleet.fleet.stop().await;
}
