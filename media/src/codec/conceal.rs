//! Concealment for linear PCM: the last period of the sound is repeated and fades (after ITU-T G.711, appendix I).

/// Remembers the end of the sound.
#[derive(Debug)]
pub(super) struct Repeater {
    history: Vec<i16>,
    /// Shortest and longest period, in samples.
    periods: std::ops::RangeInclusive<usize>,
    /// While concealing.
    repeating: Option<Repeating>,
    /// Samples over which a made-up continuation and the real one are blended.
    blend: usize,
}

#[derive(Debug, Clone, Copy)]
struct Repeating {
    period: usize,
    /// Samples made up so far.
    position: usize,
}

impl Repeater {
    pub(super) fn new(rate: u32) -> Self {
        let samples = |millis: f32| (millis * rate as f32 / 1000.0) as usize;
        Self {
            history: vec![0; samples(HISTORY_MS)],
            periods: samples(SHORTEST_PERIOD_MS)..=samples(LONGEST_PERIOD_MS),
            repeating: None,
            blend: samples(BLEND_MS),
        }
    }

    /// Takes a received frame; its beginning is blended with the end of a concealment.
    pub(super) fn heard(&mut self, frame: &mut [i16]) {
        if let Some(repeating) = self.repeating.take() {
            let blend = self.blend.min(frame.len());
            for (i, sample) in frame.iter_mut().enumerate().take(blend) {
                let share = (i + 1) as f32 / (blend + 1) as f32;
                let made_up = self.sample(repeating, repeating.position + i);
                *sample = (f32::from(*sample) * share + made_up * (1.0 - share)) as i16;
            }
        }
        let length = frame.len().min(self.history.len());
        self.history.rotate_left(length);
        let begin = self.history.len() - length;
        self.history[begin..].copy_from_slice(&frame[frame.len() - length..]);
    }

    /// Makes up a frame.
    pub(super) fn conceal(&mut self, frame: &mut [i16]) {
        let mut repeating = self.repeating.unwrap_or_else(|| Repeating { period: self.period(), position: 0 });
        for (i, sample) in frame.iter_mut().enumerate() {
            *sample = self.sample(repeating, repeating.position + i) as i16;
        }
        repeating.position += frame.len();
        self.repeating = Some(repeating);
    }

    fn sample(&self, repeating: Repeating, position: usize) -> f32 {
        let Repeating { period, .. } = repeating;
        let source = self.history.len() - period + position % period;
        // Full for the first frame, gone after four.
        let frame = self.history.len() as f32 / (HISTORY_MS / 20.0);
        let fade = (1.25 - 0.25 * position as f32 / frame).clamp(0.0, 1.0);
        f32::from(self.history[source]) * fade
    }

    /// The lag at which the end of the sound resembles itself most.
    fn period(&self) -> usize {
        let end = &self.history[self.history.len() - self.periods.end()..];
        let score = |lag: usize| {
            let from = self.history.len() - end.len() - lag;
            let earlier = &self.history[from..from + end.len()];
            let (mut product, mut energy) = (0.0f32, 1.0f32);
            for (&a, &b) in end.iter().zip(earlier) {
                product += f32::from(a) * f32::from(b);
                energy += f32::from(b) * f32::from(b);
            }
            product / energy.sqrt()
        };
        let scored = self.periods.clone().map(|lag| (score(lag), lag));
        scored.max_by(|a, b| a.0.total_cmp(&b.0)).map_or(*self.periods.end(), |(_, lag)| lag)
    }
}

const HISTORY_MS: f32 = 60.0;
const SHORTEST_PERIOD_MS: f32 = 5.0;
const LONGEST_PERIOD_MS: f32 = 20.0;
const BLEND_MS: f32 = 4.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::levels;

    #[test]
    fn a_tone_goes_on_and_fades() {
        let step = std::f32::consts::TAU * 440.0 / 16_000.0;
        let tone: Vec<i16> = (0..320 * 8).map(|i| ((i as f32 * step).sin() * 8000.0) as i16).collect();
        let mut repeater = Repeater::new(16_000);
        for frame in tone[..320 * 4].chunks(320) {
            repeater.heard(&mut frame.to_vec());
        }
        let mut frame = vec![0; 320];
        repeater.conceal(&mut frame);
        let error: Vec<i16> = frame.iter().zip(&tone[320 * 4..]).map(|(a, b)| a - b).collect();
        assert!(levels::rms(&error) < 0.1 * levels::rms(&tone), "{}", levels::rms(&error));
        for _ in 0..5 {
            repeater.conceal(&mut frame);
        }
        assert_eq!(levels::rms(&frame), 0.0);
    }

    #[test]
    fn silence_is_continued_by_silence() {
        let mut frame = vec![7; 480];
        Repeater::new(24_000).conceal(&mut frame);
        assert_eq!(frame, [0; 480]);
    }
}
