//! What is said of an agent: the sums over its pools here, and what peers tell of theirs.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use antiphon_crds::{
    AgentRegionStatus, RevisionStatus, VoiceAgent, VoiceAgentStatus, VoiceRegion, WorkerPool, WorkerRevisionStatus,
    compile,
};
use antiphon_proto::v1::RegionStatus;
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::{SignedDuration, Timestamp},
};

use crate::{
    Context,
    conditions::{Holds, Say, merge},
};

/// Why an agent cannot be carried out as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    reason: &'static str,
    message: String,
}

impl Problem {
    pub(super) fn new(reason: &'static str, message: String) -> Self {
        Self { reason, message }
    }
}

pub(super) fn of(
    agent: &VoiceAgent,
    pools: &[Arc<WorkerPool>],
    regions: &BTreeMap<String, Arc<VoiceRegion>>,
    context: &Context,
    problems: &[Problem],
    now: Timestamp,
) -> VoiceAgentStatus {
    let before = agent.status.clone().unwrap_or_default();
    let revision = compile::behaviour_revision(&agent.spec);
    let mut by_region = Vec::with_capacity(agent.spec.regions.len());
    for named in &agent.spec.regions {
        let peer = regions.get(&named.name).is_some_and(|region| region.spec.cluster != context.config.cluster);
        let earlier = before.regions.iter().find(|region| region.name == named.name);
        by_region.push(match pools.iter().find(|pool| pool.spec.region == named.name) {
            _ if peer => of_peer(agent, &named.name, context.links.peer(&named.name).as_ref(), earlier, now),
            Some(pool) => of_pool(pool),
            None => AgentRegionStatus { name: named.name.clone(), ..AgentRegionStatus::default() },
        });
    }
    let sum = |of: fn(&AgentRegionStatus) -> u32| by_region.iter().map(of).fold(0, u32::saturating_add);
    let revisions = revisions(&revision, pools);
    let mut status = VoiceAgentStatus {
        observed_generation: agent.metadata.generation,
        revision: Some(revision.clone()),
        replicas: sum(|region| region.replicas),
        ready_replicas: sum(|region| region.ready_replicas),
        draining: sum(|region| region.draining),
        sessions: sum(|region| region.sessions),
        slots: sum(|region| region.slots),
        free_slots: sum(|region| region.free_slots),
        sessions_by_revision: in_words(&revision, &revisions),
        revisions,
        worker_revisions: worker_revisions(pools),
        regions: by_region,
        conditions: Vec::new(),
    };
    let said = conditions(agent, pools, &status, problems);
    status.conditions = merge(&before.conditions, said, agent.metadata.generation, now);
    status
}

/// What can wait: numbers that change with every call.
pub(super) fn without_numbers(mut status: VoiceAgentStatus) -> VoiceAgentStatus {
    (status.sessions, status.free_slots, status.sessions_by_revision) = (0, 0, None);
    status.revisions.clear();
    status.worker_revisions.iter_mut().for_each(|revision| revision.sessions = 0);
    for region in &mut status.regions {
        (region.sessions, region.free_slots) = (0, 0);
    }
    status
}

fn of_pool(pool: &WorkerPool) -> AgentRegionStatus {
    let status = pool.status.clone().unwrap_or_default();
    AgentRegionStatus {
        name: pool.spec.region.clone(),
        peer: false,
        stale_since: None,
        replicas: status.replicas,
        ready_replicas: status.ready_replicas,
        draining: status.draining,
        sessions: status.sessions,
        slots: status.slots,
        free_slots: status.free_slots,
    }
}

/// Peers tell of workers that calls can be placed on, and nothing of others.
fn of_peer(
    agent: &VoiceAgent,
    name: &str,
    known: Option<&RegionStatus>,
    earlier: Option<&AgentRegionStatus>,
    now: Timestamp,
) -> AgentRegionStatus {
    let agent = agent.qualified_name();
    let mut status = AgentRegionStatus { name: name.to_owned(), peer: true, ..AgentRegionStatus::default() };
    let Some((known, digest)) = known.and_then(|known| Some((known, known.digest.as_ref()?))) else {
        // Of a peer that nobody can ask the last word stands.
        let kept = earlier.filter(|earlier| earlier.peer).cloned().unwrap_or(status);
        let since = kept.stale_since.clone().or(Some(Time(seconds(now))));
        return AgentRegionStatus { stale_since: since, ..kept };
    };
    for pool in digest.pools.iter().filter(|pool| pool.agent == agent) {
        status.replicas += pool.workers;
        status.ready_replicas += pool.workers;
        status.slots += pool.slots;
        status.free_slots += pool.free;
        status.sessions += pool.slots.saturating_sub(pool.free);
    }
    let age = Duration::from_millis(known.digest_age_ms.into());
    if age > STALE {
        let heard = now.checked_sub(SignedDuration::try_from(age).unwrap_or_default()).unwrap_or(now);
        let since = earlier.and_then(|earlier| earlier.stale_since.clone());
        status.stale_since = since.or(Some(Time(seconds(heard))));
    }
    status
}

/// Calls by the revision of behaviour that they began with, the present one first.
fn revisions(present: &str, pools: &[Arc<WorkerPool>]) -> Vec<RevisionStatus> {
    let mut sums: BTreeMap<String, u32> = BTreeMap::from([(present.to_owned(), 0)]);
    for revision in pools.iter().filter_map(|pool| pool.status.as_ref()).flat_map(|status| &status.agent_revisions) {
        *sums.entry(revision.revision.clone()).or_default() += revision.sessions;
    }
    let mut revisions: Vec<RevisionStatus> =
        sums.into_iter().map(|(revision, sessions)| RevisionStatus { revision, sessions }).collect();
    revisions.sort_by_key(|r| (r.revision != present, std::cmp::Reverse(r.sessions), r.revision.clone()));
    revisions.truncate(MOST_REVISIONS);
    revisions
}

fn in_words(present: &str, revisions: &[RevisionStatus]) -> Option<String> {
    let words: Vec<String> = revisions
        .iter()
        .filter(|revision| revision.sessions > 0)
        .map(|RevisionStatus { revision, sessions }| {
            let old = if revision == present { "" } else { " (old)" };
            format!("{revision}: {sessions}{old}")
        })
        .collect();
    let mut text = words.join(", ");
    if text.len() > LONGEST_TEXT {
        text.truncate(text[..LONGEST_TEXT - 4].rfind(", ").unwrap_or(0));
        text.push_str(", …");
    }
    (!text.is_empty()).then_some(text)
}

/// Sums over the pools here, those with the most recent pods first.
fn worker_revisions(pools: &[Arc<WorkerPool>]) -> Vec<WorkerRevisionStatus> {
    let mut sums: Vec<WorkerRevisionStatus> = Vec::new();
    let statuses = || pools.iter().filter_map(|pool| pool.status.as_ref());
    let wanted: Vec<&String> = statuses().filter_map(|status| status.updated_revision.as_ref()).collect();
    for revision in statuses().flat_map(|status| &status.revisions) {
        match sums.iter_mut().find(|sum| sum.worker_revision == revision.worker_revision) {
            Some(sum) => {
                sum.replicas += revision.replicas;
                sum.ready_replicas += revision.ready_replicas;
                sum.sessions += revision.sessions;
            }
            None => sums.push(revision.clone()),
        }
    }
    sums.sort_by_key(|sum| !wanted.contains(&&sum.worker_revision));
    sums.truncate(MOST_WORKER_REVISIONS);
    sums
}

fn conditions(
    agent: &VoiceAgent,
    pools: &[Arc<WorkerPool>],
    status: &VoiceAgentStatus,
    problems: &[Problem],
) -> Vec<Say> {
    let accepted = match problems {
        [] => Say::new("Accepted", true, "Accepted", ""),
        [problem, rest @ ..] => {
            let more = if rest.is_empty() { String::new() } else { format!(" (and {} more)", rest.len()) };
            Say::new("Accepted", false, problem.reason, format!("{}{more}", problem.message))
        }
    };
    let found = |type_: &str, status: &str| {
        pools.iter().find_map(|pool| {
            let conditions = &pool.status.as_ref()?.conditions;
            conditions
                .iter()
                .find(|c| c.type_ == type_ && c.status == status)
                .map(|condition| (pool, condition.clone()))
        })
    };
    let in_region =
        |(pool, condition): (&Arc<WorkerPool>, Condition)| format!("{}: {}", pool.spec.region, condition.message);
    let progressing = match found("Progressing", "True") {
        Some(found) => Say::new("Progressing", true, "PoolsProgressing", in_region(found)),
        None => Say::new("Progressing", false, "Complete", ""),
    };
    let template = found("TemplateAccepted", "False").map(|found| ("TemplateRefused", in_region(found)));
    let degraded = template.or_else(|| found("Degraded", "True").map(|found| ("PoolDegraded", in_region(found))));
    let degraded = match degraded {
        Some((reason, message)) => Say::new("Degraded", true, reason, message),
        None => Say::new("Degraded", false, "AsExpected", ""),
    };
    vec![ready(agent, status, found("Ready", "Unknown").is_some(), &accepted), accepted, progressing, degraded]
}

fn ready(agent: &VoiceAgent, status: &VoiceAgentStatus, unknown: bool, accepted: &Say) -> Say {
    let serving = status.regions.iter().filter(|region| region.ready_replicas > 0).count();
    let count =
        format!("{} workers in {serving} of {} regions take calls", status.ready_replicas, status.regions.len());
    if agent.spec.suspend {
        Say::new("Ready", false, "Suspended", "spec.suspend is true")
    } else if serving > 0 {
        Say::new("Ready", true, "Ready", count)
    } else if accepted.holds == Holds::False {
        Say::new("Ready", false, accepted.reason, accepted.message.clone())
    } else if unknown {
        Say::new("Ready", Holds::Unknown, "RoutersUnreachable", "no router can be asked how the workers are")
    } else if status.replicas == 0 && status.draining == 0 {
        Say::new(
            "Ready",
            false,
            "NoWorkers",
            "no worker is there yet, or none is wanted: see minReplicas and the WorkerPools",
        )
    } else {
        Say::new("Ready", false, "NoWorkerReady", count)
    }
}

/// The API keeps whole seconds.
fn seconds(now: Timestamp) -> Timestamp {
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// A peer's numbers that are older than this are said to be old.
const STALE: Duration = Duration::from_secs(30);
const MOST_REVISIONS: usize = 32;
const MOST_WORKER_REVISIONS: usize = 64;
const LONGEST_TEXT: usize = 512;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pool(revisions: &[(&str, u32)]) -> Arc<WorkerPool> {
        let revisions: Vec<_> = revisions.iter().map(|(r, n)| json!({"revision": r, "sessions": n})).collect();
        Arc::new(
            serde_json::from_value(json!({
                "apiVersion": "antiphon.dev/v1alpha1", "kind": "WorkerPool", "metadata": {"name": "p"},
                "spec": {"agent": "a", "region": "r"}, "status": {"agentRevisions": revisions}
            }))
            .unwrap(),
        )
    }

    #[test]
    fn calls_are_counted_by_the_revision_they_began_with() {
        let pools = [pool(&[("new", 2), ("old", 3)]), pool(&[("old", 4), ("older", 9)])];
        let revisions = revisions("new", &pools);
        let plain: Vec<_> = revisions.iter().map(|r| (r.revision.as_str(), r.sessions)).collect();
        assert_eq!(plain, [("new", 2), ("older", 9), ("old", 7)]);
        assert_eq!(in_words("new", &revisions).unwrap(), "new: 2, older: 9 (old), old: 7 (old)");
        assert_eq!(in_words("new", &revisions[..0]), None);
        let many: Vec<_> = (0..99).map(|n| RevisionStatus { revision: format!("{n:010}"), sessions: 1 }).collect();
        let text = in_words("new", &many).unwrap();
        assert!(text.len() <= LONGEST_TEXT && text.ends_with(", …"), "{text}");
    }

    #[test]
    fn a_peers_old_numbers_are_said_to_be_old() {
        let agent: VoiceAgent = serde_json::from_value(json!({
            "apiVersion": "antiphon.dev/v1alpha1", "kind": "VoiceAgent",
            "metadata": {"name": "a", "namespace": "shop"},
            "spec": {"engine": {"type": "Echo"}, "regions": [{"name": "r"}]}
        }))
        .unwrap();
        let now = Timestamp::from_second(1_000).unwrap();
        let pool = antiphon_proto::v1::PoolDigest {
            agent: "shop/a".into(),
            workers: 2,
            slots: 10,
            free: 7,
            ..Default::default()
        };
        let digest = antiphon_proto::v1::RegionDigest { region: "r".into(), pools: vec![pool], ..Default::default() };
        let mut known = RegionStatus { digest: Some(digest), digest_age_ms: 1_000, ..Default::default() };
        let fresh = of_peer(&agent, "r", Some(&known), None, now);
        assert_eq!((fresh.ready_replicas, fresh.sessions, fresh.free_slots), (2, 3, 7));
        assert!(fresh.peer && fresh.stale_since.is_none());
        known.digest_age_ms = 40_000;
        let stale = of_peer(&agent, "r", Some(&known), Some(&fresh), now);
        assert_eq!(stale.stale_since, Some(Time(Timestamp::from_second(960).unwrap())));
        let silent = of_peer(&agent, "r", None, Some(&stale), now);
        assert_eq!(silent, stale, "the last word stands");
    }
}
