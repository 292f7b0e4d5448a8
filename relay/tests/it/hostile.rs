//! What strangers can make a relay send: never more than they sent.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Instant,
};

use antiphon_core::{
    cid::SessionCid,
    id::ServerId,
    tunnel::{ClientAddr, Direction, Ecn, HEADER_LEN, coarse_time},
};
use antiphon_relay::{
    forward::DropReason,
    limits::Limits,
    metrics::Way,
    reset::{MIN_RESET, ResetKey, TOKEN},
    routing::{DeadServer, RouteChange},
    socket::{MESSAGE_BYTES, Port, ecn_of},
};
use quinn::udp::{BATCH_SIZE, RecvMeta};

use crate::fixture::{Relay, Worker, eventually, generation, initial, loopback, root, short, unix_seconds};

const DEAD: u64 = 0x0000_0077_0000_0001;

fn dead_key() -> [u8; 32] {
    root().reset_key(ServerId::from_u64(DEAD), generation())
}

/// A relay with one live worker, and one that is proven dead.
fn bereaved(worker: &Worker) -> Relay {
    let mut relay = Relay::with(worker);
    let dead = DeadServer { server_id: ServerId::from_u64(DEAD), keys: vec![(generation(), dead_key())] };
    relay.change(RouteChange { dead: vec![dead], ..RouteChange::default() });
    relay
}

/// Everything that has come back by now.
fn drain(socket: &UdpSocket) -> Vec<Vec<u8>> {
    socket.set_nonblocking(true).unwrap();
    let mut buffer = [0; 4096];
    let all = std::iter::from_fn(|| socket.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec())).collect();
    socket.set_nonblocking(false).unwrap();
    all
}

/// Each kind of datagram that a stranger can send to either port, and why it goes nowhere.
fn strangers_messages(worker: &mut Worker) -> Vec<(&'static str, bool, Vec<u8>, DropReason)> {
    let mut dead = Worker::new(DEAD);
    let mut predecessor = Worker::new(worker.server_id.to_u64() ^ 1);
    let mut nobody = Worker::new(0x00ff_0000_0000_0000);
    let (now, live, gone) = (unix_seconds(), worker.live_cid(), dead.live_cid());
    let long = |first: u8, cid: &SessionCid, len| {
        let mut packet = initial(cid, len);
        packet[0] = first;
        packet
    };
    let mut version_2 = initial(&live, 1200);
    version_2[4] = 2;
    let mut negotiation = initial(&live, 1200);
    negotiation[1..5].fill(0);
    let client: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let up = |h: &mut antiphon_core::tunnel::Header| h.direction = Direction::Up;
    let notice = |h: &mut antiphon_core::tunnel::Header| {
        h.direction = Direction::Up;
        h.client = ClientAddr::RELAY;
    };
    use DropReason as R;
    vec![
        ("nothing", true, vec![], R::TooShort),
        ("one byte", true, vec![0x40], R::TooShort),
        ("a short header too short", true, short(&live, 37, 0), R::TooShort),
        ("a datagram too long", true, short(&live, 2017, 0), R::TooLong),
        ("version 2", true, version_2, R::QuicVersion),
        ("version negotiation", true, negotiation, R::QuicVersion),
        ("an unknown version", true, vec![0xff; 1200], R::QuicVersion),
        ("a small Initial", true, initial(&live, 1199), R::InitialSize),
        ("an expired Initial", true, initial(&worker.first_cid(now - 5), 1200), R::InitialExpired),
        ("an Initial of the dead", true, initial(&gone, 1200), R::DeadServer),
        ("0-RTT with a first ID", true, long(0xd0, &worker.first_cid(now + 60), 1200), R::InitialMisused),
        ("Handshake of the dead", true, long(0xe0, &gone, 100), R::DeadServer),
        ("Retry of the dead", true, long(0xf0, &gone, 100), R::DeadServer),
        ("short of nobody", true, short(&nobody.live_cid(), 100, 0), R::UnknownServer),
        ("short of a predecessor", true, short(&predecessor.live_cid(), 100, 0), R::DeadIncarnation),
        ("short of no configuration", true, vec![0x7f; 100], R::CidConfig),
        ("shortest of the dead", true, short(&gone, 38, 0), R::DeadServer),
        ("short of the dead", true, short(&gone, 43, 0), R::DeadServer),
        ("voice of the dead", true, short(&gone, 160, 0), R::DeadServer),
        ("long voice of the dead", true, short(&gone, 1200, 0), R::DeadServer),
        ("a worker's frame", false, worker.sealed(client, b"datagram"), R::ForeignSource),
        ("a relay's frame", false, worker.sealed_with(&short(&live, 100, 0), up), R::ForeignSource),
        ("a notice", false, worker.sealed_with(&[1, 0, 9], notice), R::ForeignSource),
        ("garbage at the tunnel", false, vec![0x55; 1400], R::ForeignSource),
        ("nothing at the tunnel", false, vec![], R::ForeignSource),
    ]
}

#[test]
fn nothing_makes_a_relay_send_more_than_it_got_to_who_has_not_proved_himself() {
    let mut worker = Worker::new(1);
    let relay = bereaved(&worker);
    let mut answered = Vec::new();
    for (what, public, message, reason) in strangers_messages(&mut worker) {
        let stranger = loopback("127.0.0.1:0");
        let before = relay.metrics.dropped(reason);
        let to = if public { relay.public() } else { relay.path.tunnel() };
        stranger.send_to(&message, to).unwrap();
        eventually(what, || relay.metrics.dropped(reason) == before + 1);
        // The count is made known after everything of the batch was sent.
        let answers = drain(&stranger);
        let bytes: usize = answers.iter().map(Vec::len).sum();
        assert!(answers.len() <= 1 && bytes < message.len().max(1), "{what}: {bytes} for {}", message.len());
        if !answers.is_empty() {
            answered.push(what);
        }
    }
    let expected = ["shortest of the dead", "short of the dead", "voice of the dead", "long voice of the dead"];
    assert_eq!(answered, expected);
    assert_eq!(relay.metrics.resets(), 4);
    assert_eq!((relay.metrics.forwarded(Way::Up), relay.metrics.forwarded(Way::Down)), (0, 0));
    worker.socket.set_nonblocking(true).unwrap();
    assert!(worker.socket.recv(&mut [0; 64]).is_err(), "and no worker hears of it");
}

#[test]
fn clients_of_the_dead_hear_it_from_a_genuine_reset() {
    let worker = Worker::new(1);
    let relay = bereaved(&worker);
    let client = loopback("127.0.0.1:0");
    let cid = Worker::new(DEAD).live_cid();
    client.send_to(&short(&cid, 160, 0), relay.public()).unwrap();
    let mut reset = [0; 2048];
    let (len, from) = client.recv_from(&mut reset).unwrap();
    assert_eq!(from, relay.public());
    assert!((MIN_RESET..160).contains(&len) && reset[0] & 0xc0 == 0x40);
    assert_eq!(reset[len - TOKEN..len], ResetKey::new(&dead_key()).token(cid.as_bytes()));
}

#[test]
fn resets_are_bounded_in_rate() {
    let worker = Worker::new(1);
    let relay = bereaved(&worker);
    let client = loopback("127.0.0.1:0");
    let packet = short(&Worker::new(DEAD).live_cid(), 100, 0);
    let (began, sent) = (Instant::now(), 8000);
    for n in 1..=sent {
        client.send_to(&packet, relay.public()).unwrap();
        if n % 50 == 0 {
            eventually("all judged", || relay.metrics.dropped(DropReason::DeadServer) == n);
            drain(&client);
        }
    }
    // One thread judges one client: a second's worth at once, and then its rate, whatever the machine's pace.
    let bound = 1000 + 1000 * (began.elapsed().as_secs() + 1);
    assert!((1000..=bound.min(sent)).contains(&relay.metrics.resets()), "{}", relay.metrics.resets());
}

#[test]
fn one_connection_id_is_bounded_and_costs_others_nothing() {
    let mut worker = Worker::new(1);
    let rate = |rate: u16| rate.try_into().unwrap();
    let limits = Limits { cid_rate: rate(200), initial_rate: rate(5), ..Limits::default() };
    let [mut relay, mut other] = [(); 2].map(|()| Relay::start_within("127.0.0.1:0", "127.0.0.1:0", 1, limits));
    relay.route(&[(&worker, worker.address())]);
    other.route(&[(&worker, worker.address())]);
    let (client, spoofer) = (loopback("127.0.0.1:0"), loopback("127.0.0.1:0"));
    let (flooded, caller) = (worker.live_cid(), worker.live_cid());
    worker.socket.set_nonblocking(true).unwrap();
    let (mut callers, mut buffer) = (0, [0; 4096]);
    let mut hear = |worker: &Worker| {
        while let Ok(len) = worker.socket.recv(&mut buffer) {
            callers += usize::from(buffer[len - 1] == 0xcc);
        }
        callers
    };
    let judged = |relay: &Relay| relay.metrics.forwarded(Way::Up) + relay.metrics.dropped(DropReason::CidRate);
    // One who knows both connection IDs floods: the one here, the caller's through another relay.
    for round in 1..=200 {
        for _ in 0..50 {
            spoofer.send_to(&short(&flooded, 60, 1), relay.public()).unwrap();
            spoofer.send_to(&short(&caller, 60, 1), other.public()).unwrap();
        }
        if round % 10 == 0 {
            client.send_to(&short(&caller, 160, 0xcc), relay.public()).unwrap();
        }
        // At the sockets' pace: what they would lose proves nothing.
        eventually("all judged", || judged(&relay) == round * 50 + round / 10 && judged(&other) == round * 50);
        hear(&worker);
    }
    eventually("every packet of the caller", || hear(&worker) == 20);
    for relay in [&relay, &other] {
        assert!(relay.metrics.dropped(DropReason::CidRate) > 0);
    }
    // Initials of one connection ID are bounded more tightly.
    let first = worker.first_cid(unix_seconds() + 60);
    let (before, cut) = (judged(&relay), relay.metrics.dropped(DropReason::CidRate));
    for n in 1..=100 {
        client.send_to(&initial(&first, 1200), relay.public()).unwrap();
        eventually("judged", || judged(&relay) == before + n);
    }
    assert!(relay.metrics.dropped(DropReason::CidRate) > cut);
}

#[test]
fn a_clock_that_is_off_is_told_by_how_much() {
    let worker = Worker::new(1);
    let relay = Relay::with(&worker);
    let stale = worker.sealed_with(b"datagram", |h| {
        h.client = "127.0.0.1:9".parse::<SocketAddr>().unwrap().into();
        h.time = coarse_time(unix_seconds() - 121);
    });
    worker.socket.send_to(&stale, relay.path.tunnel()).unwrap();
    eventually("the skew", || (-123..=-121).contains(&relay.metrics.skew(Way::Down)));
    assert_eq!(relay.metrics.dropped(DropReason::FrameStale), 1);
    // Whoever cannot seal cannot claim it.
    let forged = [&stale[..HEADER_LEN - 1], &[0, 0, 0]].concat();
    worker.socket.send_to(&forged, relay.path.tunnel()).unwrap();
    eventually("the forged one", || relay.metrics.dropped(DropReason::FrameTag) == 1);
    assert!((-123..=-121).contains(&relay.metrics.skew(Way::Down)));
}

/// Marks as they are on the wire of IPv6, and of IPv4 through sockets of both families.
#[test]
fn congestion_marks_travel_in_both_families() {
    for (worker_at, client_at) in [("[::1]:0", "[::1]:0"), ("127.0.0.1:0", "127.0.0.1:0"), ("[::1]:0", "127.0.0.1:0")] {
        let mut worker = Worker::at(1, worker_at);
        let mut relay = Relay::start("[::]:0", "[::]:0", 1);
        relay.route(&[(&worker, worker.address())]);
        let client = loopback(client_at);
        let here = |port| SocketAddr::new(client.local_addr().unwrap().ip(), port);
        let set = |socket: &UdpSocket, mark: Ecn| {
            let socket_ref = socket2::SockRef::from(socket);
            match socket.local_addr().unwrap() {
                SocketAddr::V4(_) => socket_ref.set_tos_v4(mark.bits().into()).unwrap(),
                SocketAddr::V6(_) => socket_ref.set_tclass_v6(mark.bits().into()).unwrap(),
            }
        };
        let packet = short(&worker.live_cid(), 100, 0);
        let mut tunnel = None;
        for mark in [Ecn::NotEct, Ecn::Ect1, Ecn::Ect0, Ecn::Ce] {
            set(&client, mark);
            client.send_to(&packet, here(relay.public().port())).unwrap();
            let frame = worker.frame();
            assert_eq!(frame.header.ecn, mark, "{worker_at} {client_at}");
            tunnel = Some(frame.from);
        }
        let to = client.local_addr().unwrap();
        let port = Port::new(client).unwrap();
        let (mut memory, mut meta) = (vec![0; BATCH_SIZE * MESSAGE_BYTES], [RecvMeta::default(); BATCH_SIZE]);
        for (inner, outer, expected) in [(Ecn::Ect0, Ecn::Ect0, Ecn::Ect0), (Ecn::Ect1, Ecn::Ce, Ecn::Ce)] {
            let frame = worker.sealed_with(b"answer", |h| {
                h.client = to.into();
                h.ecn = inner;
            });
            set(&worker.socket, outer);
            worker.socket.send_to(&frame, tunnel.unwrap()).unwrap();
            eventually("answer", || port.receive(&mut memory, &mut meta).is_ok());
            assert_eq!(ecn_of(&meta[0]), expected, "{worker_at} {client_at} {inner:?} {outer:?}");
        }
    }
}

/// The mark on the tunnel's own leg: a worker whose leg is congested learns it as the client would.
#[test]
fn frames_to_workers_carry_the_mark_outside_too() {
    for at in ["127.0.0.1:0", "[::1]:0"] {
        let mut worker = Worker::at(1, at);
        let mut relay = Relay::start("[::]:0", "[::]:0", 1);
        relay.route(&[(&worker, worker.address())]);
        let client = loopback("127.0.0.1:0");
        let to: SocketAddr = ([127, 0, 0, 1], relay.public().port()).into();
        let packet = short(&worker.live_cid(), 100, 0);
        let port = Port::new(worker.socket.try_clone().unwrap()).unwrap();
        let (mut memory, mut meta) = (vec![0; BATCH_SIZE * MESSAGE_BYTES], [RecvMeta::default(); BATCH_SIZE]);
        for mark in [Ecn::Ect0, Ecn::Ce] {
            socket2::SockRef::from(&client).set_tos_v4(mark.bits().into()).unwrap();
            client.send_to(&packet, to).unwrap();
            eventually("frame", || port.receive(&mut memory, &mut meta).is_ok());
            assert_eq!(ecn_of(&meta[0]), mark, "{at}");
        }
    }
}
