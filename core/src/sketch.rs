//! A bound on how often any one key comes, in memory that does not grow with the keys.
//!
//! A count-min sketch (Cormode and Muthukrishnan, 2005) with conservative update: each key has one cell in each of
//! [`ROWS`] rows, and the least of them is never below the key's true count. It counts in windows of [`WINDOW`]; what
//! is left of the window before weighs in with the share of it that is less than a window ago. Keys that share all
//! their cells are bounded together, which takes about as many busy keys at a time as a row has cells.

use std::{fmt, time::Duration};

use crate::clock::Millis;

/// Counts how often keys come. All memory is allocated by [`Self::new`].
///
/// [`Self::look`] says how often a key has come, [`Self::count`] that it has come once more. Who counts only what he
/// lets pass, and lets pass only what was [below](Sighting::below) a limit, lets each key pass at most twice the limit
/// in any time of the window's length; in the long run, the limit.
pub struct RateSketch {
    /// Row after row.
    cells: Box<[Cell]>,
    /// Cells of a row less one: all bits that an index may have.
    mask: u64,
    secret: [u64; 2],
    /// Which window the cells count.
    window: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    current: u16,
    previous: u16,
}

/// How often a key has come lately.
#[derive(Clone, Copy, Debug)]
pub struct Sighting {
    places: [usize; ROWS],
    /// Times in a window, times its milliseconds.
    weight: u64,
    least: u16,
    known: bool,
}

impl Sighting {
    /// Whether the key came fewer times than that within a window's time.
    #[must_use]
    pub const fn below(&self, limit: u16) -> bool {
        self.weight < limit as u64 * WINDOW_MS
    }

    /// Whether the key came at all, in this window or the one before.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        self.known
    }
}

impl RateSketch {
    /// A sketch of [`ROWS`] rows of 2^`bits` cells, `bits` 1 to 15. `secret`, random and the caller's own, keeps others
    /// from finding keys that share cells.
    #[must_use]
    pub fn new(bits: u32, secret: [u64; 2]) -> Self {
        let row = 1 << bits.clamp(1, MAX_BITS);
        let cells = vec![Cell::default(); ROWS * row].into_boxed_slice();
        Self { cells, mask: row as u64 - 1, secret, window: 0 }
    }

    /// How often the key has come by `now`, or more where it shares its cells. Allocates nothing.
    pub fn look(&mut self, now: Millis, key: [u64; 2]) -> Sighting {
        self.age(now);
        let places = self.places(key);
        let left = WINDOW_MS - now.0 % WINDOW_MS;
        let (mut weight, mut least, mut known) = (u64::MAX, u16::MAX, true);
        for place in places {
            let cell = self.cells[place];
            weight = weight.min(u64::from(cell.current) * WINDOW_MS + u64::from(cell.previous) * left);
            least = least.min(cell.current);
            known &= cell.current | cell.previous != 0;
        }
        Sighting { places, weight, least, known }
    }

    /// The key that was looked at has come once more. Allocates nothing.
    pub fn count(&mut self, seen: &Sighting) {
        let counted = seen.least.saturating_add(1);
        for place in seen.places {
            let cell = &mut self.cells[place];
            cell.current = cell.current.max(counted);
        }
    }

    /// Bytes that it takes, now and always.
    #[must_use]
    pub fn memory(&self) -> usize {
        size_of_val(&*self.cells)
    }

    fn age(&mut self, now: Millis) {
        let window = now.0 / WINDOW_MS;
        if window <= self.window {
            return;
        }
        let keep = window - self.window == 1;
        for cell in &mut self.cells {
            *cell = Cell { current: 0, previous: if keep { cell.current } else { 0 } };
        }
        self.window = window;
    }

    /// Multiplies the secretly masked halves and folds the product: each bit depends on all of both. Not a hash for
    /// keys that others choose freely: those have to be hashed under a key before. A connection ID's plain text is
    /// chosen by nobody outside the fleet.
    fn places(&self, [a, b]: [u64; 2]) -> [usize; ROWS] {
        let product = u128::from(a ^ self.secret[0]) * u128::from(b ^ self.secret[1]);
        let folded = (product as u64) ^ (product >> 64) as u64;
        let mixed = (folded ^ folded >> 32).wrapping_mul(MIX);
        let hash = mixed ^ mixed >> 29;
        let row = self.cells.len() / ROWS;
        std::array::from_fn(|n| n * row + (hash >> (16 * n) & self.mask) as usize)
    }
}

/// Never shows the secret.
impl fmt::Debug for RateSketch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateSketch").field("cells", &self.cells.len()).finish_non_exhaustive()
    }
}

/// Cells that each key has.
pub const ROWS: usize = 4;
/// What limits are counted over.
pub const WINDOW: Duration = Duration::from_secs(1);
const WINDOW_MS: u64 = 1000;
const MAX_BITS: u32 = 15;
/// Odd, with bits all over (the golden ratio).
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECRET: [u64; 2] = [0x0123_4567_89ab_cdef, 0x1357_9bdf_0246_8ace];

    /// Lets pass and counts what is below a limit.
    struct Gate {
        sketch: RateSketch,
        limit: u16,
    }

    impl Gate {
        fn admit(&mut self, now: Millis, key: [u64; 2]) -> bool {
            let seen = self.sketch.look(now, key);
            let passes = seen.below(self.limit);
            if passes {
                self.sketch.count(&seen);
            }
            passes
        }
    }

    fn gate(limit: u16) -> Gate {
        Gate { sketch: RateSketch::new(13, SECRET), limit }
    }

    /// A server ID and a nonce that counts up, as connection IDs of one worker have them.
    fn key(n: u64) -> [u64; 2] {
        [0x0040_0001_dead_beef, n]
    }

    #[test]
    fn a_steady_key_below_the_limit_always_passes_and_a_flood_only_at_the_limit() {
        let mut gate = gate(2000);
        let (mut flood, mut caller) = (0, 0);
        // 100,000 packets a second of one key for ten seconds, 50 a second of another.
        for n in 0..1_000_000_u64 {
            let now = Millis(n / 100);
            flood += u64::from(gate.admit(now, key(1)));
            if n % 2000 == 0 {
                caller += u64::from(gate.admit(now, key(2)));
            }
        }
        assert_eq!(caller, 500);
        assert!((19_000..=22_000).contains(&flood), "{flood}");
    }

    #[test]
    fn twenty_thousand_busy_keys_do_not_push_each_other_out() {
        let mut gate = gate(2000);
        for round in 0..60 {
            for n in 0..20_000 {
                assert!(gate.admit(Millis(round * 20), key(n)), "key {n} in round {round}");
            }
        }
    }

    #[test]
    fn many_floods_cost_a_caller_nothing() {
        let mut gate = gate(2000);
        for ms in 0..5000 {
            for n in 0..200 {
                let _ = gate.admit(Millis(ms), key(1_000_000 + ms % 7 * 200 + n));
            }
            assert!(ms % 20 != 0 || gate.admit(Millis(ms), key(7)), "at {ms} ms");
        }
    }

    #[test]
    fn a_pause_forgets_and_a_clock_that_stands_does_not() {
        let mut gate = gate(3);
        let mut pass = |ms| (0..10).filter(|_| gate.admit(Millis(ms), key(1))).count();
        assert_eq!((pass(10_500), pass(10_500)), (3, 0));
        assert_eq!(pass(11_000), 0, "the whole window before counts still");
        assert_eq!(pass(11_500), 2, "half of it");
        assert_eq!(pass(40_000), 3);
        assert_eq!(pass(39_000), 0, "an earlier moment is the present one");
    }

    #[test]
    fn a_key_is_known_for_the_window_after_the_one_that_it_came_in() {
        let mut sketch = RateSketch::new(13, SECRET);
        let seen = sketch.look(Millis(10_400), key(1));
        assert!(!seen.is_known() && seen.below(1) && !seen.below(0));
        sketch.count(&seen);
        let mut known = |ms| sketch.look(Millis(ms), key(1)).is_known();
        assert!(known(10_400) && known(11_999) && !known(12_000));
        assert!(!sketch.look(Millis(11_000), key(2)).is_known());
    }

    #[test]
    fn memory_is_constant() {
        let mut gate = gate(2000);
        let before = gate.sketch.memory();
        for n in 0..1_000_000 {
            let _ = gate.admit(Millis(n / 100), key(n));
        }
        assert_eq!((before, gate.sketch.memory()), (128 * 1024, 128 * 1024));
        assert!(!format!("{:?}", gate.sketch).contains("secret"));
    }

    proptest! {
        #[test]
        fn no_key_ever_passes_more_often_than_the_bound(
            secret: [u64; 2], limit in 1u16..50,
            steps in proptest::collection::vec((0u64..120, 0u64..6), 1..2000),
        ) {
            // Few cells: keys share them, which may refuse more and never less.
            let mut gate = Gate { sketch: RateSketch::new(2, secret), limit };
            let mut now = 0;
            let mut passed: Vec<Vec<u64>> = vec![Vec::new(); 6];
            for (pause, who) in steps {
                now += pause / 4;
                if gate.admit(Millis(now), key(who)) {
                    passed[who as usize].push(now);
                }
            }
            for times in &passed {
                for (first, start) in times.iter().enumerate() {
                    let within = times[first..].iter().take_while(|t| **t < start + WINDOW_MS).count();
                    prop_assert!(within <= 2 * usize::from(limit), "{within} from {start} on");
                    let same = times[first..].iter().take_while(|t| **t / WINDOW_MS == start / WINDOW_MS).count();
                    prop_assert!(same <= usize::from(limit));
                }
            }
        }

        #[test]
        fn a_key_alone_is_refused_only_at_its_limit(limit in 1u16..500, rate in 1u64..100, seconds in 1u64..5) {
            let mut gate = gate(limit);
            let step = 1000 / rate;
            for n in 0..rate * seconds {
                let passes = gate.admit(Millis(n * step), key(9));
                prop_assert!(passes || 1000 / step + 1 >= u64::from(limit));
            }
        }
    }
}
