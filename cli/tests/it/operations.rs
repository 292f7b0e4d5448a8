//! What an operator does to a fleet while calls are going on.

use std::{
    process::Stdio,
    time::{Duration, SystemTime},
};

use antiphon_cli::fleet::Kind;
use antiphon_proto::v1::Codec;
use serde_json::Value;
use tokio::process::Command;

use crate::support::{Caller, PATIENCE, Shape, TestFleet, eventually, start, until};

/// Runs a command of the program against a fleet, which must end well, and reads what it prints.
async fn antiphon(fleet: &TestFleet, args: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_antiphon"));
    command.env("ANTIPHON_DIR", fleet.dir.path()).args(args).arg("--json").stdin(Stdio::null());
    let output = tokio::time::timeout(2 * PATIENCE, command.output()).await.expect("in time").unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_under_a_live_call() {
    const DAY: Duration = Duration::from_secs(86_400);
    let mut fleet = start(Shape { relays: 1, workers: 1, slots: 4 }).await;
    let (_, call) = fleet.dial(Codec::Opus).await;
    let (caller, mut seen) = Caller::new(11, call.sample_rate(), 2);
    let running = tokio::spawn(caller.run(call));
    until(&mut seen, |seen| seen.answers_begun >= 1).await;

    let certificate = fleet.dir.path().join("identities/north/router-0/cert.pem");
    let before = std::fs::read(&certificate).unwrap();
    assert_eq!(fleet.fleet.renew_certificates(SystemTime::now()), [""; 0], "none is due yet");
    assert_eq!(fleet.fleet.renew_certificates(SystemTime::now() + 21 * DAY), ["4 certificates renewed"]);
    assert_ne!(std::fs::read(&certificate).unwrap(), before);
    for kind in [Kind::Router, Kind::Relay, Kind::Worker] {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while fleet.metric(kind, 0, "antiphon_runtime_certificate_renewals_total").await < 1.0 {
            assert!(tokio::time::Instant::now() < deadline, "{kind:?} has not taken its certificate up");
        }
        assert!(fleet.metric(kind, 0, "antiphon_runtime_certificate_expiry_seconds").await > 29.0 * 86_400.0);
    }

    // New connections everywhere: the operator's and a caller's to the router, the router's to the worker, a call's.
    let status = antiphon(&fleet, &["status"]).await;
    assert_eq!(status["regions"][0]["workers"][0]["placeable"], true, "{status}");
    let (_, second) = fleet.dial(Codec::Opus).await;
    let (caller, _) = Caller::new(12, second.sample_rate(), 1);
    let second = caller.run(second).await;
    assert!(second.outcome.is_ok() && second.heard.unanswered == 0, "{:?}", second.outcome);
    let finished = running.await.unwrap();
    finished.assert_complete();
    assert_eq!(finished.report.switches, []);
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_rotated_and_a_path_explained_under_a_live_call() {
    let fleet = start(Shape { relays: 2, workers: 1, slots: 4 }).await;
    let (session, call) = fleet.dial(Codec::Opus).await;
    let (caller, mut seen) = Caller::new(13, call.sample_rate(), 3);
    let running = tokio::spawn(caller.run(call));
    until(&mut seen, |seen| seen.answers_begun >= 1).await;

    let path = antiphon(&fleet, &["explain", &session.session, "--path"]).await;
    assert_eq!((&path["worker"], &path["region"]), (&session.worker.clone().into(), &"north".into()), "{path}");
    let used = path["paths"].as_array().unwrap();
    let current: Vec<_> = used.iter().filter(|path| path["current"] == true).collect();
    let relay = session.relays[seen.borrow().relay].number;
    assert_eq!((current.len(), &current[0]["relay"]), (1, &relay.into()), "{path}");
    assert!(current[0]["receivedPackets"].as_u64().unwrap() > 0, "{path}");

    assert_eq!(antiphon(&fleet, &["keys", "generations"]).await["regions"][0]["minting"], 1);
    let rotated = antiphon(&fleet, &["keys", "rotate"]).await;
    assert_eq!((&rotated["generation"], &rotated["minting"]), (&2.into(), &true.into()), "{rotated}");
    assert_eq!(rotated["regions"][0]["loaded"], serde_json::json!([1, 2]), "{rotated}");
    let (_, second) = fleet.dial(Codec::Opus).await;
    let (caller, _) = Caller::new(14, second.sample_rate(), 1);
    let second = caller.run(second).await;
    assert!(second.outcome.is_ok() && second.heard.unanswered == 0, "{:?}", second.outcome);
    running.await.unwrap().assert_complete();
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_is_told_that_a_worker_is_gone_before_it_is_back() {
    let mut fleet = start(Shape { relays: 1, workers: 1, slots: 4 }).await;
    // Stays away: what the router knows, it knows from the report.
    fleet.fleet.process(Kind::Worker, "north", 0).unwrap().kill().unwrap();
    tokio::time::timeout(PATIENCE, fleet.fleet.ended()).await.expect("its end is noticed");
    let happened = fleet.fleet.heal().await;
    assert!(happened.iter().any(|line| line.ends_with("is gone: its router knows")), "{happened:?}");
    eventually("its routes are gone", async || {
        antiphon(&fleet, &["status"]).await["regions"][0]["workers"].as_array().unwrap().is_empty()
    })
    .await;
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_writes_what_quic_did_when_asked_to() {
    let fleet = start(Shape { relays: 1, workers: 1, slots: 4 }).await;
    let file = fleet.dir.path().join("call.sqlog");
    let call = antiphon(&fleet, &["call", "echo", "--qlog", file.to_str().unwrap()]).await;
    assert_eq!(call["error"], Value::Null, "{call}");
    assert_eq!(call["clockAheadOfRouterMs"], Value::Null, "one machine, one clock: {call}");
    // JSON text sequences (RFC 7464): a header, then events.
    let text = std::fs::read_to_string(&file).unwrap();
    let records: Vec<Value> = text
        .split('\u{1e}')
        .filter(|record| !record.trim().is_empty())
        .map(|r| serde_json::from_str(r).unwrap())
        .collect();
    assert!(records[0]["title"].as_str().unwrap().contains(call["session"].as_str().unwrap()), "{}", records[0]);
    assert!(records.len() > 100, "{} records", records.len());
    let trips: Vec<f64> = records.iter().filter_map(|record| record["data"]["smoothed_rtt"].as_f64()).collect();
    let last = *trips.last().expect("round trips are measured");
    assert!((0.1..5_000.0).contains(&last), "milliseconds, over loopback: {last}");
    fleet.fleet.stop().await;
}
