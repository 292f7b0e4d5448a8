//! What other regions' routers tell: digests, which go stale, and routes, which do not.

use std::{sync::Arc, time::Duration};

use antiphon_core::{
    clock::Millis,
    generation::RegionKeys,
    placement::{Freshness, PoolView, RegionView},
};
use antiphon_proto::v1;

use super::{Fleet, keys, routes, routes::RouteMap};
use crate::records::{self, Region};

/// One other region.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    pub(crate) digest: Option<Arc<v1::RegionDigest>>,
    pub(crate) heard: Option<Millis>,
    pub(crate) routes: RouteMap,
    /// What it said of its keys.
    pub(crate) keys: RegionKeys,
}

impl Peer {
    /// The region as the planner sees it: what its router says, and what our records say while it is silent.
    pub(crate) fn view(record: &Region, peer: Option<&Self>) -> RegionView {
        let digest = peer.and_then(|p| p.digest.as_deref());
        let pool = |pool: &v1::PoolDigest| PoolView {
            agent: pool.agent.clone(),
            gpu_class: pool.gpu_class.clone(),
            workers: pool.workers,
            slots: pool.slots,
            free: pool.free,
        };
        RegionView {
            name: record.name.clone(),
            number: record.number,
            location: record.location,
            phase: digest.map_or(record.phase, |d| records::phase(d.phase)),
            residency: record.residency.clone(),
            freshness: peer
                .and_then(|p| p.heard)
                .map_or(Freshness::Never, |at| Freshness::Reported { at, lease: DIGEST_LEASE }),
            pools: digest.map_or_else(Vec::new, |d| d.pools.iter().map(pool).collect()),
        }
    }
}

impl Fleet {
    /// Takes an update of another region; an empty one only says that what we have is current.
    pub(crate) fn peer_reported(&self, region: &str, update: v1::RegionUpdate) {
        let mut state = self.state.lock();
        let Some(number) = state.records.regions.get(region).map(|r| r.number) else {
            return;
        };
        let now = self.clock.now();
        let peer = state.peers.entry(region.to_owned()).or_default();
        peer.heard = Some(now);
        let mut relays_changed = false;
        if let Some(digest) = update.digest {
            if digest.region != region || digest.number != u32::from(number.value()) {
                tracing::warn!(region, "digest of another region ignored");
                return;
            }
            let before = peer.digest.as_ref().map(|d| &d.relays);
            relays_changed = before != Some(&digest.relays);
            peer.keys.heard(keys::said(&digest));
            peer.digest = Some(Arc::new(digest));
        }
        let routes_changed = update.routes.is_some_and(|update| {
            let before = peer.routes.clone();
            let skipped = routes::merge(&mut peer.routes, &update, number.value());
            if skipped > 0 {
                tracing::warn!(region, skipped, "routes that are not the peer's ignored");
            }
            before != peer.routes
        });
        state.view = None;
        if routes_changed {
            self.routes_changed(&mut state);
        } else if relays_changed {
            self.topology.send_modify(|n| *n += 1);
        }
        drop(state);
        // Room elsewhere may be what someone waits for.
        self.settled.send_modify(|n| *n += 1);
    }

    /// Age of the oldest digest among peers that were heard; `None`: no peer was.
    pub(crate) fn oldest_digest(&self) -> Option<Duration> {
        let now = self.clock.now();
        let state = self.state.lock();
        let heard = state.peers.values().filter_map(|p| p.heard);
        heard.map(|at| now.since(at)).max()
    }

    /// Regions with routers to talk to: name and address.
    pub(crate) fn peer_addresses(&self) -> Vec<(String, String)> {
        let state = self.state.lock();
        let others = state.records.regions.values();
        let others = others.filter(|r| r.name != self.region);
        others.filter_map(|r| Some((r.name.clone(), r.router_addresses.first()?.clone()))).collect()
    }
}

/// How long a digest holds for placement; peers are heard at least every second.
pub(crate) const DIGEST_LEASE: Duration = Duration::from_secs(5);
