//! Follows the path of one session's packets and keeps its history.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use antiphon_core::id::{KeyGeneration, RelayNumber};
use antiphon_media::jitter::JitterStats;
use quinn::Connection;

use super::history::{Measured, PathEventKind, client_address};
use crate::{capacity::Terms, paths::PathCount, shard::ShardContext, socket::path_relay};

/// The path in use, as long as its session lives.
#[derive(Debug)]
pub(super) struct PathWatch {
    context: Arc<ShardContext>,
    terms: Arc<Terms>,
    address: SocketAddr,
    count: Arc<PathCount>,
    /// The minting generation when the connection got its first IDs.
    began: KeyGeneration,
    /// Of the connection ID that the client used last.
    generation: Option<KeyGeneration>,
    silent: bool,
    /// The last relay that said it will stop.
    draining: Option<RelayNumber>,
}

impl PathWatch {
    pub(super) fn begin(
        context: Arc<ShardContext>,
        terms: Arc<Terms>,
        connection: &Connection,
        began: KeyGeneration,
    ) -> Self {
        let address = connection.remote_address();
        let count = context.paths.enter(address);
        let why = format!("client {} with an ID of generation {began}", client_address(address));
        terms.path.lock().enter(terms.age(), address, count.clone(), &why);
        terms.set_relay(path_relay(address));
        Self { context, terms, address, count, began, generation: Some(began), silent: false, draining: None }
    }

    /// Whose path it is: the relay that the client talks to.
    pub(super) fn relay(&self) -> Option<RelayNumber> {
        path_relay(self.address)
    }

    /// Something came from the client, after nothing for `gap`.
    pub(super) fn on_heard(&mut self, connection: &Connection, gap: Duration) {
        if std::mem::take(&mut self.silent) {
            let detail = format!("after {} ms", gap.as_millis());
            self.terms.path.lock().note(self.terms.age(), PathEventKind::HeardAgain, detail);
        }
        let address = connection.remote_address();
        if address != self.address {
            self.change(address, gap);
        }
    }

    fn change(&mut self, address: SocketAddr, gap: Duration) {
        let (from, to) = (client_address(self.address), client_address(address));
        let why = match (path_relay(self.address), path_relay(address)) {
            (old, new) if old == new => format!("client went from {from} to {to}: its network or NAT changed"),
            (Some(old), _) if self.draining == Some(old) => format!("relay {old} had said that it stops"),
            (Some(old), _) if gap > NOTABLE_GAP => {
                format!("nothing had come through relay {old} for {} ms", gap.as_millis())
            }
            (old, _) => format!("client left relay {}", old.map_or(0, RelayNumber::value)),
        };
        self.context.paths.leave(self.address);
        self.address = address;
        self.count = self.context.paths.enter(address);
        self.terms.path.lock().enter(self.terms.age(), address, self.count.clone(), &why);
        self.terms.set_relay(path_relay(address));
    }

    /// The relay in use said that it will stop.
    pub(super) fn on_draining(&mut self, relay: RelayNumber, left: Duration) {
        self.draining = Some(relay);
        let detail = format!("relay {relay} stops within {} ms", left.as_millis());
        self.terms.path.lock().note(self.terms.age(), PathEventKind::RelayDraining, detail);
    }

    /// 20 ms passed; the client has been silent for that long.
    pub(super) fn on_step(&mut self, silence: Duration) {
        if silence > SILENT && !self.silent {
            self.silent = true;
            let detail = format!("nothing for {} ms", silence.as_millis());
            self.terms.path.lock().note(self.terms.age(), PathEventKind::Silent, detail);
        }
    }

    /// About a second passed.
    pub(super) fn measure(&mut self, connection: &Connection, audio: &JitterStats) {
        let stats = connection.stats().path;
        let measured = Measured { rtt: stats.rtt, lost_packets: stats.lost_packets };
        let next_hop = self.relay().and_then(|relay| self.context.relays.load().next_hop_address(relay));
        let rotation = &self.context.rotation;
        let used = self.count.config().and_then(|config| rotation.of_config(config));
        let mut history = self.terms.path.lock();
        if let (Some(before), Some(now)) = (self.generation, used)
            && before != now
        {
            let detail = format!("generation {before} to {now}");
            history.note(self.terms.age(), PathEventKind::ConnectionIdRotated, detail);
        }
        self.generation = used.or(self.generation);
        history.measure(measured, next_hop);
        history.set_audio(audio.received, audio.lost, audio.concealed);
        self.terms.set_generation(rotation.oldest(self.began, self.generation, std::time::Instant::now()));
    }
}

impl Drop for PathWatch {
    fn drop(&mut self) {
        self.context.paths.leave(self.address);
    }
}

/// Silence that is written down; heartbeats come every 80 ms.
const SILENT: Duration = Duration::from_millis(500);
/// Silence before a change of relay that explains it.
const NOTABLE_GAP: Duration = Duration::from_millis(120);
