//! What the relay keeps, so that it can start without a router (invariant I8): what is in force is what is on disk.
//!
//! One file: [`MAGIC`], the format (2 bytes, network byte order), the SHA-256 of format and body, and the body, a
//! protobuf message. It is read whole or not at all. The checksum finds damage, not forgery: who can write to the
//! directory is trusted.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_core::{
    id::{KeyGeneration, RegionNumber, RelayNumber, ServerId},
    keys::{RelaySecret, TunnelKeys},
};
use antiphon_proto::v1;
use antiphon_runtime::pki::Identity;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::{
    control::convert,
    keyring::{CidKey, Keyring},
    routing::{DeadServer, Known, NeighbourRecord, Welcome},
};

pub mod disk;

/// Whose state it is. Another relay's keys and number are of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// SHA-256 of the fleet's trust anchor (DER).
    pub fleet: [u8; 32],
    /// The relay's region.
    pub region: String,
    /// Its name there.
    pub name: String,
}

impl Owner {
    /// The relay that shows this identity.
    #[must_use]
    pub fn of(identity: &Identity) -> Self {
        let peer = identity.peer();
        let fleet = Sha256::digest(identity.ca()).into();
        Self { fleet, region: peer.region.clone(), name: peer.name.clone() }
    }
}

/// What a relay knew, and when.
#[derive(Clone, Debug)]
pub struct State {
    /// When a router last stood behind it, to the millisecond.
    pub confirmed: SystemTime,
    /// All that forwarding needs.
    pub known: Known,
}

/// Why a file is not used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Something else, or cut off within the first bytes.
    #[error("it is no relay's state")]
    NotState,
    /// A later version's.
    #[error("it has format {found}, this relay knows {FORMAT} and older")]
    Newer {
        /// What it says.
        found: u16,
    },
    /// Cut off or altered.
    #[error("it is damaged: the checksum does not match")]
    Damaged,
    /// Another relay's.
    #[error("it is of relay {name} of {region}")]
    OtherRelay {
        /// Whose.
        name: String,
        /// Where.
        region: String,
    },
    /// This relay's in another fleet.
    #[error("it is of a fleet with another trust anchor")]
    OtherFleet,
    /// Intact, but nothing to forward with.
    #[error("it makes no sense: {0}")]
    Senseless(String),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Body {
    #[prost(bytes = "vec", tag = "1")]
    fleet: Vec<u8>,
    #[prost(string, tag = "2")]
    region: String,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(uint64, tag = "4")]
    confirmed_unix_ms: u64,
    #[prost(message, optional, tag = "5")]
    welcome: Option<v1::RelayWelcome>,
    /// All routes, as a router would send them.
    #[prost(message, optional, tag = "6")]
    routes: Option<v1::RouteUpdate>,
    /// Since format 2.
    #[prost(message, optional, tag = "7")]
    neighbours: Option<v1::RelayNeighbours>,
    /// Unix seconds when each of the routes' dead servers was heard of. Since format 2.
    #[prost(uint64, repeated, tag = "8")]
    dead_since: Vec<u64>,
}

/// The file's bytes. They hold secrets.
#[must_use]
pub fn encode(owner: &Owner, state: &State) -> Zeroizing<Vec<u8>> {
    let since_epoch = state.confirmed.duration_since(UNIX_EPOCH).unwrap_or_default();
    let known = &state.known;
    let body = Body {
        fleet: owner.fleet.to_vec(),
        region: owner.region.clone(),
        name: owner.name.clone(),
        confirmed_unix_ms: since_epoch.as_millis() as u64,
        welcome: Some(welcome_message(&known.welcome)),
        routes: Some(routes_message(known)),
        neighbours: Some(v1::RelayNeighbours { neighbours: known.neighbours.iter().map(neighbour_message).collect() }),
        dead_since: known.dead.iter().map(|(_, heard)| *heard).collect(),
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(HEADER + body.encoded_len()));
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&FORMAT.to_be_bytes());
    bytes.extend_from_slice(&[0; DIGEST]);
    bytes.extend_from_slice(&Zeroizing::new(body.encode_to_vec()));
    let digest = digest(FORMAT, &bytes[HEADER..]);
    bytes[HEADER - DIGEST..HEADER].copy_from_slice(&digest);
    bytes
}

fn welcome_message(Welcome { relay, keys }: &Welcome) -> v1::RelayWelcome {
    let Keyring { cid, secrets, sealing } = keys;
    let config = |CidKey { config, generation, key }: &CidKey| v1::CidConfig {
        config_id: config.value().into(),
        generation: generation.value(),
        key: key.to_vec().into(),
        minting: false,
    };
    let secret = |(generation, secret): &(KeyGeneration, RelaySecret)| v1::RelaySecret {
        generation: generation.value(),
        secret: secret.as_bytes().to_vec().into(),
        sealing: generation == sealing,
    };
    v1::RelayWelcome {
        relay_number: relay.value().into(),
        cid_configs: cid.iter().map(config).collect(),
        secrets: secrets.iter().map(secret).collect(),
        report_interval_ms: 0,
    }
}

fn routes_message(known: &Known) -> v1::RouteUpdate {
    let route = |(server_id, address): &(ServerId, SocketAddr)| v1::Route {
        server_id: server_id.to_u64(),
        tunnel_address: address.to_string(),
    };
    let region = |(number, relays): &(RegionNumber, Vec<RelayNumber>)| v1::RegionRoute {
        region_number: number.value().into(),
        relays: relays.iter().map(|r| r.value().into()).collect(),
    };
    v1::RouteUpdate {
        version: known.version,
        full: true,
        upserts: known.routes.iter().map(route).collect(),
        region_upserts: known.regions.iter().map(region).collect(),
        dead: known.dead.iter().map(|(server, _)| dead_message(server)).collect(),
        ..v1::RouteUpdate::default()
    }
}

fn dead_message(DeadServer { server_id, keys }: &DeadServer) -> v1::DeadServer {
    let reset = |(generation, key): &(KeyGeneration, [u8; 32])| v1::ResetKey {
        shard: server_id.shard.value().into(),
        generation: generation.value(),
        key: key.to_vec().into(),
    };
    v1::DeadServer { server_id: server_id.to_u64(), reset_keys: keys.iter().map(reset).collect() }
}

fn neighbour_message(NeighbourRecord { number, address, keys }: &NeighbourRecord) -> v1::RelayNeighbour {
    let hop = |(generation, keys): &(KeyGeneration, TunnelKeys)| v1::HopKeys {
        generation: generation.value(),
        up: keys.up.as_bytes().to_vec().into(),
        down: keys.down.as_bytes().to_vec().into(),
    };
    v1::RelayNeighbour {
        number: number.value().into(),
        tunnel_address: address.to_string(),
        keys: keys.iter().map(hop).collect(),
    }
}

/// The state in a file's bytes, if it is `owner`'s.
///
/// # Errors
/// [`DecodeError`]: then nothing of it is to be used.
pub fn decode(owner: &Owner, bytes: &[u8]) -> Result<State, DecodeError> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(DecodeError::NotState)?;
    let (format, rest) = rest.split_first_chunk().ok_or(DecodeError::NotState)?;
    let format = u16::from_be_bytes(*format);
    if format > FORMAT {
        return Err(DecodeError::Newer { found: format });
    }
    let (sum, body) = rest.split_first_chunk::<DIGEST>().ok_or(DecodeError::Damaged)?;
    if *sum != digest(format, body) {
        return Err(DecodeError::Damaged);
    }
    let body = Body::decode(body).map_err(|error| DecodeError::Senseless(error.to_string()))?;
    if (&body.region, &body.name) != (&owner.region, &owner.name) {
        return Err(DecodeError::OtherRelay { name: body.name, region: body.region });
    }
    if body.fleet != owner.fleet {
        return Err(DecodeError::OtherFleet);
    }
    let (Some(welcome), Some(routes)) = (body.welcome, body.routes) else {
        return Err(DecodeError::Senseless("keys or routes are missing".into()));
    };
    let senseless = |error: convert::ConvertError| DecodeError::Senseless(error.to_string());
    let welcome = convert::welcome(&welcome).map_err(senseless)?;
    let routes = convert::change(&routes).map_err(senseless)?;
    let neighbours = convert::neighbours(&body.neighbours.unwrap_or_default()).map_err(senseless)?;
    if body.dead_since.len() != routes.dead.len() {
        return Err(DecodeError::Senseless("dead servers without their time".into()));
    }
    Ok(State {
        confirmed: UNIX_EPOCH + Duration::from_millis(body.confirmed_unix_ms),
        known: Known {
            welcome,
            version: routes.version,
            routes: routes.upserts,
            regions: routes.region_upserts,
            neighbours,
            dead: routes.dead.into_iter().zip(body.dead_since).collect(),
        },
    })
}

fn digest(format: u16, body: &[u8]) -> [u8; DIGEST] {
    Sha256::new().chain_update(format.to_be_bytes()).chain_update(body).finalize().into()
}

/// First bytes of a state file.
pub const MAGIC: [u8; 14] = *b"antiphon-relay";
/// Format that is written. A reader takes this one and older ones.
pub const FORMAT: u16 = 2;
const DIGEST: usize = 32;
const HEADER: usize = MAGIC.len() + 2 + DIGEST;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use antiphon_core::keys::TunnelKey;

    use crate::keyring::tests::ring;

    pub(crate) fn owner() -> Owner {
        Owner { fleet: [9; 32], region: "north".into(), name: "relay-0".into() }
    }

    pub(crate) fn state(version: u64) -> State {
        let generation = |n| KeyGeneration::new(n).unwrap();
        let route = |n: u64, address: &str| (ServerId::from_u64(n << 32 | 7), address.parse().unwrap());
        let hop = TunnelKeys { up: TunnelKey::from_bytes([5; 16]), down: TunnelKey::from_bytes([6; 16]) };
        let neighbour = NeighbourRecord {
            number: RelayNumber::new(128).unwrap(),
            address: "[2001:db8::2]:4434".parse().unwrap(),
            keys: vec![(generation(2), hop)],
        };
        let dead = DeadServer { server_id: ServerId::from_u64(3 << 32), keys: vec![(generation(1), [7; 32])] };
        State {
            confirmed: UNIX_EPOCH + Duration::from_millis(1_800_000_000_123),
            known: Known {
                welcome: Welcome { relay: RelayNumber::new(65).unwrap(), keys: ring(&[1, 2], 2) },
                version,
                routes: vec![route(1, "10.0.0.1:4500"), route(2, "[2001:db8::1]:4501")],
                regions: vec![(RegionNumber::new(2).unwrap(), vec![neighbour.number])],
                neighbours: vec![neighbour],
                dead: vec![(dead, 1_800_000_000)],
            },
        }
    }

    #[test]
    fn what_was_written_is_what_is_read() {
        let read = decode(&owner(), &encode(&owner(), &state(17))).unwrap();
        let (known, written) = (read.known, state(17).known);
        assert_eq!((read.confirmed, known.version, &known.routes), (state(17).confirmed, 17, &written.routes));
        assert_eq!((known.welcome.relay, &known.welcome.keys), (written.welcome.relay, &written.welcome.keys));
        assert_eq!((known.regions, known.neighbours), (written.regions, written.neighbours));
        assert_eq!(known.dead, written.dead);
    }

    /// Frozen: what the first version wrote has no generations of connection IDs, no neighbours, no dead servers.
    #[test]
    fn the_first_format_is_still_read() {
        let old = state(9).known;
        let mut welcome = welcome_message(&old.welcome);
        welcome.cid_configs.iter_mut().for_each(|c| c.generation = 0);
        let routes = Known { regions: Vec::new(), dead: Vec::new(), ..old };
        let body = Body {
            fleet: owner().fleet.to_vec(),
            region: owner().region,
            name: owner().name,
            confirmed_unix_ms: 1,
            welcome: Some(welcome),
            routes: Some(routes_message(&routes)),
            neighbours: None,
            dead_since: Vec::new(),
        };
        let body = body.encode_to_vec();
        let bytes = [&MAGIC[..], &1u16.to_be_bytes(), &digest(1, &body), &body].concat();
        let read = decode(&owner(), &bytes).unwrap().known;
        assert_eq!((read.version, read.routes.len(), read.neighbours.len()), (9, 2, 0));
        assert!(read.welcome.keys.loaded().is_empty(), "nothing is said to be loaded until a router answers");
        assert_eq!(read.welcome.keys.cid.len(), 2, "and all of it can be read");
    }

    #[test]
    fn no_cut_and_no_flipped_bit_goes_unnoticed() {
        let bytes = encode(&owner(), &state(1));
        for length in 0..bytes.len() {
            assert!(decode(&owner(), &bytes[..length]).is_err(), "cut to {length}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut altered = bytes.to_vec();
            altered[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&owner(), &altered).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_with_a_reason() {
        let bytes = encode(&owner(), &state(1));
        let refused = |owner: &Owner, bytes: &[u8]| decode(owner, bytes).unwrap_err().to_string();
        let other_name = Owner { name: "relay-1".into(), ..owner() };
        assert_eq!(refused(&other_name, &bytes), "it is of relay relay-0 of north");
        let other_region = Owner { region: "south".into(), ..owner() };
        assert_eq!(refused(&other_region, &bytes), "it is of relay relay-0 of north");
        let other_fleet = Owner { fleet: [8; 32], ..owner() };
        assert_eq!(refused(&other_fleet, &bytes), "it is of a fleet with another trust anchor");
        let mut newer = bytes.to_vec();
        newer[MAGIC.len() + 1] = 3;
        assert_eq!(refused(&owner(), &newer), "it has format 3, this relay knows 2 and older");
        assert_eq!(refused(&owner(), b"something else"), "it is no relay's state");
    }

    #[test]
    fn an_intact_file_without_sense_is_refused_too() {
        let mut bare = state(1);
        bare.known.welcome.keys.secrets.clear();
        let refused = decode(&owner(), &encode(&owner(), &bare)).unwrap_err();
        assert!(matches!(refused, DecodeError::Senseless(_)), "{refused}");
    }
}
