//! Tickets in wrong hands, and bytes from nobody.

use std::{
    net::UdpSocket,
    time::{SystemTime, UNIX_EPOCH},
};

use antiphon_cli::fleet::{Kind, read_root};
use antiphon_client::{CallError, ClientKey, Dial, DialError};
use antiphon_core::id::KeyGeneration;
use antiphon_proto::{
    ticket,
    v1::{Codec, RefusedCode},
};

use crate::support::{Caller, Shape, connect, eventually, start};

fn refused_with(error: &DialError) -> RefusedCode {
    match error {
        DialError::Refused { code, detail } if !detail.is_empty() => *code,
        other => panic!("not a refusal: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_is_worth_nothing_in_other_hands_or_after_its_time() {
    let fleet = start(Shape { relays: 1, workers: 1, slots: 10 }).await;
    let thief = ClientKey::generate().unwrap();

    let (session, _) = fleet.ticket(Codec::Opus).await;
    let error = connect(&session, &thief).await.unwrap_err();
    assert_eq!(refused_with(&error), RefusedCode::WrongClient);

    let (mut forged, key) = fleet.ticket(Codec::Opus).await;
    let middle = forged.ticket.len() / 2;
    let other = if forged.ticket.as_bytes()[middle] == b'A' { "B" } else { "A" };
    forged.ticket.replace_range(middle..=middle, other);
    assert_eq!(refused_with(&connect(&forged, &key).await.unwrap_err()), RefusedCode::TicketInvalid);

    // Signed by the fleet's own key, for the thief, but of another session's lease.
    let root = read_root(fleet.dir.path()).unwrap();
    let seed = root.ticket_seed(KeyGeneration::new(1).unwrap());
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (mut stolen, key) = fleet.ticket(Codec::Opus).await;
    let claims = ticket::verify(&stolen.ticket, &[ticket::public_key(&seed)], now_s).unwrap();
    let for_thief = ticket::TicketClaims { client_key: thief.public(), ..claims.clone() };
    stolen.ticket = ticket::sign(&for_thief, &seed).unwrap();
    assert_eq!(refused_with(&connect(&stolen, &thief).await.unwrap_err()), RefusedCode::WrongClient);

    let (mut late, key2) = (stolen.clone(), key);
    late.initial_connection_ids.remove(0);
    late.ticket = ticket::sign(&ticket::TicketClaims { iat: now_s - 60, exp: now_s - 1, ..claims }, &seed).unwrap();
    assert_eq!(refused_with(&connect(&late, &key2).await.unwrap_err()), RefusedCode::TicketExpired);

    let (one, key) = fleet.ticket(Codec::Opus).await;
    let (mut crossed, _) = fleet.ticket(Codec::Opus).await;
    crossed.ticket = one.ticket;
    let error = connect(&crossed, &key).await.unwrap_err();
    assert_eq!(refused_with(&error), RefusedCode::Malformed);
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_before_the_confirmation_is_heard_or_told_why_not() {
    let fleet = start(Shape { relays: 1, workers: 1, slots: 4 }).await;
    let (session, key) = fleet.ticket(Codec::Opus).await;
    let call = Dial::new(&session).unwrap().begin(&key).await.unwrap();
    let (caller, _) = Caller::new(6, call.sample_rate(), 1);
    let finished = caller.run(call).await;
    finished.assert_complete();
    assert!(finished.report.activated > finished.report.handshake, "{:?}", finished.report);

    let (session, _) = fleet.ticket(Codec::Opus).await;
    let thief = ClientKey::generate().unwrap();
    let call = Dial::new(&session).unwrap().begin(&thief).await.unwrap();
    let (caller, _) = Caller::new(6, call.sample_rate(), 1);
    let finished = caller.run(call).await;
    let refused = matches!(&finished.outcome, Err(CallError::Refused { code: RefusedCode::WrongClient, .. }));
    assert!(refused, "{:?}", finished.outcome);
    fleet.fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_ticket_opens_no_second_call() {
    let mut fleet = start(Shape { relays: 1, workers: 1, slots: 2 }).await;
    let (session, key) = fleet.ticket(Codec::Opus).await;
    let call = connect(&session, &key).await.unwrap();
    let handle = call.handle();
    let (caller, _) = Caller::new(0, call.sample_rate(), 1);
    handle.hang_up();
    assert!(caller.run(call).await.outcome.is_ok());
    let mut active = 1.0;
    while active > 0.0 {
        active = fleet.metric(Kind::Worker, 0, "antiphon_worker_active_sessions").await;
    }
    let error = connect(&session, &key).await.unwrap_err();
    assert!(matches!(error, DialError::NoAnswer { .. }), "{error:?}");
    let dropped = "antiphon_worker_dropped_frames_total{reason=\"unknown_initial\"}";
    assert!(fleet.metric(Kind::Worker, 0, dropped).await > 0.0, "the replayed first packets stop before QUIC");
    fleet.fleet.stop().await;
}

/// Any bytes, the same ones each time.
fn garbage(seed: &mut u64) -> Vec<u8> {
    let mut next = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 33) as u8
    };
    let length = usize::from(next()) * 6 % 1_400 + 1;
    let mut bytes: Vec<u8> = (0..length).map(|_| next()).collect();
    // Half of it looks like QUIC version 1 with a connection ID of the right length.
    if next() & 1 == 0 && bytes.len() > 6 {
        bytes[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 17]);
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_every_port_is_counted_and_costs_a_live_call_nothing() {
    let mut fleet = start(Shape { relays: 1, workers: 1, slots: 2 }).await;
    let (_, call) = fleet.dial(Codec::Opus).await;
    let (caller, _) = Caller::new(5, call.sample_rate(), 1);
    let running = tokio::spawn(caller.run(call));
    let relay = fleet.fleet.process(Kind::Relay, "north", 0).unwrap().spec().ip;
    let worker = fleet.fleet.process(Kind::Worker, "north", 0).unwrap().spec().ip;
    let forwarded = "antiphon_relay_forwarded_packets_total{direction=\"down\"}";
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut seed = 1;
    for _ in 0..3_000 {
        for target in [format!("{relay}:4433"), format!("{relay}:4434"), format!("{worker}:4500")] {
            socket.send_to(&garbage(&mut seed), target).unwrap();
        }
    }
    socket.set_nonblocking(true).unwrap();
    let finished = running.await.unwrap();
    finished.assert_complete();
    assert!(socket.recv(&mut [0; 64]).is_err(), "nobody answers garbage");
    assert!(fleet.metric(Kind::Relay, 0, forwarded).await > 0.0);
    let frames = "antiphon_worker_dropped_frames_total{reason=\"frame\"}";
    let unknown = "antiphon_worker_dropped_frames_total{reason=\"unknown_relay\"}";
    let stopped = fleet.metric(Kind::Worker, 0, frames).await + fleet.metric(Kind::Worker, 0, unknown).await;
    assert!(stopped > 1_000.0, "{stopped}");
    let process = fleet.fleet.process(Kind::Relay, "north", 0).unwrap();
    let text = process.metrics().await.unwrap();
    let dropped: f64 = text
        .lines()
        .filter(|line| line.starts_with("antiphon_relay_dropped_packets_total{"))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum();
    assert!(dropped > 1_000.0, "{dropped}");
    eventually("the worker is empty again", async || {
        fleet.router().list(0).await.is_ok_and(|sessions| sessions.is_empty())
    })
    .await;
    fleet.fleet.stop().await;
}
