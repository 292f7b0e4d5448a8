//! Several routers of one region, and keys that rotate.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use antiphon_core::id::{KeyGeneration, RelayNumber};
use antiphon_proto::v1;
use tonic::Status;

use crate::{
    fixture::{Worker, eventually, loopback, relay_number, short},
    router::{Fixture, Registered, fixture, listen, start},
};

/// A caller who sends without a pause, and a worker who counts: whatever is sent has to arrive.
struct Call {
    stop: Arc<AtomicBool>,
    arrived: Arc<AtomicU64>,
    thread: thread::JoinHandle<Worker>,
}

impl Call {
    fn start(mut worker: Worker, relay: SocketAddr) -> Self {
        let (stop, arrived) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), arrived.clone());
        let talk = move || {
            let client = loopback("127.0.0.1:0");
            let cid = worker.live_cid();
            while !stopped.load(Ordering::Relaxed) {
                talk_once(&client, relay, &cid, &worker, &counted);
            }
            worker
        };
        Self { stop, arrived, thread: thread::spawn(talk) }
    }

    /// Until some more have arrived.
    fn goes_on(&self) {
        let before = self.arrived.load(Ordering::Relaxed);
        eventually("the call goes on", || self.arrived.load(Ordering::Relaxed) > before + 100);
    }

    /// Gives the worker back once everything has arrived.
    fn end(self) -> Worker {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn talk_once(
    client: &UdpSocket,
    relay: SocketAddr,
    cid: &antiphon_core::cid::SessionCid,
    worker: &Worker,
    counted: &AtomicU64,
) {
    for n in 0..8 {
        client.send_to(&short(cid, 120, n), relay).unwrap();
    }
    // Frames that are lost never come, and that fails the test.
    let mut fills: Vec<u8> = (0..8).map(|_| worker.frame().datagram[20]).collect();
    fills.sort_unstable();
    assert_eq!(fills, (0..8).collect::<Vec<_>>());
    counted.fetch_add(8, Ordering::Relaxed);
}

async fn loaded(router: &mut Registered, generations: &[u32]) {
    router.report(|r| r.loaded_generations == generations).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_rotate_during_a_call_and_no_packet_is_lost() {
    let mut fixture = fixture(&["--cid-rate", "30000"]).await;
    let _running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    let public: SocketAddr = router.hello().await.public_address.parse().unwrap();
    router.welcome_as(relay_number(), &[1], 1).await;
    let worker = Worker::new(0x0040_0000_0000_0001);
    router.routes(1, true, &[&worker]).await;
    loaded(&mut router, &[1]).await;
    let client = loopback("127.0.0.1:0");
    let old = Call::start(worker, public);
    old.goes_on();
    router.keys(&[1, 2], 1).await;
    loaded(&mut router, &[1, 2]).await;
    old.goes_on();
    router.keys(&[1, 2], 2).await;
    old.goes_on();
    let mut worker = old.end();

    // A connection ID of before, sealed with the new generation: it has not lost its way.
    let before = worker.live_cid();
    client.send_to(&short(&before, 90, 1), public).unwrap();
    assert_eq!(worker.frame().generation.value(), 2);
    worker.rotate(KeyGeneration::new(2).unwrap());
    let new = Call::start(worker, public);
    new.goes_on();
    router.keys(&[2], 2).await;
    loaded(&mut router, &[2]).await;
    new.goes_on();
    new.end();
    client.send_to(&short(&before, 90, 1), public).unwrap();
    fixture.eventually_http("/metrics", "antiphon_relay_dropped_packets_total{reason=\"cid_config\"} 1\n").await;
    fixture.eventually_http("/metrics", "antiphon_relay_loaded_generation 2\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotated_keys_are_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut fixture = fixture(&["--drain-deadline", "1ms", "--state", state.to_str().unwrap()]).await;
    let running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    let mut worker = Worker::new(0x0040_0000_0000_0001);
    router.hello().await;
    router.welcome_as(relay_number(), &[1], 1).await;
    router.routes(1, true, &[&worker]).await;
    router.keys(&[1, 2], 2).await;
    loaded(&mut router, &[1, 2]).await;
    running.stop.notify_one();
    drop(router);
    running.ended.await.unwrap().unwrap();

    let _running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    let public: SocketAddr = router.hello().await.public_address.parse().unwrap();
    fixture.eventually_http("/readyz", "HTTP/1.1 200").await;
    worker.rotate(KeyGeneration::new(2).unwrap());
    let client = loopback("127.0.0.1:0");
    client.send_to(&short(&worker.live_cid(), 90, 1), public).unwrap();
    assert_eq!(worker.frame().generation.value(), 2);
    // A router that is behind takes nothing back.
    router.welcome_as(relay_number(), &[1], 1).await;
    loaded(&mut router, &[1, 2]).await;
    client.send_to(&short(&worker.live_cid(), 90, 2), public).unwrap();
    assert_eq!(worker.frame().generation.value(), 2);
}

/// A relay with two routers, and both its registrations.
async fn two(extra: &[&str]) -> (Fixture, tokio::sync::mpsc::Receiver<Registered>) {
    let mut fixture = fixture(extra).await;
    let (other, registrations) = listen("here").await;
    fixture.args.router.push(other);
    (fixture, registrations)
}

async fn second(registrations: &mut tokio::sync::mpsc::Receiver<Registered>) -> Registered {
    let registered = tokio::time::timeout(crate::fixture::DEADLINE, registrations.recv());
    registered.await.expect("a relay in time").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_routers_are_followed_at_once_and_their_routes_unite() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let (mut fixture, mut registrations) = two(&["--drain-deadline", "1ms", "--state", state.to_str().unwrap()]).await;
    let running = start(fixture.args.clone());
    let (mut first, mut other) = (fixture.registered().await, second(&mut registrations).await);
    first.hello().await;
    other.hello().await;
    let workers = [Worker::new(1 << 32), Worker::new(2 << 32), Worker::new(3 << 32)];
    first.welcome().await;
    first.routes(7, true, &[&workers[0], &workers[1]]).await;
    first.report(|r| r.routes == 2 && r.table_version == 7).await;
    other.welcome().await;
    other.routes(3, true, &[&workers[1], &workers[2]]).await;
    other.report(|r| r.routes == 3 && r.table_version == 3).await;
    fixture.eventually_http("/metrics", "antiphon_relay_router_connected 2\n").await;

    // One goes; what it alone had said stays until somebody says that it is gone.
    drop(first);
    let mut first = fixture.registered().await;
    assert_eq!(first.hello().await.relay_number, Some(relay_number().value().into()));
    other.update(v1::RouteUpdate { version: 4, removals: vec![1 << 32], ..v1::RouteUpdate::default() }).await;
    other.report(|r| r.routes == 2 && r.table_version == 4).await;
    first.welcome().await;
    first.routes(1, true, &[&workers[1]]).await;
    assert_eq!(first.report(|r| r.table_version == 1).await.routes, 2);
    fixture.eventually_http("/metrics", "antiphon_relay_state_version 4\n").await;
    running.stop.notify_one();
    drop((first, other));
    running.ended.await.unwrap().unwrap();

    let _running = start(fixture.args.clone());
    let (mut first, _other) = (fixture.registered().await, second(&mut registrations).await);
    first.hello().await;
    fixture.eventually_http("/metrics", "antiphon_relay_routes 2\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_numbers_the_relay_otherwise_is_not_followed() {
    let (mut fixture, mut registrations) = two(&[]).await;
    let _running = start(fixture.args.clone());
    let (mut first, mut other) = (fixture.registered().await, second(&mut registrations).await);
    first.hello().await;
    other.hello().await;
    let worker = Worker::new(1);
    first.welcome().await;
    first.routes(1, true, &[&worker]).await;
    first.report(|r| r.routes == 1).await;
    other.welcome_as(RelayNumber::new(66).unwrap(), &[1], 1).await;
    while other.message().await.is_some() {}
    let wanted = "antiphon_relay_refused_updates_total{reason=\"disagreement\"} 1\n";
    fixture.eventually_http("/metrics", wanted).await;
    let mut again = second(&mut registrations).await;
    assert_eq!(again.hello().await.relay_number, Some(relay_number().value().into()), "it asks for the one it has");
    again.welcome().await;
    fixture.eventually_http("/metrics", "antiphon_relay_router_connected 2\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routers_are_found_by_name() {
    let mut fixture = fixture(&[]).await;
    let port = fixture.args.router[1].rsplit_once(':').unwrap().1;
    fixture.args.router = vec![format!("localhost:{port}"), "no-such-router.invalid:7444".into()];
    let _running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    router.hello().await;
    router.welcome().await;
    router.routes(1, true, &[]).await;
    router.report(|r| r.table_version == 1).await;
    fixture.eventually_http("/readyz", "HTTP/1.1 200").await;
}

/// The router decides whose the name is; the relay that is refused waits for it and takes nothing from the other one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_whose_name_is_in_use_waits_until_it_is_free() {
    let mut fixture = fixture(&[]).await;
    let _running = start(fixture.args.clone());
    for _ in 0..3 {
        let mut router = fixture.registered().await;
        assert_eq!(router.hello().await.name, "relay-1");
        router.refuse(Status::already_exists("relay relay-1 is connected from elsewhere")).await;
    }
    let mut router = fixture.registered().await;
    router.hello().await;
    router.welcome().await;
    router.routes(1, true, &[&Worker::new(0x0040_0000_0000_0001)]).await;
    router.report(|report| report.routes == 1).await;
}
