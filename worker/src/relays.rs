//! The relays that a shard exchanges frames with: where they are and the keys of each tunnel.

use std::{collections::HashMap, net::SocketAddr};

use antiphon_core::{
    id::{KeyGeneration, RelayNumber},
    keys::TunnelKey,
    tunnel::{self, ClientAddr, Direction, Header, KeySlot, OpenError},
};
use antiphon_proto::v1;

/// Why a relay that the router named cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RelayError {
    /// The number does not fit.
    #[error("relay number {0} is out of range")]
    Number(u32),
    /// The address is no `ip:port`.
    #[error("relay {relay}: {address:?} is not an IP address and port")]
    Address {
        /// Which relay.
        relay: u32,
        /// What was given.
        address: String,
    },
    /// A key has another length than 16 bytes.
    #[error("relay {0}: tunnel keys need 16 bytes")]
    Key(u32),
}

#[derive(Debug, Clone)]
struct Keys {
    generation: KeyGeneration,
    up: TunnelKey,
    down: TunnelKey,
}

#[derive(Debug, Clone)]
struct Relay {
    address: SocketAddr,
    /// Newest generation first: that one seals.
    keys: Vec<Keys>,
}

/// One shard's relays; replaced as a whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct RelayTable {
    relays: HashMap<RelayNumber, Relay>,
}

impl RelayTable {
    /// Picks the shard's keys out of what the router sent.
    ///
    /// # Errors
    /// [`RelayError`]: the whole list is refused, so that a table is never half new.
    pub(crate) fn new(relays: &[v1::WorkerRelay], shard: u32) -> Result<Self, RelayError> {
        let mut table = Self::default();
        for relay in relays {
            let number = u16::try_from(relay.number).ok().and_then(|n| RelayNumber::new(n).ok());
            let number = number.ok_or(RelayError::Number(relay.number))?;
            let address = relay.tunnel_address.parse().map_err(|_| RelayError::Address {
                relay: relay.number,
                address: relay.tunnel_address.chars().take(64).collect(),
            })?;
            let mut keys = Vec::new();
            for key in relay.keys.iter().filter(|key| key.shard == shard) {
                let bytes = |b: &[u8]| <[u8; 16]>::try_from(b).map_err(|_| RelayError::Key(relay.number));
                keys.push(Keys {
                    generation: KeyGeneration::new(key.generation).map_err(|_| RelayError::Key(relay.number))?,
                    up: TunnelKey::from_bytes(bytes(&key.up)?),
                    down: TunnelKey::from_bytes(bytes(&key.down)?),
                });
            }
            keys.sort_by_key(|key| std::cmp::Reverse(key.generation));
            table.relays.insert(number, Relay { address, keys });
        }
        Ok(table)
    }

    /// A newer table that also keeps what it does not name: a router that has just started knows few relays, and a
    /// relay left out is no evidence that it is gone (invariant I8). What is kept can only be used by the one who
    /// holds its keys.
    pub(crate) fn keeping(mut self, older: &Self) -> Self {
        for (number, relay) in &older.relays {
            if self.relays.len() < MOST_RELAYS {
                self.relays.entry(*number).or_insert_with(|| relay.clone());
            }
        }
        self
    }

    /// Verifies a frame. `None` when its relay or key generation is unknown.
    pub(crate) fn open<'a>(&self, now_s: u64, frame: &'a [u8]) -> Option<Result<(Header, &'a [u8]), OpenError>> {
        let header = match Header::parse(frame) {
            Ok(header) => header,
            Err(error) => return Some(Err(error)),
        };
        let keys = &self.relays.get(&header.relay)?.keys;
        let key = keys.iter().find(|key| KeySlot::of(key.generation) == header.key_slot)?;
        Some(tunnel::open(frame, &key.up, Direction::Up, now_s, tunnel::MAX_SKEW))
    }

    /// Appends `header || datagram` for a client behind a relay and returns where to send it.
    ///
    /// `None` when the relay is unknown: then there is no way to the client.
    pub(crate) fn seal(
        &self,
        now_s: u64,
        relay: RelayNumber,
        client: ClientAddr,
        datagrams: std::slice::Chunks<'_, u8>,
        ecn: tunnel::Ecn,
        out: &mut Vec<u8>,
    ) -> Option<SocketAddr> {
        let relay_entry = self.relays.get(&relay)?;
        let key = relay_entry.keys.first()?;
        let header = Header {
            direction: Direction::Down,
            key_slot: KeySlot::of(key.generation),
            hop_limit: tunnel::INITIAL_HOP_LIMIT,
            ecn,
            client,
            relay,
            time: tunnel::coarse_time(now_s),
        };
        for datagram in datagrams {
            let mut head = [0; tunnel::HEADER_LEN];
            header.seal_into(&key.down, datagram, &mut head);
            out.extend_from_slice(&head);
            out.extend_from_slice(datagram);
        }
        Some(relay_entry.address)
    }
}

/// Relays of all regions that a worker remembers.
const MOST_RELAYS: usize = 4_096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_left_out_is_kept_and_one_that_moved_is_not() {
        let mut other = relay("127.0.0.1:2", vec![2; 16]);
        other.number = 66;
        let older = RelayTable::new(&[relay("127.0.0.1:1", vec![1; 16]), other], 0).unwrap();
        let newer = RelayTable::new(&[relay("127.0.0.1:9", vec![1; 16])], 0).unwrap().keeping(&older);
        let address = |n: u16| newer.relays[&RelayNumber::new(n).unwrap()].address.to_string();
        assert_eq!((address(65), address(66)), ("127.0.0.1:9".into(), "127.0.0.1:2".into()));
    }

    fn relay(address: &str, key: Vec<u8>) -> v1::WorkerRelay {
        let keys = v1::TunnelKeys { shard: 0, generation: 1, up: key.clone().into(), down: key.into() };
        v1::WorkerRelay { number: 65, tunnel_address: address.into(), keys: vec![keys] }
    }

    #[test]
    fn a_bad_entry_refuses_the_whole_list() {
        let good = relay("127.0.0.1:1", vec![1; 16]);
        let bad = relay("localhost", vec![1; 16]);
        let error = RelayTable::new(&[good.clone(), bad], 0).unwrap_err();
        assert_eq!(error.to_string(), "relay 65: \"localhost\" is not an IP address and port");
        assert_eq!(RelayTable::new(&[relay("127.0.0.1:1", vec![1; 15])], 0).unwrap_err(), RelayError::Key(65));
        assert_eq!(RelayTable::new(&[good], 0).unwrap().relays.len(), 1);
    }

    #[test]
    fn frames_of_an_unknown_relay_or_for_the_other_way_are_refused() {
        let table = RelayTable::new(&[relay("127.0.0.1:1", vec![1; 16])], 0).unwrap();
        let mut out = Vec::new();
        let client = ClientAddr::from("127.0.0.1:9".parse::<SocketAddr>().unwrap());
        let number = RelayNumber::new(65).unwrap();
        let ecn = tunnel::Ecn::NotEct;
        assert!(table.seal(7, number, client, b"hi".chunks(2), ecn, &mut out).is_some());
        assert_eq!(table.open(7, &out), Some(Err(OpenError::Direction)));
        assert!(table.seal(7, RelayNumber::new(66).unwrap(), client, b"hi".chunks(2), ecn, &mut out).is_none());
        assert_eq!(table.open(7, &[0x40; 40]), None);
    }
}
