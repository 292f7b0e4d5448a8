//! One cluster: a control plane and nodes, all reached over one link.

mod node;
mod start;

use std::{ffi::OsStr, net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tokio::process::Command;

use crate::{
    command::{run, run_with, until},
    daemon::Daemon,
    images::Archive,
    network::{Namespace, Network},
    parts::{API_PORT, Part},
    path::Path,
    progress,
    state::Home,
    tools::Tools,
};

pub use node::Node;

/// What all clusters of a set share.
#[derive(Debug)]
pub(crate) struct Set {
    pub(crate) home: Home,
    pub(crate) network: Network,
    pub(crate) nodes: u8,
    pub(crate) tools: Tools,
    /// The program of this package, which gives addresses to Services.
    pub(crate) program: PathBuf,
    /// Configurations of clusters that others run; none: all are made here.
    pub(crate) foreign: Vec<PathBuf>,
}

/// A running cluster, or one that has been.
#[derive(Clone, Debug)]
pub struct Cluster {
    set: Arc<Set>,
    number: u8,
}

impl Cluster {
    pub(crate) const fn new(set: Arc<Set>, number: u8) -> Self {
        Self { set, number }
    }

    /// From 1.
    #[must_use]
    pub const fn number(&self) -> u8 {
        self.number
    }

    /// The programs that it is made of.
    #[must_use]
    pub fn tools(&self) -> &Tools {
        &self.set.tools
    }

    /// A configuration that lets this machine, and callers, administer the cluster.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        match self.set.foreign.get(usize::from(self.number) - 1) {
            Some(file) => file.clone(),
            None => self.home().join("admin.kubeconfig"),
        }
    }

    /// Where its API server listens.
    #[must_use]
    pub fn server(&self) -> String {
        format!("https://{}:{API_PORT}", self.address())
    }

    /// The address of its control plane.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.set.network.control_plane(self.number)
    }

    /// A client of the API server, for the tests' own requests.
    ///
    /// # Errors
    /// The configuration cannot be read.
    pub async fn client(&self) -> Result<kube::Client> {
        let config = kube::config::Kubeconfig::read_from(self.kubeconfig())?;
        let config = kube::Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await?;
        Ok(kube::Client::try_from(config)?)
    }

    /// kubectl with these arguments, to be run.
    pub fn kubectl_command(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(self.set.tools.program("kubectl"));
        command.env("KUBECONFIG", self.kubeconfig()).args(arguments);
        command
    }

    /// What kubectl says.
    ///
    /// # Errors
    /// It fails; with what it says then.
    pub async fn kubectl(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String> {
        run(&mut self.kubectl_command(arguments)).await
    }

    /// Applies manifests, YAML or JSON, on the server's side.
    ///
    /// # Errors
    /// The API server refuses one of them.
    pub async fn apply(&self, manifests: &str) -> Result<String> {
        let arguments = ["apply", "--server-side", "--force-conflicts", "--filename", "-"];
        run_with(&mut self.kubectl_command(arguments), manifests.as_bytes()).await
    }

    /// What helm says.
    ///
    /// # Errors
    /// It fails; with what it says then.
    pub async fn helm(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String> {
        let mut command = Command::new(self.set.tools.helm().await?);
        run(command.env("KUBECONFIG", self.kubeconfig()).args(arguments)).await
    }

    /// The nodes, whether they run or not; none of a cluster that others run.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        (1..=self.set.nodes).map(|number| self.node(number)).collect()
    }

    /// A node, from 1.
    #[must_use]
    pub fn node(&self, number: u8) -> Node {
        Node::new(self.clone(), number)
    }

    /// Takes the link away that connects the cluster with everything else. Inside, all goes on. Also this machine's
    /// kubectl does not reach it any more.
    ///
    /// # Errors
    /// There is no such link.
    pub async fn cut(&self) -> Result<()> {
        self.own()?;
        self.cloud().ip("link set uplink down").await
    }

    /// Undoes [`cut`](Self::cut).
    ///
    /// # Errors
    /// There is no such link.
    pub async fn join(&self) -> Result<()> {
        self.own()?;
        self.cloud().ip("link set uplink up").await
    }

    /// The way to it, from everywhere outside, to give it faults.
    ///
    /// # Errors
    /// No cable can be laid.
    pub async fn path(&self) -> Result<Path> {
        self.own()?;
        let hub = Namespace::named(format!("{}hub", self.set.home.prefix()));
        Path::lay(&self.set.home, hub, &format!("c{}", self.number)).await
    }

    /// Starts a part that does not run. It is not ready yet when this returns.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, part: Part) -> Result<()> {
        self.own()?;
        let program = match part {
            Part::LoadBalancers => self.set.program.clone(),
            part => self.set.tools.program(part.name()),
        };
        let mut command = self.cloud().command(program);
        command.args(part.arguments(&self.home(), self.set.network, self.number));
        self.daemon(part).start(command).map(drop)
    }

    /// Stops a part in good order and waits for its end.
    ///
    /// # Errors
    /// It does not end.
    pub async fn stop(&self, part: Part) -> Result<()> {
        self.own()?;
        self.daemon(part).end(Signal::TERM).await
    }

    /// Ends a part at once, as a crash does.
    ///
    /// # Errors
    /// It does not end.
    pub async fn kill(&self, part: Part) -> Result<()> {
        self.own()?;
        self.daemon(part).end(Signal::KILL).await
    }

    /// Sends a part a signal: `STOP` makes it hang, `CONT` go on.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, part: Part, signal: Signal) -> Result<()> {
        self.daemon(part).signal(signal)
    }

    /// Whether a part runs.
    #[must_use]
    pub fn runs(&self, part: Part) -> bool {
        self.daemon(part).process().is_some()
    }

    /// Waits until the API server says that it is ready.
    ///
    /// # Errors
    /// It does not within a minute.
    pub async fn ready(&self) -> Result<()> {
        let what = format!("the API server of cluster {}", self.number);
        until(&what, PATIENCE, async || {
            let runs = !self.set.foreign.is_empty() || self.runs(Part::ApiServer);
            ensure!(runs, "it does not run: see {}", self.log(Part::ApiServer.name()).display());
            self.kubectl(["get", "--raw", "/readyz", "--request-timeout=5s"]).await.map(Some)
        })
        .await
        .map(drop)
    }

    /// Puts images on all nodes. Those that are there already are skipped. A cluster that others run has to find them by
    /// itself.
    ///
    /// # Errors
    /// A node does not take one.
    pub async fn load(&self, images: &[Archive]) -> Result<()> {
        let what = format!("loading images into cluster {}", self.number);
        let nodes = self.nodes();
        let all = nodes.iter().map(|node| node.load(images));
        progress::step(&what, futures::future::try_join_all(all)).await.map(drop)
    }

    /// Every write that its API server was asked for, a JSON object in each line.
    #[must_use]
    pub fn audit_log(&self) -> PathBuf {
        self.log("audit")
    }

    /// The words of one of its parts.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.home().join(format!("log/{name}.log"))
    }

    /// Where the control plane and the cluster's bridge are.
    #[must_use]
    pub fn cloud(&self) -> Namespace {
        Namespace::named(format!("{}{}", self.set.home.prefix(), self.number))
    }

    /// Nobody breaks what others run.
    fn own(&self) -> Result<()> {
        ensure!(
            self.set.foreign.is_empty(),
            "cluster {} is run by others ({}): it cannot be broken from here",
            self.number,
            self.kubeconfig().display()
        );
        Ok(())
    }

    fn daemon(&self, part: Part) -> Daemon {
        Daemon::of(&self.home(), part.name())
    }

    fn home(&self) -> PathBuf {
        self.set.home.directory.join(self.number.to_string())
    }
}

const PATIENCE: Duration = Duration::from_secs(60);
