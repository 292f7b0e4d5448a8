//! Which relay a live call uses: a machine without a clock.
//!
//! The call starts on the relay that carried its handshake. When nothing has come back for longer than
//! max(3 probe timeouts, 150 ms), the next relay is tried on the same connection; each gets at least one such span to
//! answer. The same is done when the worker is heard but says that nothing reaches it: a way can be dead in one
//! direction only. How soon that is known depends on how much was said meanwhile ([`Missing`]). A relay that says it will stop is left at once and becomes the last choice.

use std::time::Duration;

use crate::uplink::Missing;

/// Why the call changed relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SwitchReason {
    /// The relay in use fell silent.
    Silent,
    /// The relay in use is about to stop.
    Draining,
    /// The relay's host says that nobody listens there any more (ICMP port unreachable).
    Refused,
    /// The worker is heard and says that nothing of ours reaches it any more.
    Unheard,
    /// The network that the call is on now has no way to the relay before.
    Unreachable,
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
    /// When the newest was sent of what the worker says has reached it.
    confirmed: Duration,
    switched_at: Duration,
    /// What was sent on the present way and should have arrived, and has not.
    missing: Missing,
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
    /// Longest time, beside the patience of silence, until something that was sent is confirmed: both ends send a
    /// heartbeat every 200 ms at least, and one of either may be lost.
    pub const CONFIRMATION: Duration = Duration::from_millis(600);
    /// For how long nothing of what was sent has arrived before the way counts as dead, if it was [`Self::IN_A_ROW`]
    /// datagrams at least. Fewer, or over a shorter time, is what loss and jitter do.
    pub const MISSING: Duration = Duration::from_millis(180);
    /// As many datagrams as are hardly ever lost one after the other by chance.
    pub const IN_A_ROW: usize = 6;

    /// Starts on relay `active` of `relays` (at least one).
    #[must_use]
    pub fn new(relays: usize, active: usize, now: Duration) -> Self {
        let relays = vec![Health::default(); relays.max(1)];
        let active = active.min(relays.len() - 1);
        Self {
            relays,
            active,
            last_heard: now,
            confirmed: now,
            switched_at: now,
            missing: Missing::default(),
            tried: 0,
        }
    }

    /// Index of the relay in use.
    #[must_use]
    pub const fn active(&self) -> usize {
        self.active
    }

    /// A packet came through a relay. That alone does not mend one that had failed: it may carry one direction only.
    pub fn on_heard(&mut self, relay: usize, now: Duration) {
        // Late packets of the relay just left say nothing of the one in use.
        if relay == self.active {
            self.last_heard = now;
        }
    }

    /// The worker says that what was sent at `sent` has reached it.
    pub fn on_confirmed(&mut self, sent: Duration) {
        self.confirmed = self.confirmed.max(sent);
        // Through the relay in use: it works in both directions.
        if sent > self.switched_at {
            self.tried = 0;
            self.relays[self.active].failed_at = None;
        }
    }

    /// What has not arrived, by the worker's newest word; it says so anew with each.
    pub const fn on_missing(&mut self, missing: Missing) {
        self.missing = missing;
    }

    /// When the present way came into use.
    #[must_use]
    pub const fn since(&self) -> Duration {
        self.switched_at
    }

    /// For how long nothing has been sent on the present way that the worker has confirmed.
    #[must_use]
    pub fn unconfirmed(&self, now: Duration) -> Duration {
        now.saturating_sub(self.confirmed.max(self.switched_at))
    }

    /// The socket had to move to another relay by itself.
    pub fn on_moved(&mut self, relay: usize, now: Duration) -> Option<Switch> {
        (self.switched_at, self.missing) = (now, Missing::default());
        if relay == self.active || relay >= self.relays.len() {
            return None;
        }
        let switch = Switch { from: self.active, to: relay, reason: SwitchReason::Unreachable };
        self.relays[self.active].failed_at = Some(now);
        self.active = relay;
        Some(switch)
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
        let backoff = 2_u32.pow((self.tried / self.count()).min(4));
        let patience = (3 * pto).max(Self::SUSPICION) * backoff;
        let row = self.missing.count >= Self::IN_A_ROW && self.missing.span >= Self::MISSING * backoff;
        let quiet_since = self.last_heard.max(self.switched_at);
        let reason = if now.saturating_sub(quiet_since) >= patience {
            SwitchReason::Silent
        } else if row || self.unconfirmed(now) >= patience + Self::CONFIRMATION {
            SwitchReason::Unheard
        } else {
            return None;
        };
        self.relays[self.active].failed_at = Some(now);
        self.tried += 1;
        self.switch(reason, now)
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
        (self.switched_at, self.missing) = (now, Missing::default());
        Some(switch)
    }
}

#[cfg(test)]
mod tests;
