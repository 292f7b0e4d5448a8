//! One scripted call from ticket to goodbye, and what its recording proves.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use antiphon_client::{
    CallError, CallHandle, CallReport, ClientKey, ClockSkew, Dial, DialError, Event, Heard, Party, Router, RouterError,
    ScriptedCaller, ScriptedOutcome, SessionRequest, Step,
};
use antiphon_core::id::{Epoch, SessionId};
use antiphon_media::{script::ScriptTurn, verify};
use antiphon_proto::v1::{Codec, Session};
use tokio::sync::oneshot;

use crate::words;

/// What a caller wants.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) agent: String,
    pub(crate) location: Option<(f64, f64)>,
    pub(crate) codec: Codec,
    pub(crate) regions: Vec<String>,
    pub(crate) turns: Vec<ScriptTurn>,
    pub(crate) patience: Duration,
    /// Chosen by the caller, so that the session can be given back whatever happens.
    pub(crate) session: SessionId,
    /// Where to write what QUIC did.
    pub(crate) qlog: Option<PathBuf>,
}

/// Why there was no call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallFailure {
    #[error(transparent)]
    Router(#[from] RouterError),
    #[error(transparent)]
    Ticket(#[from] antiphon_client::TicketError),
    #[error("session {session}: {}", words::refused(error))]
    Dial { session: String, error: DialError },
    #[error("{0}")]
    Key(String),
}

/// A call that came about.
#[derive(Debug)]
pub(crate) struct Called {
    pub(crate) session: Session,
    /// Time to the ticket.
    pub(crate) ticket: Duration,
    /// This machine's clock beside the router's.
    pub(crate) clock: Option<ClockSkew>,
    pub(crate) report: CallReport,
    pub(crate) heard: ScriptedOutcome,
    pub(crate) broken: Option<CallError>,
    /// Turns that were begun.
    pub(crate) begun: usize,
    pub(crate) rate: u32,
}

/// How far a call is; shared with whoever shows it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stage(Arc<AtomicUsize>);

impl Stage {
    /// 0: getting a ticket, 1: connecting, 2 and more: in turn `stage - 1`.
    pub(crate) fn value(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, value: usize) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// Calls, says every turn, listens to every answer, hangs up. `steer` gets the handle of the live call.
pub(crate) async fn call(
    router: &Router,
    wanted: &Wanted,
    stage: &Stage,
    steer: Option<oneshot::Sender<CallHandle>>,
) -> Result<Called, CallFailure> {
    let key = ClientKey::generate().map_err(|e| CallFailure::Key(e.to_string()))?;
    let request = SessionRequest {
        agent: wanted.agent.clone(),
        location: wanted.location,
        client_key: key.public(),
        codec: wanted.codec,
        regions: wanted.regions.clone(),
        max_rtt_ms: 0,
        session: wanted.session,
        epoch: Epoch::FIRST,
    };
    let asked = Instant::now();
    let session = router.create(&request).await?;
    let ticket = asked.elapsed();
    stage.set(1);
    let clock = router.clock_skew();
    let mut dial = Dial::new(&session)?.by_clock_of_router(clock);
    if let Some(path) = wanted.qlog.clone() {
        dial = dial.with_qlog(move |attempt| qlog(&path, attempt));
    }
    let dialed = dial.connect(&key).await;
    let call = dialed.map_err(|error| CallFailure::Dial { session: session.session.clone(), error })?;
    stage.set(2);
    if let Some(steer) = steer {
        // Nobody wants to steer any more: the call goes on by itself.
        let _ = steer.send(call.handle());
    }
    let rate = call.sample_rate();
    let turns = wanted.turns.iter().map(|turn| turn.pcm.clone()).collect();
    let mut caller = Watched { caller: ScriptedCaller::new(turns, rate, wanted.patience), stage };
    let (report, outcome) = call.run(&mut caller).await;
    let begun = caller.caller.progress().0;
    let (heard, broken) = (caller.caller.into_outcome(), outcome.err());
    Ok(Called { session, ticket, clock, report, heard, broken, begun, rate })
}

/// One attempt's qlog. That the first one's can be written is known; a call goes on without the others.
fn qlog(path: &Path, attempt: usize) -> Option<Box<dyn Write + Send + Sync>> {
    let path = if attempt == 0 { path.to_owned() } else { numbered(path, attempt) };
    match File::create(&path) {
        Ok(file) => Some(Box::new(BufWriter::new(file))),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "no qlog");
            None
        }
    }
}

/// `call.sqlog` → `call-1.sqlog`.
fn numbered(path: &Path, attempt: usize) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{attempt}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Shows the script's progress.
struct Watched<'a> {
    caller: ScriptedCaller,
    stage: &'a Stage,
}

impl Party for Watched<'_> {
    fn step(&mut self, heard: &Heard<'_>, say: &mut [i16]) -> Step {
        let step = self.caller.step(heard, say);
        self.stage.set(1 + self.caller.progress().0.max(1));
        step
    }

    fn on_event(&mut self, event: &Event) {
        self.caller.on_event(event);
    }
}

impl Called {
    /// Compares what was heard with what was said.
    pub(crate) fn verify(&self, turns: &[ScriptTurn]) -> verify::Report {
        let ended = self.heard.ended.iter().copied().map(Some).chain(std::iter::repeat(None));
        let said: Vec<_> = turns
            .iter()
            .zip(ended)
            .map(|(turn, ended)| verify::Said { pcm: &turn.pcm, code: turn.code, ended })
            .collect();
        verify::verify(&said, &self.heard.recording, self.rate)
    }

    /// Turns whose answers were waited for to the end.
    pub(crate) fn answered(&self) -> usize {
        let settled = self.heard.answers + self.heard.unanswered;
        if settled < self.begun { self.begun - 1 } else { self.begun }
    }

    /// Downlink packets that never came, as a share of those that should have.
    pub(crate) fn loss(&self) -> f64 {
        let jitter = self.report.received.jitter;
        jitter.lost as f64 / ((jitter.received + jitter.lost).max(1)) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_attempts_have_files_beside_the_first() {
        let of = |path: &str| numbered(Path::new(path), 2).display().to_string();
        assert_eq!(
            [of("/tmp/call.sqlog"), of("call"), of("a.b/c.d.e")],
            ["/tmp/call-2.sqlog", "call-2", "a.b/c.d-2.e"]
        );
    }
}
