//! The pools of an agent.

use std::{collections::BTreeMap, sync::Arc};

use antiphon_crds::{RegionPool, VoiceAgent, VoiceRegion, WorkerPool, WorkerPoolSpec, compile::pool_name};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use super::{Pools, status::Problem};
use crate::{Context, Error, labels::FINALIZER, owned::belongs_to, pod_template::PoolNames};

/// Those that there are.
pub(super) fn of(agent: &VoiceAgent, context: &Context) -> Pools {
    let (namespace, name) = (agent.namespace(), agent.name_any());
    let ours = |pool: &WorkerPool| pool.namespace() == namespace && pool.spec.agent == name;
    let mut pools = context.caches.pools.select(ours);
    pools.sort_by_key(|pool| pool.name_any());
    pools
}

/// Makes those that are missing and deletes those of regions that the agent does not name any more.
pub(super) async fn keep(
    agent: &VoiceAgent,
    regions: &BTreeMap<String, Arc<VoiceRegion>>,
    context: &Context,
) -> Result<Vec<Problem>, Error> {
    let mut problems = Vec::new();
    let ours = |name: &str| {
        let region = regions.get(name).filter(|region| region.spec.cluster == context.config.cluster);
        region.is_some_and(|region| region.metadata.deletion_timestamp.is_none())
    };
    for region in agent.spec.regions.iter().filter(|region| ours(&region.name)) {
        problems.extend(ensure(agent, region, context).await?);
    }
    for pool in of(agent, context) {
        let named = agent.spec.regions.iter().any(|region| region.name == pool.spec.region);
        let elsewhere =
            regions.get(&pool.spec.region).is_some_and(|region| region.spec.cluster != context.config.cluster);
        if (named && !elsewhere) || pool.metadata.deletion_timestamp.is_some() {
            continue;
        }
        if context.applier.delete(pool.as_ref()).await? {
            let note = format!(
                "pool {} drains and goes: the agent does not name region {} any more",
                pool.name_any(),
                pool.spec.region
            );
            context.events.normal(agent, "PoolDeleted", "Delete", note).await;
        }
    }
    Ok(problems)
}

async fn ensure(agent: &VoiceAgent, region: &RegionPool, context: &Context) -> Result<Option<Problem>, Error> {
    let wanted = pool(agent, region, context);
    let (namespace, name) = (agent.namespace().unwrap_or_default(), wanted.name_any());
    let Some(live) = context.caches.pools.find(&namespace, &name) else {
        let seeded = match context.applier.seed(&wanted).await {
            // The agent is about to be deleted as well.
            Err(error) if is_terminating(&error) => return Ok(None),
            seeded => seeded?,
        };
        if seeded {
            let note = format!("pool {name} was made with {} workers; scale it as you like", region.min_replicas);
            context.events.normal(agent, "PoolCreated", "Create", note).await;
        }
        return Ok(None);
    };
    if live.spec.agent != wanted.spec.agent || live.spec.region != wanted.spec.region {
        return Ok(Some(Problem::new(
            "PoolNameTaken",
            format!(
                "WorkerPool {name} belongs to agent {} in region {}: the names of agent and region together make the same name. Rename this agent",
                live.spec.agent, live.spec.region
            ),
        )));
    }
    let labels = wanted.labels();
    let labelled = labels.iter().all(|(key, value)| live.labels().get(key) == Some(value));
    if live.metadata.deletion_timestamp.is_none() && !(labelled && belongs_to(live.meta(), agent.meta())) {
        let owners = &wanted.metadata.owner_references;
        let patch = json!({"metadata": {"labels": labels, "ownerReferences": owners}});
        context.applier.merge(live.as_ref(), patch).await?;
    }
    Ok(None)
}

/// As it is made. Only this once it says how many workers there are.
fn pool(agent: &VoiceAgent, region: &RegionPool, context: &Context) -> WorkerPool {
    let (namespace, agent_name) = (agent.namespace().unwrap_or_default(), agent.name_any());
    let name = pool_name(&agent_name, &region.name);
    let names = PoolNames { namespace: &namespace, pool: &name, agent: &agent_name, region: &region.name };
    let spec =
        WorkerPoolSpec { agent: agent_name.clone(), region: region.name.clone(), replicas: Some(region.min_replicas) };
    let mut pool = WorkerPool::new(&name, spec);
    pool.metadata = ObjectMeta {
        name: Some(name.clone()),
        namespace: Some(namespace.clone()),
        labels: Some(names.labels(&context.config)),
        owner_references: Some(agent.controller_owner_ref(&()).into_iter().collect()),
        finalizers: Some(vec![FINALIZER.to_owned()]),
        ..ObjectMeta::default()
    };
    pool
}

/// Whether the API server refused to make something because the namespace is being deleted.
fn is_terminating(error: &Error) -> bool {
    let Error::Kube(kube::Error::Api(status)) = error else { return false };
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}
