//! `WorkerPool`: the workers of one agent in one region.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::{RevisionStatus, WorkerRevisionStatus, form};

/// Whose workers they are, and how many.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "antiphon.dev",
    version = "v1alpha1",
    kind = "WorkerPool",
    plural = "workerpools",
    shortname = "wp",
    category = "antiphon",
    namespaced,
    status = "WorkerPoolStatus",
    derive = "PartialEq",
    doc = "The workers of one VoiceAgent in one region. The operator makes one for each region of an agent that its cluster builds, next to the agent and named AGENT-REGION; people and autoscalers set how many workers it has. What the workers are is said by the agent alone.",
    validation = Rule::new("self.metadata.name == self.spec.agent + '-' + self.spec.region").message("metadata.name must be AGENT-REGION: a pool is the only one of its agent in its region"),
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    selectable = ".spec.agent",
    selectable = ".spec.region",
    printcolumn(name = "Agent", type_ = "string", json_path = ".spec.agent"),
    printcolumn(name = "Region", type_ = "string", json_path = ".spec.region"),
    printcolumn(name = "Asked", type_ = "integer", json_path = ".spec.replicas"),
    printcolumn(name = "Workers", type_ = "integer", json_path = ".status.replicas"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Updated", type_ = "integer", json_path = ".status.updatedReplicas"),
    printcolumn(name = "Draining", type_ = "integer", json_path = ".status.draining"),
    printcolumn(name = "Sessions", type_ = "integer", json_path = ".status.sessions"),
    printcolumn(name = "Free", type_ = "integer", json_path = ".status.freeSlots"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason"),
    printcolumn(name = "Wanted", type_ = "integer", json_path = ".status.desiredReplicas", priority = 1),
    printcolumn(name = "Busy", type_ = "integer", json_path = ".status.busy", priority = 1),
    printcolumn(name = "Revision", type_ = "string", json_path = ".status.updatedRevision", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[cfg_attr(test, kube(cel))]
#[serde(rename_all = "camelCase")]
pub struct WorkerPoolSpec {
    /// Name of the VoiceAgent, in the same namespace. Fixed.
    #[schemars(length(min = 1, max = 40), regex(pattern = form::NAME.pattern))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("agent cannot be changed: pools belong to the agent they were made for").reason(Reason::FieldValueForbidden))]
    pub agent: String,

    /// Name of the VoiceRegion. Fixed.
    #[schemars(length(min = 1, max = 40), regex(pattern = form::NAME.pattern))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("region cannot be changed: pools belong to the region they were made for").reason(Reason::FieldValueForbidden))]
    pub region: String,

    /// Workers asked for, 0 to 10000. Antiphon sets it once, to the agent's `minReplicas` here, and never again: it
    /// belongs to whoever scales the pool. There are never fewer than the agent's `minReplicas` nor more than its
    /// `maxReplicas`, and the region's `capacityPercent` multiplies it; `status.desiredReplicas` is what comes of that.
    #[serde(default = "one", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000))]
    pub replicas: Option<u32>,
}

/// What became of the pool.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct WorkerPoolStatus {
    /// `metadata.generation` that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Workers that there are to be: those asked for, within the agent's limits and times the region's capacity.
    #[serde(default)]
    pub desired_replicas: u32,

    /// Workers, without those that are being drained.
    #[serde(default)]
    pub replicas: u32,

    /// Workers that can take calls.
    #[serde(default)]
    pub ready_replicas: u32,

    /// Workers of the updated worker revision, without those that are being drained.
    #[serde(default)]
    pub updated_replicas: u32,

    /// Workers that hold calls, those included that are being drained.
    #[serde(default)]
    pub busy: u32,

    /// Workers that are being drained.
    #[serde(default)]
    pub draining: u32,

    /// Calls that the workers hold.
    #[serde(default)]
    pub sessions: u32,

    /// Calls that the workers which take new ones can hold.
    #[serde(default)]
    pub slots: u32,

    /// Calls that could still be taken.
    #[serde(default)]
    pub free_slots: u32,

    /// Selects the pods of the workers that are not being drained; for `kubectl scale` and autoscalers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub selector: Option<String>,

    /// Worker revision that workers had before the rollout that is under way; the updated one if none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub current_revision: Option<String>,

    /// Worker revision that workers are to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub updated_revision: Option<String>,

    /// Worker revisions that exist here, the newest first, at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["workerRevision".into()]))]
    pub revisions: Vec<WorkerRevisionStatus>,

    /// Calls by the revision of behaviour they began with, at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["revision".into()]))]
    pub agent_revisions: Vec<RevisionStatus>,

    /// Ready: as many workers as wanted can take calls. Progressing: workers come, go or are replaced. ScalingLimited:
    /// the number asked for is outside the agent's limits. TemplateAccepted: the API server takes the worker template.
    /// Degraded: something does not work, and what.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

// A pool that somebody makes by hand has one worker. serde wants a function.
#[expect(clippy::unnecessary_wraps, reason = "it is the field's value")]
fn one() -> Option<u32> {
    Some(1)
}
