//! What a jitter buffer answers.

use std::time::Duration;

use bytes::Bytes;

/// What to play for the next 20 ms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// This packet.
    Packet {
        /// To be decoded.
        payload: Bytes,
        /// Of the response it belongs to.
        generation: Option<u16>,
    },
    /// Something in place of a packet that is not there.
    Conceal {
        /// The successor's payload, if it is there: it may carry forward error correction.
        fec_from: Option<Bytes>,
    },
    /// Nothing is being said.
    Silence,
}

/// What became of an inserted packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// Waits to be played.
    Kept,
    /// Was here before.
    Duplicate,
    /// Its time had passed.
    Late,
    /// Belongs to a flushed response.
    Flushed,
    /// Fits neither the stream nor, yet, a new one.
    Suspect,
}

/// Counts since the beginning, and the delays now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct JitterStats {
    /// Packets, without duplicates.
    pub received: u64,
    /// Packets that never came (RFC 3550, A.3).
    pub lost: u64,
    /// Packets that came after their time, or waited beyond the largest delay.
    pub late: u64,
    /// Packets that came again.
    pub duplicated: u64,
    /// Packets dropped because the buffer was full or the sender began anew.
    pub dropped: u64,
    /// Packets of flushed responses.
    pub flushed: u64,
    /// Packets handed out.
    pub played: u64,
    /// Frames that had to be concealed.
    pub concealed: u64,
    /// Frames left out to catch up.
    pub skipped: u64,
    /// Interarrival jitter (RFC 3550, A.8).
    pub jitter: Duration,
    /// Delay of the frame played last.
    pub delay: Duration,
    /// What the delay should be.
    pub target: Duration,
}
