//! Floods that cost a live call nothing, and answers that nobody can turn against a third party.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use antiphon_cli::fleet::Kind;
use antiphon_client::ClientKey;
use antiphon_proto::v1::{Codec, Session};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::support::{
    Caller, Finished, PATIENCE, Seen, Shape, TestFleet,
    cable::{Cable, Faults, Overheard, Way, impostor},
    connect, start, until,
};

#[tokio::test(flavor = "multi_thread")]
async fn spoofed_packets_through_another_relay_cost_the_caller_no_frame() {
    let mut fleet = start(Shape { relays: 2, workers: 1, slots: 2 }).await;
    let (mut session, key) = fleet.ticket(Codec::Opus).await;
    let (used, other) = (relay_address(&session, 0), relay_address(&session, 1));
    let cable = behind_a_cable(&mut session, used);
    let (mut seen, running) = call(&session, &key, 2).await;
    until(&mut seen, |seen| seen.answers_begun > 0).await;

    let [_, Some(Overheard { source, bytes })] = cable.overheard() else { panic!("nothing was said") };
    let forger = impostor(source).unwrap();
    forger.connect(other).unwrap();
    let mut forged = bytes[..CID_END].to_vec();
    forged.resize(172, 0);
    let sent = flood(&forger, running, |number| {
        // The same connection ID, a different packet each time: nothing below QUIC can tell it from a genuine one.
        forged[CID_END..CID_END + 8].copy_from_slice(&number.to_be_bytes());
        forged.clone()
    });
    let (finished, sent) = sent.await;
    finished.assert_complete();
    assert_eq!(finished.report.received.jitter.lost, 0, "{:?}", finished.report);
    assert!(seen.borrow().switches.is_empty(), "the relay is still the same");
    assert!(sent > SPOOFED_RATE, "{sent} packets in all");
    let other = index_of(&fleet, other);
    let held_back = "antiphon_relay_dropped_packets_total{reason=\"cid_rate\"}";
    let held_back = fleet.metric(Kind::Relay, other, held_back).await;
    assert!(held_back > 0.5 * sent as f64, "{held_back} of {sent}");
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_and_replayed_initials_cost_no_handshake_and_no_frame() {
    let mut fleet = start(Shape { relays: 1, workers: 1, slots: 2 }).await;
    let (mut session, key) = fleet.ticket(Codec::Opus).await;
    let relay = relay_address(&session, 0);
    let cable = behind_a_cable(&mut session, relay);
    let (mut seen, running) = call(&session, &key, 2).await;
    until(&mut seen, |seen| seen.answers_begun > 0).await;

    let [Some(Overheard { bytes: genuine, .. }), _] = cable.overheard() else { panic!("no handshake") };
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.connect(relay).unwrap();
    let (finished, sent) = flood(&socket, running, |number| {
        let mut initial = genuine.clone();
        // Every other one is a replay; the rest have connection IDs of nobody.
        if number % 2 == 0 {
            let at = LONG_CID_BEGIN + 1;
            initial[at..at + 8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        }
        initial
    })
    .await;
    finished.assert_complete();
    assert_eq!(finished.report.received.jitter.lost, 0, "{:?}", finished.report);
    socket.set_nonblocking(true).unwrap();
    assert!(socket.recv(&mut [0; 64]).is_err(), "nobody answers");
    assert!(sent > SPOOFED_RATE, "{sent} packets in all");
    let unknown = fleet.metric(Kind::Relay, 0, "antiphon_relay_dropped_packets_total{reason=\"unknown_server\"}").await;
    assert!(unknown > 0.25 * sent as f64, "{unknown} of {sent}");
    let activated = "antiphon_worker_activations_total{reason=\"activated\"}";
    assert_eq!(fleet.metric(Kind::Worker, 0, activated).await, 1.0);
    let process = fleet.fleet.process(Kind::Worker, "north", 0).unwrap();
    let text = process.metrics().await.unwrap();
    let activations: f64 = text
        .lines()
        .filter(|line| line.starts_with("antiphon_worker_activations_total{"))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum();
    assert_eq!(activations, 1.0, "no handshake but the caller's came as far as its first message");
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_never_answers_gets_at_most_three_times_what_it_sent() {
    let fleet = start(Shape { relays: 1, workers: 1, slots: 2 }).await;
    let (mut session, key) = fleet.ticket(Codec::Opus).await;
    let relay = relay_address(&session, 0);
    let cable = behind_a_cable(&mut session, relay);
    cable.cut(Way::Down, Duration::from_secs(3_600));
    assert!(connect(&session, &key).await.is_err(), "nothing comes back");
    let carried = cable.carried();
    let (up, down) = (carried.up.entered_bytes, carried.down.entered_bytes);
    assert!(down > 0 && down <= 3 * up, "{down} bytes for {up} (RFC 9000, section 8.1)");
    fleet.fleet.stop().await;
}

/// Sends what `packet` makes of 0, 1, … at [`SPOOFED_RATE`] until the call is over; how many that were.
async fn flood(
    socket: &UdpSocket,
    mut running: tokio::task::JoinHandle<Finished>,
    mut packet: impl FnMut(u64) -> Vec<u8>,
) -> (Finished, u64) {
    let mut every = interval(Duration::from_millis(1));
    every.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut sent = 0;
    let flooding = async {
        loop {
            tokio::select! {
                finished = &mut running => return finished.unwrap(),
                _ = every.tick() => for _ in 0..SPOOFED_RATE / 1_000 {
                    // Refused or no room: one less.
                    if socket.send(&packet(sent)).is_ok() {
                        sent += 1;
                    }
                },
            }
        }
    };
    let finished = timeout(2 * PATIENCE, flooding).await.expect("the call comes to its end");
    (finished, sent)
}

async fn call(
    session: &Session,
    key: &ClientKey,
    turns: usize,
) -> (watch::Receiver<Seen>, tokio::task::JoinHandle<Finished>) {
    let call = connect(session, key).await.unwrap();
    let (caller, seen) = Caller::new(11, call.sample_rate(), turns);
    (seen, tokio::spawn(caller.run(call)))
}

fn relay_address(session: &Session, index: usize) -> SocketAddr {
    session.relays[index].address.parse().unwrap()
}

/// Lets the ticket name a cable to its first relay, and nothing else: a slow handshake starts no second attempt.
fn behind_a_cable(session: &mut Session, relay: SocketAddr) -> Cable {
    let cable = Cable::lay(relay, 1, Faults::default(), Faults::default()).unwrap();
    session.relays.truncate(1);
    session.relays[0].address = cable.address().to_string();
    cable
}

fn index_of(fleet: &TestFleet, relay: SocketAddr) -> usize {
    let mut relays = fleet.fleet.processes().iter().filter(|process| process.spec().kind == Kind::Relay);
    relays.position(|process| process.spec().ip == relay.ip()).unwrap()
}

/// Packets a second.
const SPOOFED_RATE: u64 = 20_000;

/// First octet and connection ID of an established connection's packet.
const CID_END: usize = 18;

/// First octet, version and length: the connection ID follows (RFC 9000, section 17.2).
const LONG_CID_BEGIN: usize = 6;
