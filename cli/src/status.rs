//! `antiphon status`: the fleet as its routers see it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use antiphon_client::ClockSkew;
use antiphon_proto::v1::{
    FleetStatusRequest, FleetStatusResponse, Phase, PoolDigest, RegionStatus, RelayStatus, WorkerStatus,
};
use anyhow::ensure;
use serde_json::{Value, json};

use crate::present::out;
use crate::{
    fleet::Context,
    keys::{NO_RECORD, ask_all},
    present,
    sessions::{Failed, age, age_ms},
};

type Answer = (FleetStatusResponse, Option<ClockSkew>);

pub(crate) async fn run(dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let context = Context::load(dir)?;
    ensure!(!context.routers.is_empty(), "the fleet has no router");
    let (answers, mut failed) = ask_all(&context, async |mut admin| {
        let sent = SystemTime::now();
        let answer = admin.fleet_status(FleetStatusRequest {}).await?;
        let clock = ClockSkew::of(answer.metadata(), sent, SystemTime::now());
        Ok(answer.map(|status| (status, clock)))
    })
    .await;
    for (region, (status, _)) in &answers {
        if !status.regions.iter().any(|region| region.local) {
            failed.add(region, NO_RECORD);
        }
    }
    if json {
        out!("{}", serde_json::to_string_pretty(&as_json(&answers, &failed))?);
    } else {
        show(&answers);
    }
    for (region, reason) in failed.each() {
        let does = if reason == NO_RECORD { "" } else { "does not answer: " };
        eprintln!("the router of {region} {does}{reason}");
    }
    for line in remarks(&answers) {
        eprintln!("{line}");
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Each region as its own router sees it; those whose router is silent as the first one that answers does.
fn regions(answers: &[(String, Answer)]) -> Vec<(&RegionStatus, Option<&Answer>)> {
    let mut found: Vec<(&RegionStatus, Option<&Answer>)> = Vec::new();
    for local in [true, false] {
        for (_, answer) in answers {
            for region in answer.0.regions.iter().filter(|region| region.local == local) {
                if !found.iter().any(|(known, _)| name(known) == name(region)) {
                    found.push((region, local.then_some(answer)));
                }
            }
        }
    }
    found.sort_by_key(|(region, _)| name(region).to_owned());
    found
}

fn name(region: &RegionStatus) -> &str {
    region.digest.as_ref().map_or("", |digest| &digest.region)
}

/// In the order of their names.
fn relays(region: &RegionStatus) -> Vec<&RelayStatus> {
    let mut relays: Vec<_> = region.relays.iter().collect();
    relays.sort_by_key(|relay| order(&relay.name));
    relays
}

/// In the order of their names.
fn workers(region: &RegionStatus) -> Vec<&WorkerStatus> {
    let mut workers: Vec<_> = region.workers.iter().collect();
    workers.sort_by_key(|worker| order(&worker.name));
    workers
}

/// `desk-2` comes before `desk-10`.
fn order(name: &str) -> (&str, u64, &str) {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem, name[stem.len()..].parse().unwrap_or(0), name)
}

/// `2`, or `1 of 2` if one is silent.
pub(crate) fn relays_heard(region: &RegionStatus) -> String {
    let digest = region.digest.iter().flat_map(|digest| &digest.relays);
    let (heard, all) = if region.local {
        (region.relays.iter().filter(|relay| relay.connected).count(), region.relays.len())
    } else {
        (digest.clone().filter(|relay| !relay.missing).count(), digest.count())
    };
    if heard == all { all.to_string() } else { format!("{heard} of {all}") }
}

fn show(answers: &[(String, Answer)]) {
    let regions = regions(answers);
    let rows = regions.iter().map(|(region, answer)| region_row(region, *answer));
    present::print(&present::table(&REGIONS, &[4, 5, 6, 7], rows));
    let relays =
        regions.iter().flat_map(|(region, _)| relays(region).into_iter().map(|relay| relay_row(name(region), relay)));
    out!();
    present::print(&present::table(&RELAYS, &[2, 5], relays));
    let workers = regions
        .iter()
        .flat_map(|(region, _)| workers(region).into_iter().map(|worker| worker_row(name(region), worker)));
    out!();
    present::print(&present::table(&WORKERS, &[2, 5], workers));
    out!();
    let agents = pools(&regions).into_iter().map(|(agent, pools)| agent_row(agent, &pools));
    present::print(&present::table(&AGENTS, &[2, 3], agents));
}

/// Numbers of relays and `region/name` of each, as far as their routers answer.
pub(crate) async fn relay_names(context: &Context) -> BTreeMap<u32, String> {
    let mut names = BTreeMap::new();
    for (_, status) in ask_all(context, async |mut admin| admin.fleet_status(FleetStatusRequest {}).await).await.0 {
        for region in status.regions.iter().filter(|region| region.local) {
            let name = |relay: &RelayStatus| {
                let number = relay.relay.as_ref()?.number;
                Some((number, format!("{}/{}", name(region), relay.name)))
            };
            names.extend(region.relays.iter().filter_map(name));
        }
    }
    names
}

/// Agents that have workers, as far as routers answer.
pub(crate) async fn agents(context: &Context) -> Vec<String> {
    let answers = ask_all(context, async |mut admin| admin.fleet_status(FleetStatusRequest {}).await).await.0;
    let digests = answers.iter().flat_map(|(_, status)| &status.regions).filter_map(|region| region.digest.as_ref());
    let agents: BTreeSet<_> = digests.flat_map(|digest| &digest.pools).map(|pool| pool.agent.clone()).collect();
    agents.into_iter().collect()
}

/// The workers of each agent, by region.
fn pools<'a>(regions: &[(&'a RegionStatus, Option<&Answer>)]) -> BTreeMap<&'a str, Vec<(&'a str, &'a PoolDigest)>> {
    let mut pools: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for (region, _) in regions {
        for pool in region.digest.iter().flat_map(|digest| &digest.pools) {
            pools.entry(&pool.agent).or_default().push((name(region), pool));
        }
    }
    pools
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Active => "active",
        Phase::Cordoned => "cordoned",
        Phase::Draining => "draining",
        Phase::Unspecified => "-",
    }
}

/// `3 to 4`: what is loaded; `-`: nothing is known.
fn span(generations: &[u32]) -> String {
    match (generations.iter().min(), generations.iter().max()) {
        (Some(low), Some(high)) if low == high => low.to_string(),
        (Some(low), Some(high)) => format!("{low} to {high}"),
        _ => "-".into(),
    }
}

/// `+1.2 s`, `-4m59s`: ahead of the router that says so, or behind.
fn clock(ahead_ms: i64) -> String {
    let tenths = (ahead_ms as f64 / 100.0).round() as i64;
    match tenths {
        0 => "0.0 s".into(),
        -599..=599 => format!("{:+.1} s", tenths as f64 / 10.0),
        _ => format!("{}{}", if ahead_ms < 0 { "-" } else { "+" }, off_by(ahead_ms)),
    }
}

fn off_by(ms: i64) -> String {
    age(Duration::from_millis(ms.unsigned_abs()))
}

fn region_row(region: &RegionStatus, own: Option<&Answer>) -> Vec<String> {
    let digest = region.digest.clone().unwrap_or_default();
    let (slots, free) = digest.pools.iter().fold((0, 0), |(slots, free), pool| (slots + pool.slots, free + pool.free));
    let workers: u32 = digest.pools.iter().map(|pool| pool.workers).sum();
    let router = match own {
        Some((status, _)) if status.store_age_ms > 0 => {
            format!("store away for {}", age_ms(status.store_age_ms))
        }
        Some(_) => "serves".into(),
        None if region.digest_age_ms == u32::MAX => "never heard".into(),
        None => format!("silent for {}", age_ms(region.digest_age_ms)),
    };
    vec![
        digest.region.clone(),
        digest.cloud.clone(),
        phase(digest.phase()).into(),
        router,
        relays_heard(region),
        workers.to_string(),
        format!("{} of {slots}", slots.saturating_sub(free)),
        if digest.minting_generation == 0 { "-".into() } else { digest.minting_generation.to_string() },
        if digest.via_relays { "via relays" } else { "direct" }.into(),
    ]
}

fn relay_row(region: &str, relay: &RelayStatus) -> Vec<String> {
    let info = relay.relay.clone().unwrap_or_default();
    vec![
        region.into(),
        relay.name.clone(),
        info.number.to_string(),
        if relay.connected { phase(info.phase()) } else { "silent" }.into(),
        info.public_address,
        relay.routes.to_string(),
        span(&relay.loaded_generations),
        clock(relay.clock_ahead_ms),
    ]
}

fn worker_row(region: &str, worker: &WorkerStatus) -> Vec<String> {
    let taken = worker.active + worker.reserved;
    vec![
        region.into(),
        worker.name.clone(),
        worker.number.to_string(),
        worker.agent.clone(),
        if worker.connected {
            phase(worker.phase()).into()
        } else {
            format!("silent {}", age_ms(worker.report_age_ms))
        },
        format!("{taken} of {}", worker.slots),
        span(&worker.loaded_generations),
        clock(worker.clock_ahead_ms),
        if worker.why_not.is_empty() { "takes calls".into() } else { worker.why_not.clone() },
    ]
}

fn agent_row(agent: &str, pools: &[(&str, &PoolDigest)]) -> Vec<String> {
    let sum = |of: fn(&PoolDigest) -> u32| pools.iter().map(|(_, pool)| of(pool)).sum::<u32>();
    let mut regions: Vec<_> = pools.iter().map(|(region, _)| *region).collect();
    regions.dedup();
    let slots = sum(|pool| pool.slots);
    let taken = slots.saturating_sub(sum(|pool| pool.free));
    vec![agent.into(), regions.join(", "), sum(|pool| pool.workers).to_string(), format!("{taken} of {slots}")]
}

/// What somebody should look into.
fn remarks(answers: &[(String, Answer)]) -> Vec<String> {
    let mut remarks = Vec::new();
    for (region, (_, clock)) in answers {
        if let Some(clock) = clock.filter(|clock| clock.is_notable()) {
            remarks.push(format!("{clock} in {region}: set one of them right"));
        }
    }
    remarks.extend(rotation(answers));
    for (region, _) in regions(answers) {
        let relays = region.relays.iter().map(|relay| ("relay", &relay.name, relay.clock_ahead_ms));
        let workers = region.workers.iter().map(|worker| ("worker", &worker.name, worker.clock_ahead_ms));
        let notable = |ahead_ms: i64| u128::from(ahead_ms.unsigned_abs()) > ClockSkew::NOTABLE.as_millis();
        for (kind, who, ahead_ms) in relays.chain(workers).filter(|(.., ahead_ms)| notable(*ahead_ms)) {
            let (by, way) = (off_by(ahead_ms), if ahead_ms < 0 { "behind" } else { "ahead of" });
            let region = name(region);
            remarks.push(format!(
                "the clock of {kind} {region}/{who} is {by} {way} its router's: frames more than 30 s off are dropped"
            ));
        }
    }
    remarks
}

/// One line on what a rotation of keys waits for, whoever says it: each cause once.
fn rotation(answers: &[(String, Answer)]) -> Option<String> {
    let regions: BTreeSet<_> = regions(answers).into_iter().map(|(region, _)| name(region)).collect();
    let said = answers
        .iter()
        .flat_map(|(region, (status, _))| status.rotation_held_up_by.iter().map(move |cause| (region, cause.as_str())));
    let named = |(region, cause): (&String, &str)| match cause.split_once(": ") {
        Some((who, _)) if regions.contains(who) => cause.to_owned(),
        Some(_) => format!("{region}/{cause}"),
        None => format!("{region}: {cause}"),
    };
    let causes: BTreeSet<String> = said.map(named).collect();
    let more = match causes.len().saturating_sub(CAUSES) {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    let first: Vec<_> = causes.into_iter().take(CAUSES).collect();
    let first = Some(first.join("; ")).filter(|first| !first.is_empty())?;
    Some(format!("the rotation of keys waits: {first}{more}; `antiphon keys generations` shows how far it is"))
}

fn as_json(answers: &[(String, Answer)], failed: &Failed) -> Value {
    let region = |(region, own): &(&RegionStatus, Option<&Answer>)| {
        let digest = region.digest.clone().unwrap_or_default();
        let relay = |relay: &RelayStatus| {
            let info = relay.relay.clone().unwrap_or_default();
            json!({
                "name": relay.name, "number": info.number, "phase": phase(info.phase()),
                "address": info.public_address, "routes": relay.routes, "clockAheadMs": relay.clock_ahead_ms,
                "loadedGenerations": relay.loaded_generations, "connected": relay.connected,
            })
        };
        let worker = |worker: &WorkerStatus| {
            json!({
                "name": worker.name, "number": worker.number, "agent": worker.agent, "phase": phase(worker.phase()),
                "slots": worker.slots, "reserved": worker.reserved, "active": worker.active,
                "placeable": worker.placeable, "whyNot": worker.why_not, "clockAheadMs": worker.clock_ahead_ms,
                "loadedGenerations": worker.loaded_generations, "connected": worker.connected,
            })
        };
        let pools: Vec<_> = digest
            .pools
            .iter()
            .map(|pool| json!({"agent": pool.agent, "workers": pool.workers, "slots": pool.slots, "free": pool.free}))
            .collect();
        json!({
            "region": digest.region, "number": digest.number, "cloud": digest.cloud, "phase": phase(digest.phase()),
            "routerAnswers": own.is_some(), "pools": pools, "viaRelays": digest.via_relays,
            "mintingGeneration": digest.minting_generation, "wantedGeneration": digest.wanted_generation,
            "storeAgeMs": own.map(|(status, _)| status.store_age_ms),
            "clockAheadOfRouterMs": own.and_then(|(_, clock)| clock.map(ClockSkew::ahead_ms)),
            "rotationHeldUpBy": own.map(|(status, _)| &status.rotation_held_up_by),
            "relays": relays(region).into_iter().map(relay).collect::<Vec<_>>(),
            "workers": workers(region).into_iter().map(worker).collect::<Vec<_>>(),
        })
    };
    let known = regions(answers);
    let agents = pools(&known).into_iter().map(|(agent, pools)| {
        let sum = |of: fn(&PoolDigest) -> u32| pools.iter().map(|(_, pool)| of(pool)).sum::<u32>();
        let regions: BTreeSet<_> = pools.iter().map(|(region, _)| *region).collect();
        json!({
            "agent": agent, "regions": regions, "workers": sum(|pool| pool.workers), "slots": sum(|pool| pool.slots),
            "free": sum(|pool| pool.free),
        })
    });
    let agents: Vec<_> = agents.collect();
    let regions: Vec<_> = known.iter().map(region).collect();
    json!({"regions": regions, "agents": agents, "missing": failed.regions()})
}

/// Causes that one line names.
const CAUSES: usize = 3;
const REGIONS: [&str; 9] = ["REGION", "CLOUD", "PHASE", "ROUTER", "RELAYS", "WORKERS", "CALLS", "KEYS", "TUNNEL"];
const RELAYS: [&str; 8] = ["REGION", "RELAY", "NUMBER", "PHASE", "ADDRESS", "ROUTES", "KEYS", "CLOCK"];
const WORKERS: [&str; 9] = ["REGION", "WORKER", "NUMBER", "AGENT", "PHASE", "CALLS", "KEYS", "CLOCK", "STATE"];
const AGENTS: [&str; 4] = ["AGENT", "REGIONS", "WORKERS", "CALLS"];

#[cfg(test)]
mod tests {
    use antiphon_proto::v1::{RegionDigest, RelayInfo};

    use super::*;
    use crate::stand_in::{Told, context, with_router};

    fn answer(region: &str, local: bool) -> Answer {
        let pool = PoolDigest { agent: "shop/desk".into(), workers: 2, slots: 120, free: 100, ..PoolDigest::default() };
        let digest = RegionDigest {
            region: region.into(),
            cloud: "nimbus".into(),
            phase: Phase::Active.into(),
            pools: vec![pool],
            relays: vec![RelayInfo::default()],
            minting_generation: 3,
            ..RegionDigest::default()
        };
        let relay =
            RelayStatus { name: "relay-0".into(), clock_ahead_ms: -121_400, connected: true, ..RelayStatus::default() };
        let status = RegionStatus {
            digest: Some(digest),
            local,
            digest_age_ms: if local { 0 } else { 65_000 },
            relays: vec![relay],
            ..RegionStatus::default()
        };
        (FleetStatusResponse { regions: vec![status], ..FleetStatusResponse::default() }, None)
    }

    #[test]
    fn a_region_is_shown_as_its_own_router_sees_it() {
        let answers = [("b".to_owned(), answer("a", false)), ("a".to_owned(), answer("a", true))];
        let found = regions(&answers);
        assert_eq!(found.len(), 1);
        let row = region_row(found[0].0, found[0].1);
        assert_eq!(row, ["a", "nimbus", "active", "serves", "1", "2", "20 of 120", "3", "direct"]);
        let agents: Vec<_> = pools(&found).into_iter().map(|(agent, pools)| agent_row(agent, &pools)).collect();
        assert_eq!(agents, [["shop/desk", "a", "2", "20 of 120"]]);
        let silent = regions(&answers[..1]);
        assert_eq!(region_row(silent[0].0, silent[0].1)[3], "silent for 1m05s");
        let json = as_json(&answers[..1], &Failed::default());
        assert_eq!(
            (&json["regions"][0]["routerAnswers"], &json["regions"][0]["storeAgeMs"]),
            (&false.into(), &Value::Null)
        );
    }

    #[test]
    fn clocks_that_are_off_are_named() {
        let mut answers = [("a".to_owned(), answer("a", true))];
        let expected =
            "the clock of relay a/relay-0 is 2m01s behind its router's: frames more than 30 s off are dropped";
        assert_eq!(remarks(&answers), [expected]);
        answers[0].1.0.regions[0].relays[0].clock_ahead_ms = 29_999;
        answers[0].1.0.rotation_held_up_by.push("relay-0: has not loaded generation 4".into());
        let expected = "the rotation of keys waits: a/relay-0: has not loaded generation 4; \
                        `antiphon keys generations` shows how far it is";
        assert_eq!(remarks(&answers), [expected]);
        let shown = [-121_400, -1_260, -49, 0, 30, 59_940, 299_000].map(clock);
        assert_eq!(shown, ["-2m01s", "-1.3 s", "0.0 s", "0.0 s", "0.0 s", "+59.9 s", "+4m59s"]);
        assert_eq!((span(&[]), span(&[2]), span(&[2, 3, 4])), ("-".into(), "2".into(), "2 to 4".into()));
    }

    #[test]
    fn a_rotation_is_one_line_whoever_waits_for_whom() {
        let mut answers = ["a", "b", "c"].map(|name| (name.to_owned(), answer(name, true)));
        for (_, (status, _)) in &mut answers {
            let others =
                ["a", "b", "c"].into_iter().filter(|other| *other != status.regions[0].digest.as_ref().unwrap().region);
            status.rotation_held_up_by.extend(others.map(|other| format!("{other}: still uses generation 1")));
            status.rotation_held_up_by.push("still uses generation 1".into());
            status.regions[0].relays.clear();
        }
        answers[2].1.0.rotation_held_up_by.push("w-7: still uses generation 1".into());
        let said = remarks(&answers);
        let expected = "the rotation of keys waits: a: still uses generation 1; b: still uses generation 1; \
                        c/w-7: still uses generation 1 (and 1 more); `antiphon keys generations` shows how far it is";
        assert_eq!(said, [expected]);
    }

    #[test]
    fn who_is_silent_is_not_shown_as_active_and_names_come_in_order() {
        let mut status = answer("a", true).0.regions.remove(0);
        let silent = RelayStatus { name: "relay-1".into(), ..RelayStatus::default() };
        status.relays.push(silent);
        assert_eq!(relays_heard(&status), "1 of 2");
        assert_eq!(relay_row("a", &status.relays[1])[3], "silent");
        let worker = |name: &str, connected| WorkerStatus {
            name: name.into(),
            connected,
            report_age_ms: 185_000,
            ..WorkerStatus::default()
        };
        status.workers = vec![worker("desk-10", true), worker("desk-2", false), worker("bar-3", true)];
        let shown: Vec<_> = workers(&status).into_iter().map(|worker| worker_row("a", worker)).collect();
        assert_eq!(shown.iter().map(|row| &*row[1]).collect::<Vec<_>>(), ["bar-3", "desk-2", "desk-10"]);
        assert_eq!(shown[1][4], "silent 3m05s");
    }

    #[tokio::test]
    async fn a_router_without_a_record_is_no_fleet_in_order() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), antiphon_runtime::pki::FleetCa::from_seed(&[3; 32]).unwrap());
        with_router(&ca, Told::without_record(), async |address| {
            let context = context(&dir, &ca, &[address]);
            std::fs::write(dir.path().join("fleet.json"), serde_json::to_string(&context).unwrap()).unwrap();
            assert_eq!(run(dir.path(), true).await.unwrap(), ExitCode::FAILURE);
        })
        .await;
    }
}
