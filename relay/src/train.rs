//! Datagrams grouped into trains: one system call, and one walk through the kernel, for many of them.
//!
//! A train goes to one address with one ECN mark; its segments have one size, only the last may be shorter (Linux,
//! `UDP_SEGMENT`). Behind a tunnel header datagrams of different clients can share a train. All memory is allocated
//! once; trains leave when the batch ends, so nothing waits for company.

use std::net::SocketAddr;

use antiphon_core::tunnel::Ecn;

use crate::metrics::Way;

/// Where a datagram goes, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Whither.
    pub destination: SocketAddr,
    /// For the IP header.
    pub ecn: Ecn,
    /// What it counts as.
    pub way: Way,
}

/// One leg, many datagrams.
#[derive(Debug)]
pub struct Train {
    leg: Leg,
    segment: usize,
    /// A shorter segment ended it.
    closed: bool,
    segments: usize,
    bytes: Vec<u8>,
}

impl Train {
    fn new() -> Self {
        Self {
            leg: Leg { destination: SocketAddr::from(([0, 0, 0, 0], 0)), ecn: Ecn::NotEct, way: Way::Up },
            segment: 0,
            closed: true,
            segments: 0,
            bytes: Vec::with_capacity(MAX_BYTES),
        }
    }

    /// Where to.
    #[must_use]
    pub const fn leg(&self) -> Leg {
        self.leg
    }

    /// Bytes of every segment but the last, which may be shorter.
    #[must_use]
    pub const fn segment_size(&self) -> usize {
        self.segment
    }

    /// How many datagrams.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.segments
    }

    /// Never true for a train that is handed out.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.segments == 0
    }

    /// All segments, one behind the other.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn begin(&mut self, leg: Leg, segment: usize) {
        self.leg = leg;
        self.segment = segment;
        self.closed = segment > MAX_SEGMENT;
        self.segments = 0;
        self.bytes.clear();
    }

    fn has_room(&self, len: usize) -> bool {
        !self.closed && len <= self.segment && self.segments < MAX_SEGMENTS && self.bytes.len() + len <= MAX_BYTES
    }

    fn add(&mut self, head: &[u8], body: &[u8]) {
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(body);
        self.segments += 1;
        self.closed |= head.len() + body.len() < self.segment;
    }
}

/// Which train a datagram may join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// Only the latest to its destination: keeps the order of all datagrams there.
    Latest,
    /// Any of its size: datagrams of different senders overtake each other, those of one [`Trains::message`] do not.
    SameSize,
}

/// No train is left: send them all, then try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// The trains of one batch.
#[derive(Debug)]
pub struct Trains {
    trains: Vec<Train>,
    used: usize,
    /// The train of the same message's previous datagram.
    previous: Option<usize>,
}

impl Default for Trains {
    fn default() -> Self {
        Self::new()
    }
}

impl Trains {
    /// Allocates all memory: about 2 MiB, touched as it is used.
    #[must_use]
    pub fn new() -> Self {
        Self { trains: (0..MAX_TRAINS).map(|_| Train::new()).collect(), used: 0, previous: None }
    }

    /// The datagrams that follow are of another sender.
    pub const fn message(&mut self) {
        self.previous = None;
    }

    /// Adds the datagram `head || body`, at most [`MAX_BYTES`] long, to a train.
    ///
    /// # Errors
    /// [`Full`]; the datagram was not added.
    pub fn push(&mut self, leg: Leg, join: Join, head: &[u8], body: &[u8]) -> Result<(), Full> {
        let len = head.len() + body.len();
        let joined = match join {
            Join::Latest => self.latest(leg, len),
            Join::SameSize => self.of_same_size(leg, len),
        };
        let index = match joined {
            Some(index) => index,
            None if self.used == MAX_TRAINS => return Err(Full),
            None => {
                self.trains[self.used].begin(leg, len);
                self.used += 1;
                self.used - 1
            }
        };
        self.trains[index].add(head, body);
        self.previous = Some(index);
        Ok(())
    }

    fn latest(&self, leg: Leg, len: usize) -> Option<usize> {
        let index = self.trains[..self.used].iter().rposition(|t| t.leg.destination == leg.destination)?;
        let train = &self.trains[index];
        (train.leg == leg && train.has_room(len)).then_some(index)
    }

    /// A shorter datagram ends its predecessor's train rather than overtake it in another one.
    fn of_same_size(&self, leg: Leg, len: usize) -> Option<usize> {
        let fits = |t: &Train| t.leg == leg && t.has_room(len);
        if let Some(index) = self.previous
            && fits(&self.trains[index])
        {
            return Some(index);
        }
        self.trains[..self.used].iter().position(|t| t.segment == len && fits(t))
    }

    /// Hands out all trains in the order in which they began, and is empty then.
    pub fn drain(&mut self, mut send: impl FnMut(&Train)) {
        self.trains[..self.used].iter().for_each(&mut send);
        self.used = 0;
        self.previous = None;
    }
}

/// Segments that Linux takes in one call (`UDP_MAX_SEGMENTS` of old kernels).
pub const MAX_SEGMENTS: usize = 64;

/// Bytes of a train: what an IP packet holds, less its headers.
pub const MAX_BYTES: usize = 65_000;

/// Longer datagrams travel alone: this length passes every IPv6 path (1,280 less 48 bytes of headers), so no train is
/// refused for its size. Such a refusal looks like missing hardware support and would end segmentation for good.
pub const MAX_SEGMENT: usize = 1232;

const MAX_TRAINS: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn to(n: u16, ecn: Ecn) -> Leg {
        Leg { destination: SocketAddr::from(([127, 0, 0, 1], n)), ecn, way: Way::Up }
    }

    fn drained(trains: &mut Trains) -> Vec<(u16, Ecn, usize, usize, usize)> {
        let mut all = Vec::new();
        trains.drain(|t| {
            all.push((t.leg().destination.port(), t.leg().ecn, t.segment_size(), t.len(), t.bytes().len()));
        });
        all
    }

    #[test]
    fn same_size_groups_by_destination_size_and_mark() {
        let mut trains = Trains::new();
        for (port, ecn, len) in [
            (1, Ecn::Ect0, 160),
            (1, Ecn::Ect0, 120),
            (1, Ecn::Ect0, 160),
            (2, Ecn::Ect0, 160),
            (1, Ecn::Ce, 160),
            (1, Ecn::Ect0, 120),
        ] {
            trains.message();
            trains.push(to(port, ecn), Join::SameSize, &[0; 32], &vec![0; len]).unwrap();
        }
        let expected = [
            (1, Ecn::Ect0, 192, 2, 384),
            (1, Ecn::Ect0, 152, 2, 304),
            (2, Ecn::Ect0, 192, 1, 192),
            (1, Ecn::Ce, 192, 1, 192),
        ];
        assert_eq!(drained(&mut trains), expected);
        assert!(drained(&mut trains).is_empty());
    }

    #[test]
    fn a_message_ends_with_its_shorter_datagram_in_the_same_train() {
        let mut trains = Trains::new();
        let mut push = |len| trains.push(to(1, Ecn::NotEct), Join::SameSize, &[], &vec![0; len]).unwrap();
        [300, 1200, 1200, 300, 1200].into_iter().for_each(&mut push);
        let trains: Vec<_> = drained(&mut trains).iter().map(|t| (t.2, t.3, t.4)).collect();
        assert_eq!(trains, [(300, 1, 300), (1200, 3, 2700), (1200, 1, 1200)]);
    }

    #[test]
    fn latest_never_lets_a_datagram_overtake() {
        let mut trains = Trains::new();
        for len in [100, 100, 50, 100, 100, 200] {
            trains.push(to(1, Ecn::NotEct), Join::Latest, &[], &vec![0; len]).unwrap();
        }
        let trains: Vec<_> = drained(&mut trains).iter().map(|t| (t.2, t.3, t.4)).collect();
        assert_eq!(trains, [(100, 3, 250), (100, 2, 200), (200, 1, 200)]);
    }

    #[test]
    fn long_datagrams_travel_alone() {
        let mut trains = Trains::new();
        for _ in 0..2 {
            trains.push(to(1, Ecn::NotEct), Join::SameSize, &[], &[0; MAX_SEGMENT + 1]).unwrap();
        }
        assert!(drained(&mut trains).iter().all(|t| t.3 == 1));
    }

    #[test]
    fn memory_is_bounded() {
        let mut trains = Trains::new();
        let port = |n: usize| to(u16::try_from(n).unwrap(), Ecn::NotEct);
        for n in 0..MAX_TRAINS {
            trains.push(port(n), Join::Latest, &[], &[0; 10]).unwrap();
        }
        assert_eq!(trains.push(port(MAX_TRAINS), Join::Latest, &[], &[0; 10]), Err(Full));
        trains.drain(|_| {});
        assert!(trains.push(port(MAX_TRAINS), Join::Latest, &[], &[0; 10]).is_ok());
    }

    proptest! {
        #[test]
        fn every_train_is_one_that_the_kernel_takes_and_nothing_is_lost(
            datagrams in proptest::collection::vec((1u16..4, 1usize..1500, any::<bool>(), any::<bool>()), 0..300),
            same_size: bool,
        ) {
            let join = if same_size { Join::SameSize } else { Join::Latest };
            let mut trains = Trains::new();
            let (mut bytes, mut count) = (0, 0);
            let mut check = |trains: &mut Trains| trains.drain(|t| {
                assert!(!t.is_empty() && t.len() <= MAX_SEGMENTS && t.bytes().len() <= MAX_BYTES);
                assert!(t.len() == 1 || t.segment_size() <= MAX_SEGMENT);
                assert_eq!(t.bytes().len().div_ceil(t.segment_size()), t.len());
                bytes += t.bytes().len();
                count += t.len();
            });
            for (port, len, marked, other_sender) in &datagrams {
                let ecn = if *marked { Ecn::Ect0 } else { Ecn::NotEct };
                if *other_sender {
                    trains.message();
                }
                let body = vec![0; *len];
                while trains.push(to(*port, ecn), join, &[], &body) == Err(Full) {
                    check(&mut trains);
                }
            }
            check(&mut trains);
            prop_assert_eq!((count, bytes), (datagrams.len(), datagrams.iter().map(|d| d.1).sum()));
        }
    }
}
