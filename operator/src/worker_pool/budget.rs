//! The PodDisruptionBudget of a pool: nobody who may hold calls is evicted.
//!
//! A worker leaves its budget when it is released, and it is released when it has been drained; it drains, if its node
//! takes no more pods, as soon as there is room for its successor elsewhere. So `kubectl drain` and autoscalers of nodes
//! wait exactly as long as there is no room elsewhere or calls go on.

use k8s_openapi::{
    api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, LabelSelectorRequirement, ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};

use super::observe::RELEASED;
use crate::{config::Config, labels::POOL, pod_template::PoolNames};

pub(super) fn of(names: &PoolNames<'_>, owner: Option<OwnerReference>, config: &Config) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: ObjectMeta {
            name: Some(names.identity()),
            namespace: Some(names.namespace.to_owned()),
            labels: Some(names.labels(config)),
            owner_references: Some(owner.into_iter().collect()),
            ..ObjectMeta::default()
        },
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(0)),
            selector: Some(LabelSelector {
                match_labels: Some([(POOL.to_owned(), names.pool.to_owned())].into()),
                match_expressions: Some(vec![LabelSelectorRequirement {
                    key: RELEASED.to_owned(),
                    operator: "DoesNotExist".to_owned(),
                    values: None,
                }]),
            }),
            // One that has never been ready has never had a call.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}
