//! How much delay a stream needs: a high quantile of how late its packets were in the last seconds.

use std::time::Duration;

/// Microseconds of a frame.
pub(super) const FRAME: i64 = 20_000;

/// Largest target.
pub(super) const MOST: i64 = 200_000;

const LEAST: i64 = FRAME;
const INITIAL: i64 = 40_000;

/// Packets that are remembered: five seconds of speech.
const WINDOW: usize = 250;

/// Packets before the target may go below [`INITIAL`].
const WARM_UP: usize = 50;

/// Packets between two looks at the quantile.
const INTERVAL: u32 = 10;

/// Packets between two steps down.
const DOWN_INTERVAL: u32 = 50;

/// Share of the packets that shall be in time, in percent.
const QUANTILE: usize = 97;

/// Beyond the quantile, for the grid of 20 ms on which frames are pulled.
const MARGIN: i64 = 5_000;

/// A transit this far from the fastest is another timeline.
const JUMP: i64 = 2_000_000;

/// Packets in a row later than [`MOST`]: the path has become slower for good.
const SLOW_RUN: u32 = 5;

/// Transits are microseconds from an arbitrary origin.
#[derive(Debug)]
pub(super) struct TargetDelay {
    transits: Vec<i64>,
    oldest: usize,
    fastest: Option<i64>,
    scratch: Vec<i64>,
    target: i64,
    until_look: u32,
    since_down: u32,
    slow_run: u32,
}

impl Default for TargetDelay {
    fn default() -> Self {
        Self {
            transits: Vec::with_capacity(WINDOW),
            oldest: 0,
            fastest: None,
            scratch: Vec::with_capacity(WINDOW),
            target: INITIAL,
            until_look: INTERVAL,
            since_down: 0,
            slow_run: 0,
        }
    }
}

impl TargetDelay {
    /// Forgets the transits and keeps the target.
    pub(super) fn begin_anew(&mut self) {
        self.transits.clear();
        self.oldest = 0;
        self.fastest = None;
        self.slow_run = 0;
    }

    pub(super) fn is_jump(&self, transit: i64) -> bool {
        self.fastest.is_some_and(|fastest| (transit - fastest).abs() > JUMP)
    }

    /// How much later than the fastest.
    pub(super) fn relative(&self, transit: i64) -> i64 {
        transit - self.fastest.unwrap_or(transit)
    }

    pub(super) fn observe(&mut self, transit: i64) {
        self.slow_run = if self.relative(transit) > MOST { self.slow_run + 1 } else { 0 };
        if self.slow_run >= SLOW_RUN {
            self.begin_anew();
        }
        self.remember(transit);
        self.since_down += 1;
        self.until_look -= 1;
        if self.until_look == 0 {
            self.until_look = INTERVAL;
            self.look();
        }
    }

    pub(super) fn micros(&self) -> i64 {
        self.target
    }

    pub(super) fn get(&self) -> Duration {
        Duration::from_micros(self.target.unsigned_abs())
    }

    fn remember(&mut self, transit: i64) {
        let forgotten = if self.transits.len() < WINDOW {
            self.transits.push(transit);
            None
        } else {
            let forgotten = std::mem::replace(&mut self.transits[self.oldest], transit);
            self.oldest = (self.oldest + 1) % WINDOW;
            Some(forgotten)
        };
        let fastest = self.fastest.map_or(transit, |fastest| fastest.min(transit));
        self.fastest = if forgotten == Some(fastest) { self.transits.iter().min().copied() } else { Some(fastest) };
    }

    fn look(&mut self) {
        self.scratch.clear();
        self.scratch.extend_from_slice(&self.transits);
        let rank = (self.scratch.len() * QUANTILE / 100).min(self.scratch.len() - 1);
        let (_, &mut quantile, _) = self.scratch.select_nth_unstable(rank);
        let needed = (self.relative(quantile) + MARGIN).unsigned_abs().next_multiple_of(FRAME as u64);
        let mut needed = (needed as i64).clamp(LEAST, MOST);
        if self.transits.len() < WARM_UP {
            needed = needed.max(self.target);
        }
        if needed > self.target {
            self.target = needed;
            self.since_down = 0;
        } else if needed < self.target && self.since_down >= DOWN_INTERVAL {
            self.target -= FRAME;
            self.since_down = 0;
        }
    }
}
