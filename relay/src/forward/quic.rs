//! The part of QUIC that a relay reads (RFC 8999; RFC 9000, sections 12.2, 14.1 and 17).

use antiphon_core::cid::SessionCid;

use super::{DropReason, MAX_DATAGRAM};

/// The first packet of a client's datagram.
pub(super) struct QuicPacket<'d> {
    /// What follows is of version 1 and type Initial.
    pub(super) initial: bool,
    /// Has a short header.
    pub(super) short: bool,
    /// Whom it is for.
    pub(super) cid: &'d [u8; SessionCid::LEN],
}

impl<'d> QuicPacket<'d> {
    pub(super) fn parse(datagram: &'d [u8]) -> Result<Self, DropReason> {
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
            return Ok(Self { initial: false, short: true, cid });
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
        Ok(Self { initial, short: false, cid })
    }
}

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
