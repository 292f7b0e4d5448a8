//! The header between relay and worker (invariant I3): 32 bytes in front of a QUIC datagram that travels unchanged.
//!
//! ```text
//! byte  0       version (2 bits, 1) | direction (1 bit) | key generation mod 32 (5 bits)
//! byte  1       hop limit (6 bits) | ECN of the datagram (2 bits, RFC 3168)
//! bytes 2..18   client address, IPv6 or IPv4-mapped
//! bytes 18..20  client port
//! bytes 20..22  ingress relay
//! bytes 22..24  Unix seconds mod 2^16
//! bytes 24..32  SipHash-2-4 of the frame, in little-endian order as SipHash defines it
//! ```
//!
//! While the tag is worked out, Unix seconds div 2^16 stand in its place (8 bytes, network byte order). They do not
//! travel: the receiver takes those that bring the time nearest to its own clock. So a frame verifies for 2^15 seconds
//! either way, and never again when the 16 bits that travel come round.
//!
//! The key belongs to one relay, one shard, one direction and one generation. A tag of 64 bits stops strangers, not
//! whoever sees frames go by: those can be replayed within the time that [`open`] allows, and the datagram inside is
//! protected by QUIC. A tier of relays rewrites the header ([`Header::next_hop`]); headers never nest.

use std::{
    hash::Hasher as _,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use siphasher::sip::SipHasher24;
use subtle::ConstantTimeEq as _;

use crate::{
    id::{KeyGeneration, RelayNumber},
    keys::TunnelKey,
};

/// Which way a frame goes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// From the client, to the worker.
    Up,
    /// From the worker, to the client.
    Down,
}

/// Explicit congestion notification (RFC 3168) of the datagram inside.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Ecn {
    /// The sender does not take part.
    #[default]
    NotEct,
    /// ECT(1).
    Ect1,
    /// ECT(0).
    Ect0,
    /// Congestion experienced.
    Ce,
}

impl Ecn {
    /// The two bits of the IP header.
    #[must_use]
    pub const fn bits(self) -> u8 {
        match self {
            Self::NotEct => 0,
            Self::Ect1 => 1,
            Self::Ect0 => 2,
            Self::Ce => 3,
        }
    }

    /// Takes the low two bits.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::NotEct,
            1 => Self::Ect1,
            2 => Self::Ect0,
            _ => Self::Ce,
        }
    }
}

/// Key generation mod 32: enough to tell the generations apart that are accepted at a time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeySlot(u8);

impl KeySlot {
    /// How many there are.
    pub const COUNT: usize = 32;

    /// The slot of a generation.
    #[must_use]
    pub const fn of(generation: KeyGeneration) -> Self {
        Self((generation.value() % Self::COUNT as u32) as u8)
    }

    /// 0..=31, an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A client as its relay sees it: IPv6 or IPv4-mapped address, and port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClientAddr {
    /// IPv4 clients have their mapped address (`::ffff:a.b.c.d`).
    pub ip: Ipv6Addr,
    /// UDP port.
    pub port: u16,
}

impl ClientAddr {
    /// Stands for the relay itself: the frame carries a [`Notice`].
    pub const RELAY: Self = Self { ip: Ipv6Addr::UNSPECIFIED, port: 0 };

    /// The address in its own family: IPv4 for a mapped one.
    #[must_use]
    pub const fn to_socket_addr(self) -> SocketAddr {
        let ip = match self.ip.to_ipv4_mapped() {
            Some(v4) => IpAddr::V4(v4),
            None => IpAddr::V6(self.ip),
        };
        SocketAddr::new(ip, self.port)
    }
}

/// Flow info and scope are dropped.
impl From<SocketAddr> for ClientAddr {
    fn from(address: SocketAddr) -> Self {
        let ip = match address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        Self { ip, port: address.port() }
    }
}

/// When a frame was sealed, in Unix seconds. The header carries the low 16 bits; the tag covers all of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CoarseTime(u64);

impl CoarseTime {
    const fn low(self) -> u16 {
        (self.0 & 0xffff) as u16
    }

    /// Stands in the tag's place while that is worked out.
    const fn high(self) -> [u8; TAG_LEN] {
        (self.0 >> 16).to_be_bytes()
    }

    /// The moment with these low bits that is nearest to `now`: from 32,768 s before it to 32,767 s after.
    const fn nearest(self, now: u64) -> Self {
        Self(now.wrapping_add_signed(self.seconds_ahead(now) as i64))
    }

    const fn seconds_ahead(self, now: u64) -> i16 {
        self.low().wrapping_sub(coarse_time(now).low()).cast_signed()
    }
}

/// Why a frame is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum OpenError {
    /// Shorter than a header and one byte.
    #[error("frame is shorter than {} bytes", HEADER_LEN + 1)]
    TooShort,
    /// Not version 1.
    #[error("frame has a version other than {VERSION}")]
    Version,
    /// Goes the other way.
    #[error("frame goes the other way")]
    Direction,
    /// Has travelled too far.
    #[error("frame has no hops left")]
    HopLimit,
    /// The tag does not match: forged, damaged, under another key, or sealed more than 2^15 seconds (9.1 h) from now.
    #[error("frame's tag does not match")]
    Tag,
    /// Genuine, but its time is too far from now: a replay, or a clock that is off.
    #[error("frame is stale")]
    Stale,
}

/// What the header says, without the tag.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Header {
    /// Which way.
    pub direction: Direction,
    /// Which generation's key the tag is under.
    pub key_slot: KeySlot,
    /// Hops that it may still take, 0..=63; higher values are cut to 63 when sealed.
    pub hop_limit: u8,
    /// ECN bits of the datagram on the client's leg.
    pub ecn: Ecn,
    /// The client, or [`ClientAddr::RELAY`].
    pub client: ClientAddr,
    /// The relay that the client talks to.
    pub relay: RelayNumber,
    /// When it was sealed. Of a header that was only parsed, the bits that travel: it cannot be sealed again.
    pub time: CoarseTime,
}

impl Header {
    /// Writes the header for `datagram` to `out`; the frame is `out` followed by `datagram`.
    pub fn seal_into(&self, key: &TunnelKey, datagram: &[u8], out: &mut [u8; HEADER_LEN]) {
        self.write_fields(out);
        let tag = tag(key, self.time, out, datagram);
        out[TAG_AT..].copy_from_slice(&tag);
    }

    /// Seals in place: the datagram is already behind the [`HEADER_LEN`] bytes that this overwrites.
    ///
    /// # Errors
    /// [`OpenError::TooShort`] when nothing follows the header.
    pub fn seal_frame(&self, key: &TunnelKey, frame: &mut [u8]) -> Result<(), OpenError> {
        let (head, datagram) = frame
            .split_first_chunk_mut::<HEADER_LEN>()
            .filter(|(_, datagram)| !datagram.is_empty())
            .ok_or(OpenError::TooShort)?;
        self.seal_into(key, datagram, head);
        Ok(())
    }

    /// Reads a header **without verifying it**, to find the key for [`open`].
    ///
    /// # Errors
    /// [`OpenError::TooShort`] or [`OpenError::Version`].
    pub fn parse(frame: &[u8]) -> Result<Self, OpenError> {
        let (head, datagram) = frame.split_first_chunk::<HEADER_LEN>().ok_or(OpenError::TooShort)?;
        if datagram.is_empty() {
            return Err(OpenError::TooShort);
        }
        if head[0] >> 6 != VERSION {
            return Err(OpenError::Version);
        }
        let mut ip = [0; 16];
        ip.copy_from_slice(&head[2..18]);
        let word = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        Ok(Self {
            direction: if head[0] & DIRECTION_BIT == 0 { Direction::Up } else { Direction::Down },
            key_slot: KeySlot(head[0] & KEY_SLOT_MASK),
            hop_limit: head[1] >> 2,
            ecn: Ecn::from_bits(head[1]),
            client: ClientAddr { ip: ip.into(), port: word(18) },
            relay: RelayNumber::new(word(20)).expect("any 16 bits are a relay number"),
            time: CoarseTime(word(22).into()),
        })
    }

    /// The header for the next tier: one hop less, under that tier's key; client, relay and time stay.
    ///
    /// # Errors
    /// [`OpenError::HopLimit`] when none is left.
    pub const fn next_hop(self, key_slot: KeySlot) -> Result<Self, OpenError> {
        match self.hop_limit.checked_sub(1) {
            Some(hop_limit) if hop_limit > 0 => Ok(Self { hop_limit, key_slot, ..self }),
            _ => Err(OpenError::HopLimit),
        }
    }

    /// Seconds that this header was sealed ahead of `now` (Unix seconds), negative for behind, -32,768 to 32,767: of a
    /// genuine frame that came at once, how far its sender's clock is ahead.
    #[must_use]
    pub const fn seconds_ahead(&self, now: u64) -> i16 {
        self.time.seconds_ahead(now)
    }

    fn write_fields(&self, out: &mut [u8; HEADER_LEN]) {
        let direction = match self.direction {
            Direction::Up => 0,
            Direction::Down => DIRECTION_BIT,
        };
        out[0] = VERSION << 6 | direction | self.key_slot.0;
        out[1] = self.hop_limit.min(MAX_HOP_LIMIT) << 2 | self.ecn.bits();
        out[2..18].copy_from_slice(&self.client.ip.octets());
        out[18..20].copy_from_slice(&self.client.port.to_be_bytes());
        out[20..22].copy_from_slice(&self.relay.value().to_be_bytes());
        out[22..24].copy_from_slice(&self.time.low().to_be_bytes());
    }
}

/// Verifies a frame and gives its header and datagram. `now` is in Unix seconds, `expected` this end's direction.
///
/// A frame is stale when its time is more than `max_skew` away from `now` in either direction; [`MAX_SKEW`] is the
/// fleet's. Nothing of an unverified frame is acted on: the tag is compared, in constant time, before the time is.
///
/// # Errors
/// [`OpenError`], never with a part of the frame.
pub fn open<'a>(
    frame: &'a [u8],
    key: &TunnelKey,
    expected: Direction,
    now: u64,
    max_skew: Duration,
) -> Result<(Header, &'a [u8]), OpenError> {
    let parsed = Header::parse(frame)?;
    let header = Header { time: parsed.time.nearest(now), ..parsed };
    let (head, datagram) = frame.split_first_chunk::<HEADER_LEN>().ok_or(OpenError::TooShort)?;
    if header.direction != expected {
        return Err(OpenError::Direction);
    }
    if header.hop_limit == 0 {
        return Err(OpenError::HopLimit);
    }
    if !bool::from(tag(key, header.time, head, datagram).ct_eq(&head[TAG_AT..])) {
        return Err(OpenError::Tag);
    }
    if u64::from(header.seconds_ahead(now).unsigned_abs()) > max_skew.as_secs() {
        return Err(OpenError::Stale);
    }
    Ok((header, datagram))
}

/// Unix seconds, as a header takes them.
#[must_use]
pub const fn coarse_time(unix_s: u64) -> CoarseTime {
    CoarseTime(unix_s)
}

/// What stands at the tag's place in `head` does not matter.
fn tag(key: &TunnelKey, time: CoarseTime, head: &[u8; HEADER_LEN], datagram: &[u8]) -> [u8; TAG_LEN] {
    let mut input = *head;
    input[TAG_AT..].copy_from_slice(&time.high());
    let mut hasher = SipHasher24::new_with_key(key.as_bytes());
    hasher.write(&input);
    hasher.write(datagram);
    hasher.finish().to_le_bytes()
}

/// What a relay itself tells a worker, in a frame of [`ClientAddr::RELAY`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Notice {
    /// The relay stops in `deadline_ms` at the latest: clients behind it should move to another one.
    Draining {
        /// Milliseconds left, 65,535 at most.
        deadline_ms: u16,
    },
}

impl Notice {
    /// Bytes of a notice.
    pub const LEN: usize = 3;

    /// Kind (1 byte), then the deadline in network byte order.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; Self::LEN] {
        match self {
            Self::Draining { deadline_ms } => {
                let [high, low] = deadline_ms.to_be_bytes();
                [NOTICE_DRAINING, high, low]
            }
        }
    }

    /// Reads a notice; `None` for kinds that this version does not know.
    #[must_use]
    pub const fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [NOTICE_DRAINING, high, low] => Some(Self::Draining { deadline_ms: u16::from_be_bytes([high, low]) }),
            _ => None,
        }
    }
}

/// Bytes of a header.
pub const HEADER_LEN: usize = 32;

/// Hops that a relay gives a fresh frame: two tiers, with room for a detour.
pub const INITIAL_HOP_LIMIT: u8 = 4;

/// The largest hop limit that fits.
pub const MAX_HOP_LIMIT: u8 = 63;

/// How far the clocks of two ends may be apart.
pub const MAX_SKEW: Duration = Duration::from_secs(30);

const VERSION: u8 = 1;
const DIRECTION_BIT: u8 = 0x20;
const KEY_SLOT_MASK: u8 = 0x1f;
const TAG_AT: usize = 24;
const TAG_LEN: usize = HEADER_LEN - TAG_AT;
const NOTICE_DRAINING: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_800_000_000;

    fn key() -> TunnelKey {
        TunnelKey::from_bytes(std::array::from_fn(|i| i as u8))
    }

    fn header() -> Header {
        Header {
            direction: Direction::Up,
            key_slot: KeySlot(5),
            hop_limit: INITIAL_HOP_LIMIT,
            ecn: Ecn::Ect0,
            client: "192.0.2.7:4433".parse::<SocketAddr>().unwrap().into(),
            relay: RelayNumber::new(0x00c5).unwrap(),
            time: coarse_time(NOW),
        }
    }

    fn frame(header: &Header, datagram: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; HEADER_LEN];
        frame.extend_from_slice(datagram);
        header.seal_frame(&key(), &mut frame).unwrap();
        frame
    }

    fn open_up(frame: &[u8], now: u64) -> Result<(Header, &[u8]), OpenError> {
        open(frame, &key(), Direction::Up, now, MAX_SKEW)
    }

    /// Frozen: the layout is on the wire. The tags were computed with an independent SipHash.
    #[test]
    fn layout_is_frozen() {
        assert_eq!(hex::encode(frame(&header(), b"hello")), FROZEN_UP);
        let down = Header {
            direction: Direction::Down,
            key_slot: KeySlot::of(KeyGeneration::new(63).unwrap()),
            hop_limit: 200,
            ecn: Ecn::Ce,
            client: "[2001:db8::1]:65535".parse::<SocketAddr>().unwrap().into(),
            relay: RelayNumber::new(u16::MAX).unwrap(),
            time: coarse_time(0xffff),
        };
        assert_eq!(hex::encode(frame(&down, &[0xaa; 20])), FROZEN_DOWN);
        let notice = Notice::Draining { deadline_ms: 10_000 };
        let told = Header { client: ClientAddr::RELAY, ..header() };
        assert_eq!(hex::encode(frame(&told, &notice.to_bytes())), FROZEN_NOTICE);
    }
    const FROZEN_UP: &str = "451200000000000000000000ffffc0000207115100c5d2005f7b8854ed07f9ac68656c6c6f";
    const FROZEN_DOWN: &str =
        "7fff20010db8000000000000000000000001fffffffffffff08cc1a0deff2587aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const FROZEN_NOTICE: &str = "451200000000000000000000000000000000000000c5d200d2ccf38691a3f119012710";

    #[test]
    fn each_reason_to_refuse_is_told() {
        let good = frame(&header(), b"hello");
        assert_eq!(open_up(&good, NOW), Ok((header(), &b"hello"[..])));
        assert_eq!(open_up(&good[..HEADER_LEN], NOW), Err(OpenError::TooShort));
        assert_eq!(open_up(&[], NOW), Err(OpenError::TooShort));
        let mut other = good.clone();
        other[0] ^= 0xc0;
        assert_eq!(open_up(&other, NOW), Err(OpenError::Version));
        assert_eq!(open(&good, &key(), Direction::Down, NOW, MAX_SKEW), Err(OpenError::Direction));
        let spent = Header { hop_limit: 0, ..header() };
        assert_eq!(open_up(&frame(&spent, b"x"), NOW), Err(OpenError::HopLimit));
        let foreign = TunnelKey::from_bytes([9; 16]);
        assert_eq!(open(&good, &foreign, Direction::Up, NOW, MAX_SKEW), Err(OpenError::Tag));
        assert!(header().seal_frame(&key(), &mut [0; HEADER_LEN]).is_err());
    }

    #[test]
    fn time_may_differ_by_the_skew_also_across_the_wrap() {
        for sealed in [NOW, 0x5_0000 - 1, 0x5_0000] {
            let frame = frame(&Header { time: coarse_time(sealed), ..header() }, b"x");
            for (offset, stale) in [(-31, true), (-30, false), (0, false), (30, false), (31, true)] {
                let now = sealed.checked_add_signed(offset).unwrap();
                assert_eq!(open_up(&frame, now).is_err(), stale, "{sealed} {offset}");
            }
            assert_eq!(open_up(&frame, sealed + 0x8000), Err(OpenError::Stale));
        }
    }

    /// Whoever has recorded a frame can wait until the 16 bits that travel come round.
    #[test]
    fn a_frame_does_not_come_back_when_its_time_wraps() {
        let told = Header { client: ClientAddr::RELAY, ..header() };
        let frame = frame(&told, &Notice::Draining { deadline_ms: 500 }.to_bytes());
        for rounds in [1, 2, 100] {
            for offset in [-30, 0, 30] {
                let now = NOW.checked_add_signed(rounds * 0x1_0000 + offset).unwrap();
                assert_eq!(open_up(&frame, now), Err(OpenError::Tag), "{rounds} {offset}");
            }
        }
        let (at_most, beyond) = (NOW + 0x8000, NOW + 0x8001);
        assert_eq!(open_up(&frame, at_most), Err(OpenError::Stale), "how far its clock is off can be told");
        assert_eq!(open_up(&frame, beyond), Err(OpenError::Tag));
    }

    /// The next hop seals with the time that was verified, though only a part of it travels.
    #[test]
    fn a_forwarded_frame_keeps_its_whole_time() {
        let first = frame(&header(), b"x");
        let (opened, _) = open_up(&first, NOW + 3).unwrap();
        let second = frame(&opened.next_hop(KeySlot(6)).unwrap(), b"x");
        assert_eq!(open_up(&second, NOW + 3).unwrap().0.time, coarse_time(NOW));
    }

    #[test]
    fn hops_run_out() {
        let slot = KeySlot::of(KeyGeneration::new(33).unwrap());
        let mut header = header();
        for left in (1..INITIAL_HOP_LIMIT).rev() {
            header = header.next_hop(slot).unwrap();
            assert_eq!((header.hop_limit, header.key_slot.index()), (left, 1));
        }
        assert_eq!(header.next_hop(slot), Err(OpenError::HopLimit));
    }

    #[test]
    fn clients_keep_their_address_family() {
        for text in ["192.0.2.7:4433", "[2001:db8::1]:9"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(ClientAddr::from(address).to_socket_addr(), address);
        }
        let mapped: SocketAddr = "[::ffff:192.0.2.7]:4433".parse().unwrap();
        assert_eq!(ClientAddr::from(mapped).to_socket_addr(), "192.0.2.7:4433".parse().unwrap());
    }

    #[test]
    fn notices_are_frozen() {
        let notice = Notice::Draining { deadline_ms: 0x1234 };
        assert_eq!(notice.to_bytes(), [1, 0x12, 0x34]);
        assert_eq!(Notice::from_bytes(&[1, 0x12, 0x34]), Some(notice));
        for unknown in [&[][..], &[1], &[2, 0, 0], &[1, 0, 0, 0]] {
            assert_eq!(Notice::from_bytes(unknown), None);
        }
    }

    proptest! {
        #[test]
        fn frames_round_trip(
            down: bool, slot in 0u32..32, hop_limit in 1u8..64, ecn in 0u8..4, ip: [u8; 16], port: u16, relay: u16,
            now in 0u64..1 << 40, datagram in proptest::collection::vec(any::<u8>(), 1..1500),
        ) {
            let direction = if down { Direction::Down } else { Direction::Up };
            let header = Header {
                direction,
                key_slot: KeySlot::of(KeyGeneration::new(slot).unwrap()),
                hop_limit,
                ecn: Ecn::from_bits(ecn),
                client: ClientAddr { ip: ip.into(), port },
                relay: RelayNumber::new(relay).unwrap(),
                time: coarse_time(now),
            };
            let frame = frame(&header, &datagram);
            prop_assert_eq!(open(&frame, &key(), direction, now, MAX_SKEW), Ok((header, &datagram[..])));
        }

        #[test]
        fn one_flipped_bit_anywhere_is_refused(bit in 0usize..(HEADER_LEN + 100) * 8) {
            let mut frame = frame(&header(), &[0x55; 100]);
            frame[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(open_up(&frame, NOW).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_open(bytes in proptest::collection::vec(any::<u8>(), 0..200), now: u64) {
            prop_assert!(open_up(&bytes, now).is_err());
            let _ = Notice::from_bytes(&bytes);
        }
    }
}
