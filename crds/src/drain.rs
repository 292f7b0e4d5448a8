//! `Drain`: takes workers out of service until it is deleted.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    DrainPolicy, form,
    time_span::{Range, TimeSpan},
};

/// What is to be emptied, and how.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "antiphon.dev",
    version = "v1alpha1",
    kind = "Drain",
    plural = "drains",
    shortname = "dr",
    category = "antiphon",
    namespaced,
    status = "DrainStatus",
    derive = "PartialEq",
    doc = "Takes a worker, a pool, a node or a region out of service: it gets no new calls, and those it holds end by themselves or at the deadline. Deleting the Drain is the undo, also half-way: its target takes calls again.",
    validation = Rule::new("self.metadata.name.size() <= 63").message("metadata.name must have at most 63 characters"),
    printcolumn(name = "Target", type_ = "string", json_path = ".status.target"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Policy", type_ = "string", json_path = ".spec.policy"),
    printcolumn(name = "Workers", type_ = "string", json_path = ".status.progress"),
    printcolumn(name = "Sessions", type_ = "integer", json_path = ".status.sessions"),
    printcolumn(name = "Deadline", type_ = "string", json_path = ".status.deadlineAt"),
    printcolumn(name = "Room", type_ = "boolean", json_path = ".status.capacity.sufficient", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Drained')].message",
        priority = 1
    ),
    printcolumn(name = "Reason", type_ = "string", json_path = ".spec.reason", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[cfg_attr(test, kube(cel))]
#[serde(rename_all = "camelCase")]
pub struct DrainSpec {
    /// What is to be emptied. Fixed: make another Drain for another target.
    #[x_kube(validation = Rule::new("self == oldSelf").message("target cannot be changed: create another Drain").reason(Reason::FieldValueForbidden))]
    pub target: DrainTarget,

    /// What becomes of the calls. Absent: as the `disruption.policy` of each agent says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "DrainPolicy")]
    pub policy: Option<DrainPolicy>,

    /// How long calls may go on, 0s to 24h from when draining began. Absent: the `disruption.deadline` of each agent. It
    /// can be changed while the drain is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = DEADLINE.rule())]
    pub deadline: Option<TimeSpan>,

    /// Prove: waits, in phase Pending, until there is room elsewhere for the calls that the target holds, and goes on
    /// once there is. Ignore: begins at once.
    #[serde(default)]
    pub capacity_check: CapacityCheck,

    /// Why, in words, for those who find their workers draining.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub reason: Option<String>,
}

/// What is to be emptied: exactly one of worker, pool, node and region.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.worker) ? 1 : 0) + (has(self.pool) ? 1 : 0) + (has(self.node) ? 1 : 0) + (has(self.region) ? 1 : 0) == 1").message("set exactly one of worker, pool, node and region"))]
#[x_kube(validation = Rule::new("!has(self.__namespace__) || has(self.worker) || has(self.pool)").message("namespace goes with worker or pool: nodes and regions are not in a namespace").field_path(".namespace"))]
pub struct DrainTarget {
    /// Name of a worker, which is that of its pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern))]
    pub worker: Option<String>,

    /// Name of a WorkerPool: all its workers, those included that come while the Drain exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 81), regex(pattern = form::NAME.pattern))]
    pub pool: Option<String>,

    /// Name of a Node of this cluster: all workers on it, and no new ones come there. Needs a Drain in Antiphon's
    /// namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = form::OBJECT_NAME.pattern))]
    pub node: Option<String>,

    /// Name of a VoiceRegion that this cluster builds: all its workers, and no calls are placed there. Needs a Drain in
    /// Antiphon's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 40), regex(pattern = form::NAME.pattern))]
    pub region: Option<String>,

    /// Namespace of the worker or pool. Absent: the Drain's own. Only a Drain in Antiphon's namespace may name another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern))]
    pub namespace: Option<String>,
}

/// Whether there has to be room elsewhere.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CapacityCheck {
    /// Nothing begins before there is.
    #[default]
    Prove,
    /// It begins at once.
    Ignore,
}

/// What became of the drain.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct DrainStatus {
    /// `metadata.generation` that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// The target in words, such as `node/gpu-7` or `pool/default/frontdesk-frankfurt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 320))]
    pub target: Option<String>,

    /// Pending: waits for room elsewhere. Draining: workers take no new calls and calls end. Drained: no calls are left.
    /// Failed: it cannot be carried out, and the conditions say why. Undoing: it is being deleted and workers go back to
    /// work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "DrainPhase")]
    pub phase: Option<DrainPhase>,

    /// The proof that there is room elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<DrainCapacity>,

    /// Workers of the target.
    #[serde(default)]
    pub workers: u32,

    /// Workers of the target that hold no calls any more and take none.
    #[serde(default)]
    pub drained_workers: u32,

    /// Drained workers and all workers, in words: `3/4`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub progress: Option<String>,

    /// Calls that the target held when draining began.
    #[serde(default)]
    pub initial_sessions: u32,

    /// Calls that it still holds.
    #[serde(default)]
    pub sessions: u32,

    /// Calls that were ended because the deadline came or the policy says so.
    #[serde(default)]
    pub ended_sessions: u32,

    /// When draining began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,

    /// When calls that are still there are ended; of several agents' deadlines the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_at: Option<Time>,

    /// When the last call had gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,

    /// Workers of the target that still hold calls, the busiest first, at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["namespace".into(), "name".into()]))]
    pub busiest: Vec<DrainingWorker>,

    /// Accepted: the target exists and may be drained from here. CapacityProven: there is room elsewhere. Drained: no
    /// calls are left.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// How far a drain is.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainPhase {
    /// Waits for room elsewhere.
    Pending,
    /// Workers take no new calls and calls end.
    Draining,
    /// No calls are left.
    Drained,
    /// It cannot be carried out.
    Failed,
    /// It is being deleted and workers go back to work.
    Undoing,
}

/// Whether there is room elsewhere.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct DrainCapacity {
    /// Calls that need room: those of the target.
    #[serde(default)]
    pub needed: u32,

    /// Calls that the agents' other workers could take, in all their regions.
    #[serde(default)]
    pub free_elsewhere: u32,

    /// Whether every agent has room for its own calls.
    #[serde(default)]
    pub sufficient: bool,

    /// Agents without enough room, "namespace/name", at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 128)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub short_agents: Vec<String>,

    /// When this was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checked_at: Option<Time>,
}

/// A worker that still holds calls.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DrainingWorker {
    /// Its namespace.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,

    /// Its name, which is that of its pod.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,

    /// Calls that it holds.
    #[serde(default)]
    pub sessions: u32,
}

pub(crate) const DEADLINE: Range = Range::new("0s", "24h");
