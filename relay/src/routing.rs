//! What routers say, collected: [`Routing`] survives their absence (invariant I8) and makes the
//! [`Table`](crate::table::Table).
//!
//! Every router of the region speaks for itself. What any of them holds is in force; a full list of one takes away
//! nothing that another one holds; what one says is gone or dead is gone, whoever held it. A new incarnation of a shard
//! takes the place of the older one in what its router says.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use antiphon_core::{
    id::{KeyGeneration, RegionNumber, RelayNumber, ServerId},
    keys::{RelaySecret, TunnelKeys},
};

use crate::{
    keyring::{Keyring, OtherKeys},
    neighbour::{Choice, Contact},
};

mod change;
mod snapshot;

pub use change::{ChangeError, DeadServer, Disagreement, Known, NeighbourRecord, Outcome, RouteChange, Welcome};

/// All that routers have said so far.
#[derive(Debug)]
pub struct Routing {
    welcome: Option<Welcome>,
    /// Version that came from disk.
    restored: Option<u64>,
    routers: Vec<Router>,
    /// Positions of routers that left; the next ones that come take them over, words included.
    vacant: BTreeSet<usize>,
    /// What came from disk, as if every router had said it.
    ancestral: Router,
    shards: BTreeMap<ServerId, Shard>,
    regions: BTreeMap<RegionNumber, Region>,
    neighbours: BTreeMap<RelayNumber, Adjacent>,
    /// With the Unix second when it was heard.
    dead: BTreeMap<ServerId, (DeadServer, u64)>,
}

/// One router's words.
#[derive(Clone, Debug, Default)]
struct Router {
    /// Its keys while it is connected.
    keys: Option<Keyring>,
    version: Option<u64>,
    shards: HashSet<ServerId>,
    regions: BTreeMap<RegionNumber, Vec<RelayNumber>>,
    neighbours: BTreeSet<RelayNumber>,
}

#[derive(Debug)]
struct Shard {
    address: SocketAddr,
    keys: Vec<(KeyGeneration, TunnelKeys)>,
}

#[derive(Debug, Default)]
struct Region {
    relays: BTreeSet<RelayNumber>,
    choice: Arc<Choice>,
}

#[derive(Debug)]
struct Adjacent {
    record: NeighbourRecord,
    /// Keys of this relay's clients' frames.
    own: Vec<(KeyGeneration, TunnelKeys)>,
    contact: Arc<Contact>,
}

impl Routing {
    /// Nothing was heard yet of this many routers; the methods take their positions.
    #[must_use]
    pub fn new(routers: usize) -> Self {
        Self {
            welcome: None,
            restored: None,
            routers: vec![Router::default(); routers],
            vacant: BTreeSet::new(),
            ancestral: Router::default(),
            shards: BTreeMap::new(),
            regions: BTreeMap::new(),
            neighbours: BTreeMap::new(),
            dead: BTreeMap::new(),
        }
    }

    /// Goes on from what an earlier process knew, as if each router had said it. Their later words replace it by the
    /// same rules as ever.
    #[must_use]
    pub fn restore(routers: usize, known: Known) -> Self {
        let mut routing = Self::new(routers);
        let Known { welcome, version, routes, regions, neighbours, dead } = known;
        routing.ancestral = Router {
            shards: routes.iter().map(|(id, _)| *id).collect(),
            regions: regions.iter().cloned().collect(),
            neighbours: neighbours.iter().map(|n| n.number).collect(),
            ..Router::default()
        };
        routing.routers.fill(routing.ancestral.clone());
        if routers == 0 {
            // Somebody has to hold the words until the first router comes.
            let position = routing.join();
            routing.vacant.insert(position);
        }
        routing.restored = Some(version);
        routing.welcome = Some(welcome);
        routes.into_iter().for_each(|(server_id, address)| routing.insert(server_id, address));
        neighbours.into_iter().for_each(|record| routing.adjoin(record));
        dead.into_iter().for_each(|(server, heard)| routing.bury(heard, server));
        routing.join_regions();
        routing
    }

    /// A router comes; its position.
    ///
    /// It takes over the words of one that left, as one that restarts under another address would: its full list then
    /// replaces them by the same rules as ever.
    pub fn join(&mut self) -> usize {
        if let Some(position) = self.vacant.pop_first() {
            return position;
        }
        self.routers.push(self.ancestral.clone());
        self.routers.len() - 1
    }

    /// A router is no longer named. That says nothing of what it had said, which stays.
    pub fn leave(&mut self, router: usize) {
        self.disconnected(router);
        self.vacant.insert(router);
    }

    /// What is in force, once keys and routes are.
    #[must_use]
    pub fn known(&self) -> Option<Known> {
        let welcome = self.welcome.clone().filter(|_| self.has_keys() && self.has_routes())?;
        Some(Known {
            welcome,
            version: self.version(),
            routes: self.shards.iter().map(|(server_id, shard)| (*server_id, shard.address)).collect(),
            regions: self.regions.iter().map(|(r, region)| (*r, region.relays.iter().copied().collect())).collect(),
            neighbours: self.neighbours.values().map(|n| n.record.clone()).collect(),
            dead: self.dead.values().cloned().collect(),
        })
    }

    /// Takes number and keys of a router; it counts as connected from here on.
    ///
    /// # Errors
    /// [`Disagreement`] with another connected router; nothing is changed then.
    pub fn welcome(&mut self, router: usize, welcome: Welcome) -> Result<(), Disagreement> {
        let others = self.routers.iter().enumerate().any(|(n, r)| n != router && r.keys.is_some());
        let have = self.number().filter(|have| others && *have != welcome.relay);
        if let Some(have) = have {
            return Err(Disagreement::Number { have, got: welcome.relay });
        }
        self.agree(router, &welcome.keys)?;
        if self.number() != Some(welcome.relay) {
            // Secrets are a number's own: none of the former's is of use.
            self.welcome = None;
        }
        self.take_keys(router, welcome.relay, welcome.keys);
        Ok(())
    }

    /// Takes new keys of a router.
    ///
    /// # Errors
    /// [`Disagreement`] with another connected router; nothing is changed then.
    pub fn rotate(&mut self, router: usize, keys: Keyring) -> Result<(), Disagreement> {
        self.agree(router, &keys)?;
        if let Some(relay) = self.number() {
            self.take_keys(router, relay, keys);
        }
        Ok(())
    }

    fn agree(&self, router: usize, keys: &Keyring) -> Result<(), OtherKeys> {
        let others = self.routers.iter().enumerate().filter(|(n, _)| *n != router);
        others.filter_map(|(_, other)| other.keys.as_ref()).try_for_each(|theirs| theirs.agrees_with(keys))
    }

    /// All tunnel keys are derived anew.
    fn take_keys(&mut self, router: usize, relay: RelayNumber, keys: Keyring) {
        let held = self.welcome.take().map_or_else(|| keys.clone(), |w| w.keys);
        self.routers[router].keys = Some(keys);
        let latest = self.routers[router].keys.iter();
        let others = self.routers.iter().enumerate().filter(|(n, _)| *n != router).filter_map(|(_, r)| r.keys.as_ref());
        let offered: Vec<_> = latest.chain(others).collect();
        let keys = held.after(&offered);
        for (server_id, shard) in &mut self.shards {
            shard.keys = derive(&keys, |secret| secret.tunnel_keys(*server_id));
        }
        for (number, adjacent) in &mut self.neighbours {
            adjacent.own = derive(&keys, |secret| secret.hop_keys(*number));
        }
        self.welcome = Some(Welcome { relay, keys });
    }

    /// The router's stream ended: what it said stays, but it has no say in what is to go.
    pub fn disconnected(&mut self, router: usize) {
        self.routers[router].keys = None;
    }

    /// How many routers have been welcomed and not left since.
    #[must_use]
    pub fn connected(&self) -> usize {
        self.routers.iter().filter(|r| r.keys.is_some()).count()
    }

    /// The number that routers gave this relay.
    #[must_use]
    pub fn number(&self) -> Option<RelayNumber> {
        self.welcome.as_ref().map(|w| w.relay)
    }

    /// Whether keys for connection IDs and tunnels are known.
    #[must_use]
    pub fn has_keys(&self) -> bool {
        self.welcome.as_ref().is_some_and(|w| !w.keys.cid.is_empty() && !w.keys.secrets.is_empty())
    }

    /// Whether routes were heard at least once.
    #[must_use]
    pub fn has_routes(&self) -> bool {
        self.restored.is_some() || self.routers.iter().any(|r| r.version.is_some())
    }

    /// Version of the routes that the router has sent last.
    #[must_use]
    pub fn version_of(&self, router: usize) -> Option<u64> {
        self.routers[router].version
    }

    /// The highest version that a router has sent, else the one from disk.
    fn version(&self) -> u64 {
        self.routers.iter().filter_map(|r| r.version).max().or(self.restored).unwrap_or(0)
    }

    /// Replaces the relays of other regions that a router names.
    ///
    /// An empty list takes nothing away: it is what a router says that has lost its store.
    pub fn neighbours(&mut self, router: usize, records: Vec<NeighbourRecord>) -> Outcome {
        let named: BTreeSet<_> = records.iter().map(|r| r.number).collect();
        let removals = self.routers[router].neighbours.len();
        if named.is_empty() && removals > 0 {
            return Outcome::RemovalsRefused { removals, of: removals };
        }
        self.routers[router].neighbours = named;
        records.into_iter().for_each(|record| self.adjoin(record));
        let routers = &self.routers;
        self.neighbours.retain(|number, _| routers.iter().any(|r| r.neighbours.contains(number)));
        Outcome::Applied
    }

    fn adjoin(&mut self, record: NeighbourRecord) {
        let Some(welcome) = self.welcome.as_ref().filter(|w| w.relay.region() != record.number.region()) else {
            return;
        };
        let record = NeighbourRecord { address: canonical(record.address), ..record };
        match self.neighbours.get_mut(&record.number) {
            Some(adjacent) => adjacent.record = record,
            None => {
                let own = derive(&welcome.keys, |secret| secret.hop_keys(record.number));
                self.neighbours.insert(record.number, Adjacent { record, own, contact: Arc::default() });
            }
        }
    }

    /// Applies a change of a router at `now`, in Unix seconds.
    ///
    /// Removing more than a tenth of what the router has said is refused unless it is marked as intended: a router that
    /// lost its store must not take the fleet away with it. Deltas of a table smaller than [`GUARDED_ROUTES`] name each
    /// route and are taken at their word. What a refused change adds is in force all the same. Servers that are dead, or
    /// replaced by a new incarnation, go on that evidence and are no removals.
    ///
    /// # Errors
    /// [`ChangeError::Gap`]; nothing is changed then.
    pub fn apply(&mut self, router: usize, now: u64, change: RouteChange) -> Result<Outcome, ChangeError> {
        let version = self.routers[router].version;
        if !change.full && version.and_then(|v| v.checked_add(1)) != Some(change.version) {
            return Err(ChangeError::Gap { have: version.unwrap_or(0), got: change.version });
        }
        self.routers[router].version = Some(change.version);
        self.dead.retain(|_, (_, heard)| now < heard.saturating_add(REMEMBERED_S));
        change.dead.iter().for_each(|server| self.bury(now, server.clone()));
        let change = RouteChange { upserts: self.living(&change), ..change };
        self.replace(router, &change.upserts);
        let gone = self.removed_by(router, &change);
        let (removals, of) = (gone.shards.len() + gone.regions.len(), gone.of);
        let guarded = change.full || of >= GUARDED_ROUTES;
        let refused = guarded && removals * 10 > of && !change.mass_removal_intended;
        if !refused {
            self.remove(router, &gone);
        }
        for (server_id, address) in change.upserts {
            self.routers[router].shards.insert(server_id);
            self.dead.remove(&server_id);
            self.insert(server_id, address);
        }
        self.routers[router].regions.extend(change.region_upserts);
        self.join_regions();
        Ok(if refused { Outcome::RemovalsRefused { removals, of } } else { Outcome::Applied })
    }

    /// A change's upserts, less those of servers that were proven dead and have a living successor: such a router goes by
    /// an old list. Without a successor it is believed, for a death can turn out to be none.
    fn living(&self, change: &RouteChange) -> Vec<(ServerId, SocketAddr)> {
        let replaced =
            |id: &ServerId| self.dead.contains_key(id) && self.incarnations_of(*id).any(|other| other != *id);
        change.upserts.iter().filter(|(id, _)| !replaced(id)).copied().collect()
    }

    /// A new incarnation takes the place of older ones in what its router says. Their routes go once no router holds
    /// them.
    fn replace(&mut self, router: usize, upserts: &[(ServerId, SocketAddr)]) {
        let named: HashSet<_> = upserts.iter().map(|(id, _)| *id).collect();
        let new = named.iter().filter(|id| !self.routers[router].shards.contains(id));
        let older =
            |id: &ServerId| self.incarnations_of(*id).filter(|other| !named.contains(other)).collect::<Vec<_>>();
        let gone: HashSet<_> = new.flat_map(older).collect();
        self.routers[router].shards.retain(|id| !gone.contains(id));
        self.remove_unheld(&gone);
    }

    /// Living incarnations of the server's shard, itself among them.
    fn incarnations_of(&self, server_id: ServerId) -> impl Iterator<Item = ServerId> {
        let first = server_id.to_u64() & !u64::from(u32::MAX);
        let [first, last] = [first, first | u64::from(u32::MAX)].map(ServerId::from_u64);
        self.shards.range(first..=last).map(|(id, _)| *id)
    }

    fn removed_by(&self, router: usize, change: &RouteChange) -> Removal {
        let router = &self.routers[router];
        let kept: HashSet<_> = change.upserts.iter().map(|(id, _)| *id).collect();
        let kept_regions: HashSet<_> = change.region_upserts.iter().map(|(region, _)| *region).collect();
        if change.full {
            // Only what it had said itself.
            return Removal {
                of: router.shards.len() + router.regions.len(),
                shards: router.shards.difference(&kept).copied().collect(),
                regions: router.regions.keys().filter(|r| !kept_regions.contains(r)).copied().collect(),
                everywhere: false,
            };
        }
        let held = |id: &&ServerId| self.shards.contains_key(id) && !kept.contains(id);
        let held_region = |r: &&RegionNumber| self.regions.contains_key(r) && !kept_regions.contains(r);
        Removal {
            of: self.shards.len() + self.regions.len(),
            shards: change.removals.iter().filter(held).copied().collect::<HashSet<_>>(),
            regions: change.region_removals.iter().filter(held_region).copied().collect(),
            everywhere: true,
        }
    }

    /// Removal by name is evidence, so no other router's word holds the route; absence from a list is not.
    fn remove(&mut self, router: usize, gone: &Removal) {
        let speakers = if gone.everywhere { 0..self.routers.len() } else { router..router + 1 };
        for speaker in &mut self.routers[speakers] {
            speaker.shards.retain(|id| !gone.shards.contains(id));
            speaker.regions.retain(|region, _| !gone.regions.contains(region));
        }
        self.remove_unheld(&gone.shards);
    }

    fn remove_unheld(&mut self, shards: &HashSet<ServerId>) {
        for server_id in shards {
            if self.routers.iter().all(|r| !r.shards.contains(server_id)) {
                self.shards.remove(server_id);
            }
        }
    }

    fn insert(&mut self, server_id: ServerId, address: SocketAddr) {
        let keys = &self.welcome;
        let derived = || keys.as_ref().map_or_else(Vec::new, |w| derive(&w.keys, |s| s.tunnel_keys(server_id)));
        let address = canonical(address);
        self.shards.entry(server_id).or_insert_with(|| Shard { address, keys: derived() }).address = address;
    }

    fn join_regions(&mut self) {
        let mut joined = BTreeMap::<RegionNumber, BTreeSet<RelayNumber>>::new();
        for (region, relays) in self.routers.iter().flat_map(|r| &r.regions) {
            joined.entry(*region).or_default().extend(relays);
        }
        let region = |(number, relays): (RegionNumber, BTreeSet<RelayNumber>)| {
            let choice = self.regions.remove(&number).map(|region| region.choice).unwrap_or_default();
            (number, Region { relays, choice })
        };
        self.regions = joined.into_iter().map(region).collect();
    }

    /// A proven death is evidence, as a removal by name is: no router's word holds the route.
    fn bury(&mut self, heard: u64, server: DeadServer) {
        for speaker in self.routers.iter_mut().chain([&mut self.ancestral]) {
            speaker.shards.remove(&server.server_id);
        }
        self.shards.remove(&server.server_id);
        self.dead.insert(server.server_id, (server, heard));
        while self.dead.len() > MAX_DEAD {
            let eldest = self.dead.iter().min_by_key(|(_, (_, heard))| *heard).map(|(id, _)| *id);
            eldest.and_then(|id| self.dead.remove(&id));
        }
    }
}

struct Removal {
    /// How many entries there are to remove from.
    of: usize,
    shards: HashSet<ServerId>,
    regions: HashSet<RegionNumber>,
    /// Whoever said them.
    everywhere: bool,
}

fn derive(keys: &Keyring, each: impl Fn(&RelaySecret) -> TunnelKeys) -> Vec<(KeyGeneration, TunnelKeys)> {
    keys.secrets.iter().map(|(generation, secret)| (*generation, each(secret))).collect()
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// From how many routes on a mass removal by a delta needs the mark.
pub const GUARDED_ROUTES: usize = 10;

/// Dead servers that are remembered at most; the eldest goes first.
pub const MAX_DEAD: usize = 4096;

/// How long they are, in seconds.
pub const REMEMBERED_S: u64 = 600;

#[cfg(test)]
mod tests;
