//! Time as values: the session's sample clock and the process's monotonic milliseconds.

use std::{
    fmt,
    ops::{Add, Sub},
    time::Duration,
};

/// A position on the session's clock: samples at 48 kHz since the session's first moment.
///
/// All positions of a session, whatever the codec, are on this clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SamplePosition(u64);

impl SamplePosition {
    /// Samples per second.
    pub const RATE: u32 = 48_000;
    /// Samples in one 20 ms frame.
    pub const FRAME: u64 = 960;
    /// The session's beginning.
    pub const ZERO: Self = Self(0);

    /// The position `samples` after the beginning.
    #[must_use]
    pub const fn new(samples: u64) -> Self {
        Self(samples)
    }

    /// The position after `elapsed`, rounded down to a sample.
    #[must_use]
    pub fn after(elapsed: Duration) -> Self {
        let whole = elapsed.as_secs().saturating_mul(u64::from(Self::RATE));
        let part = u64::from(elapsed.subsec_nanos()) * u64::from(Self::RATE) / 1_000_000_000;
        Self(whole.saturating_add(part))
    }

    /// Samples since the beginning.
    #[must_use]
    pub const fn samples(self) -> u64 {
        self.0
    }

    /// Time since the beginning.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        let rate = u64::from(Self::RATE);
        Duration::new(self.0 / rate, 0) + Duration::from_nanos(self.0 % rate * 1_000_000_000 / rate)
    }
}

/// Moves on by a number of 48 kHz samples; stays at the end of the range.
impl Add<u64> for SamplePosition {
    type Output = Self;

    fn add(self, samples: u64) -> Self {
        Self(self.0.saturating_add(samples))
    }
}

/// Samples from `earlier` to here; zero if it is not earlier.
impl Sub for SamplePosition {
    type Output = u64;

    fn sub(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// `12.345 s`.
impl fmt::Display for SamplePosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} s", self.elapsed().as_secs_f64())
    }
}

/// Milliseconds of a monotonic clock whose zero only its owner knows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Millis(pub u64);

impl Millis {
    /// The moment `duration` later; stays at the end of the range.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Time from `earlier` to here; zero if it is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_durations_agree() {
        assert_eq!(SamplePosition::after(Duration::from_millis(20)).samples(), SamplePosition::FRAME);
        let day = Duration::from_secs(86_400);
        assert_eq!(SamplePosition::after(day).elapsed(), day);
        assert_eq!(SamplePosition::new(5) - SamplePosition::new(7), 0);
        assert_eq!(SamplePosition::new(72_000).to_string(), "1.500 s");
    }
}
