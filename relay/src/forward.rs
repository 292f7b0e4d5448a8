//! Where a datagram goes: pure decisions over a [`Table`].
//!
//! Everything here is the sender's choice until proven otherwise. A client's datagram is believed only as far as its
//! connection ID decrypts to a live server ID; a worker's frame only after its tag verified under a key of the route
//! that it came from.

use std::net::{IpAddr, SocketAddr};

use antiphon_core::{
    cid::{Kind, SessionCid, SessionNonce},
    tunnel::{
        self, ClientAddr, Direction, Ecn, HEADER_LEN, Header, INITIAL_HOP_LIMIT, MAX_SKEW, OpenError, coarse_time,
    },
};

use crate::table::{Route, Table};

/// What becomes of a datagram.
#[derive(Debug)]
pub enum Verdict<T> {
    /// Goes on.
    Forward(T),
    /// Goes nowhere.
    Drop(DropReason),
}

impl<T> From<Result<T, DropReason>> for Verdict<T> {
    fn from(result: Result<T, DropReason>) -> Self {
        match result {
            Ok(forward) => Self::Forward(forward),
            Err(reason) => Self::Drop(reason),
        }
    }
}

/// A client's datagram goes to `route`, behind `header`.
#[derive(Debug)]
pub struct ToWorker<'t> {
    /// Where to, and the key to seal with.
    pub route: &'t Route,
    /// What to seal.
    pub header: Header,
}

/// A worker's datagram goes to its client.
#[derive(Debug, PartialEq, Eq)]
pub struct ToClient<'f> {
    /// In its own address family.
    pub client: SocketAddr,
    /// For the IP header of the client's leg.
    pub ecn: Ecn,
    /// The frame without its header.
    pub datagram: &'f [u8],
}

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])* $name:ident => $label:literal,)*) => {
        /// Why a datagram went nowhere: the closed set behind the metric's label.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum DropReason {
            $($(#[doc = $doc])* $name,)*
        }

        impl DropReason {
            /// All reasons.
            pub const ALL: [Self; [$($label),*].len()] = [$(Self::$name),*];

            /// The metric's label.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }
        }
    };
}

drop_reasons! {
    /// From a client: no complete QUIC packet fits.
    TooShort => "too_short",
    /// From a client: longer than [`MAX_DATAGRAM`].
    TooLong => "too_long",
    /// From a client: a long header of another version than 1.
    QuicVersion => "quic_version",
    /// From a client: a destination connection ID of another length than ours.
    CidLength => "cid_length",
    /// From a client: an Initial packet in a datagram below 1,200 bytes.
    InitialSize => "initial_size",
    /// From a client: the connection ID is of no configuration in use.
    CidConfig => "cid_config",
    /// From a client: the connection ID names nobody; forged, most likely.
    UnknownServer => "unknown_server",
    /// From a client: the connection ID names a predecessor of a live worker.
    DeadIncarnation => "dead_incarnation",
    /// From a client: the connection ID is of a kind that nobody mints.
    CidKind => "cid_kind",
    /// From a client: a first connection ID on a packet that is no Initial.
    InitialMisused => "initial_misused",
    /// From a client: a first connection ID past its time.
    InitialExpired => "initial_expired",
    /// Either way: a client address that cannot be answered.
    ClientAddress => "client_address",
    /// From a worker: not from the address of any route.
    ForeignSource => "foreign_source",
    /// From a worker: no frame of our version and direction.
    FrameMalformed => "frame_malformed",
    /// From a worker: sealed under a generation that is not in use.
    FrameKey => "frame_key",
    /// From a worker: the tag does not verify.
    FrameTag => "frame_tag",
    /// From a worker: genuine, but old.
    FrameStale => "frame_stale",
    /// From a worker: no hops left.
    FrameHopLimit => "frame_hop_limit",
    /// From a worker: for another relay's client.
    FrameRelay => "frame_relay",
    /// Sending: larger than the path takes.
    PathMtu => "path_mtu",
    /// Sending: the socket's buffer is full.
    SendBuffer => "send_buffer",
    /// Sending: the system refused.
    SendError => "send_error",
}

/// Judges a client's datagram that came from `from`. `now` is in Unix seconds, `ecn` as received.
///
/// Only the first QUIC packet of the datagram is looked at (RFC 8999; RFC 9000, section 12.2).
#[must_use]
pub fn classify_up<'t>(
    table: &'t Table,
    now: u64,
    datagram: &[u8],
    from: SocketAddr,
    ecn: Ecn,
) -> Verdict<ToWorker<'t>> {
    up(table, now, datagram, from, ecn).into()
}

fn up<'t>(table: &'t Table, now: u64, datagram: &[u8], from: SocketAddr, ecn: Ecn) -> Result<ToWorker<'t>, DropReason> {
    let packet = QuicPacket::parse(datagram)?;
    let (server_id, nonce) = table.codec().decode_u64(packet.cid).ok_or(DropReason::CidConfig)?;
    let route = table.route(server_id).ok_or_else(|| {
        if table.has_other_incarnation(server_id) { DropReason::DeadIncarnation } else { DropReason::UnknownServer }
    })?;
    let nonce = SessionNonce::from_u64(nonce);
    match nonce.kind().ok_or(DropReason::CidKind)? {
        Kind::Connection => {}
        Kind::Initial if !packet.initial => return Err(DropReason::InitialMisused),
        Kind::Initial if nonce.is_expired(now) => return Err(DropReason::InitialExpired),
        Kind::Initial => {}
    }
    if !is_answerable(from) {
        return Err(DropReason::ClientAddress);
    }
    let header = Header {
        direction: Direction::Up,
        key_slot: route.slot,
        hop_limit: INITIAL_HOP_LIMIT,
        ecn,
        client: ClientAddr::from(from),
        relay: table.relay(),
        time: coarse_time(now),
    };
    Ok(ToWorker { route, header })
}

struct QuicPacket<'d> {
    initial: bool,
    cid: &'d [u8; SessionCid::LEN],
}

impl<'d> QuicPacket<'d> {
    fn parse(datagram: &'d [u8]) -> Result<Self, DropReason> {
        if datagram.len() > MAX_DATAGRAM {
            return Err(DropReason::TooLong);
        }
        let first = *datagram.first().ok_or(DropReason::TooShort)?;
        if first & LONG_HEADER == 0 {
            let (_, rest) = datagram.split_at(1);
            let cid = rest.first_chunk().ok_or(DropReason::TooShort)?;
            if datagram.len() < MIN_SHORT_PACKET {
                return Err(DropReason::TooShort);
            }
            return Ok(Self { initial: false, cid });
        }
        let (head, rest) = datagram.split_first_chunk::<LONG_PREFIX>().ok_or(DropReason::TooShort)?;
        if head[1..5] != QUIC_V1 {
            return Err(DropReason::QuicVersion);
        }
        if usize::from(head[5]) != SessionCid::LEN {
            return Err(DropReason::CidLength);
        }
        let cid = rest.first_chunk().ok_or(DropReason::TooShort)?;
        let initial = first & LONG_TYPE == LONG_INITIAL;
        if initial && datagram.len() < MIN_INITIAL_DATAGRAM {
            return Err(DropReason::InitialSize);
        }
        if datagram.len() < MIN_LONG_PACKET {
            return Err(DropReason::TooShort);
        }
        Ok(Self { initial, cid })
    }
}

/// Judges a frame that came from `from`, an address in its own family; `outer` is the frame's own ECN.
///
/// Only the shards behind that address are tried: a worker cannot speak for another one.
#[must_use]
pub fn classify_down<'f>(
    table: &Table,
    now: u64,
    frame: &'f [u8],
    from: SocketAddr,
    outer: Ecn,
) -> Verdict<ToClient<'f>> {
    down(table, now, frame, from, outer).into()
}

fn down<'f>(
    table: &Table,
    now: u64,
    frame: &'f [u8],
    from: SocketAddr,
    outer: Ecn,
) -> Result<ToClient<'f>, DropReason> {
    let keys = table.source_keys(from).ok_or(DropReason::ForeignSource)?;
    let slot = Header::parse(frame).map_err(refusal)?.key_slot;
    let mut outcome = Err(DropReason::FrameKey);
    for (_, key) in keys.iter().filter(|(of, _)| *of == slot) {
        outcome = tunnel::open(frame, key, Direction::Down, now, MAX_SKEW).map_err(refusal);
        if outcome != Err(DropReason::FrameTag) {
            break;
        }
    }
    let (header, datagram) = outcome?;
    if header.relay != table.relay() {
        return Err(DropReason::FrameRelay);
    }
    let client = header.client.to_socket_addr();
    if !is_answerable(client) {
        return Err(DropReason::ClientAddress);
    }
    Ok(ToClient { client, ecn: decapsulated(header.ecn, outer), datagram })
}

const fn refusal(error: OpenError) -> DropReason {
    match error {
        OpenError::TooShort | OpenError::Version | OpenError::Direction => DropReason::FrameMalformed,
        OpenError::HopLimit => DropReason::FrameHopLimit,
        OpenError::Tag => DropReason::FrameTag,
        OpenError::Stale => DropReason::FrameStale,
    }
}

/// Congestion met on the tunnel's leg is passed on (RFC 6040, section 4.2).
const fn decapsulated(inner: Ecn, outer: Ecn) -> Ecn {
    match (inner, outer) {
        (Ecn::NotEct, _) => Ecn::NotEct,
        (_, Ecn::Ce) => Ecn::Ce,
        (inner, _) => inner,
    }
}

/// Whether a datagram can be sent to the address at all, from what the tunnel header carries of it.
///
/// Linux refuses port 0, and link-local addresses without their scope, with an error that makes the socket library
/// give up segmentation offload: nobody may choose such an address for us.
fn is_answerable(address: SocketAddr) -> bool {
    let ip = address.ip().to_canonical();
    let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !link_local
}

/// Longest client datagram that is forwarded; with the tunnel header it makes 2 KiB.
pub const MAX_DATAGRAM: usize = 2048 - HEADER_LEN;

/// RFC 9000, section 14.1.
const MIN_INITIAL_DATAGRAM: usize = 1200;
/// First octet, version, length of the destination connection ID (RFC 8999, section 5.1).
const LONG_PREFIX: usize = 6;
/// A long header up to and including the length of an empty source connection ID.
const MIN_LONG_PACKET: usize = LONG_PREFIX + SessionCid::LEN + 1;
/// First octet, connection ID, and what header protection samples (RFC 9001, section 5.4.2).
const MIN_SHORT_PACKET: usize = 1 + SessionCid::LEN + 4 + 16;
const LONG_HEADER: u8 = 0x80;
const LONG_TYPE: u8 = 0x30;
const LONG_INITIAL: u8 = 0x00;
const QUIC_V1: [u8; 4] = 1u32.to_be_bytes();

#[cfg(test)]
mod tests;
