//! Reads a sequence of tones as a whole: the reading that explains the sound best.
//!
//! Tone by tone, a lost packet makes a digit unreadable or joins it with its neighbour. How many tones there are and how
//! long each is meant to be is known, so the whole sequence is laid over the sound (dynamic programming over where each
//! tone ends), and what its tones explain together decides.

use super::Shares;
use crate::levels;

/// How well each of the sixteen digits, and the lack of any, explains 10 ms, 0..=1.
pub(crate) type Moment = [f32; 17];

/// The lack of any digit.
const NO_TONE: u8 = 16;

/// The sound in steps of 10 ms, each judged by the 20 ms around it.
pub(crate) fn moments(pcm: &[i16], rate: u32) -> Vec<Moment> {
    let hop = (rate / 100) as usize;
    (0..pcm.len() / hop)
        .map(|index| {
            let begin = (index * hop).saturating_sub(hop / 2);
            let window = &pcm[begin..(begin + 2 * hop).min(pcm.len())];
            let mut moment = [0.0; 17];
            if !levels::is_silent(window) {
                let shares = Shares::of(window, rate);
                for (digit, share) in (0..NO_TONE).zip(&mut moment) {
                    *share = shares.of_digit(digit);
                }
            }
            moment[usize::from(NO_TONE)] = 1.0 - strongest(&moment);
            moment
        })
        .collect()
}

/// The share of the digit that explains a moment best.
pub(crate) fn strongest(moment: &Moment) -> f32 {
    moment[..usize::from(NO_TONE)].iter().copied().fold(0.0, f32::max)
}

/// What may be at one place of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sound {
    /// Any digit.
    Any,
    /// This digit, 0..=15.
    Digit(u8),
    /// No digit.
    Pause,
}

/// One place of a sequence; lengths in steps of 10 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) sound: Sound,
    pub(crate) shortest: usize,
    pub(crate) usual: usize,
    pub(crate) longest: usize,
}

/// What was found at a place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Found {
    /// 0..=15; 16 for a pause.
    pub(crate) digit: u8,
    /// Mean over its moments of how well it explains them, 0..=1.
    pub(crate) explained: f32,
}

/// A whole reading.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reading {
    /// One per place.
    pub(crate) found: Vec<Found>,
    /// Sum of what is explained, in moments, less the costs of stretching.
    pub(crate) score: f32,
}

/// How many moments before and after the sequence may belong to nothing, and what each of them costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Slack {
    pub(crate) before: usize,
    pub(crate) after: usize,
    pub(crate) cost: f32,
}

/// A sound that can be read as different sequences.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Aligner {
    /// `sums[t]`: of all moments before t.
    sums: Vec<Moment>,
}

impl Aligner {
    pub(crate) fn new(moments: &[Moment]) -> Self {
        let mut sums = vec![[0.0; 17]];
        for moment in moments {
            let before = sums[sums.len() - 1];
            sums.push(std::array::from_fn(|digit| before[digit] + moment[digit]));
        }
        Self { sums }
    }

    /// The best reading as these places, in this order; `None` if the sound is too short or too long for them.
    pub(crate) fn read(&self, places: &[Place], slack: Slack) -> Option<Reading> {
        let end = self.sums.len() - 1;
        // The best score of a reading of the first so many places that ends at a moment, and its last place.
        let mut best = vec![vec![f32::NEG_INFINITY; places.len() + 1]; end + 1];
        let mut chosen = vec![vec![(0_u8, 0_usize); places.len() + 1]; end + 1];
        for (begin, state) in best.iter_mut().enumerate().take(slack.before + 1) {
            state[0] = -(begin as f32) * slack.cost;
        }
        for at in 1..=end {
            for (index, place) in places.iter().enumerate() {
                for length in place.shortest..=place.longest.min(at) {
                    let before = best[at - length][index];
                    if before == f32::NEG_INFINITY {
                        continue;
                    }
                    let (digit, explained) = self.explanation(at - length, at, place.sound);
                    let score = before + explained - STRETCH_COST * length.abs_diff(place.usual) as f32;
                    if score > best[at][index + 1] {
                        best[at][index + 1] = score;
                        chosen[at][index + 1] = (digit, length);
                    }
                }
            }
        }
        let score = |at: usize| best[at][places.len()] - (end - at) as f32 * slack.cost;
        let last = (end.saturating_sub(slack.after)..=end).max_by(|&a, &b| score(a).total_cmp(&score(b)))?;
        if !score(last).is_finite() {
            return None;
        }
        let mut found = Vec::with_capacity(places.len());
        let mut at = last;
        for index in (1..=places.len()).rev() {
            let (digit, length) = chosen[at][index];
            let explained = self.of(at - length, at, digit) / length.max(1) as f32;
            found.push(Found { digit, explained });
            at -= length;
        }
        found.reverse();
        Some(Reading { found, score: score(last) })
    }

    fn of(&self, from: usize, to: usize, digit: u8) -> f32 {
        self.sums[to][usize::from(digit)] - self.sums[from][usize::from(digit)]
    }

    fn explanation(&self, from: usize, to: usize, sound: Sound) -> (u8, f32) {
        let as_digit = |digit: u8| (digit, self.of(from, to, digit));
        match sound {
            Sound::Digit(digit) => as_digit(digit),
            Sound::Pause => as_digit(NO_TONE),
            Sound::Any => {
                let first = as_digit(0);
                (1..NO_TONE).map(as_digit).fold(first, |best, next| if next.1 > best.1 { next } else { best })
            }
        }
    }
}

/// What 10 ms more or less than usual must be worth.
const STRETCH_COST: f32 = 0.3;
