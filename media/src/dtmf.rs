//! Dual-tone multi-frequency digits (ITU-T Q.23): sixteen tones, made and found again.
//!
//! A digit is its hexadecimal value: 0 to 9 and A to D are the keys of those names, 14 is `*`, 15 is `#`.

pub(crate) mod align;

use std::time::Duration;

use crate::levels;

/// Low group, one per row of the keypad, in Hz.
const ROWS: [f32; 4] = [697.0, 770.0, 852.0, 941.0];

/// High group, one per column, in Hz.
const COLUMNS: [f32; 4] = [1209.0, 1336.0, 1477.0, 1633.0];

/// Digit at row × 4 + column.
const KEYPAD: [u8; 16] = [1, 2, 3, 10, 4, 5, 6, 11, 7, 8, 9, 12, 14, 0, 15, 13];

/// Amplitude of each of the two sines: together as loud as speech is (RMS −22 dBFS).
const AMPLITUDE: f32 = 2600.0;

/// Rise and fall of a generated tone.
const RAMP: Duration = Duration::from_millis(3);

/// A digit found in a stretch of sound.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tone {
    /// 0..=15.
    pub digit: u8,
    /// Share of the sound's energy in the two frequencies, 0..=1.
    pub purity: f32,
}

/// A digit found in a recording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detection {
    /// 0..=15.
    pub digit: u8,
    /// Sample where it begins, to about 10 ms.
    pub begin: usize,
    /// Sample after its end, to about 10 ms.
    pub end: usize,
}

/// The key's name: `0`..`9`, `A`..`D`, `*`, `#`; other values are `?`.
pub fn key(digit: u8) -> char {
    b"0123456789ABCD*#".get(usize::from(digit)).map_or('?', |&key| char::from(key))
}

/// Appends a tone, as loud as speech. Only the low four bits of `digit` count.
pub fn generate(digit: u8, duration: Duration, rate: u32, out: &mut Vec<i16>) {
    let place = KEYPAD.iter().position(|&key| key == digit & 0x0f).unwrap_or(0);
    let radians = |hertz: f32| std::f32::consts::TAU * hertz / rate as f32;
    let (row, column) = (radians(ROWS[place / 4]), radians(COLUMNS[place % 4]));
    let samples = (duration.as_secs_f32() * rate as f32).round() as usize;
    let ramp = RAMP.as_secs_f32() * rate as f32;
    out.extend((0..samples).map(|i| {
        let edge = i.min(samples - 1 - i) as f32;
        let envelope = (edge / ramp).min(1.0);
        let sines = (i as f32 * row).sin() + (i as f32 * column).sin();
        (sines * envelope * AMPLITUDE) as i16
    }));
}

/// The digit that fills the whole of `pcm` (20 ms at least), if one does.
pub fn tone(pcm: &[i16], rate: u32) -> Option<Tone> {
    if levels::rms(pcm) < LEAST_RMS {
        return None;
    }
    let shares = Shares::of(pcm, rate);
    let (row, row_share) = highest(&shares.rows, DOMINANCE)?;
    let (column, column_share) = highest(&shares.columns, DOMINANCE)?;
    let purity = row_share + column_share;
    let twist = row_share.max(column_share) / row_share.min(column_share).max(f32::MIN_POSITIVE);
    let found = purity >= LEAST_PURITY && twist <= MOST_TWIST;
    found.then(|| Tone { digit: KEYPAD[row * 4 + column], purity: purity.min(1.0) })
}

/// All digits of at least 50 ms, with at least 40 ms of silence between equal ones.
///
/// Up to 40 ms within a digit may be damaged (a concealed packet): sound that is no digit does not end it, silence
/// does.
pub fn detect(pcm: &[i16], rate: u32) -> Vec<Detection> {
    let hop = (rate / 100) as usize;
    let window = 2 * hop;
    let mut found: Vec<Detection> = Vec::new();
    let mut run: Option<Run> = None;
    for begin in (0..pcm.len().saturating_sub(window - 1)).step_by(hop) {
        let part = &pcm[begin..begin + window];
        match (tone(part, rate), &mut run) {
            (Some(tone), Some(run)) if run.digit == tone.digit => run.extend(begin + window),
            (Some(tone), _) => {
                found.extend(run.take().and_then(Run::detection));
                run = Some(Run { digit: tone.digit, windows: 1, damaged: 0, begin, end: begin + window });
            }
            (None, Some(damaged)) if !levels::is_silent(part) && damaged.damaged < MOST_DAMAGED => {
                damaged.damaged += 1;
            }
            (None, _) => found.extend(run.take().and_then(Run::detection)),
        }
    }
    found.extend(run.and_then(Run::detection));
    found
}

/// Windows of the same digit.
#[derive(Debug)]
struct Run {
    digit: u8,
    windows: usize,
    /// Since the last good one.
    damaged: usize,
    begin: usize,
    end: usize,
}

impl Run {
    fn extend(&mut self, end: usize) {
        self.windows += 1;
        self.damaged = 0;
        self.end = end;
    }

    fn detection(self) -> Option<Detection> {
        let Self { digit, begin, end, .. } = self;
        (self.windows >= LEAST_WINDOWS).then_some(Detection { digit, begin, end })
    }
}

/// Shares of a sound's energy at the eight frequencies, 0..=1 each.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shares {
    rows: [f32; 4],
    columns: [f32; 4],
}

impl Shares {
    /// By Goertzel's algorithm, for all frequencies at a time: each step waits for the one before, so that eight side
    /// by side take as long as one.
    pub(crate) fn of(pcm: &[i16], rate: u32) -> Self {
        let energy: f32 = pcm.iter().map(|&sample| f32::from(sample).powi(2)).sum();
        if energy <= 0.0 {
            return Self::default();
        }
        let scale = 2.0 / (pcm.len() as f32 * energy);
        let [r0, r1, r2, r3] = ROWS;
        let [c0, c1, c2, c3] = COLUMNS;
        let found = goertzel(pcm, [r0, r1, r2, r3, c0, c1, c2, c3].map(|hertz| hertz / rate as f32));
        let [r0, r1, r2, r3, c0, c1, c2, c3] = found.map(|magnitude| magnitude * scale);
        Self { rows: [r0, r1, r2, r3], columns: [c0, c1, c2, c3] }
    }

    /// Of both frequencies of a digit, 0..=1.
    pub(crate) fn of_digit(&self, digit: u8) -> f32 {
        let place = KEYPAD.iter().position(|&key| key == digit & 0x0f).unwrap_or(0);
        let (row, column) = (self.rows[place / 4], self.columns[place % 4]);
        // Both have to be there.
        2.0 * row.min(column).min(0.5)
    }
}

/// Squared magnitudes of bins of the Fourier transform; `frequencies` in cycles per sample.
fn goertzel<const BINS: usize>(pcm: &[i16], frequencies: [f32; BINS]) -> [f32; BINS] {
    let coefficients = frequencies.map(|frequency| 2.0 * (std::f32::consts::TAU * frequency).cos());
    let (mut s1, mut s2) = ([0.0_f32; BINS], [0.0_f32; BINS]);
    for &sample in pcm {
        let sample = f32::from(sample);
        for bin in 0..BINS {
            let s = sample + coefficients[bin] * s1[bin] - s2[bin];
            (s2[bin], s1[bin]) = (s1[bin], s);
        }
    }
    std::array::from_fn(|bin| s1[bin] * s1[bin] + s2[bin] * s2[bin] - coefficients[bin] * s1[bin] * s2[bin])
}

/// Index and value of the highest, if it dominates all others.
fn highest(values: &[f32; 4], dominance: f32) -> Option<(usize, f32)> {
    let (index, &value) = values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
    let others = values.iter().enumerate().filter(|&(other, _)| other != index);
    let rival = others.map(|(_, &value)| value).fold(0.0, f32::max);
    (value > rival * dominance).then_some((index, value))
}

/// Quieter sounds are not digits (about −50 dBFS).
const LEAST_RMS: f32 = 100.0;

/// Energy outside the two frequencies makes it speech.
const LEAST_PURITY: f32 = 0.6;

/// Between the two frequencies, as a ratio of energies (9 dB).
const MOST_TWIST: f32 = 8.0;

/// Over the other frequencies of the group (5 dB).
const DOMINANCE: f32 = 3.2;

/// Windows of 20 ms, every 10 ms, that must agree.
const LEAST_WINDOWS: usize = 3;

/// Windows in a row that may be damaged: a concealed packet touches three.
const MOST_DAMAGED: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Decoder, Encoder, EncoderSettings};
    use crate::format::AudioFormat;
    use crate::speech::{self, Utterance};

    fn through_opus(pcm: &[i16]) -> Vec<i16> {
        let mut encoder = Encoder::new(AudioFormat::Opus, EncoderSettings::default()).unwrap();
        let mut decoder = Decoder::new(AudioFormat::Opus);
        let mut out = Vec::new();
        for frame in pcm.chunks_exact(320) {
            match encoder.encode(frame).unwrap() {
                Some(payload) => out.extend_from_slice(decoder.decode(&payload).unwrap()),
                None => out.extend([0; 320]),
            }
        }
        out
    }

    fn digits(pcm: &[i16], rate: u32) -> Vec<u8> {
        detect(pcm, rate).into_iter().map(|found| found.digit).collect()
    }

    #[test]
    fn every_digit_has_its_own_tone() {
        for rate in [16_000, 24_000] {
            for digit in 0..16 {
                let mut pcm = Vec::new();
                generate(digit, Duration::from_millis(40), rate, &mut pcm);
                assert_eq!(tone(&pcm, rate).map(|tone| tone.digit), Some(digit), "{} at {rate}", key(digit));
                assert!((levels::rms(&pcm) - AMPLITUDE).abs() < AMPLITUDE * 0.1);
            }
        }
    }

    #[test]
    fn codes_survive_opus_at_every_offset() {
        let sent: Vec<u8> = (0..16).chain([5, 5, 0, 0]).collect();
        for (tone_ms, gap_ms, offset) in [(60, 40, 0), (60, 40, 111), (80, 50, 200), (100, 40, 77), (60, 45, 319)] {
            let mut pcm = vec![0; 1600 + offset];
            for &digit in &sent {
                generate(digit, Duration::from_millis(tone_ms), 16_000, &mut pcm);
                pcm.resize(pcm.len() + gap_ms * 16, 0);
            }
            pcm.resize(pcm.len() + 1600, 0);
            assert_eq!(digits(&through_opus(&pcm), 16_000), sent, "{tone_ms} {gap_ms} {offset}");
        }
    }

    #[test]
    fn speech_holds_no_digits() {
        for utterance in Utterance::ALL {
            assert_eq!(digits(&utterance.pcm(), speech::RATE), [], "{}", utterance.name);
            assert_eq!(digits(&through_opus(&utterance.pcm()), speech::RATE), [], "{}", utterance.name);
        }
    }

    #[test]
    fn one_frequency_and_noise_are_no_digits() {
        let mut state = 1u32;
        let noise: Vec<i16> = (0..16_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 18) as i16 - 8192
            })
            .collect();
        assert_eq!(digits(&noise, 16_000), []);
        let step = std::f32::consts::TAU * ROWS[0] / 16_000.0;
        let sine: Vec<i16> = (0..16_000).map(|i| ((i as f32 * step).sin() * 8000.0) as i16).collect();
        assert_eq!(digits(&sine, 16_000), []);
        assert_eq!(digits(&[0; 100], 16_000), []);
    }
}
