//! gRPC services: `Sessions` for applications; `Fleet`, `Peer` and `Admin` for the fleet's own processes.

mod admin;
mod fleet;
mod peer;
mod sessions;
mod watch;

use std::{sync::Arc, time::Duration};

use antiphon_proto::v1::{
    admin_server::AdminServer, fleet_server::FleetServer, peer_server::PeerServer, sessions_server::SessionsServer,
};
use antiphon_runtime::tls;
use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Server};

use crate::admission::Admission;

/// Keeps a task that streams to one registered process from sending more often than needed: a change is sent at once,
/// further ones [`COALESCING`] later, together.
#[derive(Debug)]
struct Pace {
    dirty: bool,
    next: tokio::time::Instant,
}

impl Pace {
    fn new() -> Self {
        Self { dirty: false, next: tokio::time::Instant::now() }
    }

    fn mark(&mut self) {
        self.dirty = true;
    }

    /// Completes when something is to be sent and may be; cancel safe.
    async fn due(&self) {
        if !self.dirty {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep_until(self.next).await;
    }

    fn sent(&mut self) {
        self.dirty = false;
        self.next = tokio::time::Instant::now() + COALESCING;
    }
}

/// `Sessions` with health and reflection, for the public port.
pub(crate) fn public(admission: &Arc<Admission>) -> anyhow::Result<Routes> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let serving = health.set_serving::<SessionsServer<sessions::Service>>();
    // Sets a value in memory: done at its first poll.
    futures::FutureExt::now_or_never(serving).context("health service")?;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(antiphon_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name("antiphon.v1.Sessions")
        .with_service_name("grpc.health.v1.Health")
        .build_v1()?;
    let sessions =
        SessionsServer::new(sessions::Service(Arc::clone(admission))).max_decoding_message_size(MAX_PUBLIC_MESSAGE);
    Ok(Routes::new(sessions).add_service(health_service).add_service(reflection))
}

/// Serves the fleet's own processes over mutual TLS until `stopping`.
pub(crate) async fn serve_internal(
    admission: Arc<Admission>,
    listener: TcpListener,
    stopping: CancellationToken,
) -> anyhow::Result<()> {
    let fleet = fleet::Service(Arc::clone(&admission));
    let peer = peer::Service(Arc::clone(&admission));
    let admin = admin::Service(Arc::clone(&admission));
    let incoming = tls::incoming(listener, &admission.fleet.identity)?;
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .max_concurrent_streams(MAX_INTERNAL_STREAMS)
        .add_service(FleetServer::new(fleet).max_decoding_message_size(MAX_FLEET_MESSAGE))
        .add_service(
            PeerServer::new(peer)
                .max_decoding_message_size(MAX_PEER_MESSAGE)
                .max_encoding_message_size(MAX_INTERNAL_MESSAGE),
        )
        .add_service(AdminServer::new(admin).max_decoding_message_size(MAX_INTERNAL_MESSAGE))
        .serve_with_incoming_shutdown(incoming, stopping.cancelled_owned())
        .await
        .context("internal port")
}

/// Updates of one stream come at most this often.
const COALESCING: Duration = Duration::from_millis(100);
/// Messages waiting for one process; one that takes them more slowly is disconnected and registers again.
const STREAM_QUEUE: usize = 16;
const MAX_PUBLIC_MESSAGE: usize = 64 << 10;
/// A hello with all its shards takes 3 KiB, a report less.
const MAX_FLEET_MESSAGE: usize = 16 << 10;
/// A request for a session, as other regions pass it on.
const MAX_PEER_MESSAGE: usize = 2 * MAX_PUBLIC_MESSAGE;
const MAX_INTERNAL_MESSAGE: usize = 16 << 20;
const MAX_INTERNAL_STREAMS: u32 = 4096;
