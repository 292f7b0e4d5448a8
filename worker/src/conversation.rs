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
use antiphon_proto::v1::{Flush, ResponseDone, ResponseStarted, SpeechStarted, SpeechStopped, server_message::Message};
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

    /// Highest sequence number of the caller's packets, low 16 bits.
    pub(crate) fn highest(&self) -> Option<u16> {
        self.receiver.highest()
    }

    /// What the agent's side sent after the packet with this sequence number, as datagrams.
    pub(crate) fn sent_after(&self, highest: Option<u16>) -> impl Iterator<Item = Bytes> + use<> {
        self.sender.after(highest)
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
        self.turns.handle(TurnInput::Frame { speech: decision.speech, at });
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
                self.out.push_back(Output::Control(Message::SpeechStarted(SpeechStarted { at, turn })));
            }
            TurnEvent::SpeechStopped { turn, at } => {
                self.stopped_at = Some(SamplePosition::new(at));
                self.out.push_back(Output::Control(Message::SpeechStopped(SpeechStopped { at, turn })));
                self.out.push_back(Output::TurnEnded { turn });
            }
            TurnEvent::Interrupted { turn, .. } => {
                if let Some(generation) = self.engine.interrupt() {
                    self.sender.set_generation(None);
                    self.out.push_back(Output::Control(Message::Flush(Flush { generation })));
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
            let done = ResponseDone { generation: frame.generation, samples: self.answer_samples };
            self.out.push_back(Output::Control(Message::ResponseDone(done)));
            self.sender.set_generation(None);
        }
        Ok(())
    }

    fn begin_answer(&mut self, frame: AnswerFrame) {
        self.answer_samples = 0;
        self.sender.set_generation(Some(frame.generation));
        let started = ResponseStarted { generation: frame.generation, turn: frame.turn };
        self.out.push_back(Output::Control(Message::ResponseStarted(started)));
        if let Some(stopped) = self.stopped_at.take() {
            let delay_samples = self.position - stopped;
            self.out.push_back(Output::AnswerBegan { turn: frame.turn, delay_samples });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use antiphon_media::{
        engine::{EchoEngine, EchoSettings},
        rtp,
        script::Script,
        verify::{Said, verify},
    };

    const FRAME: Duration = Duration::from_millis(20);

    /// A conversation and its caller on one virtual clock, with a seeded network between them.
    struct Line {
        format: AudioFormat,
        conversation: Conversation,
        caller: Sender,
        ears: Receiver,
        now: Instant,
        recording: Vec<i16>,
        events: Vec<Output>,
        seed: u64,
        loss_percent: u64,
    }

    fn origin(seed: u32) -> StreamOrigin {
        StreamOrigin { ssrc: seed, sequence: 65_530, timestamp: u32::MAX - 5_000 }
    }

    impl Line {
        fn new(format: AudioFormat, loss_percent: u64) -> Self {
            let engine = EchoEngine::new(EchoSettings::new(format.sample_rate(), 0xbeef, 1));
            let setup = Setup {
                format,
                flow: 0,
                origin: origin(1),
                turn_taking: TurnTaking::default(),
                engine: Box::new(engine),
            };
            Self {
                format,
                conversation: Conversation::new(setup).unwrap(),
                caller: Sender::new(format, EncoderSettings::default(), 0, origin(2)).unwrap(),
                ears: Receiver::new(format),
                now: Instant::now(),
                recording: Vec::new(),
                events: Vec::new(),
                seed: 7,
                loss_percent,
            }
        }

        fn lost(&mut self) -> bool {
            self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.seed >> 33) % 100 < self.loss_percent
        }

        /// 20 ms: the caller says a frame and hears one.
        fn step(&mut self, say: &[i16], paused: bool) {
            if let Some(datagram) = self.caller.push(say).unwrap()
                && !self.lost()
            {
                let (_, packet) = rtp::split_flow(&datagram).unwrap();
                self.conversation.on_audio(self.now, &packet).unwrap();
            }
            self.conversation.step(self.now, paused).unwrap();
            while let Some(output) = self.conversation.poll_output() {
                match output {
                    Output::Datagram(datagram) if !self.lost() => {
                        let (_, packet) = rtp::split_flow(&datagram).unwrap();
                        self.ears.insert(self.now, &packet).unwrap();
                    }
                    Output::Datagram(_) => {}
                    Output::Control(Message::Flush(ref flush)) => {
                        self.ears.flush(flush.generation);
                        self.events.push(output);
                    }
                    event => self.events.push(event),
                }
            }
            let heard = self.ears.pull(self.now);
            self.recording.extend_from_slice(heard.pcm);
            self.now += FRAME;
        }

        fn say(&mut self, pcm: &[i16]) -> usize {
            let samples = self.format.frame_samples();
            for frame in pcm.chunks(samples) {
                let mut padded = frame.to_vec();
                padded.resize(samples, 0);
                self.step(&padded, false);
            }
            self.recording.len()
        }

        fn listen(&mut self, frames: usize) {
            let silence = vec![0; self.format.frame_samples()];
            for _ in 0..frames {
                self.step(&silence, false);
            }
        }

        fn saw(&self, wanted: impl Fn(&Output) -> bool) -> usize {
            self.events.iter().filter(|event| wanted(event)).count()
        }
    }

    fn two_turns_come_back(format: AudioFormat, loss_percent: u64) {
        let mut line = Line::new(format, loss_percent);
        let script = Script::bundled(3, format.sample_rate(), 2).unwrap();
        let mut ended = Vec::new();
        for turn in &script.turns {
            ended.push(line.say(&turn.pcm));
            line.listen(50 * 8);
        }
        let said: Vec<_> = script
            .turns
            .iter()
            .zip(&ended)
            .map(|(turn, ended)| Said { pcm: &turn.pcm, code: turn.code, ended: Some(*ended) })
            .collect();
        let report = verify(&said, &line.recording, format.sample_rate());
        assert!(report.passed(), "{format:?}: {:?}", report.all_problems().collect::<Vec<_>>());
        assert_eq!(line.saw(|e| matches!(e, Output::TurnEnded { .. })), 2);
        assert_eq!(line.saw(|e| matches!(e, Output::Control(Message::ResponseDone(_)))), 2);
    }

    #[test]
    fn every_codec_brings_the_callers_own_words_back() {
        for format in AudioFormat::ALL {
            two_turns_come_back(format, 0);
        }
    }

    #[test]
    fn two_percent_loss_each_way_is_concealed() {
        two_turns_come_back(AudioFormat::Opus, 2);
    }

    #[test]
    fn an_interrupted_answer_stops_within_one_frame() {
        let mut line = Line::new(AudioFormat::Opus, 0);
        let script = Script::bundled(1, 16_000, 2).unwrap();
        line.say(&script.turns[0].pcm);
        while line.saw(|e| matches!(e, Output::AnswerBegan { .. })) == 0 {
            line.listen(1);
        }
        line.listen(25);
        for frame in script.turns[1].pcm.chunks(320) {
            if line.saw(|e| matches!(e, Output::Interrupted { .. })) > 0 {
                break;
            }
            let mut frame = frame.to_vec();
            frame.resize(320, 0);
            line.step(&frame, false);
        }
        let flush = line.events.iter().position(|e| matches!(e, Output::Control(Message::Flush(_))));
        assert!(flush.is_some(), "{:?}", line.events);
        line.listen(1);
        let last = line.recording.len() - 320;
        line.listen(10);
        assert!(line.recording[last..].iter().all(|sample| sample.abs() < 200), "silent after one frame");
        assert_eq!(line.saw(|e| matches!(e, Output::Control(Message::ResponseDone(_)))), 0);
    }

    #[test]
    fn a_paused_agent_says_nothing_and_goes_on_where_it_was() {
        let mut line = Line::new(AudioFormat::L16At16k, 0);
        let script = Script::bundled(2, 16_000, 1).unwrap();
        let ended = line.say(&script.turns[0].pcm);
        let silence = vec![0; 320];
        for _ in 0..200 {
            line.step(&silence, true);
        }
        assert_eq!(line.saw(|e| matches!(e, Output::AnswerBegan { .. })), 0);
        line.listen(400);
        let said = [Said { pcm: &script.turns[0].pcm, code: script.turns[0].code, ended: Some(ended) }];
        let report = verify(&said, &line.recording, 16_000);
        assert!(report.passed(), "{:?}", report.all_problems().collect::<Vec<_>>());
    }

    #[test]
    fn a_packet_of_another_codec_is_refused_and_changes_nothing() {
        let mut line = Line::new(AudioFormat::Opus, 0);
        let mut other = Sender::new(AudioFormat::L16At16k, EncoderSettings::default(), 0, origin(3)).unwrap();
        let datagram = other.push(&[1000; 320]).unwrap().unwrap();
        let (_, packet) = rtp::split_flow(&datagram).unwrap();
        assert!(line.conversation.on_audio(line.now, &packet).is_err());
        assert_eq!(line.conversation.stats().jitter.received, 0);
    }
}
