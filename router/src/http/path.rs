//! JSON form of the way of a session's packets.

use antiphon_proto::v1;
use serde::Serialize;

/// Answer of `GET /v1/sessions/{session}/path`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SessionPath {
    session: String,
    region: String,
    worker: String,
    epoch: u32,
    age_ms: u32,
    paths: Vec<PathUse>,
    events: Vec<PathEvent>,
    audio_received: u64,
    audio_lost: u64,
    audio_concealed: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PathUse {
    relay: u32,
    client_address: String,
    next_hop: String,
    since_ms: u32,
    current: bool,
    received_packets: u64,
    sent_packets: u64,
    /// Absent: unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    rtt_us: Option<u32>,
    lost_packets: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PathEvent {
    at_ms: u32,
    kind: String,
    relay: u32,
    detail: String,
}

impl From<v1::SessionPath> for SessionPath {
    fn from(path: v1::SessionPath) -> Self {
        let used = |p: v1::PathUse| PathUse {
            relay: p.relay,
            client_address: p.client_address,
            next_hop: p.next_hop,
            since_ms: p.since_ms,
            current: p.current,
            received_packets: p.received_packets,
            sent_packets: p.sent_packets,
            rtt_us: (p.rtt_us > 0).then_some(p.rtt_us),
            lost_packets: p.lost_packets,
        };
        let event = |e: v1::PathEvent| PathEvent { at_ms: e.at_ms, kind: e.kind, relay: e.relay, detail: e.detail };
        Self {
            session: path.session,
            region: path.region,
            worker: path.worker,
            epoch: path.epoch,
            age_ms: path.age_ms,
            paths: path.paths.into_iter().map(used).collect(),
            events: path.events.into_iter().map(event).collect(),
            audio_received: path.audio_received,
            audio_lost: path.audio_lost,
            audio_concealed: path.audio_concealed,
        }
    }
}
