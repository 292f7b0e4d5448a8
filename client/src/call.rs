//! A live call.

mod paths;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use antiphon_media::{
    codec::EncoderSettings,
    stream::{Receiver, Sender, StreamOrigin},
};
use antiphon_proto::v1::{
    ClientMessage, EndCode, Goodbye, Heartbeat, PlayoutReport, Refused, RefusedCode, ServerMessage,
    client_message::Message as ToWorker, server_message::Message as FromWorker,
};
use antiphon_quic::{ControlError, ControlReader, ControlWriter, Flow, Heartbeats, datagram, split_flow};
use bytes::Bytes;
use futures::FutureExt as _;
use prost::Message as _;
use quinn::{Connection, Endpoint};
use tokio::{
    sync::mpsc,
    time::{Interval, MissedTickBehavior, timeout},
};

use crate::{
    dial::{Dial, DialError, Opened},
    party::{Event, Party, Step},
    path::PathSelector,
    playout::Playout,
    report::{CallReport, TurnTiming},
    socket::RelaySocket,
    uplink::Uplink,
};

/// Why a call ended before the party hung up.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nothing has come from the worker through any relay.
    #[error("worker {place} does not answer: silent for {:.1} s through every relay", .silent.as_secs_f64())]
    WorkerSilent {
        /// `region/worker`.
        place: String,
        /// For how long.
        silent: Duration,
    },
    /// The worker ended the session.
    #[error("worker {place} ended the session: {code:?}")]
    Ended {
        /// `region/worker`.
        place: String,
        /// Why.
        code: EndCode,
    },
    /// The QUIC connection broke.
    #[error("connection to worker {place}: {reason}")]
    Connection {
        /// `region/worker`.
        place: String,
        /// What QUIC says.
        reason: quinn::ConnectionError,
    },
    /// The control stream broke.
    #[error("control stream: {0}")]
    Control(#[from] ControlError),
    /// The worker refused the activation.
    #[error("refused by worker {place}: {detail} ({code:?})")]
    Refused {
        /// `region/worker`.
        place: String,
        /// Why, as a closed set.
        code: RefusedCode,
        /// Why, for people.
        detail: String,
    },
    /// The worker did not answer the activation in time.
    #[error("worker {place} did not answer the activation within {ACTIVATION:?}")]
    NoActivation {
        /// `region/worker`.
        place: String,
    },
    /// The audio could not be encoded.
    #[error("audio: {0}")]
    Audio(#[from] antiphon_media::codec::EncodeError),
}

#[derive(Debug, Clone, Copy)]
enum Command {
    Rebind,
    HangUp,
}

/// Steers a running call from elsewhere.
#[derive(Debug, Clone)]
pub struct CallHandle(mpsc::Sender<Command>);

impl CallHandle {
    /// The network changed: go on from a new local address. Ignored when the call is over.
    pub fn rebind(&self) {
        // Full: a rebind is waiting already.
        let _ = self.0.try_send(Command::Rebind);
    }

    /// Ends the call as the party would.
    pub fn hang_up(&self) {
        let _ = self.0.try_send(Command::HangUp);
    }
}

/// An active session on a live connection.
#[derive(Debug)]
pub struct Call {
    dial: Dial,
    endpoint: Endpoint,
    socket: Arc<RelaySocket>,
    connection: Connection,
    writer: ControlWriter<ClientMessage>,
    reader: ControlReader<ServerMessage>,
    receiver: Receiver,
    sender: Sender,
    path: PathSelector,
    playout: Playout,
    beats: Heartbeats,
    uplink: Uplink,
    started: Instant,
    last_heard: Duration,
    /// The newest heartbeat that the worker says has reached it, by our clock, since the last step.
    confirmed_us: Option<u64>,
    /// Acknowledgements that QUIC has received.
    acks: u64,
    /// The relays have all been tried since the last sign of life: a new local address is due at the next switch.
    rebind_after: usize,
    commands: (mpsc::Sender<Command>, mpsc::Receiver<Command>),
    /// Until when the worker has to confirm the activation; none: it has.
    unconfirmed: Option<Duration>,
    report: CallReport,
}

impl Call {
    pub(crate) fn new(dial: Dial, opened: Opened, started: Instant, handshake: Duration) -> Result<Self, String> {
        let origin = StreamOrigin { ssrc: rand::random(), sequence: rand::random(), timestamp: rand::random() };
        let flow = Flow::Audio.id().into();
        let sender = Sender::new(dial.format, EncoderSettings::default(), flow, origin).map_err(|e| e.to_string())?;
        let now = started.elapsed();
        let report = CallReport { handshake, attempts: opened.attempts, ..CallReport::default() };
        Ok(Self {
            receiver: Receiver::new(dial.format),
            sender,
            path: PathSelector::new(dial.relays.len(), opened.relay, now),
            playout: Playout::default(),
            beats: Heartbeats::new(micros(now), dial.epoch),
            uplink: Uplink::default(),
            started,
            last_heard: now,
            confirmed_us: None,
            acks: 0,
            rebind_after: dial.relays.len(),
            commands: mpsc::channel(4),
            unconfirmed: Some(now + ACTIVATION),
            report,
            dial,
            endpoint: opened.endpoint,
            socket: opened.socket,
            connection: opened.connection,
            writer: opened.writer,
            reader: opened.reader,
        })
    }

    /// Waits until the worker has confirmed the activation.
    pub(crate) async fn confirmed(&mut self) -> Result<(), DialError> {
        let answer = timeout(ACTIVATION, self.reader.read()).await;
        let answer = answer.map_err(|_| DialError::NoActivation(ACTIVATION))??;
        match answer.and_then(|message| message.message) {
            Some(FromWorker::Activated(_)) => {
                self.on_confirmed();
                Ok(())
            }
            Some(FromWorker::Refused(refused)) => {
                Err(DialError::Refused { code: refused.code(), detail: refused.detail })
            }
            _ => Err(DialError::NoActivation(ACTIVATION)),
        }
    }

    fn on_confirmed(&mut self) {
        self.unconfirmed = None;
        self.report.activated = self.started.elapsed();
    }

    /// For steering the call while it runs.
    #[must_use]
    pub fn handle(&self) -> CallHandle {
        CallHandle(self.commands.0.clone())
    }

    /// Which of the ticket's relays it begins with: the one that answered first.
    #[must_use]
    pub const fn relay(&self) -> usize {
        self.path.active()
    }

    /// PCM samples per second that the party hears and says.
    #[must_use]
    pub const fn sample_rate(&self) -> u32 {
        self.dial.format.sample_rate()
    }

    /// Runs the call until the party hangs up or it breaks. The report is complete either way.
    pub async fn run(mut self, party: &mut dyn Party) -> (CallReport, Result<(), CallError>) {
        let outcome = self.converse(party).await;
        let now = self.started.elapsed();
        if outcome.is_ok() {
            let goodbye = ToWorker::Goodbye(Goodbye { reason: String::new() });
            // A worker that does not take it notices the close.
            let _ = timeout(GOODBYE, self.tell(goodbye)).await;
            self.writer.finish();
            let _ = timeout(GOODBYE, self.writer.delivered()).await;
        }
        self.report.ended = now;
        self.report.rtt = self.connection.rtt();
        self.report.received = self.receiver.stats();
        self.report.sent = self.sender.stats();
        self.report.relay = self.path.active();
        self.connection.close(0_u32.into(), b"");
        let _ = timeout(GOODBYE, self.endpoint.wait_idle()).await;
        (self.report, outcome)
    }

    async fn converse(&mut self, party: &mut dyn Party) -> Result<(), CallError> {
        let mut say = vec![0; self.dial.format.frame_samples()];
        let mut steps = frame_ticks();
        loop {
            let (connection, socket) = (self.connection.clone(), self.socket.clone());
            tokio::select! {
                datagram = connection.read_datagram() => match datagram {
                    Ok(datagram) => self.on_datagram(&datagram),
                    Err(reason) => return Err(self.refused().unwrap_or_else(|| self.lost(reason))),
                },
                due = steps.tick() => {
                    self.catch_up(due).await;
                    if self.step(party, &mut say).await? == Step::HangUp {
                        return Ok(());
                    }
                }
                message = self.reader.read() => match message {
                    Ok(Some(message)) => self.on_control(message, party).await?,
                    Ok(None) => return Err(self.ended(EndCode::Unspecified)),
                    Err(error) => return Err(self.broken(error)),
                },
                () = socket.refused() => self.leave_closed_relay(party).await,
                command = self.commands.1.recv() => match command {
                    Some(Command::Rebind) => self.rebind(party).await,
                    Some(Command::HangUp) | None => return Ok(()),
                },
            }
        }
    }

    /// Takes what has arrived before the next step asks for it.
    async fn catch_up(&mut self, due: tokio::time::Instant) {
        if due.elapsed() > FRAME {
            self.report.late_steps += 1;
            // What came meanwhile is still with the connection's drivers: heard late is better than not at all.
            for _ in 0..YIELDS {
                tokio::task::yield_now().await;
            }
        }
        for _ in 0..DATAGRAMS_PER_STEP {
            let Some(Ok(datagram)) = self.connection.read_datagram().now_or_never() else { break };
            self.on_datagram(&datagram);
        }
    }

    fn on_datagram(&mut self, datagram: &Bytes) {
        let now_us = micros(self.started.elapsed());
        self.beats.on_heard(now_us);
        match split_flow(datagram) {
            Some((Flow::Audio, payload)) => {
                // A packet that cannot be read is a lost one; the receiver counts it.
                let _ = self.receiver.insert(Instant::now(), &datagram.slice_ref(payload));
            }
            Some((Flow::Heartbeat, payload)) => {
                if let Ok(beat) = Heartbeat::decode(payload) {
                    self.beats.on_heartbeat(now_us, &beat);
                    // The other end's claim: only what has been sent can have reached it.
                    let sent = Some(beat.echoed_us).filter(|sent| *sent <= now_us);
                    self.confirmed_us = self.confirmed_us.max(sent);
                    self.on_word(&beat, sent);
                }
            }
            None => {}
        }
    }

    /// 20 ms pass.
    async fn step(&mut self, party: &mut dyn Party, say: &mut [i16]) -> Result<Step, CallError> {
        let now = self.started.elapsed();
        self.watch_path(party, now).await?;
        if self.unconfirmed.is_some_and(|until| until <= now) {
            return Err(CallError::NoActivation { place: self.dial.place.clone() });
        }
        say.fill(0);
        let heard = self.receiver.pull(Instant::now());
        let step = party.step(&heard, say);
        let (answering, finished) = (heard.generation.is_some(), self.playout.on_frame(&heard));
        if answering {
            self.note_answer(now);
        }
        if let Some(datagram) = self.sender.push(say)? {
            self.beats.on_sent(micros(now));
            self.send(datagram);
        }
        let audio = self.audio_received();
        if let Some(beat) = self.beats.poll(micros(now), audio) {
            self.send(datagram::heartbeat(&beat));
        } else if self.is_overdue(now) || self.is_unconfirmed(now) {
            let beat = self.beats.beat(micros(now), audio);
            self.send(datagram::heartbeat(&beat));
        }
        if let Some(report) = finished {
            self.played(report, party).await?;
        }
        Ok(step)
    }

    fn note_answer(&mut self, now: Duration) {
        self.report.first_audio.get_or_insert(now);
        if let Some(turn) = self.report.turns.last_mut() {
            turn.answered.get_or_insert(now);
        }
    }

    async fn played(&mut self, report: PlayoutReport, party: &mut dyn Party) -> Result<(), CallError> {
        let PlayoutReport { generation, complete, .. } = report;
        party.on_event(&Event::ResponsePlayed { generation, complete });
        Ok(self.tell(ToWorker::PlayoutReport(report)).await?)
    }

    fn send(&mut self, datagram: Bytes) {
        let audio = match split_flow(&datagram) {
            // The sequence number (RFC 3550, section 5.1).
            Some((Flow::Audio, [_, _, high, low, ..])) => Some(u16::from_be_bytes([*high, *low])),
            _ => None,
        };
        self.uplink.on_sent(self.started.elapsed(), audio);
        // A broken connection shows when reading.
        let _ = self.connection.send_datagram(datagram);
    }

    async fn tell(&mut self, message: ToWorker) -> Result<(), ControlError> {
        self.writer.write(&ClientMessage { message: Some(message) }).await
    }

    async fn on_control(&mut self, message: ServerMessage, party: &mut dyn Party) -> Result<(), CallError> {
        let now = self.started.elapsed();
        self.beats.on_heard(micros(now));
        match message.message {
            Some(FromWorker::SpeechStarted(m)) => party.on_event(&Event::SpeechStarted { turn: m.turn }),
            Some(FromWorker::SpeechStopped(m)) => {
                self.report.turns.push(TurnTiming { turn: m.turn, stopped: now, answered: None });
                party.on_event(&Event::SpeechStopped { turn: m.turn });
            }
            Some(FromWorker::ResponseStarted(m)) => {
                self.playout.on_started(m.generation);
                party.on_event(&Event::ResponseStarted { generation: m.generation, turn: m.turn });
            }
            Some(FromWorker::ResponseDone(m)) => self.playout.on_done(m.generation, m.samples),
            Some(FromWorker::Flush(m)) => {
                self.receiver.flush(m.generation);
                if let Some(report) = self.playout.on_flush(m.generation) {
                    self.played(report, party).await?;
                }
            }
            Some(FromWorker::MoveRelay(m)) => {
                // All its addresses; the one in use last, so that the others are no choice any more.
                let active = self.path.active();
                let numbers = self.dial.relay_numbers.iter().enumerate();
                let mut of_relay: Vec<_> = numbers.filter(|(_, n)| **n == m.relay).map(|(index, _)| index).collect();
                of_relay.sort_by_key(|index| *index == active);
                for relay in of_relay {
                    if let Some(switch) = self.path.on_draining(relay, now) {
                        self.switch(switch, now, party).await;
                    }
                }
            }
            Some(FromWorker::Ended(m)) => {
                let code = m.code();
                party.on_event(&Event::Ended(code));
                return Err(self.ended(code));
            }
            Some(FromWorker::Activated(_)) if self.unconfirmed.is_some() => self.on_confirmed(),
            Some(FromWorker::Refused(m)) if self.unconfirmed.is_some() => return Err(self.refusal(m)),
            // A newer worker may say more: what is not understood is not acted on.
            Some(FromWorker::Activated(_) | FromWorker::Refused(_)) | None => {}
        }
        Ok(())
    }

    /// The refusal that the connection was closed after, if it was.
    fn refused(&mut self) -> Option<CallError> {
        self.unconfirmed?;
        match self.reader.read().now_or_never()? {
            Ok(Some(ServerMessage { message: Some(FromWorker::Refused(refused)) })) => Some(self.refusal(refused)),
            _ => None,
        }
    }

    fn refusal(&self, refused: Refused) -> CallError {
        CallError::Refused { place: self.dial.place.clone(), code: refused.code(), detail: refused.detail }
    }

    fn ended(&self, code: EndCode) -> CallError {
        CallError::Ended { place: self.dial.place.clone(), code }
    }

    fn lost(&self, reason: quinn::ConnectionError) -> CallError {
        CallError::Connection { place: self.dial.place.clone(), reason }
    }

    fn broken(&self, error: ControlError) -> CallError {
        match self.connection.close_reason() {
            Some(reason) => self.lost(reason),
            None => CallError::Control(error),
        }
    }
}

fn micros(since: Duration) -> u64 {
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn frame_ticks() -> Interval {
    let mut ticks = tokio::time::interval(FRAME);
    // The playout clock never skips: late frames are played at once.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    ticks
}

const FRAME: Duration = Duration::from_millis(20);
/// From the handshake to the worker's confirmation.
const ACTIVATION: Duration = Duration::from_secs(5);
const GOODBYE: Duration = Duration::from_millis(500);
/// Datagrams taken at one step at most, so that a flood cannot hold the playout clock up.
const DATAGRAMS_PER_STEP: usize = 64;
/// Turns that the drivers of the connection get before a step that comes late.
const YIELDS: usize = 4;
