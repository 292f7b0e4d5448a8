//! The relays that a shard exchanges frames with: where they are and the keys of each tunnel.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

use antiphon_core::{
    id::{KeyGeneration, RelayNumber},
    keys::TunnelKey,
    tunnel::{self, ClientAddr, Direction, Header, KeySlot, OpenError},
};
use antiphon_proto::v1;
use parking_lot::Mutex;

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
    /// Newest generation first.
    keys: Vec<Keys>,
    heard: Arc<Heard>,
}

/// What verified frames have told of a relay; goes over from table to table.
#[derive(Debug, Default)]
struct Heard {
    /// The newest generation that it has sealed with; 0: it has sent nothing yet.
    newest: AtomicU32,
    /// Generation (upper half) and second (lower half) of the last frame.
    last: AtomicU64,
}

impl Heard {
    fn note(&self, now_s: u64, generation: KeyGeneration) {
        let generation = generation.value();
        self.newest.fetch_max(generation, Relaxed);
        self.last.store(u64::from(generation) << 32 | now_s & SECONDS, Relaxed);
    }

    /// Generation of the last frame, if that was within [`IN_USE_S`].
    fn in_use(&self, now_s: u64) -> Option<KeyGeneration> {
        let last = self.last.load(Relaxed);
        let age = (now_s & SECONDS).saturating_sub(last & SECONDS);
        let generation = u32::try_from(last >> 32).ok().filter(|n| *n > 0 && age <= IN_USE_S)?;
        KeyGeneration::new(generation).ok()
    }
}

impl Relay {
    fn key_of(&self, slot: KeySlot) -> Option<&Keys> {
        self.keys.iter().find(|key| KeySlot::of(key.generation) == slot)
    }

    /// The newest key that the relay certainly has, because it seals with it; before its first frame the oldest one.
    fn sealing(&self) -> Option<&Keys> {
        let newest = self.heard.newest.load(Relaxed);
        self.keys.iter().find(|key| key.generation.value() <= newest).or(self.keys.last())
    }
}

/// Which relay of our own region brings the frames of a relay that we have no key of: ingress to carrier.
///
/// Holds ingress relays from verified frames only, so at most all relay numbers there are.
#[derive(Debug, Default)]
struct Carriers {
    any: AtomicBool,
    by_ingress: Mutex<HashMap<RelayNumber, RelayNumber>>,
}

impl Carriers {
    fn of(&self, ingress: RelayNumber) -> Option<RelayNumber> {
        if !self.any.load(Relaxed) {
            return None;
        }
        self.by_ingress.lock().get(&ingress).copied()
    }

    /// A verified frame of `ingress` came from `carrier`.
    fn note(&self, ingress: RelayNumber, carrier: RelayNumber) {
        if ingress != carrier {
            self.by_ingress.lock().insert(ingress, carrier);
            self.any.store(true, Relaxed);
        } else if self.any.load(Relaxed) {
            self.by_ingress.lock().remove(&ingress);
        }
    }
}

/// A verified frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Opened<'a> {
    pub(crate) header: Header,
    pub(crate) datagram: &'a [u8],
}

/// One shard's relays; replaced as a whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct RelayTable {
    relays: HashMap<RelayNumber, Relay>,
    by_address: HashMap<SocketAddr, RelayNumber>,
    carriers: Arc<Carriers>,
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
            table.relays.insert(number, Relay { address, keys, heard: Arc::default() });
        }
        table.index();
        Ok(table)
    }

    /// A newer table that also keeps what it does not name: a router that has just started knows few relays, and a
    /// relay left out is no evidence that it is gone (invariant I8). What is kept can only be used by the one who
    /// holds its keys; keys of generations that are not `loaded` go. What has been heard of a relay stays known.
    pub(crate) fn keeping(mut self, older: &Self, loaded: &[KeyGeneration]) -> Self {
        for (number, relay) in &older.relays {
            if let Some(newer) = self.relays.get_mut(number) {
                newer.heard = relay.heard.clone();
                let missing = |key: &&Keys| newer.keys.iter().all(|other| other.generation != key.generation);
                let missing: Vec<_> = relay.keys.iter().filter(missing).cloned().collect();
                newer.keys.extend(missing);
            } else if self.relays.len() < MOST_RELAYS {
                self.relays.insert(*number, relay.clone());
            }
        }
        for relay in self.relays.values_mut() {
            relay.keys.retain(|key| loaded.contains(&key.generation));
            relay.keys.sort_by_key(|key| std::cmp::Reverse(key.generation));
        }
        self.carriers = older.carriers.clone();
        self.index();
        self
    }

    fn index(&mut self) {
        let address = |(number, relay): (&RelayNumber, &Relay)| (canonical(relay.address), *number);
        self.by_address = self.relays.iter().map(address).collect();
    }

    /// Verifies a frame that came from `source`. `None` when its relay or key generation is unknown.
    ///
    /// A frame that reached its relay in another region was sealed again by the relay of ours that it came through:
    /// that one is known by its address. An address proves nothing, the key does.
    pub(crate) fn open<'a>(
        &self,
        now_s: u64,
        source: SocketAddr,
        frame: &'a [u8],
    ) -> Option<Result<Opened<'a>, OpenError>> {
        let header = match Header::parse(frame) {
            Ok(header) => header,
            Err(error) => return Some(Err(error)),
        };
        let mut outcome = self.open_from(header.relay, now_s, &header, frame);
        if matches!(outcome, None | Some(Err(OpenError::Tag)))
            && let Some(carrier) = self.by_address.get(&canonical(source)).filter(|n| **n != header.relay)
        {
            outcome = self.open_from(*carrier, now_s, &header, frame).or(outcome);
        }
        outcome
    }

    fn open_from<'a>(
        &self,
        sealer: RelayNumber,
        now_s: u64,
        header: &Header,
        frame: &'a [u8],
    ) -> Option<Result<Opened<'a>, OpenError>> {
        let relay = self.relays.get(&sealer)?;
        let key = relay.key_of(header.key_slot)?;
        let opened = tunnel::open(frame, &key.up, Direction::Up, now_s, tunnel::MAX_SKEW);
        Some(opened.map(|(header, datagram)| {
            relay.heard.note(now_s, key.generation);
            self.carriers.note(header.relay, sealer);
            Opened { header, datagram }
        }))
    }

    /// The relay that frames for clients behind `ingress` go to: itself, or one of ours that reaches it.
    fn next_hop(&self, ingress: RelayNumber) -> Option<&Relay> {
        if let Some(carrier) = self.carriers.of(ingress).and_then(|carrier| self.relays.get(&carrier)) {
            return Some(carrier);
        }
        // A carrier that is gone: whoever of the others was heard last is the likeliest to be there.
        let last = |relay: &&Relay| relay.heard.last.load(Relaxed) & SECONDS;
        self.relays.get(&ingress).or_else(|| self.relays.values().max_by_key(last))
    }

    /// Where frames for clients behind `ingress` are sent.
    pub(crate) fn next_hop_address(&self, ingress: RelayNumber) -> Option<SocketAddr> {
        self.next_hop(ingress).map(|relay| relay.address)
    }

    /// The oldest generation that any relay still seals with.
    pub(crate) fn oldest_in_use(&self, now_s: u64) -> Option<KeyGeneration> {
        self.relays.values().filter_map(|relay| relay.heard.in_use(now_s)).min()
    }

    /// Appends `header || datagram` for a client behind a relay and returns where to send it.
    ///
    /// `None` when no relay is known: then there is no way to the client.
    pub(crate) fn seal(
        &self,
        now_s: u64,
        ingress: RelayNumber,
        client: ClientAddr,
        datagrams: std::slice::Chunks<'_, u8>,
        ecn: tunnel::Ecn,
        out: &mut Vec<u8>,
    ) -> Option<SocketAddr> {
        let relay = self.next_hop(ingress)?;
        let key = relay.sealing()?;
        let header = Header {
            direction: Direction::Down,
            key_slot: KeySlot::of(key.generation),
            hop_limit: tunnel::INITIAL_HOP_LIMIT,
            ecn,
            client,
            relay: ingress,
            time: tunnel::coarse_time(now_s),
        };
        for datagram in datagrams {
            let mut head = [0; tunnel::HEADER_LEN];
            header.seal_into(&key.down, datagram, &mut head);
            out.extend_from_slice(&head);
            out.extend_from_slice(datagram);
        }
        Some(relay.address)
    }
}

/// A socket that serves both families shows IPv4 peers with mapped addresses.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Relays of all regions that a worker remembers.
const MOST_RELAYS: usize = 4_096;
/// A relay's tunnel is in use if something came through it within the last seconds.
const IN_USE_S: u64 = 30;
const SECONDS: u64 = u32::MAX as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_left_out_is_kept_and_one_that_moved_is_not() {
        let mut other = relay("127.0.0.1:2", vec![2; 16]);
        other.number = 66;
        let older = RelayTable::new(&[relay("127.0.0.1:1", vec![1; 16]), other], 0).unwrap();
        let newer = RelayTable::new(&[relay("127.0.0.1:9", vec![1; 16])], 0).unwrap().keeping(&older, &loaded(&[1]));
        let address = |n: u16| newer.relays[&RelayNumber::new(n).unwrap()].address.to_string();
        assert_eq!((address(65), address(66)), ("127.0.0.1:9".into(), "127.0.0.1:2".into()));
    }

    const NOT_ECT: tunnel::Ecn = tunnel::Ecn::NotEct;

    fn loaded(generations: &[u32]) -> Vec<KeyGeneration> {
        generations.iter().map(|n| KeyGeneration::new(*n).unwrap()).collect()
    }

    fn number(n: u16) -> RelayNumber {
        RelayNumber::new(n).unwrap()
    }

    fn client() -> ClientAddr {
        ClientAddr::from("127.0.0.1:9".parse::<SocketAddr>().unwrap())
    }

    fn relay(address: &str, key: Vec<u8>) -> v1::WorkerRelay {
        let keys = v1::TunnelKeys { shard: 0, generation: 1, up: key.clone().into(), down: key.into() };
        v1::WorkerRelay { number: 65, tunnel_address: address.into(), keys: vec![keys] }
    }

    /// Up and down keys of a generation are that many bytes of its number, and of its number plus 100.
    fn rotating(n: u32, generations: &[u8]) -> v1::WorkerRelay {
        let keys = |g: &u8| v1::TunnelKeys {
            shard: 0,
            generation: u32::from(*g),
            up: vec![*g; 16].into(),
            down: vec![g + 100; 16].into(),
        };
        let tunnel_address = format!("127.0.0.1:{n}");
        v1::WorkerRelay { number: n, tunnel_address, keys: generations.iter().map(keys).collect() }
    }

    fn up(relay: u16, generation: u8, now_s: u64) -> Vec<u8> {
        let generation_number = KeyGeneration::new(generation.into()).unwrap();
        let header = Header {
            direction: Direction::Up,
            key_slot: KeySlot::of(generation_number),
            hop_limit: 4,
            ecn: NOT_ECT,
            client: client(),
            relay: number(relay),
            time: tunnel::coarse_time(now_s),
        };
        let mut frame = vec![0; tunnel::HEADER_LEN];
        frame.extend_from_slice(b"datagram");
        header.seal_frame(&TunnelKey::from_bytes([generation; 16]), &mut frame).unwrap();
        frame
    }

    /// Generation that a frame for a client behind `ingress` is sealed with, and where it goes.
    fn down(table: &RelayTable, ingress: u16) -> Option<(u8, u16)> {
        let mut out = Vec::new();
        let to = table.seal(7, number(ingress), client(), b"hi".chunks(2), NOT_ECT, &mut out)?;
        let verifies = |g: &u8| {
            let key = TunnelKey::from_bytes([g + 100; 16]);
            tunnel::open(&out, &key, Direction::Down, 7, tunnel::MAX_SKEW).is_ok()
        };
        assert_eq!(Header::parse(&out).unwrap().relay, number(ingress));
        Some(((1..9).find(verifies)?, to.port()))
    }

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn opens(table: &RelayTable, port: u16, frame: &[u8]) -> bool {
        matches!(table.open(7, address(port), frame), Some(Ok(_)))
    }

    #[test]
    fn down_goes_the_newest_generation_that_the_relay_has_shown_to_have() {
        let first = RelayTable::new(&[rotating(65, &[1])], 0).unwrap();
        let both = RelayTable::new(&[rotating(65, &[1, 2])], 0).unwrap().keeping(&first, &loaded(&[1, 2]));
        assert_eq!(down(&both, 65), Some((1, 65)), "nothing heard: what has been there longest");
        assert!(opens(&both, 65, &up(65, 1, 7)));
        assert_eq!(down(&both, 65), Some((1, 65)));
        assert!(opens(&both, 65, &up(65, 2, 7)));
        assert!(opens(&both, 65, &up(65, 1, 7)), "late frames of the older one are still good");
        assert_eq!(down(&both, 65), Some((2, 65)));
        let three = RelayTable::new(&[rotating(65, &[1, 2, 3])], 0).unwrap().keeping(&both, &loaded(&[1, 2, 3]));
        assert_eq!(down(&three, 65), Some((2, 65)), "what was heard is not forgotten");
        let last = RelayTable::new(&[rotating(65, &[3])], 0).unwrap().keeping(&three, &loaded(&[3]));
        assert_eq!(down(&last, 65), Some((3, 65)));
        assert!(!opens(&last, 65, &up(65, 2, 7)), "an unloaded generation opens nothing");
    }

    #[test]
    fn a_router_that_is_behind_takes_no_key_away() {
        let both = RelayTable::new(&[rotating(65, &[1, 2])], 0).unwrap();
        let behind = RelayTable::new(&[rotating(65, &[1])], 0).unwrap().keeping(&both, &loaded(&[1, 2]));
        assert!(opens(&behind, 65, &up(65, 2, 7)) && opens(&behind, 65, &up(65, 1, 7)));
        assert_eq!(down(&behind, 65), Some((2, 65)));
    }

    #[test]
    fn the_oldest_generation_in_use_is_that_of_the_last_frames() {
        let table = RelayTable::new(&[rotating(65, &[1, 2]), rotating(66, &[1, 2])], 0).unwrap();
        assert_eq!(table.oldest_in_use(7), None);
        assert!(opens(&table, 65, &up(65, 1, 7)) && opens(&table, 66, &up(66, 2, 7)));
        assert_eq!(table.oldest_in_use(7).map(KeyGeneration::value), Some(1));
        assert!(opens(&table, 65, &up(65, 2, 7)));
        assert_eq!(table.oldest_in_use(7).map(KeyGeneration::value), Some(2));
        assert_eq!(table.oldest_in_use(7 + IN_USE_S + 1), None, "silent relays use nothing");
    }

    #[test]
    fn a_far_relays_clients_are_answered_through_the_one_that_brought_their_frames() {
        let table = RelayTable::new(&[rotating(65, &[1]), rotating(66, &[1])], 0).unwrap();
        let far = up(900, 1, 7);
        assert!(!opens(&table, 99, &far), "from nobody's address");
        assert!(opens(&table, 66, &far));
        assert_eq!(down(&table, 900), Some((1, 66)));
        assert!(opens(&table, 65, &far));
        assert_eq!(down(&table, 900), Some((1, 65)), "it has gone over to the other one");
        let Some(Ok(opened)) = table.open(7, address(65), &far) else { panic!("opens") };
        assert_eq!((opened.header.relay, opened.header.client), (number(900), client()), "the path is the client's");
    }

    #[test]
    fn without_its_carrier_a_far_relay_is_reached_through_another_one() {
        let table = RelayTable::new(&[rotating(65, &[1]), rotating(66, &[1])], 0).unwrap();
        assert!(opens(&table, 65, &up(65, 1, 7)));
        assert!(matches!(table.open(8, address(66), &up(66, 1, 8)), Some(Ok(_))));
        assert_eq!(down(&table, 900), Some((1, 66)), "the one heard last");
    }

    #[test]
    fn a_near_relay_that_a_table_still_names_may_be_reached_through_another_one_and_back() {
        let mut direct = rotating(900, &[1]);
        direct.keys[0].up = vec![42; 16].into();
        let table = RelayTable::new(&[rotating(65, &[1]), direct], 0).unwrap();
        assert!(opens(&table, 65, &up(900, 1, 7)), "sealed by the carrier, although there is a key of its own");
        assert_eq!(down(&table, 900), Some((1, 65)));
        let relays = [rotating(65, &[1]), rotating(900, &[1])];
        let table = RelayTable::new(&relays, 0).unwrap().keeping(&table, &loaded(&[1]));
        assert!(opens(&table, 900, &up(900, 1, 7)));
        assert_eq!(down(&table, 900), Some((1, 900)), "a frame of its own is the newer evidence");
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
        assert!(table.seal(7, number(65), client(), b"hi".chunks(2), NOT_ECT, &mut out).is_some());
        assert_eq!(table.open(7, address(1), &out), Some(Err(OpenError::Direction)));
        assert_eq!(table.open(7, address(2), &[0x40; 40]), None);
        let empty = RelayTable::default();
        assert!(empty.seal(7, number(65), client(), b"hi".chunks(2), NOT_ECT, &mut out).is_none());
    }
}
