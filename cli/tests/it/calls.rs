//! Calls that come about, and stay.

use antiphon_cli::fleet::Kind;
use antiphon_client::{Event, Heard, Party, Step, SwitchReason};
use antiphon_media::script::Script;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_interrupts_is_listened_to() {
    let fleet = start(Shape { relays: 1, workers: 1, slots: 4 }).await;
    let (_, call) = fleet.dial(Codec::Opus).await;
    let mut caller = Interrupter::new(call.sample_rate());
    let (_, outcome) = call.run(&mut caller).await;
    assert!(outcome.is_ok(), "{outcome:?}");
    assert_eq!(caller.cut, [1], "the first answer was cut");
    assert_eq!(caller.complete, [2], "the second came whole");
    let quiet = caller.loudest_while_interrupting.expect("the agent fell silent while the caller spoke");
    assert!(quiet < 200, "silent means silent, heard up to {quiet}");
    fleet.fleet.stop().await;
}

/// Says a turn, speaks again half a second into the answer, and hangs up after the answer to that.
struct Interrupter {
    turns: Vec<Vec<i16>>,
    frame: usize,
    said: usize,
    waited: usize,
    answering: bool,
    cut: Vec<u32>,
    complete: Vec<u32>,
    /// Loudest sample heard after the cut and before the next answer.
    loudest_while_interrupting: Option<u16>,
}

impl Interrupter {
    fn new(rate: u32) -> Self {
        let script = Script::bundled(9, rate, 2).unwrap();
        Self {
            turns: script.turns.into_iter().rev().map(|turn| turn.pcm).collect(),
            frame: rate as usize / 50,
            said: 0,
            waited: 0,
            answering: false,
            cut: Vec::new(),
            complete: Vec::new(),
            loudest_while_interrupting: None,
        }
    }
}

impl Party for Interrupter {
    fn step(&mut self, heard: &Heard<'_>, say: &mut [i16]) -> Step {
        if !self.cut.is_empty() && !self.answering {
            let loudest = heard.pcm.iter().map(|sample| sample.unsigned_abs()).max().unwrap_or(0);
            self.loudest_while_interrupting = Some(self.loudest_while_interrupting.unwrap_or(0).max(loudest));
        }
        self.waited += usize::from(self.answering);
        // The second turn begins half a second into the first answer.
        let speaking = self.turns.len() == 2 || self.waited > 25;
        if let Some(turn) = self.turns.last().filter(|_| speaking) {
            let part = &turn[self.said.min(turn.len())..turn.len().min(self.said + self.frame)];
            say[..part.len()].copy_from_slice(part);
            self.said += self.frame;
            if self.said >= turn.len() {
                self.turns.pop();
                self.said = 0;
            }
        }
        if self.complete.is_empty() { Step::Continue } else { Step::HangUp }
    }

    fn on_event(&mut self, event: &Event) {
        match event {
            Event::ResponseStarted { .. } => self.answering = true,
            Event::ResponsePlayed { generation, complete } => {
                self.answering = false;
                if *complete { self.complete.push(*generation) } else { self.cut.push(*generation) }
            }
            _ => {}
        }
    }
}
