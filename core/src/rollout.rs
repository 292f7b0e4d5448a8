//! From one worker revision to the next: how many workers of each, in which order, and how far it has come.

use std::collections::BTreeMap;

use crate::{
    clock::Millis,
    pool::{DrainOrder, Leaver, Policy, Roster, WorkerView, count},
};

/// What is wanted of a rollout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RolloutPolicy {
    /// The wanted worker revision.
    pub revision: String,
    /// What comes first.
    pub strategy: Strategy,
    /// Workers more than wanted that there may be on the way; with draining first, workers fewer. At least 1.
    pub max_surge: u32,
    /// Only so many workers get the wanted revision; the others keep the one that most have.
    pub canary: Option<u32>,
    /// Every worker keeps the revision it has.
    pub paused: bool,
}

/// What comes first when a worker is replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// The new worker: capacity never falls, and room for one more is needed.
    SurgeFirst,
    /// The old one leaves: no more room is needed than before.
    DrainFirst,
    /// The new worker as long as nodes have room; where they have none, the old one leaves for it.
    #[default]
    Auto,
}

/// How many workers of which revision there are to be now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goals {
    by_revision: BTreeMap<String, u32>,
    /// Workers that are too many whatever their revision is; only while paused.
    pub(crate) surplus: u32,
}

/// By how much the number of workers may differ from the wanted one on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Pods more.
    pub surge: u32,
    /// Workers that take calls, fewer.
    pub unavailable: u32,
}

/// One revision, as far as goals depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Revision<'a> {
    /// The revision.
    pub name: &'a str,
    /// Workers of it that nobody wants replaced, those to come included.
    pub members: u32,
    /// When its ReplicaSet was made.
    pub created: Millis,
}

/// How far a pool is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Workers wanted.
    pub target: u32,
    /// Workers that are there and are not being drained.
    pub replicas: u32,
    /// Those of them that take calls.
    pub serving: u32,
    /// Those of them that have the wanted revision.
    pub updated: u32,
    /// Those of them that have the wanted revision and take calls.
    pub updated_serving: u32,
    /// Workers on their way out.
    pub draining: u32,
    /// Workers that stay and are to hold no calls until somebody takes that back.
    pub emptied: u32,
    /// Workers that no node has room for.
    pub stuck: u32,
    /// Workers whose node is out of touch.
    pub missing: u32,
    /// What goes on.
    pub stage: Stage,
}

/// What goes on in a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Everything is as wanted.
    #[default]
    Complete,
    /// Workers come or go.
    Progressing,
    /// New workers wait for room, and old ones are drained for them.
    DrainingForRoom,
    /// New workers wait for room, and nothing may be drained for them.
    WaitingForRoom,
    /// As many workers as the canary wants have the new revision.
    Canary,
    /// Revisions stay as they are until somebody goes on.
    Paused,
}

impl Goals {
    /// Workers by revision, every present one and the wanted one included.
    #[must_use]
    pub const fn by_revision(&self) -> &BTreeMap<String, u32> {
        &self.by_revision
    }

    pub(crate) fn of(&self, revision: &str) -> u32 {
        self.by_revision.get(revision).copied().unwrap_or(0)
    }
}

/// How many workers of which revision there are to be.
#[must_use]
pub fn goals(target: u32, policy: &RolloutPolicy, present: &[Revision<'_>]) -> Goals {
    let mut by_revision: BTreeMap<String, u32> = present.iter().map(|r| (r.name.to_owned(), 0)).collect();
    let base = present
        .iter()
        .filter(|r| r.name != policy.revision && r.members > 0)
        .max_by_key(|r| (r.members, r.created, r.name))
        .map_or(policy.revision.as_str(), |r| r.name);
    let mut surplus = 0;
    if policy.paused {
        let mut left = target;
        for revision in present {
            by_revision.insert(revision.name.to_owned(), revision.members);
            surplus += revision.members.saturating_sub(left);
            left = left.saturating_sub(revision.members);
        }
        *by_revision.entry(base.to_owned()).or_default() += left;
    } else {
        let updated = policy.canary.map_or(target, |canary| canary.min(target));
        by_revision.insert(policy.revision.clone(), updated);
        *by_revision.entry(base.to_owned()).or_default() += target - updated;
    }
    Goals { by_revision, surplus }
}

/// How much the number of workers may differ on the way. `stuck`: new workers that no node has room for.
#[must_use]
pub fn budget(policy: &RolloutPolicy, stuck: u32) -> Budget {
    let width = policy.max_surge.max(1);
    match policy.strategy {
        Strategy::SurgeFirst => Budget { surge: width, unavailable: 0 },
        Strategy::DrainFirst => Budget { surge: 0, unavailable: width },
        Strategy::Auto => Budget { surge: width, unavailable: stuck.min(width) },
    }
}

/// Counts for the status.
pub(crate) fn progress(roster: &Roster<'_>, policy: &Policy, leaving: &[Leaver<'_>], stuck: u32) -> Progress {
    let stays = |worker: &&&WorkerView| !leaving.iter().any(|leaver| leaver.worker.name == worker.name);
    let is_emptied = |worker: &&WorkerView| matches!(worker.order, Some(DrainOrder::Empty { .. }));
    let (emptied, staying): (Vec<&WorkerView>, Vec<&WorkerView>) =
        roster.active.iter().filter(stays).copied().partition(is_emptied);
    let updated = |worker: &&&WorkerView| worker.revision == policy.rollout.revision;
    let serves = |worker: &&&WorkerView| worker.serves();
    let missing = count(staying.iter().filter(|worker| worker.missing));
    let mut progress = Progress {
        target: policy.target,
        replicas: count(staying.iter()),
        serving: count(staying.iter().filter(serves)),
        updated: count(staying.iter().filter(updated)),
        updated_serving: count(staying.iter().filter(updated).filter(serves)),
        draining: count(leaving.iter()),
        emptied: count(emptied.iter()),
        stuck,
        missing,
        stage: Stage::Complete,
    };
    progress.stage = stage(&progress, policy);
    progress
}

fn stage(progress: &Progress, policy: &Policy) -> Stage {
    let rollout = &policy.rollout;
    let there = progress.replicas - progress.missing + progress.emptied;
    let all_there = there == progress.target && progress.draining == 0;
    let all_updated = progress.updated == progress.replicas;
    if all_there && all_updated && progress.serving + progress.emptied >= progress.target {
        Stage::Complete
    } else if rollout.paused && !all_updated {
        Stage::Paused
    } else if progress.stuck > 0 {
        let may_drain = rollout.strategy != Strategy::SurgeFirst && !all_updated;
        if may_drain { Stage::DrainingForRoom } else { Stage::WaitingForRoom }
    } else if all_there && rollout.canary.is_some_and(|canary| progress.updated_serving >= canary.min(progress.target))
    {
        Stage::Canary
    } else {
        Stage::Progressing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(strategy: Strategy) -> RolloutPolicy {
        RolloutPolicy { revision: "new".into(), strategy, max_surge: 2, canary: None, paused: false }
    }

    fn revision(name: &str, members: u32) -> Revision<'_> {
        Revision { name, members, created: Millis(0) }
    }

    fn plain(goals: &Goals) -> Vec<(&str, u32)> {
        goals.by_revision().iter().map(|(name, goal)| (name.as_str(), *goal)).collect()
    }

    #[test]
    fn all_workers_get_the_wanted_revision_unless_a_canary_or_a_pause_holds_them() {
        let present = [revision("old", 3), revision("older", 1)];
        let base = policy(Strategy::Auto);
        assert_eq!(plain(&goals(4, &base, &present)), [("new", 4), ("old", 0), ("older", 0)]);
        let canary = RolloutPolicy { canary: Some(1), ..base.clone() };
        assert_eq!(plain(&goals(4, &canary, &present)), [("new", 1), ("old", 3), ("older", 0)]);
        assert_eq!(plain(&goals(4, &canary, &[])), [("new", 4)], "there is nothing to keep");
        let many = RolloutPolicy { canary: Some(9), ..base.clone() };
        assert_eq!(plain(&goals(4, &many, &present)), [("new", 4), ("old", 0), ("older", 0)]);
        let paused = RolloutPolicy { paused: true, ..base };
        assert_eq!(plain(&goals(6, &paused, &present)), [("old", 5), ("older", 1)], "the most common one grows");
        let fewer = goals(3, &paused, &present);
        assert_eq!((plain(&fewer), fewer.surplus), (vec![("old", 3), ("older", 1)], 1));
        assert_eq!(plain(&goals(3, &paused, &[])), [("new", 3)]);
    }

    #[test]
    fn auto_drains_first_only_for_workers_that_no_node_has_room_for() {
        let of = |strategy, stuck| {
            let budget = budget(&policy(strategy), stuck);
            (budget.surge, budget.unavailable)
        };
        assert_eq!(of(Strategy::SurgeFirst, 5), (2, 0));
        assert_eq!(of(Strategy::DrainFirst, 0), (0, 2));
        assert_eq!([of(Strategy::Auto, 0), of(Strategy::Auto, 1), of(Strategy::Auto, 5)], [(2, 0), (2, 1), (2, 2)]);
    }
}
