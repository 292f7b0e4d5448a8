//! One worker without a router, and the relays and callers around it.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_client::{Call, CallReport, ClientKey, Dial, ScriptedCaller, ScriptedOutcome};
use antiphon_core::{
    cid::{CidMinter, ConfigId, NonceCounter},
    id::{Epoch, Incarnation, KeyGeneration, RegionNumber, RelayNumber, ServerId, ShardNumber, WorkerNumber},
    keys::{FleetRoot, TunnelKeys},
    tunnel::{self, ClientAddr, Direction, Ecn, HEADER_LEN, Header, KeySlot},
};
use antiphon_media::speech::{RATE, Utterance};
use antiphon_proto::{
    ticket::{self, TicketClaims},
    v1::{self, AgentBehaviour, Codec, RelayAddress, Session},
};
use antiphon_runtime::{
    Tasks,
    pki::{FleetCa, PeerName, Role},
};
use parking_lot::Mutex;
use prometheus_client::{encoding::text::encode, metrics::gauge::Gauge, registry::Registry};
use tokio::{net::UdpSocket, sync::MutexGuard};

use crate::{
    capacity::{Capacity, Request, Terms},
    keys::KeySet,
    metrics::Metrics,
    qlog::QlogDir,
    shard::{Shards, ShardsConfig},
};

pub(super) const CID_LIFETIME: Duration = Duration::from_millis(500);

/// One worker with one shard.
pub(super) struct Rig {
    pub(super) root: FleetRoot,
    pub(super) capacity: Arc<Capacity>,
    pub(super) shards: Mutex<Shards>,
    pub(super) worker: SocketAddr,
    pub(super) tasks: Tasks,
    registry: Registry,
    skew: Gauge,
    anchor: Vec<u8>,
    server_name: String,
    pub(super) qlog: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

/// Calls run in real time: one test at a time, so that none pays for another one's load.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

pub(super) fn generation(n: u32) -> KeyGeneration {
    KeyGeneration::new(n).unwrap()
}

/// The one shard.
pub(super) fn server_id() -> ServerId {
    let (region, worker) = numbers();
    ServerId { region, worker, shard: ShardNumber::new(0).unwrap(), incarnation: Incarnation::new(77).unwrap() }
}

fn numbers() -> (RegionNumber, WorkerNumber) {
    (RegionNumber::new(1).unwrap(), WorkerNumber::new(9).unwrap())
}

fn tunnel_keys(root: &FleetRoot, relay: RelayNumber, of: u32) -> TunnelKeys {
    root.relay_secret(relay, generation(of)).tunnel_keys(server_id())
}

/// What a router would say of keys.
fn key_set(root: &FleetRoot, generations: &[u32], minting: u32) -> KeySet {
    let config = |n: &u32| v1::CidConfig {
        config_id: n % 7,
        generation: *n,
        key: root.cid_key(generation(*n)).to_vec().into(),
        minting: *n == minting,
    };
    let reset = |n: &u32| v1::ResetKey {
        shard: 0,
        generation: *n,
        key: root.reset_key(server_id(), generation(*n)).to_vec().into(),
    };
    let configs: Vec<_> = generations.iter().map(config).collect();
    let resets: Vec<_> = generations.iter().map(reset).collect();
    let tickets: Vec<_> = generations.iter().map(|n| ticket::public_key(&root.ticket_seed(generation(*n)))).collect();
    KeySet::new(&configs, &tickets, &resets, 1).unwrap()
}

impl Rig {
    pub(super) async fn start(slots: u32) -> Self {
        Self::start_on(std::net::Ipv4Addr::LOCALHOST.into(), slots).await
    }

    /// Bound to this address, and reached by IPv4.
    pub(super) async fn start_on(bound: std::net::IpAddr, slots: u32) -> Self {
        let turn = TURN.lock().await;
        let root = FleetRoot::from_bytes([42; 32]);
        let ca = FleetCa::from_seed(&root.ca_seed()).unwrap();
        let peer = PeerName::new("worker-0", Role::Worker, "north").unwrap();
        let identity = ca.issue(&peer, &[], SystemTime::now()).unwrap();
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        let skew = metrics.shard.clock_skew.clone();
        let capacity = Arc::new(Capacity::new("default/echo".into(), slots, metrics.clone()));
        capacity.set_behaviour(AgentBehaviour {
            agent: "default/echo".into(),
            engine: "echo".into(),
            ..AgentBehaviour::default()
        });
        let qlog = tempfile::tempdir().unwrap();
        let localhost = std::net::Ipv4Addr::LOCALHOST.into();
        let (socket, worker) = crate::bind_shard(SocketAddr::new(bound, 0), 0, localhost).unwrap();
        let config = ShardsConfig {
            numbers: numbers(),
            incarnation: server_id().incarnation,
            identity: &identity,
            region: "north",
            slots,
            pin: false,
            cid_lifetime: CID_LIFETIME,
            qlog: Some(Arc::new(QlogDir::open(&qlog.path().join("qlog")).unwrap())),
            capacity: capacity.clone(),
            metrics,
        };
        let tasks = Tasks::new();
        let shards = Shards::open(config, vec![(socket, worker)], &key_set(&root, &[1], 1), &[], &tasks).unwrap();
        let (anchor, server_name) = (identity.ca().to_vec(), peer.dns());
        Self {
            root,
            capacity,
            shards: Mutex::new(shards),
            worker,
            tasks,
            registry,
            skew,
            anchor,
            server_name,
            qlog,
            _turn: turn,
        }
    }

    /// Tells the worker of relays and the generations of their tunnels' keys.
    pub(super) fn set_relays(&self, relays: &[&TestRelay], generations: &[u32]) {
        let relay = |relay: &&TestRelay| v1::WorkerRelay {
            number: relay.number.value().into(),
            tunnel_address: relay.tunnel.to_string(),
            keys: generations.iter().map(|n| self.tunnel_keys(relay.number, *n)).collect(),
        };
        self.shards.lock().set_relays(&relays.iter().map(relay).collect::<Vec<_>>()).unwrap();
    }

    /// Loads these generations and mints with one of them.
    pub(super) fn set_keys(&self, generations: &[u32], minting: u32) {
        let keys = key_set(&self.root, generations, minting);
        self.shards.lock().set_keys(&keys, std::time::Instant::now());
    }

    fn tunnel_keys(&self, relay: RelayNumber, of: u32) -> v1::TunnelKeys {
        let keys = tunnel_keys(&self.root, relay, of);
        let (up, down) = (keys.up.as_bytes().to_vec().into(), keys.down.as_bytes().to_vec().into());
        v1::TunnelKeys { shard: 0, generation: of, up, down }
    }

    /// What a router would do: a lease, and a ticket of the generation for it.
    pub(super) fn session(&self, key: &ClientKey, relays: &[&TestRelay], signed_with: u32) -> (Arc<Terms>, Session) {
        let request = Request {
            session: antiphon_core::id::SessionId::from_bytes(rand::random()),
            epoch: Epoch::FIRST,
            agent: "default/echo".into(),
            tenant: "tests".into(),
            client_key: key.public(),
            codec: Codec::L1616k,
            ttl: Duration::from_secs(30),
            neighbourhood: 7,
        };
        let terms = self.capacity.reserve(&request).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let claims = TicketClaims {
            v: ticket::VERSION,
            session: terms.session,
            epoch: terms.epoch,
            agent: "default/echo".into(),
            region: "north".into(),
            server_id: terms.server_id,
            client_key: key.public(),
            codec: Codec::L1616k,
            tenant: "tests".into(),
            iat: now,
            exp: now + 30,
            lease: terms.lease.0,
        };
        let address = |relay: &&TestRelay| RelayAddress {
            number: relay.number.value().into(),
            address: relay.clients.to_string(),
            ..RelayAddress::default()
        };
        let session = Session {
            session: terms.session.to_string(),
            epoch: terms.epoch.value(),
            ticket: ticket::sign(&claims, &self.root.ticket_seed(generation(signed_with))).unwrap(),
            initial_connection_ids: terms.attempts.iter().map(|(cid, _)| cid.as_bytes().to_vec().into()).collect(),
            relays: relays.iter().map(address).collect(),
            server_name: self.server_name.clone(),
            trust_anchor: self.anchor.clone().into(),
            codec: Codec::L1616k.into(),
            ..Session::default()
        };
        (terms, session)
    }

    /// An active call through these relays.
    pub(super) async fn call(&self, relays: &[&TestRelay], signed_with: u32) -> (Arc<Terms>, Call) {
        let key = ClientKey::generate().unwrap();
        let (terms, session) = self.session(&key, relays, signed_with);
        let call = Dial::new(&session).unwrap().connect(&key).await.unwrap();
        (terms, call)
    }

    /// The value of a metric line that begins like this; zero if there is none.
    pub(super) fn metric(&self, line: &str) -> u64 {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        let found = text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok());
        found.unwrap_or(0)
    }

    /// Seconds that the clock of the relay furthest off is ahead.
    pub(super) fn skew(&self) -> i64 {
        self.skew.get()
    }

    pub(super) fn dropped(&self, reason: &str) -> u64 {
        self.metric(&format!("antiphon_worker_dropped_frames_total{{reason=\"{reason}\"}}"))
    }

    /// A minter of the shard's own connection IDs.
    pub(super) fn minter(&self) -> CidMinter {
        let config = ConfigId::new(1).unwrap();
        CidMinter::new(server_id(), config, self.root.cid_key(generation(1)), NonceCounter::starting_at(1 << 30))
    }

    /// No frame was lost. A machine that is too busy brings steps late, several at once, and of such a heap the oldest
    /// frames are dropped on purpose (invariant I12): so many may be missing, not one more.
    pub(super) fn assert_no_frame_lost(&self, terms: &Terms, report: &CallReport) {
        let late = (self.metric("antiphon_worker_late_ticks_total "), report.late_steps);
        let (down, up) = (report.received.jitter.lost, terms.path.lock().describe().audio_lost);
        assert!(down <= late.0, "{down} frames lost down, {} steps late", late.0);
        assert!(up <= late.1, "{up} frames lost up, {} steps late", late.1);
    }

    /// Waits for what has to become true.
    pub(super) async fn until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let reached = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            while !condition(self) {
                ticks.tick().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), reached).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    pub(super) async fn stop(self) {
        self.tasks.wait(std::future::ready(())).await.unwrap();
    }
}

/// Says these many turns and listens to the answers.
pub(super) async fn talk(call: Call, turns: usize) -> (CallReport, ScriptedOutcome) {
    let turns = Utterance::ALL.iter().cycle().take(turns).map(Utterance::pcm).collect();
    let mut caller = ScriptedCaller::new(turns, RATE, Duration::from_secs(20));
    let (report, outcome) = call.run(&mut caller).await;
    outcome.unwrap();
    (report, caller.into_outcome())
}

/// A relay: puts headers on and takes them off.
#[derive(Clone)]
pub(super) struct TestRelay {
    pub(super) number: RelayNumber,
    /// Where clients send to.
    pub(super) clients: SocketAddr,
    /// Where the worker sends to.
    pub(super) tunnel: SocketAddr,
    root: FleetRoot,
    sockets: Arc<(UdpSocket, UdpSocket)>,
    worker: SocketAddr,
    state: Arc<Mutex<RelayState>>,
}

struct RelayState {
    sealing: u32,
    loaded: HashSet<u32>,
    /// Generations of the frames that came down.
    seen: HashSet<u32>,
    /// Of clients' datagrams, up and down.
    traffic: (Traffic, Traffic),
    /// Loses what clients send.
    deaf: bool,
    /// Loses what the worker sends.
    mute: bool,
    /// The last datagram of a client.
    last_up: Vec<u8>,
    /// Addresses that clients really have.
    known: HashSet<SocketAddr>,
    /// Datagrams for other addresses.
    strangers: u64,
}

/// What went one way.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Traffic {
    pub(super) datagrams: u64,
    pub(super) bytes: u64,
    pub(super) largest: u64,
}

impl Traffic {
    fn count(&mut self, length: usize) {
        self.datagrams += 1;
        self.bytes += length as u64;
        self.largest = self.largest.max(length as u64);
    }
}

impl TestRelay {
    pub(super) async fn start(rig: &Rig, number: u16) -> Self {
        let sockets = (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let state = RelayState {
            sealing: 1,
            loaded: HashSet::from([1]),
            seen: HashSet::new(),
            traffic: Default::default(),
            deaf: false,
            mute: false,
            last_up: Vec::new(),
            known: HashSet::new(),
            strangers: 0,
        };
        let relay = Self {
            number: RelayNumber::new(number).unwrap(),
            clients: sockets.0.local_addr().unwrap(),
            tunnel: sockets.1.local_addr().unwrap(),
            root: rig.root.clone(),
            sockets: Arc::new(sockets),
            worker: rig.worker,
            state: Arc::new(Mutex::new(state)),
        };
        let (up, down, stopping) = (relay.clone(), relay.clone(), rig.tasks.stopping());
        let stopped = stopping.clone();
        rig.tasks.spawn("relay up", async move {
            stopping.run_until_cancelled(up.forward_up()).await;
            Ok(())
        });
        rig.tasks.spawn("relay down", async move {
            stopped.run_until_cancelled(down.forward_down()).await;
            Ok(())
        });
        relay
    }

    /// Opens with these generations, seals with this one.
    pub(super) fn load(&self, loaded: &[u32], sealing: u32) {
        let mut state = self.state.lock();
        state.loaded = loaded.iter().copied().collect();
        state.sealing = sealing;
    }

    /// Generations of the frames that have come down.
    pub(super) fn seen(&self) -> HashSet<u32> {
        self.state.lock().seen.clone()
    }

    /// Clients' datagrams, up and down. Those that were lost on the way to the client count.
    pub(super) fn traffic(&self) -> (Traffic, Traffic) {
        self.state.lock().traffic
    }

    /// Datagrams that came for addresses no client of this relay has.
    pub(super) fn strangers(&self) -> u64 {
        self.state.lock().strangers
    }

    /// Delivers nothing to clients any more, nor, if it is `deaf`, to the worker.
    pub(super) fn fall_silent(&self, deaf: bool) {
        let mut state = self.state.lock();
        state.mute = true;
        state.deaf = deaf;
    }

    /// Destination connection ID of a client's last datagram, which had a short header.
    pub(super) fn last_cid(&self) -> Vec<u8> {
        self.state.lock().last_up[1..18].to_vec()
    }

    /// A frame as this relay seals it.
    pub(super) fn frame(&self, client: SocketAddr, datagram: &[u8]) -> Vec<u8> {
        self.frame_at(client, datagram, SystemTime::now())
    }

    pub(super) fn frame_at(&self, client: SocketAddr, datagram: &[u8], at: SystemTime) -> Vec<u8> {
        let sealing = self.state.lock().sealing;
        let header = Header {
            direction: Direction::Up,
            key_slot: KeySlot::of(generation(sealing)),
            hop_limit: tunnel::INITIAL_HOP_LIMIT,
            ecn: Ecn::NotEct,
            client: ClientAddr::from(client),
            relay: self.number,
            time: tunnel::coarse_time(at.duration_since(UNIX_EPOCH).unwrap().as_secs()),
        };
        let mut frame = vec![0; HEADER_LEN];
        frame.extend_from_slice(datagram);
        header.seal_frame(&tunnel_keys(&self.root, self.number, sealing).up, &mut frame).unwrap();
        frame
    }

    /// Sends a sealed frame to the worker; says whether the system took it.
    pub(super) fn try_send(&self, frame: &[u8]) -> bool {
        self.sockets.1.try_send_to(frame, self.worker).is_ok()
    }

    /// Sends a datagram to the worker as if it had come from that client.
    pub(super) async fn send_as(&self, client: SocketAddr, datagram: &[u8]) {
        self.sockets.1.send_to(&self.frame(client, datagram), self.worker).await.unwrap();
    }

    async fn forward_up(&self) {
        let mut buffer = vec![0; 2048];
        loop {
            let Ok((length, client)) = self.sockets.0.recv_from(&mut buffer).await else { continue };
            {
                let mut state = self.state.lock();
                if state.deaf {
                    continue;
                }
                state.traffic.0.count(length);
                state.known.insert(client);
                state.last_up = buffer[..length].to_vec();
            }
            self.send_as(client, &buffer[..length]).await;
        }
    }

    async fn forward_down(&self) {
        let mut buffer = vec![0; 2048];
        loop {
            let Ok((length, _)) = self.sockets.1.recv_from(&mut buffer).await else { continue };
            let frame = &buffer[..length];
            let header = Header::parse(frame).unwrap();
            let loaded = self.state.lock().loaded.clone();
            let of = loaded.into_iter().find(|n| KeySlot::of(generation(*n)) == header.key_slot);
            let of = of.expect("the worker seals with what the relay has loaded");
            let key = tunnel_keys(&self.root, self.number, of).down;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
            let (header, datagram) = tunnel::open(frame, &key, Direction::Down, now, tunnel::MAX_SKEW).unwrap();
            {
                let mut state = self.state.lock();
                state.seen.insert(of);
                state.traffic.1.count(datagram.len());
                state.strangers += u64::from(!state.known.contains(&header.client.to_socket_addr()));
                if state.mute {
                    continue;
                }
            }
            // A client that is gone is no error of the relay's.
            let _ = self.sockets.0.send_to(datagram, header.client.to_socket_addr()).await;
        }
    }
}
