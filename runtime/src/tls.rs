//! TLS 1.3 between the parts of the fleet, with one crypto provider (ring).

use std::{sync::Arc, time::Duration};

use rustls::{RootCertStore, crypto::CryptoProvider, server::WebPkiClientVerifier};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity as TonicIdentity, ServerTlsConfig};

use crate::pki::{Identity, PeerName, PkiError, Role, shared_dns};

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

/// Server side, TLS 1.3 only; the caller adds ALPN.
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
    builder.with_single_cert(vec![identity.certificate()], identity.key()).map_err(wrap)
}

fn roots(identity: &Identity) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca()).map_err(|source| TlsError::Identity { peer: identity.peer().clone(), source })?;
    Ok(roots)
}

/// Settings for a tonic server that only processes of the fleet may reach.
#[must_use]
pub fn grpc_server(identity: &Identity) -> ServerTlsConfig {
    ServerTlsConfig::new()
        .identity(TonicIdentity::from_pem(identity.certificate_pem(), identity.key_pem()))
        .client_ca_root(Certificate::from_pem(identity.ca_pem()))
}

/// A lazily connected gRPC channel to a process of `role` in `region`, with keep-alive and bounded connect time.
///
/// # Errors
/// The address is malformed.
pub fn channel(address: &str, identity: &Identity, role: Role, region: &str) -> Result<Channel, TlsError> {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(identity.ca_pem()))
        .identity(TonicIdentity::from_pem(identity.certificate_pem(), identity.key_pem()))
        .domain_name(shared_dns(role, region));
    Ok(endpoint(address)?.tls_config(tls)?.connect_lazy())
}

/// A lazily connected gRPC channel for callers without a certificate of the fleet.
///
/// `server_name` is what the server's certificate has to carry; `ca_pem` the trust anchor.
///
/// # Errors
/// The address is malformed.
pub fn public_channel(address: &str, ca_pem: &str, server_name: &str) -> Result<Channel, TlsError> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca_pem)).domain_name(server_name);
    Ok(endpoint(address)?.tls_config(tls)?.connect_lazy())
}

fn endpoint(address: &str) -> Result<Endpoint, TlsError> {
    let malformed = || TlsError::Address(address.chars().take(80).collect());
    if address.contains('/') || !address.contains(':') {
        return Err(malformed());
    }
    let endpoint = Endpoint::from_shared(format!("https://{address}")).map_err(|_| malformed())?;
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
