//! From the router's messages to the relay's own terms, checked.

use std::net::SocketAddr;

use antiphon_core::{
    cid::ConfigId,
    id::{KeyGeneration, RegionNumber, RelayNumber, ServerId, ShardNumber},
    keys::{RelaySecret, TunnelKey, TunnelKeys},
};
use antiphon_proto::v1;

use crate::{
    keyring::{CidKey, Keyring},
    routing::{DeadServer, NeighbourRecord, RouteChange, Welcome},
};

/// Why a router's message makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ConvertError {
    /// A number that does not fit.
    #[error("{what} {value} is out of range")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// What was sent.
        value: u32,
    },
    /// A key of the wrong length.
    #[error("{what} has {actual} bytes, not {expected}")]
    KeyLength {
        /// Which key.
        what: &'static str,
        /// Bytes it should have.
        expected: usize,
        /// Bytes it has.
        actual: usize,
    },
    /// No secret, or none or several of them to seal with.
    #[error("{0} of the relay's secrets are for sealing: exactly one has to be")]
    Sealing(usize),
    /// A route to nowhere.
    #[error("tunnel address {address:?} of {whose} is not IP:PORT of a host")]
    Address {
        /// Whose.
        whose: String,
        /// What was sent, cut to 64 characters.
        address: String,
    },
}

pub(crate) fn welcome(welcome: &v1::RelayWelcome) -> Result<Welcome, ConvertError> {
    let relay = relay(welcome.relay_number)?;
    Ok(Welcome { relay, keys: keyring(&welcome.cid_configs, &welcome.secrets)? })
}

pub(crate) fn keys(keys: &v1::RelayKeys) -> Result<Keyring, ConvertError> {
    keyring(&keys.cid_configs, &keys.secrets)
}

fn keyring(cid_configs: &[v1::CidConfig], secrets: &[v1::RelaySecret]) -> Result<Keyring, ConvertError> {
    let sealing: Vec<_> = secrets.iter().filter(|s| s.sealing).collect();
    let [sealing] = sealing[..] else {
        return Err(ConvertError::Sealing(sealing.len()));
    };
    let cid = |c: &v1::CidConfig| {
        Ok(CidKey {
            config: number("configuration", c.config_id, |v| ConfigId::new(v).ok())?,
            generation: generation(c.generation)?,
            key: key("connection-ID key", &c.key)?,
        })
    };
    let secret =
        |s: &v1::RelaySecret| Ok((generation(s.generation)?, RelaySecret::from_bytes(key("relay secret", &s.secret)?)));
    Ok(Keyring {
        cid: cid_configs.iter().map(cid).collect::<Result<_, ConvertError>>()?,
        secrets: secrets.iter().map(secret).collect::<Result<_, ConvertError>>()?,
        sealing: generation(sealing.generation)?,
    })
}

pub(crate) fn neighbours(list: &v1::RelayNeighbours) -> Result<Vec<NeighbourRecord>, ConvertError> {
    let keys = |keys: &v1::HopKeys| {
        let [up, down] = [&keys.up, &keys.down].map(|k| key("hop key", k).map(TunnelKey::from_bytes));
        Ok((generation(keys.generation)?, TunnelKeys { up: up?, down: down? }))
    };
    let neighbour = |n: &v1::RelayNeighbour| {
        let number = relay(n.number)?;
        Ok(NeighbourRecord {
            number,
            address: address(&n.tunnel_address, || format!("relay {number}"))?,
            keys: n.keys.iter().map(keys).collect::<Result<_, ConvertError>>()?,
        })
    };
    list.neighbours.iter().map(neighbour).collect()
}

pub(crate) fn change(update: &v1::RouteUpdate) -> Result<RouteChange, ConvertError> {
    let route = |r: &v1::Route| {
        let server_id = ServerId::from_u64(r.server_id);
        Ok((server_id, address(&r.tunnel_address, || server_id.to_string())?))
    };
    let region_route = |r: &v1::RegionRoute| {
        Ok((region(r.region_number)?, r.relays.iter().map(|n| relay(*n)).collect::<Result<_, ConvertError>>()?))
    };
    Ok(RouteChange {
        version: update.version,
        full: update.full,
        upserts: update.upserts.iter().map(route).collect::<Result<_, ConvertError>>()?,
        removals: update.removals.iter().copied().map(ServerId::from_u64).collect(),
        mass_removal_intended: update.mass_removal_intended,
        region_upserts: update.region_upserts.iter().map(region_route).collect::<Result<_, ConvertError>>()?,
        region_removals: update.region_removals.iter().map(|r| region(*r)).collect::<Result<_, ConvertError>>()?,
        dead: update.dead.iter().map(dead).collect::<Result<_, ConvertError>>()?,
    })
}

/// Keys of other shards of the same worker are left out.
fn dead(dead: &v1::DeadServer) -> Result<DeadServer, ConvertError> {
    let server_id = ServerId::from_u64(dead.server_id);
    let reset = |k: &v1::ResetKey| {
        let shard = number("shard", k.shard, |v| ShardNumber::new(v).ok())?;
        Ok((shard, (generation(k.generation)?, key("reset key", &k.key)?)))
    };
    let keys = dead.reset_keys.iter().map(reset).collect::<Result<Vec<_>, ConvertError>>()?;
    let own = keys.into_iter().filter(|(shard, _)| *shard == server_id.shard).map(|(_, key)| key);
    Ok(DeadServer { server_id, keys: own.collect() })
}

/// An address that cannot be sent to would disturb the socket for all others.
fn address(text: &str, whose: impl FnOnce() -> String) -> Result<SocketAddr, ConvertError> {
    let reachable = |a: &SocketAddr| a.port() != 0 && !a.ip().is_unspecified() && !a.ip().is_multicast();
    text.parse()
        .ok()
        .filter(reachable)
        .ok_or_else(|| ConvertError::Address { whose: whose(), address: text.chars().take(64).collect() })
}

fn relay(value: u32) -> Result<RelayNumber, ConvertError> {
    number("relay number", value, |v| RelayNumber::new(v).ok())
}

fn region(value: u32) -> Result<RegionNumber, ConvertError> {
    number("region", value, |v| RegionNumber::new(v).ok())
}

fn generation(value: u32) -> Result<KeyGeneration, ConvertError> {
    number("key generation", value, |v| KeyGeneration::new(v).ok())
}

fn number<N: TryFrom<u32>, T>(
    what: &'static str,
    value: u32,
    make: impl FnOnce(N) -> Option<T>,
) -> Result<T, ConvertError> {
    let fits = N::try_from(value).ok().and_then(make);
    fits.ok_or(ConvertError::OutOfRange { what, value })
}

fn key<const N: usize>(what: &'static str, bytes: &[u8]) -> Result<[u8; N], ConvertError> {
    bytes.try_into().map_err(|_| ConvertError::KeyLength { what, expected: N, actual: bytes.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> v1::RelayWelcome {
        v1::RelayWelcome {
            relay_number: 65,
            cid_configs: vec![v1::CidConfig { config_id: 6, generation: 1, key: vec![1; 16].into(), minting: true }],
            secrets: vec![v1::RelaySecret { generation: 1, secret: vec![2; 32].into(), sealing: true }],
            report_interval_ms: 100,
        }
    }

    fn refused(change: fn(&mut v1::RelayWelcome)) -> String {
        let mut message = good();
        change(&mut message);
        welcome(&message).unwrap_err().to_string()
    }

    #[test]
    fn a_welcome_is_taken_whole_or_not_at_all() {
        assert_eq!(welcome(&good()).unwrap().relay.value(), 65);
        assert_eq!(refused(|w| w.relay_number = 70_000), "relay number 70000 is out of range");
        assert_eq!(refused(|w| w.cid_configs[0].config_id = 7), "configuration 7 is out of range");
        assert_eq!(refused(|w| w.cid_configs[0].key = vec![0; 15].into()), "connection-ID key has 15 bytes, not 16");
        assert_eq!(refused(|w| w.secrets[0].secret.clear()), "relay secret has 0 bytes, not 32");
        assert_eq!(
            refused(|w| w.secrets[0].sealing = false),
            "0 of the relay's secrets are for sealing: exactly one has to be"
        );
    }

    #[test]
    fn neighbours_and_dead_servers_are_checked_too() {
        let hop = v1::HopKeys { generation: 2, up: vec![1; 16].into(), down: vec![2; 16].into() };
        let one = v1::RelayNeighbour { number: 128, tunnel_address: "10.0.0.1:4434".into(), keys: vec![hop] };
        let list = |n: v1::RelayNeighbour| neighbours(&v1::RelayNeighbours { neighbours: vec![n] });
        let good = list(one.clone()).unwrap().remove(0);
        assert_eq!((good.number.value(), good.keys[0].1.down.as_bytes()), (128, &[2; 16]));
        let refused = |change: fn(&mut v1::RelayNeighbour)| {
            let mut n = one.clone();
            change(&mut n);
            list(n).unwrap_err().to_string()
        };
        assert_eq!(refused(|n| n.number = 1 << 16), "relay number 65536 is out of range");
        assert_eq!(refused(|n| n.keys[0].down.clear()), "hop key has 0 bytes, not 16");
        assert_eq!(refused(|n| n.tunnel_address.clear()), "tunnel address \"\" of relay 128 is not IP:PORT of a host");

        let key = |shard, len| v1::ResetKey { shard, generation: 1, key: vec![7; len].into() };
        let update = |key| v1::RouteUpdate {
            dead: vec![v1::DeadServer { server_id: 5 << 32 | 1, reset_keys: vec![key] }],
            ..v1::RouteUpdate::default()
        };
        assert_eq!(change(&update(key(5, 32))).unwrap().dead[0].keys.len(), 1);
        assert_eq!(change(&update(key(4, 32))).unwrap().dead[0].keys, [], "another shard's");
        assert!(change(&update(key(5, 31))).is_err() && change(&update(key(64, 32))).is_err());
        let to = |region_number, relay| v1::RouteUpdate {
            region_upserts: vec![v1::RegionRoute { region_number, relays: vec![relay] }],
            ..v1::RouteUpdate::default()
        };
        assert!(change(&to(1023, 65_535)).is_ok());
        assert!(change(&to(1024, 1)).is_err() && change(&to(1, 65_536)).is_err());
    }

    #[test]
    fn routes_to_nowhere_are_refused() {
        for address in ["", "10.0.0.1", "10.0.0.1:0", "0.0.0.0:1", "host:1", "[ff02::1]:1"] {
            let update = v1::RouteUpdate {
                upserts: vec![v1::Route { server_id: 1, tunnel_address: address.into() }],
                ..v1::RouteUpdate::default()
            };
            assert!(change(&update).is_err(), "{address}");
        }
    }
}
