//! The session router: admits sessions, places them on workers, issues tickets, keeps the route table of its region and
//! tells its peers.
//!
//! Two ports. *Public* (TLS): `Sessions` as HTTP/JSON and gRPC, for applications with an API key. *Internal* (mutual
//! TLS): `Fleet` for the region's workers and relays, `Peer` for routers of other regions, `Admin` for operators. A
//! router has no state of its own but its store; what it forgets comes back from those who hold it.
#![forbid(unsafe_code)]

mod admission;
mod args;
mod auth;
mod create;
mod field;
mod fleet;
mod grpc;
mod http;
mod listen;
mod memory;
mod metrics;
mod peering;
mod records;
mod refusals;
mod store;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use antiphon_core::keys::FleetRoot;
use antiphon_runtime::{
    Tasks,
    admin::{self, Readiness},
    pki::{FleetCa, Identity, Role},
    private_file::read_secret,
    shutdown, telemetry,
};
use anyhow::{Context as _, ensure};
use prometheus_client::registry::Registry;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::{
    net::TcpListener,
    time::{MissedTickBehavior, interval},
};

pub use args::{Args, StoreArgs};
pub use field::FieldError;
pub use http::check_session_request;
pub use records::{Agent, Key, Records, Region};
pub use store::{
    Claims, DecodeError, Etcd, EtcdConfig, Found, Holder, Kind, Memory, OpenError, Owner, Reached, Snapshot,
    SnapshotDir, Store, StoreError, WorkerClaim,
};

use admission::Admission;
use fleet::Fleet;
use metrics::Metrics;

/// A router's three ports, bound.
#[derive(Debug)]
pub struct Ports {
    /// For applications.
    pub public: TcpListener,
    /// For the fleet's own processes.
    pub internal: TcpListener,
    /// For probes and metrics.
    pub admin: TcpListener,
}

impl Ports {
    /// Binds the ports.
    ///
    /// # Errors
    /// An address is in use or not ours; the error says which.
    pub async fn bind(public: SocketAddr, internal: SocketAddr, admin: SocketAddr) -> anyhow::Result<Self> {
        let bind = async |name: &str, address: SocketAddr| {
            let bound = TcpListener::bind(address).await;
            bound.with_context(|| format!("binding the {name} port {address}"))
        };
        Ok(Self {
            public: bind("public", public).await?,
            internal: bind("internal", internal).await?,
            admin: bind("admin", admin).await?,
        })
    }
}

/// Runs a router until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, or the first of its tasks that fails.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let Args { region, public, internal, admin, identity, root, store, log_json } = args;
    telemetry::init(log_json);
    let stop = shutdown::signal().context("signal handlers")?;
    let directory = identity;
    let identity = Identity::load(&directory)?;
    let peer = identity.peer();
    ensure!(
        peer.role == Role::Router && peer.region == region,
        "the identity is {peer}: expected a router of {region}"
    );
    let root = load_root(&root, &directory, &identity)?;
    let ports = Ports::bind(public, internal, admin).await?;
    tracing::info!(
        region,
        public = %ports.public.local_addr()?,
        internal = %ports.internal.local_addr()?,
        admin = %ports.admin.local_addr()?,
        "router starts"
    );
    let tasks = Tasks::new();
    let store = store::open(&store, Owner::of(&identity), &tasks).await?;
    start(identity, root, store, ports, &tasks)?;
    tasks.wait(stop).await
}

/// Starts a router on bound ports; it lives as long as the tasks.
///
/// # Errors
/// The identity cannot serve TLS.
pub fn start(
    identity: Identity,
    root: FleetRoot,
    store: Arc<dyn Store>,
    ports: Ports,
    tasks: &Tasks,
) -> anyhow::Result<()> {
    let readiness = Readiness::new(&["region record"]);
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    identity.follow(tasks, &mut registry);
    store.register(registry.sub_registry_with_prefix("antiphon_router"));
    let noted = readiness.clone();
    let fleet = Fleet::new(identity.clone(), root, store);
    let admission = Admission::new(Arc::clone(&fleet), tasks.clone(), metrics.clone());
    let (http, grpc) = (http::router(Arc::clone(&admission)), grpc::public(&admission)?);
    let Ports { public, internal, admin } = ports;
    let stopping = tasks.stopping();
    tasks.service("admin port", admin::serve(admin, registry, readiness.clone(), stopping.clone()));
    tasks.service("internal port", grpc::serve_internal(admission, internal, stopping));
    let (owner, counted) = (tasks.clone(), metrics.clone());
    tasks.service("public port", async move { listen::serve(public, &identity, http, grpc, owner, counted).await });
    tasks.service("records", follow_records(Arc::clone(&fleet), readiness, tasks.clone()));
    tasks.service("peers", peering::watch_all(Arc::clone(&fleet), tasks.clone()));
    tasks.service("keys", fleet::follow_keys(Arc::clone(&fleet), tasks.clone()));
    tasks.service("memory", fleet::remember(Arc::clone(&fleet), tasks.clone()));
    tasks.service("gauges", gauge(fleet, metrics, noted, tasks.clone()));
    Ok(())
}

/// Brings the store's records into effect. Ready once this region has its record.
async fn follow_records(fleet: Arc<Fleet>, readiness: Readiness, tasks: Tasks) -> anyhow::Result<()> {
    let mut records = fleet.store.watch();
    let stopping = tasks.stopping();
    loop {
        let newest = Arc::clone(&records.borrow_and_update());
        fleet.records_changed(newest);
        readiness.set("region record", fleet.has_region());
        tokio::select! {
            changed = records.changed() => changed.context("the store is gone")?,
            () = stopping.cancelled() => return Ok(()),
        }
    }
}

async fn gauge(fleet: Arc<Fleet>, metrics: Metrics, readiness: Readiness, tasks: Tasks) -> anyhow::Result<()> {
    let mut tick = interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stopping = tasks.stopping();
    while stopping.run_until_cancelled(tick.tick()).await.is_some() {
        let (workers, relays) = fleet.in_service();
        metrics.workers.set(i64::try_from(workers).unwrap_or(i64::MAX));
        metrics.relays.set(i64::try_from(relays).unwrap_or(i64::MAX));
        let age = fleet.oldest_digest().unwrap_or_default();
        metrics.digest_age_seconds.set(age.as_secs_f64());
        metrics.clocks(fleet.clocks());
        let age = fleet.store.age();
        metrics.store_age_seconds.set(age.as_secs_f64());
        let note = || format!("store unavailable since {} s, going on with what is known", age.as_secs());
        readiness.note((age > Duration::ZERO).then(note));
    }
    Ok(())
}

/// Reads the fleet root, which nobody else may read. It has to be of the identity's fleet: tickets signed with keys of
/// another root are refused by every worker.
fn load_root(path: &Path, directory: &Path, identity: &Identity) -> anyhow::Result<FleetRoot> {
    let text = read_secret(path).context("fleet root")?;
    let root = FleetRoot::from_hex(text.trim_end()).with_context(|| format!("fleet root {}", path.display()))?;
    let issuer = FleetCa::from_seed(&root.ca_seed())?;
    let issuer = CertificateDer::from_pem_slice(issuer.certificate_pem().as_bytes());
    ensure!(
        issuer.context("the issuer that follows from the root")? == identity.ca(),
        "fleet root {} is not the one of the identity in {}: the issuer that follows from it is not {}; give the root \
         that the fleet was made with, or an identity that was issued from this one",
        path.display(),
        directory.display(),
        directory.join("ca.pem").display()
    );
    Ok(root)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use antiphon_runtime::pki::PeerName;

    use super::*;

    /// A router's identity in the fleet that has this root.
    fn identity(root: &FleetRoot) -> Identity {
        let peer = PeerName::new("router-1", Role::Router, "frankfurt").unwrap();
        let ca = FleetCa::from_seed(&root.ca_seed()).unwrap();
        ca.issue(&peer, &[], std::time::SystemTime::now()).unwrap()
    }

    #[test]
    fn a_root_of_another_fleet_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.hex");
        antiphon_runtime::pki::write_secret(&path, "42".repeat(32).as_bytes()).unwrap();
        // As it is after the identity was written and read again.
        let load = |byte| {
            identity(&FleetRoot::from_bytes([byte; 32])).save(dir.path()).unwrap();
            load_root(&path, dir.path(), &Identity::load(dir.path()).unwrap())
        };
        assert!(load(0x42).is_ok());
        let error = load(0x43).unwrap_err().to_string();
        for said in ["root.hex is not the one of the identity", "/ca.pem; give the root that the fleet was made with"] {
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_root_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.hex");
        let identity = identity(&FleetRoot::from_bytes([0x42; 32]));
        let load_root = |path: &Path| load_root(path, dir.path(), &identity);
        std::fs::write(&path, format!("{}\n", "42".repeat(32))).unwrap();
        let set = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        set(0o600);
        assert!(load_root(&path).is_ok());
        set(0o640);
        let error = format!("{:#}", load_root(&path).unwrap_err());
        assert!(error.ends_with("has mode 640: its group can read it; chmod 600 it"), "{error}");
        set(0o600);
        std::fs::write(&path, "42").unwrap();
        let error = format!("{:#}", load_root(&path).unwrap_err());
        assert!(error.contains("expected 64 hex digits"), "{error}");
        assert!(load_root(&dir.path().join("none")).is_err());
    }
}
