//! The relays and routers of a `VoiceRegion`.
#![expect(unreachable_pub, reason = "KubeSchema copies the types, with their visibility, into functions")]

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    form,
    pod::{self, PodSettings},
};

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

    /// Where the relays' pods run and what they are given.
    #[serde(default)]
    pub pod: PodSettings,
}

/// How callers reach relays.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.type == 'Service' || !has(self.service)").message("service goes with type Service: remove it or change the type").field_path(".service"))]
pub struct Ingress {
    /// Service: a UDP Service in front of the relays. HostPort: the port on each relay's node, and HostNetwork: the
    /// node's own network, which saves a hop; both allow one relay a node and need a namespace where the restricted Pod
    /// Security profile is not enforced.
    #[serde(default, rename = "type")]
    pub ingress_type: IngressType,

    /// UDP port that callers send to, 1 to 65535; of the Service or of the node.
    #[serde(default = "default_port")]
    #[schemars(range(min = 1, max = 65_535))]
    pub port: u16,

    /// The Service, for type Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<IngressService>,

    /// Where callers reach the relays, `IP:PORT` or `[IP]:PORT`, at most 8. Callers are told these instead of what the
    /// Service's status or the relays' nodes say. For a NodePort behind something that Kubernetes does not know of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(min = 1, max = 64), regex(pattern = form::SOCKET_ADDRESS.pattern)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub addresses: Vec<String>,
}

/// Kinds of ingress.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IngressType {
    /// A Service.
    #[default]
    Service,
    /// A port of the node.
    HostPort,
    /// The node's own network.
    HostNetwork,
}

/// The Service in front of relays.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.type == 'NodePort' || !has(self.nodePort)").message("nodePort goes with type NodePort").field_path(".nodePort"))]
#[x_kube(validation = Rule::new("self.type == 'LoadBalancer' || !has(self.loadBalancerClass)").message("loadBalancerClass goes with type LoadBalancer").field_path(".loadBalancerClass"))]
pub struct IngressService {
    /// LoadBalancer: the cloud gives it an address. NodePort: a port of every node with a relay.
    #[serde(default, rename = "type")]
    pub service_type: RelayServiceType,

    /// The node's port, for type NodePort, 1 to 65535; most clusters allow 30000 to 32767. Absent: Kubernetes chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_535))]
    pub node_port: Option<u16>,

    /// Who makes the load balancer, for type LoadBalancer. Absent: the cluster's default. Fixed once the Service exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub load_balancer_class: Option<String>,

    /// Annotations of the Service, at most 32: how clouds are told what kind of load balancer to make.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "pod::annotation_values")]
    pub annotations: BTreeMap<String, String>,
}

/// Kinds of Service in front of relays.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RelayServiceType {
    /// With an address of its own.
    #[default]
    LoadBalancer,
    /// A port of nodes.
    NodePort,
}

/// The routers of a region.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Router {
    /// Routers, 1 to 16. They share the region's store. `antiphon up` keeps the store in memory and runs one.
    #[serde(default = "two")]
    #[schemars(range(min = 1, max = 16))]
    pub replicas: u16,

    /// Where routers of other clusters reach this region's routers at their internal port, "HOST:PORT", at most 16.
    /// Routers of the same cluster find each other by themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 270), regex(pattern = form::HOST_PORT.pattern)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub addresses: Vec<String>,

    /// The Service in front of the routers, with the ports `api` (7443) and `internal` (7444).
    #[serde(default)]
    pub service: RouterService,

    /// Where the routers' pods run and what they are given.
    #[serde(default)]
    pub pod: PodSettings,
}

/// The Service in front of routers.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.type == 'NodePort' || !(has(self.apiNodePort) || has(self.internalNodePort))").message("node ports go with type NodePort"))]
pub struct RouterService {
    /// ClusterIP: reached from within the cluster only. NodePort: at a port of every node. LoadBalancer: the cloud gives
    /// it an address.
    #[serde(default, rename = "type")]
    pub service_type: RouterServiceType,

    /// The node's port of the API, for type NodePort, 1 to 65535. Absent: Kubernetes chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_535))]
    pub api_node_port: Option<u16>,

    /// The node's port for routers of other clusters, for type NodePort, 1 to 65535. Absent: Kubernetes chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_535))]
    pub internal_node_port: Option<u16>,

    /// Annotations of the Service, at most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "pod::annotation_values")]
    pub annotations: BTreeMap<String, String>,
}

/// Kinds of Service in front of routers.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RouterServiceType {
    /// Within the cluster only.
    #[default]
    ClusterIP,
    /// A port of nodes.
    NodePort,
    /// With an address of its own.
    LoadBalancer,
}

impl Default for Relay {
    fn default() -> Self {
        Self { replicas: two(), ingress: Ingress::default(), pod: PodSettings::default() }
    }
}

impl Default for Ingress {
    fn default() -> Self {
        Self { ingress_type: IngressType::default(), port: default_port(), service: None, addresses: Vec::new() }
    }
}

impl Default for Router {
    fn default() -> Self {
        Self { replicas: two(), addresses: Vec::new(), service: RouterService::default(), pod: PodSettings::default() }
    }
}

// Defaults. serde wants functions.

fn two() -> u16 {
    2
}

fn default_port() -> u16 {
    4_433
}
