//! The worker template of a `VoiceAgent`: everything about its pods that a platform team decides.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

use std::collections::BTreeMap;

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::{
    form,
    pod::{
        self, DeviceResources, EnvFrom, EnvVar, Fragment, PodSecurity, PullPolicy, ResourceClaim, SecretRef,
        Toleration, Volume, VolumeMount,
    },
    time_span::{Range, TimeSpan},
};

/// What one worker is and needs.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    /// Class of GPU that a worker runs on, one of the `gpuClasses` of each of the agent's regions, such as `l4` or
    /// `h100`. Calls are placed by it; `resources` or `resourceClaims` make the scheduler give a worker the GPU itself.
    /// Absent: workers need no GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern))]
    pub gpu_class: Option<String>,

    /// Image of the worker. Absent: the one that belongs to the operator's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,

    /// When a node fetches the worker's image. Absent: as Kubernetes decides, which is IfNotPresent unless the image's
    /// tag is `latest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PullPolicy")]
    pub image_pull_policy: Option<PullPolicy>,

    /// Secrets of the agent's namespace with the credentials of registries, at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub image_pull_secrets: Vec<SecretRef>,

    /// Environment variables of the worker, at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub env: Vec<EnvVar>,

    /// Secrets and ConfigMaps of the agent's namespace whose entries become environment variables, at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub env_from: Vec<EnvFrom>,

    /// What the worker's own container needs and may use. An engine in the pod has its own: see `engineContainer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<DeviceResources>,

    /// Devices that each worker's pod claims by dynamic resource allocation, at most 16. Containers use them by
    /// `resources.claims`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub resource_claims: Vec<ResourceClaim>,

    /// A speech engine that runs next to each worker, in the same pod. It is a native sidecar: it starts before the
    /// worker and ends after it, so a worker that drains keeps its engine to the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_container: Option<EngineContainer>,

    /// ServiceAccount of the agent's namespace that workers run as. Absent: the namespace's default. No token of it is
    /// mounted: workers do not speak with Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub service_account_name: Option<String>,

    /// PriorityClass of the workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub priority_class_name: Option<String>,

    /// RuntimeClass of the workers, such as `nvidia`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub runtime_class_name: Option<String>,

    /// Labels that a worker's node must have, at most 32. `regions[].nodeSelector` adds to them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "pod::label_values")]
    pub node_selector: BTreeMap<String, String>,

    /// Attraction to nodes and pods, in the form of `kubectl explain pod.spec.affinity`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Fragment>,

    /// Taints of nodes that workers run on all the same, at most 32. `regions[].tolerations` adds to them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub tolerations: Vec<Toleration>,

    /// How workers are spread over nodes and zones, at most 8, each in the form of
    /// `kubectl explain pod.spec.topologySpreadConstraints`. One without a `labelSelector` counts the workers of its own
    /// pool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub topology_spread_constraints: Vec<Fragment>,

    /// Volumes of the pod, such as a cache of models that all workers of a node share, at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub volumes: Vec<Volume>,

    /// Where the worker's own container sees `volumes`, at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["mountPath".into()]))]
    pub volume_mounts: Vec<VolumeMount>,

    /// Users and groups of the pod. Everything else is as the restricted Pod Security profile wants it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security_context: Option<PodSecurity>,

    /// How long a worker may take from its start until it can take calls, models loaded, 1s to 24h. One that takes
    /// longer is restarted.
    #[serde(default = "default_startup_deadline")]
    #[x_kube(validation = STARTUP_DEADLINE.rule())]
    pub startup_deadline: TimeSpan,

    /// How long a worker may live on after somebody deleted its pod, 30s to 24h: the ceiling of `disruption.deadline`
    /// where Antiphon is not asked first, as with `kubectl delete pod`. Planned removals drain before they delete and
    /// do not depend on it.
    #[serde(default = "default_termination_grace")]
    #[x_kube(validation = TERMINATION_GRACE.rule())]
    pub termination_grace: TimeSpan,

    /// QUIC endpoints of a worker, 1 to 64, each with a thread and a UDP port of its own. One carries hundreds of calls.
    #[serde(default = "one_shard")]
    #[schemars(range(min = 1, max = 64))]
    pub shards: u8,

    /// Labels of the workers' pods besides Antiphon's own, at most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "pod::pod_labels")]
    pub labels: BTreeMap<String, String>,

    /// Annotations of the workers' pods, at most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "pod::pod_annotations")]
    pub annotations: BTreeMap<String, String>,
}

/// A speech engine in the worker's pod.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct EngineContainer {
    /// Image of the engine.
    #[schemars(length(min = 1, max = 512))]
    pub image: String,

    /// When a node fetches the engine's image. Absent: as Kubernetes decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PullPolicy")]
    pub image_pull_policy: Option<PullPolicy>,

    /// Replaces the image's entry point, at most 64 words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4_096)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub command: Vec<String>,

    /// Replaces the image's arguments, at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4_096)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub args: Vec<String>,

    /// Environment variables of the engine, at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub env: Vec<EnvVar>,

    /// Secrets and ConfigMaps of the agent's namespace whose entries become environment variables, at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub env_from: Vec<EnvFrom>,

    /// What the engine needs and may use, such as `nvidia.com/gpu: 1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<DeviceResources>,

    /// Where the engine sees the worker's `volumes`, at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["mountPath".into()]))]
    pub volume_mounts: Vec<VolumeMount>,

    /// When the engine has started, in the form of `kubectl explain pod.spec.initContainers.startupProbe`. The worker
    /// starts after that. Absent: as soon as the engine's process runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup_probe: Option<Fragment>,

    /// Whether the engine's own files cannot be written to. Volumes can.
    #[serde(default)]
    pub read_only_root_filesystem: bool,
}

impl Default for Worker {
    fn default() -> Self {
        // The fields that are absent say so themselves.
        serde_json::from_value(serde_json::json!({})).expect("every field has a default")
    }
}

pub(crate) const STARTUP_DEADLINE: Range = Range::new("1s", "24h");
pub(crate) const TERMINATION_GRACE: Range = Range::new("30s", "24h");

// Defaults. serde wants functions.

fn default_startup_deadline() -> TimeSpan {
    TimeSpan::from_secs(600)
}

fn default_termination_grace() -> TimeSpan {
    TimeSpan::from_secs(3_600)
}

fn one_shard() -> u8 {
    1
}
