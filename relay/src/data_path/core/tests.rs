use std::{
    net::UdpSocket,
    num::NonZeroU16,
    time::{Duration, Instant},
};

use antiphon_core::{
    cid::{CidMinter, ConfigId, NonceCounter},
    clock::Millis,
    id::{KeyGeneration, RelayNumber, ServerId},
    keys::RelaySecret,
};
use prometheus_client::registry::Registry;

use super::*;
use crate::{
    keyring::{CidKey, Keyring},
    routing::{RouteChange, Routing, Welcome},
};

struct Bench {
    core: Core,
    metrics: Metrics,
    front: SocketAddr,
    worker: UdpSocket,
    packet: Vec<u8>,
}

fn loopback() -> UdpSocket {
    UdpSocket::bind("127.0.0.1:0").unwrap()
}

/// With room for tests that send as fast as they can.
fn bench() -> Bench {
    bench_within(&Limits { cid_rate: NonZeroU16::new(20_000).unwrap(), ..Limits::default() })
}

/// A core that only moves when its test says so, one live route, and a packet for it.
fn bench_within(limits: &Limits) -> Bench {
    let (front, back, worker) = (loopback(), loopback(), loopback());
    let server_id = ServerId::from_u64(77);
    let (generation, config) = (KeyGeneration::new(1).unwrap(), ConfigId::new(0).unwrap());
    let mut routing = Routing::new(1);
    let keys = Keyring {
        cid: vec![CidKey { config, generation, key: [1; 16] }],
        secrets: vec![(generation, RelaySecret::from_bytes([2; 32]))],
        sealing: generation,
    };
    routing.welcome(0, Welcome { relay: RelayNumber::new(1).unwrap(), keys }).unwrap();
    let change = RouteChange {
        version: 1,
        full: true,
        upserts: vec![(server_id, worker.local_addr().unwrap())],
        ..RouteChange::default()
    };
    routing.apply(0, 0, change).unwrap();
    let shared = Arc::new(Shared::new(1));
    shared.swap(routing.table());
    let metrics = Metrics::register(&mut Registry::default());
    let front_address = front.local_addr().unwrap();
    let (core, _waker) = Core::new(front, back, 0, shared, metrics.clone(), limits).unwrap();
    let mut minter = CidMinter::new(server_id, config, [1; 16], NonceCounter::starting_at(0));
    let mut packet = vec![0x40];
    packet.extend_from_slice(minter.mint_connection().as_bytes());
    packet.resize(160, 0);
    Bench { core, metrics, front: front_address, worker, packet }
}

impl Bench {
    /// A turn with whatever has come.
    fn turn(&mut self) {
        self.core.ready = [true; 2];
        self.core.turn().unwrap();
    }
}

#[test]
fn datagrams_of_64_clients_share_two_trains() {
    let mut bench = bench();
    let clients: Vec<_> = (0..64).map(|_| loopback()).collect();
    let deadline = Instant::now() + Duration::from_secs(20);
    // A round counts when the system had delivered all of it before the core looked.
    loop {
        let sends = bench.metrics.sends(Way::Up);
        let forwarded = bench.metrics.forwarded(Way::Up);
        for client in &clients {
            client.send_to(&bench.packet, bench.front).unwrap();
        }
        while bench.metrics.forwarded(Way::Up) < forwarded + 64 {
            bench.turn();
            assert!(Instant::now() < deadline, "datagrams were lost");
        }
        if bench.metrics.sends(Way::Up) == sends + 2 {
            break;
        }
        assert!(Instant::now() < deadline, "clients never shared a train");
    }
    let mut frame = [0; 2048];
    assert_eq!(bench.worker.recv(&mut frame).unwrap(), 160 + HEADER_LEN);
}

/// Nothing is kept per client: ten thousand of them cost not one allocation.
#[test]
fn forwarding_for_10_000_clients_allocates_nothing() {
    let mut bench = bench();
    let (table, now) = (bench.core.shared.in_force(0), bench.core.shared.clock.now());
    let clients = |n: u16| {
        let [high, low] = n.to_be_bytes();
        SocketAddr::from(([192, 0, high, low], 1024 + n))
    };
    let Core { outbox, front, back, .. } = &mut bench.core;
    let (ports, mut memo) = (Ports { front, back }, Memo::default());
    let allocations = allocation_counter::measure(|| {
        for n in 0..10_000 {
            let arrival = Arrival { datagram: &bench.packet, from: clients(n), ecn: Ecn::Ect0 };
            assert_eq!(outbox.of_client(&table, now, &arrival, &ports, &mut memo), (Way::Up, Ok(())));
        }
        outbox.flush(&ports);
    });
    assert_eq!(allocations.count_total, 0);
}

/// Who has seen one packet of a call has its connection ID, which is all that he needs to send more with it.
#[test]
fn a_flood_with_a_callers_connection_id_costs_the_caller_nothing() {
    for attackers in [1, 64] {
        let mut bench = bench_within(&Limits::default());
        let (table, start) = (bench.core.shared.in_force(0), bench.core.shared.clock.now());
        let Core { outbox, front, back, .. } = &mut bench.core;
        let (ports, mut memo) = (Ports { front, back }, Memo::default());
        let mut dropped = 0;
        // Three seconds, 100 packets a second of the caller, 64,000 of the others.
        for ms in 0..3000 {
            let now = Now { ms: Millis(start.ms.0 + ms), ..start };
            let mut send = |from: SocketAddr| {
                let arrival = Arrival { datagram: &bench.packet, from, ecn: Ecn::NotEct };
                outbox.of_client(&table, now, &arrival, &ports, &mut memo).1
            };
            if ms % 10 == 0 {
                assert_eq!(send(SocketAddr::from(([192, 0, 2, 7], 4000))), Ok(()), "the caller at {ms} ms");
            }
            for n in 0..64 {
                dropped += u32::from(send(SocketAddr::from(([198, 51, 100, 9], 5000 + n % attackers))).is_err());
            }
            outbox.flush(&ports);
        }
        assert!(dropped > 3 * (64_000 - 20_000), "the worker is spared the most of it: {dropped}");
    }
}

#[test]
fn a_batch_allocates_nothing() {
    let mut bench = bench();
    let client = loopback();
    let deadline = Instant::now() + Duration::from_secs(20);
    // The first batch of a thread sets up what the table's snapshots need.
    for round in 0..3 {
        let forwarded = bench.metrics.forwarded(Way::Up);
        for _ in 0..32 {
            client.send_to(&bench.packet, bench.front).unwrap();
            client.send_to(b"garbage", bench.front).unwrap();
        }
        let allocations = allocation_counter::measure(|| {
            while bench.metrics.forwarded(Way::Up) < forwarded + 32 {
                bench.turn();
                assert!(Instant::now() < deadline);
            }
        });
        assert!(round == 0 || allocations.count_total == 0, "{allocations:?}");
    }
}

#[test]
fn empty_datagrams_are_counted_drops() {
    let mut bench = bench();
    let client = loopback();
    client.send_to(&[], bench.front).unwrap();
    client.send_to(&[], bench.front).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while bench.metrics.dropped(DropReason::TooShort) < 2 {
        bench.turn();
        assert!(Instant::now() < deadline);
    }
    assert_eq!(bench.metrics.forwarded(Way::Up), 0);
}
