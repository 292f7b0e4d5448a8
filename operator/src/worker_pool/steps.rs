//! Carries out one step of a plan.

use antiphon_core::{
    clock::Millis,
    pool::{LeaveReason, Phase, Step},
};
use antiphon_proto::v1;
use k8s_openapi::{
    api::{apps::v1::ReplicaSet, core::v1::Pod},
    jiff::Timestamp,
};
use kube::{Resource as _, ResourceExt as _};
use serde_json::{Value, json};

use super::{
    Round, now,
    observe::{DEADLINE, DRAINING, Observed, RELEASED, is_released, pod_state},
};
use crate::{
    Error,
    pod_template::{self, EVICTION},
};

pub(super) async fn carry_out(round: &Round<'_>, seen: &Observed, step: &Step, all: &[Step]) -> Result<(), Error> {
    tracing::debug!(pool = round.names.pool, ?step, "carries out");
    match step {
        Step::Scale { revision, from, to, expected } => scale(round, seen, revision, *from, *to, expected).await,
        Step::SetPhase { worker, phase, deadline } => {
            set_phase(round, worker, *phase, *deadline, word(reason_of(all, worker))).await
        }
        Step::Mark { worker, deadline, reason } => {
            let labels = json!({DRAINING: word(Some(*reason))});
            patch(round, seen, worker, labels, json!({DEADLINE: rfc3339(*deadline)}), None).await?;
            let note = format!("worker {worker} drains until {}: {}", rfc3339(*deadline), sentence(*reason));
            tell_of(round, seen, worker, "WorkerDraining", "Drain", note).await;
            Ok(())
        }
        Step::Unmark { worker } => {
            patch(round, seen, worker, json!({DRAINING: null}), json!({DEADLINE: null}), None).await?;
            let note = format!("worker {worker} takes calls again");
            tell_of(round, seen, worker, "WorkerBack", "Undrain", note).await;
            Ok(())
        }
        Step::Release { worker } => {
            patch(round, seen, worker, json!({RELEASED: "true"}), costs(Some(LOWEST), true), Some(true)).await
        }
        Step::Restore { worker } => {
            let evictable = round.wanted.safe_to_evict;
            patch(round, seen, worker, json!({RELEASED: null}), costs(None, evictable), Some(false)).await
        }
        Step::Delete { worker } => {
            let Some(pod) = seen.pod(worker) else { return Ok(()) };
            round.context.applier.delete_unchanged(pod).await?;
            let note = format!("worker {worker} was drained and is deleted; its ReplicaSet makes its successor");
            tell_of(round, seen, worker, "WorkerReplaced", "Delete", note).await;
            Ok(())
        }
        Step::DeleteSet { revision } => {
            let Some(set) = seen.set(revision) else { return Ok(()) };
            round.context.applier.delete_unchanged(set).await.map(drop)
        }
    }
}

/// Pods whose autoscaler annotations are not what the agent says now.
pub(super) async fn mark_evictable(round: &Round<'_>, seen: &Observed) -> Result<(), Error> {
    for pod in &seen.pods {
        if pod_state(pod) == antiphon_core::pool::PodState::Leaving || is_released(pod) {
            continue;
        }
        let safe = round.wanted.safe_to_evict;
        let (key, busy, empty) = EVICTION[0];
        let present = pod.annotations().get(key).map(String::as_str);
        if present != Some(if safe { empty } else { busy }) {
            patch(round, seen, &pod.name_any(), json!({}), costs(None, safe), None).await?;
        }
    }
    Ok(())
}

async fn scale(
    round: &Round<'_>,
    seen: &Observed,
    revision: &str,
    from: Option<u32>,
    to: u32,
    expected: &[String],
) -> Result<(), Error> {
    let (context, names) = (round.context, &round.names);
    let Some(from) = from else {
        let Some(template) = &round.wanted.template else { return Ok(()) };
        let owner = round.pool.controller_owner_ref(&()).unwrap_or_default();
        let set = pod_template::replica_set(names, template, owner, to, &context.config)?;
        context.applier.seed(&set).await?;
        round.memory.wrote_set(created(round, &set).await?);
        let note = format!("{to} workers of revision {revision} are made");
        context.events.normal(round.pool, "RevisionCreated", "Scale", note).await;
        return Ok(());
    };
    let Some(set) = seen.set(revision) else { return Ok(()) };
    // Refused if anything of it has changed since it was seen.
    let patch = json!({"metadata": {"resourceVersion": set.resource_version()}, "spec": {"replicas": to}});
    let written = context.applier.merge(set, patch).await?;
    round.memory.wrote_set(written);
    let (reason, note) = if to < from {
        ("WorkersRemoved", format!("revision {revision}: {from} to {to} workers; {} go", listed(expected)))
    } else {
        ("WorkersAdded", format!("revision {revision}: {from} to {to} workers"))
    };
    context.events.normal(round.pool, reason, "Scale", note).await;
    Ok(())
}

/// The ReplicaSet that was just made, as the API server has it.
async fn created(round: &Round<'_>, set: &ReplicaSet) -> Result<ReplicaSet, Error> {
    let sets: kube::Api<ReplicaSet> = kube::Api::namespaced(round.context.client.clone(), round.names.namespace);
    Ok(sets.get(&set.name_any()).await?)
}

async fn set_phase(
    round: &Round<'_>,
    worker: &str,
    phase: Phase,
    deadline: Option<Millis>,
    reason: &str,
) -> Result<(), Error> {
    let left = deadline.map_or(0, |deadline| deadline.since(now()).as_millis());
    let request = v1::SetWorkerPhaseRequest {
        name: worker.to_owned(),
        incarnation: 0,
        phase: match phase {
            Phase::Active => v1::Phase::Active,
            Phase::Cordoned => v1::Phase::Cordoned,
            Phase::Draining => v1::Phase::Draining,
        }
        .into(),
        deadline_ms: u32::try_from(left).unwrap_or(u32::MAX),
        reason: reason.to_owned(),
    };
    round.context.links.set_worker_phase(round.names.region, request).await.map(drop)
}

/// Changes a pod's labels and annotations. `released` is what this does to its deletion cost.
async fn patch(
    round: &Round<'_>,
    seen: &Observed,
    worker: &str,
    labels: Value,
    annotations: Value,
    released: Option<bool>,
) -> Result<(), Error> {
    let Some(pod) = seen.pod(worker) else { return Ok(()) };
    // Several steps of a plan may be about one pod.
    let patch = json!({"metadata": {"labels": labels, "annotations": annotations}});
    match round.context.applier.merge::<Pod>(pod, patch).await {
        Ok(mut written) => {
            crate::trim::pod(&mut written);
            let released = released.unwrap_or_else(|| is_released(&written));
            round.memory.wrote_pod(written, released);
            Ok(())
        }
        // Gone meanwhile; the next look knows.
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}

/// An event of the pool about one of its workers; those of different workers are kept apart.
async fn tell_of(round: &Round<'_>, seen: &Observed, worker: &str, reason: &str, action: &str, note: String) {
    if let Some(pod) = seen.pod(worker) {
        round.context.events.about(round.pool, pod, reason, action, note).await;
    }
}

/// Annotations for Kubernetes and for autoscalers of nodes.
fn costs(cost: Option<&str>, evictable: bool) -> Value {
    let mut annotations = json!({COST: cost});
    for (key, busy, empty) in EVICTION {
        annotations[key] = (if evictable { empty } else { busy }).into();
    }
    annotations
}

fn reason_of(steps: &[Step], name: &str) -> Option<LeaveReason> {
    steps.iter().find_map(|step| match step {
        Step::Mark { worker, reason, .. } if worker == name => Some(*reason),
        _ => None,
    })
}

/// A label's value.
const fn word(reason: Option<LeaveReason>) -> &'static str {
    match reason {
        Some(LeaveReason::ScaleDown) => "ScaleDown",
        Some(LeaveReason::Rollout) => "Rollout",
        Some(LeaveReason::Drain) => "Drain",
        None => "Operator",
    }
}

const fn sentence(reason: LeaveReason) -> &'static str {
    match reason {
        LeaveReason::ScaleDown => "fewer workers are wanted",
        LeaveReason::Rollout => "another worker revision takes its place",
        LeaveReason::Drain => "it or its node is to be emptied",
    }
}

fn listed(names: &[String]) -> String {
    match names {
        [] => "none that had been started".to_owned(),
        names if names.len() > 5 => format!("{} and {} more", names[..5].join(", "), names.len() - 5),
        names => names.join(", "),
    }
}

fn rfc3339(at: Millis) -> String {
    let at = i64::try_from(at.0).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    at.unwrap_or(Timestamp::MAX).to_string()
}

/// Annotation that a ReplicaSet's controller goes by.
const COST: &str = "controller.kubernetes.io/pod-deletion-cost";
const LOWEST: &str = "-2147483647";
