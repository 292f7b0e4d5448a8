//! What is agreed about a session's audio: codec, rates and the 20 ms frame.

use std::time::Duration;

/// Samples per second of the session clock, in which all positions of a session are counted.
pub const SESSION_CLOCK: u32 = 48_000;

/// Length of every frame.
pub const FRAME: Duration = Duration::from_millis(20);

/// Frames per second.
pub const FRAMES_PER_SECOND: u32 = 50;

/// Session clock samples in a frame.
pub const FRAME_POSITIONS: u64 = (SESSION_CLOCK / FRAMES_PER_SECOND) as u64;

/// Largest RTP header that a [`crate::stream::Sender`] writes: fixed part and the generation extension.
const RTP_OVERHEAD: usize = 12 + 8;

/// How a session's audio is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AudioFormat {
    /// Opus (RFC 6716) over RTP (RFC 7587), coded from and to 16 kHz PCM.
    Opus,
    /// Linear PCM, 16 bits, big endian (RFC 3551, section 4.5.11), 16 kHz.
    L16At16k,
    /// Linear PCM, 16 bits, big endian, 24 kHz.
    L16At24k,
}

impl AudioFormat {
    /// All formats.
    pub const ALL: [Self; 3] = [Self::Opus, Self::L16At16k, Self::L16At24k];

    /// Samples per second of the PCM on this side of the codec.
    pub const fn sample_rate(self) -> u32 {
        match self {
            Self::Opus | Self::L16At16k => 16_000,
            Self::L16At24k => 24_000,
        }
    }

    /// Ticks per second of RTP timestamps. Opus: 48,000 whatever the rate of the PCM (RFC 7587, section 4.1).
    pub const fn rtp_clock(self) -> u32 {
        match self {
            Self::Opus => 48_000,
            Self::L16At16k => 16_000,
            Self::L16At24k => 24_000,
        }
    }

    /// PCM samples in a frame of 20 ms.
    pub const fn frame_samples(self) -> usize {
        (self.sample_rate() / FRAMES_PER_SECOND) as usize
    }

    /// RTP timestamp ticks from one frame to the next.
    pub const fn rtp_timestamp_step(self) -> u32 {
        self.rtp_clock() / FRAMES_PER_SECOND
    }

    /// RTP payload type, from the dynamic range (RFC 3551, section 6).
    pub const fn payload_type(self) -> u8 {
        match self {
            Self::Opus => 96,
            Self::L16At16k => 97,
            Self::L16At24k => 98,
        }
    }

    /// Largest payload of one packet in bytes, as our encoder makes them.
    pub const fn max_payload_bytes(self) -> usize {
        match self {
            Self::Opus => crate::codec::MAX_OPUS_PAYLOAD,
            Self::L16At16k | Self::L16At24k => self.frame_samples() * 2,
        }
    }

    /// Largest RTP packet in bytes, header included, flow identifier not.
    pub const fn max_packet_bytes(self) -> usize {
        RTP_OVERHEAD + self.max_payload_bytes()
    }

    /// Session clock samples for `samples` of PCM.
    pub const fn to_session_clock(self, samples: u64) -> u64 {
        samples * (SESSION_CLOCK / self.sample_rate()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_20_ms_on_every_clock() {
        for format in AudioFormat::ALL {
            assert_eq!(format.frame_samples() as u32 * 50, format.sample_rate());
            assert_eq!(format.rtp_timestamp_step() * 50, format.rtp_clock());
            assert_eq!(format.to_session_clock(format.frame_samples() as u64), FRAME_POSITIONS);
        }
    }

    #[test]
    fn packets_fit_a_datagram_of_the_smallest_quic_path() {
        // 1200 bytes less short header (1 + 17 + 4), tag (16), frame type and length (3), flow identifier (8).
        for format in AudioFormat::ALL {
            assert!(format.max_packet_bytes() <= 1200 - 22 - 16 - 3 - 8, "{format:?}");
        }
    }
}
