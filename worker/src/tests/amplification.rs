//! What the worker sends to addresses that have not proved themselves: never more than RFC 9000 allows.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use antiphon_client::{ClientKey, Dial};
use antiphon_core::cid::SessionCid;
use antiphon_runtime::tls;
use quinn::{ClientConfig, ConnectionId, Endpoint, crypto::rustls::QuicClientConfig};
use rustls::{RootCertStore, pki_types::CertificateDer};

use super::rig::{Rig, TestRelay, talk};

fn client() -> SocketAddr {
    "192.0.2.1:5".parse().unwrap()
}

fn long(kind: u8, version: u32, cid: &SessionCid, length: usize) -> Vec<u8> {
    let mut packet = vec![0xc0 | kind << 4];
    packet.extend_from_slice(&version.to_be_bytes());
    packet.push(17);
    packet.extend_from_slice(cid.as_bytes());
    packet.push(8);
    packet.extend_from_slice(&[5; 8]);
    packet.resize(length, 9);
    packet
}

/// Version negotiation, Retry, refusals: nothing that QUIC would answer a stranger with is ever sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_headers_that_begin_nothing_are_not_answered() {
    let rig = Rig::start(2).await;
    let relay = TestRelay::start(&rig, 65).await;
    rig.set_relays(&[&relay], &[1]);
    let key = ClientKey::generate().unwrap();
    let (terms, _) = rig.session(&key, &[&relay], 1);
    let mut minter = rig.minter();
    let (leased, unknown, live) = (terms.attempts[0].0, minter.mint_initial(0).0, minter.mint_connection());
    let cases = [
        ("another version", long(0, 0x6b33_43cf, &leased, 1_200)),
        ("reserved version", long(0, 0x0a0a_0a0a, &leased, 1_200)),
        ("version negotiation", long(0, 0, &leased, 1_200)),
        ("undecryptable initial of a lease", long(0, 1, &leased, 1_200)),
        ("short initial of a lease", long(0, 1, &leased, 300)),
        ("initial of no lease", long(0, 1, &unknown, 1_200)),
        ("initial of no handshake", long(0, 1, &live, 1_200)),
        ("0-RTT", long(1, 1, &leased, 1_200)),
        ("handshake", long(2, 1, &live, 1_200)),
        ("retry", long(3, 1, &leased, 1_200)),
    ];
    for (_, datagram) in &cases {
        relay.send_as(client(), datagram).await;
    }
    rig.until("all have come", |rig| rig.metric("antiphon_worker_received_frames_total ") >= cases.len() as u64).await;
    // A caller's handshake comes after them through the same endpoint: whatever they caused has been sent before it.
    let (_, call) = rig.call(&[&relay], 1).await;
    call.handle().hang_up();
    talk(call, 1).await;
    assert_eq!(relay.strangers(), 0, "datagrams for {}", client());
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stateless_resets_are_smaller_than_what_they_answer_and_few() {
    let rig = Rig::start(1).await;
    let relay = TestRelay::start(&rig, 65).await;
    rig.set_relays(&[&relay], &[1]);
    relay.fall_silent(false);
    let mut minter = rig.minter();
    let began = std::time::Instant::now();
    let mut datagram = |length: usize| {
        let mut packet = [&[0x40][..], minter.mint_connection().as_bytes()].concat();
        packet.resize(length, 9);
        packet
    };
    relay.send_as(client(), &datagram(60)).await;
    rig.until("one is answered", |_| relay.traffic().1.datagrams == 1).await;
    assert!(relay.traffic().1.largest < 60, "{:?}", relay.traffic());
    for n in 0..2_000_u64 {
        let from = SocketAddr::from(([198, 51, 100, 1], 1_000 + u16::try_from(n).unwrap()));
        relay.send_as(from, &datagram(1_200)).await;
    }
    rig.until("all have come", |rig| rig.metric("antiphon_worker_received_frames_total ") > 2_000).await;
    rig.until("the last answers are counted", |rig| {
        rig.metric("antiphon_worker_sent_frames_total ") == relay.traffic().1.datagrams
    })
    .await;
    let most = began.elapsed().as_millis() as u64 / 20 + 2;
    let sent = relay.traffic().1;
    assert!(sent.datagrams <= most, "{} resets, {most} at most", sent.datagrams);
    assert!(sent.largest < 1_200);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_that_is_never_answered_sends_three_times_what_came() {
    let rig = Rig::start(2).await;
    let relay = TestRelay::start(&rig, 65).await;
    rig.set_relays(&[&relay], &[1]);
    relay.fall_silent(false);
    let key = ClientKey::generate().unwrap();
    let (_, session) = rig.session(&key, &[&relay], 1);
    let refused = Dial::new(&session).unwrap().connect(&key).await.map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("relay 65"), "{refused}");
    let (up, down) = relay.traffic();
    assert!(down.bytes > 0 && down.bytes <= 3 * up.bytes, "{} bytes for {}", down.bytes, up.bytes);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_that_is_refused_closes_within_three_times_what_came() {
    let rig = Rig::start(2).await;
    let relay = TestRelay::start(&rig, 65).await;
    rig.set_relays(&[&relay], &[1]);
    let key = ClientKey::generate().unwrap();
    let (_, session) = rig.session(&key, &[&relay], 1);
    // TLS refuses a client that speaks another application protocol.
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(session.trust_anchor.to_vec())).unwrap();
    let mut crypto = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    crypto.alpn_protocols = vec![b"something else".to_vec()];
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(crypto).unwrap()));
    let first = ConnectionId::new(&session.initial_connection_ids[0]);
    config.initial_dst_cid_provider(Arc::new(move || first));
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = endpoint.connect_with(config, relay.clients, &session.server_name).unwrap();
    let refused = connecting.await.unwrap_err();
    assert!(refused.to_string().contains("protocol"), "{refused}");
    let (up, down) = relay.traffic();
    assert!(down.bytes > 0 && down.bytes <= 3 * up.bytes, "{} bytes for {}", down.bytes, up.bytes);
    rig.stop().await;
}

/// A caller's packets come from an address where nobody answers: the worker's own audio is not sent there either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_is_never_validated_gets_three_times_what_came_over_it() {
    let rig = Rig::start(2).await;
    let (first, second) = (TestRelay::start(&rig, 65).await, TestRelay::start(&rig, 66).await);
    rig.set_relays(&[&first, &second], &[1]);
    let (terms, call) = rig.call(&[&first, &second], 1).await;
    let breaking = async {
        rig.until("the call runs", |_| terms.path.lock().describe().audio_received > 20).await;
        second.fall_silent(false);
        first.fall_silent(true);
    };
    let mut caller = antiphon_client::ScriptedCaller::new(
        vec![antiphon_media::speech::Utterance::ALL[0].pcm()],
        antiphon_media::speech::RATE,
        Duration::from_secs(20),
    );
    let ((_, ended), ()) = tokio::join!(call.run(&mut caller), breaking);
    assert!(ended.is_err(), "nobody answers through either relay");
    let (up, down) = second.traffic();
    assert!(up.datagrams > 2 && down.bytes > 0, "it was tried: {up:?} {down:?}");
    assert!(down.bytes <= 3 * up.bytes, "{} bytes for {}", down.bytes, up.bytes);
    rig.stop().await;
}
