//! The process: everything put together, and the planned stop.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    thread::available_parallelism,
    time::{Duration, Instant},
};

use antiphon_core::tunnel::Notice;
use antiphon_proto::v1;
use antiphon_runtime::{
    Tasks,
    admin::{self, Readiness},
    members,
    pki::{Identity, Role},
    shutdown, telemetry,
};
use anyhow::{Context as _, ensure};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, sync::watch, time::sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    Args,
    control::{CONDITIONS, Knowledge, Lifecycle, Link},
    data_path::{Config, DataPath, Exits},
    drain::{Drain, Reason, Step},
    limits::Limits,
    metrics::Metrics,
    public::{self, Addresses, Source},
    state::{
        Owner,
        disk::{StateDir, keep},
    },
};

/// Runs the relay until SIGTERM or SIGINT, then drains it.
///
/// # Errors
/// The relay cannot start, or a part of it failed.
pub async fn run(args: Args) -> anyhow::Result<()> {
    telemetry::init(args.log_json);
    let stop = shutdown::signal().context("signal handlers")?;
    serve(args, stop).await
}

/// Runs the relay until `stop` completes, then drains it: workers are told, and forwarding goes on until clients are
/// quiet or the deadline has come.
///
/// # Errors
/// The relay cannot start, or a part of it failed.
pub async fn serve(args: Args, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let Args {
        name,
        region,
        public,
        public_address,
        public_address_file,
        tunnel,
        tunnel_address,
        tunnel_ip,
        router,
        identity,
        state,
        admin,
        cores,
        pin,
        drain_deadline,
        cid_rate,
        initial_rate,
        reset_rate,
        log_json: _,
    } = args;
    let identity = Identity::load(&identity).context("identity")?;
    check_identity(&identity, name.as_deref(), region.as_deref())?;
    let state = state.map(|dir| StateDir::open(&dir, Owner::of(&identity))).transpose().context("state directory")?;
    let restored = state.as_ref().and_then(StateDir::load);
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let limits = Limits { cid_rate, initial_rate, reset_rate };
    let config =
        Config { public, tunnel, cores: cores.or(available_parallelism().ok()).map_or(1, usize::from), pin, limits };
    let (data_path, exits) = DataPath::start(&config, &metrics)?;
    let data_path = Arc::new(data_path);
    let peer = identity.peer().clone();
    let hello = v1::RelayHello {
        name: name.unwrap_or(peer.name),
        region: peer.region,
        tunnel_address: tunnel_address_of(tunnel_address, tunnel_ip, data_path.tunnel())?,
        ..v1::RelayHello::default()
    };
    let source = Source::new(&public_address, public_address_file, data_path.public())?;
    let (said, addresses) = watch::channel(source.known());
    let listener = TcpListener::bind(admin).await.with_context(|| format!("binding the admin port {admin} (TCP)"))?;

    let tasks = Tasks::new();
    identity.follow(&tasks, &mut registry);
    let readiness = Readiness::new(&CONDITIONS);
    readiness.set(public::CONDITION, !addresses.borrow().is_empty());
    let (life, lifecycle) = watch::channel(Lifecycle::Active);
    tasks.service("admin", admin::serve(listener, registry, readiness.clone(), tasks.stopping()));
    tasks.service("public address", source.follow(said, tasks.stopping()));
    tasks.service("address known", note_known(addresses.clone(), readiness.clone(), tasks.stopping()));
    tasks.service("data path", forward(data_path.clone(), exits, tasks.clone()));
    let (latest, to_keep) = watch::channel(None);
    if let Some(dir) = state {
        tasks.spawn("state", keep(dir, to_keep, metrics.clone()));
    }
    let knowledge = Knowledge::new(restored, data_path.clone(), readiness.clone(), metrics.clone(), latest);
    let knowledge = Arc::new(Mutex::new(knowledge));
    let stopping = tasks.stopping();
    let link = move |router| {
        let index = knowledge.lock().join();
        let (identity, hello, lifecycle) = (identity.clone(), hello.clone(), lifecycle.clone());
        let (knowledge, addresses) = (knowledge.clone(), addresses.clone());
        let link = Link { router, index, identity, hello, addresses, knowledge, lifecycle };
        link.run(stopping.clone())
    };
    tasks.service("routers", members::follow(router, Arc::new(members::System), tasks.clone(), link));
    tasks
        .wait(async move {
            stop.await;
            readiness.set("not draining", false);
            // Receivers live as long as the links; without them there is nobody to tell.
            life.send_replace(Lifecycle::Draining);
            drain(&data_path, drain_deadline).await;
            life.send_replace(Lifecycle::Leaving);
        })
        .await
}

fn check_identity(identity: &Identity, name: Option<&str>, region: Option<&str>) -> anyhow::Result<()> {
    let peer = identity.peer();
    ensure!(peer.role == Role::Relay, "the identity is of {peer}: a relay's is needed");
    ensure!(
        name.is_none_or(|name| peer.covers(name)) && region.is_none_or(|region| region == peer.region),
        "the identity is of {peer}: --name has to be its name, or that with '-' and more behind it, --region its region; \
         or leave them out"
    );
    Ok(())
}

fn tunnel_address_of(given: Option<SocketAddr>, ip: Option<IpAddr>, bound: SocketAddr) -> anyhow::Result<String> {
    let address = given.or_else(|| Some(SocketAddr::new(ip?, bound.port()))).unwrap_or(bound);
    ensure!(
        !address.ip().is_unspecified() && address.port() != 0,
        "{address} is no address that workers can reach: give --tunnel-address IP:PORT or --tunnel-ip IP"
    );
    Ok(address.to_string())
}

/// Says in the readiness whether public addresses are known.
async fn note_known(
    mut addresses: watch::Receiver<Addresses>,
    readiness: Readiness,
    stopping: CancellationToken,
) -> anyhow::Result<()> {
    loop {
        readiness.set(public::CONDITION, !addresses.borrow_and_update().is_empty());
        tokio::select! {
            changed = addresses.changed() => if changed.is_err() { return Ok(()) },
            () = stopping.cancelled() => return Ok(()),
        }
    }
}

/// The data path as a service: it ends with the process, and the process with it.
async fn forward(data_path: Arc<DataPath>, mut exits: Exits, tasks: Tasks) -> anyhow::Result<()> {
    let stopping = tasks.stopping();
    tokio::select! {
        outcome = exits.wait() => return outcome,
        () = stopping.cancelled() => data_path.stop(),
    }
    exits.wait().await
}

async fn drain(data_path: &DataPath, limit: Duration) {
    let began = Instant::now();
    let mut drain = Drain::new(began, limit);
    tracing::info!(?limit, "draining");
    loop {
        match drain.poll(Instant::now(), data_path.last_client_datagram()) {
            Step::Notify { left } => {
                let deadline_ms = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
                let told = data_path.notify(Notice::Draining { deadline_ms });
                tracing::debug!(told, "told workers");
            }
            Step::WaitUntil(at) => sleep_until(at.into()).await,
            Step::Done(reason) => {
                let took = began.elapsed();
                match reason {
                    Reason::Quiet => tracing::info!(?took, "drained"),
                    Reason::Deadline => {
                        tracing::warn!(?took, "clients were still sending at the deadline")
                    }
                }
                return;
            }
        }
    }
}
