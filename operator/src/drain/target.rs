//! What a Drain is about.

use std::{collections::BTreeMap, fmt, sync::Arc};

use antiphon_core::{
    drain::{Room, TargetWorker},
    pool::{Calls, Phase},
};
use antiphon_crds::{Drain, DrainPolicy};
use antiphon_proto::v1;
use k8s_openapi::api::core::v1::Pod;
use kube::{ResourceExt as _, runtime::reflector::ObjectRef};

use super::orders::takes_no_pods;
use crate::{
    Context,
    labels::{AGENT, COMPONENT, Component, POOL, REGION},
    links::View,
    worker_pool,
};

/// What is to be emptied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Worker { namespace: String, name: String },
    Pool { namespace: String, name: String },
    Node { name: String },
    Region { name: String },
}

/// A worker of the target.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) view: TargetWorker,
}

impl Target {
    /// What a Drain names. `home`: Antiphon's namespace, where whoever may write may drain everything.
    pub(super) fn of(drain: &Drain, home: &str) -> Result<Self, String> {
        let spec = &drain.spec.target;
        let own = drain.namespace().unwrap_or_default();
        let at_home = own == home;
        let namespace = spec.namespace.clone().unwrap_or_else(|| own.clone());
        if namespace != own && !at_home {
            return Err(format!(
                "a Drain in namespace {own} cannot empty anything in {namespace}: create it there, or in {home}"
            ));
        }
        let only_at_home = |what: &str| match at_home {
            true => Ok(()),
            false => Err(format!("a Drain of a {what} concerns every agent there: create it in namespace {home}")),
        };
        match (&spec.worker, &spec.pool, &spec.node, &spec.region) {
            (Some(name), None, None, None) => Ok(Self::Worker { namespace, name: name.clone() }),
            (None, Some(name), None, None) => Ok(Self::Pool { namespace, name: name.clone() }),
            (None, None, Some(name), None) => only_at_home("node").map(|()| Self::Node { name: name.clone() }),
            (None, None, None, Some(name)) => only_at_home("region").map(|()| Self::Region { name: name.clone() }),
            _ => Err("set exactly one of target.worker, target.pool, target.node and target.region".to_owned()),
        }
    }

    /// Whether there is such a thing here. A worker that is gone was drained: what matters is that there is none.
    pub(super) fn exists(&self, context: &Context) -> Result<(), String> {
        match self {
            Self::Worker { .. } => Ok(()),
            Self::Pool { namespace, name } => match context.caches.pools.find(namespace, name) {
                Some(_) => Ok(()),
                None => Err(format!("there is no WorkerPool {name} in namespace {namespace}")),
            },
            Self::Node { .. } if !context.config.watch_nodes => {
                Err("this operator is not allowed to see nodes: cordon the node, then drain its workers by name"
                    .to_owned())
            }
            Self::Node { name } => match context.caches.nodes.store().get(&ObjectRef::new(name)) {
                Some(_) => Ok(()),
                None => Err(format!("there is no node {name} in this cluster")),
            },
            Self::Region { name } => match context.caches.regions.find(&context.config.namespace, name) {
                Some(region) if region.spec.cluster == context.config.cluster => Ok(()),
                Some(region) => {
                    Err(format!("region {name} is built by cluster {}: create the Drain there", region.spec.cluster))
                }
                None => Err(format!("there is no VoiceRegion {name}")),
            },
        }
    }

    /// Whether drained workers are deleted and replaced.
    pub(super) fn is_replaced(&self, context: &Context) -> bool {
        match self {
            Self::Worker { .. } => true,
            Self::Node { name } => {
                let node = context.caches.nodes.store().get(&ObjectRef::new(name));
                node.is_some_and(|node| takes_no_pods(&node))
            }
            Self::Pool { .. } | Self::Region { .. } => false,
        }
    }

    fn holds(&self, pod: &Pod) -> bool {
        let label = |key: &str| pod.labels().get(key).map(String::as_str);
        if label(COMPONENT) != Some(Component::Worker.label()) || worker_pool::is_leaving(pod) {
            return false;
        }
        let within = |namespace: &String| pod.namespace().as_ref() == Some(namespace);
        match self {
            Self::Worker { namespace, name } => within(namespace) && pod.name_any() == *name,
            Self::Pool { namespace, name } => within(namespace) && label(POOL) == Some(name),
            Self::Node { name } => pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == Some(name),
            Self::Region { name } => label(REGION) == Some(name),
        }
    }

    /// The workers that are there now.
    pub(super) fn workers(&self, context: &Context) -> Vec<Found> {
        let mut views: BTreeMap<String, Option<View>> = BTreeMap::new();
        let mut found: Vec<Found> = context
            .caches
            .pods
            .select(|pod| self.holds(pod))
            .iter()
            .map(|pod| {
                let region = pod.labels().get(REGION).cloned().unwrap_or_default();
                let view = views.entry(region.clone()).or_insert_with(|| context.links.view(&region));
                Found { view: target_worker(context, pod, view.as_ref()) }
            })
            .collect();
        found.sort_by(|a, b| a.view.name.cmp(&b.view.name));
        found
    }

    /// The room that the agents of these workers have elsewhere, in all their regions.
    pub(super) fn elsewhere(&self, context: &Context, workers: &[Found]) -> Vec<Room> {
        let ours = |name: &str| workers.iter().any(|worker| worker.view.name.1 == name);
        let mut rooms = Vec::new();
        for region in context.caches.regions.all() {
            let name = region.name_any();
            if matches!(self, Self::Region { name: target } if *target == name) {
                continue;
            }
            if region.spec.cluster == context.config.cluster {
                let view = context.links.view(&name).filter(|view| view.connected);
                let workers = view.as_ref().and_then(View::local).map(|local| local.workers.as_slice());
                let placeable = workers.into_iter().flatten().filter(|worker| worker.placeable && !ours(&worker.name));
                rooms.extend(placeable.map(room_of_worker));
            } else if let Some(digest) = context.links.peer(&name).and_then(|status| status.digest) {
                let serves = matches!(digest.phase(), v1::Phase::Active | v1::Phase::Unspecified);
                rooms.extend(digest.pools.iter().filter(|_| serves).map(room_of_pool));
            }
        }
        rooms
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker { namespace, name } => write!(f, "worker/{namespace}/{name}"),
            Self::Pool { namespace, name } => write!(f, "pool/{namespace}/{name}"),
            Self::Node { name } => write!(f, "node/{name}"),
            Self::Region { name } => write!(f, "region/{name}"),
        }
    }
}

fn target_worker(context: &Context, pod: &Arc<Pod>, view: Option<&View>) -> TargetWorker {
    let namespace = pod.namespace().unwrap_or_default();
    let agent_name = pod.labels().get(AGENT).cloned().unwrap_or_default();
    let agent = context.caches.agents.find(&namespace, &agent_name);
    let disruption = agent.as_ref().map(|agent| agent.spec.disruption.clone()).unwrap_or_default();
    let name = pod.name_any();
    let reported = view.and_then(View::local).and_then(|local| local.workers.iter().find(|worker| worker.name == name));
    let gpu_class = match (&agent, reported) {
        (_, Some(worker)) => worker.gpu_class.clone(),
        (Some(agent), None) => agent.spec.worker.gpu_class.clone().unwrap_or_default(),
        (None, None) => String::new(),
    };
    let calls = match worker_pool::calls(pod, reported, view.is_some_and(|view| view.connected)) {
        Calls::None => None,
        Calls::Held { phase, count } => Some((phase, count)),
        // What was known last; it is not drained as long as nobody says so.
        Calls::Unknown => Some((Phase::Active, reported.map_or(0, |worker| worker.active + worker.reserved))),
    };
    TargetWorker {
        agent: format!("{namespace}/{agent_name}"),
        name: (namespace, name),
        gpu_class,
        calls,
        deadline: match disruption.policy {
            DrainPolicy::WaitForCalls => disruption.deadline.duration(),
            DrainPolicy::EndCalls => std::time::Duration::ZERO,
        },
    }
}

fn room_of_worker(worker: &v1::WorkerStatus) -> Room {
    Room {
        agent: worker.agent.clone(),
        gpu_class: worker.gpu_class.clone(),
        free: worker.slots.saturating_sub(worker.active + worker.reserved),
    }
}

fn room_of_pool(pool: &v1::PoolDigest) -> Room {
    Room { agent: pool.agent.clone(), gpu_class: pool.gpu_class.clone(), free: pool.free }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(namespace: &str, target: Value) -> Result<String, String> {
        let drain: Drain = serde_json::from_value(json!({
            "apiVersion": "antiphon.dev/v1alpha1", "kind": "Drain",
            "metadata": {"name": "d", "namespace": namespace}, "spec": {"target": target}
        }))
        .unwrap();
        Target::of(&drain, "antiphon-system").map(|target| target.to_string())
    }

    #[test]
    fn a_team_drains_what_is_its_own_and_operators_everything() {
        assert_eq!(of("shop", json!({"worker": "w-1"})).unwrap(), "worker/shop/w-1");
        assert_eq!(of("shop", json!({"pool": "p", "namespace": "shop"})).unwrap(), "pool/shop/p");
        assert_eq!(of("antiphon-system", json!({"pool": "p", "namespace": "shop"})).unwrap(), "pool/shop/p");
        assert_eq!(of("antiphon-system", json!({"node": "gpu-7"})).unwrap(), "node/gpu-7");
        for (namespace, target) in [
            ("shop", json!({"node": "gpu-7"})),
            ("shop", json!({"region": "frankfurt"})),
            ("shop", json!({"pool": "p", "namespace": "bank"})),
        ] {
            let problem = of(namespace, target).unwrap_err();
            assert!(problem.contains("antiphon-system"), "{problem}");
        }
    }
}
