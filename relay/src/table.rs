//! What the relay knows: who it is, its keys, and where each server ID lives.
//!
//! [`Routing`] collects what routers say and survives their absence (invariant I8); [`Table`] is the immutable
//! snapshot of it that the data path reads. Keys are derived when a route comes in, never per packet.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
};

use antiphon_core::{
    cid::{CidCodec, ConfigId},
    id::{KeyGeneration, RelayNumber, ServerId},
    keys::{RelaySecret, TunnelKey, TunnelKeys},
    tunnel::KeySlot,
};

/// Where a shard lives, and how to seal frames for it.
#[derive(Clone, Debug)]
pub struct Route {
    /// UDP address of the shard, in its own family.
    pub address: SocketAddr,
    /// Generation of `key`.
    pub slot: KeySlot,
    /// For frames to the shard.
    pub key: TunnelKey,
}

/// One immutable state of the relay's knowledge.
#[derive(Clone, Debug)]
pub struct Table {
    version: u64,
    relay: RelayNumber,
    codec: CidCodec,
    routes: HashMap<u64, Route>,
    /// Server IDs without their incarnation: tells a predecessor's packets from forged ones.
    shards: HashSet<u32>,
    /// Keys of all shards behind one source address, every generation.
    sources: HashMap<SocketAddr, Vec<(KeySlot, TunnelKey)>>,
}

impl Table {
    /// Forwards nothing: the state before a router was heard.
    #[must_use]
    pub fn empty() -> Self {
        Routing::new().table()
    }

    /// Version of the routes, as their router counts.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// This relay's number.
    #[must_use]
    pub const fn relay(&self) -> RelayNumber {
        self.relay
    }

    /// Decodes connection IDs.
    #[must_use]
    pub const fn codec(&self) -> &CidCodec {
        &self.codec
    }

    /// How many server IDs are routable.
    #[must_use]
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// Whether nothing is routable.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// The route of exactly this server ID.
    #[must_use]
    pub fn route(&self, server_id: u64) -> Option<&Route> {
        self.routes.get(&server_id)
    }

    /// All routes, one per live incarnation of a shard.
    pub fn routes(&self) -> impl Iterator<Item = &Route> {
        self.routes.values()
    }

    /// Whether the server ID's shard lives, in another incarnation.
    #[must_use]
    pub fn has_other_incarnation(&self, server_id: u64) -> bool {
        self.shards.contains(&shard_of(server_id))
    }

    /// Keys of frames that may come from `source`, an address in its own family.
    #[must_use]
    pub fn source_keys(&self, source: SocketAddr) -> Option<&[(KeySlot, TunnelKey)]> {
        self.sources.get(&source).map(Vec::as_slice)
    }
}

/// What a router tells a relay first.
#[derive(Clone, Debug)]
pub struct Welcome {
    /// The relay's number in the fleet.
    pub relay: RelayNumber,
    /// Connection-ID configurations, all that may be in use.
    pub cid_configs: Vec<(ConfigId, [u8; 16])>,
    /// The relay's secrets, all generations that may be in use.
    pub secrets: Vec<(KeyGeneration, RelaySecret)>,
    /// Generation to seal frames with; has to be one of `secrets`.
    pub sealing: KeyGeneration,
}

/// A change of the routes.
#[derive(Clone, Debug, Default)]
pub struct RouteChange {
    /// Counts up by one per change of one router.
    pub version: u64,
    /// Replaces all routes instead of changing those of `version - 1`.
    pub full: bool,
    /// New or moved shards.
    pub upserts: Vec<(ServerId, SocketAddr)>,
    /// Shards that are known to be gone.
    pub removals: Vec<ServerId>,
    /// Removing many at once is meant.
    pub mass_removal_intended: bool,
}

/// What became of a [`RouteChange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is in force.
    Applied,
    /// New routes are in force; the removals looked like a mistake and were not carried out.
    RemovalsRefused {
        /// Routes that would have gone.
        removals: usize,
        /// Of how many.
        of: usize,
    },
}

/// Why a change cannot be applied: the router has to send all its routes again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Changes between are missing.
    #[error("routes of version {got} do not follow version {have}")]
    Gap {
        /// The version in force.
        have: u64,
        /// The one that came.
        got: u64,
    },
}

/// All that forwarding needs: what is worth keeping over a restart.
#[derive(Clone, Debug)]
pub struct Known {
    /// Number and keys.
    pub welcome: Welcome,
    /// Version of the routes.
    pub version: u64,
    /// All routes, addresses in their own family.
    pub routes: Vec<(ServerId, SocketAddr)>,
}

/// All that routers have said so far.
#[derive(Debug)]
pub struct Routing {
    welcome: Option<Welcome>,
    version: Option<u64>,
    shards: BTreeMap<ServerId, Shard>,
}

#[derive(Debug)]
struct Shard {
    address: SocketAddr,
    keys: Vec<(KeyGeneration, TunnelKeys)>,
}

impl Default for Routing {
    fn default() -> Self {
        Self::new()
    }
}

impl Routing {
    /// Nothing was heard yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { welcome: None, version: None, shards: BTreeMap::new() }
    }

    /// Goes on from what an earlier process knew. A router's later word replaces it by the same rules as ever.
    #[must_use]
    pub fn restore(known: Known) -> Self {
        let Known { welcome, version, routes } = known;
        let shard = |(server_id, address): (ServerId, SocketAddr)| {
            (server_id, Shard { address, keys: derive(&welcome, server_id) })
        };
        let shards = routes.into_iter().map(shard).collect();
        Self { shards, version: Some(version), welcome: Some(welcome) }
    }

    /// What is in force, once keys and routes are.
    #[must_use]
    pub fn known(&self) -> Option<Known> {
        let (welcome, version) = (self.welcome.clone().filter(|_| self.has_keys())?, self.version?);
        let routes = self.shards.iter().map(|(server_id, shard)| (*server_id, shard.address)).collect();
        Some(Known { welcome, version, routes })
    }

    /// Takes number and keys; all tunnel keys are derived anew.
    pub fn welcome(&mut self, welcome: Welcome) {
        for (server_id, shard) in &mut self.shards {
            shard.keys = derive(&welcome, *server_id);
        }
        self.welcome = Some(welcome);
    }

    /// The number that a router gave this relay.
    #[must_use]
    pub fn number(&self) -> Option<RelayNumber> {
        self.welcome.as_ref().map(|w| w.relay)
    }

    /// Whether keys for connection IDs and tunnels are known.
    #[must_use]
    pub fn has_keys(&self) -> bool {
        self.welcome.as_ref().is_some_and(|w| !w.cid_configs.is_empty() && !w.secrets.is_empty())
    }

    /// Whether routes were heard at least once.
    #[must_use]
    pub const fn has_routes(&self) -> bool {
        self.version.is_some()
    }

    /// Applies a change.
    ///
    /// Removing more than a tenth of the routes is refused unless it is marked as intended: a router that lost its
    /// store must not take the fleet away with it. Deltas of a table smaller than [`GUARDED_ROUTES`] name each route
    /// and are taken at their word. What a refused change adds is in force all the same.
    ///
    /// # Errors
    /// [`ChangeError::Gap`]; nothing is changed then.
    pub fn apply(&mut self, change: RouteChange) -> Result<Outcome, ChangeError> {
        let have = self.version.unwrap_or(0);
        if !change.full && self.version.and_then(|v| v.checked_add(1)) != Some(change.version) {
            return Err(ChangeError::Gap { have, got: change.version });
        }
        let gone = self.removed_by(&change);
        let (removals, of) = (gone.len(), self.shards.len());
        let guarded = change.full || of >= GUARDED_ROUTES;
        let refused = guarded && removals * 10 > of && !change.mass_removal_intended;
        if !refused {
            for server_id in &gone {
                self.shards.remove(server_id);
            }
        }
        for (server_id, address) in change.upserts {
            let welcome = self.welcome.as_ref();
            let keys = || welcome.map_or_else(Vec::new, |w| derive(w, server_id));
            let address = SocketAddr::new(address.ip().to_canonical(), address.port());
            self.shards.entry(server_id).or_insert_with(|| Shard { address, keys: keys() }).address = address;
        }
        self.version = Some(change.version);
        Ok(if refused { Outcome::RemovalsRefused { removals, of } } else { Outcome::Applied })
    }

    fn removed_by(&self, change: &RouteChange) -> Vec<ServerId> {
        let kept: HashSet<ServerId> = change.upserts.iter().map(|(id, _)| *id).collect();
        let listed: HashSet<ServerId> = change.removals.iter().copied().collect();
        let goes = |id: &ServerId| !kept.contains(id) && (change.full || listed.contains(id));
        self.shards.keys().copied().filter(goes).collect()
    }

    /// The snapshot for the data path. Without keys it routes nothing.
    #[must_use]
    pub fn table(&self) -> Table {
        let mut table = Table {
            version: self.version.unwrap_or(0),
            relay: self.number().unwrap_or_else(unnumbered),
            codec: CidCodec::new(),
            routes: HashMap::with_capacity(self.shards.len()),
            shards: HashSet::with_capacity(self.shards.len()),
            sources: HashMap::with_capacity(self.shards.len()),
        };
        let Some(welcome) = &self.welcome else {
            return table;
        };
        for (id, key) in &welcome.cid_configs {
            table.codec.insert(*id, *key);
        }
        for (server_id, shard) in &self.shards {
            let sealing = |(generation, _): &&(KeyGeneration, TunnelKeys)| *generation == welcome.sealing;
            let Some((generation, keys)) = shard.keys.iter().find(sealing) else {
                continue;
            };
            let route = Route { address: shard.address, slot: KeySlot::of(*generation), key: keys.up.clone() };
            table.routes.insert(server_id.to_u64(), route);
            table.shards.insert(shard_of(server_id.to_u64()));
            let down = shard.keys.iter().map(|(g, k)| (KeySlot::of(*g), k.down.clone()));
            table.sources.entry(shard.address).or_default().extend(down);
        }
        table
    }
}

fn derive(welcome: &Welcome, server_id: ServerId) -> Vec<(KeyGeneration, TunnelKeys)> {
    let keys = |(generation, secret): &(KeyGeneration, RelaySecret)| (*generation, secret.tunnel_keys(server_id));
    welcome.secrets.iter().map(keys).collect()
}

/// Stands in a table that routes nothing.
fn unnumbered() -> RelayNumber {
    RelayNumber::new(0).expect("0 is a relay number")
}

const fn shard_of(server_id: u64) -> u32 {
    (server_id >> 32) as u32
}

/// From how many routes on a mass removal by a delta needs the mark.
pub const GUARDED_ROUTES: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_router_that_knows_little_takes_no_route_of_a_small_fleet_away() {
        let mut routing = Routing::new();
        let full = |version, ids: &[u64]| RouteChange {
            version,
            full: true,
            upserts: ids.iter().map(|n| (shard(*n), address(*n))).collect(),
            ..RouteChange::default()
        };
        routing.apply(full(9, &[1, 2, 3])).unwrap();
        assert!(matches!(routing.apply(full(1, &[2])).unwrap(), Outcome::RemovalsRefused { .. }));
        assert_eq!(routing.shards.len(), 3);
        let named = RouteChange { version: 2, removals: vec![shard(1)], ..RouteChange::default() };
        routing.apply(named).unwrap();
        assert_eq!(routing.shards.len(), 2);
    }

    fn shard(n: u64) -> ServerId {
        ServerId::from_u64(n << 32 | 7)
    }

    fn address(n: u64) -> SocketAddr {
        format!("127.0.0.1:{}", 1000 + n).parse().unwrap()
    }

    fn generation(n: u32) -> KeyGeneration {
        KeyGeneration::new(n).unwrap()
    }

    fn welcome() -> Welcome {
        Welcome {
            relay: RelayNumber::new(65).unwrap(),
            cid_configs: vec![(ConfigId::new(0).unwrap(), [1; 16])],
            secrets: vec![
                (generation(1), RelaySecret::from_bytes([1; 32])),
                (generation(2), RelaySecret::from_bytes([2; 32])),
            ],
            sealing: generation(1),
        }
    }

    fn full(version: u64, shards: std::ops::Range<u64>) -> RouteChange {
        RouteChange {
            version,
            full: true,
            upserts: shards.map(|n| (shard(n), address(n))).collect(),
            ..RouteChange::default()
        }
    }

    #[test]
    fn keys_and_routes_may_come_in_either_order() {
        let mut first = Routing::new();
        first.welcome(welcome());
        first.apply(full(1, 0..3)).unwrap();
        let mut second = Routing::new();
        assert!(!second.has_routes() && !second.has_keys());
        second.apply(full(1, 0..3)).unwrap();
        assert!(second.table().is_empty(), "no keys yet");
        second.welcome(welcome());
        for table in [first.table(), second.table()] {
            let keys = RelaySecret::from_bytes([1; 32]).tunnel_keys(shard(1));
            let route = table.route(shard(1).to_u64()).unwrap();
            assert_eq!((route.address, &route.key), (address(1), &keys.up));
            assert_eq!(table.source_keys(address(1)).unwrap().len(), 2);
            assert_eq!(table.source_keys(address(1)).unwrap()[0].1, keys.down);
            assert_eq!((table.len(), table.version(), table.relay().value()), (3, 1, 65));
        }
    }

    #[test]
    fn deltas_follow_each_other_or_are_refused() {
        let mut routing = Routing::new();
        routing.welcome(welcome());
        let delta = |version| RouteChange {
            version,
            upserts: vec![(shard(9), address(9))],
            removals: vec![shard(0)],
            ..RouteChange::default()
        };
        assert_eq!(routing.apply(delta(1)), Err(ChangeError::Gap { have: 0, got: 1 }));
        routing.apply(full(4, 0..3)).unwrap();
        assert_eq!(routing.apply(delta(6)), Err(ChangeError::Gap { have: 4, got: 6 }));
        assert_eq!(routing.apply(delta(5)), Ok(Outcome::Applied));
        let table = routing.table();
        assert!(table.route(shard(0).to_u64()).is_none());
        assert!(table.route(shard(9).to_u64()).is_some());
        assert!(routing.apply(full(1, 0..1)).is_ok(), "another router counts anew");
    }

    #[test]
    fn a_restart_changes_nothing_and_a_poor_router_takes_nothing_away_after_it() {
        let mut before = Routing::new();
        before.welcome(welcome());
        assert!(before.known().is_none(), "no routes yet");
        before.apply(full(7, 0..5)).unwrap();
        let mut after = Routing::restore(before.known().unwrap());
        let (was, is) = (before.table(), after.table());
        assert_eq!((is.len(), is.version(), is.relay()), (5, 7, was.relay()));
        for n in 0..5 {
            let (was, is) = (was.route(shard(n).to_u64()).unwrap(), is.route(shard(n).to_u64()).unwrap());
            assert_eq!((is.address, is.slot, &is.key), (was.address, was.slot, &was.key));
        }
        let refused = Ok(Outcome::RemovalsRefused { removals: 4, of: 5 });
        assert_eq!(after.apply(full(1, 4..6)), refused);
        let known = after.known().unwrap();
        assert_eq!((known.version, known.routes.len()), (1, 6), "what is in force is what is kept");
    }

    #[test]
    fn a_mass_removal_needs_its_mark_but_never_holds_new_routes_up() {
        let mut routing = Routing::new();
        routing.welcome(welcome());
        routing.apply(full(1, 0..20)).unwrap();
        let refused = Ok(Outcome::RemovalsRefused { removals: 20, of: 20 });
        assert_eq!(routing.apply(full(1, 50..51)), refused);
        assert_eq!(routing.table().len(), 21);
        let removal = |version, count| RouteChange {
            version,
            removals: (0..count).map(shard).collect(),
            ..RouteChange::default()
        };
        assert_eq!(routing.apply(removal(2, 2)), Ok(Outcome::Applied));
        let marked = RouteChange { mass_removal_intended: true, ..full(3, 0..1) };
        assert_eq!(routing.apply(marked), Ok(Outcome::Applied));
        assert_eq!(routing.table().len(), 1);
        assert_eq!(routing.apply(removal(4, 1)), Ok(Outcome::Applied), "a delta of a small table names what is gone");
    }

    #[test]
    fn a_predecessor_is_known_as_such() {
        let mut routing = Routing::new();
        routing.welcome(welcome());
        routing.apply(full(1, 0..2)).unwrap();
        let table = routing.table();
        let dead = shard(1).to_u64() ^ 1;
        assert!(table.route(dead).is_none() && table.has_other_incarnation(dead));
        assert!(!table.has_other_incarnation(shard(5).to_u64()));
        assert!(Table::empty().is_empty());
    }

    #[test]
    fn mapped_addresses_are_kept_in_their_own_family() {
        let mut routing = Routing::new();
        routing.welcome(welcome());
        let mapped = "[::ffff:127.0.0.1]:1001".parse().unwrap();
        let change =
            RouteChange { version: 1, full: true, upserts: vec![(shard(1), mapped)], ..RouteChange::default() };
        routing.apply(change).unwrap();
        assert!(routing.table().source_keys(address(1)).is_some());
    }
}
