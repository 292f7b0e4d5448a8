//! How the workers of a `VoiceAgent` are replaced, disturbed and counted.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    form,
    pod::Amount,
    time_span::{Range, TimeSpan},
};

/// How workers of a new worker revision replace those of the one before. Only what changes the pod makes a new worker
/// revision; a change of behaviour is given to the workers that run.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// SurgeFirst: a new worker is ready before an old one drains, which takes room for `maxSurge` more. DrainFirst: an
    /// old worker drains and goes before a new one takes its place, for where every GPU is taken. Auto: SurgeFirst, and
    /// DrainFirst for as long as a new worker finds no room.
    #[serde(default)]
    pub strategy: RolloutStrategy,

    /// How many workers more than wanted there may be at a time in each region, 0 to 10000, or a percentage of the
    /// wanted ones, rounded up. With DrainFirst it is how many drain at a time. 0 counts as 1.
    #[serde(default = "quarter")]
    pub max_surge: Amount,

    /// Holds the rollout once this many workers of each region are new. Take it away, or set `canary.paused: false`, to
    /// go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,

    /// Replaces no further worker. Scaling, healing and draining go on.
    #[serde(default)]
    pub paused: bool,

    /// A worker revision of `status.workerRevisions` that workers go back to, or stay at, whatever `worker` says. Take
    /// it away to go on to the present one. The agent's behaviour is not affected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), regex(pattern = form::REVISION.pattern))]
    pub rollback_to: Option<String>,

    /// Any new time, such as `2026-11-21T18:00:00Z`, replaces every worker by the rules above, as `kubectl rollout
    /// restart` does for a Deployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 40), regex(pattern = form::TIME.pattern))]
    pub restarted_at: Option<String>,

    /// Worker revisions without a worker that are kept to go back to, 0 to 50.
    #[serde(default = "ten")]
    #[schemars(range(min = 0, max = 50))]
    pub revision_history_limit: u32,
}

/// How old and new workers take turns.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RolloutStrategy {
    /// SurgeFirst, and DrainFirst for as long as a new worker finds no room.
    #[default]
    Auto,
    /// A new worker is ready before an old one drains.
    SurgeFirst,
    /// An old worker goes before a new one comes.
    DrainFirst,
}

/// The first workers of a new revision: exactly one of count and percent says how many.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.count) != has(self.percent)").message("set exactly one of count and percent"))]
pub struct Canary {
    /// New workers in each region, 1 to 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub count: Option<u32>,

    /// New workers in each region as a percentage of the wanted ones, 1 to 100, rounded up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub percent: Option<u8>,

    /// Stays at that many new workers until this is false or `canary` is taken away.
    #[serde(default = "yes")]
    pub paused: bool,
}

/// What may happen to workers that hold calls.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Disruption {
    /// How a worker that is to go treats the calls it holds. New calls go elsewhere at once, whichever it is.
    #[serde(default)]
    pub policy: DrainPolicy,

    /// How long a worker that is to go keeps the calls it holds, 0s to 24h. Calls still there at the deadline are ended.
    #[serde(default = "default_deadline")]
    #[x_kube(validation = DEADLINE.rule())]
    pub deadline: TimeSpan,

    /// Whether autoscalers of nodes may evict a worker that holds calls. If not, its pod carries the annotations that
    /// keep Cluster Autoscaler and Karpenter away for as long as it is busy.
    #[serde(default)]
    pub safe_to_evict: bool,
}

/// What becomes of the calls of a worker that is to go.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DrainPolicy {
    /// They go on until they end by themselves or the deadline comes.
    #[default]
    WaitForCalls,
    /// They are ended at once, with a reason that the caller's application sees.
    EndCalls,
}

/// By what the number of workers follows the calls, between `minReplicas` and `maxReplicas` of each region.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Autoscaling {
    /// Share of the slots of a region that are to be taken, 1 to 100 percent. More calls bring workers, fewer let them
    /// go.
    #[serde(default = "eighty")]
    #[schemars(range(min = 1, max = 100))]
    pub target_utilization_percent: u8,

    /// Slots that are to be free in each region whatever the percentage says, 0 to 1000000.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub min_free_slots: u32,

    /// How long fewer workers must have been enough before any goes, 0s to 24h.
    #[serde(default = "default_scale_down_delay")]
    #[x_kube(validation = SCALE_DOWN_DELAY.rule())]
    pub scale_down_delay: TimeSpan,
}

/// What is kept of calls.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Privacy {
    /// What outlives a call. Absent: nothing.
    #[serde(default)]
    pub retention: Retention,
}

/// What outlives a call.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Retention {
    /// Audio. None: it lives in memory only, while the call lasts.
    #[serde(default)]
    pub audio: RetentionPolicy,

    /// What was said, as text. None: it lives in memory only, while the call lasts.
    #[serde(default)]
    pub transcripts: RetentionPolicy,
}

/// What is kept of one kind of data.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RetentionPolicy {
    /// Nothing.
    #[default]
    None,
}

impl Canary {
    /// How many workers are new while it holds, of so many that are wanted; never more than those.
    pub fn of(&self, wanted: u32) -> u32 {
        let amount = match (self.count, self.percent) {
            (Some(count), _) => Amount::Count(count),
            (None, Some(percent)) => Amount::Percent(percent),
            (None, None) => Amount::Count(1),
        };
        amount.of(wanted).min(wanted)
    }
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            strategy: RolloutStrategy::default(),
            max_surge: quarter(),
            canary: None,
            paused: false,
            rollback_to: None,
            restarted_at: None,
            revision_history_limit: ten(),
        }
    }
}

impl Default for Disruption {
    fn default() -> Self {
        Self { policy: DrainPolicy::default(), deadline: default_deadline(), safe_to_evict: false }
    }
}

pub(crate) const DEADLINE: Range = Range::new("0s", "24h");
pub(crate) const SCALE_DOWN_DELAY: Range = Range::new("0s", "24h");

// Defaults. serde wants functions.

fn quarter() -> Amount {
    Amount::Percent(25)
}

fn ten() -> u32 {
    10
}

fn eighty() -> u8 {
    80
}

fn yes() -> bool {
    true
}

fn default_deadline() -> TimeSpan {
    TimeSpan::from_secs(900)
}

fn default_scale_down_delay() -> TimeSpan {
    TimeSpan::from_secs(300)
}
