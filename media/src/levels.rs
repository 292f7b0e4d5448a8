//! How loud PCM is, and where it is silent.

use std::ops::Range;
use std::time::Duration;

/// Root mean square of fewer than this (of 32,768; about −58 dBFS) is silence for people and for every measure here.
pub const SILENCE_RMS: f32 = 40.0;

/// Root mean square, 0..=32,768. Of nothing: 0.
pub fn rms(pcm: &[i16]) -> f32 {
    if pcm.is_empty() {
        return 0.0;
    }
    let sum: u64 = pcm.iter().map(|&sample| u64::from(sample.unsigned_abs()).pow(2)).sum();
    (sum as f64 / pcm.len() as f64).sqrt() as f32
}

/// Whether the sound is too quiet to be heard.
pub fn is_silent(pcm: &[i16]) -> bool {
    rms(pcm) < SILENCE_RMS
}

/// The part between the first and the last audible 10 ms, as sample indices; empty if there is none.
pub fn audible_range(pcm: &[i16], rate: u32) -> Range<usize> {
    let block = block_samples(rate);
    let first = pcm.chunks(block).position(|part| !is_silent(part));
    let last = pcm.chunks(block).rposition(|part| !is_silent(part));
    match (first, last) {
        (Some(first), Some(last)) => first * block..((last + 1) * block).min(pcm.len()),
        _ => 0..0,
    }
}

/// How much of it is audible, in steps of 10 ms.
pub fn audible_duration(pcm: &[i16], rate: u32) -> Duration {
    let audible = pcm.chunks(block_samples(rate)).filter(|part| !is_silent(part));
    Duration::from_millis(10 * audible.count() as u64)
}

/// The longest silence, in steps of 10 ms, and the sample where it begins.
pub fn longest_silence(pcm: &[i16], rate: u32) -> (Duration, usize) {
    let block = block_samples(rate);
    let (mut longest, mut begin, mut run) = (0, 0, 0);
    for (index, part) in pcm.chunks(block).enumerate() {
        run = if is_silent(part) { run + 1 } else { 0 };
        if run > longest {
            longest = run;
            begin = (index + 1 - run) * block;
        }
    }
    (Duration::from_millis(10 * longest as u64), begin)
}

fn block_samples(rate: u32) -> usize {
    (rate / 100).max(1) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(samples: usize) -> Vec<i16> {
        (0..samples).map(|i| ((i as f32 * 0.2).sin() * 5000.0) as i16).collect()
    }

    #[test]
    fn rms_of_a_sine_is_its_peak_over_root_two() {
        let level = rms(&tone(16_000));
        assert!((level - 5000.0 / 2f32.sqrt()).abs() < 20.0, "{level}");
        assert_eq!(rms(&[]), 0.0);
        assert_eq!(rms(&[i16::MIN; 100]), 32768.0);
    }

    #[test]
    fn the_longest_silence_is_found_where_it_is() {
        let pcm = [tone(1600), vec![0; 800], tone(1600), vec![3; 3200], tone(1600)].concat();
        assert_eq!(longest_silence(&pcm, 16_000), (Duration::from_millis(200), 4000));
        assert_eq!(audible_range(&[vec![0; 320], tone(320), vec![0; 320]].concat(), 16_000), 320..640);
        assert_eq!(audible_range(&[0; 999], 16_000), 0..0);
    }
}
