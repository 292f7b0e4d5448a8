//! WorkerPools: ReplicaSets and their pods, made to agree with what is wanted of them.
//!
//! observe (`observe`) → plan ([`antiphon_core::pool`]) → carry out (`steps`) → status (`status`). What a plan does
//! that cannot be taken back is planned once more on a view that was read for it.

mod budget;
mod gone;
mod memory;
mod observe;
mod status;
mod steps;
mod wanted;
mod watch;

use std::{sync::Arc, time::Duration};

use antiphon_core::{
    clock::Millis,
    pool::{self, PoolPlan, PoolSnapshot, Step},
};
use antiphon_crds::WorkerPool;
use antiphon_proto::v1;
use antiphon_runtime::{
    Tasks,
    pki::{PeerName, Role},
};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::{Resource as _, ResourceExt as _, runtime::controller::Action};

use crate::{
    Context, Error, controller,
    identity::{self, Issued, Leaf},
    labels::FINALIZER,
    metrics::Kind,
    pod_template::PoolNames,
};
use memory::{Memory, PoolMemory};
use observe::Observed;
use wanted::Wanted;

pub use watch::listen;

/// Begins to reconcile.
pub fn start(context: &Arc<Context>, tasks: &Tasks) {
    let (cache, queue) = (context.caches.pools.clone(), context.queues.pools.clone());
    let memory = Arc::new(Memory::default());
    let reconcile = move |pool: Arc<WorkerPool>, context: Arc<Context>| {
        let memory = memory.clone();
        async move { reconcile(&pool, &context, &memory).await }
    };
    let stopping = tasks.stopping();
    tasks.service("pools", controller::run(context.clone(), Kind::worker_pool, cache, queue, reconcile, stopping));
}

async fn reconcile(pool: &WorkerPool, context: &Context, memory: &Memory) -> Result<Action, Error> {
    let (namespace, name) = (pool.namespace().unwrap_or_default(), pool.name_any());
    let deleting = pool.metadata.deletion_timestamp.is_some();
    if deleting && !pool.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        memory.forget(&namespace, &name);
        return Ok(Action::await_change());
    }
    context.applier.add_finalizer(pool, FINALIZER).await?;
    let names = PoolNames { namespace: &namespace, pool: &name, agent: &pool.spec.agent, region: &pool.spec.region };
    let memory = memory.of(&namespace, &name);
    let seen = Observed::cached(context, &names, &memory);
    let wanted = Wanted::of(pool, &names, context, &seen).await;

    let mut round = Round { pool, context, names, memory: &memory, wanted, soon: None };
    let outcome = round.work(seen).await;
    let (seen, planned) = match outcome {
        Ok(done) => done,
        // What is known is said all the same.
        Err(error) => {
            let seen = Observed::cached(context, &names, &memory);
            let planned = round.plan(&seen);
            round.say(&seen, &planned, Some(&error)).await?;
            return Err(error);
        }
    };
    round.say(&seen, &planned, None).await?;
    if deleting && seen.pods.is_empty() {
        context.applier.remove_finalizer(pool, FINALIZER).await?;
        return Ok(Action::await_change());
    }
    Ok(round.soon.map_or_else(Action::await_change, Action::requeue))
}

/// One look at one pool.
struct Round<'a> {
    pool: &'a WorkerPool,
    context: &'a Context,
    names: PoolNames<'a>,
    memory: &'a PoolMemory,
    wanted: Wanted,
    /// Look again after this time.
    soon: Option<Duration>,
}

impl Round<'_> {
    async fn work(&mut self, mut seen: Observed) -> Result<(Observed, PoolPlan), Error> {
        // In a namespace that is being deleted nothing can be made any more.
        let deleting = self.pool.metadata.deletion_timestamp.is_some();
        if !deleting && (self.wanted.policy.target > 0 || !seen.pods.is_empty()) {
            self.prerequisites().await?;
        }
        gone::report(self, &seen).await?;
        let mut planned = self.plan(&seen);
        if planned.steps.iter().any(Step::is_final) {
            seen = Observed::live(self.context, &self.names, self.memory).await?;
            planned = self.plan(&seen);
        }
        self.look_again(planned.again);
        self.tell_of(&seen, &planned).await;
        for step in &planned.steps {
            steps::carry_out(self, &seen, step, &planned.steps).await?;
        }
        steps::mark_evictable(self, &seen).await?;
        Ok((seen, planned))
    }

    fn plan(&self, seen: &Observed) -> PoolPlan {
        let now = now();
        pool::plan(&self.snapshot(seen), &self.wanted.policy, now)
    }

    fn snapshot(&self, seen: &Observed) -> PoolSnapshot {
        seen.snapshot(self.context, &self.names, self.memory, self.wanted.default_deadline)
    }

    /// What pods need to start and to stay.
    async fn prerequisites(&mut self) -> Result<(), Error> {
        let agent = format!("{}/{}", self.names.namespace, self.names.agent);
        let peer = PeerName::new(&self.names.identity(), Role::Worker, self.names.region)
            .map_err(|error| Error::Spec(format!("no certificate can name this pool's workers: {error}")))?;
        let leaf = Leaf {
            namespace: self.names.namespace.to_owned(),
            name: self.names.identity(),
            labels: self.names.labels(&self.context.config),
            owner: self.pool.controller_owner_ref(&()).unwrap_or_default(),
            peer,
            agent: Some(agent),
        };
        match identity::ensure(self.context, self.pool, &leaf).await? {
            Issued::Ready(again) => self.look_again(Some(again)),
            Issued::Waiting => self.look_again(Some(Duration::from_secs(2))),
        }
        let budget = budget::of(&self.names, self.pool.controller_owner_ref(&()), &self.context.config);
        self.context.ensure(self.pool, &budget, &self.context.caches.disruption_budgets).await.map(drop)
    }

    /// Says in events what nobody should have to find out.
    async fn tell_of(&self, seen: &Observed, planned: &PoolPlan) {
        for name in &planned.undrained {
            let Some(pod) = seen.pod(name).filter(|pod| self.memory.first_word_of(pod)) else { continue };
            let note = format!(
                "worker {name} is being deleted and was not drained before: by kubectl, an eviction or its node. Its calls have until the end of its grace period. To take a worker out of service, create a Drain"
            );
            self.context.events.warning(self.pool, "WorkerNotDrained", "Watch", note).await;
            self.context.events.warning::<Pod>(pod, "NotDrained", "Watch", "deleted without having been drained").await;
        }
    }

    async fn say(&mut self, seen: &Observed, planned: &PoolPlan, trouble: Option<&Error>) -> Result<(), Error> {
        let status = status::of(self, seen, planned, trouble, Timestamp::now());
        let wait = self.memory.status_is_due(self.pool.status.as_ref(), &status);
        if let Some(wait) = wait {
            self.look_again(Some(wait));
            return Ok(());
        }
        if self.context.applier.apply_status(self.pool, &status).await? {
            self.memory.status_written();
        }
        Ok(())
    }

    fn look_again(&mut self, after: Option<Duration>) {
        self.soon = [self.soon, after].into_iter().flatten().min();
    }
}

/// Whether a pod is being deleted or has ended.
pub(crate) fn is_leaving(pod: &Pod) -> bool {
    observe::pod_state(pod) == pool::PodState::Leaving
}

/// What is known of the calls of a pod's worker. `reported`: what its region's routers say, `connected`: whether they
/// can be asked now.
pub(crate) fn calls(pod: &Pod, reported: Option<&v1::WorkerStatus>, connected: bool) -> pool::Calls {
    observe::calls(pod, observe::pod_state(pod), reported, connected)
}

/// Milliseconds since 1970 (UTC).
pub(crate) fn now() -> Millis {
    Millis(u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0))
}
