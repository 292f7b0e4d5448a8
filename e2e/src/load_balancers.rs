//! What a cloud does for Services of type LoadBalancer: each gets an address, and packets to it are routed, flow by flow,
//! to nodes that have ready endpoints, with the sender's address untouched.

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path, time::Duration};

use anyhow::{Result, bail};
use futures::{FutureExt as _, Stream, StreamExt as _, stream};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{
        WatchStreamExt as _,
        reflector::{self, Store},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::{process::Command, time::interval};

use crate::command::run;

/// A Service's address and the nodes that take its packets.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Balancer {
    namespace: String,
    service: String,
    address: Ipv4Addr,
    /// Whether the Service's status says so already.
    known: bool,
    nodes: Vec<Ipv4Addr>,
}

/// Serves until it is killed. It has to run where the cluster's nodes are reached.
///
/// # Errors
/// The cluster's configuration cannot be read.
pub async fn serve(kubeconfig: &Path, addresses: &[Ipv4Addr]) -> Result<()> {
    let config = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let (services, service_changes) = watched::<Service>(&client);
    let (slices, slice_changes) = watched::<EndpointSlice>(&client);
    let (nodes, node_changes) = watched::<Node>(&client);
    let mut changes = stream::select_all([service_changes.boxed(), slice_changes.boxed(), node_changes.boxed()]);
    // What could not be done is tried again.
    let mut again = interval(AGAIN);
    let mut routes = BTreeMap::new();
    run(Command::new("ip").args(["route", "flush", "proto", PROTOCOL])).await?;
    loop {
        tokio::select! {
            _ = again.tick() => {}
            change = changes.next() => if change.is_none() {
                bail!("the watches have ended");
            },
        }
        while changes.next().now_or_never().flatten().is_some() {}
        let plan = plan(&services.state(), &slices.state(), &nodes.state(), addresses);
        if let Err(error) = carry_out(&client, &plan, &mut routes).await {
            eprintln!("{error:#}");
        }
    }
}

/// All objects of a kind, and a word whenever they change.
fn watched<K>(client: &Client) -> (Store<K>, impl Stream<Item = ()> + Send + use<K>)
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let events = watcher(Api::<K>::all(client.clone()), watcher::Config::default()).default_backoff();
    let words = events.reflect(writer).map(|event| {
        if let Err(error) = event {
            eprintln!("watching {}: {error}", K::plural(&()));
        }
    });
    (store, words)
}

/// Gives every Service that wants one an address of its own: the one that it has, else the first that is free.
fn plan(
    services: &[impl AsRef<Service>],
    slices: &[impl AsRef<EndpointSlice>],
    nodes: &[impl AsRef<Node>],
    addresses: &[Ipv4Addr],
) -> Vec<Balancer> {
    let mut wanting: Vec<&Service> = services.iter().map(AsRef::as_ref).filter(|service| wants(service)).collect();
    // Those that have one first, then the oldest.
    wanting.sort_by_key(|service| {
        (
            current(service).is_none(),
            service.creation_timestamp().map(|time| time.0),
            service.namespace(),
            service.name_any(),
        )
    });
    let mut free: Vec<Ipv4Addr> = addresses.to_vec();
    let mut planned = Vec::new();
    for service in wanting {
        let current = current(service).and_then(|address| free.iter().position(|other| *other == address));
        if free.is_empty() {
            eprintln!("{} gets no address: all are taken", service.name_any());
            continue;
        }
        let address = free.remove(current.unwrap_or(0));
        let local = service.spec.as_ref().is_some_and(|s| s.external_traffic_policy.as_deref() == Some("Local"));
        let mut hops: Vec<Ipv4Addr> = nodes
            .iter()
            .map(AsRef::as_ref)
            .filter(|node| !local || slices.iter().any(|slice| serves(slice.as_ref(), service, &node.name_any())))
            .filter_map(address_of)
            .collect();
        hops.sort();
        planned.push(Balancer {
            namespace: service.namespace().unwrap_or_default(),
            service: service.name_any(),
            address,
            known: current.is_some(),
            nodes: hops,
        });
    }
    planned
}

fn wants(service: &Service) -> bool {
    let deleted = service.metadata.deletion_timestamp.is_some();
    let spec = service.spec.as_ref().filter(|_| !deleted);
    spec.is_some_and(|spec| spec.type_.as_deref() == Some("LoadBalancer") && spec.load_balancer_class.is_none())
}

/// The address in a Service's status.
fn current(service: &Service) -> Option<Ipv4Addr> {
    let ingress = service.status.as_ref()?.load_balancer.as_ref()?.ingress.as_ref()?;
    ingress.first()?.ip.as_ref()?.parse().ok()
}

/// Whether a slice has a ready endpoint of the Service on the node.
fn serves(slice: &EndpointSlice, service: &Service, node: &str) -> bool {
    let labels = slice.labels();
    let own = labels.get("kubernetes.io/service-name") == Some(&service.name_any());
    own && slice.namespace() == service.namespace()
        && slice.endpoints.iter().any(|endpoint| {
            let ready = endpoint.conditions.as_ref().is_none_or(|conditions| conditions.ready != Some(false));
            ready && endpoint.node_name.as_deref() == Some(node)
        })
}

fn address_of(node: &Node) -> Option<Ipv4Addr> {
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    addresses.iter().find(|address| address.type_ == "InternalIP")?.address.parse().ok()
}

/// Routes first, so that nobody is sent to an address that leads nowhere yet.
async fn carry_out(client: &Client, plan: &[Balancer], routes: &mut BTreeMap<Ipv4Addr, Vec<Ipv4Addr>>) -> Result<()> {
    let wanted: BTreeMap<_, _> = plan.iter().map(|balancer| (balancer.address, balancer.nodes.clone())).collect();
    let gone: Vec<_> = routes.keys().filter(|address| !wanted.contains_key(address)).copied().collect();
    for address in gone {
        run(Command::new("ip").args(["route", "delete", &format!("{address}/32"), "proto", PROTOCOL])).await?;
        routes.remove(&address);
    }
    for (address, nodes) in wanted {
        if routes.get(&address) == Some(&nodes) {
            continue;
        }
        let mut command = Command::new("ip");
        command.args(["route", "replace"]);
        match nodes.is_empty() {
            true => command.args(["blackhole", &format!("{address}/32"), "proto", PROTOCOL]),
            false => command.args([&format!("{address}/32"), "proto", PROTOCOL]),
        };
        for node in &nodes {
            command.args(["nexthop", "via", &node.to_string()]);
        }
        run(&mut command).await?;
        routes.insert(address, nodes);
    }
    for balancer in plan.iter().filter(|balancer| !balancer.known) {
        let services = Api::<Service>::namespaced(client.clone(), &balancer.namespace);
        let ingress = json!([{ "ip": balancer.address, "ipMode": "VIP" }]);
        let status = json!({ "status": { "loadBalancer": { "ingress": ingress } } });
        services.patch_status(&balancer.service, &PatchParams::default(), &Patch::Merge(status)).await?;
    }
    Ok(())
}

/// Marks the routes that are made here.
const PROTOCOL: &str = "99";
const AGAIN: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn made<K: DeserializeOwned>(value: serde_json::Value) -> Arc<K> {
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn service(name: &str, policy: &str, address: Option<&str>) -> Arc<Service> {
        made(json!({
            "metadata": { "name": name, "namespace": "x" },
            "spec": { "type": "LoadBalancer", "externalTrafficPolicy": policy },
            "status": { "loadBalancer": { "ingress": address.map(|ip| [json!({ "ip": ip })]) } },
        }))
    }

    fn node(name: &str, address: &str) -> Arc<Node> {
        made(json!({
            "metadata": { "name": name },
            "status": { "addresses": [{ "type": "InternalIP", "address": address }] },
        }))
    }

    fn slice(service: &str, endpoints: &[(&str, bool)]) -> Arc<EndpointSlice> {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|(node, ready)| json!({ "addresses": ["10.0.0.1"], "nodeName": node, "conditions": { "ready": ready } }))
            .collect();
        made(json!({
            "metadata": { "name": "s", "namespace": "x", "labels": { "kubernetes.io/service-name": service } },
            "addressType": "IPv4",
            "endpoints": endpoints,
        }))
    }

    const FREE: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];

    #[test]
    fn a_service_keeps_its_address_and_others_get_what_is_free() {
        let services =
            [service("a", "Cluster", None), service("b", "Cluster", Some("192.0.2.1")), service("c", "Cluster", None)];
        let planned = plan(&services, &[slice("a", &[])], &[node("n", "198.51.100.1")], &FREE);
        let given: Vec<_> = planned.iter().map(|b| (b.service.as_str(), b.address, b.known)).collect();
        assert_eq!(given, [("b", FREE[0], true), ("a", FREE[1], false)], "and none is left for c");
    }

    #[test]
    fn a_local_service_is_routed_to_nodes_with_ready_endpoints_alone() {
        let nodes = [node("one", "198.51.100.1"), node("two", "198.51.100.2"), node("three", "198.51.100.3")];
        let slices = [slice("a", &[("one", true), ("two", false)]), slice("other", &[("three", true)])];
        let nodes_of = |policy: &str| plan(&[service("a", policy, None)], &slices, &nodes, &FREE)[0].nodes.len();
        assert_eq!((nodes_of("Local"), nodes_of("Cluster")), (1, 3));
        let other = made::<Service>(json!({ "metadata": { "name": "a" }, "spec": { "type": "NodePort" } }));
        assert_eq!(plan(&[other], &slices, &nodes, &FREE), []);
    }
}
