//! Whether relays' clocks agree with ours, from the seconds in their frames' headers.
//!
//! Delay and replay make frames look older, never newer: one that is more than 9.1 hours old does not verify at all. So the
//! newest-looking frame of a while is the best measure of how far a relay's clock is ahead, and somebody who replays old
//! frames cannot make a right clock look wrong.

use std::collections::HashMap;

use antiphon_core::id::RelayNumber;

/// A relay's clock minus ours, in seconds; rounded down, so a right clock gives -1 or 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Skew {
    pub(crate) relay: RelayNumber,
    pub(crate) ahead_s: i16,
}

/// What the frames of one window said.
#[derive(Debug, Default)]
pub(crate) struct ClockSkew {
    ahead: HashMap<RelayNumber, i16>,
    window: u64,
}

impl ClockSkew {
    /// A verified frame of this relay, stale or not, was sealed `ahead_s` ahead of our clock.
    pub(crate) fn note(&mut self, relay: RelayNumber, ahead_s: i16) {
        let most = self.ahead.entry(relay).or_insert(ahead_s);
        *most = ahead_s.max(*most);
    }

    /// At the end of a window: the relay whose clock is furthest off. `now_s` is any clock that counts seconds.
    pub(crate) fn poll(&mut self, now_s: u64) -> Option<Skew> {
        let window = now_s / WINDOW_S;
        if window == self.window {
            return None;
        }
        self.window = window;
        let furthest = self.ahead.drain().max_by_key(|(_, ahead_s)| ahead_s.unsigned_abs());
        furthest.map(|(relay, ahead_s)| Skew { relay, ahead_s })
    }
}

/// From here on a clock is called wrong, in seconds: well before frames are stale, well above delay and rounding.
pub(crate) const NOTABLE_S: u16 = 5;
const WINDOW_S: u64 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn relay(n: u16) -> RelayNumber {
        RelayNumber::new(n).unwrap()
    }

    #[test]
    fn the_clock_furthest_off_is_named_once_a_window() {
        let mut skew = ClockSkew::default();
        assert_eq!(skew.poll(100), None);
        skew.note(relay(1), 0);
        skew.note(relay(2), -121);
        skew.note(relay(2), -120);
        skew.note(relay(3), 119);
        assert_eq!(skew.poll(109), None);
        assert_eq!(skew.poll(110), Some(Skew { relay: relay(2), ahead_s: -120 }));
        assert_eq!(skew.poll(120), None, "nothing was heard since");
    }

    #[test]
    fn replayed_frames_do_not_make_a_right_clock_wrong() {
        let mut skew = ClockSkew::default();
        skew.note(relay(1), -25_000);
        skew.note(relay(1), -1);
        assert_eq!(skew.poll(10), Some(Skew { relay: relay(1), ahead_s: -1 }));
    }
}
