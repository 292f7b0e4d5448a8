//! Relays with addresses of both families, of which one does not work.

use std::net::SocketAddr;

use tokio::net::UdpSocket;

use crate::support::{Worker, dial, run};

/// An address of the worker, which listens on all.
fn at(worker: &Worker, ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), worker.address.port())
}

/// Takes everything and says nothing, as a family that is routed nowhere does.
async fn black_hole(bind: &str) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind(bind).await.unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_family_that_leads_nowhere_is_overtaken_by_the_other() {
    let worker = Worker::start("127.0.0.1:0");
    let (_hole, nowhere) = black_hole("[::1]:0").await;
    let call = dial(&worker.session(&[(65, worker.address), (65, nowhere)])).await.unwrap();
    let report = run(call, async {}).await;
    assert_eq!((report.relay, report.attempts), (0, 2), "IPv6 went first and IPv4 won");
    assert_eq!(*worker.connections.borrow(), (1, 1));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_port_is_left_without_a_delay() {
    let worker = Worker::start("127.0.0.1:0");
    let (hole, closed) = black_hole("[::1]:0").await;
    drop(hole);
    let call = dial(&worker.session(&[(65, closed), (66, worker.address)])).await.unwrap();
    let report = run(call, async {}).await;
    assert_eq!((report.relay, report.attempts), (1, 2));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_goes_first_where_both_work() {
    let worker = Worker::start("[::]:0");
    let call = dial(&worker.session(&[(65, at(&worker, "127.0.0.1")), (65, at(&worker, "::1"))])).await.unwrap();
    assert_eq!(run(call, async {}).await.relay, 1);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_comes_late_does_no_harm() {
    let worker = Worker::start("127.0.0.1:0");
    let (hole, nowhere) = black_hole("[::1]:0").await;
    let call = dial(&worker.session(&[(65, worker.address), (65, nowhere)])).await.unwrap();
    let (mut late, mut answer) = ([0; 2048], [0; 2048]);
    let report = run(call, async {
        // What IPv6 has swallowed comes through after all, when IPv4 has won.
        let (length, _) = hole.recv_from(&mut late).await.unwrap();
        let after = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        after.send_to(&late[..length], worker.address).await.unwrap();
        after.recv_from(&mut answer).await.unwrap();
    })
    .await;
    assert_eq!((report.relay, report.switches.len()), (0, 0));
    assert_eq!(*worker.connections.borrow(), (1, 1));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_goes_on_over_the_other_family_when_its_own_is_gone() {
    let worker = Worker::start("[::]:0");
    let (four, six) = (at(&worker, "127.0.0.1"), at(&worker, "::1"));
    // The relay's IPv4 address: passes everything on to the worker until it is closed.
    let relay = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at_relay = relay.local_addr().unwrap();
    let passing = tokio::spawn(async move {
        let (mut buffer, mut client) = ([0; 2048], None);
        loop {
            let (length, from) = relay.recv_from(&mut buffer).await.unwrap();
            let to = if from == four { client } else { Some(four) };
            client = if from == four { client } else { Some(from) };
            if let Some(to) = to {
                relay.send_to(&buffer[..length], to).await.unwrap();
            }
        }
    });
    // Named second so that the call begins on IPv4.
    let call = dial(&worker.session(&[(65, at_relay), (66, six)])).await.unwrap();
    let mut seen = worker.client.clone();
    let is_six = |client: &SocketAddr| client.ip().to_canonical().is_ipv6();
    let report = run(call, async {
        seen.wait_for(|client| client.as_ref().is_some_and(|client| !is_six(client))).await.unwrap();
        passing.abort();
        seen.wait_for(|client| client.as_ref().is_some_and(is_six)).await.unwrap();
    })
    .await;
    assert_eq!((report.relay, report.attempts), (1, 1));
    assert_eq!(report.switches.len(), 1, "{:?}", report.switches);
    worker.stop().await;
}
