//! A session's life on its connection: handshake, activation, conversation, end.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_core::{
    cid::SessionNonce,
    id::{Epoch, RelayNumber, SessionId},
    lease::ActivateError,
};
use antiphon_media::{
    engine::{EchoEngine, EchoSettings, Engine, PlayoutReport},
    stream::StreamOrigin,
    turn::TurnTaking,
};
use antiphon_proto::{
    ticket::{self, TicketError},
    v1::{
        Activate, Activated, ClientMessage, EndCode, Ended, Heartbeat, MoveRelay, Refused, RefusedCode, ServerMessage,
        client_message::Message as FromClient, server_message::Message as ToClient,
    },
};
use antiphon_quic::{
    ControlError, ControlReader, ControlWriter, Flow, Heartbeats, activation_message, datagram, split_flow,
    verify_activation,
};
use bytes::Bytes;
use prost::Message as _;
use quinn::{Connection, ConnectionError, Incoming};
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    capacity::Terms,
    conversation::{Conversation, Output, Setup},
    metrics::ActivationOutcome,
    shard::{DrainingRelays, ShardContext, audio_format},
    socket::path_relay,
};

/// Serves one connection attempt to its end. Never fails: whatever a client does concerns its session only.
pub(crate) async fn serve(
    context: Arc<ShardContext>,
    incoming: Incoming,
    stopping: CancellationToken,
) -> anyhow::Result<()> {
    let found = context.gate.lock().attempt(&incoming.orig_dst_cid());
    let found = found.and_then(|(nonce, attempt)| Some((nonce, context.capacity.terms(attempt)?)));
    let Some((nonce, terms)) = found else {
        // The lease ended between the gate and here.
        incoming.ignore();
        return Ok(());
    };
    if let Err(reason) = attend(&context, &terms, incoming, stopping).await {
        tracing::debug!(session = %terms.session, "connection: {reason}");
    }
    // One attempt, one connection: what is replayed after this stops at the gate.
    context.gate.lock().forget([nonce] as [SessionNonce; 1]);
    Ok(())
}

/// Why a connection ended before its session began.
#[derive(Debug, thiserror::Error)]
enum AttendError {
    #[error("handshake: {0}")]
    Handshake(#[from] ConnectionError),
    #[error("no handshake or activation within {0:?}")]
    TooSlow(Duration),
    #[error("control stream: {0}")]
    Control(#[from] ControlError),
    #[error("control stream ended before an activation")]
    NoActivation,
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    #[error("setting up: {0}")]
    Setup(String),
}

async fn attend(
    context: &Arc<ShardContext>,
    terms: &Arc<Terms>,
    incoming: Incoming,
    stopping: CancellationToken,
) -> Result<(), AttendError> {
    let format = audio_format(terms.codec).ok_or_else(|| AttendError::Setup("codec".into()))?;
    let connecting = incoming.accept_with(context.server_configs.of(format))?;
    let too_slow = |_| AttendError::TooSlow(SET_UP);
    let connection = timeout(SET_UP, connecting).await.map_err(too_slow)??;
    let (writer, reader) = timeout(SET_UP, connection.accept_bi()).await.map_err(too_slow)??;
    let (mut writer, mut reader) = (ControlWriter::new(writer), ControlReader::new(reader));
    let first = timeout(SET_UP, reader.read()).await.map_err(too_slow)?;
    let owner = match first.map(|message: Option<ClientMessage>| message.and_then(|m| m.message)) {
        Ok(Some(FromClient::Activate(activate))) => admit(context, terms, &connection, &activate),
        Ok(Some(_)) => Err(Refusal::Malformed("the first message has to be Activate")),
        Ok(None) => {
            context.metrics.activation(ActivationOutcome::NoActivate);
            return Err(AttendError::NoActivation);
        }
        Err(ControlError::Malformed(_) | ControlError::TooLong(_) | ControlError::Truncated) => {
            Err(Refusal::Malformed("the first message cannot be read"))
        }
        Err(error) => return Err(error.into()),
    };
    let owner = match owner {
        Ok(owner) => owner,
        Err(refusal) => {
            context.metrics.activation(ActivationOutcome::Refused(refusal.code()));
            let refused = Refused { code: refusal.code().into(), detail: refusal.to_string() };
            farewell(&connection, &mut writer, ToClient::Refused(refused)).await;
            return Err(refusal.into());
        }
    };
    context.metrics.activation(ActivationOutcome::Activated);
    let live = Live::begin(context.clone(), terms.clone(), connection, writer, reader, owner);
    live.map_err(AttendError::Setup)?.run(stopping).await;
    Ok(())
}

/// Why a client may not own the session.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}")]
    Malformed(&'static str),
    #[error(transparent)]
    Ticket(#[from] TicketError),
    #[error("the ticket belongs to another client key than the one that signed")]
    WrongClient,
    #[error("the ticket is for another worker")]
    WrongWorker,
    #[error(transparent)]
    Lease(#[from] ActivateError),
}

impl Refusal {
    const fn code(&self) -> RefusedCode {
        match self {
            Self::Malformed(_) => RefusedCode::Malformed,
            Self::Ticket(TicketError::Expired { .. }) => RefusedCode::TicketExpired,
            Self::Ticket(_) => RefusedCode::TicketInvalid,
            Self::WrongClient => RefusedCode::WrongClient,
            Self::WrongWorker => RefusedCode::WrongWorker,
            Self::Lease(ActivateError::Gone) => RefusedCode::LeaseGone,
            Self::Lease(ActivateError::Stale { .. }) => RefusedCode::StaleEpoch,
        }
    }
}

/// Checks ticket, possession of the client's key and lease, in that order; makes this connection the owner.
fn admit(
    context: &ShardContext,
    terms: &Terms,
    connection: &Connection,
    activate: &Activate,
) -> Result<CancellationToken, Refusal> {
    let session = <[u8; 16]>::try_from(activate.session.as_ref()).map(SessionId::from_bytes);
    let session = session.map_err(|_| Refusal::Malformed("session: 16 bytes expected"))?;
    let epoch = Epoch::new(activate.epoch).map_err(|_| Refusal::Malformed("epoch"))?;
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let claims = ticket::verify(&activate.ticket, &context.ticket_keys.load(), now_s)?;
    if (claims.session, claims.epoch) != (session, epoch) {
        return Err(Refusal::Malformed("session or epoch differs from the ticket's"));
    }
    if claims.server_id != context.server_id || (session, epoch) != (terms.session, terms.epoch) {
        return Err(Refusal::WrongWorker);
    }
    let message = activation_message(connection, session, epoch).map_err(|_| Refusal::Malformed("no TLS exporter"))?;
    let proven = verify_activation(&claims.client_key, &message, &activate.signature);
    if proven.is_err() || claims.client_key != terms.client_key {
        return Err(Refusal::WrongClient);
    }
    context.capacity.activate(session, epoch)?;
    Ok(terms.take_over())
}

/// Sends a last message and closes once it has arrived, or soon.
async fn farewell(connection: &Connection, writer: &mut ControlWriter<ServerMessage>, last: ToClient) {
    let message = ServerMessage { message: Some(last) };
    let goodbye = async {
        if writer.write(&message).await.is_ok() {
            writer.finish();
            writer.delivered().await;
        }
    };
    // A client that does not acknowledge is gone; its connection is closed all the same.
    let _ = timeout(FAREWELL, goodbye).await;
    connection.close(0_u32.into(), b"");
}

/// Why an active session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// This end says so.
    Told(EndCode),
    /// The client said goodbye.
    Goodbye,
    /// The connection broke.
    Lost,
    /// The same client is back on another connection, which owns the session now.
    TakenOver,
}

/// A session with an active owner.
struct Live {
    context: Arc<ShardContext>,
    terms: Arc<Terms>,
    connection: Connection,
    writer: ControlWriter<ServerMessage>,
    reader: ControlReader<ClientMessage>,
    owner: CancellationToken,
    conversation: Conversation,
    beats: Heartbeats,
    began: Instant,
    steps: u64,
    /// The draining relay that the client has been told to leave.
    told_to_leave: Option<RelayNumber>,
}

impl Live {
    fn begin(
        context: Arc<ShardContext>,
        terms: Arc<Terms>,
        connection: Connection,
        writer: ControlWriter<ServerMessage>,
        reader: ControlReader<ClientMessage>,
        owner: CancellationToken,
    ) -> Result<Self, String> {
        let format = audio_format(terms.codec).ok_or("codec")?;
        let setup = Setup {
            format,
            flow: Flow::Audio.id().into(),
            origin: StreamOrigin { ssrc: rand::random(), sequence: rand::random(), timestamp: rand::random() },
            turn_taking: turn_taking(&terms),
            engine: engine(&context, &terms, format.sample_rate())?,
        };
        let conversation = Conversation::new(setup).map_err(|e| e.to_string())?;
        let beats = Heartbeats::new(0, terms.epoch);
        let began = Instant::now();
        Ok(Self {
            context,
            terms,
            connection,
            writer,
            reader,
            owner,
            conversation,
            beats,
            began,
            steps: 0,
            told_to_leave: None,
        })
    }

    async fn run(mut self, stopping: CancellationToken) {
        tracing::info!(session = %self.terms.session, epoch = %self.terms.epoch, "session active");
        let end = match self.greet().await {
            Ok(()) => self.converse(stopping).await,
            Err(end) => end,
        };
        tracing::info!(session = %self.terms.session, ?end, stats = ?self.conversation.stats(), "session over");
        // Whoever took over holds the lease now.
        if end != End::TakenOver {
            self.context.capacity.ended(&self.terms);
        }
        match end {
            End::Told(code) => {
                let ended = Ended { code: code.into(), detail: String::new() };
                farewell(&self.connection, &mut self.writer, ToClient::Ended(ended)).await;
            }
            End::Goodbye | End::Lost | End::TakenOver => self.connection.close(0_u32.into(), b""),
        }
    }

    async fn greet(&mut self) -> Result<(), End> {
        let heartbeat_interval_ms = u32::try_from(Heartbeats::QUIET.as_millis()).unwrap_or(u32::MAX);
        let activated = Activated {
            codec: self.terms.codec.into(),
            audio_flow: Flow::Audio.id(),
            heartbeat_flow: Flow::Heartbeat.id(),
            heartbeat_interval_ms,
            agent_revision: self.terms.behaviour.revision.clone(),
            longest_session_s: self.terms.behaviour.longest_session_s,
        };
        self.tell(ToClient::Activated(activated)).await
    }

    /// Until the session ends, one way or another.
    async fn converse(&mut self, stopping: CancellationToken) -> End {
        let (mut end, owner) = (self.terms.end.subscribe(), self.owner.clone());
        let mut draining = self.context.draining_relays.clone();
        let mut steps = frame_ticks();
        loop {
            let connection = self.connection.clone();
            let outcome = tokio::select! {
                datagram = connection.read_datagram() => match datagram {
                    Ok(datagram) => { self.on_datagram(&datagram); Ok(()) }
                    Err(_) => Err(End::Lost),
                },
                due = steps.tick() => self.step(due).await,
                message = self.reader.read() => self.on_control(message),
                code = end_code(&mut end) => Err(End::Told(code)),
                changed = draining.changed() => match changed {
                    Ok(()) => {
                        let relays = draining.borrow_and_update().clone();
                        self.leave_draining_relay(&relays).await
                    }
                    Err(_) => Err(End::Told(EndCode::WorkerStopping)),
                },
                () = owner.cancelled() => Err(End::TakenOver),
                () = stopping.cancelled() => Err(End::Told(EndCode::WorkerStopping)),
            };
            if let Err(end) = outcome {
                return end;
            }
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn on_datagram(&mut self, datagram: &Bytes) {
        let now_us = self.now_us();
        self.beats.on_heard(now_us);
        match split_flow(datagram) {
            Some((Flow::Audio, payload)) => {
                let packet = datagram.slice_ref(payload);
                if let Err(error) = self.conversation.on_audio(std::time::Instant::now(), &packet) {
                    tracing::trace!(session = %self.terms.session, %error, "audio packet");
                }
            }
            Some((Flow::Heartbeat, payload)) => {
                if let Ok(beat) = Heartbeat::decode(payload) {
                    self.beats.on_heartbeat(now_us, &beat);
                }
            }
            None => tracing::trace!(session = %self.terms.session, "datagram of an unknown flow"),
        }
    }

    fn on_control(&mut self, message: Result<Option<ClientMessage>, ControlError>) -> Result<(), End> {
        match message {
            Ok(Some(ClientMessage { message: Some(FromClient::PlayoutReport(report)) })) => {
                self.beats.on_heard(self.now_us());
                self.conversation.on_playout(PlayoutReport {
                    generation: report.generation,
                    heard_samples: report.heard_samples,
                    complete: report.complete,
                });
                Ok(())
            }
            // A newer client may say more: what is not understood is not acted on.
            Ok(Some(ClientMessage { message: Some(FromClient::Activate(_)) | None })) => Ok(()),
            Ok(Some(ClientMessage { message: Some(FromClient::Goodbye(_)) }) | None) => Err(End::Goodbye),
            Err(ControlError::Read(_) | ControlError::Write(_)) => Err(End::Lost),
            Err(error) => {
                tracing::debug!(session = %self.terms.session, "control stream: {error}");
                Err(End::Told(EndCode::Internal))
            }
        }
    }

    /// The next 20 ms of the session clock.
    async fn step(&mut self, due: Instant) -> Result<(), End> {
        if due.elapsed() > FRAME {
            self.context.metrics.late_ticks.inc();
        }
        let now_us = self.now_us();
        let silence = self.beats.silence(now_us);
        if silence > CLIENT_GONE {
            return Err(End::Told(EndCode::ClientSilent));
        }
        let longest = self.terms.behaviour.longest_session_s;
        if longest > 0 && self.began.elapsed() > Duration::from_secs(longest.into()) {
            return Err(End::Told(EndCode::LongestSession));
        }
        if let Err(error) = self.conversation.step(std::time::Instant::now(), silence > PAUSE) {
            tracing::error!(session = %self.terms.session, "conversation: {error}");
            return Err(End::Told(EndCode::Internal));
        }
        while let Some(output) = self.conversation.poll_output() {
            self.carry_out(output, now_us).await?;
        }
        let jitter = self.conversation.stats().jitter;
        let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        if let Some(beat) = self.beats.poll(now_us, count(jitter.received), count(jitter.lost)) {
            self.send(datagram::heartbeat(&beat));
        }
        self.steps += 1;
        if self.steps.is_multiple_of(SLOW_STEPS) {
            if let Some(relay) = path_relay(self.connection.remote_address()) {
                self.terms.set_relay(relay.value());
            }
            let draining = self.context.draining_relays.borrow().clone();
            self.leave_draining_relay(&draining).await?;
        }
        Ok(())
    }

    async fn carry_out(&mut self, output: Output, now_us: u64) -> Result<(), End> {
        let (session, metrics) = (self.terms.session, &self.context.metrics);
        match output {
            Output::Datagram(bytes) => {
                self.beats.on_sent(now_us);
                self.send(bytes);
            }
            Output::Control(message) => self.tell(message).await?,
            Output::TurnEnded { turn } => {
                self.terms.turns.store(turn, Ordering::Relaxed);
                metrics.turns.inc();
                tracing::info!(%session, turn, "turn");
            }
            Output::Interrupted { turn } => {
                metrics.interruptions.inc();
                tracing::info!(%session, turn, "interrupted");
            }
            Output::AnswerBegan { turn, delay_samples } => {
                let delay = delay_samples as f64 / 48_000.0;
                metrics.answer_delay.observe(delay);
                tracing::debug!(%session, turn, delay, "answer");
            }
            Output::Concealed => {
                metrics.concealed.inc();
            }
        }
        Ok(())
    }

    fn send(&self, datagram: Bytes) {
        // Lost connections show when reading; a frame that does not fit the path now is lost like any other.
        let _ = self.connection.send_datagram(datagram);
    }

    /// Bounded: a client that does not read its control stream ends its own session only.
    async fn tell(&mut self, message: ToClient) -> Result<(), End> {
        let message = ServerMessage { message: Some(message) };
        match timeout(CONTROL_PATIENCE, self.writer.write(&message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(End::Lost),
        }
    }

    /// Tells the client once to leave a relay that will stop.
    async fn leave_draining_relay(&mut self, draining: &DrainingRelays) -> Result<(), End> {
        let Some(relay) = path_relay(self.connection.remote_address()) else {
            return Ok(());
        };
        let Some(until) = draining.get(&relay).filter(|until| **until > Instant::now()) else {
            return Ok(());
        };
        if self.told_to_leave == Some(relay) {
            return Ok(());
        }
        self.told_to_leave = Some(relay);
        let deadline_ms = u32::try_from(until.duration_since(Instant::now()).as_millis()).unwrap_or(u32::MAX);
        self.tell(ToClient::MoveRelay(MoveRelay { relay: relay.value().into(), deadline_ms })).await
    }
}

/// Completes when somebody ends the session from outside.
async fn end_code(end: &mut watch::Receiver<Option<EndCode>>) -> EndCode {
    end.wait_for(Option::is_some).await.ok().and_then(|code| *code).unwrap_or(EndCode::Internal)
}

fn turn_taking(terms: &Terms) -> TurnTaking {
    let Some(wanted) = &terms.behaviour.turn_taking else {
        return TurnTaking::default();
    };
    let or = |ms: u32, default: Duration| {
        if ms == 0 { default } else { Duration::from_millis(ms.into()) }
    };
    let default = TurnTaking::default();
    TurnTaking {
        end_silence: or(wanted.end_silence_ms, default.end_silence),
        min_speech: or(wanted.min_speech_ms, default.min_speech),
        interruptible: wanted.interruptible,
    }
}

fn engine(context: &ShardContext, terms: &Terms, rate: u32) -> Result<Box<dyn Engine>, String> {
    match terms.behaviour.engine.as_str() {
        "echo" => {
            let settings = EchoSettings::new(rate, context.process_nonce, terms.epoch.value());
            Ok(Box::new(EchoEngine::new(settings)))
        }
        other => Err(format!("engine {other:?} is not built into this worker")),
    }
}

fn frame_ticks() -> Interval {
    let mut ticks = tokio::time::interval(FRAME);
    // The session clock never skips: late frames are made up for at once.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    ticks
}

const FRAME: Duration = Duration::from_millis(20);
/// Longest handshake, and longest wait for the activation after it.
const SET_UP: Duration = Duration::from_secs(10);
/// Longest wait for a last message to arrive.
const FAREWELL: Duration = Duration::from_millis(500);
const CONTROL_PATIENCE: Duration = Duration::from_secs(1);
/// Silence of the client after which the agent stops speaking, and after which the session is over (invariant I6).
const PAUSE: Duration = Duration::from_secs(3);
const CLIENT_GONE: Duration = Duration::from_secs(10);
/// Once a second.
const SLOW_STEPS: u64 = 50;
