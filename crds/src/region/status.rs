//! What became of a `VoiceRegion`.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What became of the region.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct VoiceRegionStatus {
    /// `metadata.generation` that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// The region's number in connection IDs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<u16>,

    /// Active, Cordoned, Draining, or Peer where another cluster builds the region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "RegionPhase")]
    pub phase: Option<RegionPhase>,

    /// Relays that forward packets.
    #[serde(default)]
    pub relays: u16,

    /// Selects the pods of the relays; for `kubectl scale` and autoscalers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub relay_selector: Option<String>,

    /// Where callers reach the relays, "ip:port".
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 64)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub relay_addresses: Vec<String>,

    /// Routers that answer.
    #[serde(default)]
    pub routers: u16,

    /// Where applications reach the API, "host:port", at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 270)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub api_addresses: Vec<String>,

    /// Workers of all agents that can take calls here.
    #[serde(default)]
    pub workers: u32,

    /// Calls that workers of the region hold.
    #[serde(default)]
    pub sessions: u32,

    /// Calls that could still be taken here.
    #[serde(default)]
    pub free_slots: u32,

    /// The generations of keys in the region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys: Option<KeyStatus>,

    /// What the routers here know of the fleet's other regions, at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["region".into()]))]
    pub peers: Vec<PeerStatus>,

    /// Ready: calls can be placed and forwarded. Progressing: something is being changed. Consistent: the clusters of
    /// the fleet say the same of their regions. Degraded: something does not work, and what.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// What a region is doing.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionPhase {
    /// Takes new calls.
    Active,
    /// Keeps what it has and takes nothing new.
    Cordoned,
    /// Is being emptied.
    Draining,
    /// Is built by another cluster.
    Peer,
}

/// Generations of keys: see docs/rotation.md.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct KeyStatus {
    /// The one that the region was told to move to.
    #[serde(default)]
    pub wanted: u32,

    /// The one that the region uses for what is new.
    #[serde(default)]
    pub minting: u32,

    /// The oldest one that is still in use.
    #[serde(default)]
    pub oldest: u32,

    /// Those that every relay and worker of the region has loaded, at most 8.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub loaded: Vec<u32>,

    /// Who has yet to load or use the wanted one, in words, at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 256)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub held_up_by: Vec<String>,
}

/// Another region, as the routers of this one see it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// Its name.
    #[schemars(length(min = 1, max = 40))]
    pub region: String,

    /// Whether the routers of both hear each other.
    #[serde(default)]
    pub connected: bool,

    /// Since when it is silent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_since: Option<Time>,

    /// What the region says of itself and this cluster's VoiceRegion contradicts, such as `number: 3 there, 4 here`, at
    /// most 8.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(max = 256)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub contradictions: Vec<String>,
}
