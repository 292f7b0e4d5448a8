//! A call of several turns between a scripted caller and an engine, in virtual time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use antiphon_media::codec::EncoderSettings;
use antiphon_media::engine::{EchoEngine, EchoSettings, Engine};
use antiphon_media::format::{AudioFormat, FRAME_POSITIONS};
use antiphon_media::resample::FrameResampler;
use antiphon_media::rtp;
use antiphon_media::script::{Script, ScriptTurn};
use antiphon_media::stream::{FrameKind, Receiver, ReceiverStats, Sender, StreamOrigin};
use antiphon_media::turn::{TurnEvent, TurnInput, TurnMachine, TurnTaking};
use antiphon_media::vad::{self, Vad, VadSettings};
use antiphon_media::verify::{Report, Said, verify};
use bytes::Bytes;

/// One direction of the network.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network {
    pub(crate) loss_percent: u64,
    pub(crate) jitter_ms: u64,
}

pub(crate) const CLEAN: Network = Network { loss_percent: 0, jitter_ms: 0 };

/// When the caller says the next turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manners {
    /// When the answer has ended.
    Waits,
    /// When the answer has been heard for 1.5 s.
    Interrupts,
}

/// What came of a call.
pub(crate) struct Call {
    pub(crate) script: Script,
    pub(crate) recording: Vec<i16>,
    pub(crate) rate: u32,
    /// Sample of the recording at which each turn had been said.
    pub(crate) ended: Vec<usize>,
    /// Samples of the recording at which the worker said to flush.
    pub(crate) flushed: Vec<usize>,
    pub(crate) uplink: ReceiverStats,
    pub(crate) downlink: ReceiverStats,
}

impl Call {
    pub(crate) fn said(&self) -> Vec<Said<'_>> {
        let turns = self.script.turns.iter().zip(&self.ended);
        turns.map(|(turn, &ended)| Said { pcm: &turn.pcm, code: turn.code, ended: Some(ended) }).collect()
    }

    pub(crate) fn report(&self) -> Report {
        verify(&self.said(), &self.recording, self.rate)
    }
}

pub(crate) fn echo(format: AudioFormat) -> EchoEngine {
    EchoEngine::new(EchoSettings::new(format.sample_rate(), 0xbeef, 1))
}

struct Link {
    network: Network,
    random: u64,
    under_way: BTreeMap<(u64, u64), Bytes>,
    sent: u64,
}

impl Link {
    fn new(network: Network, seed: u64) -> Self {
        Self { network, random: seed << 1 | 1, under_way: BTreeMap::new(), sent: 0 }
    }

    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn send(&mut self, now: u64, datagram: Bytes) {
        self.sent += 1;
        if self.draw() % 100 >= self.network.loss_percent {
            let jitter = self.draw() % (self.network.jitter_ms * 1000 + 1);
            self.under_way.insert((now + 20_000 + jitter, self.sent), datagram);
        }
    }

    fn deliver(&mut self, now: u64, epoch: Instant, receiver: &mut Receiver) {
        while let Some(entry) = self.under_way.first_entry().filter(|entry| entry.key().0 <= now) {
            let at = epoch + Duration::from_micros(entry.key().0);
            let (flow, packet) = rtp::split_flow(&entry.remove()).unwrap();
            assert_eq!(flow, 4);
            receiver.insert(at, &packet).unwrap();
        }
    }
}

struct Worker {
    receiver: Receiver,
    to_vad: FrameResampler,
    vad: Vad,
    turns: TurnMachine,
    engine: Box<dyn Engine>,
    sender: Sender,
    frame: Vec<i16>,
}

impl Worker {
    fn new(format: AudioFormat, engine: Box<dyn Engine>) -> Self {
        Self {
            receiver: Receiver::new(format),
            to_vad: FrameResampler::new(format.sample_rate(), vad::RATE).unwrap(),
            vad: Vad::new(VadSettings::default()),
            turns: TurnMachine::new(TurnTaking::default()),
            engine,
            sender: sender(format, 2),
            frame: vec![0; format.frame_samples()],
        }
    }

    /// 20 ms of a worker's work, as a session does it: what to send, what to flush.
    fn tick(&mut self, tick: u64, now: Instant) -> (Option<Bytes>, Option<u32>) {
        let at = tick * FRAME_POSITIONS;
        let heard = self.receiver.pull(now);
        let speech = self.vad.frame(self.to_vad.frame(heard.pcm)).speech;
        self.turns.handle(TurnInput::AgentSpeaking(self.engine.is_speaking()));
        self.turns.handle(TurnInput::Frame { speech, at });
        let events: Vec<_> = std::iter::from_fn(|| self.turns.poll_output()).collect();
        self.engine.hear(heard.pcm, at, &events);
        let interrupted = events.iter().any(|event| matches!(event, TurnEvent::Interrupted { .. }));
        let flush = if interrupted { self.engine.interrupt() } else { None };
        let Some(answer) = self.engine.next_frame(&mut self.frame) else {
            self.sender.skip();
            return (None, flush);
        };
        self.sender.set_generation(Some(answer.generation));
        (self.sender.push(&self.frame).unwrap(), flush)
    }
}

fn sender(format: AudioFormat, seed: u32) -> Sender {
    let origin = StreamOrigin { ssrc: seed, sequence: 65_000, timestamp: u32::MAX - seed };
    Sender::new(format, EncoderSettings::default(), 4, origin).unwrap()
}

/// The caller's end of the line.
struct Caller<'a> {
    manners: Manners,
    turns: std::slice::Iter<'a, ScriptTurn>,
    speaking: Option<std::slice::Chunks<'a, i16>>,
    recording: Vec<i16>,
    ended: Vec<usize>,
    /// Ticks since the last turn was said, and of them with and since sound.
    waited: u64,
    heard: u64,
    quiet: u64,
}

impl Caller<'_> {
    /// The next frame to send; `None` when all is said and answered.
    fn speak(&mut self, samples: usize) -> Option<Vec<i16>> {
        let mut frame = vec![0; samples];
        if self.speaking.is_none() && self.may_speak() {
            self.speaking = Some(self.turns.next()?.pcm.chunks(samples));
        }
        if let Some(words) = self.speaking.as_mut().and_then(Iterator::next) {
            frame[..words.len()].copy_from_slice(words);
            (self.waited, self.heard, self.quiet) = (0, 0, 0);
        } else if self.speaking.take().is_some() {
            self.ended.push(self.recording.len());
        }
        Some(frame)
    }

    fn may_speak(&self) -> bool {
        match self.manners {
            _ if self.ended.is_empty() => self.waited > 25,
            Manners::Interrupts if self.turns.len() > 0 => self.heard > 75,
            Manners::Waits | Manners::Interrupts => self.heard > 0 && self.quiet > 50,
        }
    }

    fn hear(&mut self, pcm: &[i16], kind: FrameKind) {
        self.recording.extend_from_slice(pcm);
        self.waited += 1;
        if kind == FrameKind::Silence {
            self.quiet += 1;
        } else {
            self.heard += 1;
            self.quiet = 0;
        }
    }
}

/// A whole call, of a minute at most.
pub(crate) fn call(
    format: AudioFormat,
    script: Script,
    engine: Box<dyn Engine>,
    (network, manners): (Network, Manners),
    seed: u64,
) -> Call {
    let epoch = Instant::now();
    let (mut up, mut down) = (Link::new(network, seed), Link::new(network, seed ^ 0xabcd));
    let mut worker = Worker::new(format, engine);
    let (mut sender, mut receiver) = (sender(format, 1), Receiver::new(format));
    let mut caller = Caller {
        manners,
        turns: script.turns.iter(),
        speaking: None,
        recording: Vec::new(),
        ended: Vec::new(),
        waited: 0,
        heard: 0,
        quiet: 0,
    };
    let mut flushed = Vec::new();
    for tick in 0..50 * 60 {
        let now = tick * 20_000;
        let Some(frame) = caller.speak(format.frame_samples()) else {
            break;
        };
        if let Some(datagram) = sender.push(&frame).unwrap() {
            up.send(now, datagram);
        }
        up.deliver(now, epoch, &mut worker.receiver);
        let (datagram, flush) = worker.tick(tick, epoch + Duration::from_micros(now));
        if let Some(datagram) = datagram {
            down.send(now, datagram);
        }
        if let Some(generation) = flush {
            flushed.push(caller.recording.len());
            receiver.flush(generation);
        }
        down.deliver(now, epoch, &mut receiver);
        let heard = receiver.pull(epoch + Duration::from_micros(now));
        caller.hear(heard.pcm, heard.kind);
    }
    let Caller { recording, ended, .. } = caller;
    assert_eq!(ended.len(), script.turns.len(), "every turn was said");
    let (uplink, downlink) = (worker.receiver.stats(), receiver.stats());
    Call { recording, rate: format.sample_rate(), ended, flushed, uplink, downlink, script }
}
