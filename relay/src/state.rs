//! What the relay keeps, so that it can start without a router (invariant I8): what is in force is what is on disk.
//!
//! One file: [`MAGIC`], the format (2 bytes, network byte order), the SHA-256 of format and body, and the body, a
//! protobuf message. It is read whole or not at all. The checksum finds damage, not forgery: who can write to the
//! directory is trusted.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_core::id::ServerId;
use antiphon_proto::v1;
use antiphon_runtime::pki::Identity;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::{
    control::convert,
    table::{Known, Welcome},
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
}

/// The file's bytes. They hold secrets.
#[must_use]
pub fn encode(owner: &Owner, state: &State) -> Zeroizing<Vec<u8>> {
    let since_epoch = state.confirmed.duration_since(UNIX_EPOCH).unwrap_or_default();
    let Known { welcome, version, routes } = &state.known;
    let route = |(server_id, address): &(ServerId, SocketAddr)| v1::Route {
        server_id: server_id.to_u64(),
        tunnel_address: address.to_string(),
    };
    let body = Body {
        fleet: owner.fleet.to_vec(),
        region: owner.region.clone(),
        name: owner.name.clone(),
        confirmed_unix_ms: since_epoch.as_millis() as u64,
        welcome: Some(welcome_message(welcome)),
        routes: Some(v1::RouteUpdate {
            version: *version,
            full: true,
            upserts: routes.iter().map(route).collect(),
            ..v1::RouteUpdate::default()
        }),
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

fn welcome_message(welcome: &Welcome) -> v1::RelayWelcome {
    let config = |(id, key): &(antiphon_core::cid::ConfigId, [u8; 16])| v1::CidConfig {
        config_id: id.value().into(),
        key: key.to_vec().into(),
        ..v1::CidConfig::default()
    };
    v1::RelayWelcome {
        relay_number: welcome.relay.value().into(),
        cid_configs: welcome.cid_configs.iter().map(config).collect(),
        secrets: welcome
            .secrets
            .iter()
            .map(|(generation, secret)| v1::RelaySecret {
                generation: generation.value(),
                secret: secret.as_bytes().to_vec().into(),
                sealing: *generation == welcome.sealing,
            })
            .collect(),
        report_interval_ms: 0,
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
    let welcome = convert::welcome(&welcome).map_err(|error| DecodeError::Senseless(error.to_string()))?;
    let routes = convert::change(&routes).map_err(|error| DecodeError::Senseless(error.to_string()))?;
    Ok(State {
        confirmed: UNIX_EPOCH + Duration::from_millis(body.confirmed_unix_ms),
        known: Known { welcome, version: routes.version, routes: routes.upserts },
    })
}

fn digest(format: u16, body: &[u8]) -> [u8; DIGEST] {
    Sha256::new().chain_update(format.to_be_bytes()).chain_update(body).finalize().into()
}

/// First bytes of a state file.
pub const MAGIC: [u8; 14] = *b"antiphon-relay";
/// Format that is written. A reader takes this one and older ones.
pub const FORMAT: u16 = 1;
const DIGEST: usize = 32;
const HEADER: usize = MAGIC.len() + 2 + DIGEST;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use antiphon_core::{
        cid::ConfigId,
        id::{KeyGeneration, RelayNumber},
        keys::RelaySecret,
    };

    pub(crate) fn owner() -> Owner {
        Owner { fleet: [9; 32], region: "north".into(), name: "relay-0".into() }
    }

    pub(crate) fn state(version: u64) -> State {
        let generation = |n| KeyGeneration::new(n).unwrap();
        let secrets = (1..3).map(|n| (generation(n), RelaySecret::from_bytes([n as u8; 32]))).collect();
        let cid_configs = vec![(ConfigId::new(0).unwrap(), [1; 16]), (ConfigId::new(6).unwrap(), [2; 16])];
        let relay = RelayNumber::new(65).unwrap();
        let route = |n: u64, address: &str| (ServerId::from_u64(n << 32 | 7), address.parse().unwrap());
        State {
            confirmed: UNIX_EPOCH + Duration::from_millis(1_800_000_000_123),
            known: Known {
                welcome: Welcome { relay, cid_configs, secrets, sealing: generation(2) },
                version,
                routes: vec![route(1, "10.0.0.1:4500"), route(2, "[2001:db8::1]:4501")],
            },
        }
    }

    #[test]
    fn what_was_written_is_what_is_read() {
        let read = decode(&owner(), &encode(&owner(), &state(17))).unwrap();
        let (known, written) = (read.known, state(17).known);
        assert_eq!((read.confirmed, known.version, &known.routes), (state(17).confirmed, 17, &written.routes));
        assert_eq!((known.welcome.relay, known.welcome.sealing), (written.welcome.relay, written.welcome.sealing));
        assert_eq!(known.welcome.cid_configs, written.welcome.cid_configs);
        let secrets = |known: &Known| -> Vec<_> {
            known.welcome.secrets.iter().map(|(generation, secret)| (*generation, *secret.as_bytes())).collect()
        };
        assert_eq!(secrets(&known), secrets(&written));
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
        newer[MAGIC.len() + 1] = 2;
        assert_eq!(refused(&owner(), &newer), "it has format 2, this relay knows 1 and older");
        assert_eq!(refused(&owner(), b"something else"), "it is no relay's state");
    }

    #[test]
    fn an_intact_file_without_sense_is_refused_too() {
        let mut bare = state(1);
        bare.known.welcome.secrets.clear();
        let refused = decode(&owner(), &encode(&owner(), &bare)).unwrap_err();
        assert!(matches!(refused, DecodeError::Senseless(_)), "{refused}");
    }
}
