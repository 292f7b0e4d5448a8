//! What became of a `VoiceAgent`.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// What became of the agent.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct VoiceAgentStatus {
    /// `metadata.generation` that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Revision of the agent's behaviour that new calls get: a hash of engine, turn taking and limits. A call keeps the
    /// revision it began with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub revision: Option<String>,

    /// Workers in all regions, without those that are being drained.
    #[serde(default)]
    pub replicas: u32,

    /// Workers in all regions that can take calls.
    #[serde(default)]
    pub ready_replicas: u32,

    /// Workers in all regions that are being drained.
    #[serde(default)]
    pub draining: u32,

    /// Calls in all regions.
    #[serde(default)]
    pub sessions: u32,

    /// Calls that the workers of all regions can hold.
    #[serde(default)]
    pub slots: u32,

    /// Calls that could still be taken in all regions.
    #[serde(default)]
    pub free_slots: u32,

    /// Calls by the revision of behaviour they began with, in words: `4be6c2d0aa: 12, 9f00c1d2e3: 3 (old)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub sessions_by_revision: Option<String>,

    /// Calls by the revision of behaviour they began with: the present one, then at most 31 others, those with the most
    /// calls first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["revision".into()]))]
    pub revisions: Vec<RevisionStatus>,

    /// Worker revisions that exist in any region that this cluster builds, the present one first, at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["workerRevision".into()]))]
    pub worker_revisions: Vec<WorkerRevisionStatus>,

    /// The same by region.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub regions: Vec<AgentRegionStatus>,

    /// Ready: calls can be placed. Accepted: the manifest can be carried out. Progressing: something is being changed.
    /// Degraded: something does not work, and what.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Calls of one revision of behaviour.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RevisionStatus {
    /// The revision.
    #[schemars(length(min = 1, max = 64))]
    pub revision: String,

    /// Calls that began with it.
    #[serde(default)]
    pub sessions: u32,
}

/// Workers of one worker revision.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct WorkerRevisionStatus {
    /// The worker revision: a hash of everything that changes the pod.
    #[schemars(length(min = 1, max = 64))]
    pub worker_revision: String,

    /// Its workers, those included that are being drained. A revision without any is kept to go back to.
    #[serde(default)]
    pub replicas: u32,

    /// Those of them that can take calls.
    #[serde(default)]
    pub ready_replicas: u32,

    /// Calls that they hold.
    #[serde(default)]
    pub sessions: u32,
}

/// What became of the agent in one region.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct AgentRegionStatus {
    /// Name of the VoiceRegion.
    #[schemars(length(min = 1, max = 40))]
    pub name: String,

    /// Whether another cluster builds the region. Its numbers then come from its routers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub peer: bool,

    /// When a peer last told its numbers, if that is more than half a minute ago.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_since: Option<Time>,

    /// Workers, without those that are being drained.
    #[serde(default)]
    pub replicas: u32,

    /// Workers that can take calls.
    #[serde(default)]
    pub ready_replicas: u32,

    /// Workers that are being drained.
    #[serde(default)]
    pub draining: u32,

    /// Calls.
    #[serde(default)]
    pub sessions: u32,

    /// Calls that the workers can hold.
    #[serde(default)]
    pub slots: u32,

    /// Calls that could still be taken.
    #[serde(default)]
    pub free_slots: u32,
}
