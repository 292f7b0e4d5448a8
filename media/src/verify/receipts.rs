//! Finds receipts in a recording: eighteen tones whose lengths the network may have stretched.

use std::ops::Range;

use crate::dtmf::Shares;
use crate::levels;
use crate::receipt::{DIGITS, Receipt, ReceiptError};

/// A train of tones as long as a receipt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundReceipt {
    /// Where it is, to about 10 ms.
    pub samples: Range<usize>,
    /// What it says.
    pub receipt: Result<Receipt, ReceiptError>,
}

/// All receipts, in order, those that cannot be read too.
pub fn find_receipts(recording: &[i16], rate: u32) -> Vec<FoundReceipt> {
    let hop = (rate / 100) as usize;
    let moments = moments(recording, rate);
    trains(&moments)
        .into_iter()
        .map(|train| {
            let digits = best_digits(&moments[train.clone()]);
            FoundReceipt { samples: train.start * hop..train.end * hop, receipt: read(digits) }
        })
        .collect()
}

/// How well each digit explains 10 ms, 0..=1.
type Moment = [f32; 16];

fn moments(recording: &[i16], rate: u32) -> Vec<Moment> {
    let hop = (rate / 100) as usize;
    (0..recording.len() / hop)
        .map(|index| {
            // 20 ms around the moment.
            let begin = (index * hop).saturating_sub(hop / 2);
            let window = &recording[begin..(begin + 2 * hop).min(recording.len())];
            if levels::is_silent(window) {
                return [0.0; 16];
            }
            let shares = Shares::of(window, rate);
            std::array::from_fn(|digit| shares.of_digit(digit as u8))
        })
        .collect()
}

/// Runs of tones about as long as a receipt.
fn trains(moments: &[Moment]) -> Vec<Range<usize>> {
    let mut trains: Vec<Range<usize>> = Vec::new();
    for (index, moment) in moments.iter().enumerate() {
        if moment.iter().copied().fold(0.0, f32::max) < TONE {
            continue;
        }
        match trains.last_mut() {
            Some(train) if index - train.end <= LONGEST_BREAK => train.end = index + 1,
            _ => trains.push(index..index + 1),
        }
    }
    trains.retain(|train| (SHORTEST..=LONGEST).contains(&train.len()));
    trains
}

/// A digit and how well it explains its moments, 0..=1.
type Explained = (u8, f32);

/// Reads the digits. One that was hardly heard is made up from the check digits, if they do not fit as it is: they
/// determine any one digit. A wrong guess shows in the chain.
fn read(explained: [Explained; DIGITS]) -> Result<Receipt, ReceiptError> {
    let mut digits = explained.map(|(digit, _)| digit);
    let read = Receipt::parse(&digits);
    let weakest = (0..DIGITS).min_by(|&a, &b| explained[a].1.total_cmp(&explained[b].1));
    let Some(weakest) = weakest.filter(|&place| explained[place].1 < HARDLY_HEARD && read.is_err()) else {
        return read;
    };
    let corrected = (0..16).find_map(|digit| {
        digits[weakest] = digit;
        Receipt::parse(&digits).ok()
    });
    corrected.map_or(read, Ok)
}

/// The eighteen digits, each of 40 to 90 ms, that explain the train best (dynamic programming over their ends).
fn best_digits(train: &[Moment]) -> [Explained; DIGITS] {
    // sums[t][digit]: of all moments before t.
    let mut sums = vec![[0.0f32; 16]];
    for moment in train {
        let before = sums[sums.len() - 1];
        sums.push(std::array::from_fn(|digit| before[digit] + moment[digit]));
    }
    let end = train.len();
    let mut best = vec![[f32::NEG_INFINITY; DIGITS + 1]; end + 1];
    let mut chosen = vec![[(0u8, 0usize); DIGITS + 1]; end + 1];
    for (begin, state) in best.iter_mut().enumerate().take(MOST_SLACK + 1) {
        state[0] = -(begin as f32);
    }
    for at in 1..=end {
        for place in 1..=DIGITS {
            for length in SHORTEST_DIGIT..=LONGEST_DIGIT.min(at) {
                let from = at - length;
                let before = best[from][place - 1];
                if before == f32::NEG_INFINITY {
                    continue;
                }
                let (digit, explained) = explanation(&sums[from], &sums[at]);
                let score = before + explained - STRETCH_COST * length.abs_diff(USUAL_DIGIT) as f32;
                if score > best[at][place] {
                    best[at][place] = score;
                    chosen[at][place] = (digit, length);
                }
            }
        }
    }
    let last = (end.saturating_sub(MOST_SLACK)..=end)
        .max_by(|&a, &b| {
            let score = |at: usize| best[at][DIGITS] - (end - at) as f32;
            score(a).total_cmp(&score(b))
        })
        .unwrap_or(end);
    let mut digits = [(0, 0.0); DIGITS];
    let mut at = last;
    for place in (1..=DIGITS).rev() {
        let (digit, length) = chosen[at][place];
        let of = |at: usize| sums[at][usize::from(digit)];
        digits[place - 1] = (digit, (of(at) - of(at - length)) / length.max(1) as f32);
        at -= length;
    }
    digits
}

fn explanation(before: &Moment, after: &Moment) -> (u8, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    for digit in 0..16u8 {
        let sum = after[usize::from(digit)] - before[usize::from(digit)];
        if sum > best.1 {
            best = (digit, sum);
        }
    }
    best
}

/// A moment explained this well is part of a tone.
const TONE: f32 = 0.4;

/// A digit explained worse than this may be another one.
const HARDLY_HEARD: f32 = 0.6;

/// Moments without a tone within a train: a whole digit may be lost. The pause before the words is longer.
const LONGEST_BREAK: usize = 9;

/// Moments of a train.
const SHORTEST: usize = 90;
const LONGEST: usize = 140;

/// Moments of a digit; it has 6 when it is made.
const USUAL_DIGIT: usize = 6;
const SHORTEST_DIGIT: usize = 4;
const LONGEST_DIGIT: usize = 9;

/// Moments at either end of a train that belong to no digit.
const MOST_SLACK: usize = 3;

/// What 10 ms more or less than usual must be worth.
const STRETCH_COST: f32 = 0.3;
