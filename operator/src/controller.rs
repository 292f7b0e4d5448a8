//! Runs reconciles: one at a time per object, several objects at a time, failures again after a while.

use std::{collections::HashMap, sync::Arc};

use futures::{FutureExt as _, StreamExt as _};
use kube::runtime::{
    applier,
    controller::{Action, Config, Error as RunError},
    reflector::ObjectRef,
};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{Context, Error, apply::Owned, cache::Cache, metrics::Kind, queue::Queue};

/// Reconciles the objects in `cache` that `queue` names, and all that are there now, until the stop.
///
/// `reconcile` gets the object as the cache has it. What it returns says when to look again without being asked; a
/// failure is tried again by itself ([`Error::retry_after`]).
///
/// # Errors
/// Never.
pub async fn run<K, F, R>(
    context: Arc<Context>,
    kind: Kind,
    cache: Cache<K>,
    queue: Queue<K>,
    reconcile: F,
    stopping: CancellationToken,
) -> anyhow::Result<()>
where
    K: Owned,
    F: Fn(Arc<K>, Arc<Context>) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Action, Error>> + Send + 'static,
{
    for object in cache.all() {
        queue.push_object(&object);
    }
    let failures: Arc<Mutex<HashMap<ObjectRef<K>, u32>>> = Arc::default();
    let (succeeded, present) = (failures.clone(), cache.store());
    let reconcile = move |object: Arc<K>, context: Arc<Context>| {
        let (reference, succeeded) = (ObjectRef::from_obj(object.as_ref()), succeeded.clone());
        let (began, metrics) = (Instant::now(), context.metrics.clone());
        let reconciling = reconcile(object, context);
        async move {
            let outcome = reconciling.await;
            metrics.reconciled(kind, began.elapsed());
            if outcome.is_ok() {
                succeeded.lock().remove(&reference);
            }
            outcome
        }
        .boxed()
    };
    let failed = move |object: Arc<K>, error: &Error, context: Arc<Context>| {
        let reference = ObjectRef::from_obj(object.as_ref());
        context.metrics.failed(kind, error.reason());
        let count = {
            let mut failures = failures.lock();
            if failures.len() >= MANY {
                // Objects that are gone fail no more.
                failures.retain(|reference, _| present.get(reference).is_some());
            }
            let count = failures.entry(reference.clone()).or_default();
            *count = count.saturating_add(1);
            *count
        };
        // Of a conflict the next attempt usually knows better.
        if error.is_conflict() && count < 3 {
            tracing::debug!(object = %reference, %error, "reconciling");
        } else {
            tracing::warn!(object = %reference, %error, attempts = count, "reconciling");
        }
        Action::requeue(error.retry_after(count, rand::random()))
    };
    let config = Config::default().concurrency(CONCURRENCY);
    let requests = queue.requests().take_until(stopping.cancelled_owned()).boxed();
    let outcomes = applier(reconcile, failed, context, cache.store(), requests, config);
    outcomes
        .for_each(|outcome| async move {
            match outcome {
                Ok(_) | Err(RunError::ReconcilerFailed(..)) => {}
                // Deleted between being asked for and being looked at.
                Err(RunError::ObjectNotFound(reference)) => tracing::debug!(object = %reference, "is gone"),
                Err(error) => tracing::warn!(%error, "reconciling"),
            }
        })
        .await;
    Ok(())
}

/// Failing objects from which on it is worth looking which of them are still there.
const MANY: usize = 256;
/// Objects of a kind that are reconciled at a time.
const CONCURRENCY: u16 = 8;
