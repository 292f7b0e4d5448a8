//! `VoiceRegion`: what operators say about one place where calls can be served.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::form;

/// Where the region is, who builds it, and what it offers.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "antiphon.dev",
    version = "v1alpha1",
    kind = "VoiceRegion",
    plural = "voiceregions",
    shortname = "vr",
    category = "antiphon",
    namespaced,
    status = "VoiceRegionStatus",
    derive = "PartialEq",
    doc = "A region: relays at the edge, routers that place calls, and room for workers, in one cluster of one cloud. Every cluster of the fleet holds all of its VoiceRegions; each region is built by the cluster that it names and is a peer to all others.",
    validation = Rule::new("self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("metadata.name must have at most 40 characters: lower-case letters, digits and '-', beginning with a letter and not ending with '-'"),
    scale(
        spec_replicas_path = ".spec.relay.replicas",
        status_replicas_path = ".status.relays",
        label_selector_path = ".status.relaySelector"
    ),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Cloud", type_ = "string", json_path = ".spec.cloud"),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster"),
    printcolumn(name = "Serving", type_ = "string", json_path = ".spec.serving"),
    printcolumn(name = "Capacity%", type_ = "integer", json_path = ".spec.capacityPercent"),
    printcolumn(name = "Relays", type_ = "integer", json_path = ".status.relays"),
    printcolumn(name = "Sessions", type_ = "integer", json_path = ".status.sessions"),
    printcolumn(name = "Number", type_ = "integer", json_path = ".status.number", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[cfg_attr(test, kube(cel))]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.tunnel != 'ViaRelays' || self.relay.replicas > 0").message("tunnel ViaRelays needs a relay: raise relay.replicas or set tunnel to Direct").field_path(".tunnel"))]
#[x_kube(validation = Rule::new("has(self.number) == has(oldSelf.number) && (!has(self.number) || self.number == oldSelf.number)").message("number cannot be changed, added or removed: connection IDs of live calls contain it. Create a new region instead").reason(Reason::FieldValueForbidden).field_path(".number"))]
pub struct VoiceRegionSpec {
    /// The region's number in connection IDs, 0 to 1023, unique in the fleet and fixed once the region exists. Absent:
    /// the lowest free one is taken, in alphabetical order of the regions that have none. Set it in a fleet of several
    /// clusters, where no one could settle who takes which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_023))]
    pub number: Option<u16>,

    /// The cluster that builds this region; in every other cluster the region is a peer. Fixed once the region exists.
    /// `antiphon up` builds all regions, whatever cluster they name.
    #[schemars(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("cluster cannot be changed: create a region in the other cluster and drain this one").reason(Reason::FieldValueForbidden))]
    pub cluster: String,

    /// The cloud the region is in. Regions of one cloud are taken to be able to fail together.
    #[schemars(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern))]
    pub cloud: String,

    /// Where on earth the region is. Calls are placed by the distance to it until round trips have been measured.
    pub location: Location,

    /// Residency zones that the region lies in, such as `eu` or `de`, at most 16.
    #[serde(default)]
    #[schemars(length(max = 16), inner(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub residency: Vec<String>,

    /// The relays: UDP ports in public, which pass packets on to workers of any region.
    #[serde(default)]
    pub relay: Relay,

    /// The routers, which place calls and tell relays where workers are.
    #[serde(default)]
    pub router: Router,

    /// Direct: relays of all regions send to the workers here, so their tunnel ports must be reachable from all
    /// regions. ViaRelays: only the relays of this region do, and those of other regions send to them.
    #[serde(default)]
    pub tunnel: Tunnel,

    /// Classes of GPU that workers find here, such as `l4` or `h100`, at most 32.
    #[serde(default)]
    #[schemars(length(max = 32), inner(length(min = 1, max = 63), regex(pattern = form::LABEL.pattern)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub gpu_classes: Vec<String>,

    /// Multiplies the number of workers of every agent here, 0 to 1000 percent, rounded up and never beyond the
    /// `maxReplicas` of the agent. One number to scale a whole region.
    #[serde(default = "hundred")]
    #[schemars(range(min = 0, max = 1_000))]
    pub capacity_percent: u16,

    /// Active takes new calls. Cordoned takes none and keeps those it has.
    #[serde(default)]
    pub serving: Serving,
}

/// A point on the earth (WGS 84).
#[derive(KubeSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Location {
    /// Degrees north of the equator, -90 to 90.
    #[schemars(range(min = -90.0, max = 90.0))]
    pub latitude: f64,

    /// Degrees east of Greenwich, -180 to 180.
    #[schemars(range(min = -180.0, max = 180.0))]
    pub longitude: f64,
}

/// The relays of a region.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Relay {
    /// Relays, 0 to 256. With two or more a call survives the loss of any one of them. `kubectl scale voiceregion`
    /// sets this number.
    #[serde(default = "two")]
    #[schemars(range(min = 0, max = 256))]
    pub replicas: u16,

    /// How callers reach the relays of a cluster. `antiphon up` uses ports of this machine instead.
    #[serde(default)]
    pub ingress: Ingress,
}

/// How callers reach relays.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Ingress {
    /// Service: a UDP Service of type LoadBalancer in front of the relays. HostPort: the port on each relay's node,
    /// which needs a namespace where the restricted Pod Security profile is not enforced.
    #[serde(default, rename = "type")]
    pub ingress_type: IngressType,

    /// UDP port that callers send to, 1 to 65535.
    #[serde(default = "default_port")]
    #[schemars(range(min = 1, max = 65_535))]
    pub port: u16,
}

/// Kinds of ingress.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IngressType {
    /// A Service of type LoadBalancer.
    #[default]
    Service,
    /// A port of the node.
    HostPort,
}

/// The routers of a region.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Router {
    /// Routers, 1 to 16. They share the region's store. `antiphon up` keeps the store in memory and runs one.
    #[serde(default = "two")]
    #[schemars(range(min = 1, max = 16))]
    pub replicas: u16,
}

/// How relays of other regions reach the workers of a region.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tunnel {
    /// Each sends to the workers themselves.
    #[default]
    Direct,
    /// Through the region's own relays.
    ViaRelays,
}

/// Whether a region takes new calls.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Serving {
    /// Takes new calls.
    #[default]
    Active,
    /// Keeps what it has and takes nothing new.
    Cordoned,
}

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

    /// Calls that workers of the region hold.
    #[serde(default)]
    pub sessions: u32,

    /// Ready: calls can be placed and forwarded. Progressing: something is being changed. Degraded: something does not
    /// work, and what.
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

impl Default for Relay {
    fn default() -> Self {
        Self { replicas: two(), ingress: Ingress::default() }
    }
}

impl Default for Ingress {
    fn default() -> Self {
        Self { ingress_type: IngressType::default(), port: default_port() }
    }
}

impl Default for Router {
    fn default() -> Self {
        Self { replicas: two() }
    }
}

// Defaults. serde wants functions.

fn two() -> u16 {
    2
}

fn hundred() -> u16 {
    100
}

fn default_port() -> u16 {
    4_433
}
