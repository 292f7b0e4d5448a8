//! Where a datagram goes: pure decisions over a [`Table`].
//!
//! Everything here is the sender's choice until proven otherwise. A client's datagram is believed only as far as its
//! connection ID decrypts to a live server ID or a region; a frame only after its tag verified under a key of the
//! worker or relay whose address it came from.

use std::net::{IpAddr, SocketAddr};

use antiphon_core::{
    cid::{Kind, SessionCid, SessionNonce},
    clock::Millis,
    id::{RelayNumber, ServerId},
    keys::TunnelKey,
    tunnel::{ClientAddr, Direction, Ecn, HEADER_LEN, Header, INITIAL_HOP_LIMIT, KeySlot, Notice, coarse_time},
};

use crate::{
    neighbour::Neighbour,
    reset::ResetKey,
    table::{Route, Source, Table},
};

mod frame;
mod quic;
mod reason;

pub use frame::classify_frame;
use quic::QuicPacket;
pub use reason::DropReason;

/// One moment on both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Unix seconds: what travels.
    pub unix_s: u64,
    /// Of the process's monotonic clock: what is measured here.
    pub ms: Millis,
}

/// What becomes of a client's datagram.
#[derive(Debug)]
pub enum FromClient<'t> {
    /// It goes on.
    Onward(Onward<'t>),
    /// It does not; its sender may be told that the worker is gone.
    Reset {
        /// Makes the token.
        key: &'t ResetKey,
        /// What the sender knows the worker by.
        cid: [u8; SessionCid::LEN],
    },
}

/// What becomes of a frame.
#[derive(Debug)]
pub enum FromTunnel<'t, 'f> {
    /// Its datagram goes to one of this relay's clients.
    ToClient(ToClient<'f>),
    /// Its datagram goes on behind another header.
    Onward(Onward<'t>, &'f [u8]),
    /// A relay of another region has something to tell.
    Notice {
        /// Which one.
        from: &'t Neighbour,
        /// Up for this region's workers, down for this relay itself.
        header: Header,
        /// What.
        notice: Notice,
    },
}

/// A datagram goes to a worker or another relay, behind `header`.
#[derive(Debug)]
pub struct Onward<'t> {
    /// Where to.
    pub address: SocketAddr,
    /// What to seal with.
    pub key: &'t TunnelKey,
    /// What to seal.
    pub header: Header,
    /// Whose answer is owed then: the other region's relay, on a client's way up.
    pub through: Option<&'t Neighbour>,
    /// What it counts as, on the way up.
    pub flow: Option<Flow>,
}

/// Packets that are bounded together: those of one connection ID over one path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Names connection ID and ingress relay.
    pub key: [u64; 2],
    /// With the ingress relay, the path.
    pub client: ClientAddr,
    /// Initial packets are bounded more tightly.
    pub initial: bool,
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

/// Why a frame goes nowhere, and what its sender's clock has to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For the count.
    pub reason: DropReason,
    /// Of a frame that is genuine but stale.
    pub skew: Option<Skew>,
}

/// How far a sender's clock is from this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skew {
    /// Whose.
    pub sender: Sender,
    /// Seconds ahead, negative for behind.
    pub ahead_s: i16,
}

/// Who sealed a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A worker's shard.
    Shard(ServerId),
    /// A relay of another region.
    Relay(RelayNumber),
}

impl From<DropReason> for Refusal {
    fn from(reason: DropReason) -> Self {
        Self { reason, skew: None }
    }
}

/// Judges a client's datagram that came from `from`, with `ecn` as received.
///
/// Only the first QUIC packet of the datagram is looked at (RFC 8999; RFC 9000, section 12.2).
///
/// # Errors
/// Why it goes nowhere.
pub fn classify_up<'t>(
    table: &'t Table,
    now: Now,
    datagram: &[u8],
    from: SocketAddr,
    ecn: Ecn,
    memo: &mut Memo<'t>,
) -> Result<FromClient<'t>, DropReason> {
    let packet = QuicPacket::parse(datagram)?;
    let Target { server_id, nonce, hop } = memo.target(table, now, packet.cid).ok_or(DropReason::CidConfig)?;
    let Some(hop) = hop else {
        let reason = nobody(table, now, server_id);
        return match reset_key(table, &packet, server_id, nonce) {
            Some(key) if reason == DropReason::DeadServer && is_answerable(from) => {
                Ok(FromClient::Reset { key, cid: *packet.cid })
            }
            _ => Err(reason),
        };
    };
    check_nonce(nonce, &packet, now)?;
    if !is_answerable(from) {
        return Err(DropReason::ClientAddress);
    }
    let header = Header {
        direction: Direction::Up,
        key_slot: hop.slot,
        hop_limit: INITIAL_HOP_LIMIT,
        ecn,
        client: ClientAddr::from(from),
        relay: table.relay(),
        time: coarse_time(now.unix_s),
    };
    let flow = flow(server_id, nonce, &header, packet.initial);
    Ok(FromClient::Onward(Onward { address: hop.address, key: hop.key, header, through: hop.through, flow }))
}

/// What was found out last within one batch and one table: datagrams of one sender come one after the other, and their
/// connection ID and source say the same again.
#[derive(Debug, Default)]
pub struct Memo<'t> {
    target: Option<([u8; SessionCid::LEN], Target<'t>)>,
    source: Option<(SocketAddr, &'t Source)>,
}

impl<'t> Memo<'t> {
    fn target(&mut self, table: &'t Table, now: Now, cid: &[u8; SessionCid::LEN]) -> Option<Target<'t>> {
        if let Some((of, target)) = &self.target
            && of == cid
        {
            return Some(*target);
        }
        let (server_id, nonce) = table.codec().decode_u64(cid)?;
        let target = Target { server_id, nonce, hop: hop(table, now, server_id) };
        self.target = Some((*cid, target));
        Some(target)
    }

    fn source(&mut self, table: &'t Table, from: SocketAddr) -> Option<&'t Source> {
        if let Some((of, source)) = self.source
            && of == from
        {
            return Some(source);
        }
        let source = table.source(from)?;
        self.source = Some((from, source));
        Some(source)
    }
}

/// What a connection ID says, and where that leads.
#[derive(Clone, Copy, Debug)]
struct Target<'t> {
    server_id: u64,
    nonce: u64,
    hop: Option<Hop<'t>>,
}

#[derive(Clone, Copy, Debug)]
struct Hop<'t> {
    address: SocketAddr,
    slot: KeySlot,
    key: &'t TunnelKey,
    through: Option<&'t Neighbour>,
}

impl<'t> From<&'t Route> for Hop<'t> {
    fn from(route: &'t Route) -> Self {
        Self { address: route.address, slot: route.slot, key: &route.key, through: None }
    }
}

/// The server itself, else a relay of its region, unless it is dead.
fn hop(table: &Table, now: Now, server_id: u64) -> Option<Hop<'_>> {
    if let Some(route) = table.route(server_id) {
        return Some(route.into());
    }
    if table.is_dead(server_id, now.unix_s) {
        return None;
    }
    let relay = table.way(server_id, now.ms)?;
    Some(Hop { address: relay.address, slot: relay.slot, key: &relay.key, through: Some(relay) })
}

/// Why a server ID leads nowhere.
fn nobody(table: &Table, now: Now, server_id: u64) -> DropReason {
    if table.is_dead(server_id, now.unix_s) {
        DropReason::DeadServer
    } else if table.has_other_incarnation(server_id) {
        DropReason::DeadIncarnation
    } else {
        DropReason::UnknownServer
    }
}

/// Only clients of established connections have a token to compare with.
fn reset_key<'t>(table: &'t Table, packet: &QuicPacket<'_>, server_id: u64, nonce: u64) -> Option<&'t ResetKey> {
    let established = packet.short && SessionNonce::from_u64(nonce).kind() == Some(Kind::Connection);
    established.then(|| table.reset_key(server_id, packet.cid)).flatten()
}

fn check_nonce(nonce: u64, packet: &QuicPacket<'_>, now: Now) -> Result<(), DropReason> {
    let nonce = SessionNonce::from_u64(nonce);
    match nonce.kind().ok_or(DropReason::CidKind)? {
        Kind::Connection => Ok(()),
        Kind::Initial if !packet.initial => Err(DropReason::InitialMisused),
        Kind::Initial if nonce.is_expired(now.unix_s) => Err(DropReason::InitialExpired),
        Kind::Initial => Ok(()),
    }
}

/// The nonce's top bits are kind and expiry, its low ones count: there is room for the relay's number between.
fn flow(server_id: u64, nonce: u64, header: &Header, initial: bool) -> Option<Flow> {
    let ingress = u64::from(header.relay.value());
    Some(Flow { key: [server_id, nonce ^ ingress << 40], client: header.client, initial })
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

#[cfg(test)]
mod tests;
