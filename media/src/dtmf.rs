//! Dual-tone multi-frequency digits (ITU-T Q.23): sixteen tones, made and found again.
//!
//! A digit is its hexadecimal value: 0 to 9 and A to D are the keys of those names, 14 is `*`, 15 is `#`.

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
    b"0123456789ABCD*#"
        .get(usize::from(digit))
        .map_or('?', |&key| char::from(key))
}

/// Appends a tone, as loud as speech. Only the low four bits of `digit` count.
pub fn generate(digit: u8, duration: Duration, rate: u32, out: &mut Vec<i16>) {
    let place = KEYPAD
        .iter()
        .position(|&key| key == digit & 0x0f)
        .unwrap_or(0);
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
    found.then(|| Tone {
        digit: KEYPAD[row * 4 + column],
        purity: purity.min(1.0),
    })
}

/// All digits of at least 50 ms, with at least 40 ms between equal ones.
pub fn detect(pcm: &[i16], rate: u32) -> Vec<Detection> {
    let hop = (rate / 100) as usize;
    let window = 3 * hop;
    let mut found: Vec<Detection> = Vec::new();
    let mut run: Option<(u8, usize, usize)> = None; // digit, first hop, windows
    let windows = pcm.len().saturating_sub(window) / hop + usize::from(pcm.len() >= window);
    for index in 0..=windows {
        let heard = pcm
            .get(index * hop..index * hop + window)
            .and_then(|part| tone(part, rate));
        run = match (run, heard) {
            (Some((digit, first, count)), Some(tone)) if tone.digit == digit => {
                Some((digit, first, count + 1))
            }
            (run, heard) => {
                if let Some((digit, first, count)) =
                    run.filter(|&(_, _, count)| count >= LEAST_WINDOWS)
                {
                    found.push(Detection {
                        digit,
                        begin: first * hop,
                        end: (first + count + 2) * hop,
                    });
                }
                heard.map(|tone| (tone.digit, index, 1))
            }
        };
    }
    found
}

/// Shares of a sound's energy at the eight frequencies, 0..=1 each.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shares {
    rows: [f32; 4],
    columns: [f32; 4],
}

impl Shares {
    /// By Goertzel's algorithm.
    pub(crate) fn of(pcm: &[i16], rate: u32) -> Self {
        let energy: f32 = pcm.iter().map(|&sample| f32::from(sample).powi(2)).sum();
        if energy <= 0.0 {
            return Self::default();
        }
        let scale = 2.0 / (pcm.len() as f32 * energy);
        let share = |hertz: f32| goertzel(pcm, hertz / rate as f32) * scale;
        Self {
            rows: ROWS.map(share),
            columns: COLUMNS.map(share),
        }
    }

    /// Of both frequencies of a digit, 0..=1.
    pub(crate) fn of_digit(&self, digit: u8) -> f32 {
        let place = KEYPAD
            .iter()
            .position(|&key| key == digit & 0x0f)
            .unwrap_or(0);
        let (row, column) = (self.rows[place / 4], self.columns[place % 4]);
        // Both have to be there.
        2.0 * row.min(column).min(0.5)
    }
}

/// Squared magnitude of one bin of the Fourier transform; `frequency` in cycles per sample.
fn goertzel(pcm: &[i16], frequency: f32) -> f32 {
    let coefficient = 2.0 * (std::f32::consts::TAU * frequency).cos();
    let (mut s1, mut s2) = (0.0f32, 0.0f32);
    for &sample in pcm {
        let s = f32::from(sample) + coefficient * s1 - s2;
        (s2, s1) = (s1, s);
    }
    s1 * s1 + s2 * s2 - coefficient * s1 * s2
}

/// Index and value of the highest, if it dominates all others.
fn highest(values: &[f32; 4], dominance: f32) -> Option<(usize, f32)> {
    let (index, &value) = values
        .iter()
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(b.1))?;
    let others = values
        .iter()
        .enumerate()
        .filter(|&(other, _)| other != index);
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

/// Windows of 30 ms, every 10 ms, that must agree.
const LEAST_WINDOWS: usize = 3;
