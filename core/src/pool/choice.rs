//! Who goes.
//!
//! First those that never had a call, then idle ones, then those already on their way, then those with the fewest
//! calls. Who still holds calls while another one has become idle is taken back, and the idle one goes in its place.

use super::{Calls, DrainOrder, LeaveReason, Leaver, Phase, PodState, Policy, Roster, WorkerView, count};
use crate::rollout::{Budget, Goals};

/// Everybody who is to drain now, or goes on draining.
pub(super) fn leaving<'a>(roster: &Roster<'a>, policy: &Policy, goals: &Goals, budget: Budget) -> Vec<Leaver<'a>> {
    let at_once = |worker: &WorkerView| {
        let ordered = matches!(worker.order, Some(DrainOrder::Replace { .. })) && !roster.set_aside(worker);
        let reason = if ordered { LeaveReason::Drain } else { LeaveReason::ScaleDown };
        (ordered || roster.is_sunk(worker)).then_some(reason)
    };
    let mut leaving: Vec<Leaver<'a>> =
        roster.active.iter().filter_map(|worker| Some(Leaver { worker, reason: at_once(worker)? })).collect();
    let mut serving = count(roster.active.iter().filter(|worker| worker.serves() && at_once(worker).is_none()));
    let least = policy.target.saturating_sub(budget.unavailable);
    let mut candidates = too_many(roster, policy, goals);
    candidates.sort_by_key(|leaver| key(leaver.worker));
    for candidate in candidates {
        // Who takes no calls, or was told so already, costs nothing.
        let costs = candidate.worker.pod == PodState::Ready && !candidate.worker.drains();
        if costs {
            if candidate.worker.serves() && serving <= least || !candidate.worker.serves() && serving < least {
                continue;
            }
            serving -= u32::from(candidate.worker.serves());
        }
        leaving.push(candidate);
    }
    leaving
}

/// Everybody who is not to stay in the end.
fn too_many<'a>(roster: &Roster<'a>, policy: &Policy, goals: &Goals) -> Vec<Leaver<'a>> {
    let is_in_turn =
        |w: &&&WorkerView| w.order == Some(DrainOrder::ReplaceInTurn) && !roster.set_aside(w) && !roster.is_sunk(w);
    let in_turn = roster.active.iter().filter(is_in_turn);
    let mut too_many: Vec<Leaver<'a>> = in_turn.map(|worker| Leaver { worker, reason: LeaveReason::Drain }).collect();
    for set in roster.sets {
        let mut members: Vec<&WorkerView> = roster.members().filter(|w| w.revision == set.revision).collect();
        members.sort_by_key(|worker| key(worker));
        let goal = goals.of(&set.revision) as usize;
        // What has not come yet goes first.
        let excess = members.len().saturating_sub(goal);
        let old = set.revision != policy.rollout.revision && goal == 0;
        let reason = if old && policy.target > 0 { LeaveReason::Rollout } else { LeaveReason::ScaleDown };
        too_many.extend(members.into_iter().take(excess).map(|worker| Leaver { worker, reason }));
    }
    if goals.surplus > 0 {
        let mut members: Vec<&WorkerView> = roster.members().collect();
        members.sort_by_key(|worker| key(worker));
        let surplus = members.into_iter().take(goals.surplus as usize);
        too_many.extend(surplus.map(|worker| Leaver { worker, reason: LeaveReason::ScaleDown }));
    }
    too_many
}

/// Lowest goes first.
fn key(worker: &WorkerView) -> (u8, u8, bool, u32, std::cmp::Reverse<crate::clock::Millis>, &str) {
    let calls = match worker.calls {
        Calls::None => 0,
        Calls::Held { count, .. } => count,
        Calls::Unknown => u32::MAX,
    };
    let class = if worker.is_harmless() {
        0
    } else if calls == 0 {
        1
    } else {
        2
    };
    let rank = if class == 0 { super::removal::rank(worker.pod) } else { 0 };
    let stays_so_far = !(worker.drains() || matches!(worker.calls, Calls::Held { phase: Phase::Draining, .. }));
    (class, rank, stays_so_far, calls, std::cmp::Reverse(worker.created), &worker.name)
}
