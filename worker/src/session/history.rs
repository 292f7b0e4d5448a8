//! What a session remembers of its packets' way, for whoever asks why it went as it went.

use std::{collections::VecDeque, net::SocketAddr, sync::Arc, time::Duration};

use antiphon_core::{id::RelayNumber, tunnel::ClientAddr};
use antiphon_proto::v1;

use crate::{paths::PathCount, socket::path_relay};

/// What happened on the way. A closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PathEventKind {
    /// The session began.
    Opened,
    /// The client has another address behind the same relay.
    AddressChanged,
    /// The client comes through another relay.
    RelayChanged,
    /// The relay in use said that it will stop.
    RelayDraining,
    /// Nothing comes from the client.
    Silent,
    /// Something came again.
    HeardAgain,
    /// The client uses a connection ID of another key generation.
    ConnectionIdRotated,
}

impl PathEventKind {
    const fn label(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::AddressChanged => "address_changed",
            Self::RelayChanged => "relay_changed",
            Self::RelayDraining => "relay_draining",
            Self::Silent => "silent",
            Self::HeardAgain => "heard_again",
            Self::ConnectionIdRotated => "connection_id_rotated",
        }
    }
}

/// What QUIC says of the connection, from its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Measured {
    pub(crate) rtt: Duration,
    pub(crate) lost_packets: u64,
}

#[derive(Debug)]
struct PathUse {
    path: SocketAddr,
    next_hop: Option<SocketAddr>,
    since: Duration,
    count: Arc<PathCount>,
    rtt: Duration,
    /// Of the connection, when this path came into use.
    lost_before: u64,
    lost_packets: u64,
}

/// The last paths and events of one session, bounded. Times are since the session began.
#[derive(Debug, Default)]
pub(crate) struct PathHistory {
    uses: VecDeque<PathUse>,
    events: VecDeque<v1::PathEvent>,
    lost_packets: u64,
    audio: (u64, u64, u64),
}

impl PathHistory {
    /// Another path is in use now.
    pub(crate) fn enter(&mut self, at: Duration, path: SocketAddr, count: Arc<PathCount>, why: &str) {
        let kind = match self.uses.back().map(|last| path_relay(last.path) == path_relay(path)) {
            None => PathEventKind::Opened,
            Some(true) => PathEventKind::AddressChanged,
            Some(false) => PathEventKind::RelayChanged,
        };
        if self.uses.len() == PATHS {
            self.uses.pop_front();
        }
        let (rtt, lost_before) = (Duration::ZERO, self.lost_packets);
        self.uses.push_back(PathUse { path, next_hop: None, since: at, count, rtt, lost_before, lost_packets: 0 });
        self.note(at, kind, why.to_owned());
    }

    /// Something happened on the path in use.
    pub(crate) fn note(&mut self, at: Duration, kind: PathEventKind, detail: String) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        let relay = self.uses.back().and_then(|last| path_relay(last.path)).map_or(0, RelayNumber::value);
        let (at_ms, kind) = (milliseconds(at), kind.label().to_owned());
        self.events.push_back(v1::PathEvent { at_ms, kind, relay: relay.into(), detail });
    }

    /// How the path in use does, and where frames for it are sent.
    pub(crate) fn measure(&mut self, measured: Measured, next_hop: Option<SocketAddr>) {
        self.lost_packets = measured.lost_packets;
        if let Some(last) = self.uses.back_mut() {
            last.rtt = measured.rtt;
            last.lost_packets = measured.lost_packets.saturating_sub(last.lost_before);
            last.next_hop = next_hop;
        }
    }

    /// RTP packets received and lost so far, and frames concealed.
    pub(crate) fn set_audio(&mut self, received: u64, lost: u64, concealed: u64) {
        self.audio = (received, lost, concealed);
    }

    /// What is told; whose session it is, is the caller's to fill in.
    pub(crate) fn describe(&self) -> v1::SessionPath {
        let newest = self.uses.len().saturating_sub(1);
        let (audio_received, audio_lost, audio_concealed) = self.audio;
        v1::SessionPath {
            paths: self.uses.iter().enumerate().map(|(index, path)| path.describe(index == newest)).collect(),
            events: self.events.iter().cloned().collect(),
            audio_received,
            audio_lost,
            audio_concealed,
            ..v1::SessionPath::default()
        }
    }
}

impl PathUse {
    fn describe(&self, current: bool) -> v1::PathUse {
        v1::PathUse {
            relay: path_relay(self.path).map_or(0, RelayNumber::value).into(),
            client_address: client_address(self.path),
            next_hop: self.next_hop.map(|address| address.to_string()).unwrap_or_default(),
            since_ms: milliseconds(self.since),
            current,
            received_packets: self.count.received(),
            sent_packets: self.count.sent(),
            rtt_us: u32::try_from(self.rtt.as_micros()).unwrap_or(u32::MAX),
            lost_packets: self.lost_packets,
        }
    }
}

/// The client's address as its relay sees it.
pub(crate) fn client_address(path: SocketAddr) -> String {
    ClientAddr::from(path).to_socket_addr().to_string()
}

fn milliseconds(since: Duration) -> u32 {
    u32::try_from(since.as_millis()).unwrap_or(u32::MAX)
}

const PATHS: usize = 8;
const EVENTS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::path_address;

    fn path(client: &str, relay: u16) -> SocketAddr {
        let client = ClientAddr::from(client.parse::<SocketAddr>().unwrap());
        path_address(client, RelayNumber::new(relay).unwrap())
    }

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn each_path_has_its_own_losses_and_each_change_its_kind() {
        let mut history = PathHistory::default();
        let measured = |rtt, lost_packets| Measured { rtt: ms(rtt), lost_packets };
        history.enter(ms(0), path("192.0.2.1:5", 65), Arc::default(), "began");
        history.measure(measured(20, 4), Some("10.0.0.1:4400".parse().unwrap()));
        history.enter(ms(5_000), path("192.0.2.1:5", 66), Arc::default(), "relay 65 drains");
        history.measure(measured(30, 5), None);
        history.enter(ms(9_000), path("192.0.2.1:6", 66), Arc::default(), "");
        history.set_audio(100, 2, 3);
        let told = history.describe();
        let kinds: Vec<_> = told.events.iter().map(|e| (e.kind.as_str(), e.relay)).collect();
        assert_eq!(kinds, [("opened", 65), ("relay_changed", 66), ("address_changed", 66)]);
        assert_eq!(told.events[1].detail, "relay 65 drains");
        let lost: Vec<_> = told.paths.iter().map(|p| (p.lost_packets, p.rtt_us, p.current)).collect();
        assert_eq!(lost, [(4, 20_000, false), (1, 30_000, false), (0, 0, true)]);
        assert_eq!((told.paths[0].client_address.as_str(), told.paths[0].since_ms), ("192.0.2.1:5", 0));
        assert_eq!((told.paths[0].next_hop.as_str(), told.paths[2].since_ms), ("10.0.0.1:4400", 9_000));
        assert_eq!((told.audio_received, told.audio_lost, told.audio_concealed), (100, 2, 3));
    }

    #[test]
    fn a_client_that_hops_for_ever_leaves_only_the_newest() {
        let mut history = PathHistory::default();
        for n in 0..1_000 {
            history.enter(ms(n), path("192.0.2.1:5", n as u16), Arc::default(), "");
            history.note(ms(n), PathEventKind::Silent, String::new());
        }
        let told = history.describe();
        assert_eq!((told.paths.len(), told.events.len()), (PATHS, EVENTS));
        assert_eq!((told.paths[7].relay, told.events[63].kind.as_str()), (999, "silent"));
    }
}
