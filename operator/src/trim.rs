//! What caches leave out.

use k8s_openapi::{
    ByteString,
    api::core::v1::{Container, Node, NodeStatus, Pod, PodSpec, Secret},
};
use sha2::{Digest as _, Sha256};

/// Pods are large and there are many: of the specification stay the node, the grace period and the containers' names
/// and images.
pub fn pod(pod: &mut Pod) {
    let Some(spec) = &mut pod.spec else {
        return;
    };
    let containers = std::mem::take(&mut spec.containers);
    let kept = containers.into_iter().map(|container| Container {
        name: container.name,
        image: container.image,
        ..Default::default()
    });
    *spec = PodSpec {
        containers: kept.collect(),
        node_name: spec.node_name.take(),
        termination_grace_period_seconds: spec.termination_grace_period_seconds,
        ..Default::default()
    };
}

/// Of nodes stay labels, taints, whether they may be scheduled on, conditions, addresses and what they have to offer.
pub fn node(node: &mut Node) {
    node.metadata.annotations = None;
    if let Some(status) = &mut node.status {
        *status = NodeStatus {
            addresses: status.addresses.take(),
            allocatable: status.allocatable.take(),
            conditions: status.conditions.take(),
            ..NodeStatus::default()
        };
    }
}

/// Private keys stay on the API server; whether one was changed is seen by its hash.
pub fn identity(secret: &mut Secret) {
    if let Some(key) = secret.data.as_mut().and_then(|data| data.get_mut(KEY)) {
        *key = hash(&key.0);
    }
}

/// What [`identity`] leaves of a private key.
#[must_use]
pub fn hash(key: &[u8]) -> ByteString {
    ByteString(Sha256::digest(key).to_vec())
}

/// The entry of a `kubernetes.io/tls` Secret that holds the private key.
pub const KEY: &str = "tls.key";
