//! Frames from workers, and from relays of other regions.

use std::net::SocketAddr;

use antiphon_core::{
    id::ServerId,
    keys::TunnelKey,
    tunnel::{self, ClientAddr, Direction, Ecn, Header, KeySlot, MAX_SKEW, Notice, OpenError},
};

use super::{
    DropReason, FromTunnel, Memo, Now, Onward, QuicPacket, Refusal, Sender, Skew, ToClient, check_nonce, decapsulated,
    flow, is_answerable, nobody,
};
use crate::{
    neighbour::Neighbour,
    table::{ShardKey, Source, Table},
};

/// Judges a frame that came from `from`, an address in its own family; `outer` is the frame's own ECN.
///
/// Only keys of whoever lives at that address are tried: nobody can speak for another one.
///
/// # Errors
/// Why it goes nowhere.
pub fn classify_frame<'t, 'f>(
    table: &'t Table,
    now: Now,
    frame: &'f [u8],
    from: SocketAddr,
    outer: Ecn,
    memo: &mut Memo<'t>,
) -> Result<FromTunnel<'t, 'f>, Refusal> {
    match memo.source(table, from).ok_or(DropReason::ForeignSource)? {
        Source::Shards(keys) => of_worker(table, now, frame, keys, outer),
        Source::Neighbour(at) => of_relay(table, now, frame, &table.neighbours()[*at], outer),
    }
}

fn of_worker<'t, 'f>(
    table: &'t Table,
    now: Now,
    frame: &'f [u8],
    keys: &[ShardKey],
    outer: Ecn,
) -> Result<FromTunnel<'t, 'f>, Refusal> {
    let slot = Header::parse(frame).map_err(refusal)?.key_slot;
    let mut outcome = Err(DropReason::FrameKey.into());
    for ShardKey { key, server_id, .. } in keys.iter().filter(|k| k.slot == slot) {
        outcome = open(frame, key, Direction::Down, now, Sender::Shard(*server_id));
        if !matches!(outcome, Err(Refusal { reason: DropReason::FrameTag, .. })) {
            break;
        }
    }
    let (header, datagram) = outcome?;
    if header.relay == table.relay() {
        return to_client(header, datagram, outer);
    }
    // The client is another relay's, which sent it through this one.
    let through = table.neighbour(header.relay).ok_or(DropReason::FrameRelay)?;
    let (slot, key) = through.sealing_for_its_clients().ok_or(DropReason::FrameRelay)?;
    if !is_answerable(header.client.to_socket_addr()) {
        return Err(DropReason::ClientAddress.into());
    }
    let onward =
        Onward { address: through.address, key, header: next_hop(header, slot, outer)?, through: None, flow: None };
    Ok(FromTunnel::Onward(onward, datagram))
}

fn of_relay<'t, 'f>(
    table: &'t Table,
    now: Now,
    frame: &'f [u8],
    relay: &'t Neighbour,
    outer: Ecn,
) -> Result<FromTunnel<'t, 'f>, Refusal> {
    let header = Header::parse(frame).map_err(refusal)?;
    match header.direction {
        Direction::Up => of_its_client(table, now, frame, relay, header.key_slot, outer),
        Direction::Down => for_own_client(table, now, frame, relay, header.key_slot, outer),
    }
}

/// This relay is in the worker's region: only exact routes of that region count, so nothing is sent on to a third relay.
fn of_its_client<'t, 'f>(
    table: &'t Table,
    now: Now,
    frame: &'f [u8],
    relay: &'t Neighbour,
    slot: KeySlot,
    outer: Ecn,
) -> Result<FromTunnel<'t, 'f>, Refusal> {
    let key = relay.theirs.iter().find(|(generation, _)| KeySlot::of(*generation) == slot);
    let (generation, keys) = key.ok_or(DropReason::FrameKey)?;
    let (header, datagram) = open(frame, &keys.up, Direction::Up, now, Sender::Relay(relay.number))?;
    relay.contact.proved(*generation);
    if header.relay != relay.number {
        return Err(DropReason::FrameRelay.into());
    }
    if header.client == ClientAddr::RELAY {
        return notice(relay, header, datagram);
    }
    let packet = QuicPacket::parse(datagram)?;
    let (server_id, nonce) = table.codec().decode_u64(packet.cid).ok_or(DropReason::CidConfig)?;
    if ServerId::from_u64(server_id).region != table.relay().region() {
        return Err(DropReason::FrameRegion.into());
    }
    let route = table.route(server_id).ok_or_else(|| nobody(table, now, server_id))?;
    check_nonce(nonce, &packet, now)?;
    if !is_answerable(header.client.to_socket_addr()) {
        return Err(DropReason::ClientAddress.into());
    }
    let onward = Onward {
        address: route.address,
        key: &route.key,
        header: next_hop(header, route.slot, outer)?,
        through: None,
        flow: flow(server_id, nonce, &header, packet.initial),
    };
    Ok(FromTunnel::Onward(onward, datagram))
}

/// This relay is the client's: the frame ends here.
fn for_own_client<'t, 'f>(
    table: &'t Table,
    now: Now,
    frame: &'f [u8],
    relay: &'t Neighbour,
    slot: KeySlot,
    outer: Ecn,
) -> Result<FromTunnel<'t, 'f>, Refusal> {
    let (_, key) = relay.returning.iter().find(|(of, _)| *of == slot).ok_or(DropReason::FrameKey)?;
    let (header, datagram) = open(frame, key, Direction::Down, now, Sender::Relay(relay.number))?;
    if header.client == ClientAddr::RELAY && header.relay == relay.number {
        return notice(relay, header, datagram);
    }
    relay.contact.heard();
    if header.relay != table.relay() {
        return Err(DropReason::FrameRelay.into());
    }
    to_client(header, datagram, outer)
}

fn notice<'t, 'f>(from: &'t Neighbour, header: Header, bytes: &[u8]) -> Result<FromTunnel<'t, 'f>, Refusal> {
    let notice = Notice::from_bytes(bytes).ok_or(DropReason::FrameNotice)?;
    Ok(FromTunnel::Notice { from, header, notice })
}

fn to_client<'t, 'f>(header: Header, datagram: &'f [u8], outer: Ecn) -> Result<FromTunnel<'t, 'f>, Refusal> {
    let client = header.client.to_socket_addr();
    if !is_answerable(client) {
        return Err(DropReason::ClientAddress.into());
    }
    Ok(FromTunnel::ToClient(ToClient { client, ecn: decapsulated(header.ecn, outer), datagram }))
}

fn next_hop(header: Header, slot: KeySlot, outer: Ecn) -> Result<Header, DropReason> {
    let next = header.next_hop(slot).map_err(refusal)?;
    Ok(Header { ecn: decapsulated(header.ecn, outer), ..next })
}

fn open<'f>(
    frame: &'f [u8],
    key: &TunnelKey,
    direction: Direction,
    now: Now,
    sender: Sender,
) -> Result<(Header, &'f [u8]), Refusal> {
    tunnel::open(frame, key, direction, now.unix_s, MAX_SKEW).map_err(|error| {
        let header = Header::parse(frame).ok().filter(|_| error == OpenError::Stale);
        let skew = header.map(|header| Skew { sender, ahead_s: header.seconds_ahead(now.unix_s) });
        Refusal { reason: refusal(error), skew }
    })
}

const fn refusal(error: OpenError) -> DropReason {
    match error {
        OpenError::TooShort | OpenError::Version | OpenError::Direction => DropReason::FrameMalformed,
        OpenError::HopLimit => DropReason::FrameHopLimit,
        OpenError::Tag => DropReason::FrameTag,
        OpenError::Stale => DropReason::FrameStale,
    }
}
