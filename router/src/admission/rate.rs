//! Tickets per minute of one API key, and of one tenant at one agent; questions per minute of one key (invariant I12).
//!
//! The generic cell rate algorithm (ITU-T I.371, annex A), which is a token bucket with one number per bucket: the time
//! at which it is full again. Memory is bounded; a bucket that is full is the same as none.

use std::{collections::HashMap, hash::Hash, num::NonZeroU32, sync::Arc, time::Duration};

use antiphon_core::clock::Millis;
use parking_lot::Mutex;

use super::Admission;
use crate::{
    auth::Caller,
    create::Create,
    refusals::{Failure, Reason},
};

/// All buckets.
#[derive(Debug, Default)]
pub(super) struct Rates {
    /// By the key's hash.
    keys: Mutex<Buckets<[u8; 32]>>,
    /// By tenant and agent.
    tenants: Mutex<Buckets<(String, String)>>,
    /// Questions that go to every worker of the fleet, by the key's hash.
    questions: Mutex<Buckets<[u8; 32]>>,
    /// Sessions to be ended, likewise.
    deletions: Mutex<Buckets<[u8; 32]>>,
}

/// Buckets of one kind.
#[derive(Debug)]
struct Buckets<K> {
    /// When each is full again, microseconds.
    full_at: HashMap<K, u64>,
}

impl<K> Default for Buckets<K> {
    fn default() -> Self {
        Self { full_at: HashMap::new() }
    }
}

impl<K: Eq + Hash + Clone> Buckets<K> {
    /// Takes one token of a bucket that refills by `per_minute` and holds what comes in [`BURST`], at least one.
    ///
    /// # Errors
    /// It is empty; says when a token is there again.
    fn take(&mut self, key: &K, per_minute: NonZeroU32, now: Millis) -> Result<(), Duration> {
        let now = now.0.saturating_mul(1000);
        let interval = 60_000_000 / u64::from(per_minute.get());
        let depth = interval.max(BURST.as_micros().try_into().unwrap_or(u64::MAX));
        let full_at = self.full_at.get(key).copied().unwrap_or(0).max(now);
        let after = full_at.saturating_add(interval);
        if after > now.saturating_add(depth) {
            return Err(Duration::from_micros(after - now - depth));
        }
        if self.full_at.len() >= MAX_BUCKETS && !self.full_at.contains_key(key) {
            self.forget(now);
        }
        self.full_at.insert(key.clone(), after);
        Ok(())
    }

    /// Drops full buckets; if none is, the one that is fullest.
    fn forget(&mut self, now: u64) {
        self.full_at.retain(|_, full_at| *full_at > now);
        if self.full_at.len() >= MAX_BUCKETS {
            let fullest = self.full_at.iter().min_by_key(|(_, full_at)| **full_at);
            if let Some(key) = fullest.map(|(key, _)| key.clone()) {
                self.full_at.remove(&key);
            }
        }
    }
}

/// What an application asks about sessions that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// Which there are, or where one's packets go.
    Look,
    /// That one ends.
    Delete,
}

impl Admission {
    /// Counts a question against its key's rate.
    pub(crate) fn admit_question(&self, caller: &Caller, question: Question) -> Result<(), Failure> {
        let (buckets, per_minute, what) = match question {
            Question::Look => (&self.rates.questions, LOOKS_PER_MINUTE, "list sessions or ask for their paths"),
            Question::Delete => (&self.rates.deletions, DELETIONS_PER_MINUTE, "delete sessions"),
        };
        buckets.lock().take(&caller.sha256, per_minute, self.fleet.clock.now()).map_err(|wait| {
            let text = format!("this API key may {what} {per_minute} times a minute");
            Failure::refused(Reason::KeyLimit, text, millis(wait), vec![])
        })
    }

    /// Counts a request against the rates of its key, and of its tenant at the agent.
    pub(super) fn admit_rate(self: &Arc<Self>, caller: &Caller, create: &Create) -> Result<(), Failure> {
        let now = self.fleet.clock.now();
        let of_key = NonZeroU32::new(caller.tickets_per_minute).unwrap_or(DEFAULT_PER_MINUTE);
        self.rates.keys.lock().take(&caller.sha256, of_key, now).map_err(|wait| {
            let text = format!("this API key may ask for {of_key} tickets a minute");
            Failure::refused(Reason::KeyLimit, text, millis(wait), vec![])
        })?;
        let records = self.fleet.records();
        let of_tenant = records.agents.get(&create.agent).map_or(0, |a| a.tickets_per_minute_per_tenant);
        let Some(of_tenant) = NonZeroU32::new(of_tenant) else {
            return Ok(());
        };
        let bucket = (caller.tenant.clone(), create.agent.clone());
        self.rates.tenants.lock().take(&bucket, of_tenant, now).map_err(|wait| {
            let text = format!("{} may ask for {of_tenant} tickets a minute at {}", caller.tenant, create.agent);
            Failure::refused(Reason::TenantLimit, text, millis(wait), vec![])
        })
    }
}

/// Rounded up: who waits so long finds a token.
fn millis(wait: Duration) -> u32 {
    u32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u32::MAX)
}

/// What a key may ask for unless its record says otherwise.
const DEFAULT_PER_MINUTE: NonZeroU32 = NonZeroU32::new(30_000).expect("not zero");
/// Every worker of the fleet is asked.
const LOOKS_PER_MINUTE: NonZeroU32 = NonZeroU32::new(600).expect("not zero");
const DELETIONS_PER_MINUTE: NonZeroU32 = NonZeroU32::new(6_000).expect("not zero");
/// A bucket holds what comes in this time: 2,000 by default.
const BURST: Duration = Duration::from_secs(4);
const MAX_BUCKETS: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(per_minute: u32) -> NonZeroU32 {
        NonZeroU32::new(per_minute).unwrap()
    }

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let mut buckets = Buckets::<u32>::default();
        let mut taken = |key, now| buckets.take(&key, DEFAULT_PER_MINUTE, Millis(now)).is_ok();
        assert_eq!((0..3000).filter(|_| taken(1, 0)).count(), 2000);
        assert!(taken(2, 0), "another key has its own");
        // 500 a second.
        assert_eq!((0..3000).filter(|_| taken(1, 1000)).count(), 500);
        assert_eq!((0..30_000).filter(|n| taken(1, 1000 + n / 10)).count(), 1499);
        assert_eq!((0..3000).filter(|_| taken(1, 60_000)).count(), 2000, "never more than the bucket holds");
    }

    #[test]
    fn who_waits_as_long_as_told_finds_a_token() {
        let mut buckets = Buckets::<u32>::default();
        let (mut now, mut granted) = (0, 0);
        while now < 600_000 {
            match buckets.take(&1, rate(7), Millis(now)) {
                Ok(()) => granted += 1,
                Err(wait) => {
                    let wait = u64::from(millis(wait));
                    assert!(buckets.take(&1, rate(7), Millis(now + wait - 1)).is_err());
                    now += wait;
                }
            }
        }
        // Seven a minute for ten minutes, and the one that is there at first.
        assert_eq!(granted, 70);
    }

    #[test]
    fn memory_is_bounded_and_the_idle_go_first() {
        let mut buckets = Buckets::<usize>::default();
        for key in 0..MAX_BUCKETS {
            buckets.take(&key, rate(60), Millis(0)).unwrap();
        }
        for _ in 0..3 {
            buckets.take(&5, rate(60), Millis(0)).unwrap();
        }
        assert!(buckets.take(&5, rate(60), Millis(0)).is_err());
        buckets.take(&MAX_BUCKETS, rate(60), Millis(0)).unwrap();
        assert_eq!(buckets.full_at.len(), MAX_BUCKETS);
        assert!(buckets.take(&5, rate(60), Millis(0)).is_err(), "who used it up is not forgotten");
        buckets.take(&(MAX_BUCKETS + 1), rate(60), Millis(1001)).unwrap();
        assert_eq!(buckets.full_at.len(), 2, "full ones are as good as none");
    }
}
