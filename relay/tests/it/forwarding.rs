//! The data path on loopback sockets.

use std::{collections::HashMap, net::SocketAddr};

use antiphon_core::{
    cid::SessionCid,
    id::{KeyGeneration, RelayNumber},
    tunnel::{ClientAddr, Direction, Ecn, Header, KeySlot, Notice, coarse_time},
};
use antiphon_relay::{
    forward::DropReason,
    metrics::Way,
    socket::{MESSAGE_BYTES, Port, ecn_of},
};
use quinn::udp::{BATCH_SIZE, RecvMeta};

use crate::fixture::{Relay, Worker, eventually, generation, initial, loopback, relay_number, short, unix_seconds};

#[test]
fn datagrams_reach_the_worker_and_answers_the_client() {
    let mut worker = Worker::new(1);
    let relay = Relay::with(&worker);
    let client = loopback("127.0.0.1:0");
    let packets = [
        initial(&worker.first_cid(unix_seconds() + 60), 1200),
        initial(&worker.live_cid(), 1232),
        short(&worker.live_cid(), 160, 0x22),
    ];
    for packet in packets {
        client.send_to(&packet, relay.public()).unwrap();
        let frame = worker.frame();
        assert_eq!(frame.datagram, packet);
        assert_eq!(frame.header.client.to_socket_addr(), client.local_addr().unwrap());
        assert_eq!(frame.header.relay, relay_number());
        assert_eq!(frame.from, relay.path.tunnel());

        let answer = vec![0x33; packet.len() - 5];
        let sealed = worker.sealed(client.local_addr().unwrap(), &answer);
        worker.socket.send_to(&sealed, relay.path.tunnel()).unwrap();
        let mut received = [0; 2048];
        let (len, from) = client.recv_from(&mut received).unwrap();
        assert_eq!((&received[..len], from), (&answer[..], relay.public()));
    }
    eventually("both ways counted", || {
        relay.metrics.forwarded(Way::Up) == 3 && relay.metrics.forwarded(Way::Down) == 3
    });
}

/// Each client's answers come back to it, whichever thread forwards them.
#[test]
fn many_clients_are_kept_apart() {
    let mut worker = Worker::new(1);
    let relay = Relay::with(&worker);
    let clients: Vec<_> = (0..64).map(|_| loopback("127.0.0.1:0")).collect();
    let cid = worker.live_cid();
    for (n, client) in (0..).zip(&clients) {
        client.send_to(&short(&cid, 100 + usize::from(n % 3), n), relay.public()).unwrap();
    }
    let mut seen = HashMap::new();
    for _ in &clients {
        let frame = worker.frame();
        let from = frame.header.client.to_socket_addr();
        let answer = [&frame.datagram[18..], b"answer"].concat();
        worker.socket.send_to(&worker.sealed(from, &answer), relay.path.tunnel()).unwrap();
        assert!(seen.insert(from, frame.datagram[18]).is_none());
    }
    for (n, client) in (0..).zip(&clients) {
        let mut received = [0; 2048];
        let len = client.recv(&mut received).unwrap();
        assert_eq!(received[0], n);
        assert_eq!(&received[len - 6..len], b"answer");
        assert_eq!(seen[&client.local_addr().unwrap()], n);
    }
}

#[test]
fn a_socket_of_both_families_serves_both() {
    let mut workers = [Worker::new(1), Worker::at(2, "[::1]:0")];
    let mut relay = Relay::start("[::]:0", "[::]:0", 1);
    let routes: Vec<_> = workers.iter().map(|w| (w, w.address())).collect();
    relay.route(&routes);
    let port = relay.public().port();
    for (ip, worker) in [("127.0.0.1", 0), ("127.0.0.1", 1), ("[::1]", 0)] {
        let worker = &mut workers[worker];
        let client = loopback(&format!("{ip}:0"));
        let packet = short(&worker.live_cid(), 90, 1);
        let public: SocketAddr = format!("{ip}:{port}").parse().unwrap();
        client.send_to(&packet, public).unwrap();
        let frame = worker.frame();
        assert_eq!(frame.header.client.to_socket_addr(), client.local_addr().unwrap());
        let answer = worker.sealed(client.local_addr().unwrap(), b"answer");
        worker.socket.send_to(&answer, frame.from).unwrap();
        let mut received = [0; 64];
        assert_eq!(client.recv_from(&mut received).unwrap(), (6, public));
    }
}

/// Every kind of bad datagram from clients is dropped under its own reason, and none goes on.
#[test]
fn bad_datagrams_are_counted_and_go_nowhere() {
    let mut worker = Worker::new(0x0000_0001_0000_0005);
    let mut dead = Worker::new(0x0000_0001_0000_0004);
    let mut stranger = Worker::new(0x00ff_0001_0000_0004);
    let relay = Relay::with(&worker);
    let client = loopback("127.0.0.1:0");
    let (now, live) = (unix_seconds(), worker.live_cid());
    let mut forged = *live.as_bytes();
    forged[9] ^= 0x10;
    let mut version_2 = initial(&live, 1200);
    version_2[4] = 2;
    for (packet, reason) in [
        (b"garbage".to_vec(), DropReason::TooShort),
        (short(&live, 37, 0), DropReason::TooShort),
        (initial(&live, 1200)[..20].to_vec(), DropReason::TooShort),
        (short(&live, 2017, 0), DropReason::TooLong),
        (version_2, DropReason::QuicVersion),
        (initial(&live, 1199), DropReason::InitialSize),
        (vec![0xff; 1200], DropReason::QuicVersion),
        (vec![0x7f; 100], DropReason::CidConfig),
        (short(&SessionCid::from_bytes(forged), 100, 0), DropReason::UnknownServer),
        (short(&stranger.live_cid(), 100, 0), DropReason::UnknownServer),
        (short(&dead.live_cid(), 100, 0), DropReason::DeadIncarnation),
        (initial(&worker.first_cid(now - 5), 1200), DropReason::InitialExpired),
        (initial(&worker.first_cid(now + 700), 1200), DropReason::InitialExpired),
        (short(&worker.first_cid(now + 60), 100, 0), DropReason::InitialMisused),
    ] {
        let before = relay.metrics.dropped(reason);
        client.send_to(&packet, relay.public()).unwrap();
        eventually(reason.label(), || relay.metrics.dropped(reason) == before + 1);
    }
    let genuine = short(&live, 100, 0xaa);
    client.send_to(&genuine, relay.public()).unwrap();
    assert_eq!(worker.frame().datagram, genuine, "the first that goes on");
    eventually("one forwarded", || relay.metrics.forwarded(Way::Up) == 1);
}

/// The same for frames: whoever is not the route's worker, with its key and the right time, reaches no client.
#[test]
fn bad_frames_are_counted_and_go_nowhere() {
    let worker = Worker::new(1);
    let other = Worker::new(2);
    let mut relay = Relay::start("127.0.0.1:0", "127.0.0.1:0", 1);
    relay.route(&[(&worker, worker.address()), (&other, other.address())]);
    let client = loopback("127.0.0.1:0");
    let to = client.local_addr().unwrap();
    let foreign = loopback("127.0.0.1:0");
    let with = |change: fn(&mut Header)| {
        worker.sealed_with(b"datagram", |header| {
            header.client = to.into();
            change(header);
        })
    };
    let good = worker.sealed(to, b"datagram");
    let mut tampered = good.clone();
    tampered[40 - 1] ^= 1;
    let next_generation = || KeySlot::of(KeyGeneration::new(generation().value() + 1).unwrap());
    assert_ne!(next_generation(), KeySlot::of(generation()));
    for (socket, frame, reason) in [
        (&foreign, good.clone(), DropReason::ForeignSource),
        (&other.socket, good.clone(), DropReason::FrameTag),
        (&worker.socket, tampered, DropReason::FrameTag),
        (&worker.socket, good[..30].to_vec(), DropReason::FrameMalformed),
        (&worker.socket, vec![0xff; 200], DropReason::FrameMalformed),
        (&worker.socket, with(|h| h.direction = Direction::Up), DropReason::FrameMalformed),
        (&worker.socket, with(|h| h.time = coarse_time(unix_seconds() - 60)), DropReason::FrameStale),
        (&worker.socket, with(|h| h.hop_limit = 0), DropReason::FrameHopLimit),
        (&worker.socket, with(|h| h.relay = RelayNumber::new(1).unwrap()), DropReason::FrameRelay),
        (&worker.socket, with(|h| h.client.port = 0), DropReason::ClientAddress),
        (
            &worker.socket,
            worker.sealed_with(b"datagram", |h| {
                h.client = to.into();
                h.key_slot = next_generation();
            }),
            DropReason::FrameKey,
        ),
    ] {
        let before = relay.metrics.dropped(reason);
        socket.send_to(&frame, relay.path.tunnel()).unwrap();
        eventually(reason.label(), || relay.metrics.dropped(reason) == before + 1);
    }
    let genuine = worker.sealed(to, b"genuine");
    worker.socket.send_to(&genuine, relay.path.tunnel()).unwrap();
    let mut received = [0; 64];
    let len = client.recv(&mut received).unwrap();
    assert_eq!(&received[..len], b"genuine", "the first that goes on");
    assert_eq!(relay.metrics.forwarded(Way::Up), 0);
}

#[test]
fn congestion_marks_travel_both_ways() {
    let mut worker = Worker::new(1);
    let relay = Relay::with(&worker);
    let client = loopback("127.0.0.1:0");
    let packet = short(&worker.live_cid(), 100, 0);
    for mark in [Ecn::NotEct, Ecn::Ect1, Ecn::Ect0, Ecn::Ce] {
        let sender = socket2::SockRef::from(&client);
        sender.set_tos_v4(u32::from(mark.bits())).unwrap();
        client.send_to(&packet, relay.public()).unwrap();
        assert_eq!(worker.frame().header.ecn, mark);
    }
    let to = client.local_addr().unwrap();
    let port = Port::new(client).unwrap();
    let mut memory = vec![0; BATCH_SIZE * MESSAGE_BYTES];
    let mut meta = [RecvMeta::default(); BATCH_SIZE];
    for (inner, outer, expected) in [
        (Ecn::Ect0, Ecn::Ect0, Ecn::Ect0),
        (Ecn::Ect0, Ecn::Ce, Ecn::Ce),
        (Ecn::Ce, Ecn::NotEct, Ecn::Ce),
        (Ecn::NotEct, Ecn::NotEct, Ecn::NotEct),
    ] {
        let frame = worker.sealed_with(b"answer", |h| {
            h.client = to.into();
            h.ecn = inner;
        });
        let sender = socket2::SockRef::from(&worker.socket);
        sender.set_tos_v4(u32::from(outer.bits())).unwrap();
        worker.socket.send_to(&frame, relay.path.tunnel()).unwrap();
        eventually("answer", || port.receive(&mut memory, &mut meta).is_ok());
        assert_eq!(ecn_of(&meta[0]), expected, "{inner:?} {outer:?}");
    }
}

/// A worker's burst for one client arrives whole and in order, although it leaves in trains.
#[test]
fn a_burst_keeps_its_order() {
    let worker = Worker::new(1);
    let relay = Relay::with(&worker);
    let client = loopback("127.0.0.1:0");
    let to = client.local_addr().unwrap();
    let len_of = |n: u8| if n % 7 == 6 { 300 } else { 1200 };
    for n in 0..40 {
        let frame = worker.sealed(to, &vec![n; len_of(n)]);
        worker.socket.send_to(&frame, relay.path.tunnel()).unwrap();
    }
    let mut received = [0; 2048];
    for n in 0..40 {
        assert_eq!(client.recv(&mut received).unwrap(), len_of(n));
        assert_eq!(received[0], n);
    }
}

/// Datagrams that no train may carry still pass, one by one.
#[test]
fn long_datagrams_pass() {
    let mut worker = Worker::new(1);
    let relay = Relay::with(&worker);
    let client = loopback("127.0.0.1:0");
    let packets: Vec<_> = [2016, 1452, 1300, 2016].map(|len| short(&worker.live_cid(), len, 1)).into();
    for packet in &packets {
        client.send_to(packet, relay.public()).unwrap();
    }
    for packet in &packets {
        assert_eq!(&worker.frame().datagram, packet);
    }
}

/// Nothing is lost while the table is replaced between and during bursts, and old routes are not used afterwards.
#[test]
fn tables_are_swapped_under_load() {
    let mut here = Worker::new(1);
    let there = Worker::new(1);
    let mut relay = Relay::with(&here);
    let client = loopback("127.0.0.1:0");
    let packet = short(&here.live_cid(), 160, 0);
    for worker in [&here, &there] {
        worker.socket.set_nonblocking(true).unwrap();
    }
    let addresses = [there.address(), here.address()];
    let mut buffer = [0; 2048];
    for round in 0..200 {
        for n in 0..40 {
            client.send_to(&packet, relay.public()).unwrap();
            if n == 20 {
                relay.route(&[(&here, addresses[round % 2])]);
            }
        }
        let mut arrived = 0;
        eventually("all 40 of a round", || {
            for worker in [&here, &there] {
                arrived += usize::from(worker.socket.recv(&mut buffer).is_ok());
            }
            arrived == 40
        });
    }
    relay.route(&[(&here, there.address())]);
    let mut outcome = None;
    eventually("the new route alone", || {
        client.send_to(&packet, relay.public()).unwrap();
        eventually("one arrives", || {
            for (name, worker) in [("here", &here), ("there", &there)] {
                if worker.socket.recv(&mut buffer).is_ok() {
                    outcome = Some(name);
                    return true;
                }
            }
            false
        });
        outcome == Some("there")
    });
    assert_eq!(relay.path.table().len(), 1);
}

#[test]
fn notices_reach_every_shard() {
    let workers = [Worker::new(1), Worker::new(2), Worker::at(3, "[::1]:0")];
    let mut relay = Relay::start("[::]:0", "[::]:0", 2);
    let routes: Vec<_> = workers.iter().map(|w| (w, w.address())).collect();
    relay.route(&routes);
    let notice = Notice::Draining { deadline_ms: 1234 };
    assert_eq!(relay.path.notify(notice), 3);
    for worker in &workers {
        let frame = worker.frame();
        assert_eq!(frame.header.client, ClientAddr::RELAY);
        assert_eq!(frame.header.relay, relay_number());
        assert_eq!(Notice::from_bytes(&frame.datagram), Some(notice));
    }
}

#[tokio::test]
async fn threads_end_when_they_are_told() {
    let worker = Worker::new(1);
    let Relay { path, mut exits, .. } = Relay::with(&worker);
    assert!(path.last_client_datagram().is_none());
    path.stop();
    exits.wait().await.unwrap();
}
