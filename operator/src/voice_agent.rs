//! VoiceAgents: one WorkerPool per region that this cluster builds, and a status that sums up all regions.
//!
//! A pool is made once, with as many replicas as the agent's least number, and that number is never written again: it
//! belongs to whoever scales the pool. What the agent says otherwise, pools read from the agent itself.

mod pools;
mod status;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use antiphon_crds::{VoiceAgent, WorkerPool, compile};
use antiphon_runtime::Tasks;
use k8s_openapi::jiff::Timestamp;
use kube::{ResourceExt as _, runtime::controller::Action};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{Context, Error, controller, labels::FINALIZER, metrics::Kind, records};
use status::Problem;

pub use watch::listen;

/// Begins to reconcile.
pub fn start(context: &Arc<Context>, tasks: &Tasks) {
    let (cache, queue) = (context.caches.agents.clone(), context.queues.agents.clone());
    let memory = Arc::new(Memory::default());
    let reconcile = move |agent: Arc<VoiceAgent>, context: Arc<Context>| {
        let memory = memory.clone();
        async move { reconcile(&agent, &context, &memory).await }
    };
    let stopping = tasks.stopping();
    tasks.service("agents", controller::run(context.clone(), Kind::voice_agent, cache, queue, reconcile, stopping));
}

/// When each agent's status was written last, by namespace and name.
#[derive(Debug, Default)]
struct Memory(Mutex<HashMap<(String, String), Instant>>);

async fn reconcile(agent: &VoiceAgent, context: &Context, memory: &Memory) -> Result<Action, Error> {
    if agent.metadata.deletion_timestamp.is_some() {
        return leave(agent, context, memory).await;
    }
    context.applier.add_finalizer(agent, FINALIZER).await?;
    let regions = records::by_name(context.caches.regions.all());
    let wrong = agent.validate();
    let mut problems: Vec<Problem> = wrong.iter().map(|error| Problem::new("Invalid", error.to_string())).collect();
    let mut failed = None;
    if wrong.is_empty() {
        let misfits = compile::check_agent(agent, &regions);
        problems.extend(misfits.iter().map(|error| Problem::new("RegionMismatch", error.to_string())));
        match pools::keep(agent, &regions, context).await {
            Ok(more) => problems.extend(more),
            Err(error) => {
                problems.push(Problem::new("ReconcileFailed", format!("{error}; it is tried again")));
                failed = Some(error);
            }
        }
    }
    let status = status::of(agent, &pools::of(agent, context), &regions, context, &problems, Timestamp::now());
    let later = say(agent, status, context, memory).await?;
    match failed {
        Some(error) => Err(error),
        None => Ok(later.map_or_else(Action::await_change, Action::requeue)),
    }
}

/// Lets an agent go once all its pools have drained and gone.
async fn leave(agent: &VoiceAgent, context: &Context, memory: &Memory) -> Result<Action, Error> {
    let left = pools::of(agent, context);
    for pool in left.iter().filter(|pool| pool.metadata.deletion_timestamp.is_none()) {
        context.applier.delete(pool.as_ref()).await?;
    }
    if left.is_empty() {
        memory.0.lock().remove(&key(agent));
        context.applier.remove_finalizer(agent, FINALIZER).await?;
        return Ok(Action::await_change());
    }
    let problem = Problem::new("Deleting", format!("the workers of {} pools have to drain first", left.len()));
    let regions = BTreeMap::new();
    let status = status::of(agent, &left, &regions, context, &[problem], Timestamp::now());
    let later = say(agent, status, context, memory).await?;
    Ok(later.map_or_else(Action::await_change, Action::requeue))
}

/// Writes a status that differs; one that differs in its numbers only is written rarely, and then it is said when.
async fn say(
    agent: &VoiceAgent,
    status: antiphon_crds::VoiceAgentStatus,
    context: &Context,
    memory: &Memory,
) -> Result<Option<Duration>, Error> {
    let before = agent.status.clone().unwrap_or_default();
    if before == status {
        return Ok(None);
    }
    if status::without_numbers(before) == status::without_numbers(status.clone()) {
        let written = memory.0.lock().get(&key(agent)).copied();
        let wait = written.and_then(|at| NUMBERS_EVERY.checked_sub(at.elapsed())).filter(|wait| !wait.is_zero());
        if wait.is_some() {
            return Ok(wait);
        }
    }
    if context.applier.apply_status(agent, &status).await? {
        memory.0.lock().insert(key(agent), Instant::now());
    }
    Ok(None)
}

fn key(agent: &VoiceAgent) -> (String, String) {
    (agent.namespace().unwrap_or_default(), agent.name_any())
}

/// Numbers of calls change all the time.
const NUMBERS_EVERY: Duration = Duration::from_secs(15);

type Pools = Vec<Arc<WorkerPool>>;
