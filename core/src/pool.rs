//! The workers of one agent in one region: how many, of which revision, and who goes next. A pure planner.
//!
//! Workers are pods of one ReplicaSet per worker revision. [`plan`] looks at a [`PoolSnapshot`] and says the next
//! [`Step`]s; carried out in order, looked at again and planned again, they lead to [`Policy::target`] workers of the
//! wanted revision. Nothing has to be remembered between two plans: who is being drained until when, and who may be
//! removed, is written on the pods themselves, so a plan that was interrupted anywhere goes on from what is there.
//!
//! A worker leaves like this, and until the last step every step can be taken back:
//!
//! 1. it is told to drain ([`Step::SetPhase`]) and marked with its deadline ([`Step::Mark`]);
//! 2. it is empty, or its deadline is over: it is released ([`Step::Release`]: lowest deletion cost, may be evicted);
//! 3. [`SETTLE`] later the count of its ReplicaSet goes down by exactly as many as Kubernetes would then take from
//!    among the released ones ([`Step::Scale`]). Kubernetes takes unscheduled, pending and unready pods before it looks
//!    at the cost; while one that should stay would be taken, the released worker is deleted by name instead
//!    ([`Step::Delete`]), and what its ReplicaSet puts in its place is surplus that never had a call.
//!
//! Counts only go down, and pods are only deleted, on a snapshot that was read for it ([`Step::is_final`]): a view from
//! a cache may be older than the last change of mind.

mod choice;
mod removal;
mod snapshot;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

pub use self::snapshot::{Calls, DrainOrder, PodState, PoolSnapshot, SetReport, SetView, WorkerView};
pub use crate::placement::Phase;
use crate::{
    clock::Millis,
    rollout::{self, Progress, RolloutPolicy},
};

/// What is wanted of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Workers that are to take calls.
    pub target: u32,
    /// Of which revision, and how to get there.
    pub rollout: RolloutPolicy,
    /// How long a worker that is to go keeps its calls.
    pub drain_deadline: Duration,
    /// ReplicaSets of older revisions that are kept to go back to.
    pub history: usize,
}

/// What to do next, and how far things are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolPlan {
    /// To be carried out in this order, up to the first that fails.
    pub steps: Vec<Step>,
    /// Counts for the status.
    pub progress: Progress,
    /// Workers on their way out, released ones included, by name.
    pub leaving: Vec<String>,
    /// Workers that are being deleted though they were never released: somebody else's doing.
    pub undrained: Vec<String>,
    /// Look again after this time, even if nothing happens.
    pub again: Option<Duration>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Sets the count of a revision's ReplicaSet; makes it if `from` is `None`. Must fail if the ReplicaSet has changed
    /// since it was seen.
    Scale {
        /// Whose.
        revision: String,
        /// The count that was seen.
        from: Option<u32>,
        /// The new count.
        to: u32,
        /// Whom Kubernetes should remove, by name; empty if the count goes up.
        expected: Vec<String>,
    },
    /// Tells a worker its phase.
    SetPhase {
        /// Whom.
        worker: String,
        /// The phase.
        phase: Phase,
        /// When calls still there are ended; for [`Phase::Draining`] only.
        deadline: Option<Millis>,
    },
    /// Writes on the pod until when it was told to drain, and why.
    Mark {
        /// Whom.
        worker: String,
        /// When calls still there are ended.
        deadline: Millis,
        /// Why it goes.
        reason: LeaveReason,
    },
    /// Takes the mark off again.
    Unmark {
        /// Whom.
        worker: String,
    },
    /// Gives the pod the lowest deletion cost, and lets it be evicted.
    Release {
        /// Whom.
        worker: String,
    },
    /// Takes the release back.
    Restore {
        /// Whom.
        worker: String,
    },
    /// Deletes a released pod by name; its ReplicaSet makes another one.
    Delete {
        /// Whom.
        worker: String,
    },
    /// Deletes the empty ReplicaSet of an old revision.
    DeleteSet {
        /// Whose.
        revision: String,
    },
}

/// Why a worker goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaveReason {
    /// Fewer workers are wanted.
    ScaleDown,
    /// Another revision is wanted.
    Rollout,
    /// Somebody wants it drained, or its node.
    Drain,
}

/// Plans the next steps. `now` is in milliseconds since 1970 (UTC), as are all times of the snapshot.
#[must_use]
pub fn plan(snapshot: &PoolSnapshot, policy: &Policy, now: Millis) -> PoolPlan {
    let roster = Roster::new(snapshot, policy);
    let stuck = roster.stuck(policy, now);
    let goals = rollout::goals(policy.target, &policy.rollout, &roster.revisions());
    let budget = rollout::budget(&policy.rollout, stuck);
    let leaving = choice::leaving(&roster, policy, &goals, budget);

    let mut steps = Vec::new();
    keep(&roster, &leaving, &mut steps);
    let raised = raise(&roster, policy, &goals, budget.surge, &mut steps);
    let removable = dismiss(&roster, &leaving, policy, now, &mut steps);
    removal::lower(&roster, &goals, &raised, &removable, now, &mut steps);
    forget(&roster, policy, &mut steps);

    let progress = rollout::progress(&roster, policy, &leaving, stuck);
    let mut names: Vec<String> = leaving.iter().map(|leaver| leaver.worker.name.clone()).collect();
    names.sort();
    let undrained = snapshot.workers.iter().filter(|w| w.pod == PodState::Leaving && !w.released);
    PoolPlan {
        steps,
        progress,
        leaving: names,
        undrained: undrained.map(|worker| worker.name.clone()).collect(),
        again: again(&roster, policy, &leaving, now),
    }
}

/// The snapshot, sorted for planning.
pub(crate) struct Roster<'a> {
    pub(crate) sets: &'a [SetView],
    /// Pods that their ReplicaSets count, the missing ones included.
    pub(crate) active: Vec<&'a WorkerView>,
    /// Pods of any state by revision.
    pods: BTreeMap<&'a str, u32>,
    /// Those whom a ReplicaSet may be about to remove because its count went down, by name.
    sunk: BTreeSet<&'a str>,
    /// Nobody is to stay: even who is missing goes.
    nobody: bool,
}

/// A worker on its way out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaver<'a> {
    pub(crate) worker: &'a WorkerView,
    pub(crate) reason: LeaveReason,
}

impl<'a> Roster<'a> {
    fn new(snapshot: &'a PoolSnapshot, policy: &Policy) -> Self {
        let mut pods = BTreeMap::new();
        for worker in &snapshot.workers {
            *pods.entry(worker.revision.as_str()).or_default() += 1;
        }
        let active = snapshot.workers.iter().filter(|worker| worker.pod != PodState::Leaving).collect();
        let mut roster = Self { sets: &snapshot.sets, active, pods, sunk: BTreeSet::new(), nobody: policy.target == 0 };
        for set in roster.sets {
            let sunk = removal::may_be_going(&roster, set);
            roster.sunk.extend(sunk.into_iter().map(|worker| worker.name.as_str()));
        }
        roster
    }

    pub(crate) fn of<'b>(&'b self, revision: &'b str) -> impl Iterator<Item = &'a WorkerView> + 'b {
        self.active.iter().copied().filter(move |worker| worker.revision == revision)
    }

    /// Pods that a ReplicaSet wants and that are not there yet.
    pub(crate) fn to_come(&self, set: &SetView) -> u32 {
        set.replicas.saturating_sub(count(self.of(&set.revision)))
    }

    /// All pods that there are or will be.
    fn total(&self) -> u32 {
        let to_come: u32 = self.sets.iter().map(|set| self.to_come(set)).sum();
        to_come + count(self.active.iter())
    }

    /// Workers that nobody wants replaced and that are in touch.
    pub(crate) fn members(&self) -> impl Iterator<Item = &'a WorkerView> + '_ {
        let is_member = |w: &&WorkerView| !self.set_aside(w) && !w.is_to_be_replaced() && !self.is_sunk(w);
        self.active.iter().copied().filter(is_member)
    }

    pub(crate) fn set_aside(&self, worker: &WorkerView) -> bool {
        worker.missing && !self.nobody
    }

    pub(crate) fn is_sunk(&self, worker: &WorkerView) -> bool {
        self.sunk.contains(worker.name.as_str())
    }

    /// Members and those to come, by revision.
    fn revisions(&self) -> Vec<rollout::Revision<'a>> {
        let of_set = |set: &'a SetView| rollout::Revision {
            name: &set.revision,
            members: self.to_come(set) + count(self.members().filter(|worker| worker.revision == set.revision)),
            created: set.created,
        };
        self.sets.iter().map(of_set).collect()
    }

    /// Workers of the wanted revision that no node has had room for, for long enough.
    fn stuck(&self, policy: &Policy, now: Millis) -> u32 {
        count(self.of(&policy.rollout.revision).filter(
            |worker| matches!(worker.pod, PodState::Unscheduled { since: Some(since) } if now.since(since) >= PATIENCE),
        ))
    }
}

impl Step {
    /// Whether this cannot be taken back: it needs a plan on a snapshot that was read for it.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        match self {
            Self::Scale { from: Some(from), to, .. } => *to < *from,
            Self::Delete { .. } | Self::DeleteSet { .. } => true,
            Self::Scale { from: None, .. }
            | Self::SetPhase { .. }
            | Self::Mark { .. }
            | Self::Unmark { .. }
            | Self::Release { .. }
            | Self::Restore { .. } => false,
        }
    }
}

/// Everybody who stays is in the phase that its order says, and bears no trace of having been meant to go.
fn keep(roster: &Roster<'_>, leaving: &[Leaver<'_>], steps: &mut Vec<Step>) {
    for worker in &roster.active {
        if leaving.iter().any(|leaver| leaver.worker.name == worker.name) || roster.set_aside(worker) {
            continue;
        }
        if worker.released {
            steps.push(Step::Restore { worker: worker.name.clone() });
        }
        let (phase, deadline) = match worker.order {
            Some(DrainOrder::Empty { deadline }) => (Phase::Draining, Some(deadline)),
            Some(DrainOrder::Cordon) => (Phase::Cordoned, None),
            Some(DrainOrder::Replace { .. } | DrainOrder::ReplaceInTurn) | None => (Phase::Active, None),
        };
        tell(worker, phase, deadline, steps);
        match deadline {
            Some(deadline) if worker.mark != Some(deadline) => {
                let (worker, reason) = (worker.name.clone(), LeaveReason::Drain);
                steps.push(Step::Mark { worker, deadline, reason });
            }
            None if worker.mark.is_some() => steps.push(Step::Unmark { worker: worker.name.clone() }),
            _ => {}
        }
    }
}

/// The word goes out before the mark is written: interrupted in between, it goes out again.
fn tell(worker: &WorkerView, phase: Phase, deadline: Option<Millis>, steps: &mut Vec<Step>) {
    if let Calls::Held { phase: present, .. } = worker.calls
        && (present != phase || deadline != worker.mark)
    {
        steps.push(Step::SetPhase { worker: worker.name.clone(), phase, deadline });
    }
}

/// Makes the workers that are missing, as far as the surge allows. Returns the revisions that still lack some, and how
/// many.
fn raise(
    roster: &Roster<'_>,
    policy: &Policy,
    goals: &rollout::Goals,
    surge: u32,
    steps: &mut Vec<Step>,
) -> BTreeMap<String, Lack> {
    let set_aside = count(roster.active.iter().filter(|worker| roster.set_aside(worker)));
    let bound = policy.target.saturating_add(surge).saturating_add(set_aside);
    let mut room = bound.saturating_sub(roster.total());
    let mut lacks = BTreeMap::new();
    for (revision, goal) in goals.by_revision() {
        let set = roster.sets.iter().find(|set| set.revision == *revision);
        let present: u32 = roster.revisions().iter().find(|r| r.name == revision.as_str()).map_or(0, |r| r.members);
        let lacking = goal.saturating_sub(present);
        // More pods than the count: the count went down a moment ago, or one of both views is old.
        let steady = set.is_none_or(|set| count(roster.of(&set.revision)) <= set.replicas);
        let made = if steady { lacking.min(room) } else { 0 };
        room -= made;
        if made > 0 {
            let from = set.map(|set| set.replicas);
            let to = from.unwrap_or(0) + made;
            steps.push(Step::Scale { revision: revision.clone(), from, to, expected: Vec::new() });
        }
        lacks.insert(revision.clone(), Lack { made, left: lacking - made });
    }
    lacks
}

/// What a revision lacked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lack {
    /// Workers that are made by this plan.
    pub(crate) made: u32,
    /// Workers that there is no room to make.
    pub(crate) left: u32,
}

/// Tells those who leave to drain, and releases who is done. Returns those that are released.
fn dismiss<'a>(
    roster: &Roster<'a>,
    leaving: &[Leaver<'a>],
    policy: &Policy,
    now: Millis,
    steps: &mut Vec<Step>,
) -> Vec<&'a WorkerView> {
    let mut removable = Vec::new();
    for Leaver { worker, reason } in leaving {
        let deadline = match worker.order {
            Some(DrainOrder::Replace { deadline } | DrainOrder::Empty { deadline }) => deadline,
            _ => worker.mark.unwrap_or_else(|| now.after(policy.drain_deadline)),
        };
        tell(worker, Phase::Draining, Some(deadline), steps);
        if worker.mark != Some(deadline) {
            steps.push(Step::Mark { worker: worker.name.clone(), deadline, reason: *reason });
        } else if worker.drain_ended(now) {
            if worker.released {
                removable.push(*worker);
            } else {
                steps.push(Step::Release { worker: worker.name.clone() });
            }
        } else if worker.released && !roster.is_sunk(worker) {
            steps.push(Step::Restore { worker: worker.name.clone() });
        }
    }
    removable
}

/// Deletes ReplicaSets that are empty, not wanted and too many.
fn forget(roster: &Roster<'_>, policy: &Policy, steps: &mut Vec<Step>) {
    let mut empty: Vec<&SetView> = roster
        .sets
        .iter()
        .filter(|set| set.revision != policy.rollout.revision && set.replicas == 0)
        .filter(|set| !roster.pods.contains_key(set.revision.as_str()))
        .filter(|set| set.report.is_some_and(|report| report.replicas == 0))
        .collect();
    empty.sort_by_key(|set| std::cmp::Reverse((set.created, &set.revision)));
    for set in empty.into_iter().skip(policy.history) {
        steps.push(Step::DeleteSet { revision: set.revision.clone() });
    }
}

/// When time alone changes the plan.
fn again(roster: &Roster<'_>, policy: &Policy, leaving: &[Leaver<'_>], now: Millis) -> Option<Duration> {
    let settling = leaving.iter().filter(|leaver| leaver.worker.released).map(|l| l.worker.cost_since.after(SETTLE));
    let overdue = leaving.iter().filter_map(|leaver| Some(leaver.worker.mark?.after(OVERTIME)));
    let patience = roster.of(&policy.rollout.revision).filter_map(|worker| match worker.pod {
        PodState::Unscheduled { since: Some(since) } => Some(since.after(PATIENCE)),
        _ => None,
    });
    let released = leaving.iter().filter(|leaver| leaver.worker.released);
    let blocked = released.map(|leaver| leaver.worker.cost_since.after(removal::BLOCKED));
    let next = settling.chain(overdue).chain(patience).chain(blocked).filter(|at| *at > now).min()?;
    Some(next.since(now))
}

pub(crate) fn count<T>(items: impl Iterator<Item = T>) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}

/// How long after a deletion cost was seen a count may go down. The ReplicaSet controller reads pods from a cache: of 45
/// removals right after the cost was written, under load, three hit the wrong pod; none of 25 a second later.
pub const SETTLE: Duration = Duration::from_secs(1);
/// How long after its deadline a worker may still be about to end its calls before it is removed all the same.
pub const OVERTIME: Duration = Duration::from_secs(30);
/// How long a surge pod may wait for a node before [`rollout::Strategy::Auto`] drains an old worker for it.
pub const PATIENCE: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests;
