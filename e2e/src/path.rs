//! The way from the hub to a cluster or a caller, with the faults of real networks.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

use crate::{command::until, daemon::Daemon, network::Namespace, state::Home, tools::Tools};

/// What happens to packets that go one way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    /// Of every packet.
    pub delay: Duration,
    /// Up to so much is added, evenly.
    pub jitter: Duration,
    /// Share of packets that get lost, 0 to 1.
    pub loss: f64,
    /// Whether a packet may arrive before an earlier one.
    pub overtaking: bool,
}

/// What became of packets that went one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Counts {
    /// Arrived.
    pub carried: u64,
    /// Did not.
    pub lost: u64,
}

/// Both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Carried {
    /// From the hub to the cluster or caller.
    #[serde(rename = "up")]
    pub to: Counts,
    /// From there to the hub.
    #[serde(rename = "down")]
    pub from: Counts,
}

/// A link of the hub: a cable that does what it is told with what it carries. It stays until it is removed.
#[derive(Clone, Debug)]
pub struct Path {
    hub: Namespace,
    /// The hub's end of the link, `c1` or `caller7`.
    port: String,
    daemon: Daemon,
    socket: PathBuf,
}

impl Path {
    /// Whether there is a cable or not.
    pub(crate) fn of(home: &Home, hub: Namespace, port: &str) -> Self {
        let name = format!("cable-{port}");
        let socket = home.directory.join(format!("{name}.socket"));
        Self { hub, port: port.to_owned(), daemon: Daemon::of(&home.directory, &name), socket }
    }

    pub(crate) fn is_laid(&self) -> bool {
        self.daemon.process().is_some()
    }

    /// Puts a cable between the hub's bridge and the link, unless there is one.
    pub(crate) async fn lay(home: &Home, hub: Namespace, port: &str) -> Result<Self> {
        let path = Self::of(home, hub, port);
        if path.is_laid() {
            return Ok(path);
        }
        std::fs::create_dir_all(home.directory.join("log"))?;
        let [inner, outer, bridge] = path.devices();
        let mut command = path.hub.command(Tools::cable().await?);
        command.args([&inner, &outer]).arg(&path.socket);
        path.daemon.start(command)?;
        until("a cable", PATIENCE, async || path.carried().await.map(Some)).await?;
        path.hub
            .ip(&format!(
                "link add {bridge} type bridge forward_delay 0
link set {bridge} up
link set {inner} master bridge up
link set {outer} master {bridge} up
link set {port} master {bridge}"
            ))
            .await?;
        Ok(path)
    }

    /// From now on, packets to the cluster or caller, and from it, have these faults. Equal seeds treat equal sequences of
    /// packets alike.
    ///
    /// # Errors
    /// A share is none, or the cable has ended.
    pub async fn set(&self, to: Faults, from: Faults, seed: u64) -> Result<Carried> {
        for Faults { loss, .. } in [to, from] {
            ensure!((0.0..=1.0).contains(&loss), "a loss of {loss}: 0 to 1 are possible");
        }
        let setting = Setting { seed, up: to.into(), down: from.into() };
        self.ask(&serde_json::to_string(&setting)?).await
    }

    /// What became of all packets so far.
    ///
    /// # Errors
    /// The cable has ended.
    pub async fn carried(&self) -> Result<Carried> {
        self.ask("null").await
    }

    /// Connects the link with the hub's bridge again. What is under way is lost.
    ///
    /// # Errors
    /// The link is gone.
    pub async fn remove(self) -> Result<()> {
        let [_, _, bridge] = self.devices();
        self.hub.ip(&format!("link set {} master bridge\nlink delete {bridge}", self.port)).await?;
        self.daemon.end(Signal::KILL).await
    }

    async fn ask(&self, line: &str) -> Result<Carried> {
        let stream = UnixStream::connect(&self.socket).await;
        let mut stream = stream.with_context(|| format!("{}: no cable answers", self.socket.display()))?;
        stream.write_all(format!("{line}\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        serde_json::from_str(&answer).with_context(|| format!("the cable says: {answer}"))
    }

    /// Both ends of the cable, and the bridge that joins the outer one with the link.
    fn devices(&self) -> [String; 3] {
        ["i", "o", "b"].map(|end| format!("{}-{end}", self.port))
    }
}

/// As the cable reads it.
#[derive(Serialize)]
struct Setting {
    seed: u64,
    up: Told,
    down: Told,
}

/// Times in microseconds.
#[derive(Serialize)]
struct Told {
    delay: u64,
    jitter: u64,
    loss: f64,
    overtaking: bool,
}

impl From<Faults> for Told {
    fn from(faults: Faults) -> Self {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let Faults { delay, jitter, loss, overtaking } = faults;
        Self { delay: micros(delay), jitter: micros(jitter), loss, overtaking }
    }
}

const PATIENCE: Duration = Duration::from_secs(20);
