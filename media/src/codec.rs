//! Opus and linear PCM, one 20 ms frame at a time.
//!
//! # What it costs
//!
//! Microseconds per frame at 16 kHz and 24 kbit/s, and cores for 100 calls (5,000 frames per second), measured with
//! `cargo bench -p antiphon-media` over the recorded speech on one core of a 2-core x86-64 virtual machine:
//!
//! | | 0 | **1** | 2, 3 | 4, 5 | 6, 7 | 8, 9 | 10 | decode |
//! |---|---|---|---|---|---|---|---|---|
//! | µs | 54 | **61** | 95 | 131 | 180 | 350 | 390 | 12 |
//! | cores | 0.27 | **0.31** | 0.47 | 0.65 | 0.90 | 1.7 | 1.9 | 0.06 |
//!
//! The default is 1, the highest at which a hundred encoders take well under half a core.

mod conceal;
mod packet;

use ropus::{Application, Bitrate, Channels, DecodeMode, InbandFec, Signal};

pub use packet::{OpusPacket, OpusPacketError};

use crate::format::AudioFormat;
use crate::levels;

/// Largest Opus payload that our encoder makes, in bytes: 20 ms at 128 kbit/s.
pub const MAX_OPUS_PAYLOAD: usize = 320;

/// How to encode. Linear PCM takes only [`Self::dtx`] from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderSettings {
    /// Opus target in bits per second, 6,000..=128,000; variable.
    pub bitrate: u32,
    /// Opus computational complexity, 0..=10; the module says what each costs.
    pub complexity: u8,
    /// Opus in-band forward error correction: the loss to protect from in percent, 0..=100; 0 is none.
    pub fec_loss_percent: u8,
    /// Send nothing while it is silent (discontinuous transmission).
    pub dtx: bool,
}

impl Default for EncoderSettings {
    fn default() -> Self {
        Self { bitrate: 24_000, complexity: 1, fec_loss_percent: 5, dtx: true }
    }
}

/// Why an encoder could not be made or a frame not be encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A setting is out of its range.
    #[error("{setting} of {value} is not between {least} and {most}")]
    Setting {
        /// Which.
        setting: &'static str,
        /// What was asked.
        value: u32,
        /// Smallest possible.
        least: u32,
        /// Largest possible.
        most: u32,
    },
    /// A frame has another length.
    #[error("a frame of {found} samples, expected {expected}")]
    FrameLength {
        /// Given.
        found: usize,
        /// Samples in 20 ms.
        expected: usize,
    },
    /// The Opus library refuses.
    #[error("Opus: {0}")]
    Opus(ropus::EncodeError),
}

/// Why a payload is not a frame of the session's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The Opus packet is malformed (RFC 6716, section 3.4).
    #[error(transparent)]
    Malformed(#[from] OpusPacketError),
    /// Not 20 ms long.
    #[error("Opus packet of {0} microseconds, expected 20000")]
    Duration(u32),
    /// Linear PCM of another length.
    #[error("linear PCM of {found} bytes, expected {expected}")]
    Length {
        /// Of the payload.
        found: usize,
        /// Of 20 ms.
        expected: usize,
    },
    /// The Opus library refuses.
    #[error("Opus: {0}")]
    Opus(ropus::DecodeError),
}

/// PCM to payloads.
pub struct Encoder {
    format: AudioFormat,
    opus: Option<Box<ropus::Encoder>>,
    dtx: bool,
    silent_frames: u32,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Encoder")
            .field("format", &self.format)
            .field("dtx", &self.dtx)
            .field("silent_frames", &self.silent_frames)
            .finish_non_exhaustive()
    }
}

impl Encoder {
    /// Makes an encoder; errors name the setting that is out of range.
    pub fn new(format: AudioFormat, settings: EncoderSettings) -> Result<Self, EncodeError> {
        let EncoderSettings { bitrate, complexity, fec_loss_percent, dtx } = settings;
        for (setting, value, least, most) in [
            ("bitrate", bitrate, 6_000, 128_000),
            ("complexity", complexity.into(), 0, 10),
            ("fec_loss_percent", fec_loss_percent.into(), 0, 100),
        ] {
            if !(least..=most).contains(&value) {
                return Err(EncodeError::Setting { setting, value, least, most });
            }
        }
        let opus = match format {
            AudioFormat::L16At16k | AudioFormat::L16At24k => None,
            AudioFormat::Opus => Some(Box::new(opus_encoder(bitrate, complexity, fec_loss_percent)?)),
        };
        Ok(Self { format, opus, dtx, silent_frames: 0 })
    }

    /// The format of the payloads.
    pub fn format(&self) -> AudioFormat {
        self.format
    }

    /// Encodes 20 ms and appends the payload to `out`. False, with nothing appended: silence, not to be sent.
    ///
    /// Silence is sent for another 200 ms, so that short pauses do not break the stream up.
    pub fn encode_into(&mut self, pcm: &[i16], out: &mut Vec<u8>) -> Result<bool, EncodeError> {
        let expected = self.format.frame_samples();
        if pcm.len() != expected {
            return Err(EncodeError::FrameLength { found: pcm.len(), expected });
        }
        self.silent_frames = if levels::rms(pcm) < DTX_RMS { self.silent_frames + 1 } else { 0 };
        if self.dtx && self.silent_frames > DTX_HANGOVER_FRAMES {
            return Ok(false);
        }
        match &mut self.opus {
            None => out.extend(pcm.iter().flat_map(|sample| sample.to_be_bytes())),
            Some(opus) => {
                let begin = out.len();
                out.resize(begin + MAX_OPUS_PAYLOAD, 0);
                let length = opus.encode(pcm, &mut out[begin..]).map_err(EncodeError::Opus)?;
                out.truncate(begin + length);
            }
        }
        Ok(true)
    }

    /// Encodes 20 ms; `None` is silence, not to be sent. See [`Self::encode_into`].
    pub fn encode(&mut self, pcm: &[i16]) -> Result<Option<Vec<u8>>, EncodeError> {
        let mut out = Vec::with_capacity(self.format.max_payload_bytes());
        Ok(self.encode_into(pcm, &mut out)?.then_some(out))
    }
}

fn opus_encoder(bitrate: u32, complexity: u8, loss: u8) -> Result<ropus::Encoder, EncodeError> {
    let rate = AudioFormat::Opus.sample_rate();
    let fec = if loss == 0 { InbandFec::Disabled } else { InbandFec::Enabled };
    ropus::Encoder::builder(rate, Channels::Mono, Application::Voip)
        .bitrate(Bitrate::Bits(bitrate))
        .complexity(complexity)
        .signal(Signal::Voice)
        .inband_fec(fec)
        .packet_loss_perc(loss)
        .dtx(false)
        .build()
        .map_err(|_| EncodeError::Opus(ropus::EncodeError::BadArg))
}

/// Payloads to PCM. Payloads come from the network and may be anything.
pub struct Decoder {
    format: AudioFormat,
    opus: Option<Box<ropus::Decoder>>,
    /// The frame decoded or concealed last.
    last: Vec<i16>,
    /// Opus conceals by itself.
    linear: conceal::Repeater,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Decoder").field("format", &self.format).finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder without history.
    pub fn new(format: AudioFormat) -> Self {
        let opus = matches!(format, AudioFormat::Opus).then(|| {
            let decoder = ropus::Decoder::new(format.sample_rate(), Channels::Mono);
            Box::new(decoder.expect("16 kHz mono is legal for Opus"))
        });
        Self {
            format,
            opus,
            last: vec![0; format.frame_samples()],
            linear: conceal::Repeater::new(format.sample_rate()),
        }
    }

    /// The format of the payloads.
    pub fn format(&self) -> AudioFormat {
        self.format
    }

    /// Decodes a payload of 20 ms. After an error the decoder goes on; the frame is to be concealed.
    pub fn decode(&mut self, payload: &[u8]) -> Result<&[i16], DecodeError> {
        match &mut self.opus {
            Some(opus) => {
                check_opus(payload)?;
                decode_opus(opus, payload, &mut self.last, DecodeMode::Normal)?;
            }
            None => {
                let expected = self.last.len() * 2;
                if payload.len() != expected {
                    return Err(DecodeError::Length { found: payload.len(), expected });
                }
                for (sample, bytes) in self.last.iter_mut().zip(payload.as_chunks::<2>().0) {
                    *sample = i16::from_be_bytes(*bytes);
                }
                self.linear.heard(&mut self.last);
            }
        }
        Ok(&self.last)
    }

    /// The frame that was decoded or concealed last.
    pub fn frame(&self) -> &[i16] {
        &self.last
    }

    /// 20 ms in place of a lost frame, continued from what was heard before.
    pub fn conceal(&mut self) -> &[i16] {
        match &mut self.opus {
            Some(opus) => {
                if decode_opus(opus, &[], &mut self.last, DecodeMode::Normal).is_err() {
                    self.last.fill(0);
                }
            }
            None => self.linear.conceal(&mut self.last),
        }
        &self.last
    }

    /// 20 ms in place of a lost frame, out of the forward error correction in its successor's payload, which is to
    /// be decoded next. Conceals where there is none.
    pub fn conceal_from(&mut self, next: &[u8]) -> &[i16] {
        let Some(opus) = self.opus.as_mut().filter(|_| check_opus(next).is_ok()) else {
            return self.conceal();
        };
        if decode_opus(opus, next, &mut self.last, DecodeMode::Fec).is_err() {
            return self.conceal();
        }
        &self.last
    }
}

fn check_opus(payload: &[u8]) -> Result<(), DecodeError> {
    match OpusPacket::parse(payload)?.duration_us() {
        20_000 => Ok(()),
        duration => Err(DecodeError::Duration(duration)),
    }
}

fn decode_opus(
    opus: &mut ropus::Decoder,
    payload: &[u8],
    frame: &mut [i16],
    mode: DecodeMode,
) -> Result<(), DecodeError> {
    let decoded = opus.decode(payload, frame, mode).map_err(DecodeError::Opus)?;
    frame.iter_mut().skip(decoded).for_each(|sample| *sample = 0);
    Ok(())
}

/// Frames this quiet (about −66 dBFS) need not be sent.
const DTX_RMS: f32 = 16.0;

/// Silent frames that are sent before transmission stops: 200 ms.
const DTX_HANGOVER_FRAMES: u32 = 10;

#[cfg(test)]
mod tests;
