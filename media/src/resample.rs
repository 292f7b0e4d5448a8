//! Other sample rates, by FFT (rubato).

use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Resampler as _};

/// Why audio cannot be resampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResampleError {
    /// A rate is out of range.
    #[error("sample rate of {0} Hz is not between 8000 and 192000")]
    Rate(u32),
    /// 20 ms are no whole number of samples at one of the rates, or a whole frame cannot be converted at once.
    #[error("no 20 ms frames from {from} Hz to {to} Hz")]
    Frames {
        /// Rate of the input.
        from: u32,
        /// Rate of the output.
        to: u32,
    },
}

/// Converts a stream frame by frame (20 ms), with a delay of half a frame.
pub struct FrameResampler {
    /// `None`: the rates are equal.
    fft: Option<Box<Fft<f32>>>,
    input: Vec<f32>,
    output: Vec<f32>,
    frame: Vec<i16>,
}

impl std::fmt::Debug for FrameResampler {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("FrameResampler")
            .field("input", &self.input.len())
            .field("output", &self.output.len())
            .finish_non_exhaustive()
    }
}

impl FrameResampler {
    /// From and to rates in Hz.
    pub fn new(from: u32, to: u32) -> Result<Self, ResampleError> {
        check_rates(from, to)?;
        let wrong = ResampleError::Frames { from, to };
        if !from.is_multiple_of(50) || !to.is_multiple_of(50) {
            return Err(wrong);
        }
        let (input, output) = ((from / 50) as usize, (to / 50) as usize);
        let fft = if from == to {
            None
        } else {
            let fft = Fft::new(from as usize, to as usize, input, 1, FixedSync::Both).map_err(|_| wrong)?;
            if fft.input_frames_next() != input || fft.output_frames_next() != output {
                return Err(wrong);
            }
            Some(Box::new(fft))
        };
        Ok(Self { fft, input: vec![0.0; input], output: vec![0.0; output], frame: vec![0; output] })
    }

    /// Converts the next 20 ms; shorter input is completed by silence, longer input is cut.
    pub fn frame(&mut self, pcm: &[i16]) -> &[i16] {
        let Some(fft) = &mut self.fft else {
            let length = pcm.len().min(self.frame.len());
            self.frame[..length].copy_from_slice(&pcm[..length]);
            self.frame[length..].fill(0);
            return &self.frame;
        };
        self.input.fill(0.0);
        for (sample, &pcm) in self.input.iter_mut().zip(pcm) {
            *sample = pcm.into();
        }
        let frames = (self.input.len(), self.output.len());
        let input = InterleavedSlice::new(&self.input, 1, frames.0);
        let output = InterleavedSlice::new_mut(&mut self.output, 1, frames.1);
        if let (Ok(input), Ok(mut output)) = (input, output) {
            fft.process_into_buffer(&input, &mut output, None)
                .expect("buffers have the lengths that the resampler asked for");
        }
        for (pcm, &sample) in self.frame.iter_mut().zip(&self.output) {
            *pcm = to_i16(sample);
        }
        &self.frame
    }
}

/// Converts a whole recording; the result has the same duration and no delay.
pub fn convert(pcm: &[i16], from: u32, to: u32) -> Result<Vec<i16>, ResampleError> {
    check_rates(from, to)?;
    if from == to || pcm.is_empty() {
        return Ok(pcm.to_vec());
    }
    let wrong = ResampleError::Frames { from, to };
    let mut fft = Fft::<f32>::new(from as usize, to as usize, 1024, 1, FixedSync::Both).map_err(|_| wrong)?;
    let input: Vec<f32> = pcm.iter().map(|&sample| sample.into()).collect();
    let input = InterleavedSlice::new(&input, 1, input.len()).map_err(|_| wrong)?;
    let output = fft.process_all(&input, pcm.len(), None).map_err(|_| wrong)?;
    Ok(output.take_data().into_iter().map(to_i16).collect())
}

fn check_rates(from: u32, to: u32) -> Result<(), ResampleError> {
    match [from, to].into_iter().find(|rate| !(8_000..=192_000).contains(rate)) {
        Some(rate) => Err(ResampleError::Rate(rate)),
        None => Ok(()),
    }
}

fn to_i16(sample: f32) -> i16 {
    sample.round() as i16 // saturates
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::levels;

    fn tone(rate: u32, hertz: f32, samples: usize) -> Vec<i16> {
        let step = std::f32::consts::TAU * hertz / rate as f32;
        (0..samples).map(|i| ((i as f32 * step).sin() * 10_000.0) as i16).collect()
    }

    #[test]
    fn whole_files_keep_duration_and_level() {
        for (from, to) in [(16_000, 24_000), (48_000, 16_000), (22_050, 16_000), (22_050, 24_000), (44_100, 16_000)] {
            let out = convert(&tone(from, 440.0, from as usize), from, to).unwrap();
            assert!(out.len().abs_diff(to as usize) <= 1, "{from} {to} {}", out.len());
            let middle = &out[out.len() / 4..out.len() * 3 / 4];
            assert!((levels::rms(middle) - 7071.0).abs() < 70.0, "{from} {to} {}", levels::rms(middle));
        }
    }

    #[test]
    fn frames_keep_their_level_and_lose_what_the_lower_rate_cannot_carry() {
        for (hertz, expected) in [(1000.0, 7071.0), (11_000.0, 0.0)] {
            let mut resampler = FrameResampler::new(24_000, 16_000).unwrap();
            let mut out = Vec::new();
            for frame in tone(24_000, hertz, 24_000).chunks(480) {
                out.extend_from_slice(resampler.frame(frame));
            }
            assert_eq!(out.len(), 16_000);
            assert!((levels::rms(&out[1600..]) - expected).abs() < 100.0, "{hertz}: {}", levels::rms(&out[1600..]));
        }
    }

    #[test]
    fn impossible_rates_are_refused() {
        assert_eq!(convert(&[0], 0, 16_000), Err(ResampleError::Rate(0)));
        assert_eq!(
            FrameResampler::new(11_025, 16_000).unwrap_err(),
            ResampleError::Frames { from: 11_025, to: 16_000 }
        );
        assert_eq!(FrameResampler::new(16_000, 16_000).unwrap().frame(&[7; 320]), [7; 320]);
    }
}
