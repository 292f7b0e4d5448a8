//! Names that objects of the operator bear.

use std::collections::BTreeMap;

/// Field manager of everything that the operator applies.
pub const FIELD_MANAGER: &str = "antiphon-operator";
/// Field manager of values that are set once, by create, and belong to people and autoscalers from then on.
pub const SEED_MANAGER: &str = "antiphon-operator-seed";
/// Reporting controller of events.
pub const CONTROLLER: &str = "antiphon-operator";
/// Holds resources until they are drained.
pub const FINALIZER: &str = "antiphon.dev/drain";

/// Always `antiphon`.
pub const NAME: &str = "app.kubernetes.io/name";
/// See [`Component`].
pub const COMPONENT: &str = "app.kubernetes.io/component";
/// The release.
pub const INSTANCE: &str = "app.kubernetes.io/instance";
/// Always [`FIELD_MANAGER`].
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Name of the VoiceRegion.
pub const REGION: &str = "antiphon.dev/region";
/// Name of the VoiceAgent; its namespace is the object's.
pub const AGENT: &str = "antiphon.dev/agent";
/// Name of the WorkerPool.
pub const POOL: &str = "antiphon.dev/pool";
/// Revision of a worker's pod.
pub const WORKER_REVISION: &str = "antiphon.dev/worker-revision";
/// `true` on Secrets that hold an API key.
pub const API_KEY: &str = "antiphon.dev/api-key";

/// Annotation: hash of what the operator applied last.
pub const APPLIED: &str = "antiphon.dev/applied";

/// Parts of the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Component {
    /// The operator itself.
    Operator,
    /// Routers.
    Router,
    /// Relays.
    Relay,
    /// Workers.
    Worker,
    /// The store.
    Etcd,
}

impl Component {
    /// The label's value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Router => "router",
            Self::Relay => "relay",
            Self::Worker => "worker",
            Self::Etcd => "etcd",
        }
    }
}

/// Labels of every object that the operator makes; more are added by who makes it.
#[must_use]
pub fn common(instance: &str, component: Component, region: &str) -> BTreeMap<String, String> {
    [
        (NAME, "antiphon"),
        (COMPONENT, component.label()),
        (INSTANCE, instance),
        (MANAGED_BY, FIELD_MANAGER),
        (REGION, region),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// What selects the pods of routers or relays of a region: of the labels the ones that never change.
#[must_use]
pub fn selector(instance: &str, component: Component, region: &str) -> BTreeMap<String, String> {
    let mut labels = common(instance, component, region);
    labels.remove(MANAGED_BY);
    labels
}

/// A selector in the form of `kubectl -l`.
#[must_use]
pub fn text(labels: &BTreeMap<String, String>) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}
