//! What there is of a pool: its ReplicaSets and pods, and what the region's routers say of its workers.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use antiphon_core::{
    clock::Millis,
    pool::{Calls, Phase, PodState, PoolSnapshot, SetReport, SetView, WorkerView},
};
use antiphon_proto::v1;
use k8s_openapi::{
    api::{
        apps::v1::ReplicaSet,
        core::v1::{ContainerStatus, Node, Pod},
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{Api, ResourceExt as _, api::ListParams, runtime::reflector::ObjectRef};

use super::memory::PoolMemory;
use crate::{
    Context, Error, drain,
    labels::{POOL, WORKER_REVISION},
    pod_template::{CONTAINER, PoolNames},
};

/// What was seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Observed {
    pub(super) sets: Vec<Arc<ReplicaSet>>,
    pub(super) pods: Vec<Arc<Pod>>,
    /// Of the region's routers; by worker.
    pub(super) fleet: Fleet,
}

/// What the routers say.
#[derive(Clone, Debug, Default)]
pub(super) struct Fleet {
    /// They can be asked now.
    pub(super) connected: bool,
    pub(super) workers: BTreeMap<String, v1::WorkerStatus>,
}

impl Observed {
    /// From the caches, and what this process wrote since.
    pub(super) fn cached(context: &Context, names: &PoolNames<'_>, memory: &PoolMemory) -> Self {
        let ours = |labels: &BTreeMap<String, String>, namespace: Option<String>| {
            namespace.as_deref() == Some(names.namespace) && labels.get(POOL).map(String::as_str) == Some(names.pool)
        };
        let sets = context.caches.replica_sets.select(|set| ours(set.labels(), set.namespace()));
        let pods = context.caches.pods.select(|pod| ours(pod.labels(), pod.namespace()));
        Self { sets: memory.sets(sets), pods: memory.pods(pods), fleet: Fleet::of(context, names) }
    }

    /// From the API server itself. Who is about to go is asked after by name: the last word is the worker's.
    pub(super) async fn live(context: &Context, names: &PoolNames<'_>, memory: &PoolMemory) -> Result<Self, Error> {
        let selected = ListParams::default().labels(&format!("{POOL}={}", names.pool));
        let sets: Api<ReplicaSet> = Api::namespaced(context.client.clone(), names.namespace);
        let pods: Api<Pod> = Api::namespaced(context.client.clone(), names.namespace);
        let sets = sets.list(&selected).await?.items.into_iter().map(Arc::new).collect();
        let pods: Vec<Arc<Pod>> = pods.list(&selected).await?.items.into_iter().map(Arc::new).collect();
        let pods = memory.pods(pods);
        let mut fleet = Fleet::of(context, names);
        let leaving = pods.iter().filter(|pod| is_released(pod) && mark(pod).is_some());
        for pod in leaving {
            let name = pod.name_any();
            let Some(worker) = fleet.workers.get_mut(&name) else { continue };
            let left = mark(pod).unwrap_or_default().since(super::now());
            let request = v1::SetWorkerPhaseRequest {
                name,
                incarnation: worker.incarnation,
                phase: v1::Phase::Draining.into(),
                deadline_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
                reason: "is about to be removed".to_owned(),
            };
            let answer = context.links.set_worker_phase(names.region, request).await?;
            if answer.known {
                (worker.phase, worker.active, worker.reserved) = (answer.phase, answer.active, answer.reserved);
                worker.connected = answer.connected;
            }
        }
        Ok(Self { sets, pods, fleet })
    }

    pub(super) fn pod(&self, name: &str) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.name_any() == name).map(AsRef::as_ref)
    }

    pub(super) fn set(&self, revision: &str) -> Option<&ReplicaSet> {
        self.sets.iter().find(|set| revision_of(set.labels()) == revision).map(AsRef::as_ref)
    }

    /// The same as the planner sees it.
    pub(super) fn snapshot(
        &self,
        context: &Context,
        names: &PoolNames<'_>,
        memory: &PoolMemory,
        deadline: Duration,
    ) -> PoolSnapshot {
        let now = super::now();
        let orders = drain::Orders::of(context, names, deadline);
        let worker = |pod: &Arc<Pod>| {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
            let node = node.and_then(|name| context.caches.nodes.store().get(&ObjectRef::new(name)));
            let state = pod_state(pod);
            let released = is_released(pod);
            WorkerView {
                name: pod.name_any(),
                revision: revision_of(pod.labels()).to_owned(),
                pod: state,
                created: pod.metadata.creation_timestamp.as_ref().map(millis).unwrap_or_default(),
                calls: self.fleet.calls(pod, state),
                missing: node.as_deref().is_some_and(|node| is_out_of_touch(node, now)),
                mark: mark(pod),
                released,
                cost_since: memory.cost_since(pod, released, now),
                order: orders.for_worker(pod, node.as_deref()),
            }
        };
        PoolSnapshot {
            sets: self.sets.iter().filter(|set| set.metadata.deletion_timestamp.is_none()).map(view).collect(),
            workers: self.pods.iter().map(worker).collect(),
        }
    }
}

impl Fleet {
    fn of(context: &Context, names: &PoolNames<'_>) -> Self {
        let Some(view) = context.links.view(names.region) else { return Self::default() };
        let agent = format!("{}/{}", names.namespace, names.agent);
        let workers = view.local().map(|region| region.workers.as_slice()).unwrap_or_default();
        let ours = workers.iter().filter(|worker| worker.agent == agent);
        Self { connected: view.connected, workers: ours.map(|worker| (worker.name.clone(), worker.clone())).collect() }
    }

    fn calls(&self, pod: &Pod, state: PodState) -> Calls {
        calls(pod, state, self.workers.get(&pod.name_any()), self.connected)
    }
}

/// What is known of a worker's calls, from what routers reported and whether they can be asked now.
pub(super) fn calls(pod: &Pod, state: PodState, reported: Option<&v1::WorkerStatus>, connected: bool) -> Calls {
    if !runs(pod) {
        return Calls::None;
    }
    match reported {
        Some(worker) if connected && worker.connected => {
            Calls::Held { phase: phase(worker.phase()), count: worker.active.saturating_add(worker.reserved) }
        }
        Some(_) => Calls::Unknown,
        // Ready means registered: this router has yet to hear of it.
        None if state == PodState::Ready || !connected => Calls::Unknown,
        None => Calls::None,
    }
}

fn view(set: &Arc<ReplicaSet>) -> SetView {
    let status = set.status.as_ref();
    let observed = status.is_some_and(|status| status.observed_generation == set.metadata.generation);
    SetView {
        revision: revision_of(set.labels()).to_owned(),
        replicas: set.spec.as_ref().and_then(|spec| spec.replicas).map_or(1, number),
        report: status.filter(|_| observed).map(|status| SetReport {
            replicas: number(status.replicas),
            ready: status.ready_replicas.map_or(0, number),
        }),
        created: set.metadata.creation_timestamp.as_ref().map(millis).unwrap_or_default(),
    }
}

/// How far a pod has come, as its ReplicaSet's controller judges it.
pub(super) fn pod_state(pod: &Pod) -> PodState {
    let status = pod.status.clone().unwrap_or_default();
    let condition = |type_: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == type_);
    let finished = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if pod.metadata.deletion_timestamp.is_some() || finished {
        PodState::Leaving
    } else if pod.spec.as_ref().is_none_or(|spec| spec.node_name.is_none()) {
        let refused =
            condition("PodScheduled").filter(|c| c.status == "False" && c.reason.as_deref() == Some("Unschedulable"));
        PodState::Unscheduled { since: refused.and_then(|c| c.last_transition_time.as_ref()).map(millis) }
    } else if status.phase.as_deref() == Some("Pending") {
        PodState::Pending
    } else if condition("Ready").is_some_and(|condition| condition.status == "True") {
        PodState::Ready
    } else {
        PodState::NotReady
    }
}

/// Whether a process of the worker may be there. A pod of which nothing is known yet has not been started.
pub(super) fn runs(pod: &Pod) -> bool {
    let is_worker = |status: &&ContainerStatus| status.name == CONTAINER;
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let state = statuses.into_iter().flatten().find(is_worker).and_then(|status| status.state.as_ref());
    state.is_some_and(|state| state.running.is_some())
}

/// Until when it was told to drain.
pub(super) fn mark(pod: &Pod) -> Option<Millis> {
    let text = pod.annotations().get(DEADLINE)?;
    let time: k8s_openapi::jiff::Timestamp = text.parse().ok()?;
    u64::try_from(time.as_millisecond()).ok().map(Millis)
}

pub(super) fn is_released(pod: &Pod) -> bool {
    pod.labels().contains_key(RELEASED)
}

pub(super) fn revision_of(labels: &BTreeMap<String, String>) -> &str {
    labels.get(WORKER_REVISION).map_or("", String::as_str)
}

/// Its node has not been heard of for a while, or is not there any more.
fn is_out_of_touch(node: &Node, now: Millis) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    let ready = conditions.into_iter().flatten().find(|condition| condition.type_ == "Ready");
    ready.is_some_and(|ready| {
        let since = ready.last_transition_time.as_ref().map(millis).unwrap_or_default();
        ready.status != "True" && now.since(since) >= OUT_OF_TOUCH
    })
}

const fn phase(phase: v1::Phase) -> Phase {
    match phase {
        v1::Phase::Unspecified | v1::Phase::Active => Phase::Active,
        v1::Phase::Cordoned => Phase::Cordoned,
        v1::Phase::Draining => Phase::Draining,
    }
}

pub(super) fn millis(time: &Time) -> Millis {
    Millis(u64::try_from(time.0.as_millisecond()).unwrap_or(0))
}

pub(super) fn number(count: i32) -> u32 {
    u32::try_from(count).unwrap_or(0)
}

/// Label: why it is being drained. Pods with it do not count as the pool's any more.
pub(super) const DRAINING: &str = "antiphon.dev/draining";
/// Label: it is empty and may go.
pub(super) const RELEASED: &str = "antiphon.dev/released";
/// Annotation: when calls that are still there are ended.
pub(super) const DEADLINE: &str = "antiphon.dev/drain-deadline";
const OUT_OF_TOUCH: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value, status: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "w-1", "labels": {}}, "spec": spec, "status": status
        }))
        .unwrap()
    }

    fn running(ready: &str) -> Pod {
        pod(
            json!({"nodeName": "n", "containers": []}),
            json!({
                "phase": "Running",
                "conditions": [{"type": "Ready", "status": ready}],
                "containerStatuses": [{
                    "name": "worker", "image": "", "imageID": "", "ready": true, "restartCount": 0,
                    "state": {"running": {}}
                }]
            }),
        )
    }

    #[test]
    fn pods_stand_where_kubernetes_sees_them() {
        let nowhere = json!({"containers": []});
        let refused = json!({"phase": "Pending", "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "lastTransitionTime": "1970-01-01T00:00:07Z"
        }]});
        let somewhere = json!({"nodeName": "n", "containers": []});
        for (pod, expected) in [
            (pod(nowhere.clone(), json!({"phase": "Pending"})), PodState::Unscheduled { since: None }),
            (pod(nowhere, refused), PodState::Unscheduled { since: Some(Millis(7_000)) }),
            (pod(somewhere.clone(), json!({"phase": "Pending"})), PodState::Pending),
            (running("False"), PodState::NotReady),
            (running("True"), PodState::Ready),
            (pod(somewhere, json!({"phase": "Failed"})), PodState::Leaving),
        ] {
            assert_eq!(pod_state(&pod), expected);
        }
    }

    #[test]
    fn a_worker_that_nobody_can_ask_may_hold_calls() {
        let worker = |connected| v1::WorkerStatus {
            name: "w-1".into(),
            connected,
            phase: v1::Phase::Draining.into(),
            active: 2,
            reserved: 1,
            ..v1::WorkerStatus::default()
        };
        let fleet = |connected, worker: Option<v1::WorkerStatus>| Fleet {
            connected,
            workers: worker.into_iter().map(|worker| (worker.name.clone(), worker)).collect(),
        };
        let (ready, starting) = (running("True"), running("False"));
        let held = Calls::Held { phase: Phase::Draining, count: 3 };
        assert_eq!(fleet(true, Some(worker(true))).calls(&ready, PodState::Ready), held);
        assert_eq!(fleet(true, Some(worker(true))).calls(&starting, PodState::NotReady), held);
        for (fleet, pod, state, expected) in [
            (fleet(true, Some(worker(false))), &ready, PodState::Ready, Calls::Unknown),
            (fleet(false, Some(worker(true))), &ready, PodState::Ready, Calls::Unknown),
            (fleet(true, None), &ready, PodState::Ready, Calls::Unknown),
            (fleet(true, None), &starting, PodState::NotReady, Calls::None),
            (fleet(false, None), &starting, PodState::NotReady, Calls::Unknown),
            (fleet(false, None), &Pod::default(), PodState::Pending, Calls::None),
        ] {
            assert_eq!(fleet.calls(pod, state), expected, "{fleet:?} {state:?}");
        }
    }
}
