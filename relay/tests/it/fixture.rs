//! A fleet of one relay: keys, workers that speak the tunnel, and clients that speak just enough QUIC.

use std::{
    net::{SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use antiphon_core::{
    cid::{CidMinter, ConfigId, NonceCounter, SessionCid},
    id::{KeyGeneration, RelayNumber, ServerId},
    keys::{FleetRoot, RelaySecret},
    tunnel::{self, ClientAddr, Direction, Ecn, HEADER_LEN, Header, KeySlot, MAX_SKEW, coarse_time},
};
use antiphon_relay::{
    data_path::{Config, DataPath, Exits},
    keyring::{CidKey, Keyring},
    limits::Limits,
    metrics::Metrics,
    routing::{RouteChange, Routing, Welcome},
};
use prometheus_client::registry::Registry;

/// Longest that anything may take here.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) const GENERATION: u32 = 1;

pub(crate) fn root() -> FleetRoot {
    FleetRoot::from_bytes([7; 32])
}

pub(crate) fn generation() -> KeyGeneration {
    KeyGeneration::new(GENERATION).unwrap()
}

/// The configuration of a generation's connection IDs.
pub(crate) fn config_of(generation: KeyGeneration) -> ConfigId {
    ConfigId::new((generation.value() % 7) as u8).unwrap()
}

pub(crate) fn config_id() -> ConfigId {
    config_of(generation())
}

pub(crate) fn relay_number() -> RelayNumber {
    RelayNumber::new(65).unwrap()
}

pub(crate) fn secret() -> RelaySecret {
    root().relay_secret(relay_number(), generation())
}

pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Waits for a condition, with a deadline.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::yield_now();
    }
}

pub(crate) fn loopback(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

/// A worker's shard: its end of the tunnel.
pub(crate) struct Worker {
    pub(crate) socket: UdpSocket,
    pub(crate) server_id: ServerId,
    minter: CidMinter,
}

pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) datagram: Vec<u8>,
    pub(crate) from: SocketAddr,
    pub(crate) generation: KeyGeneration,
}

impl Worker {
    pub(crate) fn new(server_id: u64) -> Self {
        Self::at(server_id, "127.0.0.1:0")
    }

    pub(crate) fn at(server_id: u64, address: &str) -> Self {
        let server_id = ServerId::from_u64(server_id);
        let key = root().cid_key(generation());
        Self {
            socket: loopback(address),
            server_id,
            minter: CidMinter::new(server_id, config_id(), key, NonceCounter::starting_at(1)),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    pub(crate) fn live_cid(&mut self) -> SessionCid {
        self.minter.mint_connection()
    }

    pub(crate) fn first_cid(&mut self, expires_at: u64) -> SessionCid {
        self.minter.mint_initial(expires_at).0
    }

    /// Mints under another generation from now on.
    pub(crate) fn rotate(&mut self, generation: KeyGeneration) {
        self.minter.rotate(config_of(generation), root().cid_key(generation));
    }

    /// The next frame, verified.
    pub(crate) fn frame(&self) -> Frame {
        self.frame_of(relay_number())
    }

    /// The next frame, verified as sealed by this relay, under whichever generation.
    pub(crate) fn frame_of(&self, relay: RelayNumber) -> Frame {
        let mut buffer = [0; 4096];
        let (len, from) = self.socket.recv_from(&mut buffer).expect("a frame in time");
        let slot = Header::parse(&buffer[..len]).unwrap().key_slot;
        let mut generations = (1..8).map(|g| KeyGeneration::new(g).unwrap());
        let generation = generations.find(|g| KeySlot::of(*g) == slot).expect("a known generation");
        let key = root().relay_secret(relay, generation).tunnel_keys(self.server_id).up;
        let (header, datagram) = tunnel::open(&buffer[..len], &key, Direction::Up, unix_seconds(), MAX_SKEW).unwrap();
        Frame { header, datagram: datagram.to_vec(), from, generation }
    }

    /// The next frame, verified as sealed by one of these relays.
    pub(crate) fn frame_of_any(&self, relays: &[RelayNumber]) -> Frame {
        let mut buffer = [0; 4096];
        let (len, from) = self.socket.recv_from(&mut buffer).expect("a frame in time");
        let opened = relays.iter().find_map(|relay| {
            let key = root().relay_secret(*relay, generation()).tunnel_keys(self.server_id).up;
            tunnel::open(&buffer[..len], &key, Direction::Up, unix_seconds(), MAX_SKEW).ok()
        });
        let (header, datagram) = opened.expect("a frame of one of them");
        Frame { header, datagram: datagram.to_vec(), from, generation: generation() }
    }

    /// Answers a frame as workers do: under its generation, with the relay that brought it.
    pub(crate) fn answer(&self, frame: &Frame, through: RelayNumber, datagram: &[u8]) {
        let header = Header {
            direction: Direction::Down,
            key_slot: KeySlot::of(frame.generation),
            hop_limit: 4,
            time: coarse_time(unix_seconds()),
            ..frame.header
        };
        let mut answer = vec![0; HEADER_LEN];
        answer.extend_from_slice(datagram);
        let key = root().relay_secret(through, frame.generation).tunnel_keys(self.server_id).down;
        header.seal_frame(&key, &mut answer).unwrap();
        self.socket.send_to(&answer, frame.from).unwrap();
    }

    /// A frame towards a client, as this worker seals it.
    pub(crate) fn sealed(&self, client: SocketAddr, datagram: &[u8]) -> Vec<u8> {
        self.sealed_with(datagram, |header| header.client = client.into())
    }

    pub(crate) fn sealed_with(&self, datagram: &[u8], change: impl Fn(&mut Header)) -> Vec<u8> {
        let mut header = Header {
            direction: Direction::Down,
            key_slot: KeySlot::of(generation()),
            hop_limit: 4,
            ecn: Ecn::Ect0,
            client: ClientAddr::RELAY,
            relay: relay_number(),
            time: coarse_time(unix_seconds()),
        };
        change(&mut header);
        let mut frame = vec![0; HEADER_LEN];
        frame.extend_from_slice(datagram);
        let key = secret().tunnel_keys(self.server_id).down;
        header.seal_frame(&key, &mut frame).unwrap();
        frame
    }
}

/// A short-header packet of `len` bytes.
pub(crate) fn short(cid: &SessionCid, len: usize, fill: u8) -> Vec<u8> {
    let mut packet = vec![0x40];
    packet.extend_from_slice(cid.as_bytes());
    packet.resize(len, fill);
    packet
}

/// An Initial packet of version 1 in a datagram of `len` bytes.
pub(crate) fn initial(cid: &SessionCid, len: usize) -> Vec<u8> {
    let mut packet = vec![0xc0, 0, 0, 0, 1, 17];
    packet.extend_from_slice(cid.as_bytes());
    packet.resize(len, 0x11);
    packet
}

/// A running data path and what its router has said.
pub(crate) struct Relay {
    pub(crate) path: DataPath,
    pub(crate) metrics: Metrics,
    pub(crate) routing: Routing,
    pub(crate) exits: Exits,
    version: u64,
}

impl Relay {
    /// Its few connection IDs may come often.
    pub(crate) fn start(public: &str, tunnel: &str, cores: usize) -> Self {
        let limits = Limits { cid_rate: 30_000.try_into().unwrap(), ..Limits::default() };
        Self::start_within(public, tunnel, cores, limits)
    }

    pub(crate) fn start_within(public: &str, tunnel: &str, cores: usize, limits: Limits) -> Self {
        let metrics = Metrics::register(&mut Registry::default());
        let config =
            Config { public: public.parse().unwrap(), tunnel: tunnel.parse().unwrap(), cores, pin: true, limits };
        let (path, exits) = DataPath::start(&config, &metrics).unwrap();
        let mut routing = Routing::new(1);
        let cid = CidKey { config: config_id(), generation: generation(), key: root().cid_key(generation()) };
        let keys = Keyring { cid: vec![cid], secrets: vec![(generation(), secret())], sealing: generation() };
        routing.welcome(0, Welcome { relay: relay_number(), keys }).unwrap();
        Self { path, metrics, routing, exits, version: 0 }
    }

    /// Replaces all routes.
    pub(crate) fn route(&mut self, workers: &[(&Worker, SocketAddr)]) {
        let upserts = workers.iter().map(|(w, a)| (w.server_id, *a)).collect();
        self.change(RouteChange { full: true, upserts, ..RouteChange::default() });
    }

    pub(crate) fn change(&mut self, change: RouteChange) {
        self.version += 1;
        self.routing.apply(0, unix_seconds(), RouteChange { version: self.version, ..change }).unwrap();
        self.path.swap(self.routing.table());
    }

    /// A relay with two threads that knows one worker.
    pub(crate) fn with(worker: &Worker) -> Self {
        let mut relay = Self::start("127.0.0.1:0", "127.0.0.1:0", 2);
        relay.route(&[(worker, worker.address())]);
        relay
    }

    /// Where a client on this machine reaches it.
    pub(crate) fn public(&self) -> SocketAddr {
        self.path.public()
    }
}
