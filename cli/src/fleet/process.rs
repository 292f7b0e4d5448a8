//! One process of a fleet: how it is started, watched, stopped and killed.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    net::Ipv4Addr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use antiphon_crds::compile::PoolPlan;
use antiphon_runtime::shutdown::PARENT_VARIABLE;
use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::{Child, Command},
    time::timeout,
};

pub(super) const ROUTER_PUBLIC: u16 = 7443;
pub(super) const ROUTER_INTERNAL: u16 = 7444;
const RELAY_PUBLIC: u16 = 4433;
const RELAY_TUNNEL: u16 = 4434;
const WORKER_TUNNEL: u16 = 4500;
const WORKER_CONTROL: u16 = 4480;
/// Port of `/metrics`, `/readyz` and `/livez`, the same for every process.
pub(crate) const ADMIN: u16 = 7445;
/// Lines of an error with its causes.
const MOST_CAUSES: usize = 12;

/// Which program. In the order to start them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `antiphon-router`.
    Router,
    /// `antiphon-relay`.
    Relay,
    /// `antiphon-worker`.
    Worker,
}

impl Kind {
    const fn binary(self) -> &'static str {
        match self {
            Self::Router => "antiphon-router",
            Self::Relay => "antiphon-relay",
            Self::Worker => "antiphon-worker",
        }
    }

    /// For people.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Relay => "relay",
            Self::Worker => "worker",
        }
    }
}

/// What to start.
#[derive(Debug, Clone)]
pub struct ProcessSpec {
    /// Program.
    pub kind: Kind,
    /// Name, unique in its region.
    pub name: String,
    /// Region.
    pub region: String,
    /// Its address.
    pub ip: Ipv4Addr,
    args: Vec<String>,
}

impl ProcessSpec {
    /// `region/name`.
    #[must_use]
    pub fn title(&self) -> String {
        format!("{} {}/{}", self.kind.label(), self.region, self.name)
    }

    fn new(kind: Kind, name: &str, region: &str, ip: Ipv4Addr, identity: &Path) -> Self {
        let spec = Self { kind, name: name.into(), region: region.into(), ip, args: Vec::new() };
        spec.with("region", region).with("identity", identity.display()).port("admin", ADMIN)
    }

    fn with(mut self, flag: &str, value: impl ToString) -> Self {
        self.args.extend([format!("--{flag}"), value.to_string()]);
        self
    }

    fn with_each(self, flag: &str, values: &[String]) -> Self {
        values.iter().fold(self, |spec, value| spec.with(flag, value))
    }

    fn port(self, flag: &str, port: u16) -> Self {
        let address = format!("{}:{port}", self.ip);
        self.with(flag, address)
    }

    pub(super) fn router(region: &str, ip: Ipv4Addr, identity: PathBuf, root: PathBuf) -> Self {
        Self::new(Kind::Router, "router-0", region, ip, &identity)
            .port("public", ROUTER_PUBLIC)
            .port("internal", ROUTER_INTERNAL)
            .with("root", root.display())
    }

    pub(super) fn relay(
        name: &str,
        region: &str,
        ip: Ipv4Addr,
        identity: PathBuf,
        routers: &[String],
        drain: Duration,
    ) -> Self {
        Self::new(Kind::Relay, name, region, ip, &identity)
            .with("name", name)
            .port("public", RELAY_PUBLIC)
            .port("tunnel", RELAY_TUNNEL)
            .with_each("router", routers)
            // Many processes share few cores here.
            .with("cores", 1)
            .with("pin", false)
            .with("drain-deadline", humantime::format_duration(drain))
    }

    pub(super) fn worker(
        name: &str,
        pool: &PoolPlan,
        ip: Ipv4Addr,
        identity: PathBuf,
        routers: &[String],
        drain: Duration,
    ) -> Self {
        Self::new(Kind::Worker, name, &pool.region, ip, &identity)
            .with("name", name)
            .with("agent", &pool.agent)
            .with("gpu-class", pool.gpu_class.as_deref().unwrap_or_default())
            .with("slots", pool.slots)
            .port("tunnel", WORKER_TUNNEL)
            .port("control", WORKER_CONTROL)
            .with_each("router", routers)
            .with("drain-deadline", humantime::format_duration(drain))
    }
}

/// A started process.
#[derive(Debug)]
pub struct Process {
    spec: ProcessSpec,
    binary: PathBuf,
    log: PathBuf,
    child: Child,
    started: Instant,
    /// How this life ended, once that was noticed.
    end: Option<ExitStatus>,
    /// Ended on purpose: not to be started again.
    stopped: bool,
    restarts: u32,
}

impl Process {
    pub(super) fn start(spec: ProcessSpec, binaries: &Path, dir: &Path) -> anyhow::Result<Self> {
        let logs = dir.join("logs");
        std::fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        let log = logs.join(format!("{}-{}.log", spec.region, spec.name));
        File::create(&log).with_context(|| log.display().to_string())?;
        let spec = keeping_state(spec, dir)?;
        let binary = binaries.join(spec.kind.binary());
        let child = spawn(&spec, &binary, &log)?;
        Ok(Self { spec, binary, log, child, started: Instant::now(), end: None, stopped: false, restarts: 0 })
    }

    /// What it was started from.
    #[must_use]
    pub const fn spec(&self) -> &ProcessSpec {
        &self.spec
    }

    /// Operating-system process id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Where it serves `/metrics`, `/readyz` and `/livez`: `IP:PORT`.
    #[must_use]
    pub fn admin(&self) -> String {
        format!("{}:{ADMIN}", self.spec.ip)
    }

    /// Where it writes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Waits until `/readyz` says so.
    ///
    /// # Errors
    /// The process ends first, or is not ready in time; with the last lines of its log.
    pub(super) async fn wait_ready(&mut self, deadline: Duration) -> anyhow::Result<()> {
        self.wait_for("/readyz", deadline).await
    }

    /// Waits until `/livez` answers: it serves, but may still lack something.
    ///
    /// # Errors
    /// As [`Self::wait_ready`].
    pub(super) async fn wait_live(&mut self, deadline: Duration) -> anyhow::Result<()> {
        self.wait_for("/livez", deadline).await
    }

    async fn wait_for(&mut self, path: &str, deadline: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + deadline;
        let mut last = String::from("does not answer");
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended ({status}); {}", self.spec.title(), self.log_tail());
            }
            match http_get(&self.admin(), path).await {
                Ok((200, _)) => return Ok(()),
                Ok((_, body)) => last = body.trim().to_owned(),
                // Not listening yet.
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("{} is not ready after {deadline:?} ({last}); {}", self.spec.title(), self.log_tail())
    }

    /// The text of its `/metrics`.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn metrics(&self) -> anyhow::Result<String> {
        let (status, body) = http_get(&self.admin(), "/metrics").await?;
        ensure!(status == 200, "{}: /metrics says {status}", self.spec.title());
        Ok(body)
    }

    fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        format!("see {}\n  {}", self.log.display(), tail(&text).join("\n  "))
    }

    /// Sends SIGTERM: the planned stop. Returns at once.
    ///
    /// # Errors
    /// It has ended already.
    pub fn terminate(&mut self) -> anyhow::Result<()> {
        self.stopped = true;
        self.signal(Signal::TERM)
    }

    /// Sends SIGKILL: the unplanned end. It is not started again.
    ///
    /// # Errors
    /// It has ended already.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.stopped = true;
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let pid = pid.with_context(|| format!("{} has ended", self.spec.title()))?;
        Ok(kill_process(pid, signal)?)
    }

    /// Waits until it has ended, `deadline` at most; says how.
    ///
    /// # Errors
    /// It still runs.
    pub async fn ended(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        let ended = timeout(deadline, self.child.wait()).await;
        Ok(ended.with_context(|| format!("{} still runs after {deadline:?}", self.spec.title()))??)
    }

    /// Asks it to stop and, after the deadline and a little, kills it.
    pub(super) async fn stop(&mut self, deadline: Duration) {
        if self.terminate().is_err() {
            return;
        }
        if self.ended(deadline + Duration::from_secs(2)).await.is_err() {
            // The handle's drop would do the same; waiting for it leaves no zombie.
            let _ = self.child.kill().await;
        }
    }

    /// Starts it again after [`Self::kill`] or [`Self::terminate`], as soon as it has ended.
    ///
    /// # Errors
    /// It cannot be started.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.child.wait().await?;
        self.begin()
    }

    fn begin(&mut self) -> anyhow::Result<()> {
        self.child = spawn(&self.spec, &self.binary, &self.log)?;
        (self.started, self.end, self.stopped) = (Instant::now(), None, false);
        Ok(())
    }

    /// Completes when it ends; never once that was noticed.
    pub(super) async fn life(&mut self) {
        if self.end.is_some() || self.child.wait().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// How it ended, the first time that this is asked after it did.
    pub(super) fn notice_end(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        if self.end.is_some() {
            return Ok(None);
        }
        self.end = self.child.try_wait()?;
        Ok(self.end)
    }

    /// Whether it should run and has not for this long at least: it cannot be started, or ends at once again and again.
    pub(super) fn is_missing_for(&self, least: Duration) -> bool {
        self.end.is_some() && !self.stopped && self.started.elapsed() >= least
    }

    /// Starts it again if it was noticed to have ended by itself; says how it had.
    pub(super) fn restart_if_ended(&mut self) -> anyhow::Result<Option<String>> {
        let Some(status) = self.end.filter(|_| !self.stopped) else { return Ok(None) };
        // A process that ends as soon as it begins is tried ever more slowly.
        let pause = Duration::from_millis(200 << self.restarts.min(6));
        if self.started.elapsed() < pause {
            return Ok(None);
        }
        self.restarts = if self.started.elapsed() > Duration::from_secs(60) { 0 } else { self.restarts + 1 };
        self.begin()?;
        Ok(Some(format!("ended ({status})")))
    }
}

/// A directory for a process's state. It is empty when a fleet starts: the workers of an earlier one are gone, all of
/// them, and a route to them would never leave. A process that is started again finds what it had.
fn keeping_state(spec: ProcessSpec, dir: &Path) -> anyhow::Result<ProcessSpec> {
    let state = dir.join("state").join(&spec.region).join(&spec.name);
    match std::fs::remove_dir_all(&state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| state.display().to_string());
        }
        _ => {}
    }
    DirBuilder::new().recursive(true).mode(0o700).create(&state).with_context(|| state.display().to_string())?;
    Ok(spec.with("state", state.display()))
}

fn spawn(spec: &ProcessSpec, binary: &Path, log: &Path) -> anyhow::Result<Child> {
    let output = OpenOptions::new().append(true).open(log).with_context(|| log.display().to_string())?;
    Command::new(binary)
        .args(&spec.args)
        .env(PARENT_VARIABLE, std::process::id().to_string())
        .env("NO_COLOR", "1")
        // An error's causes say what is wrong; where in the program it arose does not. Panics still show theirs.
        .env("RUST_LIB_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {}", binary.display()))
}

/// The last lines of a log: the error that a process ended with and its causes, if it did.
fn tail(log: &str) -> Vec<&str> {
    let lines: Vec<_> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines.len().saturating_sub(MOST_CAUSES);
    let error = lines[last..].iter().rposition(|line| line.starts_with("Error: "));
    lines[error.map_or(lines.len().saturating_sub(3), |at| last + at)..].to_vec()
}

/// The directory with the other programs: beside this one.
pub(super) fn find_binaries() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let mut dir = own.parent().context("this program is in no directory")?;
    // Test binaries are one level deeper than the programs.
    if dir.ends_with("deps") {
        dir = dir.parent().unwrap_or(dir);
    }
    for kind in [Kind::Router, Kind::Relay, Kind::Worker] {
        let path = dir.join(kind.binary());
        ensure!(
            path.is_file(),
            "{} is missing: build all programs with `cargo build --workspace --bins`",
            path.display()
        );
    }
    Ok(dir.to_owned())
}

/// A plain HTTP/1.0 GET of a local admin port: status and body.
async fn http_get(address: &str, path: &str) -> anyhow::Result<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = timeout(Duration::from_secs(2), exchange).await??;
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("not an HTTP answer")?;
    Ok((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_ends_with_the_error_and_its_causes() {
        let log =
            "INFO one\nINFO two\nINFO three\nError: no identity\n\nCaused by:\n    0: reading\n    1: not there\n";
        assert_eq!(tail(log), ["Error: no identity", "Caused by:", "    0: reading", "    1: not there"]);
        assert_eq!(tail("a\nb\nc\nd\n"), ["b", "c", "d"]);
        assert_eq!(tail(""), [""; 0]);
    }
}
