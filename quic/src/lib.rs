//! The QUIC profile that workers and clients share: ALPN `antiphon/1`, transport settings for audio, the congestion
//! controller with a floor, the framing of the control stream and the proof of possession.
#![forbid(unsafe_code)]

pub mod activation;
pub mod congestion;
pub mod control;
pub mod datagram;
pub mod heartbeat;
pub mod profile;

pub use activation::{ClientKey, activation_message, verify_activation};
pub use control::{ControlError, ControlReader, ControlWriter};
pub use datagram::{Flow, split_flow};
pub use heartbeat::{AudioReceived, Heartbeats};
pub use profile::{AudioBudget, Side, client_crypto, server_crypto, transport};
