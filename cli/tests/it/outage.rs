//! Calls while the control plane is away.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use antiphon_cli::fleet::Kind;
use antiphon_client::{Call, Event, Heard, Party, ScriptedCaller, Step};
use antiphon_media::{
    script::Script,
    verify::{Said, verify},
};
use antiphon_proto::v1::{Codec, FleetStatusRequest, RegionStatus};
use tokio::{sync::watch, time::timeout};

use crate::support::{Caller, Finished, PATIENCE, Shape, TestFleet, eventually, start, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_dies_while_its_router_is_away_comes_back_with_its_routes_and_its_call() {
    let mut fleet = start(Shape { relays: 1, workers: 1, slots: 4 }).await;
    let (_, call) = fleet.dial(Codec::Opus).await;
    let caller = Pausing::new(7, call.sample_rate(), 3);
    let (mut answers, speak) = (caller.answers.subscribe(), caller.may_go_on.clone());
    let running = tokio::spawn(caller.run(call));
    until(&mut answers, |complete| *complete == 1).await;
    timeout(PATIENCE, kept(&mut fleet)).await.unwrap();

    let router = fleet.fleet.process(Kind::Router, "north", 0).unwrap();
    router.kill().unwrap();
    router.ended(PATIENCE).await.unwrap();
    let killed = fleet.fleet.process(Kind::Relay, "north", 0).unwrap();
    killed.kill().unwrap();
    killed.restart().await.unwrap();
    for series in ["up", "down"].map(|way| format!("antiphon_relay_forwarded_packets_total{{direction=\"{way}\"}}")) {
        timeout(PATIENCE, async { while relay(&mut fleet, &series).await < Some(1.0) {} }).await.unwrap();
    }
    assert_eq!(relay(&mut fleet, "antiphon_relay_router_connected").await, Some(0.0));
    assert_eq!(relay(&mut fleet, "antiphon_relay_routes").await, Some(1.0));
    speak.store(true, Ordering::Relaxed);
    until(&mut answers, |complete| *complete == 2).await;

    // The router comes back knowing nothing, and takes nothing away.
    fleet.fleet.process(Kind::Router, "north", 0).unwrap().restart().await.unwrap();
    eventually("the router takes its records", async || fleet.fleet.apply().await.is_ok()).await;
    let connected = async { while relay(&mut fleet, "antiphon_relay_router_connected").await != Some(1.0) {} };
    timeout(PATIENCE, connected).await.unwrap();
    timeout(PATIENCE, running).await.unwrap().unwrap().assert_complete();
    assert_eq!(relay(&mut fleet, "antiphon_relay_routes").await, Some(1.0));
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_comes_back_from_disk_while_the_control_plane_is_away_and_nothing_is_reshuffled() {
    let mut fleet = start(Shape { relays: 1, workers: 2, slots: 4 }).await;
    let (session, call) = fleet.dial(Codec::Opus).await;
    let caller = Pausing::new(9, call.sample_rate(), 3);
    let (mut answers, speak) = (caller.answers.subscribe(), caller.may_go_on.clone());
    let running = tokio::spawn(caller.run(call));
    until(&mut answers, |complete| *complete == 1).await;
    timeout(PATIENCE, kept(&mut fleet)).await.unwrap();
    let before = numbers(&fleet).await;
    assert_eq!(before.len(), 3, "two workers and a relay: {before:?}");

    let router = fleet.fleet.process(Kind::Router, "north", 0).unwrap();
    router.kill().unwrap();
    router.ended(PATIENCE).await.unwrap();
    // The worker without a call, and the relay that the call goes through.
    let idle = (0..2).find(|index| worker_name(&mut fleet, *index) != session.worker).unwrap();
    for (kind, index) in [(Kind::Worker, idle), (Kind::Relay, 0)] {
        let killed = fleet.fleet.process(kind, "north", index).unwrap();
        killed.kill().unwrap();
        // Ready without a router: from disk.
        killed.restart().await.unwrap();
    }
    speak.store(true, Ordering::Relaxed);
    until(&mut answers, |complete| *complete == 2).await;

    // The router starts from its own disk: nobody tells it anything but those who register.
    fleet.fleet.process(Kind::Router, "north", 0).unwrap().restart().await.unwrap();
    eventually("everybody has the number of before", async || numbers(&fleet).await == before).await;
    timeout(PATIENCE, running).await.unwrap().unwrap().assert_complete();
    eventually("both workers take calls again", async || placeable(&fleet).await == 2).await;
    let (_, second) = fleet.dial(Codec::Opus).await;
    let (caller, _) = Caller::new(10, second.sample_rate(), 1);
    caller.run(second).await.assert_complete();
    fleet.fleet.stop().await;
}

fn worker_name(fleet: &mut TestFleet, index: usize) -> String {
    fleet.fleet.process(Kind::Worker, "north", index).unwrap().spec().name.clone()
}

/// What the router says of its region; nothing while it is away.
async fn status(fleet: &TestFleet) -> Option<RegionStatus> {
    let mut admin = fleet.fleet.admin(&fleet.fleet.context().routers[0]).ok()?;
    let status = admin.fleet_status(FleetStatusRequest {}).await.ok()?.into_inner();
    status.regions.into_iter().find(|region| region.local)
}

/// Number of every worker and relay.
async fn numbers(fleet: &TestFleet) -> BTreeMap<String, u32> {
    let Some(status) = status(fleet).await else { return BTreeMap::new() };
    let workers = status.workers.into_iter().map(|worker| (worker.name, worker.number));
    let relays = status.relays.into_iter().filter_map(|relay| Some((relay.name, relay.relay?.number)));
    workers.chain(relays).collect()
}

async fn placeable(fleet: &TestFleet) -> usize {
    status(fleet).await.map_or(0, |status| status.workers.iter().filter(|worker| worker.placeable).count())
}

/// Waits until what is in force is on disk.
async fn kept(fleet: &mut TestFleet) {
    let (in_force, on_disk) = ("antiphon_relay_table_version", "antiphon_relay_state_version");
    while relay(fleet, in_force).await != relay(fleet, on_disk).await {}
}

/// A series of the relay's, once it answers.
async fn relay(fleet: &mut TestFleet, series: &str) -> Option<f64> {
    let text = fleet.fleet.process(Kind::Relay, "north", 0)?.metrics().await.ok()?;
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// A scripted caller who is silent after the first answer until told to go on: nothing is said that an outage could
/// swallow.
struct Pausing {
    script: Script,
    inner: ScriptedCaller,
    answers: watch::Sender<usize>,
    may_go_on: Arc<AtomicBool>,
}

impl Pausing {
    fn new(seed: u64, rate: u32, turns: usize) -> Self {
        let script = Script::bundled(seed, rate, turns).unwrap();
        let said = script.turns.iter().map(|turn| turn.pcm.clone()).collect();
        let inner = ScriptedCaller::new(said, rate, Duration::from_secs(20));
        Self { script, inner, answers: watch::Sender::new(0), may_go_on: Arc::default() }
    }

    async fn run(mut self, call: Call) -> Finished {
        let rate = call.sample_rate();
        let (report, outcome) = call.run(&mut self).await;
        let heard = self.inner.into_outcome();
        let turns = self.script.turns.iter().zip(&heard.ended);
        let said: Vec<_> =
            turns.map(|(turn, ended)| Said { pcm: &turn.pcm, code: turn.code, ended: Some(*ended) }).collect();
        assert_eq!(said.len(), self.script.turns.len(), "everything was said");
        let found = verify(&said, &heard.recording, rate);
        Finished { report, outcome, heard, found }
    }
}

impl Party for Pausing {
    fn step(&mut self, heard: &Heard<'_>, say: &mut [i16]) -> Step {
        let paused = *self.answers.borrow() == 1 && !self.may_go_on.load(Ordering::Relaxed);
        if paused { Step::Continue } else { self.inner.step(heard, say) }
    }

    fn on_event(&mut self, event: &Event) {
        self.inner.on_event(event);
        if let Event::ResponsePlayed { complete: true, .. } = event {
            self.answers.send_modify(|complete| *complete += 1);
        }
    }
}
