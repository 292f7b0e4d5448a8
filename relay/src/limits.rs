//! What one thread lets pass of any one connection ID.

use std::num::{NonZeroU16, NonZeroU32};

use antiphon_core::{clock::Millis, sketch::RateSketch};
use rand::Rng as _;

use crate::forward::Flow;

/// Bounds per forwarding thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Packets a second of any one connection ID through one ingress relay.
    pub cid_rate: NonZeroU16,
    /// Of them Initial packets.
    pub initial_rate: NonZeroU16,
    /// Stateless resets a second.
    pub reset_rate: NonZeroU32,
}

impl Default for Limits {
    fn default() -> Self {
        let rate = |rate| NonZeroU16::new(rate).expect("no rate here is 0");
        Self { cid_rate: rate(2000), initial_rate: rate(20), reset_rate: NonZeroU32::new(1000).expect("1000 is not 0") }
    }
}

/// Bounds the rate of every flow in constant memory. Only what a route was found for is counted, so that invented
/// connection IDs fill nothing.
#[derive(Debug)]
pub(crate) struct FlowLimiter {
    all: RateSketch,
    initials: RateSketch,
}

impl FlowLimiter {
    pub(crate) fn new(limits: &Limits) -> Self {
        let mut random = rand::rng();
        Self {
            all: RateSketch::new(ALL_BITS, limits.cid_rate.get(), random.random()),
            initials: RateSketch::new(INITIAL_BITS, limits.initial_rate.get(), random.random()),
        }
    }

    pub(crate) fn admit(&mut self, now: Millis, flow: &Flow) -> bool {
        if flow.initial { self.initials.admit(now, flow.key) } else { self.all.admit(now, flow.key) }
    }
}

/// 128 KiB, for about as many calls as a core carries.
const ALL_BITS: u32 = 13;
/// 32 KiB: Initials are rarer.
const INITIAL_BITS: u32 = 11;
