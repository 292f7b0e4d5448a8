//! Orders to a worker: to take nothing new, to be emptied until a deadline, or to go on.
//!
//! The worker obeys the newest one. Several routers may give orders, so each is dated, after everything that the worker
//! has followed so far; what a router gave before another router's newer one is forgotten here and not obeyed there.

use std::time::Duration;

use antiphon_core::{clock::Millis, placement::Phase};
use antiphon_proto::v1;
use tokio::sync::watch;

use super::{Fleet, State, WorkerHello, clock::unix_ms, workers::Worker};
use crate::{
    field::FieldError,
    records::{phase, proto_phase},
};

/// What a worker was told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) phase: Phase,
    /// When sessions that are still there end; means something while draining only.
    deadline: Millis,
    reason: String,
    /// Also for a later process of this name.
    by_name: bool,
    pub(super) unix_ms: u64,
}

/// A request for one, checked.
#[derive(Clone, Debug)]
pub(crate) struct SetPhase {
    name: String,
    incarnation: u32,
    phase: Phase,
    deadline: Duration,
    reason: String,
}

impl SetPhase {
    pub(crate) fn check(request: v1::SetWorkerPhaseRequest) -> Result<Self, FieldError> {
        if matches!(v1::Phase::try_from(request.phase), Err(_) | Ok(v1::Phase::Unspecified)) {
            return Err(FieldError::new("phase", "expected ACTIVE, CORDONED or DRAINING"));
        }
        if request.reason.len() > MAX_REASON {
            let problem = format!("has {} bytes, at most {MAX_REASON}", request.reason.len());
            return Err(FieldError::new("reason", problem));
        }
        Ok(Self {
            phase: phase(request.phase),
            name: request.name,
            incarnation: request.incarnation,
            deadline: Duration::from_millis(request.deadline_ms.into()),
            reason: request.reason,
        })
    }
}

impl Order {
    /// As it travels: the deadline counts from now.
    pub(crate) fn directive(&self, now: Millis) -> v1::PhaseOrder {
        let left = self.deadline.0.saturating_sub(now.0);
        v1::PhaseOrder {
            phase: proto_phase(self.phase).into(),
            deadline_ms: u32::try_from(left).unwrap_or(u32::MAX),
            reason: self.reason.clone(),
            ordered_unix_ms: self.unix_ms,
        }
    }

    /// Whether another order would say nothing new. A deadline that is asked for again counts from another moment.
    fn says_the_same_as(&self, other: &Self) -> bool {
        let deadlines_meet = self.deadline.0.abs_diff(other.deadline.0) <= DEADLINES_DIFFER_MS;
        self.phase == other.phase
            && self.by_name == other.by_name
            && (deadlines_meet || self.phase != Phase::Draining)
            && self.reason == other.reason
    }
}

impl Worker {
    /// The order that it has yet to follow, if that is for this worker.
    fn pending(&self) -> Option<Phase> {
        let followed = self.report.as_ref().map_or(0, |r| r.ordered_unix_ms);
        self.order.borrow().as_ref().filter(|order| order.unix_ms > followed).map(|order| order.phase)
    }

    /// What it is in or, as far as that keeps new sessions away, was told to be in.
    pub(crate) fn phase(&self) -> Phase {
        let said = self.said_phase();
        match self.pending() {
            Some(Phase::Draining) => Phase::Draining,
            Some(Phase::Cordoned) if said == Phase::Active => Phase::Cordoned,
            _ => said,
        }
    }

    /// Its report says that it follows a newer order than ours.
    pub(super) fn drop_older_order(&self) {
        let followed = self.report.as_ref().map_or(0, |r| r.ordered_unix_ms);
        self.order.send_if_modified(|order| order.take_if(|o| o.unix_ms < followed).is_some());
    }
}

impl State {
    /// The order that one who registers finds: what this life of it was told, or whoever has its name.
    pub(super) fn order_of(&self, hello: &WorkerHello) -> Option<Order> {
        let former = self.workers.values().find(|w| w.hello.name == hello.name)?;
        let same_life = former.hello.incarnation == hello.incarnation;
        former.order.borrow().clone().filter(|order| same_life || order.by_name)
    }
}

impl Fleet {
    /// Gives an order to a worker of this region; its stream carries it. `None`: there is no such worker.
    pub(crate) fn set_worker_phase(&self, asked: SetPhase) -> v1::SetWorkerPhaseResponse {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let fits = |w: &&Worker| {
            w.hello.name == asked.name && (asked.incarnation == 0 || w.hello.incarnation.value() == asked.incarnation)
        };
        let Some(worker) = state.workers.values().find(fits) else {
            return v1::SetWorkerPhaseResponse::default();
        };
        let followed = worker.report.as_ref().map_or(0, |r| r.ordered_unix_ms);
        let present = worker.order.borrow().clone();
        let before = present.as_ref().map_or(followed, |order| followed.max(order.unix_ms));
        let order = Order {
            phase: asked.phase,
            deadline: now.after(asked.deadline),
            reason: asked.reason,
            by_name: asked.incarnation == 0,
            unix_ms: unix_ms().max(before + 1),
        };
        let moot = present.is_none() && order.phase == Phase::Active && worker.said_phase() == Phase::Active;
        if !moot && !present.is_some_and(|present| present.says_the_same_as(&order)) {
            tracing::info!(worker = asked.name, phase = ?order.phase, reason = order.reason, "worker ordered");
            worker.order.send_replace(Some(order));
        }
        let report = worker.report.as_ref();
        let answer = v1::SetWorkerPhaseResponse {
            known: true,
            phase: proto_phase(worker.said_phase()).into(),
            active: report.map_or(0, |r| r.active),
            reserved: report.map_or(0, |r| r.reserved),
            connected: worker.stream.is_some(),
        };
        let number = worker.number;
        state.refresh_worker(number);
        drop(state);
        self.capacity.send_modify(|n| *n += 1);
        answer
    }

    /// The orders for a registered worker, the present one first.
    pub(crate) fn orders(&self, number: antiphon_core::id::WorkerNumber) -> Option<watch::Receiver<Option<Order>>> {
        let state = self.state.lock();
        let mut orders = state.workers.get(&number)?.order.subscribe();
        orders.mark_changed();
        Some(orders)
    }
}

/// Who repeats an order counts its deadline down with a clock of his own.
const DEADLINES_DIFFER_MS: u64 = 1000;
const MAX_REASON: usize = 256;
