//! What the controller of pools keeps between two looks. None of it has to be right for the plans to be: after a restart
//! it is empty, deletion costs count as new, and things happen a moment later.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use antiphon_core::clock::Millis;
use antiphon_crds::WorkerPoolStatus;
use k8s_openapi::api::{apps::v1::ReplicaSet, core::v1::Pod};
use kube::{Resource, ResourceExt as _};
use parking_lot::Mutex;
use tokio::time::Instant;

/// Of all pools.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pools: Mutex<HashMap<(String, String), Arc<PoolMemory>>>,
}

/// Of one pool.
#[derive(Debug, Default)]
pub(super) struct PoolMemory {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By pod: whether it was released, and since when that has been seen.
    costs: HashMap<String, (bool, Instant)>,
    /// Answers to the last writes: caches take a moment.
    pods: HashMap<String, (Arc<Pod>, Instant)>,
    sets: HashMap<String, (Arc<ReplicaSet>, Instant)>,
    /// Pods that something was said of.
    told: HashSet<String>,
    status: Option<Instant>,
}

impl Memory {
    pub(super) fn of(&self, namespace: &str, name: &str) -> Arc<PoolMemory> {
        self.pools.lock().entry((namespace.to_owned(), name.to_owned())).or_default().clone()
    }

    pub(super) fn forget(&self, namespace: &str, name: &str) {
        self.pools.lock().remove(&(namespace.to_owned(), name.to_owned()));
    }
}

impl PoolMemory {
    /// Since when a pod's deletion cost has been seen to be what it is.
    pub(super) fn cost_since(&self, pod: &Pod, released: bool, now: Millis) -> Millis {
        let mut state = self.state.lock();
        let seen = state.costs.entry(pod.uid().unwrap_or_default()).or_insert_with(|| (released, Instant::now()));
        if seen.0 != released {
            *seen = (released, Instant::now());
        }
        let age = u64::try_from(seen.1.elapsed().as_millis()).unwrap_or(u64::MAX);
        Millis(now.0.saturating_sub(age))
    }

    /// A pod was written: its answer counts until the cache has it.
    pub(super) fn wrote_pod(&self, pod: Pod, released: bool) {
        let mut state = self.state.lock();
        state.costs.insert(pod.uid().unwrap_or_default(), (released, Instant::now()));
        state.pods.insert(pod.name_any(), (Arc::new(pod), Instant::now()));
    }

    pub(super) fn wrote_set(&self, set: ReplicaSet) {
        self.state.lock().sets.insert(set.name_any(), (Arc::new(set), Instant::now()));
    }

    pub(super) fn pods(&self, cached: Vec<Arc<Pod>>) -> Vec<Arc<Pod>> {
        let mut state = self.state.lock();
        let there: HashSet<String> = cached.iter().filter_map(|pod| pod.uid()).collect();
        state.costs.retain(|uid, _| there.contains(uid));
        state.told.retain(|uid| there.contains(uid));
        newest(cached, &mut state.pods, false)
    }

    pub(super) fn sets(&self, cached: Vec<Arc<ReplicaSet>>) -> Vec<Arc<ReplicaSet>> {
        newest(cached, &mut self.state.lock().sets, true)
    }

    /// Whether nothing was said of this pod yet.
    pub(super) fn first_word_of(&self, pod: &Pod) -> bool {
        self.state.lock().told.insert(pod.uid().unwrap_or_default())
    }

    pub(super) fn status_written(&self) {
        self.state.lock().status = Some(Instant::now());
    }

    /// How long a status has to wait that differs from the one before only in its numbers of calls; `None`: not at all.
    pub(super) fn status_is_due(
        &self,
        before: Option<&WorkerPoolStatus>,
        status: &WorkerPoolStatus,
    ) -> Option<Duration> {
        let before = before?;
        let urgent = without_calls(before.clone()) != without_calls(status.clone());
        if urgent || before == status {
            return None;
        }
        let written = self.state.lock().status?;
        STATUS_PAUSE.checked_sub(written.elapsed()).filter(|wait| !wait.is_zero())
    }
}

/// Of each object the cached one, or the answer to the last write if the cache does not have that yet.
fn newest<K: Resource<DynamicType = ()>>(
    cached: Vec<Arc<K>>,
    written: &mut HashMap<String, (Arc<K>, Instant)>,
    created: bool,
) -> Vec<Arc<K>> {
    written.retain(|_, (_, at)| at.elapsed() < CACHE_LAG);
    let mut missing: HashSet<String> = written.keys().cloned().collect();
    let mut objects: Vec<Arc<K>> = cached
        .into_iter()
        .map(|object| {
            let name = object.name_any();
            missing.remove(&name);
            match written.get(&name) {
                Some((mine, _)) if mine.uid() == object.uid() && version(mine) > version(&object) => mine.clone(),
                _ => object,
            }
        })
        .collect();
    if created {
        objects.extend(missing.iter().filter_map(|name| Some(written.get(name)?.0.clone())));
    }
    objects
}

/// Since 1.35 it is said that these grow.
fn version<K: Resource<DynamicType = ()>>(object: &Arc<K>) -> u64 {
    object.resource_version().and_then(|version| version.parse().ok()).unwrap_or(0)
}

/// What says nothing of calls.
fn without_calls(mut status: WorkerPoolStatus) -> WorkerPoolStatus {
    (status.sessions, status.free_slots, status.busy) = (0, 0, 0);
    status.agent_revisions.clear();
    status.revisions.iter_mut().for_each(|revision| revision.sessions = 0);
    status
}

/// Numbers of calls in a status change all the time.
const STATUS_PAUSE: Duration = Duration::from_secs(15);
/// A cache that is this far behind is broken, and its watch is being made anew.
const CACHE_LAG: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str, version: &str) -> Arc<ReplicaSet> {
        let mut set = ReplicaSet::default();
        set.metadata.name = Some(name.into());
        set.metadata.uid = Some(name.into());
        set.metadata.resource_version = Some(version.into());
        Arc::new(set)
    }

    #[tokio::test(start_paused = true)]
    async fn own_writes_count_until_the_cache_has_them() {
        let memory = PoolMemory::default();
        memory.wrote_set(Arc::unwrap_or_clone(set("a", "9")));
        memory.wrote_set(Arc::unwrap_or_clone(set("new", "10")));
        let versions = |cached| {
            let mut found: Vec<_> = memory.sets(cached).iter().map(|set| set.resource_version().unwrap()).collect();
            found.sort();
            found
        };
        assert_eq!(versions(vec![set("a", "8")]), ["10", "9"]);
        assert_eq!(versions(vec![set("a", "11"), set("new", "10")]), ["10", "11"]);
        tokio::time::advance(CACHE_LAG).await;
        assert_eq!(versions(vec![set("a", "8")]), ["8"]);
    }

    #[tokio::test(start_paused = true)]
    async fn numbers_of_calls_wait_for_fifteen_seconds_and_everything_else_does_not() {
        let memory = PoolMemory::default();
        let status = |sessions, replicas| WorkerPoolStatus { sessions, replicas, ..WorkerPoolStatus::default() };
        assert_eq!(memory.status_is_due(None, &status(0, 1)), None);
        memory.status_written();
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(memory.status_is_due(Some(&status(0, 1)), &status(1, 1)), Some(Duration::from_secs(10)));
        assert_eq!(memory.status_is_due(Some(&status(0, 1)), &status(1, 2)), None);
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(memory.status_is_due(Some(&status(0, 1)), &status(1, 1)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cost_is_as_old_as_it_has_been_seen() {
        let memory = PoolMemory::default();
        let mut pod = Pod::default();
        pod.metadata.uid = Some("u".into());
        assert_eq!(memory.cost_since(&pod, false, Millis(5_000)), Millis(5_000));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(memory.cost_since(&pod, false, Millis(7_000)), Millis(5_000));
        memory.wrote_pod(pod.clone(), true);
        assert_eq!(memory.cost_since(&pod, true, Millis(7_000)), Millis(7_000));
    }
}
