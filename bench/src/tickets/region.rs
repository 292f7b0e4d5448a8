//! The router to be measured, in a process of its own.

use std::{
    net::SocketAddr,
    process::Child,
    sync::Arc,
    time::{Duration, SystemTime},
};

use antiphon_core::keys::FleetRoot;
use antiphon_router::{EtcdConfig, Memory, Owner, Ports, Store, StoreArgs};
use antiphon_runtime::{
    Tasks,
    pki::{FleetCa, Identity, PeerName, Role},
};
use anyhow::Context as _;

use super::{any_port, etcd::Etcd};
use crate::{Served, machine::Cpus, relay::fleet::until_input_ends, relay::start};

/// A running router. Ends with the value.
#[derive(Debug)]
pub(super) struct Router {
    pub(super) public: SocketAddr,
    pub(super) internal: SocketAddr,
    child: Child,
}

impl Router {
    /// With its store in this etcd, or in its memory.
    pub(super) fn start(cpus: Cpus, etcd: Option<&Etcd>) -> anyhow::Result<Self> {
        // The store's address is where its records go.
        let (served, sink) = etcd.map_or((Served::Router, any_port()), |etcd| (Served::RouterOnEtcd, etcd.address));
        let (child, line) = start(served, sink, cpus)?;
        let addresses = line.trim().split_once(' ').with_context(|| format!("the router says {line:?}"))?;
        Ok(Self { public: addresses.0.parse()?, internal: addresses.1.parse()?, child })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        // It may have ended by itself; there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a router with a store in memory or in the etcd at this address, until standard input ends. Says its public and
/// its internal address.
pub(crate) fn serve(etcd: Option<SocketAddr>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let tasks = Tasks::new();
    let line = runtime.block_on(async {
        let ports = Ports::bind(any_port(), any_port(), any_port()).await?;
        let line = format!("{} {}", ports.public.local_addr()?, ports.internal.local_addr()?);
        let identity = identity("router-1", Role::Router)?;
        let store: Arc<dyn Store> = match etcd {
            None => Arc::new(Memory::default()),
            Some(address) => {
                let args = StoreArgs { etcd: vec![format!("http://{address}")], ..StoreArgs::default() };
                let config = EtcdConfig::new(&args, REGION)?.context("an etcd was named")?;
                antiphon_router::Etcd::start(config, Owner::of(&identity), None, Duration::ZERO, &tasks)
            }
        };
        antiphon_router::start(identity, root(), store, ports, &tasks)?;
        anyhow::Ok(line)
    })?;
    until_input_ends(&line)
}

/// Somebody's certificate.
pub(super) fn identity(name: &str, role: Role) -> anyhow::Result<Identity> {
    let ca = FleetCa::from_seed(&root().ca_seed())?;
    let agent = (role == Role::Worker).then_some(AGENT);
    Ok(ca.issue_for(&PeerName::new(name, role, REGION)?, agent, &[], SystemTime::now())?)
}

fn root() -> FleetRoot {
    FleetRoot::from_bytes([7; 32])
}

pub(super) const AGENT: &str = "bench/echo";
pub(super) const REGION: &str = "frankfurt";
