//! Finds receipts in a recording: eighteen tones whose lengths the network may have stretched.

use std::ops::Range;

use crate::dtmf::align::{Aligner, Found, Moment, Place, Reading, Slack, Sound, moments, strongest};
use crate::receipt::{DIGITS, Receipt, ReceiptError};

/// A train of tones as long as a receipt.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundReceipt {
    /// Where it is, to about 10 ms.
    pub samples: Range<usize>,
    /// What it says.
    pub receipt: Result<Receipt, ReceiptError>,
    sound: Aligner,
    /// Of the best reading.
    score: f32,
}

impl FoundReceipt {
    /// What it says if it is the receipt of this turn and chain: where packets were lost, several digits may sound like
    /// others, and the check digits find one. `None` if the sound contradicts it: as these digits it has to be
    /// explained nearly as well as by the ones that explain it best. Two clear digits that differ contradict; a chain
    /// of another history differs in nearly all of its eight.
    ///
    /// `owner` is the nonce and epoch of all answers that can be read: if the sound allows it, they gave this one too.
    pub fn as_answer(&self, turn: u8, chain: u32, owner: Option<(u16, u8)>) -> Option<Receipt> {
        if let Ok(receipt) = self.receipt
            && (receipt.turn, receipt.chain) == (turn, chain)
        {
            return Some(receipt);
        }
        let anybody = Receipt { turn, chain, nonce: 0, epoch: 0 };
        let same = owner.map(|(nonce, epoch)| Receipt { nonce, epoch, ..anybody });
        if let Some(same) = same.filter(|same| self.as_digits(&same.digits()).is_some()) {
            return Some(same);
        }
        complete(&self.as_digits(&anybody.digits()[..KNOWN])?, KNOWN).ok()
    }

    /// The best reading that begins with these digits, if it is nearly as good as the best one.
    fn as_digits(&self, digits: &[u8]) -> Option<Vec<Found>> {
        let mut places = [ANY; DIGITS];
        for (place, &digit) in places.iter_mut().zip(digits) {
            place.sound = Sound::Digit(digit);
        }
        let reading = self.sound.read(&places, SLACK)?;
        (self.score - reading.score <= MOST_DOUBT).then_some(reading.found)
    }
}

/// All receipts, in order, those that cannot be read too.
pub fn find_receipts(recording: &[i16], rate: u32) -> Vec<FoundReceipt> {
    let hop = (rate / 100) as usize;
    let moments = moments(recording, rate);
    trains(&moments)
        .into_iter()
        .filter_map(|train| {
            let samples = train.start * hop..train.end * hop;
            let sound = Aligner::new(&moments[train]);
            let Reading { found, score } = sound.read(&[ANY; DIGITS], SLACK)?;
            Some(FoundReceipt { samples, receipt: complete(&found, 0), sound, score })
        })
        .collect()
}

/// Runs of tones about as long as a receipt.
fn trains(moments: &[Moment]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, moment) in moments.iter().enumerate() {
        if strongest(moment) < TONE {
            continue;
        }
        match runs.last_mut() {
            Some(run) if index - run.end <= LONGEST_BREAK => run.end = index + 1,
            _ => runs.push(index..index + 1),
        }
    }
    let mut trains: Vec<Range<usize>> = Vec::new();
    for run in runs {
        match trains.last_mut() {
            // Two halves of one whose middle was lost. A whole one is not joined to the words after it.
            Some(train)
                if train.len() < SHORTEST
                    && run.start - train.end <= LONGEST_LOSS
                    && run.end - train.start <= LONGEST =>
            {
                train.end = run.end;
            }
            _ => trains.push(run),
        }
    }
    trains.retain(|train| (SHORTEST..=LONGEST).contains(&train.len()));
    trains
}

/// Reads the digits. If they do not fit as they are, those that were hardly heard are made up from the check digits,
/// but for the first `known` ones: these determine one digit, or two if the others are certain. A wrong guess shows in
/// the chain.
fn complete(found: &[Found], known: usize) -> Result<Receipt, ReceiptError> {
    let mut digits: Vec<u8> = found.iter().map(|found| found.digit).collect();
    let read = Receipt::parse(&digits);
    if read.is_ok() {
        return read;
    }
    // With nothing known a second digit would be a guess among sixteen.
    let (least, most) = if known == 0 { (HARDLY_HEARD, 1) } else { (BARELY_CLEAR, 2) };
    let mut doubtful: Vec<usize> = (known..found.len()).filter(|&place| found[place].explained < least).collect();
    doubtful.sort_by(|&a, &b| found[a].explained.total_cmp(&found[b].explained));
    doubtful.truncate(most);
    let one = doubtful.first().and_then(|&place| corrected(&mut digits, place));
    let two = || {
        let &[first, second] = &doubtful[..] else {
            return None;
        };
        (0..16).find_map(|digit| {
            digits[first] = digit;
            corrected(&mut digits, second)
        })
    };
    one.or_else(two).map_or(read, Ok)
}

/// The receipt with another digit at `place`.
fn corrected(digits: &mut [u8], place: usize) -> Option<Receipt> {
    let heard = digits[place];
    let receipt = (0..16).find_map(|digit| {
        digits[place] = digit;
        Receipt::parse(digits).ok()
    });
    digits[place] = heard;
    receipt
}

/// A digit of 40 to 90 ms; it has 60 when it is made.
const ANY: Place = Place { sound: Sound::Any, shortest: 4, usual: 6, longest: 9 };

/// 30 ms at either end of a train may belong to no digit.
const SLACK: Slack = Slack { before: 3, after: 3, cost: 1.0 };

/// Digits of turn and chain.
const KNOWN: usize = 10;

/// How much worse than the best reading the expected one may be: less than two clear digits of six moments are worth.
const MOST_DOUBT: f32 = 7.0;

/// A moment explained this well is part of a tone.
const TONE: f32 = 0.4;

/// A digit explained worse than this may be another one.
const HARDLY_HEARD: f32 = 0.6;

/// One explained better than this is certain.
const BARELY_CLEAR: f32 = 0.75;

/// Moments without a tone within a train: a whole digit may be lost. The pause before the words is longer.
const LONGEST_BREAK: usize = 9;

/// Moments between two parts of a train, neither of which is one.
const LONGEST_LOSS: usize = 13;

/// Moments of a train.
const SHORTEST: usize = 90;
const LONGEST: usize = 140;
