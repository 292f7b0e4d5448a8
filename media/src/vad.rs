//! Voice activity: does this 20 ms frame hold speech, or a tone that is meant to be heard?

use crate::dtmf;
use crate::levels;

/// Samples per second that the detector hears.
pub const RATE: u32 = 16_000;

/// Samples of a frame of 20 ms.
pub const FRAME_SAMPLES: usize = (RATE / 50) as usize;

/// Samples that the network takes at a time: 16 ms.
const BLOCK: usize = 256;

/// Blocks without any sound after which another one changes nothing in the network: 1.6 s. Who says nothing sends
/// nothing, and most of the time one of two says nothing.
const SETTLED: usize = 100;

/// Probabilities between which the decision stays what it was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VadSettings {
    /// At least this is speech.
    pub on: f32,
    /// Less than this is not.
    pub off: f32,
}

impl Default for VadSettings {
    fn default() -> Self {
        Self { on: 0.5, off: 0.35 }
    }
}

/// What one frame holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VadDecision {
    /// 0..=1.
    pub probability: f32,
    /// With hysteresis.
    pub speech: bool,
}

/// A detector with the history of one stream (about 10 KiB). Speech is found by earshot's network, tones of a
/// keypad by their frequencies; what nobody can hear is never speech.
pub struct Vad {
    network: Box<earshot::Detector>,
    settings: VadSettings,
    /// Samples that do not fill a block yet.
    pending: Vec<i16>,
    probability: f32,
    speech: bool,
    /// Blocks without any sound before the newest one.
    still: usize,
}

impl std::fmt::Debug for Vad {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Vad")
            .field("settings", &self.settings)
            .field("probability", &self.probability)
            .field("speech", &self.speech)
            .finish_non_exhaustive()
    }
}

impl Vad {
    /// A detector that has heard nothing.
    pub fn new(settings: VadSettings) -> Self {
        Self {
            network: earshot::Detector::default_boxed(),
            settings,
            pending: Vec::with_capacity(BLOCK + FRAME_SAMPLES),
            probability: 0.0,
            speech: false,
            still: 0,
        }
    }

    /// Hears 20 ms at 16 kHz. The decision follows the newest whole block of 16 ms.
    pub fn frame(&mut self, pcm: &[i16]) -> VadDecision {
        self.pending.extend_from_slice(pcm);
        let mut highest: Option<f32> = None;
        let whole = self.pending.len() / BLOCK * BLOCK;
        for block in self.pending[..whole].chunks_exact(BLOCK) {
            self.still = if block.iter().all(|sample| *sample == 0) { self.still + 1 } else { 0 };
            if self.still > SETTLED {
                continue;
            }
            let score = self.network.predict_i16(block).clamp(0.0, 1.0);
            highest = Some(highest.map_or(score, |highest| highest.max(score)));
        }
        self.pending.drain(..whole);
        let limit = if self.speech { self.settings.off } else { self.settings.on };
        self.probability = highest.unwrap_or(self.probability);
        if levels::is_silent(pcm) {
            self.probability = 0.0;
        } else if self.probability < limit && dtmf::tone(pcm, RATE).is_some() {
            self.probability = 1.0;
        }
        self.speech = self.probability >= limit;
        VadDecision { probability: self.probability, speech: self.speech }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speech::Utterance;
    use std::time::Duration;

    fn share(pcm: &[i16]) -> f32 {
        let mut vad = Vad::new(VadSettings::default());
        let frames = pcm.chunks_exact(FRAME_SAMPLES);
        let total = frames.len();
        frames.filter(|frame| vad.frame(frame).speech).count() as f32 / total as f32
    }

    #[test]
    fn speech_is_speech() {
        for utterance in Utterance::ALL {
            let share = share(&utterance.pcm());
            assert!(share > 0.6, "{}: {share}", utterance.name);
        }
    }

    #[test]
    fn what_follows_a_long_silence_is_heard_as_if_all_of_it_had_been_listened_to() {
        let words = Utterance::ALL.map(|utterance| utterance.pcm());
        let pauses = [RATE as usize, 2 * RATE as usize, 5 * RATE as usize + 77];
        let mut network = earshot::Detector::default_boxed();
        let mut vad = Vad::new(VadSettings::default());
        let mut all: Vec<i16> = Vec::new();
        for (words, pause) in words.iter().zip(pauses.iter().cycle()) {
            all.resize(all.len() + pause, 0);
            all.extend(words);
        }
        let scores: Vec<f32> =
            all.chunks_exact(BLOCK).map(|block| network.predict_i16(block).clamp(0.0, 1.0)).collect();
        let mut worst = 0.0_f32;
        for (index, frame) in all.chunks_exact(FRAME_SAMPLES).enumerate() {
            let heard = vad.frame(frame);
            let blocks = index * FRAME_SAMPLES / BLOCK..(index + 1) * FRAME_SAMPLES / BLOCK;
            let expected = scores[blocks].iter().copied().reduce(f32::max);
            let expected = expected.filter(|_| !levels::is_silent(frame) && dtmf::tone(frame, RATE).is_none());
            let difference = expected.map_or(0.0, |expected| (heard.probability - expected).abs());
            worst = worst.max(difference);
        }
        assert!(worst < 0.01, "{worst}");
    }

    #[test]
    fn digital_silence_and_faint_hiss_never_are() {
        assert_eq!(share(&[0; 32_000]), 0.0);
        let hiss: Vec<i16> = (0..32_000).map(|i: i32| (i.wrapping_mul(7919) % 41 - 20) as i16).collect();
        assert_eq!(share(&hiss), 0.0);
        // Not even right after speech.
        let mut vad = Vad::new(VadSettings::default());
        for frame in Utterance::ALL[0].pcm().chunks_exact(FRAME_SAMPLES) {
            vad.frame(frame);
        }
        assert!(!vad.frame(&[0; FRAME_SAMPLES]).speech);
    }

    #[test]
    fn tones_of_a_keypad_are_speech() {
        for digit in 0..16 {
            let mut pcm = Vec::new();
            dtmf::generate(digit, Duration::from_millis(400), RATE, &mut pcm);
            assert!(share(&pcm) > 0.9, "{}: {}", dtmf::key(digit), share(&pcm));
        }
    }
}
