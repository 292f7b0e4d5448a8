//! `antiphon demo`: three clouds, a hundred callers with real speech, and what can go wrong on the way.
//!
//! While they talk every caller's UDP address changes, one relay is drained and another is killed. Afterwards each
//! recording is compared with what its caller said: the answer has to be the caller's own words behind the right
//! receipt. Counters prove nothing here; recordings do.

mod outcome;
mod show;
mod world;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use antiphon_client::CallHandle;
use antiphon_core::id::SessionId;
use antiphon_crds::{compile, manifest};
use antiphon_media::{script::Script, wav};
use antiphon_proto::v1::Codec;
use antiphon_runtime::{Tasks, shutdown};
use anyhow::{Context as _, bail, ensure};
use tokio::{sync::oneshot, time::timeout};

use crate::present::out;
use crate::{
    Interrupted,
    args::DemoArgs,
    caller::{self, Stage, Wanted},
    fleet::{Fleet, Kind, Options},
    present::{Progress, duration},
};

use outcome::{Incident, Outcome, Verdict};

pub(crate) async fn run(args: &DemoArgs, json: bool) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let mut signal = std::pin::pin!(shutdown::signal()?);
    let progress = Progress::new(json);
    let work = Work::new(args.keep.as_deref())?;
    let mut fleet = tokio::select! {
        fleet = start(&work.dir, &progress) => fleet?,
        () = &mut signal => return Err(Interrupted.into()),
    };
    let demo = Demo { args, work: &work, progress: &progress, began };
    let outcome = tokio::select! {
        outcome = demo.play(&mut fleet) => outcome,
        () = &mut signal => Err(Interrupted.into()),
    };
    progress.say("stopping the fleet");
    fleet.stop().await;
    progress.clear();
    let outcome = outcome?;
    let report = serde_json::to_string_pretty(&show::as_json(&outcome))?;
    let path = work.dir.join("report.json");
    std::fs::write(&path, format!("{report}\n")).with_context(|| path.display().to_string())?;
    if json {
        out!("{report}");
    } else {
        show::print(&outcome);
    }
    if outcome.passed() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("recordings, logs and report.json are in {}", work.keep().display());
    Ok(ExitCode::FAILURE)
}

/// Voice is real time: a hundred callers and a fleet on a machine that also compiles something need to go first. Where
/// that is not allowed, all still works on a quiet machine. Threads and processes started later inherit it.
pub(crate) fn go_first() {
    let _ = rustix::process::setpriority_process(None, -10);
    // With autogroups (sched(7)) the kernel weighs sessions of processes, and niceness only within one.
    let _ = std::fs::write("/proc/self/autogroup", "-10");
}

/// Where recordings and logs go; temporary unless it is to be kept or something failed.
struct Work {
    dir: PathBuf,
    temporary: parking_lot::Mutex<Option<tempfile::TempDir>>,
}

impl Work {
    fn new(keep: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(keep) = keep {
            std::fs::create_dir_all(keep).with_context(|| keep.display().to_string())?;
            return Ok(Self { dir: keep.to_owned(), temporary: None.into() });
        }
        let temporary = tempfile::Builder::new().prefix("antiphon-demo-").tempdir()?;
        Ok(Self { dir: temporary.path().to_owned(), temporary: Some(temporary).into() })
    }

    fn keep(&self) -> &Path {
        if let Some(temporary) = self.temporary.lock().take() {
            let _ = temporary.keep();
        }
        &self.dir
    }
}

async fn start(dir: &Path, progress: &Progress) -> anyhow::Result<Fleet> {
    let sources = [
        ("regions.yaml", include_str!("../../examples/three-clouds/regions.yaml")),
        ("frontdesk.yaml", include_str!("../../examples/three-clouds/frontdesk.yaml")),
    ];
    let resources = manifest::parse(&sources).map_err(|errors| anyhow::anyhow!("{errors}"))?;
    let plan = compile::compile(&resources)?;
    let tenant = "demo".into();
    let options = Options { dir: dir.to_owned(), stop_deadline: Duration::from_secs(5), tenant };
    let started = Instant::now();
    let fleet = Fleet::start(plan, options, &|what| progress.say(format!("starting: {what}"))).await?;
    let count = |kind| fleet.processes().iter().filter(|p| p.spec().kind == kind).count();
    let (routers, relays, workers) = (count(Kind::Router), count(Kind::Relay), count(Kind::Worker));
    let regions: Vec<_> = fleet.plan().regions.iter().map(|r| format!("{} on {}", r.name, r.cloud)).collect();
    progress.note(&format!(
        "fleet of {routers} routers, {relays} relays and {workers} workers ready in {}: {}",
        duration(started.elapsed()),
        regions.join(", ")
    ));
    Ok(fleet)
}

struct Demo<'a> {
    args: &'a DemoArgs,
    work: &'a Work,
    progress: &'a Progress,
    began: Instant,
}

/// A caller on its way.
struct Running {
    stage: Stage,
    steer: Option<oneshot::Receiver<CallHandle>>,
    done: oneshot::Receiver<Result<caller::Called, caller::CallFailure>>,
}

impl Demo<'_> {
    async fn play(&self, fleet: &mut Fleet) -> anyhow::Result<Outcome> {
        let tasks = Tasks::new();
        let scripts = self.scripts()?;
        let mut running = self.dial_all(fleet, &scripts, &tasks).await?;
        let handles = self.connected(&mut running).await;
        self.progress.note(&format!("{} of {} callers are talking", handles.len(), running.len()));
        let watching = self.watch(&running);
        let incidents = tokio::select! {
            incidents = self.trouble(fleet, &handles) => incidents?,
            () = watching => bail!("the progress display ended"),
        };
        let called = self.finished(running).await?;
        self.progress.say(format!("comparing {} recordings with what was said", called.len()));
        let verdicts = self.judge(called, scripts).await?;
        let places = world::callers(self.args.calls);
        Ok(Outcome::new(fleet.plan(), places, verdicts, incidents, self.began.elapsed()))
    }

    fn scripts(&self) -> anyhow::Result<Vec<Script>> {
        let turns = usize::try_from(self.args.turns)?;
        (0..self.args.calls).map(|seed| Ok(Script::bundled(seed.into(), RATE, turns)?)).collect()
    }

    /// Starts every caller, a little after the one before.
    async fn dial_all(&self, fleet: &Fleet, scripts: &[Script], tasks: &Tasks) -> anyhow::Result<Vec<Running>> {
        let agent = fleet.plan().agents.first().context("the example has no agent")?.agent.clone();
        let context = fleet.context();
        let mut routers = Vec::new();
        for router in &context.routers {
            routers.push((router.region.clone(), context.client(router, None)?));
        }
        let mut running = Vec::new();
        for (place, script) in world::callers(self.args.calls).iter().zip(scripts) {
            let location = Some((place.latitude, place.longitude));
            let nearest = context.nearest(location).context("no router")?;
            let router = routers.iter().find(|(region, _)| *region == nearest.region).context("no router")?.1.clone();
            let wanted = Wanted {
                agent: agent.clone(),
                location,
                codec: Codec::Opus,
                regions: Vec::new(),
                turns: script.turns.clone(),
                patience: Duration::from_secs(30),
                session: SessionId::from_bytes(rand::random()),
                qlog: None,
            };
            let (steer, steered) = oneshot::channel();
            let (report, done) = oneshot::channel();
            let stage = Stage::default();
            let shown = stage.clone();
            tasks.spawn("caller", async move {
                // Whoever asked is gone when the demo was interrupted.
                let _ = report.send(caller::call(&router, &wanted, &shown, Some(steer)).await);
                Ok(())
            });
            running.push(Running { stage, steer: Some(steered), done });
            self.progress.say(format!("dialing: {} of {}", running.len(), self.args.calls));
            tokio::time::sleep(APART).await;
        }
        Ok(running)
    }

    /// Waits until every caller is connected or has failed.
    async fn connected(&self, running: &mut [Running]) -> Vec<CallHandle> {
        let mut handles = Vec::new();
        for caller in running {
            let Some(steer) = caller.steer.take() else { continue };
            if let Ok(Ok(handle)) = timeout(Duration::from_secs(10), steer).await {
                handles.push(handle);
            }
        }
        handles
    }

    /// Shows how far the callers are, for as long as it is polled.
    async fn watch(&self, running: &[Running]) {
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        loop {
            ticks.tick().await;
            self.progress.say(self.line(running));
        }
    }

    fn line(&self, running: &[Running]) -> String {
        let turn = |n: usize| running.iter().filter(|r| r.stage.value() == n + 1).count();
        let turns = (1..=self.args.turns as usize).map(|n| format!("turn {n}: {}", turn(n)));
        format!(
            "{} callers, {}  {:.0} s",
            running.len(),
            turns.collect::<Vec<_>>().join(", "),
            self.began.elapsed().as_secs_f64()
        )
    }

    /// What happens to the callers while they talk.
    async fn trouble(&self, fleet: &mut Fleet, handles: &[CallHandle]) -> anyhow::Result<Vec<Incident>> {
        let mut incidents = Vec::new();
        tokio::time::sleep(Duration::from_secs(1)).await;
        self.progress
            .note(&format!("every caller's UDP address changes, as when a phone leaves Wi-Fi ({})", handles.len()));
        incidents.push(Incident::addresses_changed(handles.len()));
        for handle in handles {
            handle.rebind();
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        let drained = fleet.process(Kind::Relay, DRAINED, 0).context("the example has no relay to drain")?;
        self.progress.note(&format!("relay {DRAINED}/{} is drained", drained.spec().name));
        drained.terminate()?;
        let ended = drained.ended(Duration::from_secs(12)).await?;
        ensure!(ended.success(), "the drained relay ended with {ended}; see {}", drained.log().display());
        incidents.push(Incident::relay_drained(DRAINED, drained.spec()));
        tokio::time::sleep(Duration::from_secs(2)).await;
        let killed = fleet.process(Kind::Relay, KILLED, 0).context("the example has no relay to kill")?;
        self.progress.note(&format!("relay {KILLED}/{} is killed", killed.spec().name));
        killed.kill()?;
        incidents.push(Incident::relay_killed(KILLED, killed.spec()));
        Ok(incidents)
    }

    async fn finished(
        &self,
        running: Vec<Running>,
    ) -> anyhow::Result<Vec<Result<caller::Called, caller::CallFailure>>> {
        let stages: Vec<_> = running.iter().map(|r| r.stage.clone()).collect();
        let mut all = std::pin::pin!(async {
            let mut called = Vec::new();
            for caller in running {
                called.push(caller.done.await.context("a caller's task is gone")?);
            }
            anyhow::Ok(called)
        });
        let limit = Duration::from_secs(30 + 15 * u64::from(self.args.turns));
        let deadline = tokio::time::Instant::now() + limit;
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        loop {
            tokio::select! {
                called = &mut all => return called,
                _ = ticks.tick() => {
                    let talking = stages.iter().filter(|s| s.value() <= self.args.turns as usize).count();
                    self.progress.say(format!("callers before their last turn: {talking}  {:.0} s", self.began.elapsed().as_secs_f64()));
                }
                () = tokio::time::sleep_until(deadline) => bail!("calls still run {} s after the last incident", limit.as_secs()),
            }
        }
    }

    /// Compares every recording with its script, on all cores.
    async fn judge(
        &self,
        called: Vec<Result<caller::Called, caller::CallFailure>>,
        scripts: Vec<Script>,
    ) -> anyhow::Result<Vec<Verdict>> {
        let recordings = Arc::new(self.work.dir.join("recordings"));
        std::fs::create_dir_all(&*recordings)?;
        let mut judging = tokio::task::JoinSet::new();
        for (index, (called, script)) in called.into_iter().zip(scripts).enumerate() {
            let recordings = recordings.clone();
            judging.spawn_blocking(move || {
                if let Ok(called) = &called {
                    let file = recordings.join(format!("caller-{index:03}.wav"));
                    std::fs::write(&file, wav::write(&called.heard.recording, called.rate))?;
                }
                anyhow::Ok(Verdict::of(index, called, &script.turns))
            });
        }
        let mut verdicts = judging.join_all().await.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        verdicts.sort_by_key(|verdict| verdict.caller);
        Ok(verdicts)
    }
}

/// Rate of the callers' scripts and recordings.
const RATE: u32 = 16_000;
/// Between one caller and the next.
const APART: Duration = Duration::from_millis(20);
const DRAINED: &str = "frankfurt";
const KILLED: &str = "virginia";
