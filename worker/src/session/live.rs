//! A session with an active owner: datagrams, control messages and the 20 ms clock of one conversation.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use antiphon_core::id::RelayNumber;
use antiphon_media::{
    engine::{EchoEngine, EchoSettings, Engine, PlayoutReport},
    stream::StreamOrigin,
    turn::TurnTaking,
};
use antiphon_proto::v1::{
    Activated, ClientMessage, EndCode, Ended, Heartbeat, MoveRelay, ServerMessage,
    client_message::Message as FromClient, server_message::Message as ToClient,
};
use antiphon_quic::{
    AudioReceived, ControlError, ControlReader, ControlWriter, Flow, Heartbeats, datagram, split_flow,
};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use prost::Message as _;
use quinn::Connection;
use tokio::{
    sync::watch,
    time::{Instant, Interval, MissedTickBehavior, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{farewell, watch::PathWatch};
use crate::{
    capacity::Terms,
    conversation::{Conversation, Output, Setup},
    shard::{DrainingRelays, ShardContext, audio_format},
};

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

/// What may happen to a session besides packets and steps.
enum Event {
    Control(ControlReader<ClientMessage>, Result<Option<ClientMessage>, ControlError>),
    End(EndCode),
    Draining(watch::Receiver<DrainingRelays>),
    TakenOver,
    Stopping,
}

/// Each has a waker of its own, so that the hundred packets and steps of a second do not ask them all.
type Seldom = FuturesUnordered<BoxFuture<'static, Event>>;

/// A session with an active owner.
pub(super) struct Live {
    watch: PathWatch,
    context: Arc<ShardContext>,
    terms: Arc<Terms>,
    connection: Connection,
    writer: ControlWriter<ServerMessage>,
    owner: CancellationToken,
    conversation: Conversation,
    beats: Heartbeats,
    began: Instant,
    steps: u64,
    /// The client's path is new, and this is the last it had before.
    lost_after: Option<Option<u16>>,
    /// The draining relay that the client has been told to leave.
    told_to_leave: Option<RelayNumber>,
}

impl Live {
    pub(super) fn begin(
        watch: PathWatch,
        context: Arc<ShardContext>,
        terms: Arc<Terms>,
        connection: Connection,
        writer: ControlWriter<ServerMessage>,
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
            watch,
            context,
            terms,
            connection,
            writer,
            owner,
            conversation,
            beats,
            began,
            steps: 0,
            lost_after: None,
            told_to_leave: None,
        })
    }

    pub(super) async fn run(mut self, reader: ControlReader<ClientMessage>, stopping: CancellationToken) {
        tracing::info!(session = %self.terms.session, epoch = %self.terms.epoch, "session active");
        // The reader in it lives until the last message has been sent: its end would stop the client's stream.
        let mut seldom = self.seldom(reader, stopping);
        let end = match self.greet().await {
            Ok(()) => self.converse(&mut seldom).await,
            Err(end) => end,
        };
        tracing::info!(session = %self.terms.session, ?end, stats = ?self.conversation.stats(), "session over");
        // Whoever took over holds the lease now, also if the end had another cause at the same time.
        let end = if self.owner.is_cancelled() { End::TakenOver } else { end };
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

    /// Everything that may happen besides packets and steps.
    fn seldom(&self, reader: ControlReader<ClientMessage>, stopping: CancellationToken) -> Seldom {
        let (end, owner) = (self.terms.end.subscribe(), self.owner.clone());
        let waiting: [BoxFuture<'static, Event>; 5] = [
            read(reader).boxed(),
            end_code(end).map(Event::End).boxed(),
            changed(self.context.draining_relays.clone()).boxed(),
            async move { owner.cancelled().await }.map(|()| Event::TakenOver).boxed(),
            async move { stopping.cancelled().await }.map(|()| Event::Stopping).boxed(),
        ];
        waiting.into_iter().collect()
    }

    /// Until the session ends, one way or another.
    async fn converse(&mut self, seldom: &mut Seldom) -> End {
        let connection = self.connection.clone();
        let mut steps = frame_ticks(self.context.clock);
        loop {
            let outcome = tokio::select! {
                datagram = connection.read_datagram() => match datagram {
                    Ok(datagram) => {
                        self.on_datagram(&datagram);
                        self.send_again().await;
                        Ok(())
                    }
                    Err(_) => Err(End::Lost),
                },
                due = steps.tick() => self.step(due).await,
                Some(event) = seldom.next() => self.on_event(event, seldom).await,
            };
            if let Err(end) = outcome {
                return end;
            }
        }
    }

    async fn on_event(&mut self, event: Event, seldom: &mut Seldom) -> Result<(), End> {
        match event {
            Event::Control(reader, message) => {
                self.on_control(message)?;
                seldom.push(read(reader).boxed());
                Ok(())
            }
            Event::End(code) => Err(End::Told(code)),
            Event::Draining(mut draining) => {
                let relays = draining.borrow_and_update().clone();
                seldom.push(changed(draining).boxed());
                self.leave_draining_relay(&relays).await
            }
            Event::TakenOver => Err(End::TakenOver),
            Event::Stopping => Err(End::Told(EndCode::WorkerStopping)),
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn on_datagram(&mut self, datagram: &Bytes) {
        let now_us = self.now_us();
        self.watch.on_heard(&self.connection, self.beats.silence(now_us));
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
                    if beat.new_path {
                        let highest = beat.audio_highest.and_then(|n| u16::try_from(n).ok());
                        self.lost_after = Some(highest);
                    }
                }
            }
            None => tracing::trace!(session = %self.terms.session, "datagram of an unknown flow"),
        }
    }

    /// The client is on a new path: what was sent on the old one after this packet may be lost.
    ///
    /// Bounded by what the sender keeps, and congestion control holds for it like for anything else.
    async fn send_again(&mut self) {
        let Some(highest) = self.lost_after.take() else { return };
        for frame in self.conversation.sent_after(highest) {
            self.send(frame);
            // The send buffer holds three frames: each has to leave before the next comes.
            tokio::task::yield_now().await;
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
            // What came meanwhile is still with the connection's drivers: heard late is better than not at all.
            for _ in 0..YIELDS {
                tokio::task::yield_now().await;
            }
        }
        for _ in 0..DATAGRAMS_PER_STEP {
            let Some(Ok(datagram)) = self.connection.read_datagram().now_or_never() else { break };
            self.on_datagram(&datagram);
        }
        self.send_again().await;
        let now_us = self.now_us();
        let silence = self.beats.silence(now_us);
        self.watch.on_step(silence);
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
        let highest = self.conversation.highest();
        let audio = AudioReceived { received: count(jitter.received), lost: count(jitter.lost), highest };
        if let Some(beat) = self.beats.poll(now_us, audio) {
            self.send(datagram::heartbeat(&beat));
        }
        self.steps += 1;
        if self.steps.is_multiple_of(SLOW_STEPS) {
            self.watch.measure(&self.connection, &jitter);
            self.context.capacity.note_rtt(&self.terms, self.connection.rtt());
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
        let Some(relay) = self.watch.relay() else {
            return Ok(());
        };
        let Some(until) = draining.get(&relay).filter(|until| **until > Instant::now()) else {
            return Ok(());
        };
        if self.told_to_leave == Some(relay) {
            return Ok(());
        }
        self.told_to_leave = Some(relay);
        let left = until.duration_since(Instant::now());
        self.watch.on_draining(relay, left);
        let deadline_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
        self.tell(ToClient::MoveRelay(MoveRelay { relay: relay.value().into(), deadline_ms })).await
    }
}

async fn read(mut reader: ControlReader<ClientMessage>) -> Event {
    let message = reader.read().await;
    Event::Control(reader, message)
}

async fn changed(mut draining: watch::Receiver<DrainingRelays>) -> Event {
    match draining.changed().await {
        Ok(()) => Event::Draining(draining),
        Err(_) => Event::Stopping,
    }
}

/// Completes when somebody ends the session from outside.
async fn end_code(mut end: watch::Receiver<Option<EndCode>>) -> EndCode {
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

/// Sessions step in few groups: a step's packets leave together with those of the others in its group.
fn frame_ticks(clock: Instant) -> Interval {
    let now = Instant::now();
    let into_group = now.duration_since(clock).as_nanos() % GROUP.as_nanos();
    let wait = GROUP - Duration::from_nanos(u64::try_from(into_group).unwrap_or_default());
    let mut ticks = tokio::time::interval_at(now + wait, FRAME);
    // The session clock never skips: late frames are made up for at once.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    ticks
}

const FRAME: Duration = Duration::from_millis(20);
/// Five groups of sessions: none waits longer than that for the others in its own.
const GROUP: Duration = Duration::from_millis(4);
const CONTROL_PATIENCE: Duration = Duration::from_secs(1);
/// Silence of the client after which the agent stops speaking, and after which the session is over (invariant I6).
const PAUSE: Duration = Duration::from_secs(3);
const CLIENT_GONE: Duration = Duration::from_secs(10);
/// Once a second.
const SLOW_STEPS: u64 = 50;
/// Datagrams taken at one step at most, so that a flood cannot hold the session clock up.
const DATAGRAMS_PER_STEP: usize = 64;
/// Turns that the drivers of the connection get before a step that comes late.
const YIELDS: usize = 4;
