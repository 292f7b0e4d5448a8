//! What a call was like, in figures.

use std::time::Duration;

use antiphon_media::stream::{ReceiverStats, SenderStats};

use crate::path::Switch;

/// A change of relay. Times are since the dialing began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelaySwitch {
    /// When.
    pub at: Duration,
    /// From where, to where, why.
    pub switch: Switch,
    /// Time from the last packet through the old relay to the first through the new one; none if none came.
    pub gap: Option<Duration>,
}

/// A change of the local address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rebind {
    /// When.
    pub at: Duration,
    /// Time from the last packet before it to the first one after it; none if none came.
    pub gap: Option<Duration>,
}

/// One turn as the client saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TurnTiming {
    /// Which turn.
    pub turn: u32,
    /// When the worker said that the caller had ended.
    pub stopped: Duration,
    /// When the first frame of the answer was played.
    pub answered: Option<Duration>,
}

/// A call's timeline and counts. Times are since the dialing began.
#[derive(Debug, Clone, Default)]
pub struct CallReport {
    /// When the QUIC handshake was complete.
    pub handshake: Duration,
    /// Attempts that the handshake took.
    pub attempts: u32,
    /// When the worker confirmed the activation; zero if it did not.
    pub activated: Duration,
    /// When the first frame of any answer was played.
    pub first_audio: Option<Duration>,
    /// How long the call lasted.
    pub ended: Duration,
    /// Turn by turn.
    pub turns: Vec<TurnTiming>,
    /// Changes of relay.
    pub switches: Vec<RelaySwitch>,
    /// Changes of the local address.
    pub rebinds: Vec<Rebind>,
    /// Longest time without any packet from the worker.
    pub longest_gap: Duration,
    /// QUIC's smoothed round trip at the end.
    pub rtt: Duration,
    /// Downlink audio.
    pub received: ReceiverStats,
    /// Uplink audio.
    pub sent: SenderStats,
    /// Index of the relay in use at the end.
    pub relay: usize,
    /// Steps of 20 ms that came late by more than a frame: the machine was too busy.
    pub late_steps: u64,
}
