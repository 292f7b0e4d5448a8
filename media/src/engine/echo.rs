//! The engine that answers with a receipt and the caller's own words.

use std::collections::VecDeque;
use std::time::Duration;

use super::{AnswerFrame, Engine, PlayoutReport};
use crate::dtmf::{
    self,
    align::{self, Aligner, Place, Slack, Sound},
};
use crate::format::{FRAME_POSITIONS, SESSION_CLOCK};
use crate::levels;
use crate::receipt::{self, Receipt};
use crate::turn::TurnEvent;

/// What distinguishes one echo from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EchoSettings {
    /// Samples per second of all frames, a multiple of 50.
    pub rate: u32,
    /// Random per process.
    pub nonce: u16,
    /// Of the session's owner; receipts carry its low 8 bits.
    pub epoch: u32,
    /// More of a turn is not kept; the rest is dropped and counted.
    pub longest_turn: Duration,
}

impl EchoSettings {
    /// With turns of up to a minute.
    pub fn new(rate: u32, nonce: u16, epoch: u32) -> Self {
        Self { rate, nonce, epoch, longest_turn: Duration::from_secs(60) }
    }
}

/// What the engine remembers of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TurnMemory {
    /// The caller's turn.
    pub turn: u32,
    /// Of the answer.
    pub generation: u32,
    /// The code at its beginning, 0 without one.
    pub code: u16,
    /// Chain up to this turn.
    pub chain: u32,
    /// Length of the answer, session clock.
    pub answer_samples: u64,
    /// Samples of the turn that were too many to keep, at the frames' rate.
    pub dropped_samples: u64,
    /// What the caller heard of the answer so far, if it was reported.
    pub heard: Option<PlayoutReport>,
}

/// Waits for the end of a turn, then says its receipt, pauses for 120 ms and repeats the turn as it was heard.
#[derive(Debug)]
pub struct EchoEngine {
    settings: EchoSettings,
    /// The newest sound, so that a turn does not begin with a cut word.
    recent: VecDeque<i16>,
    /// Of the turn in progress.
    turn: Option<Turn>,
    /// The first is being said.
    responses: VecDeque<Response>,
    generation: u32,
    chain: u32,
    memory: VecDeque<TurnMemory>,
}

#[derive(Debug)]
struct Turn {
    /// Session clock position of the first word sample.
    begin: u64,
    words: Vec<i16>,
    dropped: u64,
}

#[derive(Debug)]
struct Response {
    generation: u32,
    turn: u32,
    pcm: Vec<i16>,
    said: usize,
}

impl EchoEngine {
    /// An engine that has heard nothing.
    pub fn new(settings: EchoSettings) -> Self {
        Self {
            settings,
            recent: VecDeque::with_capacity(settings.samples(RECENT) + settings.samples(RECENT) / 4),
            turn: None,
            responses: VecDeque::new(),
            generation: 0,
            chain: 0,
            memory: VecDeque::new(),
        }
    }

    /// The newest turns, oldest first.
    pub fn memory(&self) -> impl Iterator<Item = &TurnMemory> {
        self.memory.iter()
    }

    fn keep_recent(&mut self, frame: &[i16]) {
        self.recent.extend(frame);
        let excess = self.recent.len().saturating_sub(self.settings.samples(RECENT));
        self.recent.drain(..excess);
    }

    /// `began` is where speech was first noticed; `end` is the end of the newest frame.
    fn begin_turn(&mut self, began: u64, end: u64) {
        let wanted = end.saturating_sub(began) + self.settings.positions(PRE_ROLL);
        let wanted = self.settings.samples_between(wanted).min(self.recent.len());
        let words: Vec<i16> = self.recent.range(self.recent.len() - wanted..).copied().collect();
        let begin = end.saturating_sub(self.settings.positions_of(wanted));
        self.turn = Some(Turn { begin, words, dropped: 0 });
    }

    fn end_turn(&mut self, number: u32, ended: u64) {
        let Some(mut turn) = self.turn.take() else {
            return;
        };
        let length = ended.saturating_sub(turn.begin) + self.settings.positions(POST_ROLL);
        turn.words.truncate(self.settings.samples_between(length));
        let code = opening_code(&turn.words, self.settings.rate);
        self.chain = receipt::chain(self.chain, code);
        self.generation += 1;
        let pcm = self.answer(number, &turn.words);
        let memory = TurnMemory {
            turn: number,
            generation: self.generation,
            code,
            chain: self.chain,
            answer_samples: self.settings.positions_of(pcm.len()),
            dropped_samples: turn.dropped,
            heard: None,
        };
        if self.memory.len() == REMEMBERED_TURNS {
            self.memory.pop_front();
        }
        self.memory.push_back(memory);
        if self.responses.len() > WAITING_RESPONSES {
            // Never the one being said.
            self.responses.remove(1);
        }
        self.responses.push_back(Response { generation: self.generation, turn: number, pcm, said: 0 });
    }

    fn answer(&self, turn: u32, words: &[i16]) -> Vec<i16> {
        let rate = self.settings.rate;
        let receipt = Receipt {
            turn: turn as u8,
            chain: self.chain,
            nonce: self.settings.nonce,
            epoch: self.settings.epoch as u8,
        };
        let words = &words[leading_silence(words, rate)..];
        let pause = self.settings.samples(PAUSE);
        let mut pcm = Vec::with_capacity(self.settings.samples(receipt::DURATION) + pause + words.len());
        for digit in receipt.digits() {
            dtmf::generate(digit, receipt::DIGIT, rate, &mut pcm);
        }
        pcm.resize(pcm.len() + pause, 0);
        pcm.extend_from_slice(words);
        pcm
    }
}

impl Engine for EchoEngine {
    fn hear(&mut self, frame: &[i16], at: u64, events: &[TurnEvent]) {
        self.keep_recent(frame);
        if let Some(turn) = &mut self.turn {
            let room = self.settings.samples(self.settings.longest_turn).saturating_sub(turn.words.len());
            let kept = room.min(frame.len());
            turn.words.extend_from_slice(&frame[..kept]);
            turn.dropped += (frame.len() - kept) as u64;
        }
        for event in events {
            match *event {
                TurnEvent::SpeechStarted { at: began, .. } => self.begin_turn(began, at + FRAME_POSITIONS),
                TurnEvent::SpeechStopped { turn, at } => self.end_turn(turn, at),
                TurnEvent::Interrupted { .. } => self.responses.clear(),
            }
        }
    }

    fn next_frame(&mut self, frame: &mut [i16]) -> Option<AnswerFrame> {
        let response = self.responses.front_mut()?;
        let first = response.said == 0;
        let rest = &response.pcm[response.said..];
        let length = rest.len().min(frame.len());
        frame[..length].copy_from_slice(&rest[..length]);
        frame[length..].fill(0);
        response.said += length;
        let last = response.said == response.pcm.len();
        let answer = AnswerFrame { generation: response.generation, turn: response.turn, first, last };
        if last {
            self.responses.pop_front();
        }
        Some(answer)
    }

    fn is_speaking(&self) -> bool {
        !self.responses.is_empty()
    }

    fn interrupt(&mut self) -> Option<u32> {
        self.responses.clear();
        (self.generation > 0).then_some(self.generation)
    }

    fn played(&mut self, report: PlayoutReport) {
        if let Some(turn) = self.memory.iter_mut().find(|turn| turn.generation == report.generation) {
            turn.heard = Some(report);
        }
    }
}

impl EchoSettings {
    fn samples(self, duration: Duration) -> usize {
        (duration.as_micros() as u64 * u64::from(self.rate) / 1_000_000) as usize
    }

    fn positions(self, duration: Duration) -> u64 {
        duration.as_micros() as u64 * u64::from(SESSION_CLOCK) / 1_000_000
    }

    fn samples_between(self, positions: u64) -> usize {
        (positions * u64::from(self.rate) / u64::from(SESSION_CLOCK)) as usize
    }

    fn positions_of(self, samples: usize) -> u64 {
        samples as u64 * u64::from(SESSION_CLOCK) / u64::from(self.rate)
    }
}

/// A negative control: an echo that forgets all earlier turns. Checks of its recordings have to fail.
#[derive(Debug)]
pub struct ForgetfulEcho(EchoEngine);

impl ForgetfulEcho {
    /// An engine that has heard nothing.
    pub fn new(settings: EchoSettings) -> Self {
        Self(EchoEngine::new(settings))
    }
}

impl Engine for ForgetfulEcho {
    fn hear(&mut self, frame: &[i16], at: u64, events: &[TurnEvent]) {
        self.0.chain = 0;
        self.0.hear(frame, at, events);
    }

    fn next_frame(&mut self, frame: &mut [i16]) -> Option<AnswerFrame> {
        self.0.next_frame(frame)
    }

    fn is_speaking(&self) -> bool {
        self.0.is_speaking()
    }

    fn interrupt(&mut self) -> Option<u32> {
        self.0.interrupt()
    }

    fn played(&mut self, report: PlayoutReport) {
        self.0.played(report);
    }
}

/// The four digits that a turn begins with, or 0.
///
/// Two clear digits say that there is a code. Which one, the sequence as a whole says, read at the pace of
/// [`crate::script`]: where packets were lost a digit may be missing, or look like two.
pub fn opening_code(words: &[i16], rate: u32) -> u16 {
    let samples = |millis: u32| (rate / 1000 * millis) as usize;
    let opening = &words[..words.len().min(samples(2000))];
    let clear = dtmf::detect(opening, rate);
    if clear.iter().filter(|digit| digit.begin <= samples(1400)).count() < 2 {
        return 0;
    }
    let places = [CODE_DIGIT, CODE_GAP, CODE_DIGIT, CODE_GAP, CODE_DIGIT, CODE_GAP, CODE_DIGIT];
    let Some(reading) = Aligner::new(&align::moments(opening, rate)).read(&places, ANYWHERE) else {
        return 0;
    };
    let found = [0, 2, 4, 6].map(|place| reading.found[place]);
    let heard = found.iter().map(|found| found.explained).sum::<f32>() / found.len() as f32;
    if heard < LEAST_HEARD { 0 } else { receipt::code_from_digits(found.map(|found| found.digit)) }
}

/// Samples before the first audible 10 ms, less 20 ms.
fn leading_silence(words: &[i16], rate: u32) -> usize {
    levels::audible_range(words, rate).start.saturating_sub((rate / 50) as usize)
}

/// Sound that is kept from before speech was noticed.
const PRE_ROLL: Duration = Duration::from_millis(300);

/// Sound that is kept from after the last speech.
const POST_ROLL: Duration = Duration::from_millis(100);

/// Between receipt and words.
const PAUSE: Duration = Duration::from_millis(120);

/// Pre-roll and the longest time between the first speech and its being a turn.
const RECENT: Duration = Duration::from_millis(2000);

/// Turns in memory.
const REMEMBERED_TURNS: usize = 64;

/// Answers that wait while another is being said (only if the agent cannot be interrupted).
const WAITING_RESPONSES: usize = 1;

/// A digit of a code is 120 ms long and 50 ms apart from the next; 10 ms a step.
const CODE_DIGIT: Place = Place { sound: Sound::Any, shortest: 7, usual: 12, longest: 17 };
const CODE_GAP: Place = Place { sound: Sound::Pause, shortest: 2, usual: 5, longest: 9 };

/// A code begins within 700 ms and may end any time before the opening does.
const ANYWHERE: Slack = Slack { before: 70, after: 200, cost: 0.0 };

/// Of the four digits' time, how much has to be explained: one of them may be lost.
const LEAST_HEARD: f32 = 0.5;

#[cfg(test)]
mod tests;
