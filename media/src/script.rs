//! What a caller says in a call of several turns, and the codes that make each turn unmistakable.
//!
//! Turn k is to be said when the answer to turn k − 1 has been heard. Each turn is four DTMF digits of 120 ms (the
//! code), 50 ms apart, 150 ms of pause, then speech.

use std::time::Duration;

use crate::receipt;
use crate::resample::{self, ResampleError};
use crate::{dtmf, speech};

/// One turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScriptTurn {
    /// The code that it begins with.
    pub code: u16,
    /// Code and speech, at the script's rate.
    pub pcm: Vec<i16>,
}

/// A caller's part of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// Samples per second.
    pub rate: u32,
    /// In the order they are said.
    pub turns: Vec<ScriptTurn>,
}

impl Script {
    /// A script of one turn per utterance, with codes that follow from `seed`. PCM is at `rate`.
    pub fn new<'a>(seed: u64, rate: u32, utterances: impl IntoIterator<Item = &'a [i16]>) -> Self {
        let mut state = seed;
        let turns = utterances
            .into_iter()
            .map(|words| {
                let code = next_code(&mut state);
                ScriptTurn { code, pcm: with_code(code, words, rate) }
            })
            .collect();
        Self { rate, turns }
    }

    /// A script of `turns` bundled utterances, different ones for different seeds.
    pub fn bundled(seed: u64, rate: u32, turns: usize) -> Result<Self, ResampleError> {
        let first = seed as usize % speech::Utterance::ALL.len();
        let words = speech::Utterance::ALL.iter().cycle().skip(first).take(turns);
        let words: Vec<Vec<i16>> =
            words.map(|utterance| resample::convert(&utterance.pcm(), speech::RATE, rate)).collect::<Result<_, _>>()?;
        Ok(Self::new(seed, rate, words.iter().map(Vec::as_slice)))
    }
}

/// A code, a pause, then the words.
pub fn with_code(code: u16, words: &[i16], rate: u32) -> Vec<i16> {
    let samples = |duration: Duration| (duration.as_millis() as usize * rate as usize) / 1000;
    let mut pcm = Vec::with_capacity(words.len() + rate as usize);
    for digit in receipt::code_digits(code) {
        dtmf::generate(digit, DIGIT, rate, &mut pcm);
        pcm.resize(pcm.len() + samples(GAP), 0);
    }
    pcm.resize(pcm.len() + samples(PAUSE - GAP), 0);
    pcm.extend_from_slice(words);
    pcm
}

/// SplitMix64; a code is never 0, which means that there is none.
fn next_code(state: &mut u64) -> u16 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ mixed >> 31) as u16).max(1)
}

const DIGIT: Duration = Duration::from_millis(120);
const GAP: Duration = Duration::from_millis(50);
const PAUSE: Duration = Duration::from_millis(150);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_repeat_by_seed_and_hold_their_codes() {
        let script = Script::bundled(7, 24_000, 3).unwrap();
        assert_eq!(script, Script::bundled(7, 24_000, 3).unwrap());
        assert_ne!(script.turns[0].code, Script::bundled(8, 24_000, 3).unwrap().turns[0].code);
        for turn in &script.turns {
            let digits: Vec<u8> = dtmf::detect(&turn.pcm, 24_000).iter().map(|found| found.digit).collect();
            assert_eq!(digits, receipt::code_digits(turn.code));
        }
    }
}
