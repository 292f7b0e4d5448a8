//! Which relay a live call uses: a machine without a clock.
//!
//! The call starts on the relay that carried its handshake. When nothing has come back for longer than
//! max(3 probe timeouts, 150 ms), the next relay is tried on the same connection; each gets at least one such span to
//! answer. A relay that says it will stop is left at once and becomes the last choice.

use std::time::Duration;

/// Why the call changed relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SwitchReason {
    /// The relay in use fell silent.
    Silent,
    /// The relay in use is about to stop.
    Draining,
    /// The relay's host says that nobody listens there any more (ICMP port unreachable).
    Refused,
}

/// A decision to use another relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch {
    /// Index of the relay left.
    pub from: usize,
    /// Index of the relay to use from now on.
    pub to: usize,
    /// Why.
    pub reason: SwitchReason,
}

/// Selects among the ticket's relays. Times are since any fixed moment.
#[derive(Debug, Clone)]
pub struct PathSelector {
    relays: Vec<Health>,
    active: usize,
    last_heard: Duration,
    switched_at: Duration,
    /// Relays tried since the last sign of life; widens the patience so that a dead network is not hammered.
    tried: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Health {
    draining: bool,
    failed_at: Option<Duration>,
}

impl PathSelector {
    /// Shortest silence that raises suspicion; heartbeats come at least every 100 ms.
    pub const SUSPICION: Duration = Duration::from_millis(150);

    /// Starts on relay `active` of `relays` (at least one).
    #[must_use]
    pub fn new(relays: usize, active: usize, now: Duration) -> Self {
        let relays = vec![Health::default(); relays.max(1)];
        let active = active.min(relays.len() - 1);
        Self { relays, active, last_heard: now, switched_at: now, tried: 0 }
    }

    /// Index of the relay in use.
    #[must_use]
    pub const fn active(&self) -> usize {
        self.active
    }

    /// A packet came through a relay.
    pub fn on_heard(&mut self, relay: usize, now: Duration) {
        if let Some(health) = self.relays.get_mut(relay) {
            health.failed_at = None;
        }
        // Late packets of the relay just left say nothing of the one in use.
        if relay == self.active {
            self.last_heard = now;
            self.tried = 0;
        }
    }

    /// The worker says that a relay is about to stop.
    pub fn on_draining(&mut self, relay: usize, now: Duration) -> Option<Switch> {
        self.relays.get_mut(relay)?.draining = true;
        if relay != self.active {
            return None;
        }
        self.switch(SwitchReason::Draining, now)
    }

    /// The system reports that a relay's port is closed. Off-path attackers can forge that too; all it costs is a
    /// change of relay, and no relay is returned to within [`Self::SUSPICION`].
    pub fn on_refused(&mut self, relay: usize, now: Duration) -> Option<Switch> {
        let health = self.relays.get_mut(relay)?;
        health.failed_at = Some(now);
        if relay != self.active {
            return None;
        }
        let fresh = |failed: Option<Duration>| failed.is_some_and(|at| now.saturating_sub(at) < Self::SUSPICION);
        let others = self.relays.iter().enumerate().filter(|(index, _)| *index != relay);
        if others.clone().count() == 0 || others.map(|(_, health)| health.failed_at).all(fresh) {
            return None;
        }
        self.switch(SwitchReason::Refused, now)
    }

    /// Time passed. `pto` is the connection's probe timeout (RFC 9002, section 6.2.1).
    pub fn poll(&mut self, now: Duration, pto: Duration) -> Option<Switch> {
        let patience = (3 * pto).max(Self::SUSPICION) * 2_u32.pow((self.tried / self.count()).min(4));
        let quiet_since = self.last_heard.max(self.switched_at);
        if now.saturating_sub(quiet_since) < patience {
            return None;
        }
        self.relays[self.active].failed_at = Some(now);
        self.tried += 1;
        self.switch(SwitchReason::Silent, now)
    }

    /// How long the relay in use has been silent.
    #[must_use]
    pub fn silence(&self, now: Duration) -> Duration {
        now.saturating_sub(self.last_heard)
    }

    fn count(&self) -> u32 {
        u32::try_from(self.relays.len()).unwrap_or(u32::MAX)
    }

    /// The best other relay: not draining before draining, never failed before failed longest ago, then the ticket's
    /// order after the active one.
    fn switch(&mut self, reason: SwitchReason, now: Duration) -> Option<Switch> {
        let n = self.relays.len();
        let others = (1..n).map(|step| (self.active + step) % n);
        let to = others.min_by_key(|i| (self.relays[*i].draining, self.relays[*i].failed_at))?;
        let switch = Switch { from: self.active, to, reason };
        self.active = to;
        self.switched_at = now;
        Some(switch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn silence_moves_to_the_next_relay_and_each_gets_its_chance() {
        let mut path = PathSelector::new(3, 0, ms(0));
        path.on_heard(0, ms(100));
        assert_eq!(path.poll(ms(249), ms(10)), None);
        let first = Switch { from: 0, to: 1, reason: SwitchReason::Silent };
        assert_eq!(path.poll(ms(250), ms(10)), Some(first));
        assert_eq!(path.poll(ms(399), ms(10)), None, "the new relay has its span");
        assert_eq!(path.poll(ms(400), ms(10)).map(|s| s.to), Some(2));
        path.on_heard(2, ms(410));
        assert_eq!(path.poll(ms(500), ms(10)), None);
    }

    #[test]
    fn a_long_probe_timeout_means_patience() {
        let mut path = PathSelector::new(2, 0, ms(0));
        assert_eq!(path.poll(ms(899), ms(300)), None);
        assert!(path.poll(ms(900), ms(300)).is_some());
    }

    #[test]
    fn a_draining_relay_is_left_at_once_and_comes_back_only_as_the_last_choice() {
        let mut path = PathSelector::new(3, 1, ms(0));
        assert_eq!(path.on_draining(2, ms(1)), None);
        assert_eq!(path.on_draining(1, ms(2)), Some(Switch { from: 1, to: 0, reason: SwitchReason::Draining }));
        assert_eq!(path.on_draining(9, ms(2)), None);
        assert!(path.poll(ms(152), ms(1)).is_some_and(|s| s.to == 1 || s.to == 2));
    }

    #[test]
    fn a_closed_port_is_left_at_once_but_dead_relays_are_not_hammered() {
        let mut path = PathSelector::new(2, 0, ms(0));
        assert_eq!(path.on_refused(1, ms(1)), None, "not in use");
        assert_eq!(path.on_refused(0, ms(2)), None, "the other one has just failed");
        let switch = Switch { from: 0, to: 1, reason: SwitchReason::Refused };
        assert_eq!(path.on_refused(0, ms(151)), Some(switch));
        assert_eq!(path.on_refused(1, ms(152)), None);
    }

    #[test]
    fn late_packets_of_the_old_relay_do_not_vouch_for_the_new_one() {
        let mut path = PathSelector::new(2, 0, ms(0));
        assert!(path.poll(ms(150), ms(1)).is_some());
        path.on_heard(0, ms(290));
        assert!(path.poll(ms(300), ms(1)).is_some());
    }

    #[test]
    fn one_relay_is_all_there_is() {
        let mut path = PathSelector::new(1, 0, ms(0));
        assert_eq!(path.poll(ms(1000), ms(1)), None);
        assert_eq!(path.active(), 0);
    }

    #[test]
    fn a_dead_network_is_probed_ever_more_slowly() {
        let mut path = PathSelector::new(2, 0, ms(0));
        let switches = (1..=10_000).filter(|t| path.poll(ms(*t), ms(1)).is_some()).count();
        assert!((6..=12).contains(&switches), "{switches}");
    }
}
