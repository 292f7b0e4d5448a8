//! What is said of a Drain.

use antiphon_core::{
    clock::Millis,
    drain::{DrainPhase as Phase, DrainPlan, DrainSnapshot, Proof},
};
use antiphon_crds::{CapacityCheck, Drain, DrainCapacity, DrainPhase, DrainStatus, DrainingWorker};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

use super::target::Target;
use crate::conditions::{Say, merge};

pub(super) fn of(
    drain: &Drain,
    target: &Target,
    snapshot: &DrainSnapshot,
    planned: &DrainPlan,
    now: Timestamp,
) -> DrainStatus {
    let before = drain.status.clone().unwrap_or_default();
    let begun = planned.phase != Phase::Pending;
    let started_at = before.started_at.clone().or_else(|| begun.then(|| Time(whole_seconds(now))));
    let initial = if before.started_at.is_some() { before.initial_sessions } else { planned.sessions };
    let drained = planned.phase == Phase::Drained;
    // Those that were there at the deadline did not end by themselves.
    let due = planned.deadline.is_some_and(|deadline| deadline <= crate::worker_pool::now());
    let ended = if due && !drained { before.ended_sessions.max(planned.sessions) } else { before.ended_sessions };
    let workers = u32::try_from(snapshot.workers.len()).unwrap_or(u32::MAX);
    let busiest = planned.busiest.iter().take(MOST_WORKERS).map(|((namespace, name), sessions)| DrainingWorker {
        namespace: namespace.clone(),
        name: name.clone(),
        sessions: *sessions,
    });
    DrainStatus {
        observed_generation: drain.metadata.generation,
        target: Some(target.to_string()),
        phase: Some(match planned.phase {
            Phase::Pending => DrainPhase::Pending,
            Phase::Draining => DrainPhase::Draining,
            Phase::Drained => DrainPhase::Drained,
        }),
        capacity: Some(capacity(&planned.proof, before.capacity, now)),
        workers,
        drained_workers: planned.drained,
        progress: Some(format!("{}/{workers}", planned.drained)),
        initial_sessions: initial,
        sessions: planned.sessions,
        ended_sessions: ended,
        started_at,
        deadline_at: planned.deadline.and_then(time),
        finished_at: drained.then(|| before.finished_at.clone().unwrap_or_else(|| Time(whole_seconds(now)))),
        busiest: busiest.collect(),
        conditions: merge(&before.conditions, conditions(drain, planned, workers), drain.metadata.generation, now),
    }
}

/// A Drain that cannot be carried out. One that had begun orders nothing any more.
pub(super) fn refused(drain: &Drain, reason: &'static str, problem: &str, now: Timestamp) -> DrainStatus {
    let before = drain.status.clone().unwrap_or_default();
    let said = vec![Say::new("Accepted", false, reason, problem), Say::new("Drained", false, reason, problem)];
    DrainStatus {
        observed_generation: drain.metadata.generation,
        phase: Some(DrainPhase::Failed),
        started_at: None,
        conditions: merge(&before.conditions, said, drain.metadata.generation, now),
        ..before
    }
}

fn conditions(drain: &Drain, planned: &DrainPlan, workers: u32) -> Vec<Say> {
    let proof = &planned.proof;
    let unproven = drain.spec.capacity_check == CapacityCheck::Ignore;
    let numbers = format!("{} calls, room for {} elsewhere", proof.needed, proof.free);
    let capacity = if proof.holds() {
        Say::new("CapacityProven", true, "RoomElsewhere", numbers)
    } else {
        let short = format!("{numbers}; too little for {}", proof.short.join(", "));
        let remedy = if unproven {
            "capacityCheck is Ignore"
        } else {
            "scale them up elsewhere, or set capacityCheck to Ignore"
        };
        Say::new("CapacityProven", false, "NoRoomElsewhere", format!("{short}: {remedy}"))
    };
    let left = format!("{} of {workers} workers drained, {} calls left", planned.drained, planned.sessions);
    let drained = match planned.phase {
        Phase::Pending => {
            Say::new("Drained", false, "WaitingForRoom", "nothing has begun: there is too little room elsewhere")
        }
        Phase::Draining => Say::new("Drained", false, "Draining", left),
        Phase::Drained => Say::new("Drained", true, "Drained", left),
    };
    vec![Say::new("Accepted", true, "Accepted", ""), capacity, drained]
}

/// The time of a check changes only with what was found: nobody wants a write for it.
fn capacity(proof: &Proof, before: Option<DrainCapacity>, now: Timestamp) -> DrainCapacity {
    let mut found = DrainCapacity {
        needed: proof.needed,
        free_elsewhere: proof.free,
        sufficient: proof.holds(),
        short_agents: proof.short.iter().take(MOST_AGENTS).cloned().collect(),
        checked_at: before.as_ref().and_then(|before| before.checked_at.clone()),
    };
    if before.as_ref() != Some(&found) {
        found.checked_at = Some(Time(whole_seconds(now)));
    }
    found
}

fn time(at: Millis) -> Option<Time> {
    let second = i64::try_from(at.0 / 1_000).ok()?;
    Timestamp::from_second(second).ok().map(Time)
}

/// The API keeps whole seconds.
fn whole_seconds(now: Timestamp) -> Timestamp {
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

const MOST_WORKERS: usize = 32;
const MOST_AGENTS: usize = 16;
