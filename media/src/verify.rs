//! What a recording proves, by sound alone.
//!
//! [`verify`] takes what a caller said, turn by turn, and what came back. For each turn it looks for the receipt,
//! compares its chain with the codes that were said, and compares the words after it with the caller's own. No
//! counter and no log is believed.
//!
//! Words are compared as log spectrograms (20 mel bands, 10 ms), in segments of 300 ms, each of which may lie up to
//! 80 ms from where its predecessor was found: concealed packets and changes of a jitter buffer's delay stretch and
//! shrink time. A segment's score is the correlation of the two patches, 1 for equal ones.

mod features;
mod receipts;
mod words;

use std::ops::Range;
use std::time::Duration;

pub use receipts::{FoundReceipt, find_receipts};
pub use words::{LEAST_SEGMENT, LEAST_SIMILARITY, WordsFound, compare_words};

use crate::levels;
use crate::receipt::{self, Receipt, ReceiptError};

/// One turn of the caller, as it was sent.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    /// Code and words, at the recording's rate.
    pub pcm: &'a [i16],
    /// The code in it; 0: none.
    pub code: u16,
    /// Sample of the recording at which the caller had ended, if the two share a clock.
    pub ended: Option<usize>,
}

/// What was found about the answer to one turn.
#[derive(Debug, Clone, PartialEq)]
pub struct TurnReport {
    /// Counted from 1.
    pub turn: u32,
    /// The receipt before the answer.
    pub receipt: Option<Receipt>,
    /// What its chain has to be.
    pub expected_chain: u32,
    /// Samples of the recording that hold receipt and words.
    pub answer: Option<Range<usize>>,
    /// Mean score of the words' segments, −1..=1; 0 without an answer.
    pub similarity: f32,
    /// Lowest score of a segment.
    pub worst_segment: f32,
    /// From the end of the caller's speech to the first sound of the answer.
    pub response_delay: Option<Duration>,
    /// Longest silence within the answer, pauses of the speaker included.
    pub longest_silence: Duration,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
}

/// What was found in the whole recording.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// One per turn that was said.
    pub turns: Vec<TurnReport>,
    /// What belongs to no turn.
    pub problems: Vec<Problem>,
}

/// What is wrong with a recording.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Problem {
    /// No receipt with this turn's number.
    #[error("turn {turn} was not answered")]
    NoAnswer {
        /// Counted from 1.
        turn: u32,
    },
    /// There is a receipt, but its digits cannot be read.
    #[error("a receipt {at:.1?} into the recording cannot be read: {error}")]
    UnreadableReceipt {
        /// Time into the recording.
        at: Duration,
        /// Why.
        error: ReceiptError,
    },
    /// A receipt that answers nothing, or a second answer to the same turn.
    #[error("an answer to turn {turn} that nobody waited for, {at:.1?} into the recording")]
    UnexpectedAnswer {
        /// As the receipt says.
        turn: u8,
        /// Time into the recording.
        at: Duration,
    },
    /// Earlier turns are forgotten, out of order or of another call.
    #[error("the answer to turn {turn} has chain {found:08x}, the codes said make {expected:08x}")]
    Chain {
        /// Counted from 1.
        turn: u32,
        /// Of the receipt.
        found: u32,
        /// Of the codes.
        expected: u32,
    },
    /// The words are not the caller's.
    #[error(
        "the words of answer {turn} are not those said: similarity {similarity:.2}, at least {LEAST_SIMILARITY:.2} expected"
    )]
    Words {
        /// Counted from 1.
        turn: u32,
        /// Mean score.
        similarity: f32,
    },
    /// Part of the words is missing or damaged.
    #[error("{missing:.1?} of the words of answer {turn} are missing or damaged, from {from:.1?} on")]
    WordsMissing {
        /// Counted from 1.
        turn: u32,
        /// Together.
        missing: Duration,
        /// Time into what was said.
        from: Duration,
    },
    /// Something else is said before or after the words.
    #[error("{duration:.1?} of sound around the words of answer {turn} that nobody said")]
    ExtraSound {
        /// Counted from 1.
        turn: u32,
        /// All of it together, without silence in between.
        duration: Duration,
    },
    /// The answer breaks off for longer than the speaker paused.
    #[error("answer {turn} is silent for {silence:.1?}, the longest pause that was said is {longest_pause:.1?}")]
    Dropout {
        /// Counted from 1.
        turn: u32,
        /// Longest in the answer.
        silence: Duration,
        /// Longest in what was said.
        longest_pause: Duration,
    },
}

impl Report {
    /// Every turn was answered by its own words and the right receipt, and nothing else was heard.
    pub fn passed(&self) -> bool {
        self.all_problems().next().is_none()
    }

    /// All problems, of turns first.
    pub fn all_problems(&self) -> impl Iterator<Item = &Problem> {
        self.turns.iter().flat_map(|turn| &turn.problems).chain(&self.problems)
    }

    /// The processes that answered, in order of their first answer: nonce and epoch.
    pub fn owners(&self) -> Vec<(u16, u8)> {
        let mut owners = Vec::new();
        for receipt in self.turns.iter().filter_map(|turn| turn.receipt) {
            let owner = (receipt.nonce, receipt.epoch);
            if !owners.contains(&owner) {
                owners.push(owner);
            }
        }
        owners
    }

    /// Lowest similarity of a turn; 1 if nothing was said.
    pub fn least_similarity(&self) -> f32 {
        self.turns.iter().map(|turn| turn.similarity).fold(1.0, f32::min)
    }

    /// Longest silence within an answer.
    pub fn longest_silence(&self) -> Duration {
        self.turns.iter().map(|turn| turn.longest_silence).max().unwrap_or_default()
    }
}

/// Compares a recording at `rate` with what was said.
pub fn verify(said: &[Said<'_>], recording: &[i16], rate: u32) -> Report {
    let found = find_receipts(recording, rate);
    // Each answer lasts until the next receipt, readable or not.
    let end = |index: usize| found.get(index + 1).map_or(recording.len(), |next| next.samples.start);
    let owner = only_owner(&found);
    let mut taken = vec![false; found.len()];
    let mut expected_chain = 0;
    let mut turns = Vec::with_capacity(said.len());
    for (number, said) in (1..).zip(said) {
        expected_chain = receipt::chain(expected_chain, said.code);
        let of_turn = |receipt: &Receipt| receipt.turn == number as u8;
        let own = (0..found.len()).filter(|&index| !taken[index]);
        let expected = own.clone().find_map(|index| {
            let receipt = found[index].as_answer(number as u8, expected_chain, owner)?;
            Some((index, receipt))
        });
        let another = || own.clone().find_map(|index| Some((index, found[index].receipt.ok().filter(of_turn)?)));
        let Some((index, heard)) = expected.or_else(another) else {
            turns.push(unanswered(number, expected_chain));
            continue;
        };
        taken[index] = true;
        let samples = &found[index].samples;
        // Its last tones may be lost or damaged.
        let over = samples.end.max(samples.start + self::samples(receipt::DURATION, rate)).min(end(index));
        let answer = Answer { receipt: heard, begin: samples.start, words: over..end(index) };
        turns.push(judge(number, expected_chain, said, &answer, recording, rate));
    }
    let left = found.iter().zip(&taken).filter(|&(_, &taken)| !taken);
    let problems = left.map(|(FoundReceipt { samples, receipt, .. }, _)| {
        let at = time(samples.start, rate);
        match *receipt {
            Ok(receipt) => Problem::UnexpectedAnswer { turn: receipt.turn, at },
            Err(error) => Problem::UnreadableReceipt { at, error },
        }
    });
    Report { turns, problems: problems.collect() }
}

/// Nonce and epoch of the receipts that can be read, if they agree.
fn only_owner(found: &[FoundReceipt]) -> Option<(u16, u8)> {
    let mut owners = found.iter().filter_map(|found| found.receipt.ok()).map(|receipt| (receipt.nonce, receipt.epoch));
    let first = owners.next()?;
    owners.all(|owner| owner == first).then_some(first)
}

struct Answer {
    receipt: Receipt,
    begin: usize,
    /// From the end of the receipt to the next one.
    words: Range<usize>,
}

fn unanswered(turn: u32, expected_chain: u32) -> TurnReport {
    TurnReport {
        turn,
        receipt: None,
        expected_chain,
        answer: None,
        similarity: 0.0,
        worst_segment: 0.0,
        response_delay: None,
        longest_silence: Duration::ZERO,
        problems: vec![Problem::NoAnswer { turn }],
    }
}

fn judge(turn: u32, expected_chain: u32, said: &Said<'_>, heard: &Answer, recording: &[i16], rate: u32) -> TurnReport {
    let mut problems = Vec::new();
    if heard.receipt.chain != expected_chain {
        problems.push(Problem::Chain { turn, found: heard.receipt.chain, expected: expected_chain });
    }
    let span = &recording[heard.words.clone()];
    let spoken = &said.pcm[levels::audible_range(said.pcm, rate)];
    let words = compare_words(spoken, span, rate);
    if words.similarity < LEAST_SIMILARITY {
        problems.push(Problem::Words { turn, similarity: words.similarity });
    } else if let Some(&(from, _)) = words.missing.first() {
        let missing = words.missing.iter().map(|&(_, length)| length).sum();
        problems.push(Problem::WordsMissing { turn, missing, from });
    }
    let end = heard.words.start + words.samples.end;
    let extra = extra_sound(recording, &heard.words, heard.words.start + words.samples.start..end, rate);
    if extra > MOST_EXTRA {
        problems.push(Problem::ExtraSound { turn, duration: extra });
    }
    let (longest_silence, _) = levels::longest_silence(&recording[heard.begin..end], rate);
    let (longest_pause, _) = levels::longest_silence(spoken, rate);
    let longest_pause = longest_pause.max(PAUSE_AFTER_RECEIPT);
    if longest_silence > longest_pause + MOST_DROPOUT {
        problems.push(Problem::Dropout { turn, silence: longest_silence, longest_pause });
    }
    TurnReport {
        turn,
        receipt: Some(heard.receipt),
        expected_chain,
        answer: Some(heard.begin..end),
        similarity: words.similarity,
        worst_segment: words.worst,
        response_delay: said.ended.map(|ended| time(heard.begin.saturating_sub(ended), rate)),
        longest_silence,
        problems,
    }
}

/// What is audible between receipt and words, and between words and the next receipt.
fn extra_sound(recording: &[i16], span: &Range<usize>, words: Range<usize>, rate: u32) -> Duration {
    let margin = samples(EXTRA_MARGIN, rate);
    let before = span.start + margin..words.start.saturating_sub(margin);
    let after = words.end + margin..span.end.saturating_sub(margin);
    [before, after]
        .into_iter()
        .map(|part| levels::audible_duration(recording.get(part).unwrap_or_default(), rate))
        .sum()
}

fn time(samples: usize, rate: u32) -> Duration {
    Duration::from_micros(samples as u64 * 1_000_000 / u64::from(rate.max(1)))
}

fn samples(duration: Duration, rate: u32) -> usize {
    (duration.as_micros() as u64 * u64::from(rate) / 1_000_000) as usize
}

/// Between receipt and words, with the 20 ms that are kept before the first sound.
const PAUSE_AFTER_RECEIPT: Duration = Duration::from_millis(140);

/// Silence beyond the longest pause that was said: the rest of a fading sound may fall below what is audible.
const MOST_DROPOUT: Duration = Duration::from_millis(100);

/// Sound around the words, but for the margins at both ends: codecs and concealment ring on.
const MOST_EXTRA: Duration = Duration::from_millis(60);
const EXTRA_MARGIN: Duration = Duration::from_millis(100);
