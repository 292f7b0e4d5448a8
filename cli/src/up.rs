//! `antiphon up`: a fleet on this machine until Ctrl-C.

use std::{collections::BTreeMap, io::IsTerminal as _, path::PathBuf, process::ExitCode, time::Duration};

use antiphon_crds::{compile, manifest};
use antiphon_proto::v1::{FleetStatusRequest, Phase, RegionStatus};
use antiphon_runtime::shutdown;
use serde_json::json;
use tokio::time::timeout;

use crate::present::out;
use crate::{
    args::UpArgs,
    fleet::{Fleet, Options},
    present::{self, Progress},
};

pub(crate) async fn run(args: &UpArgs, dir: PathBuf, json: bool) -> anyhow::Result<ExitCode> {
    let resources = manifest::read(&args.files).map_err(|errors| anyhow::anyhow!("{errors}"))?;
    let plan = compile::compile(&resources)?;
    let mut signal = std::pin::pin!(shutdown::signal()?);
    let progress = Progress::new(json);
    let options = Options { dir: dir.clone(), stop_deadline: args.stop_deadline, tenant: "local".into() };
    let say = |what: &str| progress.say(format!("starting: {what}"));
    let mut fleet = tokio::select! {
        started = Fleet::start(plan, options, &say) => { progress.clear(); started? }
        () = &mut signal => { progress.clear(); return Ok(ExitCode::from(130)); }
    };
    announce(&fleet, &dir, json)?;
    let status = Progress::new(json || !std::io::stderr().is_terminal());
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        let ticked = tokio::select! {
            () = &mut signal => break,
            _ = ticks.tick() => true,
            () = fleet.ended() => false,
        };
        let healed = tokio::select! {
            healed = fleet.heal() => healed,
            () = &mut signal => break,
        };
        for healed in healed {
            status.note(&healed);
        }
        if ticked && let Ok(text) = timeout(Duration::from_secs(1), line(&fleet)).await {
            status.say(text);
        }
    }
    status.clear();
    if !json {
        eprintln!("stopping: live calls have {} s", args.stop_deadline.as_secs());
    }
    let again = tokio::signal::ctrl_c();
    tokio::select! {
        () = fleet.stop() => {}
        // The processes are killed as their handles go.
        _ = again => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// What runs where, once.
fn announce(fleet: &Fleet, dir: &std::path::Path, json: bool) -> anyhow::Result<()> {
    let processes = fleet.processes();
    if json {
        let list: Vec<_> = processes
            .iter()
            .map(|p| {
                let spec = p.spec();
                json!({"kind": spec.kind.label(), "region": spec.region, "name": spec.name, "address": spec.ip, "pid": p.pid(), "log": p.log()})
            })
            .collect();
        let agents: Vec<_> = fleet.plan().agents.iter().map(|agent| &agent.agent).collect();
        out!(
            "{}",
            json!({"ready": true, "dir": dir, "processes": list, "agents": agents, "routers": fleet.context().routers})
        );
        return Ok(());
    }
    let rows = processes.iter().map(|p| {
        let spec = p.spec();
        let pid = p.pid().map_or("-".into(), |pid| pid.to_string());
        vec![spec.region.clone(), spec.kind.label().into(), spec.name.clone(), spec.ip.to_string(), pid]
    });
    present::print(&present::table(&["REGION", "KIND", "NAME", "ADDRESS", "PID"], &[4], rows));
    out!();
    for router in &fleet.context().routers {
        out!("https://{}/v1/sessions  ({})", router.public, router.region);
    }
    out!("logs, keys and identities in {}", dir.display());
    if let Some(agent) = fleet.plan().agents.first() {
        out!("try: antiphon call {} --save answer.wav", agent.agent);
    }
    out!("Ctrl-C stops everything.");
    Ok(())
}

/// One line per region, as any router sees it.
async fn line(fleet: &Fleet) -> String {
    let mut seen: BTreeMap<String, RegionStatus> = BTreeMap::new();
    for router in &fleet.context().routers {
        let Ok(mut admin) = fleet.admin(router) else { continue };
        let Ok(status) = admin.fleet_status(FleetStatusRequest {}).await else { continue };
        for region in status.into_inner().regions.into_iter().filter(|region| region.local) {
            seen.insert(router.region.clone(), region);
        }
    }
    let text = seen.iter().map(|(name, region)| {
        let (slots, active) = region.workers.iter().fold((0, 0), |(s, a), w| (s + w.slots, a + w.active));
        let relays = region.digest.iter().flat_map(|d| &d.relays);
        let up = relays.filter(|relay| relay.phase() == Phase::Active).count();
        format!("{name}: {active} of {slots} calls, {} workers, {up} relays", region.workers.len())
    });
    let text: Vec<_> = text.collect();
    if text.is_empty() { "no router answers".into() } else { text.join("  |  ") }
}
