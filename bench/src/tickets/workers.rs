//! Workers that grant whatever they are asked for.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use antiphon_core::id::{Incarnation, RegionNumber, ServerId, ShardNumber, WorkerNumber};
use antiphon_proto::v1::{
    self, fleet_client::FleetClient, reserve_response, worker_directive::Directive, worker_message::Message,
    worker_server,
};
use antiphon_runtime::{Tasks, pki::Role, tls};
use anyhow::{Context as _, bail};
use tokio::{net::TcpListener, sync::mpsc, time::interval};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use super::{
    any_port, internal,
    region::{AGENT, REGION, Router, identity},
};

/// Starts a worker's API, registers it and reports until the stop.
pub(super) async fn start(name: &str, router: &Router, tasks: &Tasks) -> anyhow::Result<()> {
    let listener = TcpListener::bind(any_port()).await?;
    let hello = hello(name, listener.local_addr()?);
    let generous = Arc::new(Generous::default());
    let server = Server::builder()
        .tls_config(tls::grpc_server(&identity(name, Role::Worker)?))?
        .add_service(worker_server::WorkerServer::from_arc(Arc::clone(&generous)))
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            tasks.stopping().cancelled_owned(),
        );
    tasks.spawn("worker's API", async move { Ok(server.await?) });
    let incarnation = Incarnation::new(hello.incarnation)?;
    let (messages, stream) = mpsc::channel(16);
    messages.send(message(Message::Hello(hello))).await?;
    let mut fleet = FleetClient::new(internal(router, name, Role::Worker)?);
    let mut directives = fleet.run_worker(ReceiverStream::new(stream)).await?.into_inner();
    let Some(Directive::Welcome(welcome)) = directives.message().await?.and_then(|d| d.directive) else {
        bail!("{name} gets no welcome");
    };
    let server_id = ServerId {
        region: RegionNumber::new(u16::try_from(welcome.region_number)?)?,
        worker: WorkerNumber::new(u16::try_from(welcome.worker_number)?)?,
        shard: ShardNumber::new(0)?,
        incarnation,
    };
    generous.server_id.set(server_id.to_u64()).ok().context("a worker is welcomed once")?;
    let stopping = tasks.stopping();
    tasks.spawn("worker's reports", async move {
        let mut tick = interval(Duration::from_millis(200));
        loop {
            tokio::select! {
                _ = tick.tick() => messages.send(message(Message::Report(report()))).await?,
                directive = directives.message() => drop(directive?),
                () = stopping.cancelled() => return Ok(()),
            }
        }
    });
    Ok(())
}

fn hello(name: &str, control_address: SocketAddr) -> v1::WorkerHello {
    v1::WorkerHello {
        name: name.to_owned(),
        region: REGION.into(),
        agent: AGENT.into(),
        slots: SLOTS,
        incarnation: rand::random(),
        shards: vec![v1::Shard { number: 0, tunnel_address: "127.0.0.1:4000".into() }],
        control_address: control_address.to_string(),
        ..v1::WorkerHello::default()
    }
}

fn report() -> v1::WorkerReport {
    v1::WorkerReport { phase: v1::Phase::Active.into(), slots: SLOTS, ..v1::WorkerReport::default() }
}

fn message(message: Message) -> v1::WorkerMessage {
    v1::WorkerMessage { message: Some(message) }
}

/// Never full: what is measured is the router.
#[derive(Debug, Default)]
struct Generous {
    server_id: OnceLock<u64>,
}

#[tonic::async_trait]
impl worker_server::Worker for Generous {
    async fn reserve(&self, _request: Request<v1::ReserveRequest>) -> Result<Response<v1::ReserveResponse>, Status> {
        let server_id = self.server_id.get().ok_or_else(|| Status::unavailable("not registered yet"))?;
        let grant = v1::ReserveGrant {
            lease: 42,
            initial_connection_ids: (1..=4).map(|n| vec![n; 17].into()).collect(),
            expires_at: Some((SystemTime::now() + Duration::from_secs(30)).into()),
            server_id: *server_id,
            agent_revision: "r1".into(),
            free: SLOTS,
        };
        Ok(Response::new(v1::ReserveResponse { result: Some(reserve_response::Result::Grant(grant)) }))
    }

    async fn release(&self, _request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        Ok(Response::new(v1::ReleaseResponse { released: true }))
    }

    async fn list_sessions(
        &self,
        _request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        Ok(Response::new(v1::ListSessionsResponse { sessions: vec![] }))
    }

    async fn describe_path(
        &self,
        _request: Request<v1::DescribePathRequest>,
    ) -> Result<Response<v1::SessionPath>, Status> {
        Err(Status::not_found("no session is ever activated here"))
    }
}

const SLOTS: u32 = 100_000;
