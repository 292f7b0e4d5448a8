//! A small fleet and a caller.

pub(crate) mod cable;

use std::{future::Future, time::Duration};

use antiphon_cli::fleet::{Fleet, Kind, Options};
use antiphon_client::{
    Call, CallError, CallReport, ClientKey, Dial, DialError, Event, Heard, Party, Router, ScriptedCaller,
    ScriptedOutcome, SessionRequest, Step, Switch,
};
use antiphon_core::id::{Epoch, SessionId};
use antiphon_crds::{compile, manifest};
use antiphon_media::{
    script::Script,
    verify::{Report, Said, verify},
};
use antiphon_proto::v1::{Codec, Session};
use tokio::sync::watch;

pub(crate) const AGENT: &str = "default/echo";

/// One region's worth of manifest.
pub(crate) struct Shape {
    pub(crate) relays: u32,
    pub(crate) workers: u32,
    pub(crate) slots: u32,
}

impl Shape {
    pub(crate) fn manifest(&self) -> String {
        let Self { relays, workers, slots } = self;
        format!(
            "
apiVersion: antiphon.dev/v1alpha1
kind: VoiceRegion
metadata: {{name: north, namespace: antiphon-system}}
spec:
  number: 7
  cluster: here
  cloud: nimbus
  location: {{latitude: 52.5, longitude: 13.4}}
  relay: {{replicas: {relays}}}
---
apiVersion: antiphon.dev/v1alpha1
kind: VoiceAgent
metadata: {{name: echo, namespace: default}}
spec:
  engine: {{type: Echo}}
  regions:
    - {{name: north, minReplicas: {workers}, maxReplicas: {workers}}}
  sessions: {{slotsPerWorker: {slots}}}
"
        )
    }
}

/// A running fleet in a directory of its own.
pub(crate) struct TestFleet {
    pub(crate) fleet: Fleet,
    pub(crate) dir: tempfile::TempDir,
}

pub(crate) async fn start(shape: Shape) -> TestFleet {
    start_from(&shape.manifest()).await
}

/// What a manifest describes.
pub(crate) async fn start_from(manifest: &str) -> TestFleet {
    let dir = tempfile::tempdir().unwrap();
    let resources = manifest::parse(&[("test.yaml", manifest)]).unwrap();
    let plan = compile::compile(&resources).unwrap();
    let stop_deadline = Duration::from_secs(3);
    let options = Options { dir: dir.path().to_owned(), stop_deadline, tenant: "test".into() };
    let fleet = Fleet::start(plan, options, &|_| ()).await.unwrap();
    TestFleet { fleet, dir }
}

impl TestFleet {
    pub(crate) fn router(&self) -> Router {
        let context = self.fleet.context();
        context.client(&context.routers[0], None).unwrap()
    }

    /// A ticket and the key that it is bound to.
    pub(crate) async fn ticket(&self, codec: Codec) -> (Session, ClientKey) {
        let key = ClientKey::generate().unwrap();
        (self.router().create(&request(&key, codec)).await.unwrap(), key)
    }

    /// A connected call.
    pub(crate) async fn dial(&self, codec: Codec) -> (Session, Call) {
        let (session, key) = self.ticket(codec).await;
        let call = connect(&session, &key).await.unwrap();
        (session, call)
    }

    /// A counter or gauge of a process, 0 if it has no such series yet.
    pub(crate) async fn metric(&mut self, kind: Kind, index: usize, series: &str) -> f64 {
        self.metric_in("north", kind, index, series).await
    }

    /// The same of any region.
    pub(crate) async fn metric_in(&mut self, region: &str, kind: Kind, index: usize, series: &str) -> f64 {
        let process = self.fleet.process(kind, region, index).unwrap();
        let text = process.metrics().await.unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or(0.0)
    }
}

pub(crate) fn request(key: &ClientKey, codec: Codec) -> SessionRequest {
    SessionRequest {
        agent: AGENT.into(),
        location: Some((50.0, 8.0)),
        client_key: key.public(),
        codec,
        regions: Vec::new(),
        max_rtt_ms: 0,
        session: SessionId::from_bytes(rand::random()),
        epoch: Epoch::FIRST,
    }
}

pub(crate) async fn connect(session: &Session, key: &ClientKey) -> Result<Call, DialError> {
    Dial::new(session).unwrap().connect(key).await
}

/// A scripted caller that others can watch.
pub(crate) struct Caller {
    script: Script,
    inner: ScriptedCaller,
    seen: watch::Sender<Seen>,
}

/// What a caller has noticed so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    pub(crate) relay: usize,
    pub(crate) switches: Vec<Switch>,
    pub(crate) answers_begun: usize,
    /// Frames of 20 ms heard of the answer begun last.
    pub(crate) frames: usize,
    pub(crate) rebound: usize,
}

impl Caller {
    pub(crate) fn new(seed: u64, rate: u32, turns: usize) -> (Self, watch::Receiver<Seen>) {
        let script = Script::bundled(seed, rate, turns).unwrap();
        let said = script.turns.iter().map(|turn| turn.pcm.clone()).collect();
        let inner = ScriptedCaller::new(said, rate, Duration::from_secs(20));
        let (seen, watch) = watch::channel(Seen::default());
        (Self { script, inner, seen }, watch)
    }

    /// Runs the call to its end and compares what was heard.
    pub(crate) async fn run(mut self, call: Call) -> Finished {
        let rate = call.sample_rate();
        self.seen.send_modify(|seen| seen.relay = call.relay());
        let (report, outcome) = call.run(&mut self).await;
        let heard = self.inner.into_outcome();
        let ended = heard.ended.iter().copied().map(Some).chain(std::iter::repeat(None));
        let said: Vec<_> = self
            .script
            .turns
            .iter()
            .zip(ended)
            .map(|(turn, ended)| Said { pcm: &turn.pcm, code: turn.code, ended })
            .collect();
        let found = verify(&said, &heard.recording, rate);
        Finished { report, outcome, heard, found }
    }
}

impl Party for Caller {
    fn step(&mut self, heard: &Heard<'_>, say: &mut [i16]) -> Step {
        if heard.generation.is_some() {
            self.seen.send_modify(|seen| seen.frames += 1);
        }
        self.inner.step(heard, say)
    }

    fn on_event(&mut self, event: &Event) {
        self.inner.on_event(event);
        self.seen.send_modify(|seen| match event {
            Event::Switched(switch) => {
                seen.relay = switch.to;
                seen.switches.push(*switch);
            }
            Event::ResponseStarted { .. } => {
                seen.answers_begun += 1;
                seen.frames = 0;
            }
            Event::Rebound => seen.rebound += 1,
            _ => {}
        });
    }
}

/// A call that is over.
pub(crate) struct Finished {
    pub(crate) report: CallReport,
    pub(crate) outcome: Result<(), CallError>,
    pub(crate) heard: ScriptedOutcome,
    pub(crate) found: Report,
}

impl Finished {
    /// Every word came back and nothing else.
    pub(crate) fn assert_complete(&self) {
        assert!(self.outcome.is_ok(), "{:?}", self.outcome);
        let problems: Vec<_> = self.found.all_problems().map(ToString::to_string).collect();
        assert!(self.found.passed(), "{problems:?}, {:?}", self.report);
        assert_eq!(self.heard.unanswered, 0);
    }
}

/// Waits for a condition on something watched.
pub(crate) async fn until<T>(watched: &mut watch::Receiver<T>, condition: impl FnMut(&T) -> bool) {
    tokio::time::timeout(PATIENCE, watched.wait_for(condition)).await.expect("in time").expect("still running");
}

/// Polls a condition that only asking can tell.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::task::yield_now().await;
    }
}

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A receipt takes 1.1 s. Its digits are a measure, not speech: a gap within one cannot be concealed.
pub(crate) const RECEIPT_FRAMES: usize = 70;
