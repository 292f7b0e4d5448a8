//! One conversation without I/O: the caller's packets in, the agent's packets and events out.
//!
//! Everything happens in steps of 20 ms of the session clock: jitter buffer → decoder → voice activity → turns →
//! engine → encoder. The shell ([`crate::session`]) brings the time, the datagrams and the control stream.

use std::{collections::VecDeque, time::Instant};

use antiphon_core::clock::SamplePosition;
use antiphon_media::{
    codec::{EncodeError, EncoderSettings},
    engine::{AnswerFrame, Engine, PlayoutReport},
    format::AudioFormat,
    resample::{FrameResampler, ResampleError},
    rtp::RtpError,
    stream::{FrameKind, Receiver, ReceiverStats, Sender, StreamOrigin},
    turn::{TurnEvent, TurnInput, TurnMachine, TurnTaking},
    vad::{self, Vad, VadSettings},
};
use antiphon_proto::v1::{
    Flush, ResponseDone, ResponseStarted, SpeechStarted, SpeechStopped, server_message::Message,
};
use bytes::Bytes;

/// Why a conversation cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConversationError {
    #[error("audio encoder: {0}")]
    Encode(#[from] EncodeError),
    #[error("resampler: {0}")]
    Resample(#[from] ResampleError),
}

/// What the shell has to carry out, in order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Output {
    /// Send as a QUIC datagram.
    Datagram(Bytes),
    /// Send on the control stream.
    Control(Message),
    /// The caller's turn is over.
    TurnEnded { turn: u32 },
    /// The caller spoke while the agent did.
    Interrupted { turn: u32 },
    /// First frame of an answer, this many samples (48 kHz) after the caller's end.
    AnswerBegan { turn: u32, delay_samples: u64 },
    /// A frame of the caller had to be made up.
    Concealed,
}

/// How a conversation is set up.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) format: AudioFormat,
    pub(crate) flow: u64,
    pub(crate) origin: StreamOrigin,
    pub(crate) turn_taking: TurnTaking,
    pub(crate) engine: Box<dyn Engine>,
}

/// One caller and one engine.
#[derive(Debug)]
pub(crate) struct Conversation {
    receiver: Receiver,
    sender: Sender,
    resampler: FrameResampler,
    vad: Vad,
    turns: TurnMachine,
    engine: Box<dyn Engine>,
    position: SamplePosition,
    heard: Vec<i16>,
    answer: Vec<i16>,
    answer_samples: u64,
    stopped_at: Option<SamplePosition>,
    was_speaking: bool,
    events: Vec<TurnEvent>,
    out: VecDeque<Output>,
}

impl Conversation {
    pub(crate) fn new(setup: Setup) -> Result<Self, ConversationError> {
        let format = setup.format;
        let samples = format.frame_samples();
        Ok(Self {
            receiver: Receiver::new(format),
            sender: Sender::new(format, EncoderSettings::default(), setup.flow, setup.origin)?,
            resampler: FrameResampler::new(format.sample_rate(), vad::RATE)?,
            vad: Vad::new(VadSettings::default()),
            turns: TurnMachine::new(setup.turn_taking),
            engine: setup.engine,
            position: SamplePosition::ZERO,
            heard: vec![0; samples],
            answer: vec![0; samples],
            answer_samples: 0,
            stopped_at: None,
            was_speaking: false,
            events: Vec::new(),
            out: VecDeque::new(),
        })
    }

    /// An RTP packet of the caller arrived. An error says what is wrong with it; nothing else changes then.
    pub(crate) fn on_audio(&mut self, now: Instant, packet: &Bytes) -> Result<(), RtpError> {
        self.receiver.insert(now, packet).map(|_| ())
    }

    /// The client says what the caller really heard.
    pub(crate) fn on_playout(&mut self, report: PlayoutReport) {
        self.engine.played(report);
    }

    /// The next 20 ms. A paused agent listens but says nothing.
    pub(crate) fn step(&mut self, now: Instant, paused: bool) -> Result<(), ConversationError> {
        self.listen(now);
        if !paused {
            self.speak()?;
        }
        let speaking = self.engine.is_speaking();
        if speaking != self.was_speaking {
            self.was_speaking = speaking;
            self.turns.handle(TurnInput::AgentSpeaking(speaking));
        }
        self.position = self.position + SamplePosition::FRAME;
        Ok(())
    }

    /// What the last inputs led to, in order.
    pub(crate) fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// Counts of the caller's stream.
    pub(crate) fn stats(&self) -> ReceiverStats {
        self.receiver.stats()
    }

    fn listen(&mut self, now: Instant) {
        let frame = self.receiver.pull(now);
        self.heard.copy_from_slice(frame.pcm);
        if frame.kind == FrameKind::Concealed {
            self.out.push_back(Output::Concealed);
        }
        let decision = self.vad.frame(self.resampler.frame(&self.heard));
        let at = self.position.samples();
        self.turns.handle(TurnInput::Frame {
            speech: decision.speech,
            at,
        });
        self.events.clear();
        while let Some(event) = self.turns.poll_output() {
            self.events.push(event);
            self.on_turn_event(event);
        }
        self.engine.hear(&self.heard, at, &self.events);
    }

    fn on_turn_event(&mut self, event: TurnEvent) {
        match event {
            TurnEvent::SpeechStarted { turn, at } => {
                self.out
                    .push_back(Output::Control(Message::SpeechStarted(SpeechStarted {
                        at,
                        turn,
                    })));
            }
            TurnEvent::SpeechStopped { turn, at } => {
                self.stopped_at = Some(SamplePosition::new(at));
                self.out
                    .push_back(Output::Control(Message::SpeechStopped(SpeechStopped {
                        at,
                        turn,
                    })));
                self.out.push_back(Output::TurnEnded { turn });
            }
            TurnEvent::Interrupted { turn, .. } => {
                if let Some(generation) = self.engine.interrupt() {
                    self.sender.set_generation(None);
                    self.out
                        .push_back(Output::Control(Message::Flush(Flush { generation })));
                    self.out.push_back(Output::Interrupted { turn });
                }
            }
        }
    }

    fn speak(&mut self) -> Result<(), ConversationError> {
        let Some(frame) = self.engine.next_frame(&mut self.answer) else {
            self.sender.skip();
            return Ok(());
        };
        if frame.first {
            self.begin_answer(frame);
        }
        self.answer_samples += SamplePosition::FRAME;
        if let Some(datagram) = self.sender.push(&self.answer)? {
            self.out.push_back(Output::Datagram(datagram));
        }
        if frame.last {
            let done = ResponseDone {
                generation: frame.generation,
                samples: self.answer_samples,
            };
            self.out
                .push_back(Output::Control(Message::ResponseDone(done)));
            self.sender.set_generation(None);
        }
        Ok(())
    }

    fn begin_answer(&mut self, frame: AnswerFrame) {
        self.answer_samples = 0;
        self.sender.set_generation(Some(frame.generation));
        let started = ResponseStarted {
            generation: frame.generation,
            turn: frame.turn,
        };
        self.out
            .push_back(Output::Control(Message::ResponseStarted(started)));
        if let Some(stopped) = self.stopped_at.take() {
            let delay_samples = self.position - stopped;
            self.out.push_back(Output::AnswerBegan {
                turn: frame.turn,
                delay_samples,
            });
        }
    }
}
