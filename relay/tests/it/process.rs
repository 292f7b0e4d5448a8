//! The whole process against a router that speaks the real protocol over mTLS.

use std::{net::SocketAddr, os::unix::fs::PermissionsExt as _, time::Duration};

use antiphon_core::tunnel::{ClientAddr, Notice};
use antiphon_proto::v1::{self, relay_message::Message};
use antiphon_relay::{Args, serve, state::disk::STATE_FILE};
use tokio::time::timeout;

use crate::{
    fixture::{DEADLINE, Worker, loopback, relay_number, short},
    router::{fixture, start},
};

fn forwards(client: &std::net::UdpSocket, relay: SocketAddr, worker: &mut Worker, fill: u8) {
    let packet = short(&worker.live_cid(), 120, fill);
    client.send_to(&packet, relay).unwrap();
    // Notices of an earlier stop may still lie there.
    let frames = std::iter::repeat_with(|| worker.frame());
    let frame = frames.into_iter().find(|frame| frame.header.client != ClientAddr::RELAY).unwrap();
    assert_eq!(frame.datagram, packet);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_registers_forwards_and_outlives_its_router() {
    let mut fixture = fixture(&[]).await;
    let running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    assert_eq!(router.peer.to_string(), "relay relay-1 of here");
    let hello = router.hello().await;
    assert_eq!((hello.name.as_str(), hello.region.as_str()), ("relay-1", "here"));
    assert_eq!(hello.relay_number, None);
    let public: SocketAddr = hello.public_address.parse().unwrap();
    fixture.eventually_http("/readyz", "waiting for: number, keys, routes").await;
    assert!(fixture.http("/livez").await.starts_with("HTTP/1.1 200"));

    let mut worker = Worker::new(0x0040_0000_0000_0001);
    let second = Worker::new(0x0040_0001_0000_0001);
    router.welcome().await;
    router.routes(1, true, &[&worker]).await;
    let report = router.report(|r| r.table_version == 1).await;
    assert_eq!((report.routes, report.phase()), (1, v1::Phase::Active));
    fixture.eventually_http("/readyz", "HTTP/1.1 200").await;
    let client = loopback("127.0.0.1:0");
    forwards(&client, public, &mut worker, 1);
    router.routes(2, false, &[&second]).await;
    assert_eq!(router.report(|r| r.table_version == 2).await.routes, 2);
    fixture.eventually_http("/metrics", "antiphon_relay_routes 2\n").await;
    fixture.eventually_http("/metrics", "antiphon_relay_forwarded_packets_total{direction=\"up\"} 1\n").await;

    // The router goes away: the table stays, and the relay asks for the number that it holds.
    drop(router);
    let mut router = fixture.registered().await;
    forwards(&client, public, &mut worker, 2);
    assert_eq!(router.hello().await.relay_number, Some(relay_number().value().into()));
    router.welcome().await;
    assert_eq!(router.report(|r| r.table_version == 2).await.routes, 2);

    // A gap makes it start over.
    router.routes(7, false, &[&second]).await;
    while router.message().await.is_some() {}
    let mut router = fixture.registered().await;
    router.hello().await;
    router.welcome().await;
    fixture.eventually_http("/metrics", "antiphon_relay_refused_updates_total{reason=\"gap\"} 1\n").await;
    drop(running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_starts_from_its_disk_and_a_poor_router_takes_nothing_away() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut fixture = fixture(&["--drain-deadline", "1ms", "--state", state.to_str().unwrap()]).await;
    let mut worker = Worker::new(0x0040_0000_0000_0001);
    let second = Worker::new(0x0040_0001_0000_0001);
    let running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    router.hello().await;
    router.welcome().await;
    router.routes(41, true, &[&worker]).await;
    fixture.eventually_http("/metrics", "antiphon_relay_state_version 41\n").await;
    let file = state.join(STATE_FILE);
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&state), mode(&file)), (0o700, 0o600));
    running.stop.notify_one();
    drop(router);
    timeout(DEADLINE, running.ended).await.unwrap().unwrap().unwrap();

    // A router accepts the connection and says nothing: the relay serves all the same.
    let running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    let hello = router.hello().await;
    assert_eq!(hello.relay_number, Some(relay_number().value().into()));
    fixture.eventually_http("/readyz", "HTTP/1.1 200").await;
    let client = loopback("127.0.0.1:0");
    forwards(&client, hello.public_address.parse().unwrap(), &mut worker, 1);
    router.welcome().await;
    router.routes(1, true, &[&second]).await;
    assert_eq!(router.report(|r| r.table_version == 1).await.routes, 2);
    forwards(&client, hello.public_address.parse().unwrap(), &mut worker, 2);
    fixture.eventually_http("/metrics", "antiphon_relay_refused_updates_total{reason=\"mass_removal\"} 1\n").await;
    fixture.eventually_http("/metrics", "antiphon_relay_state_version 1\n").await;
    running.stop.notify_one();
    drop(router);
    timeout(DEADLINE, running.ended).await.unwrap().unwrap().unwrap();

    // A damaged file is as good as none.
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let _running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    assert_eq!(router.hello().await.relay_number, None);
    fixture.eventually_http("/readyz", "waiting for: number, keys, routes").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_stop_tells_workers_and_the_router_first() {
    let mut fixture = fixture(&["--drain-deadline", "30s"]).await;
    let running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    router.hello().await;
    let workers = [Worker::new(1), Worker::new(2)];
    router.welcome().await;
    router.routes(1, true, &[&workers[0], &workers[1]]).await;
    router.report(|r| r.routes == 2).await;

    running.stop.notify_one();
    let report = router.report(|r| r.phase() == v1::Phase::Draining).await;
    assert_eq!(report.routes, 2);
    for worker in &workers {
        let frame = worker.frame();
        assert_eq!(frame.header.client, ClientAddr::RELAY);
        let Some(Notice::Draining { deadline_ms }) = Notice::from_bytes(&frame.datagram) else {
            panic!("no notice: {:?}", frame.datagram);
        };
        assert!((1..=30_000).contains(&deadline_ms));
    }
    fixture.eventually_http("/readyz", "waiting for: not draining").await;
    let goodbye = loop {
        match router.message().await {
            Some(Message::Report(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(goodbye, Some(Message::Deregister(_))), "{goodbye:?}");
    drop(router);
    timeout(DEADLINE, running.ended).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_without_a_router_stops_all_the_same() {
    let mut fixture = fixture(&["--drain-deadline", "1ms"]).await;
    fixture.args.router = vec!["127.0.0.1:1".into()];
    let running = start(fixture.args.clone());
    fixture.eventually_admin().await;
    running.stop.notify_one();
    timeout(DEADLINE, running.ended).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_of_both_families_says_so_and_serves_both() {
    let port = loopback("[::]:0").local_addr().unwrap().port();
    let [six, four] = [format!("[::1]:{port}"), format!("127.0.0.1:{port}")];
    let bound = format!("[::]:{port}");
    let mut fixture = fixture(&["--public", &bound, "--public-address", &six, "--public-address", &four]).await;
    let _running = start(fixture.args.clone());
    let mut router = fixture.registered().await;
    let hello = router.hello().await;
    assert_eq!((&hello.public_address, &hello.more_public_addresses[..]), (&six, &[four.clone()][..]));
    let mut worker = Worker::new(0x0040_0000_0000_0001);
    router.welcome().await;
    router.routes(1, true, &[&worker]).await;
    router.report(|r| r.table_version == 1).await;
    forwards(&loopback("[::1]:0"), six.parse().unwrap(), &mut worker, 1);
    forwards(&loopback("127.0.0.1:0"), four.parse().unwrap(), &mut worker, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_waits_for_its_address_and_follows_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("addresses");
    let path = file.to_str().unwrap();
    let mut fixture = fixture(&[
        "--public",
        "[::]:0",
        "--tunnel",
        "[::]:0",
        "--tunnel-ip",
        "127.0.0.1",
        "--public-address-file",
        path,
    ])
    .await;
    let _running = start(fixture.args.clone());
    fixture.eventually_admin().await;
    fixture.eventually_http("/readyz", "waiting for: number, keys, routes, public address").await;
    assert!(fixture.http("/livez").await.starts_with("HTTP/1.1 200"));
    assert!(fixture.registrations.try_recv().is_err(), "there is nothing to register yet");
    std::fs::write(&file, "192.0.2.9:4433\n").unwrap();
    let mut router = fixture.registered().await;
    let hello = router.hello().await;
    assert_eq!((hello.public_address.as_str(), hello.more_public_addresses.len()), ("192.0.2.9:4433", 0));
    assert!(hello.tunnel_address.starts_with("127.0.0.1:"), "{}", hello.tunnel_address);
    router.welcome().await;
    router.routes(1, true, &[]).await;
    fixture.eventually_http("/readyz", "HTTP/1.1 200").await;
    // Nonsense changes nothing, another address does.
    std::fs::write(&file, "not an address\n").unwrap();
    let before = router.report(|r| r.table_version == 1).await;
    router.report(|r| r.unix_ms > before.unix_ms + 3000).await;
    std::fs::write(&file, "192.0.2.10:4433 [2001:db8::1]:4433\n").unwrap();
    let mut again = fixture.registered().await;
    let hello = again.hello().await;
    assert_eq!(hello.public_address, "192.0.2.10:4433");
    assert_eq!(hello.more_public_addresses, ["[2001:db8::1]:4433"]);
    assert_eq!(hello.relay_number, Some(relay_number().value().into()), "it is the same relay");
}

#[tokio::test]
async fn impossible_arguments_are_refused_with_a_reason() {
    let pending = || std::future::pending::<()>();
    let fixture = fixture(&[]).await;
    let refused = async |change: fn(&mut Args)| {
        let mut args = fixture.args.clone();
        change(&mut args);
        let outcome = timeout(Duration::from_secs(20), serve(args, pending())).await;
        format!("{:#}", outcome.expect("refused at once").unwrap_err())
    };
    let other_name = refused(|a| a.name = Some("relay-2".into())).await;
    assert!(other_name.contains("relay relay-1 of here"), "{other_name}");
    let anywhere = refused(|a| a.tunnel = "0.0.0.0:0".parse().unwrap()).await;
    assert!(anywhere.contains("give --tunnel-address IP:PORT or --tunnel-ip IP"), "{anywhere}");
    let nobody = refused(|a| a.public_address = vec!["0.0.0.0:4433".parse().unwrap()]).await;
    assert!(nobody.contains("--public-address: 0.0.0.0:4433 is no address that clients can reach"), "{nobody}");
    let nowhere = refused(|a| a.identity = "/nonexistent".into()).await;
    assert!(nowhere.contains("/nonexistent/cert.pem"), "{nowhere}");
    let foreign = refused(|a| a.tunnel = "192.0.2.1:0".parse().unwrap()).await;
    assert!(foreign.contains("binding the tunnel port 192.0.2.1:0"), "{foreign}");
}
