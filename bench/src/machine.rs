//! The machine: what it is, which CPU runs what, what a process took of it.

use std::{fs, time::Duration};

use anyhow::Context as _;
use nix::{
    sys::time::TimeValLike as _,
    time::{ClockId, clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// One line: processor, CPUs, kernel.
pub(crate) fn describe() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {cpus} CPUs, Linux {}", model.unwrap_or("unknown processor"), kernel.trim())
}

/// CPU time that all threads of a process have taken so far.
pub(crate) fn cpu_of_process(pid: u32) -> anyhow::Result<Duration> {
    let pid = Pid::from_raw(pid.cast_signed());
    let clock = clock_getcpuclockid(pid).with_context(|| format!("CPU clock of process {pid}"))?;
    read(clock)
}

/// CPU time that this thread has taken so far: being preempted by others does not count.
pub(crate) fn cpu_of_thread() -> anyhow::Result<Duration> {
    read(ClockId::CLOCK_THREAD_CPUTIME_ID)
}

fn read(clock: ClockId) -> anyhow::Result<Duration> {
    let time = clock_gettime(clock).context("reading a CPU clock")?;
    Ok(Duration::from_nanos(time.num_nanoseconds().unsigned_abs()))
}

/// Resident memory of a process in KiB.
pub(crate) fn rss_kib(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.with_context(|| format!("{path} has no VmRSS"))
}

/// Two CPUs: what is measured runs on one, what loads it on the other. The same one where there is only one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpus {
    measured: usize,
    loading: usize,
}

impl Cpus {
    /// Takes the first and the last CPU that this process may use, and moves this thread to the loading one.
    pub(crate) fn split() -> anyhow::Result<Self> {
        let allowed = sched_getaffinity(None).context("asking for this thread's CPUs")?;
        let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
        let measured = cpus.next().context("this thread may use no CPU")?;
        let split = Self { measured, loading: cpus.next_back().unwrap_or(measured) };
        if split.measured == split.loading {
            eprintln!("  only one CPU: load and what is measured share it");
        }
        move_to(split.loading)?;
        Ok(split)
    }

    /// Starts something that inherits the CPU to be measured on.
    pub(crate) fn measured<T>(self, start: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        move_to(self.measured)?;
        let started = start();
        move_to(self.loading)?;
        started
    }
}

impl Cpus {
    /// Moves all threads of a running process to the CPU to be measured on; those to come inherit it.
    pub(crate) fn measure(self, pid: u32) -> anyhow::Result<()> {
        let mut set = CpuSet::new();
        set.set(self.measured);
        let path = format!("/proc/{pid}/task");
        for thread in fs::read_dir(&path).with_context(|| path.clone())? {
            let id = thread?.file_name().to_string_lossy().parse().ok().and_then(rustix::process::Pid::from_raw);
            let id = id.with_context(|| format!("{path} names a thread by no number"))?;
            sched_setaffinity(Some(id), &set).with_context(|| format!("moving thread {id:?}"))?;
        }
        Ok(())
    }
}

fn move_to(cpu: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).with_context(|| format!("moving to CPU {cpu}"))
}

/// Runs with all CPUs of before afterwards.
pub(crate) fn with_cpus<T>(work: impl FnOnce(Cpus) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let before = sched_getaffinity(None).context("asking for this thread's CPUs")?;
    let done = Cpus::split().and_then(work);
    sched_setaffinity(None, &before).context("moving back to all CPUs")?;
    done
}
