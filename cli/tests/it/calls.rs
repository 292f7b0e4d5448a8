//! Calls that come about, and stay.

use antiphon_cli::fleet::Kind;
use antiphon_client::SwitchReason;
use antiphon_proto::v1::Codec;

use crate::support::{Caller, Shape, TestFleet, start, until};

#[tokio::test(flavor = "multi_thread")]
async fn every_codec_brings_the_callers_own_words_back() {
    let fleet = start(Shape { relays: 1, workers: 1, slots: 4 }).await;
    let mut calls = tokio::task::JoinSet::new();
    for (seed, codec) in (0..).zip([Codec::Opus, Codec::L1616k, Codec::L1624k]) {
        let (session, call) = fleet.dial(codec).await;
        assert_eq!(session.codec(), codec);
        let (caller, _) = Caller::new(seed, call.sample_rate(), 2);
        calls.spawn(caller.run(call));
    }
    for finished in calls.join_all().await {
        finished.assert_complete();
        assert_eq!(finished.report.switches, []);
    }
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_call_outlives_its_address_and_two_relays() {
    let mut fleet = start(Shape { relays: 3, workers: 1, slots: 4 }).await;
    let (session, call) = fleet.dial(Codec::Opus).await;
    let handle = call.handle();
    let (caller, mut seen) = Caller::new(4, call.sample_rate(), 3);
    let running = tokio::spawn(caller.run(call));

    until(&mut seen, |seen| seen.answers_begun >= 1).await;
    handle.rebind();
    until(&mut seen, |seen| seen.rebound == 1).await;

    let drained = relay_in_use(&fleet, &session.relays[seen.borrow().relay].address);
    let relay = fleet.fleet.process(Kind::Relay, "north", drained).unwrap();
    relay.terminate().unwrap();
    let status = relay.ended(crate::support::PATIENCE).await.unwrap();
    assert!(status.success(), "{status}");
    until(&mut seen, |seen| seen.switches.iter().any(|s| s.reason == SwitchReason::Draining)).await;

    until(&mut seen, |seen| seen.answers_begun >= 2).await;
    let killed = relay_in_use(&fleet, &session.relays[seen.borrow().relay].address);
    assert_ne!(killed, drained);
    fleet.fleet.process(Kind::Relay, "north", killed).unwrap().kill().unwrap();
    let left = |reason| matches!(reason, SwitchReason::Silent | SwitchReason::Refused);
    until(&mut seen, |seen| seen.switches.iter().any(|s| left(s.reason))).await;

    let finished = running.await.unwrap();
    finished.assert_complete();
    assert!(finished.report.rebinds.iter().all(|rebind| rebind.gap.is_some()), "{:?}", finished.report);
    fleet.fleet.stop().await;
}

/// Index of the relay behind an address of the ticket.
fn relay_in_use(fleet: &TestFleet, address: &str) -> usize {
    let relays = fleet.fleet.processes().iter().filter(|process| process.spec().kind == Kind::Relay);
    let ips: Vec<_> = relays.map(|process| format!("{}:", process.spec().ip)).collect();
    ips.iter().position(|ip| address.starts_with(ip)).expect("a relay of the fleet")
}
