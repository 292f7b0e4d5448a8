//! Who may be connected to a port that anybody reaches: so many in all, so many of one source.
//!
//! Connections that have proved nothing (no certificate, no key, no whole request) may be anybody's, and cost an attacker
//! nothing to hold. So a full port turns nobody away for them: the oldest of them makes room, of the network that has most.
//! Who comes with one connection stays as long as attackers do not hold as many networks as the port has places.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// The connections of one port.
#[derive(Clone, Debug)]
pub struct Crowd(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    most: usize,
    most_of_source: usize,
    members: Mutex<Members>,
}

#[derive(Debug, Default)]
struct Members {
    next: u64,
    all: HashMap<u64, Member>,
    by_source: HashMap<IpAddr, usize>,
    /// Those without proof, oldest first, by network.
    unproven: HashMap<IpAddr, BTreeSet<u64>>,
}

#[derive(Debug)]
struct Member {
    address: IpAddr,
    leave: CancellationToken,
}

/// What was full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// What one source may have.
    Source,
    /// What all together may have.
    Total,
}

/// What came of an arrival.
#[derive(Debug)]
pub struct Entry {
    /// `None`: turned away, as everybody inside has proved who they are.
    pub place: Option<Place>,
    /// It was full: somebody was turned away, this one or another.
    pub bound: Option<Bound>,
}

/// One connection's place. Dropping it frees it.
#[derive(Debug)]
#[must_use = "dropping it frees the place"]
pub struct Place {
    crowd: Crowd,
    number: u64,
    leave: CancellationToken,
}

impl Crowd {
    /// At most so many connections in all, and of one source: an IPv4 address, or a /64 of IPv6, which one host may use
    /// freely (RFC 4291, section 2.5.4).
    #[must_use]
    pub fn new(most: usize, most_of_source: usize) -> Self {
        Self(Arc::new(Inner { most, most_of_source, members: Mutex::default() }))
    }

    /// Somebody connects.
    #[must_use]
    pub fn enter(&self, address: IpAddr) -> Entry {
        let address = address.to_canonical();
        let mut members = self.0.members.lock();
        let bound = if members.by_source.get(&source(address)).is_some_and(|count| *count >= self.0.most_of_source) {
            Some(Bound::Source)
        } else if members.all.len() >= self.0.most {
            Some(Bound::Total)
        } else {
            None
        };
        let leaver = match bound {
            None => None,
            Some(Bound::Source) => members.oldest_of(source(address)),
            Some(Bound::Total) => members.oldest_of_most(),
        };
        match leaver {
            Some(number) => members.remove(number),
            None if bound.is_some() => return Entry { place: None, bound },
            None => {}
        }
        let leave = CancellationToken::new();
        let number = members.insert(address, leave.clone());
        drop(members);
        Entry { place: Some(Place { crowd: self.clone(), number, leave }), bound }
    }
}

impl Members {
    fn insert(&mut self, address: IpAddr, leave: CancellationToken) -> u64 {
        let number = self.next;
        self.next += 1;
        self.all.insert(number, Member { address, leave });
        *self.by_source.entry(source(address)).or_default() += 1;
        self.unproven.entry(network(address)).or_default().insert(number);
        number
    }

    fn oldest_of(&self, wanted: IpAddr) -> Option<u64> {
        let of_network = self.unproven.get(&network(wanted))?;
        of_network.iter().copied().find(|number| self.all.get(number).is_some_and(|m| source(m.address) == wanted))
    }

    fn oldest_of_most(&self) -> Option<u64> {
        // The older one of two equally large networks.
        let largest =
            self.unproven.values().max_by_key(|numbers| (numbers.len(), std::cmp::Reverse(numbers.first())))?;
        largest.first().copied()
    }

    fn prove(&mut self, number: u64) {
        let Some(network) = self.all.get(&number).map(|member| network(member.address)) else {
            return;
        };
        if let Some(numbers) = self.unproven.get_mut(&network) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.unproven.remove(&network);
            }
        }
    }

    fn remove(&mut self, number: u64) {
        self.prove(number);
        let Some(member) = self.all.remove(&number) else {
            return;
        };
        member.leave.cancel();
        let source = source(member.address);
        if let Some(count) = self.by_source.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                self.by_source.remove(&source);
            }
        }
    }
}

impl Place {
    /// The other end has proved who it is: it is not turned away any more.
    pub fn prove(&self) {
        self.crowd.0.members.lock().prove(self.number);
    }

    /// Waits until somebody else needs the place.
    pub async fn taken(&self) {
        self.leave.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.crowd.0.members.lock().remove(self.number);
    }
}

fn source(address: IpAddr) -> IpAddr {
    truncated(address, 32, 64)
}

/// What one attacker easily has many addresses of.
fn network(address: IpAddr) -> IpAddr {
    truncated(address, 24, 48)
}

fn truncated(address: IpAddr, bits_v4: u32, bits_v6: u32) -> IpAddr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & u32::MAX << (32 - bits_v4)).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & u128::MAX << (128 - bits_v6)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(crowd: &Crowd, address: &str) -> (Place, Option<Bound>) {
        let entry = crowd.enter(address.parse().unwrap());
        (entry.place.expect("there is room"), entry.bound)
    }

    fn is_taken(place: &Place) -> bool {
        place.leave.is_cancelled()
    }

    #[test]
    fn a_source_that_wants_more_than_its_share_loses_its_own_oldest() {
        let crowd = Crowd::new(100, 3);
        let held: Vec<_> = (0..3).map(|_| enter(&crowd, "192.0.2.1").0).collect();
        let (neighbour, bound) = enter(&crowd, "192.0.2.2");
        assert_eq!(bound, None);
        // The same address as a dual-stack socket shows it.
        let (_newest, bound) = enter(&crowd, "::ffff:192.0.2.1");
        assert_eq!(bound, Some(Bound::Source));
        assert_eq!([&held[0], &held[1], &held[2], &neighbour].map(is_taken), [true, false, false, false]);
    }

    #[test]
    fn whoever_proved_himself_stays_and_is_counted() {
        let crowd = Crowd::new(100, 2);
        let held = [enter(&crowd, "192.0.2.1").0, enter(&crowd, "192.0.2.1").0];
        held[0].prove();
        let _third = enter(&crowd, "192.0.2.1");
        assert_eq!([&held[0], &held[1]].map(is_taken), [false, true]);
        let crowd = Crowd::new(1, 1);
        let (only, _) = enter(&crowd, "192.0.2.1");
        only.prove();
        let refused = crowd.enter("192.0.2.9".parse().unwrap());
        assert!(refused.place.is_none() && refused.bound == Some(Bound::Total));
        drop(only);
        assert_eq!(enter(&crowd, "192.0.2.9").1, None);
    }

    #[test]
    fn a_full_port_takes_the_place_of_the_largest_network() {
        let crowd = Crowd::new(20, 10);
        let (honest, _) = enter(&crowd, "198.51.100.7");
        // One /48 with a different /64 each time.
        let mut flood = Vec::new();
        for subnet in 0..500 {
            flood.push(enter(&crowd, &format!("2001:db8:0:{subnet:x}::1")).0);
        }
        assert!(!is_taken(&honest), "one connection of another network stays");
        assert_eq!(flood.iter().filter(|place| !is_taken(place)).count(), 19);
        assert!(flood[481..].iter().all(|place| !is_taken(place)), "the newest are there");
        drop((honest, flood));
        let members = crowd.0.members.lock();
        assert_eq!((members.all.len(), members.by_source.len(), members.unproven.len()), (0, 0, 0));
    }
}
