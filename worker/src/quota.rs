//! Token buckets in a table of fixed size: how often something may happen per key, whatever the number of keys.
//!
//! Keys share buckets by a hash with a random seed, so nobody can aim at the bucket of somebody else's key; who sprays
//! keys spends on all buckets evenly.

use std::hash::{BuildHasher as _, Hash, RandomState};

/// What one bucket allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allowance {
    /// Per second.
    pub(crate) rate: u32,
    /// At once, after a rest.
    pub(crate) burst: u32,
}

/// A table of buckets.
#[derive(Debug)]
pub(crate) struct Quota {
    allowance: Allowance,
    seed: RandomState,
    buckets: Vec<Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Thousandths of a token.
    level: u32,
    at_ms: u32,
}

impl Quota {
    /// All buckets are full.
    pub(crate) fn new(allowance: Allowance) -> Self {
        let full = Bucket { level: allowance.burst * MILLI, at_ms: 0 };
        Self { allowance, seed: RandomState::new(), buckets: vec![full; BUCKETS] }
    }

    /// Takes a token of the key's bucket if there is one. `now_ms` is any clock that counts milliseconds.
    pub(crate) fn take(&mut self, now_ms: u64, key: impl Hash) -> bool {
        let index = self.seed.hash_one(key) as usize % BUCKETS;
        let bucket = &mut self.buckets[index];
        let now_ms = now_ms as u32;
        // The clock wraps after seven weeks; what is added never fills more than the bucket holds.
        let passed = u64::from(now_ms.wrapping_sub(bucket.at_ms));
        let gained = passed.saturating_mul(self.allowance.rate.into()).min(u32::MAX.into()) as u32;
        bucket.level = bucket.level.saturating_add(gained).min(self.allowance.burst * MILLI);
        bucket.at_ms = now_ms;
        let allowed = bucket.level >= MILLI;
        if allowed {
            bucket.level -= MILLI;
        }
        allowed
    }
}

const BUCKETS: usize = 4_096;
const MILLI: u32 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn quota() -> Quota {
        Quota::new(Allowance { rate: 100, burst: 16 })
    }

    #[test]
    fn a_key_gets_its_burst_and_then_its_rate() {
        let mut quota = quota();
        assert_eq!((0..1_000).filter(|_| quota.take(5_000, "a")).count(), 16);
        assert_eq!((0..1_000).filter(|ms| quota.take(5_000 + ms, "a")).count(), 99);
        assert!(quota.take(7_000, "a"));
    }

    #[test]
    fn who_floods_under_one_key_takes_nothing_from_another() {
        let mut quota = quota();
        let mut floods = 0..;
        // Two keys that do not share a bucket; with a random seed one in 4,096 pairs does.
        let other = (0_u32..).find(|key| quota.seed.hash_one(key) as usize % BUCKETS != 1).unwrap();
        let flood = floods.find(|key: &u32| quota.seed.hash_one(key) as usize % BUCKETS == 1).unwrap();
        (0..20_000).for_each(|_| {
            quota.take(1, flood);
        });
        assert!(quota.take(1, other) && !quota.take(1, flood));
    }

    #[test]
    fn many_keys_take_no_more_memory_and_leave_everybody_something() {
        let mut quota = quota();
        let refused = (0..20_000_u32).filter(|key| !quota.take(u64::from(*key) / 20, key)).count();
        assert_eq!(quota.buckets.len(), BUCKETS);
        assert!(refused < 20, "{refused} of 20,000 keys, each used once");
    }
}
