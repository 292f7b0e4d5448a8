//! `antiphon up`: a fleet on this machine until Ctrl-C.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use antiphon_crds::{
    Codec,
    compile::{self, AgentPlan, FleetPlan},
    manifest,
};
use antiphon_proto::v1::{FleetStatusRequest, Phase, RegionStatus};
use antiphon_runtime::shutdown;
use serde_json::json;
use tokio::time::timeout;

use crate::present::out;
use crate::{
    Interrupted,
    args::UpArgs,
    fleet::{ADMIN, Fleet, Options, ca_path, key_path},
    present::{self, Progress, count},
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
        () = &mut signal => { progress.clear(); return Err(Interrupted.into()); }
    };
    announce(&fleet, &dir, json)?;
    // What happened is said wherever standard error goes: to a terminal, a file or a journal.
    let status = if json { Progress::only_notes() } else { Progress::new(false) };
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
fn announce(fleet: &Fleet, dir: &Path, json: bool) -> anyhow::Result<()> {
    let processes = fleet.processes();
    if json {
        let list: Vec<_> = processes
            .iter()
            .map(|p| {
                let spec = p.spec();
                json!({
                    "kind": spec.kind.label(), "region": spec.region, "name": spec.name, "address": spec.ip,
                    "admin": p.admin(), "pid": p.pid(), "log": p.log(),
                })
            })
            .collect();
        let agents: Vec<_> = fleet.plan().agents.iter().map(|agent| &agent.agent).collect();
        out!(
            "{}",
            json!({
                "ready": true, "dir": dir, "caFile": ca_path(dir), "apiKeyFile": key_path(dir), "processes": list,
                "agents": agents, "routers": fleet.context().routers,
            })
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
        out!("API of {}: https://{}/v1/sessions", router.region, router.public);
    }
    if let Some(router) = fleet.context().routers.first() {
        out!("  curl --cacert {} \\", ca_path(dir).display());
        out!("    -H \"authorization: Bearer $(cat {})\" \\", key_path(dir).display());
        out!("    https://{}/v1/sessions", router.public);
    }
    out!("each process: http://ADDRESS:{ADMIN}/metrics, /readyz and /livez");
    out!("logs, keys and identities in {}", dir.display());
    match suggestion(fleet.plan()) {
        Some(call) => out!("try: {call}"),
        None => out!("no agent takes calls: none has a worker (minReplicas) or all are suspended"),
    }
    out!("Ctrl-C stops everything.");
    Ok(())
}

/// A call that somebody answers.
fn suggestion(plan: &FleetPlan) -> Option<String> {
    let has_workers = |agent: &&AgentPlan| plan.pools.iter().any(|p| p.agent == agent.agent && p.replicas > 0);
    let agent = plan.agents.iter().filter(|agent| !agent.suspended).find(has_workers)?;
    let codec = match agent.codecs.first() {
        _ if agent.codecs.contains(&Codec::Opus) => "",
        Some(Codec::L16At24k) => " --codec l16-24k",
        _ => " --codec l16-16k",
    };
    Some(format!("antiphon call {}{codec} --save answer.wav", agent.agent))
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
        let workers = count(region.workers.len(), "worker");
        format!("{name}: {active} of {slots} calls, {workers}, {}", count(up, "relay"))
    });
    let text: Vec<_> = text.collect();
    if text.is_empty() { "no router answers".into() } else { text.join("  |  ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_call_that_somebody_answers_is_suggested() {
        let agent = |name: &str, replicas: u32, more: &str| {
            format!(
                "apiVersion: antiphon.dev/v1alpha1\nkind: VoiceAgent\nmetadata: {{name: {name}}}\nspec:\n  \
                 engine: {{type: Echo}}\n  regions: [{{name: north, minReplicas: {replicas}}}]\n{more}---\n"
            )
        };
        let region = "apiVersion: antiphon.dev/v1alpha1\nkind: VoiceRegion\nmetadata: {name: north}\nspec:\n  \
                      cluster: c\n  cloud: c\n  location: {latitude: 1, longitude: 2}\n";
        let of = |agents: String| {
            let resources = manifest::parse(&[("fleet.yaml", &format!("{agents}{region}"))]).unwrap();
            suggestion(&compile::compile(&resources).unwrap())
        };
        let (idle, gone) = (agent("a", 0, ""), agent("b", 1, "  suspend: true\n"));
        assert_eq!(of(format!("{idle}{gone}")), None);
        let plain = agent("c", 1, "  codecs: [L16At16k]\n");
        let call = "antiphon call default/c --codec l16-16k --save answer.wav";
        assert_eq!(of(format!("{idle}{gone}{plain}")).as_deref(), Some(call));
        assert_eq!(of(agent("d", 1, "")).as_deref(), Some("antiphon call default/d --save answer.wav"));
    }
}
