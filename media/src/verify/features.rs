//! Log spectrograms: how sound looks to an ear, robust against what codecs do to waveforms.

use std::ops::Range;

use realfft::RealFftPlanner;

/// Mel bands between 100 Hz and 7 kHz.
pub(super) const BANDS: usize = 20;

/// Frames per second.
pub(super) const FRAMES_PER_SECOND: u32 = 100;

/// Energies of one moment's bands, natural logarithms.
pub(super) type Bands = [f32; BANDS];

/// A log spectrogram.
#[derive(Debug)]
pub(super) struct Spectrogram {
    pub(super) frames: Vec<Bands>,
}

impl Spectrogram {
    /// Frame i lies around sample i × rate / 100.
    pub(super) fn of(pcm: &[i16], rate: u32) -> Self {
        let hop = (rate / FRAMES_PER_SECOND) as usize;
        let window = hop * 5 / 2;
        let size = window.next_power_of_two();
        let fft = RealFftPlanner::<f32>::new().plan_fft_forward(size);
        let (mut input, mut output) = (fft.make_input_vec(), fft.make_output_vec());
        let mut scratch = fft.make_scratch_vec();
        let bands = band_bins(rate, size);
        let hann: Vec<f32> =
            (0..window).map(|i| 0.5 - 0.5 * (std::f32::consts::TAU * (i as f32 + 0.5) / window as f32).cos()).collect();
        let mut frames = Vec::with_capacity(pcm.len() / hop + 1);
        for begin in (0..pcm.len()).step_by(hop) {
            input.fill(0.0);
            for ((slot, &sample), weight) in input.iter_mut().zip(&pcm[begin..]).zip(&hann) {
                *slot = f32::from(sample) * weight;
            }
            fft.process_with_scratch(&mut input, &mut output, &mut scratch)
                .expect("buffers were made by this transform");
            let scale = 1.0 / (window as f32 * window as f32);
            frames.push(bands.each_ref().map(|bins| {
                let energy: f32 = output[bins.clone()].iter().map(|bin| bin.norm_sqr()).sum();
                (energy * scale + FLOOR).ln()
            }));
        }
        Self { frames }
    }

    /// Mean of each band.
    pub(super) fn mean(&self) -> Bands {
        let count = self.frames.len().max(1) as f32;
        std::array::from_fn(|band| self.frames.iter().map(|frame| frame[band]).sum::<f32>() / count)
    }

    /// Takes `mean` away: what all speech has in common is no evidence.
    pub(super) fn less(mut self, mean: &Bands) -> Self {
        for frame in &mut self.frames {
            frame.iter_mut().zip(mean).for_each(|(energy, mean)| *energy -= mean);
        }
        self
    }
}

/// Correlation of two patches of the same length, −1..=1; 0 if either does not change at all.
pub(super) fn correlation(a: &[Bands], b: &[Bands]) -> f32 {
    let count = (a.len().min(b.len()) * BANDS).max(1) as f32;
    let pairs = || a.iter().flatten().zip(b.iter().flatten());
    let (sum_a, sum_b) = pairs().fold((0.0, 0.0), |(x, y), (a, b)| (x + a, y + b));
    let (mean_a, mean_b) = (sum_a / count, sum_b / count);
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in pairs() {
        let (a, b) = (a - mean_a, b - mean_b);
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    let scale: f32 = aa * bb;
    if scale <= f32::MIN_POSITIVE { 0.0 } else { ab / scale.sqrt() }
}

fn band_bins(rate: u32, size: usize) -> [Range<usize>; BANDS] {
    let mel = |hertz: f32| 2595.0 * (1.0 + hertz / 700.0).log10();
    let hertz = |mel: f32| 700.0 * (10f32.powf(mel / 2595.0) - 1.0);
    let bin = |hertz: f32| (hertz * size as f32 / rate as f32).round() as usize;
    let (low, high) = (mel(100.0), mel(7000.0f32.min(rate as f32 * 0.45)));
    let edge = |band: usize| bin(hertz(low + (high - low) * band as f32 / BANDS as f32));
    std::array::from_fn(|band| edge(band)..edge(band + 1).max(edge(band) + 1))
}

/// Energy that nobody hears, in squared sample values: quieter differences do not count.
const FLOOR: f32 = 20.0;
