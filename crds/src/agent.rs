//! `VoiceAgent`: what a platform team says about one realtime voice agent.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

mod lifecycle;
mod status;
mod worker;

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    form,
    pod::{self, SecretKeyRef, Toleration},
    time_span::{Range, TimeSpan},
};

pub use lifecycle::{
    Autoscaling, Canary, Disruption, DrainPolicy, Privacy, Retention, RetentionPolicy, Rollout, RolloutStrategy,
};
pub(crate) use lifecycle::{DEADLINE, SCALE_DOWN_DELAY};
pub use status::{AgentRegionStatus, RevisionStatus, VoiceAgentStatus, WorkerRevisionStatus};
pub use worker::{EngineContainer, Worker};
pub(crate) use worker::{STARTUP_DEADLINE, TERMINATION_GRACE};

/// What the agent is and where it runs.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "antiphon.dev",
    version = "v1alpha1",
    kind = "VoiceAgent",
    plural = "voiceagents",
    shortname = "va",
    category = "antiphon",
    namespaced,
    status = "VoiceAgentStatus",
    derive = "PartialEq",
    doc = "A realtime voice agent: the engine that speaks, the regions it runs in, and how its calls are to be treated. Antiphon runs the agent's workers in each region, places every call on one of them and keeps the call alive when workers come and go.",
    validation = Rule::new("self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("metadata.name must have at most 40 characters: lower-case letters, digits and '-', beginning with a letter and not ending with '-'"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason"),
    printcolumn(name = "Workers", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Draining", type_ = "integer", json_path = ".status.draining"),
    printcolumn(name = "Sessions", type_ = "integer", json_path = ".status.sessions"),
    printcolumn(name = "Free", type_ = "integer", json_path = ".status.freeSlots"),
    printcolumn(name = "Revisions", type_ = "string", json_path = ".status.sessionsByRevision"),
    printcolumn(name = "Engine", type_ = "string", json_path = ".spec.engine.type", priority = 1),
    printcolumn(name = "Suspended", type_ = "boolean", json_path = ".spec.suspend", priority = 1),
    printcolumn(name = "Revision", type_ = "string", json_path = ".status.revision", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[cfg_attr(test, kube(cel))]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.engine.type != 'Echo' || self.workload == 'Conversation'").message("engine Echo only holds conversations: set workload to Conversation or choose another engine").field_path(".workload"))]
pub struct VoiceAgentSpec {
    /// The speech engine that listens and answers.
    pub engine: Engine,

    /// What the agent does with the caller's speech: Conversation answers it in turns, Translation speaks it again in
    /// another language while the caller goes on, Transcription only writes it down.
    #[serde(default)]
    pub workload: Workload,

    /// The regions the agent runs in and how many workers it has in each. Every name is that of a VoiceRegion.
    /// At least 1, at most 64.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub regions: Vec<RegionPool>,

    /// What one worker is and needs. A change that changes the pod makes a new worker revision, which `rollout` brings
    /// to the workers.
    #[serde(default)]
    pub worker: Worker,

    /// How many calls there may be and how long they may last.
    #[serde(default)]
    pub sessions: Sessions,

    /// When the caller's turn ends and whether the caller may interrupt.
    #[serde(default)]
    pub turn_taking: TurnTaking,

    /// How quickly the agent has to answer and how far away its callers may be.
    #[serde(default)]
    pub latency: Latency,

    /// Where calls may be placed, apart from what distance and capacity say.
    #[serde(default)]
    pub placement: Placement,

    /// The audio codecs offered to callers: Opus (RFC 6716), or uncompressed 16-bit PCM at 16 kHz (L16At16k) or 24 kHz
    /// (L16At24k). A caller asks for one of them; a call with any other codec is refused.
    #[serde(default = "all_codecs")]
    #[schemars(length(min = 1, max = 3))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub codecs: Vec<Codec>,

    /// Takes the agent out of service without deleting it: it gets no new calls, and its workers go as soon as the
    /// calls they hold have ended or `disruption.deadline` has passed.
    #[serde(default)]
    pub suspend: bool,

    /// How workers of a new worker revision replace the others.
    #[serde(default)]
    pub rollout: Rollout,

    /// How workers that have to go treat the calls they hold.
    #[serde(default)]
    pub disruption: Disruption,

    /// By what the number of workers follows the calls. Not acted upon yet: with or without it a pool has as many
    /// workers as people or other autoscalers ask for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,

    /// What is kept of calls. Nothing, unless it says otherwise.
    #[serde(default)]
    pub privacy: Privacy,
}

/// The speech engine.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Engine {
    /// Which engine. Echo is built in and needs no GPU: it waits for the caller to finish, answers with a receipt in
    /// tones (turn, history, epoch), then repeats the caller's own words, so that a recording of the call proves what
    /// happened to it.
    #[serde(rename = "type")]
    pub engine_type: EngineType,

    /// Entry of a Secret of the agent's namespace with the key for an engine that wants one. It is mounted into the
    /// workers and read again whenever it changes, without a restart. Echo wants none and ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_secret_ref: Option<SecretKeyRef>,
}

/// Kinds of speech engine.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineType {
    /// Repeats the caller's words after a receipt.
    Echo,
}

/// What an agent does with speech.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Workload {
    /// Answers in turns.
    #[default]
    Conversation,
    /// Speaks the caller's words again in another language, while the caller goes on.
    Translation,
    /// Writes the caller's words down.
    Transcription,
}

/// The agent's workers in one region.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.minReplicas <= self.maxReplicas").message("maxReplicas must not be less than minReplicas").field_path(".maxReplicas"))]
pub struct RegionPool {
    /// Name of the VoiceRegion.
    #[schemars(length(min = 1, max = 40), regex(pattern = form::NAME.pattern))]
    pub name: String,

    /// Workers the agent starts with here and never has fewer of, 0 to 10000. The region's `capacityPercent` multiplies
    /// this number.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 10_000))]
    pub min_replicas: u32,

    /// Workers the agent never has more of here, 0 to 10000, whatever scales it.
    #[serde(default = "ten")]
    #[schemars(range(min = 0, max = 10_000))]
    pub max_replicas: u32,

    /// How much this region is liked compared with the agent's others, 1 to 1000. Among regions that are about equally
    /// near and free the one with the higher weight is preferred.
    #[serde(default = "hundred")]
    #[schemars(range(min = 1, max = 1_000))]
    pub weight: u32,

    /// Residency zones that the region has to lie in, all of them, for the agent to run there, such as `eu`, at most 16.
    /// A guard against a region that is not what its name promises. Empty: any zone will do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub residency: Vec<String>,

    /// Labels that a worker's node must have here, besides those of `worker.nodeSelector`, at most 32. Clouds label
    /// their GPUs differently.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "pod::label_values")]
    pub node_selector: BTreeMap<String, String>,

    /// Taints of nodes that workers run on here all the same, besides those of `worker.tolerations`, at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub tolerations: Vec<Toleration>,
}

/// Limits of calls.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Sessions {
    /// Calls one worker holds at a time, 1 to 4096. A worker never grants more, whatever it is asked for.
    #[serde(default = "default_slots")]
    #[schemars(range(min = 1, max = 4_096))]
    pub slots_per_worker: u32,

    /// Calls one tenant may have with this agent at a time, 1 to 1000000, counted over all API keys of the tenant.
    /// Absent: no limit but the slots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub per_tenant: Option<u32>,

    /// Longest duration of a call, 10s to 24h. A call that reaches it is ended with a reason that the caller's
    /// application sees.
    #[serde(default = "default_longest")]
    #[x_kube(validation = LONGEST.rule())]
    pub longest: TimeSpan,
}

/// How turns are told apart.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct TurnTaking {
    /// How long a caller must be quiet for the turn to be over, 100ms to 5s. Shorter answers sooner and cuts more people
    /// off in mid-sentence.
    #[serde(default = "default_end_silence")]
    #[x_kube(validation = END_SILENCE.rule())]
    pub end_silence: TimeSpan,

    /// The shortest sound that counts as speech, 20ms to 2s. Coughs and clicks are shorter.
    #[serde(default = "default_min_speech")]
    #[x_kube(validation = MIN_SPEECH.rule())]
    pub min_speech: TimeSpan,

    /// Whether the agent falls silent at once when the caller speaks while it is speaking. If not, it finishes first.
    #[serde(default = "yes")]
    pub interruptible: bool,
}

/// Limits of time and distance.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("duration(self.rttCeiling) <= duration(self.rttCeilingMax)").message("rttCeilingMax must not be less than rttCeiling").field_path(".rttCeilingMax"))]
pub struct Latency {
    /// From the end of the caller's turn to the first sound of the answer, 50ms to 10s. An answer that takes longer is
    /// counted as late.
    #[serde(default = "default_budget")]
    #[x_kube(validation = BUDGET.rule())]
    pub budget: TimeSpan,

    /// Round trip between caller and worker up to which a region is near enough, 5ms to 5s. The nearest region that
    /// serves the caller is taken even beyond it. While that one is full, the ceiling rises as the caller waits.
    #[serde(default = "default_rtt_ceiling")]
    #[x_kube(validation = RTT_CEILING.rule())]
    pub rtt_ceiling: TimeSpan,

    /// Round trip that is too far, however near the region is beside others and however long the caller has waited,
    /// 5ms to 5s.
    #[serde(default = "default_rtt_ceiling_max")]
    #[x_kube(validation = RTT_CEILING.rule())]
    pub rtt_ceiling_max: TimeSpan,
}

/// Constraints of placement.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Residency zones that calls must stay in, such as `eu`, at most 16. Each of the agent's regions must lie in at
    /// least one of them. Empty: any zone will do.
    #[serde(default)]
    #[schemars(length(max = 16), inner(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub residency: Vec<String>,
}

/// Audio codecs.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Opus, RFC 6716.
    Opus,
    /// Linear PCM, 16 bit, 16 kHz (RFC 3551, section 4.5.11).
    L16At16k,
    /// Linear PCM, 16 bit, 24 kHz.
    L16At24k,
}

impl Default for Sessions {
    fn default() -> Self {
        Self { slots_per_worker: default_slots(), per_tenant: None, longest: default_longest() }
    }
}

impl Default for TurnTaking {
    fn default() -> Self {
        Self { end_silence: default_end_silence(), min_speech: default_min_speech(), interruptible: yes() }
    }
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            budget: default_budget(),
            rtt_ceiling: default_rtt_ceiling(),
            rtt_ceiling_max: default_rtt_ceiling_max(),
        }
    }
}

pub(crate) const LONGEST: Range = Range::new("10s", "24h");
pub(crate) const END_SILENCE: Range = Range::new("100ms", "5s");
pub(crate) const MIN_SPEECH: Range = Range::new("20ms", "2s");
pub(crate) const BUDGET: Range = Range::new("50ms", "10s");
pub(crate) const RTT_CEILING: Range = Range::new("5ms", "5s");

// Defaults. serde wants functions.

fn one() -> u32 {
    1
}

fn ten() -> u32 {
    10
}

fn hundred() -> u32 {
    100
}

fn yes() -> bool {
    true
}

fn all_codecs() -> Vec<Codec> {
    vec![Codec::Opus, Codec::L16At16k, Codec::L16At24k]
}

fn default_slots() -> u32 {
    16
}

fn default_longest() -> TimeSpan {
    TimeSpan::from_secs(3_600)
}

fn default_end_silence() -> TimeSpan {
    TimeSpan::from_millis(600)
}

fn default_min_speech() -> TimeSpan {
    TimeSpan::from_millis(120)
}

fn default_budget() -> TimeSpan {
    TimeSpan::from_millis(800)
}

fn default_rtt_ceiling() -> TimeSpan {
    TimeSpan::from_millis(80)
}

fn default_rtt_ceiling_max() -> TimeSpan {
    TimeSpan::from_millis(300)
}
