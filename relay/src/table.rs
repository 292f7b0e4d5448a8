//! What the data path reads: who the relay is, its keys, and where each server ID lives.
//!
//! A [`Table`] is an immutable snapshot of what [`Routing`](crate::routing::Routing) has collected. Keys are derived when
//! it is made, never per packet.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

use antiphon_core::{
    cid::{CidCodec, SessionCid},
    clock::Millis,
    id::{KeyGeneration, RegionNumber, RelayNumber, ServerId},
    keys::TunnelKey,
    tunnel::KeySlot,
};

use crate::{
    neighbour::{Neighbour, Ways},
    reset::ResetKey,
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
    pub(crate) version: u64,
    pub(crate) relay: RelayNumber,
    pub(crate) loaded: Vec<KeyGeneration>,
    pub(crate) codec: CidCodec,
    pub(crate) routes: HashMap<u64, Route>,
    /// Server IDs without their incarnation: tells a predecessor's packets from forged ones.
    pub(crate) shards: HashSet<u32>,
    /// By source address.
    pub(crate) sources: HashMap<SocketAddr, Source>,
    pub(crate) neighbours: Vec<Neighbour>,
    pub(crate) regions: HashMap<RegionNumber, Ways>,
    pub(crate) dead: HashMap<u64, Dead>,
    /// Shards that say that they live where a relay of another region does.
    pub(crate) refused: Vec<ServerId>,
}

/// Who may send frames from one address.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// Shards, each with the keys of all its generations.
    Shards(Vec<ShardKey>),
    /// The neighbour at this position in the list.
    Neighbour(usize),
}

#[derive(Clone, Debug)]
pub(crate) struct ShardKey {
    pub(crate) server_id: ServerId,
    pub(crate) slot: KeySlot,
    pub(crate) key: TunnelKey,
}

/// A server that is proven dead.
#[derive(Clone, Debug)]
pub(crate) struct Dead {
    /// Unix seconds from when on it is forgotten.
    pub(crate) until: u64,
    /// By the configuration of the connection ID.
    pub(crate) keys: Vec<(u8, ResetKey)>,
}

impl Table {
    /// Forwards nothing: the state before a router was heard.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            version: 0,
            relay: RelayNumber::new(0).expect("0 is a relay number"),
            loaded: Vec::new(),
            codec: CidCodec::new(),
            routes: HashMap::new(),
            shards: HashSet::new(),
            sources: HashMap::new(),
            neighbours: Vec::new(),
            regions: HashMap::new(),
            dead: HashMap::new(),
            refused: Vec::new(),
        }
    }

    /// Version of the routes: the highest that a router has sent.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// This relay's number.
    #[must_use]
    pub const fn relay(&self) -> RelayNumber {
        self.relay
    }

    /// Key generations that connection IDs and frames can be read under, in order.
    #[must_use]
    pub fn loaded_generations(&self) -> &[KeyGeneration] {
        &self.loaded
    }

    /// Decodes connection IDs.
    #[must_use]
    pub const fn codec(&self) -> &CidCodec {
        &self.codec
    }

    /// How many server IDs are routable one by one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// Shards without a route because their address is that of another region's relay.
    #[must_use]
    pub fn refused(&self) -> &[ServerId] {
        &self.refused
    }

    /// The route of exactly this server ID.
    #[must_use]
    pub fn route(&self, server_id: u64) -> Option<&Route> {
        self.routes.get(&server_id)
    }

    /// All routes, one per live incarnation of a shard.
    pub fn routes(&self) -> impl Iterator<Item = (ServerId, &Route)> {
        self.routes.iter().map(|(id, route)| (ServerId::from_u64(*id), route))
    }

    /// The relay to send through to a region that is reached through its relays only.
    #[must_use]
    pub fn way(&self, server_id: u64, now: Millis) -> Option<&Neighbour> {
        let region = ServerId::from_u64(server_id).region;
        self.regions.get(&region)?.choose(&self.neighbours, now)
    }

    /// Regions that are reached through their relays, with the relay in use now.
    pub fn ways(&self, now: Millis) -> impl Iterator<Item = (RegionNumber, &Neighbour)> {
        self.regions.iter().filter_map(move |(region, ways)| Some((*region, ways.choose(&self.neighbours, now)?)))
    }

    /// How many regions are reached through their relays.
    #[must_use]
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// How often a relay of another region fell silent and another one was taken.
    #[must_use]
    pub fn switches(&self) -> u64 {
        self.regions.values().map(|ways| ways.choice.switches()).sum()
    }

    /// All relays of other regions.
    #[must_use]
    pub fn neighbours(&self) -> &[Neighbour] {
        &self.neighbours
    }

    /// The relay of another region with this number.
    #[must_use]
    pub fn neighbour(&self, number: RelayNumber) -> Option<&Neighbour> {
        let at = self.neighbours.binary_search_by_key(&number, |n| n.number).ok()?;
        self.neighbours.get(at)
    }

    /// The relay of another region at this tunnel address, in its own family.
    #[must_use]
    pub fn neighbour_at(&self, address: SocketAddr) -> Option<&Neighbour> {
        match self.sources.get(&address)? {
            Source::Neighbour(at) => self.neighbours.get(*at),
            Source::Shards(_) => None,
        }
    }

    /// Whether the server ID's shard lives, in another incarnation.
    #[must_use]
    pub fn has_other_incarnation(&self, server_id: u64) -> bool {
        self.shards.contains(&shard_of(server_id))
    }

    /// Whether the server is proven dead, not longer ago than is remembered. `now` is in Unix seconds.
    #[must_use]
    pub fn is_dead(&self, server_id: u64, now: u64) -> bool {
        self.dead.get(&server_id).is_some_and(|dead| now < dead.until)
    }

    /// Key of the resets that a dead server would answer this connection ID with.
    #[must_use]
    pub fn reset_key(&self, server_id: u64, cid: &[u8; SessionCid::LEN]) -> Option<&ResetKey> {
        let config = cid[0] >> 5;
        let keys = &self.dead.get(&server_id)?.keys;
        keys.iter().find(|(of, _)| *of == config).map(|(_, key)| key)
    }

    pub(crate) fn source(&self, address: SocketAddr) -> Option<&Source> {
        self.sources.get(&address)
    }
}

pub(crate) const fn shard_of(server_id: u64) -> u32 {
    (server_id >> 32) as u32
}
