//! Session worker: QUIC ends here, conversations live here.
//!
//! A datagram goes [`socket`](self) → QUIC → session task → engine and back. Each shard is one UDP port, one QUIC
//! endpoint and one thread; what a worker has promised is in one lease table that routers ask through gRPC.
#![forbid(unsafe_code)]

mod args;
mod capacity;
mod cids;
mod conversation;
mod gate;
mod keys;
mod measured;
mod metrics;
mod outgoing;
mod paths;
mod phase;
mod qlog;
mod quota;
mod registration;
mod relays;
mod rotation;
mod service;
mod session;
mod shard;
mod skew;
mod socket;
mod standing;
mod state;
#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use antiphon_proto::v1::{EndCode, Shard, WorkerHello, worker_server::WorkerServer};
use antiphon_runtime::{
    Tasks, admin,
    admin::Readiness,
    members,
    pki::{Identity, Role},
    shutdown, tls,
};
use anyhow::{Context as _, ensure};
use prometheus_client::registry::Registry;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

pub use args::Args;

use crate::{
    capacity::Capacity,
    metrics::Metrics,
    qlog::QlogDir,
    service::WorkerService,
    standing::{READY, Settings, Standing},
    state::{Owner, StateDir},
};

/// Runs a worker until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// A port is taken, the identity is unusable, or a task fails.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let identity = Identity::load(&args.identity).context("--identity")?;
    let peer = identity.peer();
    ensure!(
        peer.role == Role::Worker && peer.region == args.region && peer.covers(&args.name),
        "--identity is for {peer}, but this is worker {} of {}",
        args.name,
        args.region
    );
    let agents = identity.agents();
    ensure!(
        agents.contains(&args.agent),
        "--identity is for agents [{}], but --agent is {}: routers would refuse it",
        agents.join(", "),
        args.agent
    );
    let signal = shutdown::signal()?;
    let tasks = Tasks::new();
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    identity.follow(&tasks, &mut registry);
    let readiness = Readiness::new(&[READY]);
    let capacity = Arc::new(Capacity::new(args.agent.clone(), args.slots, metrics.clone()));

    let admin = TcpListener::bind(args.admin).await.with_context(|| format!("--admin {}", args.admin))?;
    tracing::info!(admin = %admin.local_addr()?, "admin port");
    tasks.service("admin", admin::serve(admin, registry, readiness.clone(), tasks.stopping()));

    let sockets = bind_shards(&args)?;
    let control = TcpListener::bind(args.control).await.with_context(|| format!("--control {}", args.control))?;
    let control_address = control_address(&args, control.local_addr()?)?;
    serve_control(&tasks, &identity, control, &args, capacity.clone())?;

    let kept = args.state.as_deref().map(|path| StateDir::open(path, Owner::of(&identity, &args.agent)));
    let settings = Settings {
        identity: identity.clone(),
        pin: args.pin,
        cid_lifetime: args.cid_lifetime,
        qlog: args.qlog.as_deref().map(QlogDir::open).transpose().context("--qlog")?.map(Arc::new),
        capacity: capacity.clone(),
        metrics: metrics.clone(),
        readiness,
        tasks: tasks.clone(),
    };
    let hello = hello(&args, &sockets, control_address);
    let standing = Standing::new(settings, hello, sockets, kept.transpose().context("--state")?)?;
    let resolver = Arc::new(members::System);
    registration::start(&args.router, resolver, &identity, &Arc::new(standing), &capacity, &metrics, &tasks);
    let expiring = (capacity.clone(), tasks.stopping());
    tasks.service("lease expiry", async move {
        let mut every = tokio::time::interval(Duration::from_millis(500));
        while expiring.1.run_until_cancelled(every.tick()).await.is_some() {
            expiring.0.expire();
        }
        Ok(())
    });
    tasks.wait(drained(signal, capacity, args.drain_deadline)).await
}

/// How the worker introduces itself, less its number and incarnation.
fn hello(args: &Args, sockets: &[(std::net::UdpSocket, SocketAddr)], control_address: String) -> WorkerHello {
    let shards = (0..).zip(sockets).map(|(number, (_, address))| Shard { number, tunnel_address: address.to_string() });
    WorkerHello {
        name: args.name.clone(),
        region: args.region.clone(),
        agent: args.agent.clone(),
        gpu_class: args.gpu_class.clone(),
        slots: args.slots,
        incarnation: 0,
        worker_number: None,
        shards: shards.collect(),
        control_address,
    }
}

/// Completes when the process was asked to stop and its sessions are over, or the deadline is.
async fn drained(signal: impl Future<Output = ()>, capacity: Arc<Capacity>, deadline: Duration) {
    signal.await;
    capacity.drain();
    tracing::info!(sessions = capacity.counts().active, ?deadline, "draining");
    let empty = async {
        while capacity.counts().active > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    if tokio::time::timeout(deadline, empty).await.is_err() {
        capacity.end_all(EndCode::WorkerStopping);
        // Time for the last messages to leave.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Where routers reach the API: what was said, else the bound address, else that of the tunnels with its port.
fn control_address(args: &Args, bound: SocketAddr) -> anyhow::Result<String> {
    if let Some(address) = &args.control_address {
        return Ok(address.clone());
    }
    let ip = if bound.ip().is_unspecified() { args.tunnel_ip.unwrap_or(args.tunnel.ip()) } else { bound.ip() };
    ensure!(!ip.is_unspecified(), "--control {bound} is no address that routers can reach: give --control-address");
    Ok(SocketAddr::new(ip, bound.port()).to_string())
}

/// Shard sockets are bound before the registration, which announces their ports.
fn bind_shards(args: &Args) -> anyhow::Result<Vec<(std::net::UdpSocket, SocketAddr)>> {
    let advertised = args.tunnel_ip.unwrap_or(args.tunnel.ip());
    ensure!(
        !advertised.is_unspecified(),
        "--tunnel {} is no address that relays can reach: give --tunnel-ip",
        args.tunnel
    );
    (0..args.shards).map(|shard| bind_shard(args.tunnel, shard, advertised)).collect()
}

fn bind_shard(base: SocketAddr, shard: u8, advertised: IpAddr) -> anyhow::Result<(std::net::UdpSocket, SocketAddr)> {
    let port = match base.port() {
        0 => 0,
        port => port.checked_add(shard.into()).context("--tunnel: not enough ports for the shards")?,
    };
    let address = SocketAddr::new(base.ip(), port);
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        // All addresses of IPv6 are those of IPv4, too, whatever the system's default.
        socket.set_only_v6(false)?;
    }
    // The system clamps these to its limits.
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.bind(&address.into()).with_context(|| format!("--tunnel {address}"))?;
    let socket = std::net::UdpSocket::from(socket);
    let bound = SocketAddr::new(advertised, socket.local_addr()?.port());
    Ok((socket, bound))
}

fn serve_control(
    tasks: &Tasks,
    identity: &Identity,
    listener: TcpListener,
    args: &Args,
    capacity: Arc<Capacity>,
) -> anyhow::Result<()> {
    let service = WorkerService { capacity, region: args.region.clone(), name: args.name.clone() };
    let server = tonic::transport::Server::builder()
        .timeout(Duration::from_secs(5))
        .concurrency_limit_per_connection(256)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .add_service(WorkerServer::new(service));
    let (incoming, stopping) = (tls::incoming(listener, identity)?, tasks.stopping());
    tasks.service("control", async move {
        Ok(server.serve_with_incoming_shutdown(incoming, stopping.cancelled_owned()).await?)
    });
    Ok(())
}

const SOCKET_BUFFER: usize = 4 << 20;
