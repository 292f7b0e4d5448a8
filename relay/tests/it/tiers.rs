//! Two tiers of relays as processes of their own: callers in the west, a worker in the east that only the relays of the
//! east reach.

use std::{
    collections::HashMap,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use antiphon_core::{
    id::RelayNumber,
    tunnel::{ClientAddr, Direction, HEADER_LEN, Header, KeySlot, Notice, coarse_time},
};
use antiphon_proto::v1;

use crate::{
    fixture::{DEADLINE, Worker, generation, loopback, root, short, unix_seconds},
    router::{Fixture, Registered, fixture_in, start},
};

const WEST: u16 = 1;
const EAST: u16 = 2;

fn number(region: u16, index: u16) -> RelayNumber {
    RelayNumber::new(region << 6 | index).unwrap()
}

/// A port that was free a moment ago.
fn free() -> String {
    loopback("127.0.0.1:0").local_addr().unwrap().to_string()
}

/// One relay's place: its arguments name fixed ports and a directory, so that a successor takes it over.
struct Place {
    fixture: Fixture,
    number: RelayNumber,
    public: SocketAddr,
    tunnel: SocketAddr,
    _state: tempfile::TempDir,
}

impl Place {
    async fn new(region: &str, number: RelayNumber) -> Self {
        let (public, tunnel, state) = (free(), free(), tempfile::tempdir().unwrap());
        let dir = state.path().join("state");
        let dir = dir.to_str().unwrap();
        let name = format!("relay-{}", number.index());
        let line = ["--public", &public, "--tunnel", &tunnel, "--state", dir, "--drain-deadline", "20s"];
        let fixture = fixture_in(region, &name, &line).await;
        Self { fixture, number, public: public.parse().unwrap(), tunnel: tunnel.parse().unwrap(), _state: state }
    }

    async fn welcomed(&mut self) -> Registered {
        let mut router = self.fixture.registered().await;
        router.hello().await;
        router.welcome_as(self.number, &[1], 1).await;
        router
    }

    /// As the routers of its region's callers name it.
    fn neighbour(&self, hop_keys_with: Option<RelayNumber>) -> v1::RelayNeighbour {
        let hop = |with: RelayNumber| {
            let keys = root().relay_secret(self.number, generation()).hop_keys(with);
            v1::HopKeys {
                generation: generation().value(),
                up: keys.up.as_bytes().to_vec().into(),
                down: keys.down.as_bytes().to_vec().into(),
            }
        };
        v1::RelayNeighbour {
            number: self.number.value().into(),
            tunnel_address: self.tunnel.to_string(),
            keys: hop_keys_with.map(hop).into_iter().collect(),
        }
    }
}

/// Relay A in the west, B and C in the east.
struct Tiers {
    a: Place,
    b: Place,
    c: Place,
    worker: Worker,
}

impl Tiers {
    async fn new() -> Self {
        Self {
            a: Place::new("west", number(WEST, 1)).await,
            b: Place::new("east", number(EAST, 0)).await,
            c: Place::new("east", number(EAST, 1)).await,
            worker: Worker::new(u64::from(EAST) << 54 | 0xbeef),
        }
    }

    /// Tells all three what their routers know. Each has to be running.
    async fn introduce(&mut self) -> Vec<Registered> {
        let mut routers = Vec::new();
        let mut router = self.a.welcomed().await;
        router.neighbours(vec![self.b.neighbour(None), self.c.neighbour(None)]).await;
        let relays = vec![self.b.number.value().into(), self.c.number.value().into()];
        let region = v1::RegionRoute { region_number: EAST.into(), relays };
        let update = v1::RouteUpdate { version: 1, full: true, region_upserts: vec![region], ..Default::default() };
        router.update(update).await;
        router.report(|r| r.table_version == 1).await;
        self.a.fixture.eventually_http("/metrics", "antiphon_relay_regions 1\n").await;
        self.a.fixture.eventually_http("/metrics", "antiphon_relay_state_version 1\n").await;
        routers.push(router);
        for place in [&mut self.b, &mut self.c] {
            let mut router = place.welcomed().await;
            router.neighbours(vec![self.a.neighbour(Some(place.number))]).await;
            router.routes(1, true, &[&self.worker]).await;
            router.report(|r| r.routes == 1).await;
            place.fixture.eventually_http("/metrics", "antiphon_relay_neighbours 1\n").await;
            place.fixture.eventually_http("/metrics", "antiphon_relay_state_version 1\n").await;
            routers.push(router);
        }
        routers
    }

    fn relay_at(&self, tunnel: SocketAddr) -> RelayNumber {
        let all = [&self.a, &self.b, &self.c];
        all.into_iter().find(|p| p.tunnel == tunnel).map(|p| p.number).expect("a frame of a known relay")
    }
}

/// The worker answers every frame with its number, through whoever brought it.
struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<HashMap<RelayNumber, usize>>>,
}

impl Echo {
    fn start(tiers: &Tiers) -> Self {
        let mut worker = Worker::new(tiers.worker.server_id.to_u64());
        worker.socket = tiers.worker.socket.try_clone().unwrap();
        let relays: HashMap<_, _> = [&tiers.b, &tiers.c].map(|p| (p.tunnel, p.number)).into();
        let (stop, ingress) = (Arc::new(AtomicBool::new(false)), tiers.a.number);
        let stopped = stop.clone();
        let answer = move || {
            let mut through = HashMap::new();
            while !stopped.load(Ordering::Relaxed) {
                let mut peeked = [0; 1];
                let Ok((_, from)) = worker.socket.peek_from(&mut peeked) else { continue };
                let frame = worker.frame_of(relays[&from]);
                assert_eq!(frame.header.relay, ingress, "the caller's relay");
                if frame.header.client != ClientAddr::RELAY {
                    *through.entry(relays[&from]).or_insert(0) += 1;
                    worker.answer(&frame, relays[&from], &frame.datagram[18..]);
                }
            }
            through
        };
        tiers.worker.socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        Self { stop, thread: Some(thread::spawn(answer)) }
    }

    fn end(mut self) -> HashMap<RelayNumber, usize> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// Sends until an answer to one of these very packets comes.
fn talk(client: &UdpSocket, relay: SocketAddr, packet: &[u8]) {
    let deadline = Instant::now() + DEADLINE;
    client.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut buffer = [0; 2048];
    loop {
        // A relay that is gone makes the system refuse.
        let _ = client.send_to(packet, relay);
        if let Ok(len) = client.recv(&mut buffer)
            && buffer[..len] == packet[18..]
        {
            return;
        }
        assert!(Instant::now() < deadline, "the call does not come back");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_through_two_tiers_outlives_every_relay_in_turn() {
    let mut tiers = Tiers::new().await;
    let mut a = tiers.a.fixture.spawn();
    let mut b = tiers.b.fixture.spawn();
    let mut c = tiers.c.fixture.spawn();
    let routers = tiers.introduce().await;
    // From here on no router answers anybody.
    drop(routers);
    let echo = Echo::start(&tiers);
    let (client, relay) = (loopback("127.0.0.1:0"), tiers.a.public);
    let cid = tiers.worker.live_cid();
    let packet = |fill| short(&cid, 120, fill);
    talk(&client, relay, &packet(1));

    b.kill();
    talk(&client, relay, &packet(2));
    let _b = tiers.b.fixture.spawn();
    tiers.b.fixture.eventually_admin().await;
    c.kill();
    talk(&client, relay, &packet(3));
    let _c = tiers.c.fixture.spawn();
    a.kill();
    let _a = tiers.a.fixture.spawn();
    talk(&client, relay, &packet(4));
    let through = echo.end();
    assert_eq!(through.len(), 2, "both relays of the east were used: {through:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_and_looping_frames_between_relays_go_nowhere() {
    let mut tiers = Tiers::new().await;
    let (_a, _b, _c) = (tiers.a.fixture.spawn(), tiers.b.fixture.spawn(), tiers.c.fixture.spawn());
    let _routers = tiers.introduce().await;
    let cid = tiers.worker.live_cid();
    let client = loopback("127.0.0.1:0");
    let seal = |hop_limit, relay: RelayNumber, packet: &[u8]| {
        let header = Header {
            direction: Direction::Up,
            key_slot: KeySlot::of(generation()),
            hop_limit,
            ecn: antiphon_core::tunnel::Ecn::NotEct,
            client: client.local_addr().unwrap().into(),
            relay,
            time: coarse_time(unix_seconds()),
        };
        let mut frame = [&[0; HEADER_LEN][..], packet].concat();
        let keys = root().relay_secret(tiers.a.number, generation()).hop_keys(tiers.b.number);
        header.seal_frame(&keys.up, &mut frame).unwrap();
        frame
    };
    let dropped = |reason| format!("antiphon_relay_dropped_packets_total{{reason=\"{reason}\"}} 1\n");
    // With the right key and number, but from elsewhere.
    let forger = loopback("127.0.0.1:0");
    forger.send_to(&seal(4, tiers.a.number, &short(&cid, 100, 1)), tiers.b.tunnel).unwrap();
    tiers.b.fixture.eventually_http("/metrics", &dropped("foreign_source")).await;

    // From where relay A was, its tunnel port taken over: genuine frames that have gone too far or astray.
    drop(_a);
    let socket = loopback(&tiers.a.tunnel.to_string());
    let mut astray = Worker::new(u64::from(WEST) << 54 | 1);
    for (frame, reason) in [
        (seal(1, tiers.a.number, &short(&cid, 100, 1)), "frame_hop_limit"),
        (seal(4, tiers.a.number, &short(&astray.live_cid(), 100, 1)), "frame_region"),
        (seal(4, tiers.c.number, &short(&cid, 100, 1)), "frame_relay"),
    ] {
        socket.send_to(&frame, tiers.b.tunnel).unwrap();
        tiers.b.fixture.eventually_http("/metrics", &dropped(reason)).await;
    }
    let genuine = seal(2, tiers.a.number, &short(&cid, 100, 9));
    socket.send_to(&genuine, tiers.b.tunnel).unwrap();
    let frame = tiers.worker.frame_of(tiers.b.number);
    assert_eq!((frame.datagram[99], frame.header.hop_limit), (9, 1), "the first that goes on");
    assert_eq!(tiers.relay_at(frame.from), tiers.b.number);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planned_stops_are_told_over_both_tiers() {
    let mut tiers = Tiers::new().await;
    let places = [&tiers.a, &tiers.b, &tiers.c];
    let [a, b, c] = places.map(|place| start(place.fixture.args.clone()));
    let _routers = tiers.introduce().await;
    let (client, relay) = (loopback("127.0.0.1:0"), tiers.a.public);
    let cid = tiers.worker.live_cid();
    client.send_to(&short(&cid, 100, 1), relay).unwrap();
    let first = tiers.relay_at(tiers.worker.frame_of_any(&[tiers.b.number, tiers.c.number]).from);
    let (in_use, other) = if first == tiers.b.number { (b, c) } else { (c, b) };

    // The relay of the east that A uses is about to stop: A moves on, and loses nothing to find out.
    in_use.stop.notify_one();
    tiers.a.fixture.eventually_moved(&client, relay, &short(&cid, 100, 2)).await;
    // The caller's own relay is about to stop: the worker hears it through the one that is left.
    a.stop.notify_one();
    let notice = loop {
        let frame = tiers.worker.frame_of_any(&[tiers.b.number, tiers.c.number]);
        if frame.header.client == ClientAddr::RELAY && frame.header.relay == tiers.a.number {
            break frame;
        }
    };
    assert!(matches!(Notice::from_bytes(&notice.datagram), Some(Notice::Draining { .. })));
    drop((in_use, other, a));
}

impl Fixture {
    /// Sends until traffic has moved to another relay of the east.
    async fn eventually_moved(&self, client: &UdpSocket, relay: SocketAddr, packet: &[u8]) {
        let waiting = async {
            while !self.http("/metrics").await.contains("antiphon_relay_neighbour_switches_total 1\n") {
                client.send_to(packet, relay).unwrap();
            }
        };
        tokio::time::timeout(DEADLINE, waiting).await.expect("traffic moves in time");
    }
}
