//! What Drains and nodes order of a worker.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use antiphon_core::{clock::Millis, pool::DrainOrder};
use antiphon_crds::{Drain, DrainPolicy};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt as _;

use super::target::Target;
use crate::{Context, pod_template::PoolNames};

/// What is ordered of the workers of a pool.
#[derive(Clone, Debug, Default)]
pub struct Orders {
    /// Drains of the pool, or of its region: all its workers, until then.
    pool: Option<Millis>,
    /// Drains of single workers.
    workers: BTreeMap<String, Millis>,
    /// Drains of nodes: by node, and whether its pods may be replaced.
    nodes: BTreeMap<String, Millis>,
}

impl Orders {
    /// Those that stand now. `default_deadline`: how long calls of the agent may go on.
    #[must_use]
    pub fn of(context: &Context, names: &PoolNames<'_>, default_deadline: Duration) -> Self {
        Self::by(&context.caches.drains.all(), &context.config.namespace, names, default_deadline)
    }

    fn by(drains: &[Arc<Drain>], home: &str, names: &PoolNames<'_>, default_deadline: Duration) -> Self {
        let mut orders = Self::default();
        for drain in drains.iter().filter(|drain| has_begun(drain)) {
            let Ok(target) = Target::of(drain, home) else { continue };
            let started = drain.status.as_ref().and_then(|status| status.started_at.as_ref());
            let Some(started) = started.and_then(|at| u64::try_from(at.0.as_millisecond()).ok()) else { continue };
            let deadline = Millis(started).after(deadline_of(drain).unwrap_or(default_deadline));
            match target {
                Target::Pool { namespace, name } if namespace == names.namespace && name == names.pool => {
                    sooner(&mut orders.pool, deadline);
                }
                Target::Region { name } if name == names.region => sooner(&mut orders.pool, deadline),
                Target::Worker { namespace, name } if namespace == names.namespace => {
                    let entry = orders.workers.entry(name).or_insert(deadline);
                    *entry = deadline.min(*entry);
                }
                Target::Node { name } => {
                    let entry = orders.nodes.entry(name).or_insert(deadline);
                    *entry = deadline.min(*entry);
                }
                Target::Pool { .. } | Target::Region { .. } | Target::Worker { .. } => {}
            }
        }
        orders
    }

    /// What is ordered of a worker, the most urgent of it.
    #[must_use]
    pub fn for_worker(&self, pod: &Pod, node: Option<&Node>) -> Option<DrainOrder> {
        let closed = node.is_some_and(takes_no_pods);
        let on = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
        let of_node = on.and_then(|name| self.nodes.get(name)).copied();
        let of_worker = self.workers.get(&pod.name_any()).copied();
        // While its pool is to be empty, nobody takes its place.
        if let Some(deadline) = [self.pool, of_worker.filter(|_| self.pool.is_some())].into_iter().flatten().min() {
            return Some(DrainOrder::Empty { deadline });
        }
        // A successor might come to the same node.
        let of_closed = of_node.filter(|_| closed);
        if let Some(deadline) = [of_worker, of_closed].into_iter().flatten().min() {
            return Some(DrainOrder::Replace { deadline });
        }
        match of_node {
            Some(deadline) => Some(DrainOrder::Empty { deadline }),
            None => closed.then_some(DrainOrder::ReplaceInTurn),
        }
    }
}

/// Whether a node is about to be emptied: it was cordoned, or an autoscaler is about to take it away.
pub(super) fn takes_no_pods(node: &Node) -> bool {
    let Some(spec) = &node.spec else { return false };
    let leaving = |key: &str| LEAVING.contains(&key);
    spec.unschedulable == Some(true) || spec.taints.iter().flatten().any(|taint| leaving(&taint.key))
}

/// Whether a Drain orders anything.
pub(super) fn has_begun(drain: &Drain) -> bool {
    let started = drain.status.as_ref().is_some_and(|status| status.started_at.is_some());
    started && drain.metadata.deletion_timestamp.is_none()
}

/// How long calls may go on, if the Drain says so itself.
pub(super) fn deadline_of(drain: &Drain) -> Option<Duration> {
    match drain.spec.policy {
        Some(DrainPolicy::EndCalls) => Some(Duration::ZERO),
        Some(DrainPolicy::WaitForCalls) | None => drain.spec.deadline.map(|deadline| deadline.duration()),
    }
}

fn sooner(slot: &mut Option<Millis>, deadline: Millis) {
    *slot = Some(slot.map_or(deadline, |present| present.min(deadline)));
}

/// Taints of nodes that Cluster Autoscaler or Karpenter are about to take away.
const LEAVING: [&str; 2] = ["ToBeDeletedByClusterAutoscaler", "karpenter.sh/disrupted"];

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NAMES: PoolNames<'_> =
        PoolNames { namespace: "shop", pool: "frontdesk-frankfurt", agent: "frontdesk", region: "frankfurt" };
    const HOME: &str = "antiphon-system";

    fn drain(namespace: &str, target: Value, extra: Value) -> Arc<Drain> {
        let mut spec = json!({"target": target});
        spec.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        Arc::new(
            serde_json::from_value(json!({
                "apiVersion": "antiphon.dev/v1alpha1", "kind": "Drain",
                "metadata": {"name": "d", "namespace": namespace}, "spec": spec,
                "status": {"startedAt": "1970-01-01T00:00:10Z"}
            }))
            .unwrap(),
        )
    }

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "w-1", "namespace": "shop"}, "spec": {"nodeName": "gpu-7", "containers": []}
        }))
        .unwrap()
    }

    fn node(unschedulable: bool) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "gpu-7"}, "spec": {"unschedulable": unschedulable}}))
            .unwrap()
    }

    fn order(drains: &[Arc<Drain>], cordoned: bool) -> Option<DrainOrder> {
        let orders = Orders::by(drains, HOME, &NAMES, Duration::from_secs(60));
        orders.for_worker(&pod(), Some(&node(cordoned)))
    }

    #[test]
    fn each_kind_of_target_orders_what_it_means() {
        let none = || json!({});
        let deadline = Millis(70_000);
        for (drains, cordoned, expected) in [
            (vec![], false, None),
            (vec![], true, Some(DrainOrder::ReplaceInTurn)),
            (vec![drain("shop", json!({"worker": "w-1"}), none())], false, Some(DrainOrder::Replace { deadline })),
            (vec![drain("shop", json!({"worker": "w-2"}), none())], false, None),
            (vec![drain("bank", json!({"worker": "w-1"}), none())], false, None),
            (vec![drain("shop", json!({"pool": NAMES.pool}), none())], false, Some(DrainOrder::Empty { deadline })),
            (vec![drain(HOME, json!({"region": "frankfurt"}), none())], true, Some(DrainOrder::Empty { deadline })),
            (vec![drain("shop", json!({"region": "frankfurt"}), none())], false, None),
            (vec![drain(HOME, json!({"node": "gpu-7"}), none())], true, Some(DrainOrder::Replace { deadline })),
            (vec![drain(HOME, json!({"node": "gpu-7"}), none())], false, Some(DrainOrder::Empty { deadline })),
            (vec![drain(HOME, json!({"node": "gpu-8"}), none())], false, None),
        ] {
            assert_eq!(order(&drains, cordoned), expected, "{drains:?} {cordoned}");
        }
    }

    #[test]
    fn the_soonest_deadline_counts_and_one_that_is_being_deleted_orders_nothing() {
        let patient = drain("shop", json!({"worker": "w-1"}), json!({"deadline": "1h"}));
        let hasty = drain("shop", json!({"worker": "w-1"}), json!({"policy": "EndCalls"}));
        let at_once = Some(DrainOrder::Replace { deadline: Millis(10_000) });
        assert_eq!(order(&[patient.clone(), hasty.clone()], false), at_once);
        let mut gone = Arc::unwrap_or_clone(hasty);
        gone.metadata.deletion_timestamp = gone.status.as_ref().unwrap().started_at.clone();
        let deadline = Millis(3_610_000);
        assert_eq!(order(&[patient, Arc::new(gone)], false), Some(DrainOrder::Replace { deadline }));
    }
}
