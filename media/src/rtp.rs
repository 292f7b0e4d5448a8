//! RTP packets (RFC 3550) and their framing in QUIC datagrams (draft-ietf-avtcore-rtp-over-quic-14, section 5.2).

mod sequence;

use bytes::{BufMut, Bytes};

pub use sequence::{InterarrivalJitter, ReceptionReport, Sequence, SequenceTracker};

/// The fixed header's fields that carry information (RFC 3550, section 5.1), and our one extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RtpHeader {
    /// 0..=127.
    pub payload_type: u8,
    /// First packet after a silence (RFC 3551, section 4.1).
    pub marker: bool,
    /// Grows by one per packet.
    pub sequence: u16,
    /// Position of the payload's first sample, in the format's RTP clock.
    pub timestamp: u32,
    /// The stream.
    pub ssrc: u32,
    /// Low 16 bits of the response's generation: a one-byte-header extension (RFC 8285, section 4.2) with
    /// identifier 1 and two bytes, big endian.
    pub generation: Option<u16>,
}

/// A parsed packet; the payload shares the datagram's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RtpPacket {
    /// Header fields.
    pub header: RtpHeader,
    /// Without padding.
    pub payload: Bytes,
}

/// Why bytes are not an RTP packet of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RtpError {
    /// The datagram ends within the named part.
    #[error("datagram ends within its {0}")]
    Truncated(&'static str),
    /// RTP has been at version 2 since 1996.
    #[error("RTP version {0}, expected 2")]
    Version(u8),
    /// The last byte counts more padding than there is payload, or none at all.
    #[error("padding of {padding} bytes in {payload} bytes of payload")]
    Padding {
        /// What the last byte says.
        padding: usize,
        /// What follows the header.
        payload: usize,
    },
    /// Another payload type was agreed for the session.
    #[error("payload type {found}, agreed was {agreed}")]
    PayloadType {
        /// In the packet.
        found: u8,
        /// Of the session's format.
        agreed: u8,
    },
}

impl RtpHeader {
    /// Appends the header in wire format: 12 bytes, or 20 with a generation.
    pub fn write(&self, out: &mut impl BufMut) {
        let extension = u8::from(self.generation.is_some());
        out.put_u8(VERSION << 6 | extension << 4);
        out.put_u8(u8::from(self.marker) << 7 | self.payload_type & 0x7f);
        out.put_u16(self.sequence);
        out.put_u32(self.timestamp);
        out.put_u32(self.ssrc);
        if let Some(generation) = self.generation {
            out.put_u16(ONE_BYTE_PROFILE);
            out.put_u16(1); // length in words
            out.put_u8(GENERATION_ID << 4 | (2 - 1)); // length less one
            out.put_u16(generation);
            out.put_u8(0); // padding to the word
        }
    }
}

impl RtpPacket {
    /// Parses a whole packet. CSRCs and extensions of others are skipped, padding is cut off.
    pub fn parse(datagram: &Bytes) -> Result<Self, RtpError> {
        let fixed: &[u8; FIXED_HEADER] = datagram.first_chunk().ok_or(RtpError::Truncated("RTP header"))?;
        if fixed[0] >> 6 != VERSION {
            return Err(RtpError::Version(fixed[0] >> 6));
        }
        let mut offset = FIXED_HEADER + usize::from(fixed[0] & 0x0f) * 4;
        if datagram.len() < offset {
            return Err(RtpError::Truncated("contributing sources"));
        }
        let mut generation = None;
        if fixed[0] & 0x10 != 0 {
            let extension = parse_extension(&datagram[offset..])?;
            generation = extension.generation;
            offset += extension.bytes;
        }
        let mut end = datagram.len();
        if fixed[0] & 0x20 != 0 {
            let payload = end - offset;
            let padding = datagram.last().map_or(0, |&byte| usize::from(byte));
            if padding == 0 || padding > payload {
                return Err(RtpError::Padding { padding, payload });
            }
            end -= padding;
        }
        let header = RtpHeader {
            payload_type: fixed[1] & 0x7f,
            marker: fixed[1] & 0x80 != 0,
            sequence: u16::from_be_bytes([fixed[2], fixed[3]]),
            timestamp: u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]),
            ssrc: u32::from_be_bytes([fixed[8], fixed[9], fixed[10], fixed[11]]),
            generation,
        };
        Ok(Self { header, payload: datagram.slice(offset..end) })
    }
}

struct Extension {
    bytes: usize,
    generation: Option<u16>,
}

/// Walks a header extension (RFC 3550, section 5.3.1; RFC 8285, section 4.2).
fn parse_extension(bytes: &[u8]) -> Result<Extension, RtpError> {
    let header: &[u8; 4] = bytes.first_chunk().ok_or(RtpError::Truncated("header extension"))?;
    let profile = u16::from_be_bytes([header[0], header[1]]);
    let length = usize::from(u16::from_be_bytes([header[2], header[3]])) * 4;
    let mut elements = bytes.get(4..4 + length).ok_or(RtpError::Truncated("header extension"))?;
    let mut extension = Extension { bytes: 4 + length, generation: None };
    if profile != ONE_BYTE_PROFILE {
        return Ok(extension);
    }
    while let Some((&head, rest)) = elements.split_first() {
        let (id, size) = (head >> 4, usize::from(head & 0x0f) + 1);
        match id {
            0 => elements = rest, // padding
            15 => break,          // reserved: stop
            _ => {
                let Some((value, rest)) = rest.split_at_checked(size) else {
                    return Err(RtpError::Truncated("header extension element"));
                };
                if let (GENERATION_ID, &[high, low]) = (id, value) {
                    extension.generation = Some(u16::from_be_bytes([high, low]));
                }
                elements = rest;
            }
        }
    }
    Ok(extension)
}

/// Largest QUIC variable-length integer (RFC 9000, section 16).
pub const MAX_FLOW: u64 = (1 << 62) - 1;

/// Appends a flow identifier as a QUIC variable-length integer in its shortest form.
///
/// Identifiers above [`MAX_FLOW`] do not exist; their two highest bits are dropped.
pub fn write_flow(flow: u64, out: &mut impl BufMut) {
    let flow = flow & MAX_FLOW;
    match flow {
        0..=0x3f => out.put_u8(flow as u8),
        0x40..=0x3fff => out.put_u16(flow as u16 | 0x4000),
        0x4000..=0x3fff_ffff => out.put_u32(flow as u32 | 0x8000_0000),
        _ => out.put_u64(flow | 0xc000_0000_0000_0000),
    }
}

/// Bytes that [`write_flow`] appends.
pub const fn flow_bytes(flow: u64) -> usize {
    match flow & MAX_FLOW {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

/// Splits a datagram into flow identifier and the rest, which shares the datagram's memory.
pub fn split_flow(datagram: &Bytes) -> Result<(u64, Bytes), RtpError> {
    let truncated = RtpError::Truncated("flow identifier");
    let first = *datagram.first().ok_or(truncated)?;
    let length = 1usize << (first >> 6);
    let bytes = datagram.get(..length).ok_or(truncated)?;
    let value = bytes.iter().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
    let mask = u64::MAX >> (64 - 8 * length + 2);
    Ok((value & mask, datagram.slice(length..)))
}

const VERSION: u8 = 2;
const FIXED_HEADER: usize = 12;
const ONE_BYTE_PROFILE: u16 = 0xbede;
const GENERATION_ID: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(header: RtpHeader, payload: &[u8]) -> Bytes {
        let mut out = Vec::new();
        header.write(&mut out);
        out.extend_from_slice(payload);
        out.into()
    }

    fn header() -> impl Strategy<Value = RtpHeader> {
        (0u8..128, any::<bool>(), any::<u16>(), any::<u32>(), any::<u32>(), any::<Option<u16>>()).prop_map(
            |(payload_type, marker, sequence, timestamp, ssrc, generation)| RtpHeader {
                payload_type,
                marker,
                sequence,
                timestamp,
                ssrc,
                generation,
            },
        )
    }

    #[test]
    fn the_wire_format_is_frozen() {
        let header = RtpHeader {
            payload_type: 96,
            marker: true,
            sequence: 0x1234,
            timestamp: 0x89ab_cdef,
            ssrc: 0x0102_0304,
            generation: None,
        };
        assert_eq!(bytes(header, b"x")[..], *b"\x80\xe0\x12\x34\x89\xab\xcd\xef\x01\x02\x03\x04x");
        let header = RtpHeader { generation: Some(0x0708), marker: false, ..header };
        assert_eq!(
            bytes(header, b"x")[..],
            *b"\x90\x60\x12\x34\x89\xab\xcd\xef\x01\x02\x03\x04\xbe\xde\x00\x01\x11\x07\x08\x00x"
        );
    }

    #[test]
    fn padding_sources_and_foreign_extensions_are_taken_off() {
        // P, X, two CSRCs; an extension of another profile with one word; 3 bytes of padding.
        let packet = Bytes::from_static(
            b"\xb2\x60\x00\x01\x00\x00\x00\x02\x00\x00\x00\x03AAAABBBB\x10\x00\x00\x01CCCCpayload\x00\x00\x03",
        );
        assert_eq!(RtpPacket::parse(&packet).unwrap().payload, "payload");
    }

    #[test]
    fn broken_packets_say_what_is_wrong() {
        let parse = |bytes: &'static [u8]| RtpPacket::parse(&Bytes::from_static(bytes)).unwrap_err();
        assert_eq!(parse(b""), RtpError::Truncated("RTP header"));
        assert_eq!(parse(b"\x40aaaaaaaaaaa"), RtpError::Version(1));
        assert_eq!(parse(b"\x81aaaaaaaaaaa"), RtpError::Truncated("contributing sources"));
        assert_eq!(parse(b"\x90aaaaaaaaaaa\xbe\xde\x00\x09"), RtpError::Truncated("header extension"));
        assert_eq!(parse(b"\xa0aaaaaaaaaaa\x00"), RtpError::Padding { padding: 0, payload: 1 });
        assert_eq!(parse(b"\xa0aaaaaaaaaaa\x09"), RtpError::Padding { padding: 9, payload: 1 });
    }

    #[test]
    fn flows_have_the_lengths_of_rfc_9000() {
        // Examples of RFC 9000, appendix A.1.
        for (flow, wire) in [
            (151_288_809_941_952_652, &b"\xc2\x19\x7c\x5e\xff\x14\xe8\x8c"[..]),
            (494_878_333, b"\x9d\x7f\x3e\x7d"),
            (15_293, b"\x7b\xbd"),
            (37, b"\x25"),
        ] {
            let mut out = Vec::new();
            write_flow(flow, &mut out);
            assert_eq!(out, wire);
            assert_eq!(flow_bytes(flow), wire.len());
        }
        assert_eq!(split_flow(&Bytes::from_static(b"\x40\x25rest")).unwrap(), (37, "rest".into()));
    }

    proptest! {
        #[test]
        fn packets_round_trip(header in header(), payload: Vec<u8>, flow in 0..=MAX_FLOW) {
            let mut out = Vec::new();
            write_flow(flow, &mut out);
            out.extend_from_slice(&bytes(header, &payload));
            let (found, rest) = split_flow(&out.into()).unwrap();
            prop_assert_eq!(found, flow);
            prop_assert_eq!(RtpPacket::parse(&rest).unwrap(), RtpPacket { header, payload: payload.into() });
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes: Vec<u8>, version in any::<bool>()) {
            if let (true, Some(first)) = (version, bytes.first_mut()) {
                *first = *first & 0x3f | 0x80;
            }
            let bytes = Bytes::from(bytes);
            let _ = RtpPacket::parse(&bytes);
            let _ = split_flow(&bytes);
        }
    }
}
