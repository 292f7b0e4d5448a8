//! A set of clusters side by side, and everything outside of them.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::try_join_all;
use rustix::process::Signal;
use tokio::process::{ChildStdin, Command};

use crate::{
    caller::Caller,
    cgroup,
    cluster::{Cluster, Set},
    command::until,
    daemon::Process,
    images::{self, Archive},
    network::{self, Namespace, Network, PREFIX},
    progress,
    state::{Description, Home, Shape},
    tools::Tools,
};

/// Clusters that run side by side on one hub.
#[derive(Debug)]
pub struct Clusters {
    set: Arc<Set>,
    shape: Shape,
    /// Stops the set when this process ends, however it ends: it reads from here until there is an end.
    keeper: Option<ChildStdin>,
}

impl Clusters {
    /// Starts a set that stays until it is stopped. `program` is the one of this package.
    ///
    /// # Errors
    /// One of the name is up, something is missing on this machine, or a cluster does not come up: then nothing is left.
    pub async fn start(name: &str, shape: Shape, program: &Path) -> Result<Self> {
        Self::launch(name, shape, program, true).await
    }

    /// The set of that name, if one of at least this shape is up already; else starts one that goes with this process,
    /// however this process ends. What is left of an earlier one is removed before.
    ///
    /// # Errors
    /// Those of [`start`](Self::start).
    pub async fn borrow(name: &str, shape: Shape, program: &Path) -> Result<Self> {
        let home = Home::of(name)?;
        let found = home.read()?.filter(|found| found.stays && hub(&home).exists());
        match found {
            Some(found) => {
                let enough = found.shape.clusters >= shape.clusters && found.shape.nodes >= shape.nodes;
                ensure!(
                    enough,
                    "the clusters {name} are up, but not {} of {} nodes: stop them with `cargo xtask cluster down`",
                    shape.clusters,
                    shape.nodes
                );
                Ok(Self::open(home, &found))
            }
            None => Self::launch(name, shape, program, false).await,
        }
    }

    /// Clusters that others run, by the files that let their administrator in. They cannot be broken from here, have no
    /// [`Caller`]s, and find images by themselves.
    ///
    /// # Errors
    /// There is no such file, or no kubectl.
    pub async fn existing(kubeconfigs: &[PathBuf]) -> Result<Self> {
        let canonical =
            kubeconfigs.iter().map(|file| fs::canonicalize(file).with_context(|| file.display().to_string()));
        let foreign = canonical.collect::<Result<Vec<_>>>()?;
        let clusters = u8::try_from(foreign.len()).context("at most 255 clusters are possible")?;
        ensure!(clusters > 0, "no cluster is named");
        let set = Set {
            home: Home::of("existing")?,
            network: Network::numbered(0).context("there is a first network")?,
            nodes: 0,
            tools: Tools::clients().await?,
            program: PathBuf::new(),
            foreign,
        };
        Ok(Self { set: Arc::new(set), shape: Shape { clusters, nodes: 0 }, keeper: None })
    }

    /// The set of that name that is up.
    ///
    /// # Errors
    /// There is none.
    pub fn find(name: &str) -> Result<Self> {
        let home = Home::of(name)?;
        let found = home.read()?.filter(|_| hub(&home).exists());
        let found =
            found.with_context(|| format!("no clusters {name} are up: start them with `cargo xtask cluster up`"))?;
        Ok(Self::open(home, &found))
    }

    fn open(home: Home, found: &Description) -> Self {
        let tools = Tools { kubernetes: found.kubernetes.clone(), cni: found.cni.clone() };
        let (nodes, program) = (found.shape.nodes, found.program.clone());
        let set = Set { home, network: found.network, nodes, tools, program, foreign: Vec::new() };
        Self { set: Arc::new(set), shape: found.shape, keeper: None }
    }

    async fn launch(name: &str, shape: Shape, program: &Path, stays: bool) -> Result<Self> {
        ensure!((1..=15).contains(&shape.clusters), "{} clusters: 1 to 15 are possible", shape.clusters);
        ensure!((1..=50).contains(&shape.nodes), "{} nodes: 1 to 50 are possible", shape.nodes);
        let home = Home::of(name)?;
        let tools = Tools::provide().await?;
        let images = images::of_nodes(&tools).await?;
        // Waits for a keeper that is still stopping the one before.
        let lock = home.clone();
        let _lock = tokio::task::spawn_blocking(move || lock.lock()).await??;
        // What a restart of the machine has left is removed like everything else.
        if home.read()?.is_some_and(|found| found.stays) && hub(&home).exists() {
            bail!("the clusters {name} are up already");
        }
        remove(&home).await?;
        let (kubernetes, cni, program) = (tools.kubernetes.clone(), tools.cni.clone(), program.to_owned());
        let description = home.claim(|network| Description { shape, network, kubernetes, cni, program, stays })?;
        let mut clusters = Self::open(home, &description);
        if !stays {
            clusters.keeper = Some(keeper(&clusters.set.program, name)?);
        }
        if let Err(error) = clusters.up(&images).await {
            if std::env::var_os(KEEP_FAILED).is_none() {
                remove(&clusters.set.home).await?;
            }
            return Err(error);
        }
        Ok(clusters)
    }

    async fn up(&self, images: &[Archive; 2]) -> Result<()> {
        let (hub, network) = (self.hub(), self.network());
        hub.add().await?;
        hub.ip("link add bridge type bridge forward_delay 0\nlink set bridge up").await?;
        let port = host_port(network);
        network::ip(&format!(
            "link add {port} type veth peer name host netns {}
address add {}/{PREFIX} dev {port}
link set {port} up",
            hub.name(),
            network.host()
        ))
        .await?;
        hub.ip("link set host master bridge up").await?;
        try_join_all(self.all().iter().map(|cluster| cluster.up(&hub, images))).await.map(drop)
    }

    /// All clusters.
    #[must_use]
    pub fn all(&self) -> Vec<Cluster> {
        (1..=self.shape.clusters).map(|number| Cluster::new(self.set.clone(), number)).collect()
    }

    /// A cluster, from 1.
    ///
    /// # Errors
    /// There are fewer.
    pub fn cluster(&self, number: u8) -> Result<Cluster> {
        let all = self.shape.clusters;
        ensure!((1..=all).contains(&number), "there is no cluster {number}: they are numbered from 1 to {all}");
        Ok(Cluster::new(self.set.clone(), number))
    }

    /// The programs that the clusters are made of.
    #[must_use]
    pub fn tools(&self) -> &Tools {
        &self.set.tools
    }

    /// How many of what there are.
    #[must_use]
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// Its addresses.
    #[must_use]
    pub fn network(&self) -> Network {
        self.set.network
    }

    /// Puts images on all nodes of all clusters.
    ///
    /// # Errors
    /// A node does not take one.
    pub async fn load(&self, images: &[Archive]) -> Result<()> {
        try_join_all(self.all().iter().map(|cluster| cluster.load(images))).await.map(drop)
    }

    /// Somebody outside of all clusters, with an address of their own: anew, if there was one of that index.
    ///
    /// # Errors
    /// The index is too high.
    pub async fn caller(&self, index: u8) -> Result<Caller> {
        ensure!(index < 200, "caller {index}: 0 to 199 are possible");
        ensure!(self.set.foreign.is_empty(), "clusters that others run have no callers with addresses of their own");
        Caller::new(&self.set.home, self.hub(), index, self.network().caller(index)).await
    }

    /// The address of this machine, which is outside of all clusters, too.
    #[must_use]
    pub fn host(&self) -> Ipv4Addr {
        self.network().host()
    }

    fn hub(&self) -> Namespace {
        hub(&self.set.home)
    }
}

/// Stops a set of clusters, or what is left of it, and removes all that it has left. Nothing there is no error.
///
/// # Errors
/// Something does not go.
pub async fn stop(name: &str) -> Result<()> {
    let home = Home::of(name)?;
    let lock = home.clone();
    let _lock = tokio::task::spawn_blocking(move || lock.lock()).await??;
    remove(&home).await
}

/// Ends every process in a namespace of the set, then removes what they were in. Names alone tell what belongs to it, so
/// that nothing has to have been written down.
async fn remove(home: &Home) -> Result<()> {
    let namespaces = network::namespaces(&home.prefix());
    let left = !namespaces.is_empty() || home.directory.exists();
    let gone = async {
        until("the end of all processes", PATIENCE, async || {
            let mut running = 0;
            for namespace in &namespaces {
                for process in namespace.processes()?.into_iter().filter_map(Process::of) {
                    process.signal(Signal::KILL)?;
                    running += 1;
                }
            }
            Ok((running == 0).then_some(()))
        })
        .await?;
        for namespace in &namespaces {
            namespace.delete().await?;
        }
        if let Some(found) = home.read()?
            && fs::exists(format!("/sys/class/net/{}", host_port(found.network)))?
        {
            // A link goes with its peer's namespace, but not at once.
            let port = format!("link delete {}", host_port(found.network));
            let _ = network::ip(&port).await;
        }
        cgroup::remove(&format!("/antiphon/{}", home.name)).await?;
        match fs::remove_dir_all(&home.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("{} cannot be removed", home.directory.display()))
            }
            _ => Ok(()),
        }
    };
    match left {
        true => progress::step(&format!("removing clusters {}", home.name), gone).await,
        false => gone.await,
    }
}

/// Another process, of the same program, that stops the set when its standard input ends.
fn keeper(program: &Path, name: &str) -> Result<ChildStdin> {
    let mut command = Command::new("setsid");
    command.arg(program).args(["keep", name]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().context("the clusters' keeper cannot be started")?;
    child.stdin.take().context("its standard input is a pipe")
}

fn hub(home: &Home) -> Namespace {
    Namespace::named(format!("{}hub", home.prefix()))
}

/// This machine's port on the hub.
fn host_port(network: Network) -> String {
    format!("antiphon{}", network.number())
}

const PATIENCE: Duration = Duration::from_secs(60);
/// Set, it leaves clusters that did not come up as they are, to be looked at.
const KEEP_FAILED: &str = "ANTIPHON_E2E_KEEP_FAILED";
