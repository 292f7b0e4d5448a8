//! A QUIC client recognizes the reset: the library itself says whether the token is the one that its worker gave.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use quinn_proto::{
    ClientConfig, Connection, ConnectionError, ConnectionHandle, ConnectionId, ConnectionIdGenerator, DatagramEvent,
    Endpoint, EndpointConfig, Event, ServerConfig,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rand::SeedableRng as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::*;
use antiphon_core::{
    cid::{CidMinter, ConfigId, NonceCounter},
    id::ServerId,
};

const KEY: [u8; 32] = [0x2a; 32];

/// Mints as workers do.
struct Minting(CidMinter);

impl ConnectionIdGenerator for Minting {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(self.0.mint_connection().as_bytes())
    }

    fn cid_len(&self) -> usize {
        SessionCid::LEN
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

/// One end of a connection.
struct End {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    local: SocketAddr,
    remote: SocketAddr,
}

impl End {
    /// What it has to send now.
    fn transmits(&mut self, now: Instant) -> Vec<Vec<u8>> {
        let mut sent = Vec::new();
        let Some((handle, connection)) = &mut self.connection else { return sent };
        loop {
            while let Some(event) = connection.poll_endpoint_events() {
                if let Some(back) = self.endpoint.handle_event(*handle, event) {
                    connection.handle_event(back);
                }
            }
            let mut buffer = Vec::new();
            match connection.poll_transmit(now, 1, &mut buffer) {
                Some(_) => sent.push(buffer),
                None => return sent,
            }
        }
    }

    fn receive(&mut self, now: Instant, datagram: &[u8]) {
        let mut answer = Vec::new();
        let local = Some(self.local.ip());
        match self.endpoint.handle(now, self.remote, local, None, datagram.into(), &mut answer) {
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                self.connection.as_mut().expect("a connection").1.handle_event(event);
            }
            Some(DatagramEvent::NewConnection(incoming)) => {
                self.connection = Some(self.endpoint.accept(incoming, now, &mut answer, None).expect("accepted"));
            }
            Some(DatagramEvent::Response(_)) | None => {}
        }
    }

    fn events(&mut self) -> Vec<Event> {
        let (_, connection) = self.connection.as_mut().expect("a connection");
        std::iter::from_fn(|| connection.poll()).collect()
    }
}

/// A client and a worker that have just become acquainted.
fn connected(now: Instant) -> (End, End) {
    let addresses: [SocketAddr; 2] = [4433, 5544].map(|port| (IpAddr::V4(Ipv4Addr::LOCALHOST), port).into());
    let issued = rcgen::generate_simple_self_signed(vec!["worker".into()]).unwrap();
    let certificate = CertificateDer::from(issued.cert.der().to_vec());
    let key = PrivatePkcs8KeyDer::from(issued.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = [&rustls::version::TLS13];
    let server =
        rustls::ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&versions).unwrap();
    let server = server.with_no_client_auth().with_single_cert(vec![certificate.clone()], key.into()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(&versions).unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();

    let mut config = EndpointConfig::new(Arc::new(ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &KEY)));
    config.cid_generator(|| {
        let (server, config) = (ServerId::from_u64(9), ConfigId::new(1).unwrap());
        Box::new(Minting(CidMinter::new(server, config, [7; 16], NonceCounter::starting_at(0))))
    });
    let server = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).unwrap()));
    let mut worker = End {
        endpoint: Endpoint::new(Arc::new(config), Some(Arc::new(server)), false, None),
        connection: None,
        local: addresses[0],
        remote: addresses[1],
    };
    let mut endpoint = Endpoint::new(Arc::new(EndpointConfig::default()), None, false, None);
    let client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).unwrap()));
    let connection = endpoint.connect(now, client, addresses[0], "worker").unwrap();
    let mut client = End { endpoint, connection: Some(connection), local: addresses[1], remote: addresses[0] };
    for _ in 0..20 {
        client.transmits(now).iter().for_each(|d| worker.receive(now, d));
        worker.transmits(now).iter().for_each(|d| client.receive(now, d));
    }
    assert!(client.events().iter().any(|e| matches!(e, Event::Connected)));
    (client, worker)
}

#[test]
fn a_client_recognizes_the_reset_and_no_other() {
    let now = Instant::now();
    for (key, recognized) in [(KEY, true), ([0; 32], false)] {
        let (mut client, worker) = connected(now);
        drop(worker);
        client.connection.as_mut().unwrap().1.ping();
        let packet = client.transmits(now).pop().expect("a packet");
        assert_eq!(packet[0] & 0x80, 0, "a short header");
        let cid = packet[1..].first_chunk::<{ SessionCid::LEN }>().unwrap();
        let mut out = [0; MAX_RESET];
        let mut resets = Resets::new(1, StdRng::seed_from_u64(3));
        let len = resets.answer(Millis(0), &ResetKey::new(&key), cid, packet.len(), &mut out).unwrap();
        client.receive(now, &out[..len]);
        let reset = |e: &Event| matches!(e, Event::ConnectionLost { reason: ConnectionError::Reset });
        assert_eq!(client.events().iter().any(reset), recognized);
    }
}
