//! What is said of a region: worked out from what is there, without I/O.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use antiphon_crds::{KeyStatus, PeerStatus, RegionPhase, Serving, Tunnel, VoiceRegion, VoiceRegionStatus};
use antiphon_proto::v1::{FleetStatusResponse, RegionDigest, RegionStatus, WorkerStatus};
use k8s_openapi::{
    api::apps::v1::Deployment,
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::{SignedDuration, Timestamp},
};
use kube::ResourceExt as _;

use crate::{
    conditions::{self, Holds, Say},
    links::View,
};

/// What is there of a region that this cluster builds.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Its number, once it has one.
    pub number: Option<u16>,
    /// The routers' Deployment.
    pub routers: Option<Arc<Deployment>>,
    /// The relays' Deployment.
    pub relays: Option<Arc<Deployment>>,
    /// Why a router's pod does not come up.
    pub router_trouble: Option<String>,
    /// Why a relay's pod does not come up.
    pub relay_trouble: Option<String>,
    /// What its routers say.
    pub view: View,
    /// Selects the pods of the relays.
    pub relay_selector: String,
    /// Where applications reach the API.
    pub api_addresses: Vec<String>,
    /// What keeps it from being built, the gravest first.
    pub problems: Vec<Problem>,
    /// Pods of workers that are still there while the region is being deleted.
    pub workers_left: Option<usize>,
}

impl Observed {
    /// Whether an operator that has just begun would say less than its predecessor did: routers are ready, and it has not
    /// been able to ask them yet.
    #[must_use]
    pub fn is_premature(&self, region: &VoiceRegion) -> bool {
        let asked = self.view.connected || self.view.heard.is_some() || !self.view.problem.is_empty();
        let said = region.status.as_ref().is_some_and(|status| !status.conditions.is_empty());
        !asked && said && ready(self.routers.as_deref()) > 0
    }
}

/// Something that people have to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// In one word.
    pub reason: &'static str,
    /// In words, with what to do.
    pub message: String,
    /// Whether calls can be taken in spite of it.
    pub ready_all_the_same: bool,
}

impl Problem {
    /// One that keeps the region from being built.
    pub fn grave(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), ready_all_the_same: false }
    }

    /// One that people should know of.
    pub fn minor(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), ready_all_the_same: true }
    }
}

/// The status of a region that this cluster builds; `regions` are all VoiceRegions of this cluster by name.
#[must_use]
pub fn built(
    region: &VoiceRegion,
    regions: &BTreeMap<String, Arc<VoiceRegion>>,
    observed: &Observed,
    now: Timestamp,
) -> VoiceRegionStatus {
    let before = region.status.clone().unwrap_or_default();
    let local = observed.view.local();
    let digest = local.and_then(|local| local.digest.as_ref());
    let fleet = observed.view.status.as_deref();
    let peers = fleet.map_or_else(|| before.peers.clone(), |fleet| peers(fleet, regions, &before.peers, now));
    let workers = local.map(|local| &local.workers[..]).unwrap_or_default();
    let mut relay_addresses: Vec<String> = digest
        .into_iter()
        .flat_map(|digest| &digest.relays)
        .flat_map(|relay| [&relay.public_address].into_iter().chain(&relay.more_public_addresses).cloned())
        .collect();
    relay_addresses.sort();
    relay_addresses.dedup();
    relay_addresses.truncate(256);
    let said = say(region, observed, &peers);
    VoiceRegionStatus {
        observed_generation: region.metadata.generation,
        number: observed.number,
        phase: Some(match region.spec.serving {
            _ if region.metadata.deletion_timestamp.is_some() => RegionPhase::Draining,
            Serving::Active => RegionPhase::Active,
            Serving::Cordoned => RegionPhase::Cordoned,
        }),
        relays: ready(observed.relays.as_deref()),
        relay_selector: Some(observed.relay_selector.clone()),
        relay_addresses,
        routers: ready(observed.routers.as_deref()),
        api_addresses: observed.api_addresses.clone(),
        workers: count(workers.iter().filter(|worker| worker.placeable).count()),
        sessions: workers.iter().map(|worker| worker.active).sum(),
        free_slots: workers.iter().filter(|worker| worker.placeable).map(free).sum(),
        keys: digest.map(|digest| keys(digest, fleet)),
        peers,
        conditions: conditions::merge(&before.conditions, said, region.metadata.generation, now),
    }
}

/// The status of a region that another cluster builds, from what the routers here know of it.
#[must_use]
pub fn peer(region: &VoiceRegion, known: Option<&RegionStatus>, built_here: bool, now: Timestamp) -> VoiceRegionStatus {
    let before = region.status.clone().unwrap_or_default();
    let digest = known.and_then(|known| known.digest.as_ref());
    let heard = known.is_some_and(|known| digest.is_some() && known.digest_age_ms < SILENT_MS);
    let (cluster, name) = (&region.spec.cluster, region.name_any());
    let ready = match (built_here, known.filter(|known| known.digest_age_ms != NEVER)) {
        (false, _) => Say::new(
            "Ready",
            Holds::Unknown,
            "NoRouters",
            format!("cluster {cluster} builds {name}; this one builds no region whose routers could hear it"),
        ),
        (true, _) if heard => {
            Say::new("Ready", true, "Heard", format!("cluster {cluster} builds {name}; its routers are heard here"))
        }
        (true, Some(known)) => {
            let since = before.conditions.iter().find(|condition| condition.reason == "Silent");
            let message = match since {
                Some(before) => before.message.clone(),
                None => format!(
                    "cluster {cluster} builds {name}; its routers have been silent since {}: what is known of it is from \
                     then, and calls go on",
                    moment(now, known.digest_age_ms)
                ),
            };
            Say::new("Ready", false, "Silent", message)
        }
        (true, None) => {
            let message = match region.spec.router.addresses.is_empty() {
                true => format!(
                    "the routers of {name} cannot be found: set spec.router.addresses to where cluster {cluster} publishes their internal port"
                ),
                false => {
                    format!("the routers of {name} were never heard at {}", region.spec.router.addresses.join(", "))
                }
            };
            Say::new("Ready", false, "NeverHeard", message)
        }
    };
    let mut said = vec![ready];
    if let Some(digest) = digest.filter(|_| known.is_some_and(|known| known.digest_age_ms != NEVER)) {
        said.push(consistent(&contradictions(digest, region)));
    }
    let pools = digest.map(|digest| &digest.pools[..]).unwrap_or_default();
    let mut addresses: Vec<String> =
        digest.into_iter().flat_map(|digest| &digest.relays).map(|relay| relay.public_address.clone()).collect();
    addresses.sort();
    addresses.truncate(256);
    VoiceRegionStatus {
        observed_generation: region.metadata.generation,
        number: region.spec.number,
        phase: Some(RegionPhase::Peer),
        relays: digest.map_or(0, |digest| u16::try_from(digest.relays.len()).unwrap_or(u16::MAX)),
        relay_addresses: addresses,
        workers: pools.iter().map(|pool| pool.workers).sum(),
        sessions: pools.iter().map(|pool| pool.slots.saturating_sub(pool.free)).sum(),
        free_slots: pools.iter().map(|pool| pool.free).sum(),
        keys: digest.map(|digest| keys(digest, None)),
        conditions: conditions::merge(&before.conditions, said, region.metadata.generation, now),
        ..VoiceRegionStatus::default()
    }
}

/// Whether two statuses differ in counts of calls and workers at most: those change all the time.
#[must_use]
pub fn differ_in_counts_only(a: &VoiceRegionStatus, b: &VoiceRegionStatus) -> bool {
    let without =
        |status: &VoiceRegionStatus| VoiceRegionStatus { workers: 0, sessions: 0, free_slots: 0, ..status.clone() };
    without(a) == without(b)
}

fn say(region: &VoiceRegion, observed: &Observed, peers: &[PeerStatus]) -> Vec<Say> {
    let grave = observed.problems.iter().find(|problem| !problem.ready_all_the_same);
    let (routers, relays) = (ready(observed.routers.as_deref()), ready(observed.relays.as_deref()));
    let wanted = region.spec.relay.replicas;
    let ready = if let Some(problem) = grave {
        Say::new("Ready", false, problem.reason, &problem.message)
    } else if let Some(left) = observed.workers_left {
        Say::new("Ready", false, "Draining", format!("the region is being deleted; {left} workers are still there"))
    } else if routers == 0 {
        Say::new("Ready", false, "RoutersNotReady", not_ready("router", observed.router_trouble.as_ref()))
    } else if !observed.view.connected {
        let problem = if observed.view.problem.is_empty() { "not connected yet" } else { &observed.view.problem };
        Say::new(
            "Ready",
            false,
            "RoutersUnreachable",
            format!("the operator cannot reach a router: {problem}; calls go on"),
        )
    } else if relays == 0 && wanted > 0 {
        Say::new("Ready", false, "RelaysNotReady", not_ready("relay", observed.relay_trouble.as_ref()))
    } else if region.spec.serving == Serving::Cordoned {
        Say::new("Ready", true, "Cordoned", "calls go on and no new ones are placed here: spec.serving is Cordoned")
    } else {
        Say::new("Ready", true, "Serving", format!("ready: routers {routers}, relays {relays} of {wanted}"))
    };
    let moving: Vec<_> = [("routers", &observed.routers), ("relays", &observed.relays)]
        .into_iter()
        .filter_map(|(what, deployment)| rolling(deployment.as_deref()?).map(|how| format!("{what}: {how}")))
        .collect();
    let progressing = match (moving.is_empty(), observed.routers.is_some()) {
        (true, true) => Say::new("Progressing", false, "Complete", "everything is as the region says"),
        (true, false) => Say::new("Progressing", true, "Building", "the region is being built"),
        (false, _) => Say::new("Progressing", true, "RollingOut", moving.join("; ")),
    };
    let contradictions: Vec<_> = peers
        .iter()
        .flat_map(|peer| peer.contradictions.iter().map(move |words| format!("{}: {words}", peer.region)))
        .collect();
    vec![ready, progressing, consistent(&contradictions), degraded(observed, peers)]
}

fn not_ready(what: &str, trouble: Option<&String>) -> String {
    match trouble {
        Some(trouble) => format!("no {what} is ready: {trouble}"),
        None => format!("no {what} is ready yet: see the pods labelled app.kubernetes.io/component={what}"),
    }
}

fn degraded(observed: &Observed, peers: &[PeerStatus]) -> Say {
    let mut problems = observed.problems.clone();
    if !observed.view.problem.is_empty() && observed.view.connected {
        problems.push(Problem::minor("RecordsRefused", &observed.view.problem));
    }
    let store_ms = observed.view.status.as_ref().map_or(0, |status| status.store_age_ms);
    if store_ms >= SILENT_MS {
        problems.push(Problem::minor(
            "StoreUnreachable",
            "the routers cannot reach their store: calls are placed from memory, and nothing can be changed",
        ));
    }
    let troubles = [&observed.router_trouble, &observed.relay_trouble].into_iter().flatten();
    problems.extend(troubles.map(|trouble| Problem::minor("PodsNotReady", trouble.clone())));
    for deployment in [&observed.routers, &observed.relays].into_iter().flatten() {
        problems.extend(stuck(deployment));
    }
    let silent: Vec<_> = peers.iter().filter(|peer| !peer.connected).map(|peer| peer.region.as_str()).collect();
    if !silent.is_empty() {
        problems.push(Problem::minor(
            "PeersSilent",
            format!("routers of other regions are not heard: {}", silent.join(", ")),
        ));
    }
    match problems.first() {
        None => Say::new("Degraded", false, "AsExpected", "nothing is wrong"),
        Some(first) => {
            let words: Vec<_> = problems.iter().map(|problem| problem.message.as_str()).collect();
            Say::new("Degraded", true, first.reason, words.join("; "))
        }
    }
}

fn consistent(contradictions: &[String]) -> Say {
    match contradictions {
        [] => Say::new("Consistent", true, "Same", "other clusters say the same of the regions"),
        words => Say::new("Consistent", false, "Contradiction", words.join("; ")),
    }
}

/// Other regions as this region's routers see them.
fn peers(
    fleet: &FleetStatusResponse,
    regions: &BTreeMap<String, Arc<VoiceRegion>>,
    before: &[PeerStatus],
    now: Timestamp,
) -> Vec<PeerStatus> {
    let others = fleet.regions.iter().filter(|region| !region.local);
    let mut peers: Vec<_> = others
        .filter_map(|other| {
            let digest = other.digest.as_ref()?;
            let (connected, heard) = (other.digest_age_ms < SILENT_MS, other.digest_age_ms != NEVER);
            let known = before.iter().find(|peer| peer.region == digest.region);
            // Kept as it was said first: an age would be another one every time.
            let silent_since = (!connected && heard).then(|| {
                let kept = known.and_then(|known| known.silent_since.clone());
                kept.unwrap_or_else(|| Time(moment(now, other.digest_age_ms)))
            });
            let contradictions = match regions.get(&digest.region) {
                Some(region) if heard => contradictions(digest, region),
                Some(_) => Vec::new(),
                None => vec!["this cluster has no VoiceRegion of this name".to_owned()],
            };
            Some(PeerStatus { region: digest.region.clone(), connected, silent_since, contradictions })
        })
        .collect();
    peers.sort_by(|a, b| a.region.cmp(&b.region));
    peers.truncate(64);
    peers
}

/// What a region says of itself and a VoiceRegion contradicts.
fn contradictions(digest: &RegionDigest, region: &VoiceRegion) -> Vec<String> {
    let spec = &region.spec;
    let mut found = Vec::new();
    let mut differ = |what: &str, there: String, here: String| {
        if there != here {
            found.push(format!("{what}: {there} there, {here} here"));
        }
    };
    if let Some(number) = spec.number {
        differ("number", digest.number.to_string(), number.to_string());
    }
    differ("cloud", digest.cloud.clone(), spec.cloud.clone());
    let sorted = |zones: &[String]| {
        let mut zones = zones.to_vec();
        zones.sort();
        format!("[{}]", zones.join(", "))
    };
    differ("residency", sorted(&digest.residency), sorted(&spec.residency));
    if let Some(there) = digest.location {
        let here = spec.location;
        differ(
            "location",
            format!("{}, {}", there.latitude, there.longitude),
            format!("{}, {}", here.latitude, here.longitude),
        );
    }
    let tunnel = |via: bool| if via { "ViaRelays" } else { "Direct" }.to_owned();
    differ("tunnel", tunnel(digest.via_relays), tunnel(spec.tunnel == Tunnel::ViaRelays));
    found.truncate(8);
    found
}

fn keys(digest: &RegionDigest, fleet: Option<&FleetStatusResponse>) -> KeyStatus {
    let mut loaded = digest.loaded_generations.clone();
    loaded.truncate(8);
    let held_up_by = fleet.map(|fleet| &fleet.rotation_held_up_by[..]).unwrap_or_default();
    KeyStatus {
        wanted: digest.wanted_generation,
        minting: digest.minting_generation,
        oldest: digest.oldest_generation,
        loaded,
        held_up_by: held_up_by.iter().take(16).map(|words| words.chars().take(256).collect()).collect(),
    }
}

fn free(worker: &WorkerStatus) -> u32 {
    worker.slots.saturating_sub(worker.active).saturating_sub(worker.reserved)
}

fn ready(deployment: Option<&Deployment>) -> u16 {
    let ready = deployment.and_then(|deployment| deployment.status.as_ref()?.ready_replicas).unwrap_or(0);
    u16::try_from(ready).unwrap_or(0)
}

/// What a Deployment is about, if it is about anything.
fn rolling(deployment: &Deployment) -> Option<String> {
    let wanted = deployment.spec.as_ref()?.replicas.unwrap_or(1);
    let status = deployment.status.clone().unwrap_or_default();
    let seen = status.observed_generation >= deployment.metadata.generation;
    let updated = status.updated_replicas.unwrap_or(0);
    let available = status.available_replicas.unwrap_or(0);
    let all = status.replicas.unwrap_or(0);
    match () {
        () if !seen => Some("to be changed".to_owned()),
        () if updated < wanted => Some(format!("{updated} of {wanted} are of the newest kind")),
        () if all > updated => Some(format!("{} old ones are to go", all - updated)),
        () if available < updated => Some(format!("{available} of {updated} are available")),
        () => None,
    }
}

/// A Deployment that makes no progress any more, or cannot make pods.
fn stuck(deployment: &Deployment) -> Option<Problem> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let found = conditions.iter().find(|condition| {
        let failed = condition.type_ == "ReplicaFailure" && condition.status == "True";
        failed || (condition.type_ == "Progressing" && condition.status == "False")
    })?;
    let (name, words) = (deployment.name_any(), found.message.clone().unwrap_or_default());
    let refused = words.contains("violates PodSecurity");
    let hint = if refused {
        ": host ports and the host's network need a namespace where the restricted Pod Security profile is not enforced"
    } else {
        ""
    };
    Some(Problem::minor(
        if refused { "PodsForbidden" } else { "PodsStuck" },
        format!("Deployment {name}: {words}{hint}"),
    ))
}

/// The second that lies so long before now.
fn moment(now: Timestamp, age_ms: u32) -> Timestamp {
    let then = now.checked_sub(SignedDuration::from_millis(age_ms.into())).unwrap_or(now);
    Timestamp::from_second(then.as_second()).unwrap_or(then)
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Silence of a peer or store that is worth mention.
const SILENT_MS: u32 = 10_000;
/// Age of what was never heard.
const NEVER: u32 = u32::MAX;
/// How rarely a status that differs in counts only is written.
pub const COUNTS_EVERY: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests;
