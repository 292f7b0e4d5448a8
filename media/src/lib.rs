//! Audio without I/O: everything that happens to sound between a datagram and an engine.
//!
//! ```text
//! datagram ─► rtp ─► jitter ─► codec ─► resample ─► vad ─► turn ─► engine ─► codec ─► rtp ─► datagram
//!            └──────── stream::Receiver ┘                            stream::Sender └──────┘
//! ```
//!
//! Audio is mono, 16 bits, in frames of 20 ms ([`mod@format`]). Time is an argument everywhere: jitter buffers are told
//! the [`std::time::Instant`], turn taking is told positions of the session clock (48 kHz samples). Nothing here
//! reads a clock, a random number, a file or a socket; bytes from the network may be anything and never panic.
//!
//! [`receipt`] and [`verify`] are the two halves of a proof by audio alone: the echo engine speaks a receipt before
//! the caller's words, and a recording shows who answered, what it remembered and whether every word came back.
#![forbid(unsafe_code)]

pub mod codec;
pub mod dtmf;
pub mod engine;
pub mod format;
pub mod jitter;
pub mod levels;
pub mod receipt;
pub mod resample;
pub mod rtp;
pub mod script;
pub mod speech;
pub mod stream;
pub mod turn;
pub mod vad;
pub mod verify;
pub mod wav;
