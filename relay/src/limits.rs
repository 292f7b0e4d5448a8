//! What one thread lets pass of any one connection ID.
//!
//! A connection ID travels in the clear: whoever has seen one packet of a caller can send more with the same ID, from
//! any address. Those must not use up what the caller has. So each path, which is a client address at an ingress relay,
//! is counted on its own; and when all paths of an ID together come more often than any call does, only those pass
//! that were there before, each with a share that is ample for a call. What then still comes is for the worker to sort
//! out, which knows the one path that is its session's; `MOST` keeps that little work.
//!
//! Who sends from the caller's very own address and port cannot be told from the caller here.

use std::{
    hash::{BuildHasher as _, RandomState},
    num::{NonZeroU16, NonZeroU32},
};

use antiphon_core::{clock::Millis, sketch::RateSketch};
use rand::Rng as _;

use crate::forward::Flow;

/// Bounds per forwarding thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Packets a second of any one connection ID over one path; and over all of them while anybody may come.
    pub cid_rate: NonZeroU16,
    /// Initial packets a second, counted apart.
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
    all: Bound,
    initials: Bound,
    /// Addresses are the sender's choice: without the key nobody finds two that share cells.
    hasher: RandomState,
}

impl FlowLimiter {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            all: Bound::new(ALL_BITS, limits.cid_rate.get()),
            initials: Bound::new(INITIAL_BITS, limits.initial_rate.get()),
            hasher: RandomState::new(),
        }
    }

    pub(crate) fn admit(&mut self, now: Millis, flow: &Flow) -> bool {
        let [server, rest] = flow.key;
        let path = [server ^ self.hasher.hash_one(flow.client), rest];
        let bound = if flow.initial { &mut self.initials } else { &mut self.all };
        bound.admit(now, flow.key, path)
    }
}

#[derive(Debug)]
struct Bound {
    paths: RateSketch,
    ids: RateSketch,
    /// Of a path, and of an ID while every path may pass.
    rate: u16,
    /// Of a path that was there before, beyond that.
    share: u16,
    /// Of an ID, whoever sends.
    most: u16,
}

impl Bound {
    fn new(bits: u32, rate: u16) -> Self {
        let mut random = rand::rng();
        Self {
            paths: RateSketch::new(bits, random.random()),
            ids: RateSketch::new(bits, random.random()),
            rate,
            share: (rate / SHARES).max(LEAST_SHARE),
            most: rate.saturating_mul(MOST),
        }
    }

    fn admit(&mut self, now: Millis, id: [u64; 2], path: [u64; 2]) -> bool {
        let (path, id) = (self.paths.look(now, path), self.ids.look(now, id));
        let welcome = id.below(self.rate) || path.is_known() && path.below(self.share) && id.below(self.most);
        let passes = welcome && path.below(self.rate);
        if passes {
            self.paths.count(&path);
            self.ids.count(&id);
        }
        passes
    }
}

/// 128 KiB, twice: for about as many calls as a core carries.
const ALL_BITS: u32 = 13;
/// 32 KiB, twice: Initials are rarer.
const INITIAL_BITS: u32 = 11;
/// A path's share is the rate divided by that: 200 packets a second, where a call sends about 80.
const SHARES: u16 = 10;
/// What workers, too, let one path without a session have.
const LEAST_SHARE: u16 = 8;
/// How many times its rate an ID has in all: 20,000 packets a second. To crowd a caller out takes as many, from a
/// hundred addresses; to drop them takes a worker about a fiftieth of a core.
const MOST: u16 = 10;

#[cfg(test)]
mod tests;
