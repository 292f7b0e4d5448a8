//! Sessions per worker core: a real worker on one CPU; router, relay and callers on the other.

mod callers;

use std::time::Duration;

use antiphon_cli::fleet::{Fleet, Kind, Process};
use antiphon_media::{
    format::{AudioFormat, FRAME},
    speech::Utterance,
};
use antiphon_proto::v1::Codec;
use antiphon_runtime::Tasks;
use anyhow::{Context as _, ensure};
use tokio::{
    runtime,
    time::{Instant, sleep},
};

use crate::{
    fleet::{REGION, application, with_fleet},
    machine::{Cpus, cpu_of_process, rss_kib, with_cpus},
    report::{Goal, Row},
    sessions,
};
use callers::{Callers, Packets};

/// What a session costs a worker, silent and talking, and how many of them one core can do.
pub(crate) fn sessions() -> anyhow::Result<Vec<Row>> {
    with_cpus(|cpus| {
        let mut rows = Vec::new();
        for subject in SUBJECTS {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            rows.extend(runtime.block_on(with_fleet(SLOTS, async |fleet| measure(subject, fleet, cpus).await))?);
        }
        Ok(rows)
    })
}

/// A codec and how many conversations of it this machine's other CPU can be the other end of.
#[derive(Clone, Copy, Debug)]
struct Subject {
    name: &'static str,
    codec: Codec,
    format: AudioFormat,
    callers: usize,
    goal: f64,
    /// The goal's own number of callers: what counts is that nothing is late.
    at_goal: bool,
}

async fn measure(subject: Subject, fleet: &mut Fleet, cpus: Cpus) -> anyhow::Result<Vec<Row>> {
    let client = application(fleet)?;
    let worker = fleet.process(Kind::Worker, REGION, 0).context("the fleet has no worker")?;
    cpus.measure(worker.pid().context("the worker has ended")?)?;
    let datagrams = sessions::caller(subject.format, &[Utterance::ALL[0]], CYCLE, CYCLES)?;
    sleep(SETTLING).await;
    let empty = Window::watch(worker, SHORT).await?;

    let tasks = Tasks::new();
    let callers = Callers::connect(&client, subject.codec, subject.callers).await?.start(datagrams, CYCLE, &tasks);
    sleep(QUIET).await;
    let idle = Window::watch(worker, SHORT).await?;

    callers.talk();
    // After a cycle every caller has begun, and at any time some speak and some listen.
    let cycle = FRAME * u32::try_from(CYCLE)?;
    sleep(cycle).await;
    let mut best: Option<(Window, Packets)> = None;
    for _ in 0..TRIES {
        let before = callers.packets();
        callers.forget_lateness();
        let window = Window::watch(worker, cycle).await?;
        let (disturbed, packets) = (callers.latest() > FRAME, callers.packets() - before);
        if disturbed {
            eprintln!("  {}: the callers' clock was {} ms late", subject.name, callers.latest().as_millis());
        }
        let done = !disturbed && window.late_ticks == 0.0;
        if best.as_ref().is_none_or(|(best, _)| window.late_ticks < best.late_ticks) {
            best = Some((window, packets));
        }
        if done {
            break;
        }
    }
    let (talking, packets) = best.context("no window")?;
    callers.check()?;
    tasks.stopping().cancel();

    let steps = (subject.callers * CYCLE) as f64;
    let share = |count: u64| count as f64 * 100.0 / steps;
    eprintln!(
        "  {}: {} callers, packets in {:.0} % of the steps up, {:.0} % down; worker {:.0} % busy",
        subject.name,
        subject.callers,
        share(packets.sent),
        share(packets.received),
        talking.cpu.as_secs_f64() * 100.0 / talking.length.as_secs_f64(),
    );
    ensure!(share(packets.received) > 20.0, "the callers hardly hear anything");
    Ok(rows(subject, &empty, &idle, &talking))
}

fn rows(subject: Subject, empty: &Window, idle: &Window, talking: &Window) -> Vec<Row> {
    let callers = subject.callers as f64;
    let row = |what: &str, value, unit| Row::new(format!("density-{}{what}", subject.name), value, unit);
    let step = |window: &Window| (window.cpu_us_per_frame() - empty.cpu_us_per_frame()) / callers;
    let memory = |window: &Window| (window.rss_kib - empty.rss_kib) / callers;
    if subject.at_goal {
        let core = talking.cpu.as_secs_f64() / talking.length.as_secs_f64();
        return vec![
            row("-late", talking.late_ticks, "ticks").goal(Goal::AtMost(0.0)),
            row("-core", core, "cores").goal(Goal::AtMost(1.0)),
        ];
    }
    let memory = [row("-memory", memory(talking), "KiB/session"), row("-memory-idle", memory(idle), "KiB/session")];
    // What comes late costs less, or nothing in this window.
    if talking.late_ticks > callers * CYCLE as f64 / 100.0 {
        eprintln!("  {}: not measured, the machine is too busy: {} steps were late", subject.name, talking.late_ticks);
        return memory.into();
    }
    let mut rows = vec![
        row("", FRAME.as_micros() as f64 / step(talking), "sessions/core").goal(Goal::AtLeast(subject.goal)),
        row("-step", step(talking), "µs/20 ms"),
        row("-step-idle", step(idle), "µs/20 ms"),
        row("-late", talking.late_ticks, "ticks").goal(Goal::AtMost(0.0)),
    ];
    rows.extend(memory);
    rows
}

/// What a worker took of the machine for some time.
#[derive(Debug)]
struct Window {
    length: Duration,
    cpu: Duration,
    late_ticks: f64,
    /// At the end.
    rss_kib: f64,
}

impl Window {
    async fn watch(worker: &Process, length: Duration) -> anyhow::Result<Self> {
        let pid = worker.pid().context("the worker has ended")?;
        let (late, cpu, begin) = (late_ticks(worker).await?, cpu_of_process(pid)?, Instant::now());
        sleep(length).await;
        let (cpu, length) = (cpu_of_process(pid)? - cpu, begin.elapsed());
        let late_ticks = late_ticks(worker).await? - late;
        Ok(Self { length, cpu, late_ticks, rss_kib: rss_kib(pid)? as f64 })
    }

    fn cpu_us_per_frame(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 * FRAME.as_secs_f64() / self.length.as_secs_f64()
    }
}

async fn late_ticks(worker: &Process) -> anyhow::Result<f64> {
    let metrics = worker.metrics().await?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("antiphon_worker_late_ticks_total "));
    Ok(line.context("the worker counts no late ticks")?.parse()?)
}

const SUBJECTS: [Subject; 4] = [
    Subject { name: "pcm-16k", callers: 200, at_goal: false, ..PCM },
    Subject { name: "opus", callers: 120, at_goal: false, ..OPUS },
    PCM,
    OPUS,
];
const PCM: Subject = Subject {
    name: "pcm-16k-500",
    codec: Codec::L1616k,
    format: AudioFormat::L16At16k,
    callers: 500,
    goal: 500.0,
    at_goal: true,
};
const OPUS: Subject = Subject {
    name: "opus-200",
    codec: Codec::Opus,
    format: AudioFormat::Opus,
    callers: 200,
    goal: 200.0,
    at_goal: true,
};

/// In frames: a turn, its answer and a little silence.
const CYCLE: usize = 325;
/// Longer than anything here takes.
const CYCLES: usize = 12;
/// Something else that takes the CPUs makes everybody late: such a window is repeated.
const TRIES: usize = 3;
const SETTLING: Duration = Duration::from_millis(500);
/// Until a silence is a long one for the worker.
const QUIET: Duration = Duration::from_secs(2);
const SHORT: Duration = Duration::from_secs(2);

const SLOTS: u32 = 1_000;
