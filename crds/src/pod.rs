//! Parts of pods, in the forms of Kubernetes (core/v1), as far as Antiphon's resources take them over.
//!
//! What Kubernetes would admit and this crate does not know in detail is a [`Fragment`]: kept as it is written and
//! judged by the API server when the pod's owner is applied.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

mod value;

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::form;

pub use value::{Amount, Fragment, Quantity, Volume};
pub(crate) use value::{OWN_PREFIXES, annotation_values, label_values, pod_annotations, pod_labels};

/// When a node fetches an image.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPolicy {
    /// At every start.
    Always,
    /// Unless it is there.
    IfNotPresent,
    /// Never: it has to be there.
    Never,
}

/// A Secret of the same namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub name: String,
}

/// One entry of a Secret of the same namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub name: String,

    /// The entry's key in the Secret's `data`.
    #[schemars(length(min = 1, max = 253), regex(pattern = form::DATA_KEY.pattern))]
    pub key: String,
}

/// One entry of a Secret or ConfigMap of the same namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct KeyRef {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub name: String,

    /// The entry's key in its `data`.
    #[schemars(length(min = 1, max = 253), regex(pattern = form::DATA_KEY.pattern))]
    pub key: String,

    /// Whether the container starts without the variable if the entry does not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optional: Option<bool>,
}

/// A Secret or ConfigMap of the same namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ObjectRef {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub name: String,

    /// Whether the container starts without it if it does not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optional: Option<bool>,
}

/// An environment variable.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.value) && has(self.valueFrom))").message("set value or valueFrom, not both"))]
pub struct EnvVar {
    /// Name of the variable. Names that begin with `ANTIPHON_` are Antiphon's own.
    #[schemars(length(min = 1, max = 253), regex(pattern = form::ENV_NAME.pattern))]
    #[x_kube(validation = Rule::new("!self.startsWith('ANTIPHON_')").message("names that begin with ANTIPHON_ are Antiphon's own: choose another one"))]
    pub name: String,

    /// Its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32_768))]
    pub value: Option<String>,

    /// Where its value comes from, instead of `value`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_from: Option<EnvSource>,
}

/// Where an environment variable's value comes from: exactly one of these.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.secretKeyRef) ? 1 : 0) + (has(self.configMapKeyRef) ? 1 : 0) + (has(self.fieldRef) ? 1 : 0) + (has(self.resourceFieldRef) ? 1 : 0) == 1").message("set exactly one of secretKeyRef, configMapKeyRef, fieldRef and resourceFieldRef"))]
pub struct EnvSource {
    /// An entry of a Secret of the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeyRef>,

    /// An entry of a ConfigMap of the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyRef>,

    /// A field of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field_ref: Option<FieldRef>,

    /// A request or limit of the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_field_ref: Option<ResourceFieldRef>,
}

/// A field of the pod.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct FieldRef {
    /// The field, such as `metadata.name` or `status.hostIP`.
    #[schemars(length(min = 1, max = 512))]
    pub field_path: String,
}

/// A request or limit of a container.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ResourceFieldRef {
    /// The request or limit, such as `limits.cpu`.
    #[schemars(length(min = 1, max = 128))]
    pub resource: String,

    /// What it is counted in; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divisor: Option<Quantity>,
}

/// All entries of a Secret or ConfigMap as environment variables: exactly one of both.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.secretRef) != has(self.configMapRef)").message("set exactly one of secretRef and configMapRef"))]
pub struct EnvFrom {
    /// What every variable's name begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub prefix: Option<String>,

    /// A Secret of the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<ObjectRef>,

    /// A ConfigMap of the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<ObjectRef>,
}

/// Lets pods run on nodes with a matching taint.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.key) || (has(self.operator) && self.operator == 'Exists')").message("a toleration without a key tolerates everything and needs operator: Exists"))]
pub struct Toleration {
    /// The taint's key. Absent, with operator Exists: every taint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub key: Option<String>,

    /// Equal (as if absent) compares key and value, Exists the key alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "TolerationOperator")]
    pub operator: Option<TolerationOperator>,

    /// The taint's value, for operator Equal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub value: Option<String>,

    /// The taint's effect. Absent: every effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "TaintEffect")]
    pub effect: Option<TaintEffect>,

    /// How long a pod stays after a NoExecute taint appeared, 0 to 31536000 seconds. Absent: forever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub toleration_seconds: Option<i64>,
}

/// How a toleration compares.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum TolerationOperator {
    /// Key and value.
    Equal,
    /// The key alone.
    Exists,
}

/// What a taint does.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaintEffect {
    /// New pods stay away.
    NoSchedule,
    /// New pods rather stay away.
    PreferNoSchedule,
    /// Pods that are there leave, too.
    NoExecute,
}

/// What a container needs and may use.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What the scheduler sets aside, by resource: `cpu: 500m`, `memory: 1Gi`. At most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub requests: BTreeMap<String, Quantity>,

    /// What it never gets more of, by resource. At most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub limits: BTreeMap<String, Quantity>,
}

/// What a container next to a GPU needs and may use.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DeviceResources {
    /// What the scheduler sets aside, by resource: `cpu: 500m`, `memory: 1Gi`, `nvidia.com/gpu: 1`. At most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub requests: BTreeMap<String, Quantity>,

    /// What it never gets more of, by resource. At most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub limits: BTreeMap<String, Quantity>,

    /// Which of the pod's `resourceClaims` the container uses. At most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub claims: Vec<ClaimUse>,
}

/// A container's use of one of its pod's resource claims.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ClaimUse {
    /// Name of an entry of `resourceClaims`.
    #[schemars(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern))]
    pub name: String,

    /// One request of the claim. Absent: everything the claim holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 127))]
    pub request: Option<String>,
}

/// Devices that a pod claims by dynamic resource allocation (resource.k8s.io/v1): exactly one of both sources.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.resourceClaimName) != has(self.resourceClaimTemplateName)").message("set exactly one of resourceClaimName and resourceClaimTemplateName"))]
pub struct ResourceClaim {
    /// What containers call it in `resources.claims`.
    #[schemars(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern))]
    pub name: String,

    /// A ResourceClaimTemplate of the same namespace: each worker gets a claim of its own from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub resource_claim_template_name: Option<String>,

    /// A ResourceClaim of the same namespace, which all workers share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub resource_claim_name: Option<String>,
}

/// Where a container sees a volume.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct VolumeMount {
    /// Name of an entry of `volumes`.
    #[schemars(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern))]
    pub name: String,

    /// Path in the container, such as `/models`.
    #[schemars(length(min = 1, max = 1_024))]
    #[x_kube(validation = Rule::new("self.startsWith('/') && !self.contains(':')").message("mountPath is an absolute path without ':'"))]
    pub mount_path: String,

    /// Path within the volume. Absent: its root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1_024))]
    pub sub_path: Option<String>,

    /// Whether the container cannot write to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
}

/// Users and groups of all containers of a pod. What the restricted Pod Security profile asks for beyond that is set
/// anyway: no root, no privileges, no escalation, the runtime's seccomp profile.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct PodSecurity {
    /// User ID, 1 to 2147483647. Absent: 65532.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub run_as_user: Option<i64>,

    /// Group ID, 1 to 2147483647. Absent: 65532.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub run_as_group: Option<i64>,

    /// Group that owns the pod's volumes, 1 to 2147483647. Absent: 65532.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub fs_group: Option<i64>,

    /// Further groups, each 1 to 2147483647, at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(range(min = 1, max = 2_147_483_647)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub supplemental_groups: Vec<i64>,
}

/// Where pods run and what they are given.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct PodSettings {
    /// What each pod needs and may use. Absent: what the operator was told to request for such pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// Labels that a node must have, at most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "label_values")]
    pub node_selector: BTreeMap<String, String>,

    /// Taints of nodes that the pods run on all the same, at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub tolerations: Vec<Toleration>,

    /// Attraction to nodes and pods, in the form of `kubectl explain pod.spec.affinity`. Absent: pods of one kind rather
    /// stay apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Fragment>,

    /// Name of the PriorityClass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub priority_class_name: Option<String>,

    /// Labels of the pods besides Antiphon's own, at most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "pod_labels")]
    pub labels: BTreeMap<String, String>,

    /// Annotations of the pods, at most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "pod_annotations")]
    pub annotations: BTreeMap<String, String>,
}
