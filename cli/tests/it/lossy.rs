//! Calls over networks as they are: lossy, jittery, behind NATs, cut, narrow.
//!
//! Every caller reaches the relays through cables. What counts is completeness: every word comes back, and where a cut
//! swallows words, those before and after it do.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use antiphon_cli::fleet::Kind;
use antiphon_client::{ClientKey, DialError};
use antiphon_proto::v1::{Codec, Session};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{sync::watch, task::JoinHandle};

use crate::support::{
    Caller, Finished, RECEIPT_FRAMES, Seen, Shape, TestFleet,
    cable::{Cable, Faults, Way},
    connect, start, until,
};

/// A cable in front of every relay of a fleet.
struct Cables(BTreeMap<SocketAddr, Cable>);

impl Cables {
    fn lay(fleet: &TestFleet, seed: u64, up: Faults, down: Faults) -> Self {
        let relays = fleet.fleet.processes().iter().filter(|process| process.spec().kind == Kind::Relay);
        let addresses = relays.map(|relay| SocketAddr::from((relay.spec().ip, RELAY_PORT)));
        let lay = |address| (address, Cable::lay(address, seed, up, down).unwrap());
        Self(addresses.map(lay).collect())
    }

    /// The cables of a ticket, in its order, which from now on names them instead of the relays.
    fn of(&self, session: &mut Session) -> Vec<&Cable> {
        let mut cables = Vec::new();
        for relay in &mut session.relays {
            let cable = &self.0[&relay.address.parse().unwrap()];
            relay.address = cable.address().to_string();
            cables.push(cable);
        }
        cables
    }

    /// Everything that happened, summed up by `what`.
    fn sum(&self, what: impl Fn(crate::support::cable::Carried) -> u64) -> u64 {
        self.0.values().map(|cable| what(cable.carried())).sum()
    }
}

/// A call that runs by itself.
struct Running {
    seen: watch::Receiver<Seen>,
    call: JoinHandle<Finished>,
}

impl Running {
    async fn start(session: &Session, key: &ClientKey, seed: u64, turns: usize) -> Self {
        let call = connect(session, key).await.unwrap();
        let (caller, seen) = Caller::new(seed, call.sample_rate(), turns);
        Self { seen, call: tokio::spawn(caller.run(call)) }
    }

    /// Waits until the words of an answer are heard: its receipt is over. The index of the relay in use then.
    async fn hears(&mut self, answer: usize) -> usize {
        until(&mut self.seen, |seen| (seen.answers_begun, seen.frames) >= (answer, RECEIPT_FRAMES)).await;
        self.seen.borrow().relay
    }

    async fn finish(self) -> Finished {
        self.call.await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_packet_in_twenty_lost_and_60_ms_of_jitter_are_concealed() {
    let mut fleet = start(Shape { relays: 2, workers: 1, slots: 4 }).await;
    let poor = Faults { loss: 0.05, jitter: 60 * MS, duplication: 0.01, ..Faults::default() };
    let cables = Cables::lay(&fleet, 21, poor, poor);
    let mut calls = Vec::new();
    for (seed, codec) in (30..).zip([Codec::Opus, Codec::L1624k]) {
        let (mut session, key) = fleet.ticket(codec).await;
        cables.of(&mut session);
        calls.push(Running::start(&session, &key, seed, 2).await);
    }
    for call in calls {
        let finished = call.finish().await;
        finished.assert_complete();
        let jitter = finished.report.received.jitter;
        assert!(jitter.lost > 0 && jitter.concealed > 0, "{jitter:?}");
    }
    for counts in [cables.sum(|all| all.up.lost), cables.sum(|all| all.down.lost)] {
        assert!(counts > 20, "packets were lost each way: {counts}");
    }
    assert!(cables.sum(|all| all.up.overtook) > 0 && cables.sum(|all| all.down.overtook) > 0);
    let concealed = "antiphon_worker_concealed_frames_total";
    assert!(fleet.metric(Kind::Worker, 0, concealed).await > 0.0, "the worker counts what it made up");
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_whose_nat_forgets_it_is_answered_at_its_new_port_and_address() {
    let fleet = start(Shape { relays: 2, workers: 1, slots: 4 }).await;
    let cables = Cables::lay(&fleet, 22, Faults::default(), Faults::default());
    let (mut session, key) = fleet.ticket(Codec::Opus).await;
    let used = cables.of(&mut session);
    let mut call = Running::start(&session, &key, 3, 3).await;
    // Another port of the same address, in the middle of an answer.
    let relay = call.hears(1).await;
    used[relay].rebind(Ipv4Addr::LOCALHOST);
    // Another address, in the middle of the next.
    let relay = call.hears(2).await;
    used[relay].rebind(Ipv4Addr::new(127, 0, 0, 2));
    // Another address, and the relay is out of reach.
    let relay = call.hears(3).await;
    used[1 - relay].rebind(Ipv4Addr::new(127, 0, 0, 3));
    used[relay].cut(Way::Both, FOREVER);
    let finished = call.finish().await;
    finished.assert_complete();
    assert_eq!(finished.report.rebinds, [], "the client itself notices nothing of a NAT");
    assert_ne!(finished.report.relay, relay, "the call ended on the relay that can be reached");
    assert!(cables.sum(|all| all.ports as u64) >= 3, "it had three ports at least");
    assert!(used[relay].carried().up.cut > 0, "{:?}", used[relay].carried());
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_callers_behind_one_address_keep_their_calls_when_their_ports_change_hands() {
    let fleet = start(Shape { relays: 1, workers: 2, slots: 10 }).await;
    let cables = Cables::lay(&fleet, 23, Faults::default(), Faults::default());
    let mut calls = Vec::new();
    for seed in 0..10 {
        let (mut session, key) = fleet.ticket(Codec::L1616k).await;
        cables.of(&mut session);
        calls.push(Running::start(&session, &key, seed, 2).await);
    }
    let cable = cables.0.values().next().unwrap();
    assert_eq!(cable.carried().callers, 10);
    for call in &mut calls {
        call.hears(1).await;
    }
    cable.rotate();
    for call in calls {
        call.finish().await.assert_complete();
    }
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_out_of_reach_in_one_or_both_directions_costs_no_word_of_an_answer() {
    let fleet = start(Shape { relays: 2, workers: 1, slots: 4 }).await;
    let mut cutting = tokio::task::JoinSet::new();
    for (seed, way) in (40..).zip([Way::Up, Way::Down, Way::Both]) {
        let cables = Cables::lay(&fleet, seed, Faults::default(), Faults::default());
        let (mut session, key) = fleet.ticket(Codec::Opus).await;
        cutting.spawn(async move {
            let used = cables.of(&mut session);
            let mut call = Running::start(&session, &key, seed, 2).await;
            let relay = call.hears(1).await;
            used[relay].cut(way, 2 * SECOND);
            let finished = call.finish().await;
            let (up, down) = (cables.sum(|all| all.up.cut), cables.sum(|all| all.down.cut));
            (way, finished, up, down)
        });
    }
    for (way, finished, up, down) in cutting.join_all().await {
        finished.assert_complete();
        assert_eq!((up > 0, down > 0), (way != Way::Down, way != Way::Up), "{way:?}: {up} up, {down} down");
    }
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_outlives_two_seconds_without_any_network() {
    let fleet = start(Shape { relays: 2, workers: 1, slots: 4 }).await;
    let cables = Cables::lay(&fleet, 24, Faults::default(), Faults::default());
    let (mut session, key) = fleet.ticket(Codec::Opus).await;
    let used = cables.of(&mut session);
    let mut call = Running::start(&session, &key, 6, 3).await;
    call.hears(2).await;
    for cable in &used {
        cable.cut(Way::Both, 2 * SECOND);
    }
    let finished = call.finish().await;
    assert!(finished.outcome.is_ok(), "{:?}", finished.outcome);
    let turns = &finished.found.turns;
    for turn in [&turns[0], &turns[2]] {
        assert!(turn.problems.is_empty(), "{turn:?}");
    }
    assert!(cables.sum(|all| all.up.cut) > 0 && cables.sum(|all| all.down.cut) > 0);
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_packet_fits_the_smallest_ipv6_path() {
    let fleet = start(Shape { relays: 1, workers: 1, slots: 4 }).await;
    let of = |mtu| Faults { mtu, ..Faults::default() };
    let narrow = Cables::lay(&fleet, 25, of(1_280), of(1_280));
    let (mut session, key) = fleet.ticket(Codec::L1624k).await;
    narrow.of(&mut session);
    Running::start(&session, &key, 7, 2).await.finish().await.assert_complete();
    assert_eq!(narrow.sum(|all| all.up.too_long + all.down.too_long), 0, "nobody sends what does not fit");
    let longest = narrow.0.values().map(|cable| cable.carried().up.longest).max();
    assert_eq!(longest, Some(1_200), "an Initial fills its datagram");

    // The cable does what it says: through one that is a byte too narrow nobody gets.
    let too_narrow = Cables::lay(&fleet, 26, of(1_247), of(1_247));
    let (mut session, key) = fleet.ticket(Codec::L1624k).await;
    too_narrow.of(&mut session);
    let error = connect(&session, &key).await.unwrap_err();
    assert!(matches!(error, DialError::NoAnswer { .. }), "{error:?}");
    assert!(too_narrow.sum(|all| all.up.too_long) > 0);
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_hangs_in_the_middle_of_an_answer_costs_no_word() {
    let mut fleet = start(Shape { relays: 2, workers: 1, slots: 4 }).await;
    let (session, key) = fleet.ticket(Codec::Opus).await;
    let mut call = Running::start(&session, &key, 8, 2).await;
    let relay = call.hears(1).await;
    let ip = session.relays[relay].address.parse::<SocketAddr>().unwrap().ip();
    let index = (0..2).find(|index| fleet.fleet.process(Kind::Relay, "north", *index).unwrap().spec().ip == ip);
    let hanging = fleet.fleet.process(Kind::Relay, "north", index.unwrap()).unwrap().pid().unwrap();
    let hanging = Pid::from_raw(hanging.try_into().unwrap()).unwrap();
    kill_process(hanging, Signal::STOP).unwrap();
    let finished = call.finish().await;
    kill_process(hanging, Signal::CONT).unwrap();
    finished.assert_complete();
    assert_ne!(finished.report.relay, relay, "{:?}", finished.report.switches);
    fleet.fleet.stop().await;
}

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const FOREVER: Duration = Duration::from_secs(3_600);
const RELAY_PORT: u16 = 4433;
