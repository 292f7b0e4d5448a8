//! Which relay address is tried when: "happy eyeballs" (RFC 8305), as a machine without a clock.
//!
//! Attempts run beside each other. Each has a first connection ID of its own, of which a ticket brings few, so that
//! they are spent with care: an address that was not tried yet begins 250 ms after the attempt before it, or as soon as
//! that one fails; one that was is tried again only after 1.2 s, when the first packets can be taken for lost.

use std::{net::SocketAddr, time::Duration};

/// One attempt to connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attempt {
    /// Which connection ID of the ticket; never used again.
    pub(crate) id: usize,
    /// Which address of the ticket.
    pub(crate) address: usize,
}

/// The order and timing of attempts. Times are since the race began.
#[derive(Debug, Clone)]
pub(crate) struct Race {
    /// Indices into the ticket's addresses, in the order to try them.
    order: Vec<usize>,
    ids: usize,
    started: usize,
    last_start: Duration,
    failed: usize,
    /// The newest attempt has failed: nobody waits for it.
    last_failed: bool,
}

impl Race {
    /// A race to `relays` (number and address) with so many connection IDs.
    pub(crate) fn new(relays: &[(u32, SocketAddr)], ids: usize) -> Self {
        let (order, last_start) = (order(relays), Duration::ZERO);
        Self { order, ids, started: 0, last_start, failed: 0, last_failed: false }
    }

    /// The attempt to start now, if one is due. Ask again until there is none.
    pub(crate) fn poll(&mut self, now: Duration) -> Option<Attempt> {
        if self.next_timeout()? > now {
            return None;
        }
        let attempt = Attempt { id: self.started, address: self.order[self.started % self.order.len()] };
        (self.started, self.last_start, self.last_failed) = (self.started + 1, now, false);
        Some(attempt)
    }

    /// An attempt has ended without a connection.
    pub(crate) fn on_failed(&mut self, attempt: Attempt) {
        self.failed += 1;
        self.last_failed |= attempt.id + 1 == self.started;
    }

    /// When the next attempt is due; `None` if there will be none.
    pub(crate) fn next_timeout(&self) -> Option<Duration> {
        if self.order.is_empty() || self.started >= self.ids {
            return None;
        }
        let untried = self.started < self.order.len();
        Some(match (self.started, untried, self.last_failed) {
            (0, ..) | (_, true, true) => self.last_start,
            (_, true, false) => self.last_start + STAGGER,
            (_, false, _) => self.last_start + RETRY,
        })
    }

    /// When to give up what is still running; `None` while attempts are to come.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        if self.next_timeout().is_some() {
            return None;
        }
        if self.failed >= self.started { Some(Duration::ZERO) } else { Some((self.last_start + RETRY).max(PATIENCE)) }
    }

    /// The addresses that were tried, each once.
    pub(crate) fn tried(&self) -> &[usize] {
        &self.order[..self.started.min(self.order.len())]
    }

    /// How many attempts were started.
    pub(crate) const fn started(&self) -> usize {
        self.started
    }
}

/// Relays in the ticket's order. A relay's addresses follow each other, families taking turns, IPv6 first (RFC 8305,
/// section 4).
fn order(relays: &[(u32, SocketAddr)]) -> Vec<usize> {
    let mut numbers: Vec<u32> = Vec::new();
    for (number, _) in relays {
        if !numbers.contains(number) {
            numbers.push(*number);
        }
    }
    let mut order = Vec::with_capacity(relays.len());
    for number in numbers {
        let of_relay = |v6: bool| {
            let wanted =
                move |(_, (of, address)): &(usize, &(u32, SocketAddr))| *of == number && address.is_ipv6() == v6;
            relays.iter().enumerate().filter(wanted).map(|(index, _)| index)
        };
        let (mut v6, mut v4) = (of_relay(true), of_relay(false));
        loop {
            let (six, four) = (v6.next(), v4.next());
            if six.is_none() && four.is_none() {
                break;
            }
            order.extend(six.into_iter().chain(four));
        }
    }
    order
}

/// RFC 8305, section 5: "Connection Attempt Delay".
const STAGGER: Duration = Duration::from_millis(250);
/// Two retransmissions of a first packet on a path of 100 ms.
const RETRY: Duration = Duration::from_millis(1_200);
/// As long as the control plane would take to say more.
const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn relays(addresses: &[(u32, &str)]) -> Vec<(u32, SocketAddr)> {
        addresses.iter().map(|(number, address)| (*number, address.parse().unwrap())).collect()
    }

    #[test]
    fn relays_keep_their_order_and_families_take_turns() {
        let given = relays(&[
            (65, "192.0.2.1:1"),
            (66, "192.0.2.2:1"),
            (65, "[2001:db8::1]:1"),
            (65, "192.0.2.3:1"),
            (67, "[2001:db8::2]:1"),
        ]);
        assert_eq!(order(&given), [2, 0, 3, 1, 4]);
    }

    #[test]
    fn the_next_begins_after_the_delay_or_at_once_after_a_failure() {
        let given = relays(&[(65, "192.0.2.1:1"), (65, "[2001:db8::1]:1"), (66, "192.0.2.2:1")]);
        let mut race = Race::new(&given, 4);
        let first = race.poll(ms(0)).unwrap();
        assert_eq!(first, Attempt { id: 0, address: 1 });
        assert_eq!((race.poll(ms(249)), race.next_timeout()), (None, Some(ms(250))));
        let second = race.poll(ms(250)).unwrap();
        assert_eq!(second, Attempt { id: 1, address: 0 });
        race.on_failed(first);
        assert_eq!(race.poll(ms(260)), None, "another one has begun since");
        race.on_failed(second);
        assert_eq!(race.poll(ms(260)), Some(Attempt { id: 2, address: 2 }));
        assert_eq!(race.next_timeout(), Some(ms(1_460)), "all were tried: again only after a while");
        assert_eq!(race.deadline(), None);
        assert_eq!(race.poll(ms(1_460)), Some(Attempt { id: 3, address: 1 }));
        assert_eq!((race.next_timeout(), race.deadline()), (None, Some(PATIENCE)));
    }

    #[test]
    fn one_address_is_tried_again_slowly_even_if_it_refuses() {
        let mut race = Race::new(&relays(&[(65, "192.0.2.1:1")]), 3);
        for start in [0, 1_200, 2_400] {
            assert_eq!(race.next_timeout(), Some(ms(start)));
            let attempt = race.poll(ms(start)).unwrap();
            race.on_failed(attempt);
            assert_eq!(race.poll(ms(start)), None);
        }
        assert_eq!(race.deadline(), Some(Duration::ZERO), "nothing runs and nothing is to come");
    }

    /// What an address does with a first packet.
    #[derive(Debug, Clone, Copy)]
    enum Fate {
        Answers(u64),
        Refuses(u64),
        Swallows,
    }

    fn fate() -> impl Strategy<Value = Fate> {
        prop_oneof![(1_u64..900).prop_map(Fate::Answers), (0_u64..50).prop_map(Fate::Refuses), Just(Fate::Swallows)]
    }

    proptest! {
        /// Runs a race in virtual time, a millisecond a step.
        #[test]
        fn the_best_of_what_is_tried_wins_soon_and_nothing_is_used_twice(
            fates in prop::collection::vec((fate(), any::<bool>()), 1..5),
            ids in 2_usize..5,
        ) {
            let given: Vec<_> = (0_u32..).zip(&fates).map(|(number, (_, v6))| {
                let ip = if *v6 { "2001:db8::1".parse().unwrap() } else { "192.0.2.1".parse().unwrap() };
                (number, SocketAddr::new(ip, 4433))
            }).collect();
            let mut race = Race::new(&given, ids);
            let (mut running, mut used, mut starts, mut failures) = (Vec::new(), BTreeSet::new(), Vec::new(), Vec::new());
            let mut winner = None;
            for now in 0..10_000 {
                let (mut done, mut rest) = (Vec::new(), Vec::new());
                for (attempt, start) in running {
                    let Attempt { address, .. } = attempt;
                    match fates[address].0 {
                        Fate::Answers(after) if now >= start + after => winner = winner.or(Some((address, now))),
                        Fate::Refuses(after) if now >= start + after => done.push(attempt),
                        _ => rest.push((attempt, start)),
                    }
                }
                running = rest;
                for attempt in done {
                    race.on_failed(attempt);
                    failures.push(now);
                }
                while let Some(attempt) = race.poll(ms(now)) {
                    prop_assert!(used.insert(attempt.id) && attempt.id < ids, "an ID was used twice");
                    let before: Option<&(usize, u64)> = starts.last();
                    let gap = before.map(|(_, at)| now - at);
                    prop_assert!(gap.is_none_or(|gap| gap >= 250 || failures.contains(&now)), "too early");
                    let same = starts.iter().rev().find(|(address, _)| *address == attempt.address);
                    prop_assert!(same.is_none_or(|(_, at)| now - at >= 1_200), "an address was tried again too early");
                    starts.push((attempt.address, now));
                    running.push((attempt, now));
                }
                if winner.is_some() || race.deadline().is_some_and(|at| ms(now) > at) {
                    break;
                }
            }
            let tried = fates.len().min(ids);
            let soonest = fates[..tried].iter().enumerate().filter_map(|(place, (fate, _))| match fate {
                Fate::Answers(after) => Some(place as u64 * 250 + after),
                _ => None,
            });
            match (winner, soonest.min()) {
                (Some((_, at)), Some(soonest)) => prop_assert!(at <= soonest + 1, "{at} after {soonest}"),
                (None, Some(_)) => prop_assert!(false, "an address that answers was not reached"),
                (winner, None) => prop_assert!(winner.is_none()),
            }
        }
    }
}
