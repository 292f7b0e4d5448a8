//! How released workers are removed so that Kubernetes takes no other.
//!
//! A ReplicaSet whose count goes down removes its pods in the order of [`rank`], and within that by deletion cost; only
//! then by node, age and restarts, which nobody can steer. So the count goes down by as many as stand before anybody
//! else in that order, all of them released.

use std::collections::BTreeMap;

use super::{Lack, PodState, Roster, SETTLE, SetView, Step, WorkerView, count};
use crate::{clock::Millis, pool::PATIENCE, rollout::Goals};

/// Kubernetes removes the lowest first, whatever the deletion cost.
pub(super) const fn rank(pod: PodState) -> u8 {
    match pod {
        PodState::Unscheduled { .. } => 0,
        PodState::Pending => 1,
        PodState::NotReady => 2,
        PodState::Ready | PodState::Leaving => 3,
    }
}

/// Removes as many of the removable workers as is safe now, and pods that have not come yet and are not wanted any more.
pub(super) fn lower(
    roster: &Roster<'_>,
    goals: &Goals,
    lacks: &BTreeMap<String, Lack>,
    removable: &[&WorkerView],
    now: Millis,
    steps: &mut Vec<Step>,
) {
    for set in roster.sets {
        let lack = lacks.get(&set.revision).copied().unwrap_or_default();
        let mut ready: Vec<&WorkerView> = removable
            .iter()
            .copied()
            .filter(|worker| worker.revision == set.revision && now.since(worker.cost_since) >= SETTLE)
            .collect();
        ready.sort_by_key(|worker| &worker.name);
        if lack.made > 0 {
            continue;
        }
        if lack.left > 0 {
            // Its ReplicaSet makes the successor as soon as it is gone.
            steps.extend(ready.iter().take(lack.left as usize).map(|worker| delete(worker)));
            continue;
        }
        if !is_settled(roster, set) {
            continue;
        }
        let never_came = not_wanted(roster, goals, set);
        let (first, blocked) = first_in_line(roster, set, &ready, now);
        let fewer = never_came + count(first.iter());
        if fewer > 0 {
            let expected = first.iter().map(|worker| worker.name.clone()).collect();
            let revision = set.revision.clone();
            steps.push(Step::Scale { revision, from: Some(set.replicas), to: set.replicas - fewer, expected });
        } else if let Some(blocker) = blocked {
            let hopeless =
                matches!(blocker.pod, PodState::Unscheduled { since: Some(since) } if now.since(since) >= PATIENCE);
            let due = ready.iter().filter(|worker| hopeless || now.since(worker.cost_since) >= BLOCKED);
            steps.extend(due.map(|worker| delete(worker)));
        }
    }
}

fn delete(worker: &WorkerView) -> Step {
    Step::Delete { worker: worker.name.clone() }
}

/// Kubernetes has acted on the present count, and pods and ReplicaSet were seen at the same time, as far as can be told.
fn is_settled(roster: &Roster<'_>, set: &SetView) -> bool {
    let seen = count(roster.of(&set.revision));
    let ready = count(roster.of(&set.revision).filter(|worker| worker.pod == PodState::Ready));
    seen <= set.replicas && set.report.is_some_and(|report| report.replicas == seen && report.ready == ready)
}

/// Pods of the set that have not been made, for want of quota for example, and are not needed any more.
fn not_wanted(roster: &Roster<'_>, goals: &Goals, set: &SetView) -> u32 {
    let members = count(roster.members().filter(|worker| worker.revision == set.revision));
    let to_come = roster.to_come(set);
    (members + to_come).saturating_sub(goals.of(&set.revision)).min(to_come)
}

/// After the count of a set went down and before its controller acted on it: everybody whom it may take. Of those who
/// share a place any may be taken; if they were not released, somebody else lowered the count, and nothing is known.
pub(super) fn may_be_going<'a>(roster: &Roster<'a>, set: &SetView) -> Vec<&'a WorkerView> {
    let line = line(roster, set);
    let excess = line.len().saturating_sub(set.replicas as usize);
    let Some(last) = excess.checked_sub(1).map(|index| place(line[index])) else {
        return Vec::new();
    };
    line.into_iter().filter(|worker| place(worker) < last || place(worker) == last && worker.released).collect()
}

/// Pods of a set in the order in which Kubernetes removes them, as far as that can be known.
fn line<'a>(roster: &Roster<'a>, set: &SetView) -> Vec<&'a WorkerView> {
    let mut line: Vec<&WorkerView> = roster.of(&set.revision).collect();
    line.sort_by(|a, b| place(a).cmp(&place(b)).then_with(|| a.name.cmp(&b.name)));
    line
}

/// Pods that share a place may go in any order.
const fn place(worker: &WorkerView) -> (u8, bool) {
    (rank(worker.pod), !worker.released)
}

/// Those among `ready` whom Kubernetes removes before all others, and who stands before the rest of them.
fn first_in_line<'a>(
    roster: &Roster<'a>,
    set: &SetView,
    ready: &[&'a WorkerView],
    now: Millis,
) -> (Vec<&'a WorkerView>, Option<&'a WorkerView>) {
    let line = line(roster, set);
    let goes = |worker: &&WorkerView| ready.iter().any(|one| one.name == worker.name);
    let Some(end) = line.iter().position(|worker| !goes(worker)) else {
        return (line, None);
    };
    let blocker = line[end];
    // Whoever shares the place of one that stays may be spared for it.
    let first: Vec<&WorkerView> = line[..end].iter().copied().filter(|w| place(w) < place(blocker)).collect();
    // Where a cost was changed lately, or is about to be, the controller may still see the one before. Pods in front may
    // be started before it looks, and then stand among those.
    let settled = line.iter().all(|w| now.since(w.cost_since) >= SETTLE && (!w.released || goes(w)));
    let held_up = ready.len() > first.len();
    (if settled { first } else { Vec::new() }, (settled && held_up).then_some(blocker))
}

/// How long a released worker waits for one that stays and would be removed before it.
pub(super) const BLOCKED: std::time::Duration = std::time::Duration::from_secs(60);
