//! One node of a cluster.

use std::{ffi::OsStr, fs, net::Ipv4Addr, os::unix::fs::PermissionsExt as _, path::PathBuf};

use anyhow::{Context as _, Result};
use rustix::process::Signal;
use tokio::process::Command;

use super::Cluster;
use crate::{
    cgroup,
    command::run,
    daemon::Daemon,
    images::Archive,
    network::{Namespace, PREFIX, pods_of},
    parts::{self, NODE_HOME},
    pki::{Authority, Subject, write_private},
};

/// A node: containerd, kubelet and kube-proxy, with a network, mounts and process numbers of its own.
#[derive(Clone, Debug)]
pub struct Node {
    cluster: Cluster,
    number: u8,
}

impl Node {
    pub(super) const fn new(cluster: Cluster, number: u8) -> Self {
        Self { cluster, number }
    }

    /// As Kubernetes knows it: `c1-n2` is the second of the first cluster.
    #[must_use]
    pub fn name(&self) -> String {
        format!("c{}-n{}", self.cluster.number, self.number)
    }

    /// Where its NodePorts and host ports are.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.cluster.set.network.node(self.cluster.number, self.number)
    }

    /// Its network.
    #[must_use]
    pub fn namespace(&self) -> Namespace {
        Namespace::named(format!("{}-{}", self.cluster.cloud().name(), self.number))
    }

    /// A program that runs on it, among its processes and mounts.
    ///
    /// # Errors
    /// The node does not run.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let process = self.daemon().process();
        let pid = process.with_context(|| format!("node {} does not run: see {}", self.name(), self.log("node")))?.pid;
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={pid}")).args(["--mount", "--net", "--uts"]);
        command.arg(format!("--pid=/proc/{pid}/ns/pid_for_children")).arg("--").arg(program);
        Ok(command)
    }

    /// Puts images on it. Those that are there already are skipped.
    pub(crate) async fn load(&self, images: &[Archive]) -> Result<()> {
        for image in images {
            let stamp = self.home().join("loaded").join(image.reference.replace('/', "_"));
            if fs::read_to_string(&stamp).is_ok_and(|id| id == image.id) {
                continue;
            }
            let mut command = self.command("ctr")?;
            run(command.args(["--namespace", "k8s.io", "images", "import"]).arg(&image.file)).await?;
            fs::write(stamp, &image.id)?;
        }
        Ok(())
    }

    /// Ends all of it at once, as a power cut does: nothing is told to anybody.
    ///
    /// # Errors
    /// It does not end.
    pub async fn kill(&self) -> Result<()> {
        self.daemon().end(Signal::KILL).await?;
        // Of pods that ended with it.
        cgroup::remove(&self.cgroup()).await
    }

    /// Starts it, unless it runs; it has what was on its disk. It is not ready yet when this returns.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self) -> Result<()> {
        if self.daemon().process().is_some() {
            return Ok(());
        }
        cgroup::make(&self.cgroup())?;
        let mut command = self.namespace().command("unshare");
        command.args(["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--propagation", "private"]);
        command.arg("bash").arg(self.home().join("node.sh"));
        let zone = format!("cloud-{}", self.cluster.number);
        command.env("HOME_DIR", self.home()).env("KUBE", &self.cluster.set.tools.kubernetes);
        command.env("NAME", self.name()).env("ADDRESS", self.address().to_string());
        command.env("LABELS", format!("topology.kubernetes.io/region={zone},topology.kubernetes.io/zone={zone}-a"));
        self.daemon().start(command).map(drop)
    }

    /// Takes the link away that connects it with its cluster and everything else.
    ///
    /// # Errors
    /// There is no such link.
    pub async fn cut(&self) -> Result<()> {
        self.cluster.cloud().ip(&format!("link set node{} down", self.number)).await
    }

    /// Undoes [`cut`](Self::cut).
    ///
    /// # Errors
    /// There is no such link.
    pub async fn join(&self) -> Result<()> {
        self.cluster.cloud().ip(&format!("link set node{} up", self.number)).await
    }

    /// The control group of its pods.
    pub(crate) fn cgroup(&self) -> String {
        format!("/antiphon/{}/{}", self.cluster.set.home.name, self.name())
    }

    fn daemon(&self) -> Daemon {
        Daemon::of(&self.home(), "node")
    }

    fn home(&self) -> PathBuf {
        self.cluster.home().join(format!("node{}", self.number))
    }

    fn log(&self, name: &str) -> String {
        self.home().join(format!("log/{name}.log")).display().to_string()
    }

    /// Connects it with its cluster's bridge.
    pub(super) async fn connect(&self) -> Result<()> {
        let (cloud, own) = (self.cluster.cloud(), self.namespace());
        own.add().await?;
        let (number, name) = (self.number, own.name());
        cloud
            .ip(&format!(
                "link add node{number} type veth peer name eth0 netns {name}
link set node{number} master bridge up
route add {} via {}",
                pods_of(self.cluster.number, number),
                self.address()
            ))
            .await?;
        let neighbours = self.cluster.nodes().into_iter().filter(|node| node.number != number);
        let routes = neighbours
            .map(|node| format!("route add {} via {}\n", pods_of(self.cluster.number, node.number), node.address()));
        let routes: String = routes.collect();
        own.ip(&format!("address add {}/{PREFIX} dev eth0\nlink set eth0 up\n{routes}", self.address())).await?;
        own.sysctl(&[("ipv4/ip_forward", "1"), ("ipv4/conf/all/send_redirects", "0")]).await
    }

    /// Writes its files.
    pub(super) fn prepare(&self, authority: &Authority, images: &[Archive]) -> Result<()> {
        let (home, set, cluster) = (self.home(), &self.cluster.set, self.cluster.number);
        for directory in ["cni", "images", "lib", "loaded", "log", "pki"] {
            fs::create_dir_all(home.join(directory))?;
        }
        let write = |name: &str, text: &str| write_private(&home.join(name), text);
        let name = self.name();
        let user = format!("system:node:{name}");
        let kubelet = authority.issue(&Subject { user: &user, group: Some("system:nodes"), ..Subject::default() })?;
        let proxy = authority.issue(&Subject { user: "system:kube-proxy", ..Subject::default() })?;
        let serving =
            Subject { user: &user, hosts: &[&name], addresses: &[self.address().into()], ..Subject::default() };
        authority.issue(&serving)?.write(&home.join("pki"), "kubelet")?;
        write("pki/ca.crt", &authority.pair.certificate)?;
        let server = self.cluster.server();
        write("kubelet.kubeconfig", &authority.kubeconfig(&server, &kubelet))?;
        write("proxy.kubeconfig", &authority.kubeconfig(&server, &proxy))?;
        write("kubelet.json", &parts::kubelet(set.network, cluster, self.number, &self.cgroup()).to_string())?;
        write("proxy.json", &parts::proxy(cluster, &name).to_string())?;
        write("cni/10-pods.conflist", &parts::cni(cluster, self.number).to_string())?;
        write("containerd.toml", &parts::containerd(&set.tools.cni, &images[0].reference))?;
        write("masquerade.nft", &parts::masquerade(set.network, cluster, self.number))?;
        write("resolv.conf", "")?;
        fs::set_permissions(home.join("resolv.conf"), fs::Permissions::from_mode(0o644))?;
        write("node.sh", include_str!("../assets/node.sh"))?;
        for image in images {
            let name = image.file.file_name().context("an archive has a name")?;
            fs::copy(&image.file, home.join("images").join(name))?;
        }
        debug_assert!(NODE_HOME.starts_with("/run/"), "that is the node's own");
        Ok(())
    }
}
