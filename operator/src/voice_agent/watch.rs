//! Which agents have to be looked at when something changes.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use antiphon_crds::WorkerPool;
use antiphon_proto::v1::PoolDigest;
use kube::ResourceExt as _;
use parking_lot::Mutex;

use crate::{Context, links::View};

/// Notes which agents have to be looked at when something changes.
pub fn listen(context: &Context) {
    let caches = &context.caches;
    let queue = context.queues.agents.clone();
    caches.agents.on_change(move |agent| queue.push_object(agent));
    let queue = context.queues.agents.clone();
    caches.pools.on_change(move |pool: &WorkerPool| {
        queue.push(&pool.namespace().unwrap_or_default(), &pool.spec.agent);
    });
    let (queue, agents) = (context.queues.agents.clone(), caches.agents.clone());
    let built = Mutex::new(BTreeMap::new());
    caches.regions.on_change(move |region| {
        // Of a region's status no agent says anything.
        let name = region.name_any();
        let now =
            (region.metadata.uid.clone(), region.metadata.generation, region.metadata.deletion_timestamp.is_some());
        if built.lock().insert(name.clone(), now.clone()) == Some(now) {
            return;
        }
        let names = |agent: &antiphon_crds::VoiceAgent| agent.spec.regions.iter().any(|region| region.name == name);
        agents.select(names).iter().for_each(|agent| queue.push_object(agent));
    });
    let queue = context.queues.agents.clone();
    let seen: Mutex<HashMap<(String, String), Arc<ByAgent>>> = Mutex::default();
    context.links.on_change(move |region, view: &View| {
        for peer in view.status.iter().flat_map(|status| &status.regions).filter(|peer| !peer.local) {
            let Some(digest) = &peer.digest else { continue };
            let mut now = ByAgent::new();
            for pool in &digest.pools {
                now.entry(pool.agent.clone()).or_default().push(pool.clone());
            }
            let now = Arc::new(now);
            let key = (region.to_owned(), digest.region.clone());
            let before = seen.lock().insert(key, now.clone()).unwrap_or_default();
            let changed = now.iter().filter(|(agent, pools)| before.get(*agent) != Some(pools)).map(|(agent, _)| agent);
            let gone = before.keys().filter(|agent| !now.contains_key(*agent));
            for (namespace, name) in changed.chain(gone).filter_map(|agent| agent.split_once('/')) {
                queue.push(namespace, name);
            }
        }
    });
}

/// What a peer told of each agent's workers.
type ByAgent = BTreeMap<String, Vec<PoolDigest>>;
