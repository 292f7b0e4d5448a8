//! WAV files as bytes in memory.

use std::io::Cursor;

/// A mono recording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wav {
    /// Samples per second.
    pub rate: u32,
    /// Samples.
    pub pcm: Vec<i16>,
}

/// Why bytes are not a WAV file that can be used.
#[derive(Debug, thiserror::Error)]
pub enum WavError {
    /// Not a WAV file, or a damaged one.
    #[error("not a readable WAV file: {0}")]
    Format(#[from] hound::Error),
    /// Not PCM of 8, 16, 24 or 32 bits or 32-bit float.
    #[error("{bits}-bit {kind} samples are not supported, use 8, 16, 24 or 32 bits or 32-bit float")]
    Samples {
        /// Bits of a sample.
        bits: u16,
        /// `integer` or `float`.
        kind: &'static str,
    },
    /// It says that no time passes between samples.
    #[error("the WAV file says 0 samples per second")]
    Rate,
    /// There is nothing in it.
    #[error("the WAV file holds no samples")]
    Empty,
}

/// Reads a WAV file; several channels are mixed into one.
pub fn read(bytes: &[u8]) -> Result<Wav, WavError> {
    let mut reader = hound::WavReader::new(Cursor::new(bytes))?;
    let spec = reader.spec();
    let samples: Vec<f32> = match (spec.sample_format, spec.bits_per_sample) {
        (hound::SampleFormat::Float, 32) => {
            reader.samples::<f32>().map(|sample| Ok(sample? * 32_768.0)).collect::<Result<_, hound::Error>>()?
        }
        (hound::SampleFormat::Int, bits @ (8 | 16 | 24 | 32)) => {
            let scale = (1u64 << 15) as f32 / (1u64 << (bits - 1)) as f32;
            reader.samples::<i32>().map(|sample| Ok(sample? as f32 * scale)).collect::<Result<_, hound::Error>>()?
        }
        (format, bits) => {
            let kind = if format == hound::SampleFormat::Int { "integer" } else { "float" };
            return Err(WavError::Samples { bits, kind });
        }
    };
    if spec.sample_rate == 0 {
        return Err(WavError::Rate);
    }
    let channels = usize::from(spec.channels.max(1));
    let pcm: Vec<i16> = samples
        .chunks_exact(channels)
        .map(|frame| (frame.iter().sum::<f32>() / channels as f32).round() as i16)
        .collect();
    if pcm.is_empty() {
        return Err(WavError::Empty);
    }
    Ok(Wav { rate: spec.sample_rate, pcm })
}

/// Writes a mono file of 16-bit PCM.
pub fn write(pcm: &[i16], rate: u32) -> Vec<u8> {
    let spec =
        hound::WavSpec { channels: 1, sample_rate: rate, bits_per_sample: 16, sample_format: hound::SampleFormat::Int };
    let mut bytes = Cursor::new(Vec::with_capacity(44 + pcm.len() * 2));
    let written = hound::WavWriter::new(&mut bytes, spec).and_then(|mut writer| {
        pcm.iter().try_for_each(|&sample| writer.write_sample(sample))?;
        writer.finalize()
    });
    written.expect("writing 16-bit PCM to memory cannot fail");
    bytes.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn recordings_round_trip() {
        let wav = Wav { rate: 22_050, pcm: vec![0, 1, -1, i16::MAX, i16::MIN] };
        assert_eq!(read(&write(&wav.pcm, wav.rate)).unwrap(), wav);
    }

    #[test]
    fn a_file_without_a_rate_is_refused() {
        let mut bytes = write(&[1, 2], 16_000);
        // Samples a second, and bytes a second to match.
        bytes[24..32].fill(0);
        assert!(matches!(read(&bytes), Err(WavError::Rate)));
    }

    #[test]
    fn stereo_float_is_mixed() {
        let spec = hound::WavSpec {
            channels: 2,
            sample_rate: 8000,
            bits_per_sample: 32,
            sample_format: hound::SampleFormat::Float,
        };
        let mut bytes = Cursor::new(Vec::new());
        let mut writer = hound::WavWriter::new(&mut bytes, spec).unwrap();
        [0.5f32, 0.25, 4.0, 4.0].into_iter().for_each(|sample| writer.write_sample(sample).unwrap());
        writer.finalize().unwrap();
        assert_eq!(read(bytes.get_ref()).unwrap().pcm, [12_288, i16::MAX]);
    }

    #[test]
    fn an_empty_recording_is_refused() {
        assert!(matches!(read(&write(&[], 8000)), Err(WavError::Empty)));
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(cut in 0usize..60, at in 0usize..60, byte: u8) {
            let mut bytes = write(&[1, 2, 3, 4, 5, 6, 7, 8], 16_000);
            bytes[at] = byte;
            bytes.truncate(60 - cut);
            let _ = read(&bytes);
        }
    }
}
