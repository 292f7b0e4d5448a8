//! Applies what a region consists of, and looks at what became of it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use antiphon_crds::VoiceRegion;
use antiphon_runtime::pki::{PeerName, Role};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use tokio::{net::lookup_host, time::timeout};

use super::{
    gone,
    ingress::{self, Advertised},
    parts::Part,
    pods::{API_PORT, PUBLIC_PORT, Reached, TUNNEL_PORT},
    status::{Observed, Problem},
};
use crate::{
    Context, Error,
    identity::{self, Issued, Leaf},
    labels::{COMPONENT, Component, REGION, text},
    records::INTERNAL_PORT,
};

/// What came of building.
#[derive(Debug, Default)]
pub(super) struct Built {
    /// What people should know.
    pub(super) problems: Vec<Problem>,
    /// When to look again without being asked.
    pub(super) again: Option<Duration>,
}

/// Applies everything that a region consists of.
pub(super) async fn build(region: &VoiceRegion, context: &Context) -> Result<Built, Error> {
    let part = |component| Part { region, component, config: &context.config };
    let (routers, relays) = (part(Component::Router), part(Component::Relay));
    let mut built = Built::default();
    surround(&routers, Role::Router, context, &mut built).await?;
    surround(&relays, Role::Relay, context, &mut built).await?;
    let caches = &context.caches;
    context.ensure(region, &routers.router_service(), &caches.services).await?;
    context.ensure(region, &routers.fleet_service(), &caches.services).await?;
    let internal = [("TCP", API_PORT), ("TCP", INTERNAL_PORT)];
    context.ensure(region, &routers.network_policy(&internal), &caches.network_policies).await?;
    let open = [("UDP", PUBLIC_PORT), ("UDP", TUNNEL_PORT)];
    context.ensure(region, &relays.network_policy(&open), &caches.network_policies).await?;
    if context.config.etcd.is_none() && region.spec.router.replicas > 1 {
        let message = "there is one router only: without etcd its records are in its memory";
        built.problems.push(Problem::minor("StoreInMemory", message));
    }
    let deployment = routers.routers().map_err(|error| not_a_pod("router", &error))?;
    context.ensure(region, &deployment, &caches.deployments).await?;
    build_relays(&relays, context, &mut built).await?;
    Ok(built)
}

/// What surrounds the pods of either kind.
async fn surround(part: &Part<'_>, role: Role, context: &Context, built: &mut Built) -> Result<(), Error> {
    let caches = &context.caches;
    context.ensure(part.region, &part.service_account(), &caches.service_accounts).await?;
    context.ensure(part.region, &part.disruption_budget(), &caches.disruption_budgets).await?;
    let leaf = Leaf {
        namespace: part.region.namespace().unwrap_or_default(),
        name: part.identity(),
        labels: context.config.labels(part.component, &part.region.name_any()),
        owner: part.owner(),
        peer: PeerName::new(&part.name(), role, &part.region.name_any())?,
        agent: None,
    };
    match identity::ensure(context, part.region, &leaf).await? {
        Issued::Ready(again) => built.look_again(again),
        Issued::Waiting => {
            let message = format!("cert-manager has not made the Secret {} yet: see its Certificate", leaf.name);
            built.problems.push(Problem::minor("CertificateMissing", message));
        }
    }
    Ok(())
}

async fn build_relays(relays: &Part<'_>, context: &Context, built: &mut Built) -> Result<(), Error> {
    let (region, caches) = (relays.region, &context.caches);
    match relays.relay_service() {
        Some(service) => drop(context.ensure(region, &service, &caches.services).await?),
        None => drop(context.remove(region, &relays.name(), &caches.services).await?),
    }
    let namespace = region.namespace().unwrap_or_default();
    let service = caches.services.find(&namespace, &relays.name());
    let reached = match ingress::advertised(region, service.as_deref()) {
        Advertised::Addresses(addresses) => Reached::At(addresses),
        Advertised::Node(port) => Reached::AtNode(port),
        Advertised::Names(names, port) => {
            // What a name stands for may change without notice.
            built.look_again(LOOK_UP_AGAIN);
            match look_up(&names, port).await {
                addresses if addresses.is_empty() => {
                    let message = format!("the load balancer's name {} stands for no address yet", names.join(", "));
                    built.problems.push(Problem::grave("AddressUnknown", message));
                    return Ok(());
                }
                addresses => Reached::At(addresses),
            }
        }
        // The cache will say so.
        Advertised::Soon => return Ok(()),
        Advertised::Unknown(message) => {
            built.problems.push(Problem::grave("AddressUnknown", message));
            return Ok(());
        }
    };
    let deployment = relays.relays(&reached, ipv6(region, context)).map_err(|error| not_a_pod("relay", &error))?;
    context.ensure(region, &deployment, &caches.deployments).await?;
    Ok(())
}

/// Looks at what there is of a region, and tells the connection where its routers are.
pub(super) fn observe(region: &VoiceRegion, context: &Context, observed: &mut Observed) {
    let (name, namespace) = (region.name_any(), region.namespace().unwrap_or_default());
    let part = |component| Part { region, component, config: &context.config };
    let (routers, relays) = (part(Component::Router), part(Component::Relay));
    let pods = |component| context.caches.pods.select(|pod| of(pod, &name, component));
    let (router_pods, relay_pods) = (pods(Component::Router), pods(Component::Relay));
    if observed.number.is_some() {
        context.links.set_routers(&name, router_addresses(&router_pods));
    }
    observed.router_trouble = trouble(&router_pods);
    observed.relay_trouble = trouble(&relay_pods);
    observed.routers = context.caches.deployments.find(&namespace, &routers.name());
    observed.relays = context.caches.deployments.find(&namespace, &relays.name());
    observed.view = context.links.view(&name).unwrap_or_default();
    observed.relay_selector = text(&relays.selector());
    let service = context.caches.services.find(&namespace, &routers.name());
    observed.api_addresses = ingress::api_addresses(region, service.as_deref());
}

/// Routers' internal ports: those that are ready first.
fn router_addresses(pods: &[Arc<Pod>]) -> Vec<String> {
    let mut found: Vec<_> = pods
        .iter()
        .filter(|pod| !gone::is_ending(pod))
        .filter_map(|pod| {
            let status = pod.status.as_ref()?;
            let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
            Some((!ready, SocketAddr::new(status.pod_ip.as_ref()?.parse().ok()?, INTERNAL_PORT)))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, address)| address.to_string()).collect()
}

/// Why pods do not come up, as far as they say: one reason is enough to begin with.
fn trouble(pods: &[Arc<Pod>]) -> Option<String> {
    let mut said: Vec<_> =
        pods.iter().filter_map(|pod| why_not(pod).map(|why| format!("{}: {why}", pod.name_any()))).collect();
    said.sort();
    said.into_iter().next()
}

fn why_not(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let waiting = status.container_statuses.iter().flatten().find_map(|container| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_ref().filter(|reason| *reason != "ContainerCreating")?;
        let last = container.last_state.as_ref().and_then(|last| last.terminated.as_ref());
        let code = last.map(|last| format!(" (it ended with code {})", last.exit_code)).unwrap_or_default();
        Some(format!(
            "{reason}{code}{}",
            waiting.message.as_ref().map(|words| format!(": {words}")).unwrap_or_default()
        ))
    });
    let unschedulable = || {
        let conditions = status.conditions.iter().flatten();
        let found =
            conditions.filter(|c| c.type_ == "PodScheduled" && c.status == "False").find_map(|c| c.message.clone());
        found.map(|words| format!("no node takes it: {words}"))
    };
    waiting.or_else(unschedulable)
}

fn of(pod: &Pod, region: &str, component: Component) -> bool {
    let label = |key: &str| pod.labels().get(key).map(String::as_str);
    label(REGION) == Some(region) && label(COMPONENT) == Some(component.label())
}

/// Whether pods here have IPv6 addresses first: as Services have.
fn ipv6(region: &VoiceRegion, context: &Context) -> bool {
    let name = format!("{}-router", region.name_any());
    let service = context.caches.services.find(&region.namespace().unwrap_or_default(), &name);
    let families = service.and_then(|service| service.spec.as_ref()?.ip_families.clone());
    families.is_some_and(|families| families.first().map(String::as_str) == Some("IPv6"))
}

async fn look_up(names: &[String], port: u16) -> Vec<SocketAddr> {
    let mut addresses = Vec::new();
    for name in names {
        match timeout(LOOK_UP, lookup_host((name.as_str(), port))).await {
            Ok(Ok(found)) => addresses.extend(found),
            Ok(Err(error)) => tracing::warn!(name, %error, "looking up a load balancer"),
            Err(_elapsed) => tracing::warn!(name, "looking up a load balancer: no answer"),
        }
    }
    addresses.sort();
    addresses.dedup();
    addresses
}

fn not_a_pod(what: &str, error: &serde_json::Error) -> Error {
    Error::Spec(format!("spec.{what}.pod: {error}"))
}

impl Built {
    fn look_again(&mut self, after: Duration) {
        self.again = Some(self.again.map_or(after, |again| again.min(after)));
    }
}

const LOOK_UP: Duration = Duration::from_secs(3);
const LOOK_UP_AGAIN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, status: Value) -> Arc<Pod> {
        Arc::new(serde_json::from_value(json!({"metadata": {"name": name}, "status": status})).unwrap())
    }

    #[test]
    fn routers_that_are_ready_are_tried_first_and_ending_ones_never() {
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let pods = [
            pod("a", json!({"podIP": "10.0.0.1"})),
            pod("b", json!({"podIP": "10.0.0.2", "conditions": ready})),
            pod("c", json!({"podIP": "10.0.0.3", "phase": "Failed"})),
            pod("d", json!({})),
            pod("e", json!({"podIP": "fd00::1"})),
        ];
        assert_eq!(router_addresses(&pods), ["10.0.0.2:7444", "10.0.0.1:7444", "[fd00::1]:7444"]);
    }

    #[test]
    fn why_a_pod_does_not_come_up_is_said() {
        let waiting = |waiting: Value, last: Value| {
            let state = json!({"waiting": waiting});
            json!({"containerStatuses": [{"name": "router", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": state, "lastState": last}]})
        };
        let pull = waiting(json!({"reason": "ErrImagePull", "message": "no such image"}), json!({}));
        assert_eq!(trouble(&[pod("a", pull)]).unwrap(), "a: ErrImagePull: no such image");
        let crash = waiting(json!({"reason": "CrashLoopBackOff"}), json!({"terminated": {"exitCode": 2}}));
        assert_eq!(trouble(&[pod("a", crash)]).unwrap(), "a: CrashLoopBackOff (it ended with code 2)");
        let full = json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}]});
        assert_eq!(trouble(&[pod("a", full)]).unwrap(), "a: no node takes it: 0/1 nodes");
        let creating = waiting(json!({"reason": "ContainerCreating"}), json!({}));
        assert_eq!(trouble(&[pod("a", creating)]), None);
    }
}
