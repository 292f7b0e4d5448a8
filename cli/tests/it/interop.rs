//! A client that shares no code with ours.

use std::{path::Path, process::Output, time::Duration};

use antiphon_cli::fleet::Kind;
use tokio::{process::Command, time::timeout};

use crate::support::{AGENT, PATIENCE, Shape, TestFleet, eventually, start};

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_another_implementation_activates_a_session_and_exchanges_heartbeats() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../interop/ngtcp2/build.sh");
    let built = timeout(BUILD, Command::new(&script).output()).await.expect("in time").unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let client = String::from_utf8(built.stdout).unwrap();

    let mut fleet = start(Shape { relays: 2, workers: 1, slots: 2 }).await;
    let api_key = fleet.fleet.context().api_key().unwrap();
    let called = call(client.trim(), &fleet, api_key.text()).await;
    let said = String::from_utf8(called.stdout).unwrap();
    assert!(called.status.success(), "{said}{}", String::from_utf8_lossy(&called.stderr));
    let lines: Vec<_> = said.lines().collect();
    let [ticket, connected, activated, heartbeat, goodbye] = lines[..] else { panic!("{said}") };
    assert!(ticket.starts_with("ticket session=") && ticket.contains(" epoch=1 server="), "{ticket}");
    assert_eq!(connected, "connected version=1 alpn=antiphon/1");
    assert!(activated.starts_with("activated codec=1 audio_flow=0 heartbeat_flow=1 heartbeat_interval_ms="));
    assert_eq!(heartbeat, "heartbeat epoch=1 echoed=yes");
    assert!(goodbye.starts_with("goodbye relay="), "{goodbye}");
    let activations = "antiphon_worker_activations_total{reason=\"activated\"}";
    assert_eq!(fleet.metric(Kind::Worker, 0, activations).await, 1.0);
    let forwarded = async |fleet: &mut TestFleet, way: &str| {
        let series = format!("antiphon_relay_forwarded_packets_total{{direction=\"{way}\"}}");
        fleet.metric(Kind::Relay, 0, &series).await + fleet.metric(Kind::Relay, 1, &series).await
    };
    assert!(forwarded(&mut fleet, "up").await >= 3.0 && forwarded(&mut fleet, "down").await >= 3.0);
    eventually("its goodbye ends the session", async || {
        fleet.router().list(0).await.is_ok_and(|sessions| sessions.is_empty())
    })
    .await;

    let refused = call(client.trim(), &fleet, "ak_000000000000_00000000000000000000000000000000").await;
    assert!(!refused.status.success() && refused.stdout.is_empty());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("HTTP/1.1 401"));
    fleet.fleet.stop().await;
}

async fn call(client: &str, fleet: &TestFleet, api_key: &str) -> Output {
    let context = fleet.fleet.context();
    let router = &context.routers[0];
    let ca = fleet.dir.path().join("router-ca.pem");
    std::fs::write(&ca, &context.ca_pem).unwrap();
    let mut command = Command::new(client);
    command.args([&router.public, &router.server_name]).arg(ca).arg(AGENT).env("ANTIPHON_API_KEY", api_key);
    timeout(PATIENCE, command.kill_on_drop(true).output()).await.expect("in time").unwrap()
}

/// Fetching the packages takes seconds, on a slow network longer.
const BUILD: Duration = Duration::from_secs(240);
