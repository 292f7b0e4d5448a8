//! `VoiceRegion`: what operators say about one place where calls can be served.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

mod parts;
mod status;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::form;

pub use parts::{
    Ingress, IngressService, IngressType, Relay, RelayServiceType, Router, RouterService, RouterServiceType,
};
pub use status::{KeyStatus, PeerStatus, RegionPhase, VoiceRegionStatus};

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
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster"),
    printcolumn(name = "Capacity%", type_ = "integer", json_path = ".spec.capacityPercent"),
    printcolumn(name = "Relays", type_ = "integer", json_path = ".status.relays"),
    printcolumn(name = "Routers", type_ = "integer", json_path = ".status.routers"),
    printcolumn(name = "Workers", type_ = "integer", json_path = ".status.workers"),
    printcolumn(name = "Sessions", type_ = "integer", json_path = ".status.sessions"),
    printcolumn(name = "Address", type_ = "string", json_path = ".status.relayAddresses[0]"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason"),
    printcolumn(name = "Cloud", type_ = "string", json_path = ".spec.cloud", priority = 1),
    printcolumn(name = "Number", type_ = "integer", json_path = ".status.number", priority = 1),
    printcolumn(name = "Keys", type_ = "integer", json_path = ".status.keys.minting", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].message", priority = 1),
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

// Defaults. serde wants functions.

fn hundred() -> u16 {
    100
}
