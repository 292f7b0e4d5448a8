//! Whether what is sent still arrives: a machine without a clock.
//!
//! The worker says in every heartbeat what the newest is that has reached it, and says so more often once it hears
//! nothing. Much that was sent well before such a word and is not in it was lost: one packet or two are loss, an
//! unbroken row of them is a way that is dead in this direction. Audio comes fifty times a second, so while somebody
//! speaks that is known within a third of a second.
//!
//! When a heartbeat was sent is told by the worker's clock: how late this end comes to read it, and how long it was
//! under way, say nothing of the other direction.

use std::{collections::VecDeque, time::Duration};

/// What was sent, and what is known to have arrived. Times are since any fixed moment.
#[derive(Debug, Clone, Default)]
pub struct Uplink {
    /// When each datagram was sent, and the number of its audio; oldest first.
    sent: VecDeque<(Duration, Option<u16>)>,
    /// When the newest was sent of those that have arrived.
    arrived: Duration,
    /// Least difference of this clock, when a heartbeat came, and the worker's, when it was sent, in microseconds.
    offset_us: Option<i64>,
}

/// What a heartbeat says.
#[derive(Debug, Clone, Copy, Default)]
pub struct Word {
    /// When it came.
    pub came: Duration,
    /// The worker's clock when it was sent.
    pub sent_us: u64,
    /// When the newest heartbeat was sent that it has.
    pub echoed: Option<Duration>,
    /// Highest audio packet that it has.
    pub highest: Option<u16>,
}

/// Datagrams that should have arrived and have not: all since the newest that has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Missing {
    /// How many.
    pub count: usize,
    /// From the first to the last moment at which they could have been sent.
    pub span: Duration,
}

impl Uplink {
    /// A datagram is sent; `audio` is its number if it is audio.
    pub fn on_sent(&mut self, now: Duration, audio: Option<u16>) {
        if self.sent.len() >= MEMORY {
            self.sent.pop_front();
        }
        self.sent.push_back((now, audio));
    }

    /// When the newest was sent of those that have arrived.
    #[must_use]
    pub const fn arrived(&self) -> Duration {
        self.arrived
    }

    /// Takes what a heartbeat says; `rtt` is the path's. What was sent before `since` went another way.
    pub fn on_word(&mut self, word: Word, rtt: Duration, since: Duration) -> Missing {
        let of = |highest: u16| self.sent.iter().rev().find(|(_, audio)| *audio == Some(highest)).map(|(at, _)| *at);
        let newest = word.echoed.into_iter().chain(word.highest.and_then(of)).max();
        self.arrived = self.arrived.max(newest.unwrap_or_default());
        let told = self.sent_by_this_clock(word);
        let until = told.saturating_sub(rtt + LATE);
        let from = self.arrived.max(since);
        let count = self.sent.iter().filter(|(at, _)| *at > from && *at <= until).count();
        Missing { count, span: until.saturating_sub(from) }
    }

    /// When a heartbeat would have come that was sent with this one and not held up by anything.
    fn sent_by_this_clock(&mut self, word: Word) -> Duration {
        let signed = |us: u128| i64::try_from(us).unwrap_or(i64::MAX);
        let (came, sent) = (signed(word.came.as_micros()), i64::try_from(word.sent_us).unwrap_or(i64::MAX));
        let seen = came.saturating_sub(sent);
        // Clocks drift apart: the least difference is forgotten a little with each word.
        let offset = self.offset_us.map_or(seen, |least| seen.min(least.saturating_add(DRIFT_US)));
        self.offset_us = Some(offset);
        Duration::from_micros(u64::try_from(sent.saturating_add(offset)).unwrap_or(0)).min(word.came)
    }
}

/// Datagrams that are remembered: those of two seconds.
const MEMORY: usize = 128;
/// What a packet may take longer than half a round trip.
const LATE: Duration = Duration::from_millis(40);
/// At five words a second: 500 millionths, far more than clocks drift.
const DRIFT_US: i64 = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::{PathSelector, Switch, SwitchReason};

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn word(came: u64, sent: u64, highest: u16) -> Word {
        Word { came: ms(came), sent_us: sent * 1000, echoed: None, highest: Some(highest) }
    }

    #[test]
    fn what_is_after_the_newest_and_well_before_the_word_is_missing() {
        let mut uplink = Uplink::default();
        for n in 0..50 {
            uplink.on_sent(ms(u64::from(n) * 20), Some(n));
        }
        // The worker's clock is an hour ahead; 50 ms each way.
        let hour = 3_600_000;
        let all = uplink.on_word(word(500, hour + 450, 19), ms(100), ms(0));
        assert_eq!((all, uplink.arrived()), (Missing { count: 0, span: ms(0) }, ms(380)));
        let lost = uplink.on_word(word(800, hour + 750, 19), ms(100), ms(0));
        assert_eq!(lost.count, 14, "400 to 660");
        // Read half a second late, it says the same; and what went another way does not count.
        assert_eq!(uplink.clone().on_word(word(1_300, hour + 750, 19), ms(100), ms(0)).count, 14);
        assert_eq!(uplink.on_word(word(800, hour + 750, 19), ms(100), ms(600)).count, 3);
    }

    #[test]
    fn a_worker_that_invents_numbers_or_times_breaks_nothing() {
        let mut uplink = Uplink::default();
        uplink.on_sent(ms(20), Some(7));
        for (sent_us, highest) in [(u64::MAX, Some(9)), (0, None), (1, Some(7)), (u64::MAX / 2, Some(u16::MAX))] {
            let missing = uplink.on_word(Word { came: ms(50), sent_us, echoed: None, highest }, ms(10), ms(0));
            assert!(missing.count <= 1 && missing.span <= ms(50), "{missing:?}");
        }
    }

    /// A caller who speaks without a pause, and a worker who sends heartbeats: every 80 ms while it listens, five a second
    /// while it talks at the same time, and every 40 ms once it has heard nothing for 150 ms.
    struct Speech {
        delay: u64,
        jitter: u64,
        loss: f64,
        random: u64,
        up: bool,
        talks: bool,
        switches: Vec<(u64, Switch)>,
    }

    impl Speech {
        const fn new(delay: u64) -> Self {
            Self { delay, jitter: 0, loss: 0.0, random: 1, up: true, talks: false, switches: Vec::new() }
        }

        /// SplitMix64, between 0 and 1.
        fn random(&mut self) -> f64 {
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.random;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
        }

        /// When a packet sent now arrives; `None`: it is lost.
        fn carry(&mut self, now: u64) -> Option<u64> {
            let held = (self.random() * self.jitter as f64) as u64;
            (self.random() >= self.loss).then_some(now + self.delay + held)
        }

        /// Runs; the uplink dies at `cut`.
        fn run(&mut self, span: u64, cut: u64) {
            let (mut path, mut uplink) = (PathSelector::new(2, 0, ms(0)), Uplink::default());
            let (mut to_worker, mut to_client) = (Vec::<(u64, u16)>::new(), Vec::<(u64, Word)>::new());
            let (mut highest, mut heard, mut beat) = (None::<u16>, 0, 0);
            let rtt = ms(2 * self.delay + self.jitter);
            for now in 0..span {
                self.up = now < cut;
                for (_, number) in to_worker.extract_if(.., |p| p.0 <= now) {
                    heard = now;
                    highest = highest.max(Some(number));
                }
                for (_, word) in to_client.extract_if(.., |p| p.0 <= now) {
                    path.on_heard(0, ms(now));
                    let missing = uplink.on_word(Word { came: ms(now), ..word }, rtt, path.since());
                    path.on_confirmed(uplink.arrived());
                    path.on_missing(missing);
                }
                let silent = now - heard;
                if self.talks && now.is_multiple_of(20) {
                    path.on_heard(0, ms(now));
                }
                let interval = if self.talks { 200 } else { 80 };
                if now - beat >= interval || ((150..=1_000).contains(&silent) && now - beat >= 40) {
                    beat = now;
                    if let Some(at) = self.carry(now) {
                        to_client.push((at, Word { sent_us: now * 1000 + 77, highest, ..Word::default() }));
                    }
                }
                if now.is_multiple_of(20) {
                    let number = u16::try_from(now / 20 % 65_536).unwrap();
                    uplink.on_sent(ms(now), Some(number));
                    if let Some(at) = self.carry(now).filter(|_| self.up) {
                        to_worker.push((at, number));
                    }
                    if let Some(switch) = path.poll(ms(now), rtt + rtt / 2 + ms(25)) {
                        self.switches.push((now, switch));
                        return;
                    }
                }
            }
        }
    }

    #[test]
    fn a_dead_uplink_is_noticed_while_somebody_speaks() {
        for (delay, talks) in [1, 5, 20, 35, 50].into_iter().flat_map(|delay| [(delay, false), (delay, true)]) {
            let mut speech = Speech { talks, ..Speech::new(delay) };
            speech.run(5_000, 2_000);
            let [(at, switch)] = speech.switches[..] else { panic!("{:?}", speech.switches) };
            assert_eq!(switch, Switch { from: 0, to: 1, reason: SwitchReason::Unheard });
            assert!(at - 2_000 < 400, "{delay} ms each way: after {} ms", at - 2_000);
        }
    }

    #[test]
    fn loss_and_jitter_are_not_taken_for_a_dead_uplink() {
        for seed in 0..30 {
            let talks = seed % 2 == 0;
            let mut speech = Speech { jitter: 60, loss: 0.05, random: seed, talks, ..Speech::new(20) };
            speech.run(120_000, u64::MAX);
            assert_eq!(speech.switches, [], "seed {seed}");
        }
    }
}
