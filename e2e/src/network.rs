//! Network namespaces, the bridges that join them, and who has which address.
//!
//! All of it is one Ethernet: the hub's bridge, to which this machine, callers and every cluster's own bridge are
//! connected. So a whole cluster is cut off by one link, and stays whole inside.

use std::{fs, net::Ipv4Addr, path::PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::command::{run, run_with};

/// The network of a set of clusters: 198.18.0.0/15, which belongs to tests (RFC 2544), has room for 32 of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network(u8);

impl Network {
    /// One of the 32.
    pub(crate) fn numbered(number: u8) -> Option<Self> {
        (number < MOST).then_some(Self(number))
    }

    /// Which one of the 32.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    const fn address(self, third: u8, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(198, 18 + self.0 / 16, 16 * (self.0 % 16) + third, last)
    }

    /// All of it, in CIDR notation.
    #[must_use]
    pub fn range(self) -> String {
        format!("{}/{PREFIX}", self.address(0, 0))
    }

    /// This machine.
    #[must_use]
    pub const fn host(self) -> Ipv4Addr {
        self.address(0, 1)
    }

    /// A caller, from 0 to 199.
    #[must_use]
    pub const fn caller(self, index: u8) -> Ipv4Addr {
        self.address(0, 10 + index)
    }

    /// What belongs to a cluster's control plane, nodes and load balancers.
    #[must_use]
    pub fn cluster(self, cluster: u8) -> String {
        format!("{}/24", self.address(cluster, 0))
    }

    /// Where a cluster's API server listens.
    #[must_use]
    pub const fn control_plane(self, cluster: u8) -> Ipv4Addr {
        self.address(cluster, 1)
    }

    /// A node, from 1.
    #[must_use]
    pub const fn node(self, cluster: u8, node: u8) -> Ipv4Addr {
        self.address(cluster, 10 + node)
    }

    /// What a cluster gives to Services of type LoadBalancer.
    pub(crate) fn load_balancers(self, cluster: u8) -> impl Iterator<Item = Ipv4Addr> {
        (128..=254).map(move |last| self.address(cluster, last))
    }
}

/// All pods of a cluster.
pub(crate) fn pods(cluster: u8) -> String {
    format!("10.{}.0.0/16", 128 + cluster)
}

/// The pods of one node.
pub(crate) fn pods_of(cluster: u8, node: u8) -> String {
    format!("10.{}.{node}.0/24", 128 + cluster)
}

/// ClusterIPs, the same in every cluster.
pub(crate) const SERVICES: &str = "10.96.0.0/16";
/// The Service `kubernetes`.
pub(crate) const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// The Service of the cluster's DNS.
pub(crate) const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Of the addresses on the hub.
pub(crate) const PREFIX: u8 = 20;
/// Sets of clusters on one machine.
pub(crate) const MOST: u8 = 32;

/// A network namespace that has a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace(String);

impl Namespace {
    pub(crate) fn named(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// Its name, as `ip netns` takes it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(NAMESPACES).join(&self.0)
    }

    pub(crate) fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Makes it, with its loopback up.
    pub(crate) async fn add(&self) -> Result<()> {
        run(Command::new("ip").args(["netns", "add", &self.0])).await?;
        self.ip("link set lo up").await
    }

    /// Removes the name. The namespace itself goes with its last process.
    pub(crate) async fn delete(&self) -> Result<()> {
        run(Command::new("ip").args(["netns", "delete", &self.0])).await.map(drop)
    }

    /// Carries out lines of arguments for `ip`, in order.
    pub(crate) async fn ip(&self, lines: &str) -> Result<()> {
        let mut command = Command::new("ip");
        run_with(command.args(["-netns", &self.0, "-batch", "-"]), lines.as_bytes()).await.map(drop)
    }

    /// Sets a kernel parameter of the namespace.
    pub(crate) async fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        let lines = settings.iter().map(|(name, value)| format!("printf {value} >/proc/sys/net/{name}\n"));
        run_with(self.command("sh").arg("-e"), lines.collect::<String>().as_bytes()).await.map(drop)
    }

    /// A program that runs in it, with this machine's files.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Everything that runs in it.
    pub(crate) fn processes(&self) -> Result<Vec<u32>> {
        use std::os::unix::fs::MetadataExt as _;
        let Ok(own) = fs::metadata(self.path()) else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").context("/proc cannot be read")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // Gone meanwhile, or a zombie.
            let Ok(theirs) = fs::metadata(format!("/proc/{pid}/ns/net")) else { continue };
            if (theirs.dev(), theirs.ino()) == (own.dev(), own.ino()) {
                found.push(pid);
            }
        }
        Ok(found)
    }
}

/// Namespaces whose name begins so.
pub(crate) fn namespaces(prefix: &str) -> Vec<Namespace> {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut found: Vec<_> = names.filter(|name| name.starts_with(prefix)).collect();
    found.sort();
    found.into_iter().map(Namespace).collect()
}

/// Carries out lines of arguments for `ip` on this machine itself.
pub(crate) async fn ip(lines: &str) -> Result<()> {
    run_with(Command::new("ip").args(["-batch", "-"]), lines.as_bytes()).await.map(drop)
}

const NAMESPACES: &str = "/run/netns";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_and_clusters_share_no_address() {
        let first = Network::numbered(0).unwrap();
        let last = Network::numbered(31).unwrap();
        assert_eq!(Network::numbered(32), None);
        assert_eq!((first.range(), last.range()), ("198.18.0.0/20".into(), "198.19.240.0/20".into()));
        assert_eq!(last.host(), Ipv4Addr::new(198, 19, 240, 1));
        assert_eq!(first.node(3, 2), Ipv4Addr::new(198, 18, 3, 12));
        assert_eq!(first.cluster(3), "198.18.3.0/24");
        assert_eq!(first.load_balancers(3).next(), Some(Ipv4Addr::new(198, 18, 3, 128)));
        assert_eq!((pods(2), pods_of(2, 1)), ("10.130.0.0/16".into(), "10.130.1.0/24".into()));
    }
}
