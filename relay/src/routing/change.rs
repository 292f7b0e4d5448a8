//! What routers say, as values.

use std::net::SocketAddr;

use antiphon_core::{
    id::{KeyGeneration, RegionNumber, RelayNumber, ServerId},
    keys::TunnelKeys,
};

use crate::keyring::{Keyring, OtherKeys};

/// What a router tells a relay first.
#[derive(Clone, Debug)]
pub struct Welcome {
    /// The relay's number in the fleet.
    pub relay: RelayNumber,
    /// Its keys.
    pub keys: Keyring,
}

/// A change of the routes.
#[derive(Clone, Debug, Default)]
pub struct RouteChange {
    /// Counts up by one per change of one router.
    pub version: u64,
    /// Replaces all routes of that router instead of changing those of `version - 1`.
    pub full: bool,
    /// New or moved shards.
    pub upserts: Vec<(ServerId, SocketAddr)>,
    /// Shards that are known to be gone.
    pub removals: Vec<ServerId>,
    /// Removing many at once is meant.
    pub mass_removal_intended: bool,
    /// Regions that are reached through these relays of theirs only.
    pub region_upserts: Vec<(RegionNumber, Vec<RelayNumber>)>,
    /// Regions that are not reached that way any more.
    pub region_removals: Vec<RegionNumber>,
    /// Servers that are proven dead.
    pub dead: Vec<DeadServer>,
}

/// A server that is proven dead, and what its clients may be told with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadServer {
    /// Which life of which shard.
    pub server_id: ServerId,
    /// Reset keys of the shard.
    pub keys: Vec<(KeyGeneration, [u8; 32])>,
}

/// A relay of another region, as routers name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeighbourRecord {
    /// Its number in the fleet.
    pub number: RelayNumber,
    /// Its tunnel address.
    pub address: SocketAddr,
    /// Keys of frames of its clients to workers here.
    pub keys: Vec<(KeyGeneration, TunnelKeys)>,
}

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is in force.
    Applied,
    /// What it adds is in force; the removals looked like a mistake and were not carried out.
    RemovalsRefused {
        /// Entries that would have gone.
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

/// A router cannot be followed while the others are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Disagreement {
    /// Another number than a connected router's.
    #[error("it says that this relay is number {got}, another router says {have}: they need one store")]
    Number {
        /// The number in force.
        have: RelayNumber,
        /// The one that came.
        got: RelayNumber,
    },
    /// Other keys than a connected router's.
    #[error(transparent)]
    Keys(#[from] OtherKeys),
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
    /// Regions behind their relays.
    pub regions: Vec<(RegionNumber, Vec<RelayNumber>)>,
    /// Relays of other regions.
    pub neighbours: Vec<NeighbourRecord>,
    /// Dead servers, with the Unix second when that was heard.
    pub dead: Vec<(DeadServer, u64)>,
}
