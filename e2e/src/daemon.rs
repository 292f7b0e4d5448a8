//! Processes that outlive the program that started them, known by a file with their number.

use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

use crate::command::until;

/// A process by its number and the time of its start, so that nobody else is ever taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// In clock ticks since the machine's start (proc(5)).
    start: u64,
}

/// Where a process is written down, and where its words go.
#[derive(Clone, Debug)]
pub(crate) struct Daemon {
    pid: PathBuf,
    pub(crate) log: PathBuf,
}

impl Daemon {
    pub(crate) fn of(directory: &Path, name: &str) -> Self {
        Self { pid: directory.join(format!("{name}.pid")), log: directory.join(format!("log/{name}.log")) }
    }

    /// The process, if it runs.
    pub(crate) fn process(&self) -> Option<Process> {
        let text = fs::read_to_string(&self.pid).ok()?;
        let (pid, start) = text.trim().split_once(' ')?;
        let process = Process { pid: pid.parse().ok()?, start: start.parse().ok()? };
        process.runs().then_some(process)
    }

    /// Starts it in a session of its own, unless it runs.
    pub(crate) fn start(&self, command: Command) -> Result<Process> {
        if let Some(running) = self.process() {
            return Ok(running);
        }
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("{} cannot be written", self.log.display()))?;
        let command = command.into_std();
        let mut detached = Command::new("setsid");
        detached.arg(command.get_program()).args(command.get_args());
        detached.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
        // Nothing of the caller's, like proxies, reaches a cluster.
        detached.env_clear().env("PATH", PATH);
        detached.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let child = detached.spawn().context("setsid cannot be started")?;
        let pid = child.id().context("it has just been started")?;
        let process = Process::of(pid).with_context(|| format!("it ended at once: see {}", self.log.display()))?;
        fs::write(&self.pid, format!("{pid} {}\n", process.start))?;
        Ok(process)
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        match self.process() {
            Some(process) => process.signal(signal),
            None => bail!("it does not run: see {}", self.log.display()),
        }
    }

    /// Sends a signal that ends it, if it runs, and waits until it is gone.
    pub(crate) async fn end(&self, signal: Signal) -> Result<()> {
        let Some(process) = self.process() else { return Ok(()) };
        process.signal(signal)?;
        process.signal(Signal::CONT)?;
        let name = self.log.file_stem().unwrap_or_default().to_string_lossy();
        until(&format!("the end of {name}"), PATIENCE, || async { Ok((!process.runs()).then_some(())) }).await
    }
}

impl Process {
    /// Who has the number now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, start: start(pid)? })
    }

    pub(crate) fn runs(self) -> bool {
        start(self.pid) == Some(self.start)
    }

    /// Sends a signal; to who is gone already, nothing.
    pub(crate) fn signal(self, signal: Signal) -> Result<()> {
        let Some(pid) = Pid::from_raw(self.pid.cast_signed()).filter(|_| self.runs()) else { return Ok(()) };
        match kill_process(pid, signal) {
            Err(error) if error != rustix::io::Errno::SRCH => {
                Err(io::Error::from(error)).with_context(|| format!("process {}", self.pid))
            }
            _ => Ok(()),
        }
    }
}

/// When a process started; none if there is no such process, or only what is left for its parent to read.
fn start(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may have anything in it.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    // The 22nd field; the state is the third.
    fields.nth(18)?.parse().ok().filter(|_| !["Z", "X"].contains(&state))
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const PATIENCE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemon_is_found_by_another_process_and_ended() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("log")).unwrap();
        let daemon = Daemon::of(directory.path(), "cat");
        let mut command = Command::new("tail");
        command.args(["-f", "/dev/null"]);
        let process = daemon.start(command).unwrap();
        assert_eq!(Daemon::of(directory.path(), "cat").process(), Some(process));
        assert_eq!(daemon.start(Command::new("false")).unwrap(), process);
        daemon.signal(Signal::STOP).unwrap();
        daemon.end(Signal::TERM).await.unwrap();
        assert_eq!(daemon.process(), None);
        daemon.end(Signal::TERM).await.unwrap();
        assert!(daemon.signal(Signal::TERM).is_err());
    }

    #[test]
    fn another_process_of_the_same_number_is_another_process() {
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.runs());
        assert!(!Process { start: own.start + 1, ..own }.runs());
    }
}
