//! One direction of a cable: which datagrams arrive, when, how often. Without a clock.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

/// How one direction treats datagrams. The default hurts none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Faults {
    /// What every datagram takes.
    pub(crate) delay: Duration,
    /// What it takes in addition, up to this, evenly distributed.
    pub(crate) jitter: Duration,
    /// Whether jitter lets datagrams overtake each other.
    pub(crate) overtaking: bool,
    /// Share that is lost, 0 to 1.
    pub(crate) loss: f64,
    /// Share that arrives twice, 0 to 1.
    pub(crate) duplication: f64,
    /// Largest IPv6 packet that passes, headers of 48 bytes included.
    pub(crate) mtu: usize,
}

/// What became of datagrams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Arrived, duplicates included.
    pub(crate) carried: u64,
    /// Bytes of all that entered, whatever became of them.
    pub(crate) entered_bytes: u64,
    /// Lost by chance.
    pub(crate) lost: u64,
    /// Lost because the direction was cut.
    pub(crate) cut: u64,
    /// Longer than the MTU.
    pub(crate) too_long: u64,
    /// Arrived a second time.
    pub(crate) duplicated: u64,
    /// Arrived before one that was sent earlier.
    pub(crate) overtook: u64,
    /// Bytes of the longest one that arrived.
    pub(crate) longest: usize,
}

/// A direction with what is under way in it.
#[derive(Debug)]
pub(super) struct Wire<T> {
    faults: Faults,
    random: StdRng,
    cut_until: Option<Instant>,
    under_way: BinaryHeap<Reverse<UnderWay<T>>>,
    sent: u64,
    newest_arrived: u64,
    /// When the one that was sent last arrives: without overtaking none may arrive before it.
    last_due: Option<Instant>,
    counts: Counts,
}

#[derive(Debug)]
struct UnderWay<T> {
    due: Instant,
    number: u64,
    length: usize,
    datagram: T,
}

impl Default for Faults {
    fn default() -> Self {
        let (delay, jitter) = (Duration::ZERO, Duration::ZERO);
        Self { delay, jitter, overtaking: true, loss: 0.0, duplication: 0.0, mtu: usize::MAX }
    }
}

impl<T: Clone> Wire<T> {
    pub(super) fn new(faults: Faults, seed: u64) -> Self {
        Self {
            faults,
            random: StdRng::seed_from_u64(seed),
            cut_until: None,
            under_way: BinaryHeap::new(),
            sent: 0,
            newest_arrived: 0,
            last_due: None,
            counts: Counts::default(),
        }
    }

    pub(super) const fn counts(&self) -> Counts {
        self.counts
    }

    /// Nothing enters until then; what is under way arrives.
    pub(super) fn cut(&mut self, until: Instant) {
        self.cut_until = Some(until);
    }

    /// A datagram of `length` bytes enters.
    pub(super) fn send(&mut self, now: Instant, length: usize, datagram: T) {
        self.counts.entered_bytes += length as u64;
        // All are drawn for every datagram, so that one fault's share changes nothing about the others.
        let [jitter, lost, twice] = [(); 3].map(|()| self.random.random::<f64>());
        if self.cut_until.is_some_and(|until| now < until) {
            self.counts.cut += 1;
        } else if length + HEADERS > self.faults.mtu {
            self.counts.too_long += 1;
        } else if lost < self.faults.loss {
            self.counts.lost += 1;
        } else {
            let mut due = now + self.faults.delay + self.faults.jitter.mul_f64(jitter);
            if !self.faults.overtaking {
                due = self.last_due.map_or(due, |last| last.max(due));
                self.last_due = Some(due);
            }
            if twice < self.faults.duplication {
                self.counts.duplicated += 1;
                self.enqueue(due, length, datagram.clone());
            }
            self.enqueue(due, length, datagram);
        }
    }

    fn enqueue(&mut self, due: Instant, length: usize, datagram: T) {
        self.sent += 1;
        self.under_way.push(Reverse(UnderWay { due, number: self.sent, length, datagram }));
    }

    /// When something arrives next.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse(first)| first.due)
    }

    /// The next datagram that has arrived.
    pub(super) fn poll(&mut self, now: Instant) -> Option<T> {
        self.next_due().filter(|due| *due <= now)?;
        let Reverse(UnderWay { number, length, datagram, .. }) = self.under_way.pop()?;
        self.counts.carried += 1;
        self.counts.longest = self.counts.longest.max(length);
        // Counted at those that arrive late: each of them was overtaken by one at least.
        self.counts.overtook += u64::from(number < self.newest_arrived);
        self.newest_arrived = self.newest_arrived.max(number);
        Some(datagram)
    }
}

impl<T> PartialEq for UnderWay<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T> Eq for UnderWay<T> {}

impl<T> PartialOrd for UnderWay<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for UnderWay<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

/// IPv6 and UDP.
const HEADERS: usize = 48;

mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn arrivals(faults: Faults, seed: u64) -> (Vec<(Duration, u32)>, Counts) {
        let start = Instant::now();
        let mut wire = Wire::new(faults, seed);
        for n in 0..1_000 {
            wire.send(start + n * MS, 100, n);
        }
        let mut arrived = Vec::new();
        while let Some(due) = wire.next_due() {
            arrived.push((due - start, wire.poll(due).unwrap()));
        }
        (arrived, wire.counts())
    }

    #[test]
    fn a_plain_wire_carries_everything_in_order_at_once() {
        let (arrived, counts) = arrivals(Faults::default(), 1);
        assert!(arrived.iter().all(|(at, n)| *at == *n * MS));
        assert_eq!(counts, Counts { carried: 1_000, entered_bytes: 100_000, longest: 100, ..Counts::default() });
    }

    #[test]
    fn the_seed_decides_what_is_lost_late_and_twice() {
        let faults = Faults { delay: 5 * MS, jitter: 60 * MS, loss: 0.05, duplication: 0.02, ..Faults::default() };
        let (arrived, counts) = arrivals(faults, 7);
        assert_eq!((&arrived, counts), (&arrivals(faults, 7).0, arrivals(faults, 7).1));
        assert_ne!(arrived, arrivals(faults, 8).0);
        assert!((30..=70).contains(&counts.lost), "{counts:?}");
        assert!((8..=35).contains(&counts.duplicated), "{counts:?}");
        assert!(counts.overtook > 100, "{counts:?}");
        assert!(arrived.iter().all(|(at, n)| (5 * MS..=65 * MS).contains(&(*at - *n * MS))));
    }

    #[test]
    fn without_overtaking_jitter_keeps_the_order() {
        let faults = Faults { jitter: 60 * MS, overtaking: false, ..Faults::default() };
        let (arrived, counts) = arrivals(faults, 3);
        assert!(arrived.is_sorted_by_key(|(_, n)| *n));
        assert_eq!((counts.overtook, counts.carried), (0, 1_000));
    }

    #[test]
    fn a_cut_ends_by_itself_and_the_mtu_counts_headers() {
        let start = Instant::now();
        let mut wire = Wire::new(Faults { mtu: 1_280, ..Faults::default() }, 1);
        wire.cut(start + 10 * MS);
        wire.send(start + 9 * MS, 100, 1);
        wire.send(start + 10 * MS, 1_232, 2);
        wire.send(start + 10 * MS, 1_233, 3);
        assert_eq!(wire.poll(start + 10 * MS), Some(2));
        assert_eq!(wire.poll(start + 10 * MS), None);
        let expected =
            Counts { carried: 1, cut: 1, too_long: 1, longest: 1_232, entered_bytes: 2_565, ..Counts::default() };
        assert_eq!(wire.counts(), expected);
    }
}
