//! Somebody outside of all clusters.

use std::{ffi::OsStr, net::Ipv4Addr};

use anyhow::Result;
use rustix::process::Signal;
use tokio::process::Command;

use crate::{
    daemon::Process,
    network::{Namespace, PREFIX},
    path::Path,
    state::Home,
};

/// A machine with one address, connected with the hub. It stays until its set of clusters goes, or it is removed.
#[derive(Clone, Debug)]
pub struct Caller {
    home: Home,
    hub: Namespace,
    own: Namespace,
    index: u8,
    address: Ipv4Addr,
}

impl Caller {
    pub(crate) async fn new(home: &Home, hub: Namespace, index: u8, address: Ipv4Addr) -> Result<Self> {
        let own = Namespace::named(format!("{}caller{index}", home.prefix()));
        if own.exists() {
            Self { home: home.clone(), hub: hub.clone(), own: own.clone(), index, address }.remove().await?;
        }
        own.add().await?;
        hub.ip(&format!(
            "link add caller{index} type veth peer name eth0 netns {}\nlink set caller{index} master bridge up",
            own.name()
        ))
        .await?;
        own.ip(&format!("address add {address}/{PREFIX} dev eth0\nlink set eth0 up")).await?;
        Ok(Self { home: home.clone(), hub, own, index, address })
    }

    /// Its address, as clusters see it.
    #[must_use]
    pub const fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A program that runs there, with this machine's files.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.own.command(program)
    }

    /// The way to it, from everywhere, to give it faults.
    ///
    /// # Errors
    /// No cable can be laid.
    pub async fn path(&self) -> Result<Path> {
        Path::lay(&self.home, self.hub.clone(), &self.port()).await
    }

    /// The hub's end of its link.
    fn port(&self) -> String {
        format!("caller{}", self.index)
    }

    /// Takes its link away.
    ///
    /// # Errors
    /// There is none.
    pub async fn cut(&self) -> Result<()> {
        self.hub.ip(&format!("link set caller{} down", self.index)).await
    }

    /// Undoes [`cut`](Self::cut).
    ///
    /// # Errors
    /// There is no link.
    pub async fn join(&self) -> Result<()> {
        self.hub.ip(&format!("link set caller{} up", self.index)).await
    }

    /// Removes it, with everything that runs there.
    ///
    /// # Errors
    /// It is gone already.
    pub async fn remove(self) -> Result<()> {
        for process in self.own.processes()?.into_iter().filter_map(Process::of) {
            process.signal(Signal::KILL)?;
        }
        let path = Path::of(&self.home, self.hub.clone(), &self.port());
        if path.is_laid() {
            path.remove().await?;
        }
        self.hub.ip(&format!("link delete caller{}", self.index)).await?;
        self.own.delete().await
    }
}
