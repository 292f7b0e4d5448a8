//! What a QUIC datagram carries: a flow identifier, then the flow's payload (draft-ietf-avtcore-rtp-over-quic-14,
//! section 5.2).

use antiphon_core::varint;
use antiphon_proto::v1::Heartbeat;
use bytes::Bytes;
use prost::Message as _;

/// The flows of `antiphon/1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// RTP, both directions.
    Audio,
    /// [`Heartbeat`] messages.
    Heartbeat,
}

impl Flow {
    /// The identifier on the wire.
    #[must_use]
    pub const fn id(self) -> u32 {
        match self {
            Self::Audio => 0,
            Self::Heartbeat => 1,
        }
    }
}

/// Splits a datagram into its flow and payload; `None` for an unknown flow or a cut identifier.
#[must_use]
pub fn split_flow(datagram: &[u8]) -> Option<(Flow, &[u8])> {
    let (id, prefix) = varint::read(datagram)?;
    let flow = [Flow::Audio, Flow::Heartbeat].into_iter().find(|flow| u64::from(flow.id()) == id)?;
    Some((flow, datagram.get(prefix..)?))
}

/// A heartbeat as a datagram.
#[must_use]
pub fn heartbeat(message: &Heartbeat) -> Bytes {
    let mut out = Vec::with_capacity(1 + message.encoded_len());
    varint::write(Flow::Heartbeat.id().into(), &mut out);
    message.encode(&mut out).expect("a Vec grows as needed");
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_told_apart_and_strangers_ignored() {
        let beat = Heartbeat { epoch: 3, sequence: 1, ..Heartbeat::default() };
        let datagram = heartbeat(&beat);
        let (flow, payload) = split_flow(&datagram).unwrap();
        assert_eq!(flow, Flow::Heartbeat);
        assert_eq!(Heartbeat::decode(payload).unwrap(), beat);
        assert_eq!(split_flow(&[0, 9]), Some((Flow::Audio, &[9][..])));
        for strange in [&[][..], &[2, 0], &[0x40], &[0xc0, 0, 0]] {
            assert_eq!(split_flow(strange), None);
        }
    }
}
