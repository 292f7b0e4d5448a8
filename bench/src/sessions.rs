//! The audio work of conversations, in virtual time: what a worker does every 20 ms for each session besides QUIC,
//! sockets and timers.

use std::time::Instant;

use antiphon_media::{
    codec::EncoderSettings,
    engine::{EchoEngine, EchoSettings, Engine as _},
    format::{AudioFormat, FRAME, FRAME_POSITIONS},
    resample,
    resample::FrameResampler,
    rtp, script,
    speech::{self, Utterance},
    stream::{Receiver, Sender, StreamOrigin},
    turn::{TurnInput, TurnMachine, TurnTaking},
    vad::{self, Vad, VadSettings},
};
use anyhow::ensure;
use bytes::Bytes;

use crate::{machine::cpu_of_thread, measure::median, report::Row};

/// CPU time of one step, and how many sessions one core could do if there were nothing else.
pub(crate) fn steps() -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, format) in FORMATS {
        let us = microseconds_per_step(name, format)?;
        rows.push(Row::new(format!("sessions-{name}-audio-step"), us, "µs/20 ms"));
        rows.push(Row::new(format!("sessions-{name}-audio-bound"), FRAME.as_micros() as f64 / us, "sessions/core"));
    }
    Ok(rows)
}

fn microseconds_per_step(name: &str, format: AudioFormat) -> anyhow::Result<f64> {
    let [first, second, ..] = Utterance::ALL;
    let packets = caller(format, &[first, second], CYCLE, 2 + CYCLES)?;
    let mut lines = (0..LINES).map(|_| Line::new(format)).collect::<anyhow::Result<Vec<_>>>()?;
    // Lines are spread over the cycle, so that at any time some callers speak and some listen.
    for (index, line) in lines.iter_mut().enumerate() {
        for _ in 0..CYCLE + index * CYCLE / LINES {
            line.step(&packets)?;
        }
    }
    let before: usize = lines.iter().map(|line| line.spoken).sum();
    let mut costs = Vec::new();
    for _ in 0..CYCLES {
        let begin = cpu_of_thread()?;
        for _ in 0..CYCLE {
            for line in &mut lines {
                line.step(&packets)?;
            }
        }
        let spent = cpu_of_thread()? - begin;
        costs.push(spent.as_secs_f64() * 1e6 / (CYCLE * LINES) as f64);
    }
    let spoken = lines.iter().map(|line| line.spoken).sum::<usize>() - before;
    let share = |frames: usize, of: usize| frames as f64 * 100.0 / of as f64;
    let (up, down) = (packets[..CYCLE].iter().flatten().count(), CYCLES * CYCLE * LINES);
    eprintln!("  {name}: packets in {:.0} % of the steps up, {:.0} % down", share(up, CYCLE), share(spoken, down));
    ensure!(spoken > 0, "no line has heard an answer");
    Ok(median(costs))
}

/// The datagrams that a caller sends, frame by frame: a turn, then silence until the answer is over, again and again.
/// `cycle` is in frames.
pub(crate) fn caller(
    format: AudioFormat,
    turn: &[Utterance],
    cycle: usize,
    cycles: usize,
) -> anyhow::Result<Vec<Option<Bytes>>> {
    let rate = format.sample_rate();
    let mut words: Vec<i16> = turn.iter().flat_map(Utterance::pcm).collect();
    if rate != speech::RATE {
        words = resample::convert(&words, speech::RATE, rate)?;
    }
    let mut turn = script::with_code(0x1234, &words, rate);
    let samples = format.frame_samples();
    ensure!(turn.len() < cycle * samples / 2, "the caller speaks for more than half of the time");
    turn.resize(cycle * samples, 0);
    let mut sender = Sender::new(format, EncoderSettings::default(), FLOW, origin(1))?;
    let frames = turn.chunks_exact(samples).cycle().take(cycles * cycle);
    Ok(frames.map(|pcm| sender.push(pcm)).collect::<Result<_, _>>()?)
}

/// One session's audio, in the order in which a worker's conversation steps.
#[derive(Debug)]
struct Line {
    frame: usize,
    now: Instant,
    receiver: Receiver,
    resampler: FrameResampler,
    vad: Vad,
    turns: TurnMachine,
    engine: EchoEngine,
    sender: Sender,
    heard: Vec<i16>,
    answer: Vec<i16>,
    was_speaking: bool,
    spoken: usize,
}

impl Line {
    fn new(format: AudioFormat) -> anyhow::Result<Self> {
        Ok(Self {
            frame: 0,
            now: Instant::now(),
            receiver: Receiver::new(format),
            resampler: FrameResampler::new(format.sample_rate(), vad::RATE)?,
            vad: Vad::new(VadSettings::default()),
            turns: TurnMachine::new(TurnTaking::default()),
            engine: EchoEngine::new(EchoSettings::new(format.sample_rate(), 0xbeef, 1)),
            sender: Sender::new(format, EncoderSettings::default(), FLOW, origin(2))?,
            heard: vec![0; format.frame_samples()],
            answer: vec![0; format.frame_samples()],
            was_speaking: false,
            spoken: 0,
        })
    }

    fn step(&mut self, packets: &[Option<Bytes>]) -> anyhow::Result<()> {
        if let Some(datagram) = packets.get(self.frame).and_then(Option::as_ref) {
            let (_, packet) = rtp::split_flow(datagram)?;
            self.receiver.insert(self.now, &packet)?;
        }
        self.heard.copy_from_slice(self.receiver.pull(self.now).pcm);
        let speech = self.vad.frame(self.resampler.frame(&self.heard)).speech;
        let at = self.frame as u64 * FRAME_POSITIONS;
        self.turns.handle(TurnInput::Frame { speech, at });
        let events: Vec<_> = std::iter::from_fn(|| self.turns.poll_output()).collect();
        self.engine.hear(&self.heard, at, &events);
        match self.engine.next_frame(&mut self.answer) {
            None => self.sender.skip(),
            Some(frame) => {
                self.sender.set_generation(Some(frame.generation));
                self.spoken += usize::from(self.sender.push(&self.answer)?.is_some());
            }
        }
        let speaking = self.engine.is_speaking();
        if speaking != self.was_speaking {
            self.was_speaking = speaking;
            self.turns.handle(TurnInput::AgentSpeaking(speaking));
        }
        self.now += FRAME;
        self.frame += 1;
        Ok(())
    }
}

fn origin(ssrc: u32) -> StreamOrigin {
    StreamOrigin { ssrc, sequence: 65_530, timestamp: u32::MAX - 5000 }
}

pub(crate) const FORMATS: [(&str, AudioFormat); 3] =
    [("opus", AudioFormat::Opus), ("pcm-16k", AudioFormat::L16At16k), ("pcm-24k", AudioFormat::L16At24k)];
/// Sessions that take turns: more than fit the fast caches.
const LINES: usize = 50;
/// 13 s.
const CYCLE: usize = 650;
const CYCLES: usize = 5;
const FLOW: u64 = 0;
