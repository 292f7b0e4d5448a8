//! What other regions' routers tell: digests, which go stale, and routes, which do not.
//!
//! A region may have several routers. Each tells of the region as it sees it; a route is there if any of them says so,
//! and goes once one of them knows that its worker is gone. A router that has just started knows little and takes
//! nothing away.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use antiphon_core::{
    clock::Millis,
    generation::RegionKeys,
    placement::{Freshness, PoolView, RegionView},
};
use antiphon_proto::v1;

use super::{
    Fleet, State, clock, keys,
    relays::RELAY_PATIENCE,
    remembered::{KnownRouter, NamedRelay, RecallError, Times},
    routes,
    routes::RouteMap,
};
use crate::records::{self, Region};

/// One other region.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    /// By address. What routers said that have no address any more is under the empty one.
    routers: BTreeMap<String, Router>,
    /// Of all routers together, by number, and when they were last named.
    relays: BTreeMap<u32, (v1::RelayInfo, Millis)>,
    pub(super) routes: RouteMap,
}

/// One of its routers.
#[derive(Debug, Default)]
struct Router {
    digest: Option<Arc<v1::RegionDigest>>,
    heard: Option<Millis>,
    /// Its clock minus ours, when it last said what time it is.
    clock_ahead_ms: i64,
    keys: RegionKeys,
    routes: RouteMap,
    /// Its stream is broken, or there was none yet.
    silent: bool,
    /// All that is here was heard before this process started.
    recalled: bool,
}

impl Router {
    fn speaks(&self, now: Millis) -> bool {
        !self.silent && self.heard.is_some_and(|at| now.since(at) <= DIGEST_LEASE)
    }

    fn workers(&self) -> u64 {
        self.digest.iter().flat_map(|d| &d.pools).map(|p| u64::from(p.workers)).sum()
    }
}

impl Peer {
    /// The digest to go by: of those who speak, or of all if none does, the one who knows most workers.
    pub(super) fn digest(&self, now: Millis) -> Option<&Arc<v1::RegionDigest>> {
        let told = self.routers.values().filter(|r| r.digest.is_some());
        told.max_by_key(|r| (r.speaks(now), r.workers(), r.heard))?.digest.as_ref()
    }

    /// When the region was last heard.
    pub(super) fn heard(&self) -> Option<Millis> {
        self.routers.values().filter_map(|r| r.heard).max()
    }

    /// When the region was last heard by this process.
    pub(super) fn speaking(&self) -> Option<Millis> {
        self.routers.values().filter(|r| !r.recalled).filter_map(|r| r.heard).max()
    }

    /// How far the clock is ahead that is furthest from ours.
    pub(super) fn clock_ahead_ms(&self) -> i64 {
        self.routers.values().map(|r| r.clock_ahead_ms).max_by_key(|ms| ms.unsigned_abs()).unwrap_or(0)
    }

    /// Its keys, as those see them together who speak; who does not speaks through them, as they share a store.
    pub(super) fn keys(&self, now: Millis) -> RegionKeys {
        let speaks = self.routers.values().any(|r| r.speaks(now));
        let told = self.routers.values().filter(|r| r.heard.is_some() && (r.speaks(now) || !speaks));
        let together = |a: RegionKeys, b: RegionKeys| RegionKeys {
            wanted: a.wanted.min(b.wanted),
            minting: a.minting.min(b.minting),
            loaded: a.loaded.into_iter().filter(|g| b.loaded.contains(g)).collect(),
            oldest: match (a.oldest, b.oldest) {
                (0, oldest) | (oldest, 0) => oldest,
                (a, b) => a.min(b),
            },
        };
        told.map(|r| r.keys.clone()).reduce(together).unwrap_or_default()
    }

    /// Its relays; nobody new should use one that is not named any more.
    pub(super) fn relays(&self, now: Millis) -> impl Iterator<Item = v1::RelayInfo> {
        let named = self.digest(now).map(Arc::clone);
        let heard = self.heard().unwrap_or_default();
        self.relays.values().map(move |(relay, last_named)| {
            let current = named.iter().flat_map(|d| &d.relays).any(|r| r.number == relay.number);
            let phase = if current { relay.phase } else { v1::Phase::Cordoned.into() };
            // While the region is silent nothing is known of its relays, and nothing is held against them.
            let missing = relay.missing || (!current && heard.since(*last_named) > RELAY_PATIENCE);
            v1::RelayInfo { phase, missing, ..relay.clone() }
        })
    }

    fn name_relays(&mut self, digest: &v1::RegionDigest, now: Millis) -> bool {
        let known = |peer: &Self| -> Vec<v1::RelayInfo> { peer.relays.values().map(|(r, _)| r.clone()).collect() };
        let before = known(self);
        let gone = |number: &u32| digest.gone_relays.contains(number);
        self.relays.retain(|number, (_, named)| now.since(*named) <= RELAY_MEMORY && !gone(number));
        for relay in digest.relays.iter().take(MAX_RELAYS) {
            self.relays.insert(relay.number, (relay.clone(), now));
        }
        before != known(self)
    }

    /// Takes routes of one of its routers; says whether the region's routes changed, and how many were none of its own.
    fn take_routes(&mut self, address: &str, update: &v1::RouteUpdate, number: u16) -> (bool, usize) {
        let router = self.routers.entry(address.to_owned()).or_default();
        let skipped = routes::merge(&mut router.routes, update, number);
        // What a full state lacks proves something about its sender only; the rest is evidence for all.
        let named = update.upserts.iter().map(|r| r.server_id);
        let named: Vec<u64> = named.filter(|id| router.routes.contains_key(id)).collect();
        let dead = update.dead.iter().map(|d| d.server_id);
        let gone: BTreeSet<u64> = update.removals.iter().copied().chain(dead).collect();
        for (other, router) in &mut self.routers {
            router.routes.retain(|id, _| !gone.contains(id));
            if other != address {
                named.iter().for_each(|id| routes::make_room(&mut router.routes, *id));
            }
        }
        (self.unite(), skipped)
    }

    fn unite(&mut self) -> bool {
        let mut all = RouteMap::new();
        for router in self.routers.values() {
            for (id, address) in &router.routes {
                routes::insert(&mut all, *id, Arc::clone(address));
            }
        }
        std::mem::replace(&mut self.routes, all) != self.routes
    }

    /// Routers whose address is gone say nothing more; their routes stay until somebody takes them away.
    fn keep_routers(&mut self, addresses: &[String]) {
        let gone: Vec<String> =
            self.routers.keys().filter(|a| !a.is_empty() && !addresses.contains(a)).cloned().collect();
        for address in gone {
            let left = self.routers.remove(&address).map(|r| r.routes).unwrap_or_default();
            self.routers.entry(String::new()).or_default().routes.extend(left);
        }
    }

    /// What to keep of it.
    pub(super) fn known(&self, times: Times) -> (Vec<KnownRouter>, Vec<NamedRelay>) {
        let routers = self.routers.iter().map(|(address, router)| KnownRouter {
            address: address.clone(),
            digest: router.digest.as_deref().cloned(),
            heard: router.heard.map(|at| times.unix_of(at)),
            clock_ahead_ms: router.clock_ahead_ms,
            wanted: router.keys.wanted,
            minting: router.keys.minting,
            oldest: router.keys.oldest,
            loaded: router.keys.loaded.clone(),
            routes: router.routes.iter().map(routes::route).collect(),
        });
        let relays = self
            .relays
            .values()
            .map(|(relay, named)| NamedRelay { relay: Some(relay.clone()), named: times.unix_of(*named) });
        (routers.collect(), relays.collect())
    }

    /// What was kept of it: said by routers that are silent until they speak.
    pub(super) fn recalled(routers: &[KnownRouter], relays: &[NamedRelay], times: Times) -> Result<Self, RecallError> {
        let mut peer = Self::default();
        for known in routers {
            let mut routes = RouteMap::new();
            for v1::Route { server_id, tunnel_address } in &known.routes {
                if tunnel_address.parse::<std::net::SocketAddr>().is_err() {
                    return Err(RecallError::Route(tunnel_address.clone()));
                }
                routes::insert(&mut routes, *server_id, tunnel_address.as_str().into());
            }
            let router = Router {
                digest: known.digest.clone().map(Arc::new),
                heard: known.heard.map(|at| times.at(at)),
                clock_ahead_ms: known.clock_ahead_ms,
                keys: RegionKeys {
                    wanted: known.wanted,
                    minting: known.minting,
                    loaded: known.loaded.clone(),
                    oldest: known.oldest,
                },
                routes,
                silent: true,
                recalled: true,
            };
            peer.routers.insert(known.address.clone(), router);
        }
        for known in relays {
            let relay = known.relay.clone().ok_or(RecallError::Nameless)?;
            peer.relays.insert(relay.number, (relay, times.at(known.named)));
        }
        peer.unite();
        Ok(peer)
    }

    /// The region as the planner sees it: what its routers say, and what our records say while they are silent.
    pub(crate) fn view(record: &Region, peer: Option<&Self>, now: Millis) -> RegionView {
        let digest = peer.and_then(|p| p.digest(now));
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
            freshness: match peer.and_then(Self::speaking) {
                Some(at) => Freshness::Reported { at, lease: DIGEST_LEASE },
                None if peer.and_then(Self::heard).is_some() => Freshness::Disconnected,
                None => Freshness::Never,
            },
            pools: digest.map_or_else(Vec::new, |d| d.pools.iter().map(pool).collect()),
        }
    }
}

impl Fleet {
    /// Takes an update of a router of another region, or of this one; an empty one only says that what we have is
    /// current. `unix_ms` is our clock's time.
    pub(crate) fn peer_reported(&self, region: &str, address: &str, update: v1::RegionUpdate, unix_ms: u64) {
        let mut state = self.state.lock();
        let Some(number) = state.records.regions.get(region).map(|r| r.number) else {
            return;
        };
        let now = self.clock.now();
        if region == self.region {
            // Its routers share all but what operators and workers told only one of them.
            let dead = update.routes.map(|r| r.dead).unwrap_or_default();
            state.sibling_said(address, update.digest.as_ref(), now);
            drop(state);
            self.sibling_reported(&dead);
            if let Some(digest) = update.digest.filter(|d| d.gone_relays.len() <= MAX_RELAYS) {
                self.sibling_lost_relays(address, &digest.gone_relays);
            }
            return;
        }
        let wrong = |d: &v1::RegionDigest| d.region != region || d.number != u32::from(number.value());
        if update.digest.as_ref().is_some_and(wrong) {
            tracing::warn!(region, address, "digest of another region ignored");
            return;
        }
        let peer = state.peers.entry(region.to_owned()).or_default();
        let mut relays_changed = false;
        let router = peer.routers.entry(address.to_owned()).or_default();
        (router.heard, router.silent, router.recalled) = (Some(now), false, false);
        if let Some(digest) = update.digest {
            router.keys.heard(keys::said(&digest));
            if digest.unix_ms > 0 {
                let clock_ahead_ms = clock::ahead_ms(digest.unix_ms, unix_ms);
                clock::tell("router", address, router.clock_ahead_ms, clock_ahead_ms);
                router.clock_ahead_ms = clock_ahead_ms;
            }
            let digest = Arc::new(digest);
            router.digest = Some(Arc::clone(&digest));
            relays_changed = peer.name_relays(&digest, now);
        }
        let mut routes_changed = false;
        if let Some(update) = update.routes {
            let (changed, skipped) = peer.take_routes(address, &update, number.value());
            routes_changed = changed;
            if skipped > 0 {
                tracing::warn!(region, skipped, "routes that are not the peer's ignored");
            }
            let theirs = |d: &v1::DeadServer| routes::region_of(d.server_id) == number.value();
            for server in update.dead.into_iter().filter(theirs).filter(|d| d.reset_keys.len() <= MAX_RESET_KEYS) {
                routes_changed |= state.dead.insert(server, false, now);
            }
        }
        state.view = None;
        if routes_changed || relays_changed {
            self.routes_changed(&mut state);
        }
        drop(state);
        // Room elsewhere may be what someone waits for.
        self.settled.send_modify(|n| *n += 1);
    }

    /// A router's stream broke: until it is back, others of its region are asked.
    pub(crate) fn peer_lost(&self, region: &str, address: &str) {
        let mut state = self.state.lock();
        let routers = state.peers.get_mut(region).map(|p| &mut p.routers);
        if let Some(router) = routers.and_then(|r| r.get_mut(address)) {
            router.silent = true;
        }
    }

    /// Drops what routers said that are in the records no more.
    pub(super) fn keep_peers(&self, state: &mut State) {
        let records = Arc::clone(&state.records);
        for (region, peer) in &mut state.peers {
            peer.keep_routers(records.regions.get(region).map_or(&[], |r| &r.router_addresses));
        }
    }

    /// Age of the oldest digest among peers that were heard; `None`: no peer was.
    pub(crate) fn oldest_digest(&self) -> Option<Duration> {
        let now = self.clock.now();
        let state = self.state.lock();
        let heard = state.peers.values().filter_map(Peer::heard);
        heard.map(|at| now.since(at)).max()
    }

    /// Other regions with routers to talk to.
    pub(crate) fn peer_regions(&self) -> Vec<String> {
        let state = self.state.lock();
        let others = state.records.regions.values();
        let others = others.filter(|r| r.name != self.region && !r.router_addresses.is_empty());
        others.map(|r| r.name.clone()).collect()
    }

    /// All routers of a region are out of touch.
    pub(crate) fn is_silent(&self, region: &str) -> bool {
        let state = self.state.lock();
        let routers = state.peers.get(region).map(|peer| &peer.routers);
        routers.is_some_and(|routers| !routers.is_empty() && routers.values().all(|router| router.silent))
    }

    /// The routers of a region, those first that were heard last.
    pub(crate) fn routers_of(&self, region: &str) -> Vec<String> {
        let state = self.state.lock();
        let Some(record) = state.records.regions.get(region) else {
            return Vec::new();
        };
        let routers = state.peers.get(region).map(|p| &p.routers);
        let mut addresses = record.router_addresses.clone();
        addresses.sort_by_key(|address| {
            let router = routers.and_then(|r| r.get(address));
            let silent = router.is_none_or(|r| r.silent);
            // Among those who speak the records' order counts.
            let heard = router.and_then(|r| r.heard).filter(|_| silent);
            (silent, std::cmp::Reverse(heard))
        });
        addresses
    }

    /// All routers to listen to: region and address. Those of this region are among them, this one too, as a router
    /// does not know under which address others reach it.
    pub(crate) fn routers_to_watch(&self) -> Vec<(String, String)> {
        let state = self.state.lock();
        let regions = state.records.regions.values();
        let watched = regions.filter(|r| r.name != self.region || r.router_addresses.len() > 1);
        watched.flat_map(|r| r.router_addresses.iter().map(|a| (r.name.clone(), a.clone()))).collect()
    }
}

/// How long a digest holds for placement; peers are heard at least every second.
pub(crate) const DIGEST_LEASE: Duration = Duration::from_secs(5);
/// How long relays are known that are not named any more: their clients may still be on their way.
const RELAY_MEMORY: Duration = Duration::from_secs(600);
/// A region numbers no more.
const MAX_RELAYS: usize = 64;
/// Of all shards in all generations.
const MAX_RESET_KEYS: usize = 192;
