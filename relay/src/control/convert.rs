//! From the router's messages to the relay's own terms, checked.

use std::net::SocketAddr;

use antiphon_core::{
    cid::ConfigId,
    id::{KeyGeneration, RelayNumber, ServerId},
    keys::RelaySecret,
};
use antiphon_proto::v1;

use crate::table::{RouteChange, Welcome};

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
    #[error("tunnel address {address:?} of {server_id} is not IP:PORT of a host")]
    Address {
        /// Whose.
        server_id: ServerId,
        /// What was sent, cut to 64 characters.
        address: String,
    },
}

pub(crate) fn welcome(welcome: &v1::RelayWelcome) -> Result<Welcome, ConvertError> {
    let sealing: Vec<_> = welcome.secrets.iter().filter(|s| s.sealing).collect();
    let [sealing] = sealing[..] else {
        return Err(ConvertError::Sealing(sealing.len()));
    };
    Ok(Welcome {
        relay: number("relay number", welcome.relay_number, |v| RelayNumber::new(v).ok())?,
        cid_configs: welcome
            .cid_configs
            .iter()
            .map(|c| {
                Ok((
                    number("configuration", c.config_id, |v| ConfigId::new(v).ok())?,
                    key("connection-ID key", &c.key)?,
                ))
            })
            .collect::<Result<_, ConvertError>>()?,
        secrets: welcome
            .secrets
            .iter()
            .map(|s| Ok((generation(s)?, RelaySecret::from_bytes(key("relay secret", &s.secret)?))))
            .collect::<Result<_, ConvertError>>()?,
        sealing: generation(sealing)?,
    })
}

pub(crate) fn change(update: &v1::RouteUpdate) -> Result<RouteChange, ConvertError> {
    Ok(RouteChange {
        version: update.version,
        full: update.full,
        upserts: update.upserts.iter().map(route).collect::<Result<_, _>>()?,
        removals: update.removals.iter().copied().map(ServerId::from_u64).collect(),
        mass_removal_intended: update.mass_removal_intended,
    })
}

/// An address that cannot be sent to would disturb the socket for all others.
fn route(route: &v1::Route) -> Result<(ServerId, SocketAddr), ConvertError> {
    let server_id = ServerId::from_u64(route.server_id);
    let reachable = |a: &SocketAddr| a.port() != 0 && !a.ip().is_unspecified() && !a.ip().is_multicast();
    match route.tunnel_address.parse().ok().filter(reachable) {
        Some(address) => Ok((server_id, address)),
        None => Err(ConvertError::Address { server_id, address: route.tunnel_address.chars().take(64).collect() }),
    }
}

fn generation(secret: &v1::RelaySecret) -> Result<KeyGeneration, ConvertError> {
    number("key generation", secret.generation, |v| KeyGeneration::new(v).ok())
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
