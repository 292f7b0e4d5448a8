//! How callers reach relays, and where relays say that they are reached.

use std::net::{IpAddr, SocketAddr};

use antiphon_crds::{IngressType, RelayServiceType, RouterServiceType, VoiceRegion};
use k8s_openapi::{
    api::core::v1::{Service, ServicePort, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::ResourceExt as _;

use super::parts::Part;
use crate::records::INTERNAL_PORT;

/// What relays are told of the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advertised {
    /// These addresses, the same for all of them.
    Addresses(Vec<SocketAddr>),
    /// This port of the node that each runs on.
    Node(u16),
    /// Names that have to be looked up first, and the port.
    Names(Vec<String>, u16),
    /// The Service is not as far yet.
    Soon,
    /// Nobody has given the Service an address, and what to do.
    Unknown(&'static str),
}

/// Works out what relays say, from the region and, if there is one, the Service in front of them.
#[must_use]
pub fn advertised(region: &VoiceRegion, service: Option<&Service>) -> Advertised {
    let ingress = &region.spec.relay.ingress;
    let given: Vec<SocketAddr> = ingress.addresses.iter().filter_map(|address| address.parse().ok()).collect();
    if !given.is_empty() {
        return Advertised::Addresses(given);
    }
    if ingress.ingress_type != IngressType::Service {
        return Advertised::Node(ingress.port);
    }
    let Some(service) = service else {
        return Advertised::Soon;
    };
    let settings = ingress.service.clone().unwrap_or_default();
    if settings.service_type == RelayServiceType::NodePort {
        let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_ref());
        let port = ports.into_iter().flatten().find_map(|port| port.node_port);
        return match port.and_then(|port| u16::try_from(port).ok()) {
            Some(port) => Advertised::Node(port),
            None => Advertised::Soon,
        };
    }
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let entries: Vec<_> = status.and_then(|status| status.ingress.as_ref()).into_iter().flatten().collect();
    let mut addresses: Vec<SocketAddr> = entries
        .iter()
        .filter_map(|entry| entry.ip.as_ref()?.parse::<IpAddr>().ok())
        .map(|ip| SocketAddr::new(ip, ingress.port))
        .collect();
    addresses.sort();
    if !addresses.is_empty() {
        return Advertised::Addresses(addresses);
    }
    let names: Vec<_> = entries.iter().filter_map(|entry| entry.hostname.clone()).collect();
    match names.is_empty() {
        false => Advertised::Names(names, ingress.port),
        true => Advertised::Unknown(
            "the Service of the relays has no address of a load balancer yet: does something in this cluster give out \
             such addresses? If not, use spec.relay.ingress.service.type NodePort, type HostPort, or set \
             spec.relay.ingress.addresses",
        ),
    }
}

impl Part<'_> {
    /// The UDP Service in front of relays; none if they are reached at their nodes.
    #[must_use]
    pub fn relay_service(&self) -> Option<Service> {
        let ingress = &self.region.spec.relay.ingress;
        if ingress.ingress_type != IngressType::Service {
            return None;
        }
        let settings = ingress.service.clone().unwrap_or_default();
        let type_ = match settings.service_type {
            RelayServiceType::LoadBalancer => "LoadBalancer",
            RelayServiceType::NodePort => "NodePort",
        };
        let mut port = port("quic", "UDP", ingress.port, super::pods::PUBLIC_PORT);
        port.node_port = settings.node_port.map(Into::into);
        let mut metadata = self.metadata(self.name());
        metadata.annotations = Some(settings.annotations).filter(|annotations| !annotations.is_empty());
        Some(Service {
            metadata,
            spec: Some(ServiceSpec {
                type_: Some(type_.to_owned()),
                selector: Some(self.selector()),
                ports: Some(vec![port]),
                // Callers keep their own address, which is how they are told apart, and one hop is saved.
                external_traffic_policy: Some("Local".to_owned()),
                load_balancer_class: settings.load_balancer_class,
                ip_family_policy: Some("PreferDualStack".to_owned()),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        })
    }

    /// The Service in front of routers: for applications and routers of other clusters.
    #[must_use]
    pub fn router_service(&self) -> Service {
        let settings = &self.region.spec.router.service;
        let type_ = match settings.service_type {
            RouterServiceType::ClusterIP => "ClusterIP",
            RouterServiceType::NodePort => "NodePort",
            RouterServiceType::LoadBalancer => "LoadBalancer",
        };
        let mut api = port("api", "TCP", super::pods::API_PORT, super::pods::API_PORT);
        api.node_port = settings.api_node_port.map(Into::into);
        let mut internal = port("internal", "TCP", INTERNAL_PORT, INTERNAL_PORT);
        internal.node_port = settings.internal_node_port.map(Into::into);
        let mut metadata = self.metadata(self.name());
        metadata.annotations = Some(settings.annotations.clone()).filter(|annotations| !annotations.is_empty());
        Service {
            metadata,
            spec: Some(ServiceSpec {
                type_: Some(type_.to_owned()),
                selector: Some(self.selector()),
                ports: Some(vec![api, internal]),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        }
    }

    /// The headless Service through which relays and workers reach every router, those too that are not ready: some
    /// wait for their first worker to say what it holds.
    #[must_use]
    pub fn fleet_service(&self) -> Service {
        let internal = port("internal", "TCP", INTERNAL_PORT, INTERNAL_PORT);
        Service {
            metadata: self.metadata(format!("{}-fleet", self.name())),
            spec: Some(ServiceSpec {
                type_: Some("ClusterIP".to_owned()),
                cluster_ip: Some("None".to_owned()),
                publish_not_ready_addresses: Some(true),
                selector: Some(self.selector()),
                ports: Some(vec![internal]),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        }
    }
}

/// Where applications reach the API.
#[must_use]
pub fn api_addresses(region: &VoiceRegion, service: Option<&Service>) -> Vec<String> {
    let (name, namespace) = (region.name_any(), region.namespace().unwrap_or_default());
    let port = super::pods::API_PORT;
    let mut addresses = vec![format!("{name}-router.{namespace}.svc:{port}")];
    let status = service.and_then(|service| service.status.as_ref()?.load_balancer.as_ref()?.ingress.as_ref());
    for entry in status.into_iter().flatten() {
        let host = match &entry.ip {
            Some(ip) if ip.contains(':') => Some(format!("[{ip}]")),
            Some(ip) => Some(ip.clone()),
            None => entry.hostname.clone(),
        };
        addresses.extend(host.map(|host| format!("{host}:{port}")));
    }
    addresses.truncate(16);
    addresses
}

fn port(name: &str, protocol: &str, port: u16, target: u16) -> ServicePort {
    ServicePort {
        name: Some(name.to_owned()),
        protocol: Some(protocol.to_owned()),
        port: port.into(),
        target_port: Some(IntOrString::Int(target.into())),
        ..ServicePort::default()
    }
}
