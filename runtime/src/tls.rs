//! TLS 1.3 between the parts of the fleet, with one crypto provider (ring).

use std::{io, sync::Arc, time::Duration};

use futures::{
    Stream, StreamExt as _,
    stream::{self, FuturesUnordered},
};
use hyper_util::rt::TokioIo;
use rustls::{RootCertStore, client::Resumption, crypto::CryptoProvider, server::WebPkiClientVerifier};
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, server};
use tonic::{
    codegen::http::Uri,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity as TonicIdentity, ServerTlsConfig},
};
use tower::service_fn;

use crate::{
    crowd::{Crowd, Place},
    pki::{Identity, PeerName, PkiError, Role, agents_of_certificate, shared_dns},
};

/// Why a TLS configuration or channel cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The identity's material is refused.
    #[error("TLS identity of {peer}: {source}")]
    Identity {
        /// Whose.
        peer: PeerName,
        /// What the library said.
        source: rustls::Error,
    },
    /// The address is no `host:port`.
    #[error("{0:?} is not an address: expected IP:PORT or HOST:PORT")]
    Address(String),
    /// The gRPC library refuses the configuration.
    #[error("gRPC channel: {0}")]
    Channel(#[from] tonic::transport::Error),
}

/// The one crypto provider of the project.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Who may connect to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Anybody; they authenticate by other means.
    Anonymous,
    /// Only holders of a certificate of the fleet.
    Fleet,
}

/// Server side, TLS 1.3 only; the caller adds ALPN. Each handshake shows the certificate that is in force then.
///
/// # Errors
/// The identity's material is refused.
pub fn server_config(identity: &Identity, clients: Clients) -> Result<rustls::ServerConfig, TlsError> {
    let wrap = |source| TlsError::Identity { peer: identity.peer().clone(), source };
    let builder = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(wrap)?;
    let builder = match clients {
        Clients::Anonymous => builder.with_no_client_auth(),
        Clients::Fleet => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(identity)?), provider())
                .build()
                .map_err(|e| wrap(rustls::Error::General(e.to_string())))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    Ok(builder.with_cert_resolver(identity.presenter()))
}

fn roots(identity: &Identity) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca()).map_err(|source| TlsError::Identity { peer: identity.peer().clone(), source })?;
    Ok(roots)
}

/// Settings for a tonic server that only processes of the fleet may reach, with the certificate of this moment: for
/// servers that do not live long. [`incoming`] is for the others.
#[must_use]
pub fn grpc_server(identity: &Identity) -> ServerTlsConfig {
    ServerTlsConfig::new()
        .identity(TonicIdentity::from_pem(identity.certificate_pem(), identity.key_pem()))
        .client_ca_root(Certificate::from_pem(identity.ca_pem()))
}

/// Connections of processes of the fleet, for `tonic`'s `serve_with_incoming`; each shows the certificate in force.
///
/// Handshakes run beside each other, [`HANDSHAKES`] at most, and each has [`HANDSHAKE`] to end. Who connects and says
/// nothing keeps nobody else out: when there are too many, the oldest of those who have most makes room ([`Crowd`]).
///
/// # Errors
/// The identity's material is refused.
pub fn incoming(
    listener: TcpListener,
    identity: &Identity,
) -> Result<impl Stream<Item = io::Result<server::TlsStream<TcpStream>>> + use<>, TlsError> {
    let mut config = server_config(identity, Clients::Fleet)?;
    config.alpn_protocols = vec![HTTP_2.to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let crowd = Crowd::new(HANDSHAKES, HANDSHAKES_OF_SOURCE);
    let begin = (listener, acceptor, crowd, FuturesUnordered::new());
    Ok(stream::unfold(begin, async |(listener, acceptor, crowd, mut handshakes)| {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((connection, from)) => if let Some(place) = crowd.enter(from.ip()).place {
                        handshakes.push(handshake(acceptor.clone(), connection, place));
                    },
                    Err(error) => {
                        // Of one connection, or of all for as long as there are no descriptors left.
                        tracing::warn!(%error, "accepting a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(done) = handshakes.next(), if !handshakes.is_empty() => match done {
                    Ok(connection) => return Some((Ok(connection), (listener, acceptor, crowd, handshakes))),
                    Err(error) => tracing::debug!(%error, "TLS handshake"),
                },
            }
        }
    }))
}

async fn handshake(
    acceptor: TlsAcceptor,
    connection: TcpStream,
    place: Place,
) -> io::Result<server::TlsStream<TcpStream>> {
    connection.set_nodelay(true)?;
    tokio::select! {
        done = timeout(HANDSHAKE, acceptor.accept(connection)) => done?,
        () = place.taken() => Err(io::Error::other("too many handshakes at once")),
    }
}

/// A lazily connected gRPC channel to a process of `role` in `region`, with keep-alive and bounded connect time.
///
/// Each new connection shows the certificate that is in force then.
///
/// # Errors
/// The address is malformed.
pub fn channel(address: &str, identity: &Identity, role: Role, region: &str) -> Result<Channel, TlsError> {
    let wrap = |source| TlsError::Identity { peer: identity.peer().clone(), source };
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(wrap)?
        .with_root_certificates(roots(identity)?)
        .with_client_cert_resolver(identity.presenter());
    config.alpn_protocols = vec![HTTP_2.to_vec()];
    // A resumed session would go on with the certificate of the one before.
    config.resumption = Resumption::disabled();
    let name = ServerName::try_from(shared_dns(role, region)).map_err(|_| TlsError::Address(region.to_owned()))?;
    let connector = TlsConnector::from(Arc::new(config));
    let connect = service_fn(move |uri: Uri| {
        let (connector, name) = (connector.clone(), name.clone());
        async move {
            let address = uri.authority().map(ToString::to_string).unwrap_or_default();
            let connection = TcpStream::connect(address).await?;
            connection.set_nodelay(true)?;
            io::Result::Ok(TokioIo::new(connector.connect(name, connection).await?))
        }
    });
    // The connector does the TLS; tonic would refuse `https` without a configuration of its own.
    let origin = endpoint(address, "https")?.uri().clone();
    Ok(endpoint(address, "http")?.origin(origin).connect_with_connector_lazy(connect))
}

/// A lazily connected gRPC channel for callers without a certificate of the fleet.
///
/// `server_name` is what the server's certificate has to carry; `ca_pem` the trust anchor.
///
/// # Errors
/// The address is malformed.
pub fn public_channel(address: &str, ca_pem: &str, server_name: &str) -> Result<Channel, TlsError> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca_pem)).domain_name(server_name);
    Ok(endpoint(address, "https")?.tls_config(tls)?.connect_lazy())
}

fn endpoint(address: &str, scheme: &str) -> Result<Endpoint, TlsError> {
    let malformed = || TlsError::Address(address.chars().take(80).collect());
    if address.contains('/') || !address.contains(':') {
        return Err(malformed());
    }
    let endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).map_err(|_| malformed())?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(3))
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .tcp_nodelay(true))
}

/// Whom the peer's verified certificate names.
///
/// # Errors
/// [`PkiError::NotOurs`] when there is none or it names nobody of the fleet.
pub fn peer_of<T>(request: &tonic::Request<T>) -> Result<PeerName, PkiError> {
    let certificates = request.peer_certs().ok_or(PkiError::NotOurs)?;
    PeerName::of_certificate(certificates.first().ok_or(PkiError::NotOurs)?)
}

/// The agents, `namespace/name`, that the peer's verified certificate lets it serve.
#[must_use]
pub fn peer_agents_of<T>(request: &tonic::Request<T>) -> Vec<String> {
    let certificates = request.peer_certs();
    let first = certificates.as_ref().and_then(|certificates| certificates.first());
    first.and_then(|certificate| agents_of_certificate(certificate).ok()).unwrap_or_default()
}

const HTTP_2: &[u8] = b"h2";
/// Handshakes at a time on one port.
pub const HANDSHAKES: usize = 256;
/// Of them from one source.
const HANDSHAKES_OF_SOURCE: usize = 128;
/// How long one handshake may take.
pub const HANDSHAKE: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc, time::SystemTime};

    use parking_lot::Mutex;
    use prometheus_client::registry::Registry;
    use rustls_pki_types::CertificateDer;
    use tonic::{Request, transport::Server};
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
        health_server::HealthServer,
    };
    use tonic_health::server::HealthReporter;

    use super::*;
    use crate::{Tasks, pki::FleetCa};

    const SOON: Duration = Duration::from_secs(20);

    fn renew(ca: &FleetCa, name: &str, role: Role, dir: &Path) -> Identity {
        let peer = PeerName::new(name, role, "frankfurt").unwrap();
        ca.issue(&peer, &["127.0.0.1".parse().unwrap()], SystemTime::now()).unwrap().save(dir).unwrap();
        Identity::load(dir).unwrap()
    }

    /// A router and a worker that follow their directories, and what the router saw of its clients.
    struct World {
        ca: FleetCa,
        dir: tempfile::TempDir,
        tasks: Tasks,
        router: Identity,
        worker: Identity,
        address: String,
        health: HealthReporter,
        clients: Arc<Mutex<Option<CertificateDer<'static>>>>,
    }

    async fn world() -> World {
        let (ca, dir, tasks) = (FleetCa::from_seed(&[7; 32]).unwrap(), tempfile::tempdir().unwrap(), Tasks::new());
        let router = renew(&ca, "router-0", Role::Router, &dir.path().join("router"));
        let worker = renew(&ca, "w-3", Role::Worker, &dir.path().join("worker"));
        for identity in [&router, &worker] {
            identity.follow(&tasks, &mut Registry::default());
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let health = HealthReporter::new();
        let clients = Arc::new(Mutex::new(None));
        let seen = clients.clone();
        let service = tonic_health::server::HealthService::from_health_reporter(health.clone());
        let service = HealthServer::with_interceptor(service, move |request: Request<()>| {
            assert_eq!(peer_of(&request).unwrap().name, "w-3");
            *seen.lock() = request.peer_certs().and_then(|certificates| certificates.first().cloned());
            Ok(request)
        });
        let serving = Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(incoming(listener, &router).unwrap(), tasks.stopping().cancelled_owned());
        tasks.spawn("server", async move { Ok(serving.await?) });
        World { ca, dir, tasks, router, worker, address, health, clients }
    }

    impl World {
        fn client(&self) -> HealthClient<Channel> {
            HealthClient::new(channel(&self.address, &self.worker, Role::Router, "frankfurt").unwrap())
        }

        /// The certificate that a new connection is shown.
        async fn shown(&self) -> CertificateDer<'static> {
            let config = rustls::ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_root_certificates(roots(&self.worker).unwrap())
                .with_client_cert_resolver(self.worker.presenter());
            let connection = TcpStream::connect(&self.address).await.unwrap();
            let name = ServerName::try_from("router.frankfurt.antiphon.internal").unwrap();
            let connection = TlsConnector::from(Arc::new(config)).connect(name, connection).await.unwrap();
            connection.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
        }
    }

    #[tokio::test]
    async fn certificates_change_under_live_connections() {
        let world = world().await;
        let (old_router, old_worker) = (world.router.certificate(), world.worker.certificate());
        let request = HealthCheckRequest { service: String::new() };
        let mut stream = world.client().watch(request.clone()).await.unwrap().into_inner();
        assert_eq!(stream.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
        assert!(world.shown().await == old_router && *world.clients.lock() == Some(old_worker));

        let new_router = renew(&world.ca, "router-0", Role::Router, &world.dir.path().join("router")).certificate();
        let new_worker = renew(&world.ca, "w-3", Role::Worker, &world.dir.path().join("worker")).certificate();
        timeout(SOON, async { while world.shown().await != new_router {} }).await.unwrap();
        timeout(SOON, async {
            while *world.clients.lock() != Some(new_worker.clone()) {
                world.client().check(request.clone()).await.unwrap();
            }
        })
        .await
        .unwrap();

        // The stream from before still carries what is new.
        world.health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        assert_eq!(stream.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
        drop(stream);
        world.tasks.wait(std::future::ready(())).await.unwrap();
    }

    #[tokio::test]
    async fn who_says_nothing_keeps_nobody_out() {
        let world = world().await;
        let mut silent = Vec::new();
        for _ in 0..2 * HANDSHAKES {
            silent.push(TcpStream::connect(&world.address).await.unwrap());
        }
        let request = HealthCheckRequest { service: String::new() };
        timeout(HANDSHAKE, world.client().check(request)).await.unwrap().unwrap();
        drop(silent);
        world.tasks.wait(std::future::ready(())).await.unwrap();
    }
}
