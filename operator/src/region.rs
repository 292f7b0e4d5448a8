//! VoiceRegions: routers and relays where this cluster builds the region, knowledge of it where another one does.

mod build;
mod gone;
pub mod ingress;
pub mod parts;
pub mod pods;
pub mod status;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use antiphon_crds::{VoiceRegion, VoiceRegionStatus};
use antiphon_runtime::Tasks;
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::{Resource, ResourceExt as _, runtime::controller::Action};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    Context, Error, controller,
    labels::{COMPONENT, Component, FINALIZER, REGION},
    metrics::Kind,
    records,
};
use build::Built;
use status::{COUNTS_EVERY, Observed, Problem};

/// Notes which regions have to be looked at when something changes.
pub fn listen(context: &Context) {
    let caches = &context.caches;
    // Regions are few, and each may contradict any other one.
    let (queue, regions) = (context.queues.regions.clone(), caches.regions.clone());
    let all = Arc::new(move || regions.all().iter().for_each(|region| queue.push_object(region)));
    let (on_region, on_link) = (all.clone(), all);
    caches.regions.on_change(move |_| on_region());
    context.links.on_change(move |_, _| on_link());
    caches.deployments.on_change(part_changed(context));
    caches.services.on_change(part_changed(context));
    caches.service_accounts.on_change(part_changed(context));
    caches.identities.on_change(part_changed(context));
    caches.certificates.on_change(part_changed(context));
    caches.disruption_budgets.on_change(part_changed(context));
    caches.network_policies.on_change(part_changed(context));
    let (queue, namespace) = (context.queues.regions.clone(), context.config.namespace.clone());
    caches.pods.on_change(move |pod: &Pod| {
        let worker = pod.labels().get(COMPONENT).map(String::as_str) == Some(Component::Worker.label());
        // Of workers only the end matters here.
        if let Some(region) = pod.labels().get(REGION)
            && (!worker || gone::is_ending(pod))
        {
            queue.push(&namespace, region);
        }
    });
}

/// Notes the region of a changed object.
fn part_changed<K: Resource>(context: &Context) -> impl Fn(&K) + Send + Sync + 'static {
    let (queue, namespace) = (context.queues.regions.clone(), context.config.namespace.clone());
    move |object| {
        let labels = object.meta().labels.as_ref();
        let label = |name: &str| labels.and_then(|labels| labels.get(name));
        if let Some(region) = label(REGION)
            && label(COMPONENT).map(String::as_str) != Some(Component::Worker.label())
        {
            queue.push(&namespace, region);
        }
    }
}

/// Begins to reconcile.
pub fn start(context: &Arc<Context>, tasks: &Tasks) {
    let (cache, queue) = (context.caches.regions.clone(), context.queues.regions.clone());
    let memory = Arc::new(Memory::default());
    let reconcile = move |region, context| reconcile(memory.clone(), region, context);
    let stopping = tasks.stopping();
    tasks.service("regions", controller::run(context.clone(), Kind::voice_region, cache, queue, reconcile, stopping));
}

/// What is kept between reconciles.
#[derive(Debug, Default)]
struct Memory {
    /// When the counts of a region were written last.
    counts: Mutex<HashMap<String, Instant>>,
    /// Relays and workers that the API server does not know and of which routers were told, by region.
    gone: gone::Told,
}

async fn reconcile(memory: Arc<Memory>, region: Arc<VoiceRegion>, context: Arc<Context>) -> Result<Action, Error> {
    let regions = records::by_name(context.caches.regions.all());
    if region.spec.cluster != context.config.cluster {
        return reconcile_peer(&memory, &region, &regions, &context).await;
    }
    if region.metadata.deletion_timestamp.is_some() {
        return leave(&memory, &region, &regions, &context).await;
    }
    context.applier.add_finalizer(region.as_ref(), FINALIZER).await?;
    let mut observed =
        Observed { number: records::numbers(&regions).get(&region.name_any()).copied(), ..Observed::default() };
    let wrong = region.validate();
    observed.problems.extend(wrong.first().map(|error| Problem::grave("Invalid", error.to_string())));
    if observed.number.is_none() {
        match records::free_number(&region, &regions) {
            Ok(number) => return assign(&region, number, &context).await,
            Err(words) => observed.problems.push(Problem::grave("NumberMissing", words)),
        }
    }
    let outcome = match observed.problems.is_empty() {
        true => build::build(&region, &context).await,
        false => Ok(Built::default()),
    };
    let (again, failed) = match outcome {
        Ok(built) => {
            observed.problems.extend(built.problems);
            (built.again, None)
        }
        Err(error) => {
            let serving = region.status.as_ref().is_some_and(|status| status.routers > 0);
            let message = error.to_string();
            observed.problems.push(Problem { reason: "ApplyFailed", message, ready_all_the_same: serving });
            (None, Some(error))
        }
    };
    build::observe(&region, &context, &mut observed);
    if observed.view.connected {
        gone::report(&memory.gone, &region, &observed.view, &context).await?;
    }
    if observed.is_premature(&region) {
        return failed.map_or_else(|| Ok(requeue([again, None])), Err);
    }
    let status = status::built(&region, &regions, &observed, Timestamp::now());
    let later = write(&memory, &region, status, &context).await?;
    match failed {
        Some(error) => Err(error),
        None => Ok(requeue([again, later])),
    }
}

/// Gives a region its number: written down before anything is built with it.
async fn assign(region: &VoiceRegion, number: u16, context: &Context) -> Result<Action, Error> {
    let status = VoiceRegionStatus { number: Some(number), ..region.status.clone().unwrap_or_default() };
    context.applier.apply_status(region, &status).await?;
    let note = format!("number {number} in connection IDs: it stays as long as the region exists");
    context.events.normal(region, "NumberAssigned", "Assign", note).await;
    Ok(Action::await_change())
}

async fn reconcile_peer(
    memory: &Memory,
    region: &VoiceRegion,
    regions: &BTreeMap<String, Arc<VoiceRegion>>,
    context: &Context,
) -> Result<Action, Error> {
    let name = region.name_any();
    context.applier.remove_finalizer(region, FINALIZER).await?;
    if region.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let built_here = regions.values().any(|other| other.spec.cluster == context.config.cluster);
    let status = status::peer(region, context.links.peer(&name).as_ref(), built_here, Timestamp::now());
    Ok(requeue([write(memory, region, status, context).await?, None]))
}

/// Lets a region go once none of its workers is left.
async fn leave(
    memory: &Memory,
    region: &VoiceRegion,
    regions: &BTreeMap<String, Arc<VoiceRegion>>,
    context: &Context,
) -> Result<Action, Error> {
    let name = region.name_any();
    let workers = context.caches.pods.select(|pod| {
        let label = |key: &str| pod.labels().get(key).map(String::as_str);
        label(REGION) == Some(&name) && label(COMPONENT) == Some(Component::Worker.label())
    });
    if !workers.is_empty() {
        let mut observed = Observed { number: records::numbers(regions).get(&name).copied(), ..Observed::default() };
        observed.workers_left = Some(workers.len());
        build::observe(region, context, &mut observed);
        let status = status::built(region, regions, &observed, Timestamp::now());
        return Ok(requeue([write(memory, region, status, context).await?, None]));
    }
    context.links.remove(&name);
    context.applier.remove_finalizer(region, FINALIZER).await?;
    Ok(Action::await_change())
}

/// Writes a status that differs; one that differs in counts only is written rarely, and then it is said when.
async fn write(
    memory: &Memory,
    region: &VoiceRegion,
    status: VoiceRegionStatus,
    context: &Context,
) -> Result<Option<Duration>, Error> {
    let before = region.status.clone().unwrap_or_default();
    if before == status {
        return Ok(None);
    }
    if status::differ_in_counts_only(&before, &status) {
        let written = memory.counts.lock().get(&region.name_any()).copied();
        let wait = written.map(|at| (at + COUNTS_EVERY).saturating_duration_since(Instant::now()));
        if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
            return Ok(Some(wait));
        }
    }
    memory.counts.lock().insert(region.name_any(), Instant::now());
    context.applier.apply_status(region, &status).await?;
    announce(region, &before, &status, context).await;
    Ok(None)
}

/// Says in events what a reader of the status would see as news.
async fn announce(region: &VoiceRegion, before: &VoiceRegionStatus, status: &VoiceRegionStatus, context: &Context) {
    for condition in &status.conditions {
        let same = before.conditions.iter().find(|old| old.type_ == condition.type_);
        let unchanged = same.is_some_and(|old| (&old.status, &old.reason) == (&condition.status, &condition.reason));
        // That what was just begun is not there yet is no news.
        let begins = same.is_none() && (condition.type_ != "Ready" || BEGINNING.contains(&condition.reason.as_str()));
        if unchanged || begins || condition.type_ == "Progressing" {
            continue;
        }
        let good = condition.status == if condition.type_ == "Degraded" { "False" } else { "True" };
        let (reason, message) = (&condition.reason, condition.message.clone());
        match good {
            true => context.events.normal(region, reason, "Observe", message).await,
            false => context.events.warning(region, reason, "Observe", message).await,
        }
    }
}

fn requeue(times: [Option<Duration>; 2]) -> Action {
    times.into_iter().flatten().min().map_or_else(Action::await_change, Action::requeue)
}

/// Reasons for which no new region is ready.
const BEGINNING: [&str; 4] = ["RoutersNotReady", "RelaysNotReady", "RoutersUnreachable", "NeverHeard"];
