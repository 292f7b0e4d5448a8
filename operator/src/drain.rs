//! Drains: proves that there is room elsewhere, says what is ordered, and how far it is.
//!
//! The orders themselves are carried out by the controller of pools, which reads them from here: a Drain that has begun
//! (`status.startedAt`) orders, until it is deleted. So deleting it is the undo, also while the operator is away.

mod orders;
mod status;
mod target;

use std::{sync::Arc, time::Duration};

use antiphon_core::{
    clock::Millis,
    drain::{self as planner, DrainPhase, DrainPolicy, DrainSnapshot},
};
use antiphon_crds::{CapacityCheck, Drain};
use antiphon_runtime::Tasks;
use k8s_openapi::jiff::Timestamp;
use kube::{ResourceExt as _, runtime::controller::Action};

use crate::{Context, Error, controller, metrics::Kind, worker_pool};
use target::Target;

pub use orders::Orders;

/// Notes which drains have to be looked at when something changes.
pub fn listen(context: &Context) {
    let queue = context.queues.drains.clone();
    context.caches.drains.on_change(move |drain| queue.push_object(drain));
    let all = |context: &Context| {
        let (queue, cache) = (context.queues.drains.clone(), context.caches.drains.clone());
        move || cache.all().iter().for_each(|drain| queue.push_object(drain))
    };
    let push = all(context);
    context.caches.nodes.on_change(move |_| push());
    let push = all(context);
    context.caches.regions.on_change(move |_| push());
    let push = all(context);
    context.links.on_change(move |_, _| push());
    let push = all(context);
    context.caches.pods.on_change(move |_| push());
}

/// Begins to reconcile.
pub fn start(context: &Arc<Context>, tasks: &Tasks) {
    let (cache, queue) = (context.caches.drains.clone(), context.queues.drains.clone());
    let reconcile = |drain: Arc<Drain>, context: Arc<Context>| async move { reconcile(drain.as_ref(), &context).await };
    let stopping = tasks.stopping();
    tasks.service("drains", controller::run(context.clone(), Kind::drain, cache, queue, reconcile, stopping));
}

/// Whether calls are to stay away from a region because a Drain empties it.
#[must_use]
pub fn empties_region(context: &Context, region: &str) -> bool {
    let started = |drain: &Drain| orders::has_begun(drain) && drain.spec.target.region.as_deref() == Some(region);
    let own = |drain: &Drain| drain.namespace().as_deref() == Some(&context.config.namespace);
    !context.caches.drains.select(|drain| started(drain) && own(drain)).is_empty()
}

async fn reconcile(drain: &Drain, context: &Context) -> Result<Action, Error> {
    if drain.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let target = match Target::of(drain, &context.config.namespace) {
        Ok(target) => target,
        Err(problem) => return refuse(drain, context, "NotAllowed", problem).await,
    };
    if let Err(problem) = target.exists(context) {
        return refuse(drain, context, "NoSuchTarget", problem).await;
    }
    let before = drain.status.clone().unwrap_or_default();
    let workers = target.workers(context);
    let snapshot = DrainSnapshot {
        elsewhere: target.elsewhere(context, &workers),
        workers: workers.iter().map(|worker| worker.view.clone()).collect(),
        started: before.started_at.as_ref().and_then(|at| u64::try_from(at.0.as_millisecond()).ok()).map(Millis),
        initial: before.initial_sessions,
    };
    let policy = DrainPolicy {
        deadline: orders::deadline_of(drain),
        prove: drain.spec.capacity_check == CapacityCheck::Prove,
        replace: target.is_replaced(context),
    };
    let planned = planner::plan(&snapshot, &policy, worker_pool::now());
    let status = status::of(drain, &target, &snapshot, &planned, Timestamp::now());
    let begins = before.started_at.is_none() && status.started_at.is_some();
    let ends = before.finished_at.is_none() && status.finished_at.is_some();
    if context.applier.apply_status(drain, &status).await? && (begins || ends) {
        tell(drain, context, &target, &planned, begins).await;
    }
    Ok(planned.again.map_or_else(Action::await_change, Action::requeue))
}

async fn tell(drain: &Drain, context: &Context, target: &Target, planned: &planner::DrainPlan, begins: bool) {
    let workers = planned.orders.len();
    if begins {
        let note = format!(
            "{target}: {workers} workers with {} calls drain; elsewhere there is room for {}",
            planned.sessions, planned.proof.free
        );
        context.events.normal(drain, "DrainStarted", "Drain", note).await;
    } else if planned.phase == DrainPhase::Drained {
        let note = format!("{target}: no calls are left on {workers} workers");
        context.events.normal(drain, "Drained", "Drain", note).await;
    }
}

async fn refuse(drain: &Drain, context: &Context, reason: &'static str, problem: String) -> Result<Action, Error> {
    let status = status::refused(drain, reason, &problem, Timestamp::now());
    if context.applier.apply_status(drain, &status).await? {
        context.events.warning(drain, reason, "Drain", problem).await;
    }
    // What is missing may come.
    Ok(Action::requeue(Duration::from_secs(300)))
}
