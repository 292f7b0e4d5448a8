//! A call of several turns between a scripted caller and an engine, in virtual time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use antiphon_media::codec::EncoderSettings;
use antiphon_media::engine::{EchoEngine, EchoSettings, Engine, PlayoutReport};
use antiphon_media::format::{AudioFormat, FRAME_POSITIONS};
use antiphon_media::resample::FrameResampler;
use antiphon_media::rtp;
use antiphon_media::script::Script;
use antiphon_media::stream::{FrameKind, Receiver, ReceiverStats, Sender, StreamOrigin};
use antiphon_media::turn::{TurnInput, TurnMachine, TurnTaking};
use antiphon_media::vad::{self, Vad, VadSettings};
use antiphon_media::verify::{Report, Said, verify};
use bytes::Bytes;

/// One direction of the network.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network {
    pub(crate) loss_percent: u64,
    pub(crate) jitter_ms: u64,
}

pub(crate) const CLEAN: Network = Network {
    loss_percent: 0,
    jitter_ms: 0,
};

/// What came of a call.
pub(crate) struct Call {
    pub(crate) script: Script,
    pub(crate) recording: Vec<i16>,
    pub(crate) rate: u32,
    /// Sample of the recording at which each turn had been said.
    pub(crate) ended: Vec<usize>,
    pub(crate) uplink: ReceiverStats,
    pub(crate) downlink: ReceiverStats,
}

impl Call {
    pub(crate) fn said(&self) -> Vec<Said<'_>> {
        let turns = self.script.turns.iter().zip(&self.ended);
        turns
            .map(|(turn, &ended)| Said {
                pcm: &turn.pcm,
                code: turn.code,
                ended: Some(ended),
            })
            .collect()
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
        Self {
            network,
            random: seed << 1 | 1,
            under_way: BTreeMap::new(),
            sent: 0,
        }
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
            self.under_way
                .insert((now + 20_000 + jitter, self.sent), datagram);
        }
    }

    fn deliver(&mut self, now: u64, epoch: Instant, receiver: &mut Receiver) {
        while let Some(entry) = self
            .under_way
            .first_entry()
            .filter(|entry| entry.key().0 <= now)
        {
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

    /// 20 ms of a worker's work, as a session does it.
    fn tick(&mut self, tick: u64, now: Instant) -> Option<Bytes> {
        let at = tick * FRAME_POSITIONS;
        let heard = self.receiver.pull(now);
        let speech = self.vad.frame(self.to_vad.frame(heard.pcm)).speech;
        self.turns
            .handle(TurnInput::AgentSpeaking(self.engine.is_speaking()));
        self.turns.handle(TurnInput::Frame { speech, at });
        let events: Vec<_> = std::iter::from_fn(|| self.turns.poll_output()).collect();
        self.engine.hear(heard.pcm, at, &events);
        let Some(answer) = self.engine.next_frame(&mut self.frame) else {
            self.sender.skip();
            return None;
        };
        self.sender.set_generation(Some(answer.generation));
        let datagram = self.sender.push(&self.frame).unwrap();
        if answer.last {
            let report = PlayoutReport {
                generation: answer.generation,
                heard_samples: 1,
                complete: true,
            };
            self.engine.played(report);
        }
        datagram
    }
}

fn sender(format: AudioFormat, seed: u32) -> Sender {
    let origin = StreamOrigin {
        ssrc: seed,
        sequence: 65_000,
        timestamp: u32::MAX - seed,
    };
    Sender::new(format, EncoderSettings::default(), 4, origin).unwrap()
}

/// Says each turn when the answer to the one before has ended.
pub(crate) fn call(
    format: AudioFormat,
    script: Script,
    engine: Box<dyn Engine>,
    network: Network,
    seed: u64,
) -> Call {
    let samples = format.frame_samples();
    let epoch = Instant::now();
    let (mut up, mut down) = (Link::new(network, seed), Link::new(network, seed ^ 0xabcd));
    let mut worker = Worker::new(format, engine);
    let (mut caller_out, mut caller_in) = (sender(format, 1), Receiver::new(format));
    let (mut recording, mut ended) = (Vec::new(), Vec::new());
    let mut turns = script.turns.iter();
    let mut speaking: Option<std::slice::Chunks<'_, i16>> = None;
    let mut quiet_since = 0;
    for tick in 0..50 * 60 {
        let now = tick * 20_000;
        if speaking.is_none()
            && (tick == 25 || !ended.is_empty() && answered(&recording, &ended, tick, quiet_since))
        {
            speaking = match turns.next() {
                Some(turn) => Some(turn.pcm.chunks(samples)),
                None => break,
            };
        }
        let mut frame = vec![0; samples];
        if let Some(words) = speaking.as_mut().and_then(Iterator::next) {
            frame[..words.len()].copy_from_slice(words);
        } else if speaking.take().is_some() {
            ended.push(recording.len());
            quiet_since = tick;
        }
        if let Some(datagram) = caller_out.push(&frame).unwrap() {
            up.send(now, datagram);
        }
        up.deliver(now, epoch, &mut worker.receiver);
        if let Some(datagram) = worker.tick(tick, epoch + Duration::from_micros(now)) {
            down.send(now, datagram);
        }
        down.deliver(now, epoch, &mut caller_in);
        let heard = caller_in.pull(epoch + Duration::from_micros(now));
        if heard.kind != FrameKind::Silence {
            quiet_since = tick;
        }
        recording.extend_from_slice(heard.pcm);
    }
    assert_eq!(ended.len(), script.turns.len(), "every turn was said");
    let rate = format.sample_rate();
    Call {
        recording,
        rate,
        ended,
        uplink: worker.receiver.stats(),
        downlink: caller_in.stats(),
        script,
    }
}

/// Something was heard since the caller ended, and then a second of nothing.
fn answered(recording: &[i16], ended: &[usize], tick: u64, quiet_since: u64) -> bool {
    let since = *ended.last().unwrap();
    tick - quiet_since > 50 && recording[since..].iter().any(|&sample| sample != 0)
}
