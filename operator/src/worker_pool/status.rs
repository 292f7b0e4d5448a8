//! What is said of a pool.

use std::collections::BTreeMap;

use antiphon_core::{
    pool::{PodState, PoolPlan},
    rollout::{Progress, Stage},
};
use antiphon_crds::{RevisionStatus, WorkerPoolStatus, WorkerRevisionStatus};
use antiphon_proto::v1;
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::ResourceExt as _;

use super::{
    Round,
    observe::{DRAINING, Observed, number, pod_state, revision_of},
    wanted::Wanted,
};
use crate::{
    Error,
    conditions::{Holds, Say, merge},
    labels::POOL,
};

pub(super) fn of(
    round: &Round<'_>,
    seen: &Observed,
    planned: &PoolPlan,
    trouble: Option<&Error>,
    now: Timestamp,
) -> WorkerPoolStatus {
    let before = round.pool.status.clone().unwrap_or_default();
    let progress = &planned.progress;
    let leaves = |name: &str| planned.leaving.iter().any(|leaving| leaving == name);
    let mut status = WorkerPoolStatus {
        observed_generation: round.pool.metadata.generation,
        desired_replicas: progress.target,
        replicas: progress.replicas,
        ready_replicas: progress.serving,
        updated_replicas: progress.updated,
        draining: progress.draining + progress.emptied,
        selector: Some(format!("{POOL}={},!{DRAINING}", round.names.pool)),
        updated_revision: Some(round.wanted.policy.rollout.revision.clone()).filter(|revision| !revision.is_empty()),
        ..WorkerPoolStatus::default()
    };
    let tally = Tally::of(seen, &leaves);
    status.current_revision = tally.current(&round.wanted.policy.rollout.revision);
    if seen.fleet.connected {
        status.busy = tally.busy;
        status.sessions = tally.sessions;
        status.slots = tally.slots;
        status.free_slots = tally.free;
        status.agent_revisions = tally.agent_revisions();
    } else {
        // Nobody knows better than what was known last.
        (status.busy, status.sessions) = (before.busy, before.sessions);
        (status.slots, status.free_slots) = (before.slots, before.free_slots);
        status.agent_revisions.clone_from(&before.agent_revisions);
    }
    status.revisions = tally.revisions(seen);
    let said = conditions(&round.wanted, seen, planned, trouble);
    status.conditions = merge(&before.conditions, said, round.pool.metadata.generation, now);
    status
}

/// Sums over workers.
#[derive(Debug, Default)]
struct Tally {
    busy: u32,
    sessions: u32,
    slots: u32,
    free: u32,
    by_agent_revision: BTreeMap<String, u32>,
    by_revision: BTreeMap<String, WorkerRevisionStatus>,
    staying: BTreeMap<String, u32>,
}

impl Tally {
    fn of(seen: &Observed, leaves: &dyn Fn(&str) -> bool) -> Self {
        let mut tally = Self::default();
        for pod in &seen.pods {
            let state = pod_state(pod);
            let name = pod.name_any();
            let worker = seen.fleet.workers.get(&name);
            tally.count_worker(worker);
            if state == PodState::Leaving {
                continue;
            }
            let revision = revision_of(pod.labels()).to_owned();
            let entry = tally.by_revision.entry(revision.clone()).or_default();
            entry.replicas += 1;
            entry.sessions += worker.map_or(0, |worker| worker.active);
            if leaves(&name) {
                continue;
            }
            *tally.staying.entry(revision).or_default() += 1;
            let serves =
                |worker: &&v1::WorkerStatus| matches!(worker.phase(), v1::Phase::Active | v1::Phase::Unspecified);
            if let Some(worker) = worker.filter(serves).filter(|_| state == PodState::Ready) {
                entry.ready_replicas += 1;
                tally.slots += worker.slots;
                tally.free += worker.slots.saturating_sub(worker.active + worker.reserved);
            }
        }
        tally
    }

    fn count_worker(&mut self, worker: Option<&v1::WorkerStatus>) {
        let Some(worker) = worker else { return };
        self.sessions += worker.active;
        self.busy += u32::from(worker.active > 0);
        for revision in &worker.revisions {
            *self.by_agent_revision.entry(revision.revision.clone()).or_default() += revision.sessions;
        }
    }

    /// The revision that most workers had before the wanted one.
    fn current(&self, wanted: &str) -> Option<String> {
        let others = self.staying.iter().filter(|(revision, _)| *revision != wanted);
        let most = others.max_by_key(|(_, count)| **count).map(|(revision, _)| revision.clone());
        most.or_else(|| Some(wanted.to_owned())).filter(|revision| !revision.is_empty())
    }

    fn agent_revisions(&self) -> Vec<RevisionStatus> {
        let mut revisions: Vec<RevisionStatus> = self
            .by_agent_revision
            .iter()
            .filter(|(revision, sessions)| **sessions > 0 && !revision.is_empty())
            .map(|(revision, sessions)| RevisionStatus { revision: revision.clone(), sessions: *sessions })
            .collect();
        revisions.sort_by(|a, b| b.sessions.cmp(&a.sessions).then_with(|| a.revision.cmp(&b.revision)));
        revisions.truncate(MOST_AGENT_REVISIONS);
        revisions
    }

    /// The newest ReplicaSet's first.
    fn revisions(&self, seen: &Observed) -> Vec<WorkerRevisionStatus> {
        let mut sets: Vec<_> = seen.sets.iter().filter(|set| set.metadata.deletion_timestamp.is_none()).collect();
        sets.sort_by_key(|set| std::cmp::Reverse((set.metadata.creation_timestamp.clone(), set.name_any())));
        let status = |set: &&std::sync::Arc<k8s_openapi::api::apps::v1::ReplicaSet>| {
            let revision = revision_of(set.labels());
            let counted = self.by_revision.get(revision).cloned().unwrap_or_default();
            WorkerRevisionStatus { worker_revision: revision.to_owned(), ..counted }
        };
        sets.iter().map(status).take(MOST_REVISIONS).collect()
    }
}

fn conditions(wanted: &Wanted, seen: &Observed, planned: &PoolPlan, trouble: Option<&Error>) -> Vec<Say> {
    let mut said = vec![
        ready(wanted, seen, &planned.progress),
        progressing(wanted, &planned.progress),
        limited(wanted),
        template(wanted),
    ];
    said.push(match (&wanted.unknown_revision, refusal(seen), stuck(seen, &planned.progress), trouble) {
        (Some(revision), ..) => Say::new(
            "Degraded",
            true,
            "UnknownRevision",
            format!("rollout.rollbackTo names {revision}, of which no ReplicaSet is left: workers stay at the revisions they have. Take it away, or name one of status.revisions"),
        ),
        (_, Some(message), ..) => Say::new("Degraded", true, "PodsRefused", format!("Kubernetes makes no pods: {message}")),
        (_, _, Some((reason, message)), _) => Say::new("Degraded", true, reason, message),
        (_, _, _, Some(error)) => Say::new("Degraded", true, "ReconcileFailed", format!("{error}; it is tried again")),
        _ => Say::new("Degraded", false, "AsExpected", ""),
    });
    said
}

fn ready(wanted: &Wanted, seen: &Observed, progress: &Progress) -> Say {
    let count = format!("{} of {} workers take calls", progress.serving, progress.target);
    if let Some(reason) = wanted.nobody {
        let left = progress.draining + progress.replicas;
        let message = if left > 0 { format!("{reason}; {left} workers are left") } else { reason.to_owned() };
        return Say::new("Ready", false, "NoWorkers", message);
    }
    if wanted.refused.is_some() && progress.target == 0 {
        return Say::new("Ready", false, "TemplateRefused", "no worker can be made: see TemplateAccepted");
    }
    if progress.target == 0 {
        return Say::new("Ready", true, "ScaledToZero", "no workers are wanted");
    }
    if !seen.fleet.connected {
        let message = "no router of the region can be asked how its workers are; calls go on without it";
        return Say::new("Ready", Holds::Unknown, "RoutersUnreachable", message);
    }
    if progress.serving >= progress.target {
        Say::new("Ready", true, "Ready", count)
    } else if progress.emptied > 0 {
        let message = format!("{count}; {} are out of service until their Drain is deleted", progress.emptied);
        Say::new("Ready", false, "Drained", message)
    } else if progress.serving > 0 {
        Say::new("Ready", false, "TooFewWorkers", count)
    } else {
        Say::new("Ready", false, "NoWorkerReady", count)
    }
}

fn progressing(wanted: &Wanted, progress: &Progress) -> Say {
    let revision = &wanted.policy.rollout.revision;
    let updated = format!("{} of {} workers have revision {revision}", progress.updated, progress.target);
    let draining = match progress.draining {
        0 => String::new(),
        1 => "; 1 worker drains".to_owned(),
        count => format!("; {count} workers drain"),
    };
    let moving = |reason, message| Say::new("Progressing", true, reason, message);
    match progress.stage {
        Stage::Complete => Say::new("Progressing", false, "Complete", ""),
        Stage::Progressing => moving("Progressing", format!("{updated}{draining}")),
        Stage::DrainingForRoom => moving(
            "DrainingForRoom",
            format!("{updated}{draining}; no node has room for one more, so old ones go first"),
        ),
        Stage::WaitingForRoom => moving(
            "WaitingForRoom",
            format!(
                "{updated}{draining}; {} new ones wait for a node with room: add nodes, or set rollout.strategy to Auto or DrainFirst",
                progress.stuck
            ),
        ),
        Stage::Canary => Say::new(
            "Progressing",
            false,
            "Canary",
            format!("{updated}; it goes on when rollout.canary is taken away or its paused is false"),
        ),
        Stage::Paused => {
            Say::new("Progressing", false, "Paused", format!("{updated}; it goes on when rollout.paused is false"))
        }
    }
}

fn limited(wanted: &Wanted) -> Say {
    let none = Say::new("ScalingLimited", false, "WithinLimits", "");
    let Some(limits) = wanted.limits.filter(|_| wanted.nobody.is_none()) else { return none };
    let (asked, percent) = (wanted.asked, limits.capacity_percent);
    if asked < limits.min_replicas {
        let message = format!("{asked} workers are asked for; the agent's minReplicas here is {}", limits.min_replicas);
        Say::new("ScalingLimited", true, "TooFewReplicas", message)
    } else if asked > limits.max_replicas {
        let message = format!("{asked} workers are asked for; the agent's maxReplicas here is {}", limits.max_replicas);
        Say::new("ScalingLimited", true, "TooManyReplicas", message)
    } else if u64::from(asked) * u64::from(percent) > u64::from(limits.max_replicas) * 100 {
        let message = format!(
            "{asked} workers times the region's capacityPercent {percent} are more than the agent's maxReplicas here, {}",
            limits.max_replicas
        );
        Say::new("ScalingLimited", true, "TooManyReplicas", message)
    } else {
        none
    }
}

fn template(wanted: &Wanted) -> Say {
    match &wanted.refused {
        Some(message) => Say::new(
            "TemplateAccepted",
            false,
            "Refused",
            format!("the API server does not take the worker template, so nothing is replaced: {message}"),
        ),
        None => Say::new("TemplateAccepted", true, "Accepted", ""),
    }
}

/// Why a ReplicaSet gets no pods, such as a quota or the namespace's Pod Security level.
fn refusal(seen: &Observed) -> Option<String> {
    let conditions = seen.sets.iter().filter_map(|set| set.status.as_ref()?.conditions.as_ref()).flatten();
    let failed = conditions.filter(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True");
    failed.filter_map(|condition| condition.message.clone()).next()
}

/// A worker that does not start, and what its pod says of it.
fn stuck(seen: &Observed, progress: &Progress) -> Option<(&'static str, String)> {
    if progress.serving >= progress.target {
        return None;
    }
    let waiting = |pod: &Pod| {
        let status = pod.status.as_ref()?;
        let containers = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
        let mut waiting = containers.filter_map(|container| {
            let waiting = container.state.as_ref()?.waiting.as_ref()?;
            let reason = waiting.reason.clone().filter(|reason| TROUBLE.contains(&reason.as_str()))?;
            let restarts = number(container.restart_count);
            let message = waiting.message.clone().unwrap_or_default();
            Some(format!(
                "worker {}: container {}: {reason} after {restarts} restarts: {message}",
                pod.name_any(),
                container.name
            ))
        });
        waiting.next().map(|message| ("WorkerDoesNotStart", message))
    };
    let homeless = |pod: &Pod| {
        let PodState::Unscheduled { since: Some(_) } = pod_state(pod) else { return None };
        let conditions = pod.status.as_ref()?.conditions.as_ref()?;
        let message = conditions.iter().find(|condition| condition.type_ == "PodScheduled")?.message.clone()?;
        Some(("NoRoom", format!("no node takes worker {}: {message}", pod.name_any())))
    };
    let pods = || seen.pods.iter().map(AsRef::as_ref);
    pods().find_map(waiting).or_else(|| pods().find_map(homeless))
}

/// What a container waits for that does not come by itself.
const TROUBLE: [&str; 7] = [
    "CrashLoopBackOff",
    "ImagePullBackOff",
    "ErrImagePull",
    "ErrImageNeverPull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
];
const MOST_AGENT_REVISIONS: usize = 32;
const MOST_REVISIONS: usize = 64;
