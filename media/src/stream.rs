//! Both ends of an audio stream: datagrams to paced PCM, paced PCM to datagrams.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;

use crate::codec::{DecodeError, Decoder, EncodeError, Encoder, EncoderSettings};
use crate::format::AudioFormat;
use crate::jitter::{Frame, Inserted, JitterBuffer, JitterStats};
use crate::levels;
use crate::rtp::{self, RtpError, RtpHeader, RtpPacket};

/// Receives RTP and gives one PCM frame per 20 ms.
#[derive(Debug)]
pub struct Receiver {
    jitter: JitterBuffer,
    decoder: Decoder,
    silence: Vec<i16>,
    generation: Option<u16>,
    undecodable: u64,
    last_error: Option<DecodeError>,
}

/// Where a frame's sound comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// A packet.
    Played,
    /// Made up in place of a packet.
    Concealed,
    /// Nothing is being said.
    Silence,
}

/// 20 ms of sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard<'a> {
    /// Samples at the format's rate.
    pub pcm: &'a [i16],
    /// Where they come from.
    pub kind: FrameKind,
    /// Low 16 bits of the generation of the response being played; `None` for silence and for streams without.
    pub generation: Option<u16>,
}

/// The stream's counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiverStats {
    /// Of the jitter buffer.
    pub jitter: JitterStats,
    /// Packets that the decoder refused; they were concealed.
    pub undecodable: u64,
}

impl Receiver {
    /// A receiver for a stream of `format`.
    pub fn new(format: AudioFormat) -> Self {
        Self {
            jitter: JitterBuffer::new(format),
            decoder: Decoder::new(format),
            silence: vec![0; format.frame_samples()],
            generation: None,
            undecodable: 0,
            last_error: None,
        }
    }

    /// The stream's format.
    pub fn format(&self) -> AudioFormat {
        self.decoder.format()
    }

    /// Takes an RTP packet, without its flow identifier ([`rtp::split_flow`]), that arrived at `now`.
    pub fn insert(&mut self, now: Instant, datagram: &Bytes) -> Result<Inserted, RtpError> {
        let packet = RtpPacket::parse(datagram)?;
        let (found, agreed) = (packet.header.payload_type, self.format().payload_type());
        if found != agreed {
            return Err(RtpError::PayloadType { found, agreed });
        }
        Ok(self.jitter.insert(now, packet))
    }

    /// The next 20 ms. To be called every 20 ms, by a clock that does not drift from the one that plays.
    pub fn pull(&mut self, now: Instant) -> Heard<'_> {
        let (kind, pcm) = match self.jitter.pull(now) {
            Frame::Packet { payload, generation } => {
                self.generation = generation;
                match self.decoder.decode(&payload) {
                    // Ends the borrow: the decoder holds the frame until the next call.
                    Ok(_) => (FrameKind::Played, self.decoder.frame()),
                    Err(error) => {
                        self.undecodable += 1;
                        self.last_error = Some(error);
                        (FrameKind::Concealed, self.decoder.conceal())
                    }
                }
            }
            Frame::Conceal { fec_from: Some(next) } => (FrameKind::Concealed, self.decoder.conceal_from(&next)),
            Frame::Conceal { fec_from: None } => (FrameKind::Concealed, self.decoder.conceal()),
            Frame::Silence => {
                self.generation = None;
                (FrameKind::Silence, &self.silence[..])
            }
        };
        self.jitter.note_quiet(levels::is_silent(pcm));
        Heard { pcm, kind, generation: self.generation }
    }

    /// Stops playing every response up to and including `generation`, at once.
    pub fn flush(&mut self, generation: u32) {
        self.jitter.flush(generation);
    }

    /// Low 16 bits of the highest sequence number received; `None` before the first packet.
    pub fn highest(&self) -> Option<u16> {
        self.jitter.highest()
    }

    /// Counts and delays.
    pub fn stats(&self) -> ReceiverStats {
        ReceiverStats { jitter: self.jitter.stats(), undecodable: self.undecodable }
    }

    /// Why the last undecodable packet was refused.
    pub fn last_error(&self) -> Option<DecodeError> {
        self.last_error
    }
}

/// Where a stream begins. RFC 3550, section 5.1 wants random values: they are arguments, so that tests repeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamOrigin {
    /// Synchronisation source.
    pub ssrc: u32,
    /// Sequence number of the first packet.
    pub sequence: u16,
    /// Timestamp of the first frame.
    pub timestamp: u32,
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SenderStats {
    /// Packets made.
    pub packets: u64,
    /// Bytes of them, flow identifiers included.
    pub bytes: u64,
    /// Frames of silence that needed no packet.
    pub suppressed: u64,
}

/// Takes one PCM frame per 20 ms and makes datagrams.
#[derive(Debug)]
pub struct Sender {
    encoder: Encoder,
    flow: u64,
    ssrc: u32,
    sequence: u16,
    timestamp: u32,
    generation: Option<u16>,
    /// The next packet is the first after a silence.
    marker: bool,
    /// The newest datagrams with their sequence numbers, for [`Self::after`].
    recent: VecDeque<(u16, Bytes)>,
    stats: SenderStats,
}

impl Sender {
    /// A sender on the RTP over QUIC flow `flow` (below 2⁶²).
    pub fn new(
        format: AudioFormat,
        settings: EncoderSettings,
        flow: u64,
        origin: StreamOrigin,
    ) -> Result<Self, EncodeError> {
        let encoder = Encoder::new(format, settings)?;
        let StreamOrigin { ssrc, sequence, timestamp } = origin;
        let (stats, recent) = (SenderStats::default(), VecDeque::with_capacity(RECENT));
        Ok(Self { encoder, flow, ssrc, sequence, timestamp, generation: None, marker: true, recent, stats })
    }

    /// The stream's format.
    pub fn format(&self) -> AudioFormat {
        self.encoder.format()
    }

    /// From now on frames belong to the response with this generation, or to none.
    pub fn set_generation(&mut self, generation: Option<u32>) {
        self.generation = generation.map(|generation| generation as u16);
    }

    /// Encodes the next 20 ms into a datagram: flow identifier and RTP packet. `None`: silence, nothing to send.
    pub fn push(&mut self, pcm: &[i16]) -> Result<Option<Bytes>, EncodeError> {
        let format = self.format();
        let mut datagram = Vec::with_capacity(rtp::flow_bytes(self.flow) + format.max_packet_bytes());
        rtp::write_flow(self.flow, &mut datagram);
        let header = RtpHeader {
            payload_type: format.payload_type(),
            marker: self.marker,
            sequence: self.sequence,
            timestamp: self.timestamp,
            ssrc: self.ssrc,
            generation: self.generation,
        };
        header.write(&mut datagram);
        if !self.encoder.encode_into(pcm, &mut datagram)? {
            self.skip();
            return Ok(None);
        }
        let datagram = Bytes::from(datagram);
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((self.sequence, datagram.clone()));
        self.timestamp = self.timestamp.wrapping_add(format.rtp_timestamp_step());
        self.sequence = self.sequence.wrapping_add(1);
        self.marker = false;
        self.stats.packets += 1;
        self.stats.bytes += datagram.len() as u64;
        Ok(Some(datagram))
    }

    /// What was sent after the packet with this sequence number, oldest first: a path that died may have taken it
    /// along. At most the newest [`RECENT`]; with `None` (the other end has nothing yet) all of those.
    pub fn after(&self, highest: Option<u16>) -> impl Iterator<Item = Bytes> + use<> {
        // Serial number arithmetic (RFC 1982).
        let later = |sequence: u16| highest.is_none_or(|highest| (sequence.wrapping_sub(highest) as i16) > 0);
        let sent: Vec<Bytes> =
            self.recent.iter().filter(|(sequence, _)| later(*sequence)).map(|(_, datagram)| datagram.clone()).collect();
        sent.into_iter()
    }

    /// The last `count` packets, oldest first.
    pub fn newest(&self, count: usize) -> impl Iterator<Item = Bytes> + use<> {
        let skipped = self.recent.len().saturating_sub(count);
        let sent: Vec<Bytes> = self.recent.iter().skip(skipped).map(|(_, datagram)| datagram.clone()).collect();
        sent.into_iter()
    }

    /// Lets 20 ms pass without sound.
    pub fn skip(&mut self) {
        self.timestamp = self.timestamp.wrapping_add(self.format().rtp_timestamp_step());
        self.marker = true;
        self.stats.suppressed += 1;
    }

    /// What was sent.
    pub fn stats(&self) -> SenderStats {
        self.stats
    }
}

/// Packets that a sender keeps: 400 ms, longer than it takes to notice a dead path.
pub const RECENT: usize = 20;

#[cfg(test)]
mod tests;
