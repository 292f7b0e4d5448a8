//! Clocks: the process's monotonic one, and how far those of others are from ours.
//!
//! Tickets and frames carry times. Who is far off refuses what is new or takes what is old, which looks like a broken
//! network; so it is measured with every report, said once when it begins, and named where it has consequences.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use antiphon_core::clock::Millis;
use antiphon_proto::ticket::CLOCK_SKEW_S;
use tokio::time::Instant;

use super::{Fleet, peers::Peer};

/// The process's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(&self) -> Millis {
        Self::STARTED.after(self.0.elapsed())
    }

    /// When the process started. Not zero: what happened before has a time, too.
    pub(crate) const STARTED: Millis = Millis(10 * 365 * 86_400_000);
}

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// A clock's time minus ours, both in milliseconds since the Unix epoch. Nobody means 1970: 0 is no time.
pub(super) fn ahead_ms(theirs: u64, ours: u64) -> i64 {
    if theirs == 0 {
        return 0;
    }
    let apart = i64::try_from(theirs.abs_diff(ours)).unwrap_or(i64::MAX);
    if theirs >= ours { apart } else { -apart }
}

/// Whether somebody would take our new tickets for ones from the future, and by how much they would be.
pub(super) fn too_far_behind(clock_ahead_ms: i64) -> Option<Duration> {
    (clock_ahead_ms < -LIMIT_MS).then(|| Duration::from_millis(clock_ahead_ms.unsigned_abs()))
}

/// Says once that somebody's clock went wrong, and once that it is right again.
pub(super) fn tell(kind: &str, name: &str, before_ms: i64, now_ms: i64) {
    let wrong = |ms: i64| ms.unsigned_abs() > LIMIT_MS.unsigned_abs();
    let seconds = now_ms.unsigned_abs() / 1000;
    match (wrong(before_ms), wrong(now_ms)) {
        (false, true) => {
            let side = if now_ms < 0 { "behind" } else { "ahead of" };
            tracing::warn!("clock of {kind} {name} is {seconds} s {side} this router's: fix time synchronisation");
        }
        (true, false) => tracing::info!("clock of {kind} {name} is right again"),
        _ => {}
    }
}

/// Of workers, relays and peers: the clock that is furthest from ours, milliseconds ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Furthest {
    pub(crate) workers: i64,
    pub(crate) relays: i64,
    pub(crate) peers: i64,
}

impl Fleet {
    /// How far clocks are off.
    pub(crate) fn clocks(&self) -> Furthest {
        let furthest = |all: &mut dyn Iterator<Item = i64>| all.max_by_key(|ms| ms.unsigned_abs()).unwrap_or(0);
        let state = self.state.lock();
        let reports = state.workers.values().filter(|w| w.stream.is_some()).filter_map(|w| w.report.as_ref());
        let relays = state.relays.values().filter(|r| r.stream.is_some());
        Furthest {
            workers: furthest(&mut reports.map(|r| r.clock_ahead_ms)),
            relays: furthest(&mut relays.map(|r| r.clock_ahead_ms)),
            peers: furthest(&mut state.peers.values().map(Peer::clock_ahead_ms)),
        }
    }
}

/// Beyond this, tickets are refused.
#[allow(clippy::cast_possible_wrap, reason = "seconds")]
const LIMIT_MS: i64 = CLOCK_SKEW_S as i64 * 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_too_far_behind_cannot_take_tickets() {
        let behind = |theirs, ours| too_far_behind(ahead_ms(theirs, ours));
        assert_eq!(behind(1_000_000, 1_121_000), Some(Duration::from_secs(121)));
        assert_eq!(behind(1_121_000, 1_000_000), None);
        assert_eq!(behind(1_000_000, 1_030_000), None);
        assert_eq!(behind(0, 1_030_000), None, "an older release says no time");
        assert_eq!(ahead_ms(u64::MAX, 0), i64::MAX);
    }
}
