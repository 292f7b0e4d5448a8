//! The planned stop: workers are told, clients move away, and the relay forwards until they have.

use std::time::{Duration, Instant};

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Tell every worker that the relay stops in `left` at the latest.
    Notify {
        /// Until the deadline.
        left: Duration,
    },
    /// Nothing before then.
    WaitUntil(Instant),
    /// The relay may go.
    Done(Reason),
}

/// Why a drain is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No client's datagram has come for [`QUIET`].
    Quiet,
    /// The deadline has come while clients were still sending.
    Deadline,
}

/// A planned stop under way.
#[derive(Clone, Debug)]
pub struct Drain {
    began: Instant,
    deadline: Instant,
    next_notice: Instant,
}

impl Drain {
    /// Begins at `now` and ends after `limit` at the latest.
    #[must_use]
    pub fn new(now: Instant, limit: Duration) -> Self {
        Self { began: now, deadline: now + limit, next_notice: now }
    }

    /// The next step at `now`, when the last genuine datagram of a client came at `last_datagram`, if any did.
    pub fn poll(&mut self, now: Instant, last_datagram: Option<Instant>) -> Step {
        let quiet_at = last_datagram.map_or(self.began, |at| at.max(self.began)) + QUIET;
        if now >= quiet_at {
            return Step::Done(Reason::Quiet);
        }
        if now >= self.deadline {
            return Step::Done(Reason::Deadline);
        }
        if now >= self.next_notice {
            self.next_notice = now + NOTICE_INTERVAL;
            return Step::Notify { left: self.deadline - now };
        }
        Step::WaitUntil(self.next_notice.min(quiet_at).min(self.deadline))
    }
}

/// Silence of all clients that ends a drain.
pub const QUIET: Duration = Duration::from_secs(1);

/// Notices may get lost, so they are repeated.
pub const NOTICE_INTERVAL: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn notices_repeat_until_clients_are_quiet() {
        let start = Instant::now();
        let mut drain = Drain::new(start, 10_000 * MS);
        let (mut now, mut notices) = (start, 0);
        let talks_until = start + 1500 * MS;
        loop {
            match drain.poll(now, Some(now.min(talks_until))) {
                Step::Notify { .. } => notices += 1,
                Step::WaitUntil(at) => {
                    assert!(at > now);
                    now = at.min(now + 10 * MS);
                }
                Step::Done(reason) => {
                    assert_eq!(reason, Reason::Quiet);
                    break;
                }
            }
        }
        assert_eq!((now - start, notices), (2500 * MS, 13));
    }

    #[test]
    fn a_relay_without_clients_goes_after_one_quiet_second() {
        let start = Instant::now();
        let mut drain = Drain::new(start, 10_000 * MS);
        assert_eq!(drain.poll(start, None), Step::Notify { left: 10_000 * MS });
        assert_eq!(drain.poll(start, None), Step::WaitUntil(start + 200 * MS));
        assert_eq!(drain.poll(start + 1000 * MS, None), Step::Done(Reason::Quiet));
    }

    #[test]
    fn the_deadline_holds_against_clients_that_stay() {
        let start = Instant::now();
        let mut drain = Drain::new(start, 3000 * MS);
        let end = start + 3000 * MS;
        assert_eq!(drain.poll(end - MS, Some(end - MS)), Step::Notify { left: MS });
        assert_eq!(drain.poll(end - MS, Some(end - MS)), Step::WaitUntil(end));
        assert_eq!(drain.poll(end, Some(end)), Step::Done(Reason::Deadline));
    }
}
