//! Two tiers of relays: a region whose workers only its own relays reach (invariant I3).
//!
//! Relays elsewhere send such a region's frames to its relays, by the region's prefix alone; its relays know all
//! others, and its workers know its own relays only.

use std::{collections::BTreeMap, sync::Arc};

use antiphon_core::{
    clock::Millis,
    id::{KeyGeneration, RegionNumber, RelayNumber},
};
use antiphon_proto::v1;

use super::{Fleet, State, relays::relay_number};

/// Region number → its relays, for regions that are reached through these only.
pub(crate) type RegionMap = BTreeMap<u16, Vec<u32>>;

impl Fleet {
    /// Whether other regions reach a region's workers through its relays only: our records say so, or it does itself.
    pub(super) fn is_via_relays(&self, state: &State, region: &str, now: Millis) -> bool {
        let ours = state.records.regions.get(region).is_some_and(|r| r.via_relays);
        let theirs = state.peers.get(region).and_then(|p| p.digest(now)).is_some_and(|d| d.via_relays);
        ours || theirs
    }

    /// Routes by region.
    pub(super) fn regions_via_relays(&self, state: &State, now: Millis) -> RegionMap {
        let peers = state.peers.iter().filter(|(region, _)| self.is_via_relays(state, region, now));
        let routes = peers.filter_map(|(region, peer)| {
            let number = state.records.regions.get(region)?.number.value();
            let relays: Vec<u32> = peer.relays(now).filter(|r| of_region(r, number)).map(|r| r.number).collect();
            (!relays.is_empty()).then_some((number, relays))
        });
        routes.collect()
    }

    /// Relays of other regions; with keys if this region is behind its relays, as then they bring frames to them.
    pub(crate) fn neighbours(&self, relay: RelayNumber) -> v1::RelayNeighbours {
        let now = self.clock.now();
        let state = self.state.lock();
        let behind = state.records.regions.get(&self.region).is_some_and(|r| r.via_relays);
        let generations: Vec<KeyGeneration> = state.keys.generations().filter(|_| behind).collect();
        let peers = state.peers.iter().filter_map(|(region, peer)| {
            let number = state.records.regions.get(region)?.number.value();
            Some(peer.relays(now).filter(move |r| of_region(r, number)).collect::<Vec<_>>())
        });
        let foreign: Vec<v1::RelayInfo> = peers.flatten().collect();
        drop(state);
        let neighbour = |info: v1::RelayInfo| {
            let number = relay_number(info.number)?;
            let keys = generations.iter().map(|generation| {
                let keys = self.root.relay_secret(number, *generation).hop_keys(relay);
                v1::HopKeys {
                    generation: generation.value(),
                    up: keys.up.as_bytes().to_vec().into(),
                    down: keys.down.as_bytes().to_vec().into(),
                }
            });
            let keys = keys.collect();
            Some(v1::RelayNeighbour { number: info.number, tunnel_address: info.tunnel_address, keys })
        };
        let mut neighbours: Vec<v1::RelayNeighbour> = foreign.into_iter().filter_map(neighbour).collect();
        neighbours.sort_by_key(|n| n.number);
        v1::RelayNeighbours { neighbours }
    }

    /// Routes by region, as relays need them.
    pub(crate) fn region_routes(&self) -> Arc<RegionMap> {
        Arc::clone(&self.state.lock().region_routes)
    }
}

/// Adds what turns `old` into `new` to an update of routes.
pub(crate) fn tell_regions(update: &mut v1::RouteUpdate, old: &RegionMap, new: &RegionMap) {
    let changed = new.iter().filter(|(number, relays)| old.get(number) != Some(relays));
    let route = |(number, relays): (&u16, &Vec<u32>)| v1::RegionRoute {
        region_number: (*number).into(),
        relays: relays.clone(),
    };
    update.region_upserts = changed.map(route).collect();
    let gone = old.keys().filter(|number| !new.contains_key(number));
    update.region_removals = gone.map(|number| (*number).into()).collect();
}

/// A region speaks for relays with its own numbers only.
fn of_region(relay: &v1::RelayInfo, region: u16) -> bool {
    relay_number(relay.number).map(RelayNumber::region) == RegionNumber::new(region).ok()
        && relay.tunnel_address.parse::<std::net::SocketAddr>().is_ok()
}
