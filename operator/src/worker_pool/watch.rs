//! Which pools have to be looked at when something changes.

use std::{
    collections::{HashMap, hash_map::DefaultHasher},
    hash::{Hash as _, Hasher as _},
};

use antiphon_crds::{VoiceAgent, WorkerPool, compile::pool_name};
use antiphon_proto::v1::WorkerStatus;
use kube::{Resource, ResourceExt as _};
use parking_lot::Mutex;

use crate::{Context, labels::POOL, links::View};

/// Notes which pools have to be looked at when something changes.
pub fn listen(context: &Context) {
    let caches = &context.caches;
    let queue = context.queues.pools.clone();
    caches.pools.on_change(move |pool| queue.push_object(pool));
    caches.pods.on_change(by_label(context));
    caches.replica_sets.on_change(by_label(context));
    caches.identities.on_change(by_label(context));
    caches.certificates.on_change(by_label(context));
    caches.disruption_budgets.on_change(by_label(context));

    let pools = Pools::of(context);
    caches.agents.on_change(move |agent: &VoiceAgent| {
        let (namespace, name) = (agent.namespace().unwrap_or_default(), agent.name_any());
        pools.push(|pool| pool.spec.agent == name && pool.namespace().as_deref() == Some(&namespace));
    });
    let pools = Pools::of(context);
    caches.regions.on_change(move |region| {
        let name = region.name_any();
        pools.push(|pool| pool.spec.region == name);
    });
    // A drain may be of anything anywhere, and there are few.
    let pools = Pools::of(context);
    caches.drains.on_change(move |_| pools.push(|_| true));
    let pools = Pools::of(context);
    let pods = caches.pods.clone();
    caches.nodes.on_change(move |node| {
        let name = node.name_any();
        let on_it = pods.select(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(&name));
        for pod in on_it {
            pools.push_labelled(pod.as_ref());
        }
    });
    let pools = Pools::of(context);
    let seen: Mutex<HashMap<String, Digests>> = Mutex::default();
    context.links.on_change(move |region, view| {
        let now = digests(view);
        let before = seen.lock().insert(region.to_owned(), now.clone()).unwrap_or_default();
        for agent in now.changed_since(&before) {
            if let Some((namespace, agent)) = agent.split_once('/') {
                pools.queue.push(namespace, &pool_name(agent, region));
            }
        }
        if now.connected != before.connected {
            pools.push(|pool| pool.spec.region == region);
        }
    });
}

fn by_label<K: Resource<DynamicType = ()>>(context: &Context) -> impl Fn(&K) + Send + Sync + use<K> {
    let pools = Pools::of(context);
    move |object| pools.push_labelled(object)
}

/// The queue, and what may be put in.
struct Pools {
    queue: crate::queue::Queue<WorkerPool>,
    cache: crate::cache::Cache<WorkerPool>,
}

impl Pools {
    fn of(context: &Context) -> Self {
        Self { queue: context.queues.pools.clone(), cache: context.caches.pools.clone() }
    }

    fn push(&self, wanted: impl Fn(&WorkerPool) -> bool) {
        self.cache.select(wanted).iter().for_each(|pool| self.queue.push_object(pool));
    }

    fn push_labelled(&self, object: &impl Resource) {
        let meta = object.meta();
        let name = meta.labels.as_ref().and_then(|labels| labels.get(POOL));
        if let (Some(namespace), Some(name)) = (&meta.namespace, name) {
            self.queue.push(namespace, name);
        }
    }
}

/// What a region's routers said of the workers of each agent, as far as pools depend on it.
#[derive(Clone, Debug, Default)]
struct Digests {
    connected: bool,
    by_agent: HashMap<String, u64>,
}

impl Digests {
    fn changed_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a String> {
        let gone = before.by_agent.keys().filter(|agent| !self.by_agent.contains_key(*agent));
        let changed = self.by_agent.iter().filter(|(agent, hash)| before.by_agent.get(*agent) != Some(hash));
        changed.map(|(agent, _)| agent).chain(gone)
    }
}

fn digests(view: &View) -> Digests {
    let mut hashers: HashMap<String, DefaultHasher> = HashMap::new();
    for worker in view.local().map(|region| region.workers.as_slice()).unwrap_or_default() {
        let WorkerStatus { agent, name, phase, active, reserved, slots, incarnation, connected, .. } = worker;
        let revisions: Vec<_> = worker.revisions.iter().map(|r| (&r.revision, r.sessions)).collect();
        let hasher = hashers.entry(agent.clone()).or_default();
        (name, phase, active, reserved, slots, incarnation, connected, revisions).hash(hasher);
    }
    let by_agent = hashers.into_iter().map(|(agent, hasher)| (agent, hasher.finish())).collect();
    Digests { connected: view.connected, by_agent }
}
