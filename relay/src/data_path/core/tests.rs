use std::{
    net::UdpSocket,
    time::{Duration, Instant},
};

use antiphon_core::{
    cid::{CidMinter, ConfigId, NonceCounter},
    id::{KeyGeneration, RelayNumber, ServerId},
    keys::RelaySecret,
};
use prometheus_client::registry::Registry;

use super::*;
use crate::table::{RouteChange, Routing, Welcome};

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

/// A core that only moves when its test says so, one live route, and a packet for it.
fn bench() -> Bench {
    let (front, back, worker) = (loopback(), loopback(), loopback());
    let server_id = ServerId::from_u64(77);
    let (generation, config) = (KeyGeneration::new(1).unwrap(), ConfigId::new(0).unwrap());
    let mut routing = Routing::new();
    routing.welcome(Welcome {
        relay: RelayNumber::new(1).unwrap(),
        cid_configs: vec![(config, [1; 16])],
        secrets: vec![(generation, RelaySecret::from_bytes([2; 32]))],
        sealing: generation,
    });
    routing
        .apply(RouteChange {
            version: 1,
            full: true,
            upserts: vec![(server_id, worker.local_addr().unwrap())],
            ..RouteChange::default()
        })
        .unwrap();
    let table = Arc::new(ArcSwap::from_pointee(routing.table()));
    let metrics = Metrics::register(&mut Registry::default());
    let front_address = front.local_addr().unwrap();
    let activity = Arc::new(Activity::new());
    let (core, _waker) = Core::new(front, back, table, metrics.clone(), activity).unwrap();
    let mut minter = CidMinter::new(server_id, config, [1; 16], NonceCounter::starting_at(0));
    let mut packet = vec![0x40];
    packet.extend_from_slice(minter.mint_connection().as_bytes());
    packet.resize(160, 0);
    Bench { core, metrics, front: front_address, worker, packet }
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
            bench.core.turn().unwrap();
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
    let table = bench.core.table.load_full();
    let clients = |n: u16| {
        let [high, low] = n.to_be_bytes();
        SocketAddr::from(([192, 0, high, low], 1024 + n))
    };
    let Core { outbox, back, .. } = &mut bench.core;
    let allocations = allocation_counter::measure(|| {
        for n in 0..10_000 {
            let judged = outbox.up(&table, unix_seconds(), &bench.packet, clients(n), Ecn::Ect0, back);
            assert_eq!(judged, Ok(()));
        }
        outbox.flush(back, Way::Up);
    });
    assert_eq!(allocations.count_total, 0);
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
                bench.core.turn().unwrap();
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
        bench.core.turn().unwrap();
        assert!(Instant::now() < deadline);
    }
    assert_eq!(bench.metrics.forwarded(Way::Up), 0);
}
