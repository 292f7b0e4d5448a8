//! `antiphon up`: a fleet on this machine until Ctrl-C.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use antiphon_crds::{
    Codec,
    compile::{self, AgentPlan, FleetPlan},
    manifest,
};
use antiphon_proto::v1::{FleetStatusRequest, RegionStatus};
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

/// `given`: the directory as it was named on the command line, if it was.
pub(crate) async fn run(args: &UpArgs, dir: PathBuf, given: Option<&Path>, json: bool) -> anyhow::Result<ExitCode> {
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
    announce(&fleet, &dir, given, json)?;
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
fn announce(fleet: &Fleet, dir: &Path, given: Option<&Path>, json: bool) -> anyhow::Result<()> {
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
    match suggestion(fleet.plan(), given) {
        Some(call) => out!("try: {call}"),
        None if fleet.plan().agents.is_empty() => {
            out!("nobody takes calls: there is no VoiceAgent in these manifests");
        }
        None => out!("no agent takes calls: none has a worker (minReplicas) or all are suspended"),
    }
    out!("Ctrl-C stops everything.");
    Ok(())
}

/// A call that somebody answers.
fn suggestion(plan: &FleetPlan, dir: Option<&Path>) -> Option<String> {
    let has_workers = |agent: &&AgentPlan| plan.pools.iter().any(|p| p.agent == agent.agent && p.replicas > 0);
    let agent = plan.agents.iter().filter(|agent| !agent.suspended).find(has_workers)?;
    let codec = match agent.codecs.first() {
        _ if agent.codecs.contains(&Codec::Opus) => "",
        Some(Codec::L16At24k) => " --codec l16-24k",
        _ => " --codec l16-16k",
    };
    let dir = dir.map_or_else(String::new, |dir| format!(" --dir {}", in_shell(&dir.display().to_string())));
    Some(format!("antiphon call {}{codec}{dir} --save answer.wav", agent.agent))
}

/// As a shell takes it for one word.
fn in_shell(text: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+:@%".contains(c);
    if text.chars().all(is_plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// What goes on in every region, as its router sees it.
async fn line(fleet: &Fleet) -> String {
    let mut seen: BTreeMap<String, RegionStatus> = BTreeMap::new();
    for router in &fleet.context().routers {
        let Ok(mut admin) = fleet.admin(router) else { continue };
        let Ok(status) = admin.fleet_status(FleetStatusRequest {}).await else { continue };
        for region in status.into_inner().regions.into_iter().filter(|region| region.local) {
            seen.insert(router.region.clone(), region);
        }
    }
    live(&seen, present::error_width())
}

/// One line: of each region, or of all together where that is too wide.
fn live(seen: &BTreeMap<String, RegionStatus>, width: Option<u16>) -> String {
    let each: Vec<_> = seen.iter().map(|(name, region)| format!("{name}: {}", Figures::of([region]))).collect();
    let each = each.join("  |  ");
    // The spinner stands in front.
    match width.map(|width| usize::from(width).saturating_sub(2)) {
        _ if seen.is_empty() => "no router answers".into(),
        Some(width) if each.chars().count() > width => {
            format!("{}: {}", count(seen.len(), "region"), Figures::of(seen.values()))
        }
        _ => each,
    }
}

/// Sums over regions.
#[derive(Debug, Default)]
struct Figures {
    slots: u32,
    active: u32,
    workers: usize,
    relays: usize,
    relays_heard: usize,
}

impl Figures {
    fn of<'a>(regions: impl IntoIterator<Item = &'a RegionStatus>) -> Self {
        let mut sum = Self::default();
        for region in regions {
            sum.slots += region.workers.iter().map(|worker| worker.slots).sum::<u32>();
            sum.active += region.workers.iter().map(|worker| worker.active).sum::<u32>();
            sum.workers += region.workers.len();
            sum.relays += region.relays.len();
            sum.relays_heard += region.relays.iter().filter(|relay| relay.connected).count();
        }
        sum
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} calls, {}, ", self.active, self.slots, count(self.workers, "worker"))?;
        if self.relays_heard < self.relays {
            write!(f, "{} of ", self.relays_heard)?;
        }
        f.write_str(&count(self.relays, "relay"))
    }
}

#[cfg(test)]
mod tests {
    use antiphon_proto::v1::{RelayStatus, WorkerStatus};

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
        let of = |agents: String, dir: Option<&str>| {
            let resources = manifest::parse(&[("fleet.yaml", &format!("{agents}{region}"))]).unwrap();
            suggestion(&compile::compile(&resources).unwrap(), dir.map(Path::new))
        };
        let (idle, gone) = (agent("a", 0, ""), agent("b", 1, "  suspend: true\n"));
        assert_eq!(of(format!("{idle}{gone}"), None), None);
        let plain = agent("c", 1, "  codecs: [L16At16k]\n");
        let call = "antiphon call default/c --codec l16-16k --save answer.wav";
        assert_eq!(of(format!("{idle}{gone}{plain}"), None).as_deref(), Some(call));
        let of = |dir| of(agent("d", 1, ""), dir).unwrap();
        assert_eq!(of(None), "antiphon call default/d --save answer.wav");
        assert_eq!(of(Some("/tmp/fleet")), "antiphon call default/d --dir /tmp/fleet --save answer.wav");
        assert_eq!(of(Some("my fleet")), "antiphon call default/d --dir 'my fleet' --save answer.wav");
    }

    #[test]
    fn the_live_line_fits_narrow_terminals_and_tells_silent_relays() {
        let relay = |connected| RelayStatus { connected, ..RelayStatus::default() };
        let worker = WorkerStatus { slots: 60, active: 2, ..WorkerStatus::default() };
        let region =
            RegionStatus { workers: vec![worker], relays: vec![relay(true), relay(false)], ..RegionStatus::default() };
        let seen = ["frankfurt", "virginia"].map(|name| (name.to_owned(), region.clone())).into();
        let each = "2 of 60 calls, 1 worker, 1 of 2 relays";
        assert_eq!(live(&seen, None), format!("frankfurt: {each}  |  virginia: {each}"));
        assert_eq!(live(&seen, Some(60)), "2 regions: 4 of 120 calls, 2 workers, 2 of 4 relays");
        assert_eq!(live(&BTreeMap::new(), Some(60)), "no router answers");
    }
}
