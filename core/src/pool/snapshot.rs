//! A pool as it was seen, and what that says of each worker.

use super::{OVERTIME, Phase};
use crate::clock::Millis;

/// A pool as it was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolSnapshot {
    /// Its ReplicaSets, one per worker revision.
    pub sets: Vec<SetView>,
    /// Its pods.
    pub workers: Vec<WorkerView>,
}

/// One ReplicaSet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetView {
    /// Worker revision of its template.
    pub revision: String,
    /// `spec.replicas`.
    pub replicas: u32,
    /// What Kubernetes last said of it; `None` while it has not yet looked at the present `spec`.
    pub report: Option<SetReport>,
    /// When it was made.
    pub created: Millis,
}

/// Status of a ReplicaSet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetReport {
    /// Pods that are neither finished nor being deleted.
    pub replicas: u32,
    /// Those of them that are ready.
    pub ready: u32,
}

/// One pod and the worker in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerView {
    /// Name of the pod, and so of the worker.
    pub name: String,
    /// Worker revision.
    pub revision: String,
    /// How far it has come.
    pub pod: PodState,
    /// When it was made.
    pub created: Millis,
    /// The calls it holds.
    pub calls: Calls,
    /// Its node has been out of touch for so long that another worker takes its place until it is back.
    pub missing: bool,
    /// It was told to drain until then; written on the pod.
    pub mark: Option<Millis>,
    /// Its deletion cost is the lowest and it may be evicted; written on the pod.
    pub released: bool,
    /// Since when the deletion cost has been seen to be what it is.
    pub cost_since: Millis,
    /// Somebody wants it drained.
    pub order: Option<DrainOrder>,
}

/// How far a pod has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodState {
    /// No node yet. `since`: no node has had room for it since then.
    Unscheduled {
        /// `None`: it has not been tried.
        since: Option<Millis>,
    },
    /// On a node; its containers have not all been started.
    Pending,
    /// Running, not ready.
    NotReady,
    /// Running and ready.
    Ready,
    /// Being deleted, or finished: its ReplicaSet counts it no more.
    Leaving,
}

/// What is known of a worker's calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// It holds none: nothing runs in the pod, or it has never registered.
    None,
    /// Nobody can say.
    Unknown,
    /// What its region's routers say.
    Held {
        /// Its phase, as it reported it.
        phase: Phase,
        /// Sessions, and leases without one.
        count: u32,
    },
}

/// Somebody wants a worker drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainOrder {
    /// It takes no new calls for now.
    Cordon,
    /// It is emptied until the deadline and stays.
    Empty {
        /// When calls still there are ended.
        deadline: Millis,
    },
    /// It is emptied until the deadline, then replaced.
    Replace {
        /// When calls still there are ended.
        deadline: Millis,
    },
    /// It is replaced as in a rollout: its successor first, if the strategy allows and a node has room.
    ReplaceInTurn,
}

impl WorkerView {
    pub(crate) const fn is_to_be_replaced(&self) -> bool {
        matches!(self.order, Some(DrainOrder::Replace { .. } | DrainOrder::ReplaceInTurn))
    }

    /// Takes new calls, and nobody has meant it to stop.
    pub(crate) fn serves(&self) -> bool {
        self.pod == PodState::Ready
            && self.mark.is_none()
            && matches!(self.calls, Calls::Held { phase: Phase::Active, .. })
    }

    /// Takes no calls, and never has.
    pub(crate) fn is_harmless(&self) -> bool {
        self.pod != PodState::Ready && self.calls == Calls::None
    }

    /// It was told to drain and has heard it.
    pub(crate) fn drains(&self) -> bool {
        self.mark.is_some() && matches!(self.calls, Calls::Held { phase: Phase::Draining, .. } | Calls::None)
    }

    /// Nothing is lost with it: it is empty and gets nothing new, or the time that it had is over.
    pub(super) fn drain_ended(&self, now: Millis) -> bool {
        let overdue = self.mark.is_some_and(|deadline| now >= deadline.after(OVERTIME));
        match self.calls {
            Calls::None | Calls::Held { phase: Phase::Draining, count: 0 } => true,
            Calls::Unknown | Calls::Held { .. } => overdue,
        }
    }
}
