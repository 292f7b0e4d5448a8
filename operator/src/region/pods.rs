//! The Deployments of routers and relays.

use std::net::SocketAddr;

use antiphon_crds::IngressType;
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{
            Container, ContainerPort, EnvVar, EnvVarSource, KeyToPath, ObjectFieldSelector, PodSpec, PodTemplateSpec,
            SecretKeySelector, Volume, VolumeMount,
        },
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kube::ResourceExt as _;

use super::parts::{
    ADMIN_PORT, IDENTITY_DIR, Part, STATE_DIR, container, identity_volume, pod_security, secret_volume, state_volume,
};
use crate::{
    config::Etcd,
    records::{INTERNAL_PORT, fleet_address},
};

/// What a Deployment is made from besides the region itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reached {
    /// At these addresses, all relays alike.
    At(Vec<SocketAddr>),
    /// At this port of its own node.
    AtNode(u16),
}

/// How a Deployment replaces pods.
struct Rollout {
    replicas: u16,
    /// Pods that there may be besides; without any the old one goes first.
    surge: bool,
    grace_seconds: i64,
}

impl Part<'_> {
    /// Routers. Without etcd there is one, whose store is in memory.
    ///
    /// # Errors
    /// The pod settings are not what a pod has.
    pub fn routers(&self) -> Result<Deployment, serde_json::Error> {
        let region = self.region.name_any();
        let mut args = vec![
            format!("--region={region}"),
            format!("--public=[::]:{API_PORT}"),
            format!("--internal=[::]:{INTERNAL_PORT}"),
            format!("--admin=[::]:{ADMIN_PORT}"),
            format!("--identity={IDENTITY_DIR}"),
            format!("--root={ROOT_DIR}/root"),
            format!("--state={STATE_DIR}"),
        ];
        let root = KeyToPath { key: "root".to_owned(), path: "root".to_owned(), mode: None };
        let mut volumes = vec![
            identity_volume(&self.identity()),
            secret_volume("root", &self.config.root_secret, Some(vec![root]), ROOT_DIR),
            state_volume(),
        ];
        let mut env = Vec::new();
        if let Some(etcd) = &self.config.etcd {
            store(etcd, &region, &mut args, &mut volumes, &mut env);
        }
        let mut routers = container("router", &self.config.images.router, self.config, args);
        routers.ports = Some(vec![tcp("api", API_PORT), tcp("internal", INTERNAL_PORT), tcp("admin", ADMIN_PORT)]);
        routers.env = Some(env).filter(|env| !env.is_empty());
        let rollout = Rollout { replicas: self.router_replicas(), surge: true, grace_seconds: 30 };
        self.deployment(routers, volumes, PodSpec::default(), &rollout, false)
    }

    /// How many routers there can be.
    #[must_use]
    pub fn router_replicas(&self) -> u16 {
        match self.config.etcd {
            Some(_) => self.region.spec.router.replicas,
            None => 1,
        }
    }

    /// Relays. `ipv6` says which kind of address their pods have.
    ///
    /// # Errors
    /// The pod settings are not what a pod has.
    pub fn relays(&self, reached: &Reached, ipv6: bool) -> Result<Deployment, serde_json::Error> {
        let ingress = &self.region.spec.relay.ingress;
        let host = |variable: &str, port: u16| match ipv6 {
            true => format!("[$({variable})]:{port}"),
            false => format!("$({variable}):{port}"),
        };
        let addresses = match reached {
            Reached::At(addresses) => addresses.iter().take(MOST_ADDRESSES).map(ToString::to_string).collect(),
            Reached::AtNode(port) => vec![host("HOST_IP", *port)],
        };
        let on_host = ingress.ingress_type == IngressType::HostNetwork;
        let public = if on_host { ingress.port } else { PUBLIC_PORT };
        let namespace = self.region.namespace().unwrap_or_default();
        let args = vec![
            "--name=$(POD_NAME)".to_owned(),
            format!("--region={}", self.region.name_any()),
            format!("--public=[::]:{public}"),
            format!("--public-address={}", addresses.join(",")),
            format!("--tunnel=[::]:{TUNNEL_PORT}"),
            format!("--tunnel-address={}", host("POD_IP", TUNNEL_PORT)),
            format!("--router={}", fleet_address(&self.region.name_any(), &namespace)),
            format!("--admin=[::]:{ADMIN_PORT}"),
            format!("--identity={IDENTITY_DIR}"),
            format!("--state={STATE_DIR}"),
            // Cores are shared with other pods.
            "--pin=false".to_owned(),
            format!("--drain-deadline={RELAY_DRAIN_SECONDS}s"),
        ];
        let mut relays = container("relay", &self.config.images.relay, self.config, args);
        relays.env = Some(vec![
            field("POD_NAME", "metadata.name"),
            field("POD_IP", "status.podIP"),
            field("HOST_IP", "status.hostIP"),
        ]);
        let host_port = match ingress.ingress_type {
            IngressType::Service => None,
            IngressType::HostPort => Some(ingress.port),
            // Kubernetes wants it to be the same.
            IngressType::HostNetwork => Some(public),
        };
        let mut ports =
            vec![udp("quic", public, host_port), udp("tunnel", TUNNEL_PORT, None), tcp("admin", ADMIN_PORT)];
        if on_host {
            ports.iter_mut().for_each(|port| port.host_port = Some(port.container_port));
        }
        relays.ports = Some(ports);
        let at_node = ingress.ingress_type != IngressType::Service;
        let pod = PodSpec {
            host_network: on_host.then_some(true),
            dns_policy: on_host.then(|| "ClusterFirstWithHostNet".to_owned()),
            ..PodSpec::default()
        };
        let rollout = Rollout {
            replicas: self.region.spec.relay.replicas,
            // Two cannot share a node's port: a surge would wait for a free node.
            surge: !at_node,
            grace_seconds: RELAY_DRAIN_SECONDS + 10,
        };
        self.deployment(relays, vec![identity_volume(&self.identity()), state_volume()], pod, &rollout, at_node)
    }

    fn deployment(
        &self,
        mut container: Container,
        volumes: Vec<(Volume, VolumeMount)>,
        pod: PodSpec,
        rollout: &Rollout,
        strictly_apart: bool,
    ) -> Result<Deployment, serde_json::Error> {
        let settings = self.settings();
        let (volumes, mounts): (Vec<_>, Vec<_>) = volumes.into_iter().unzip();
        container.volume_mounts = Some(mounts);
        container.resources = Some(self.resources()?);
        let pod = PodSpec {
            service_account_name: Some(self.name()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(pod_security()),
            termination_grace_period_seconds: Some(rollout.grace_seconds),
            image_pull_secrets: self.pull_secrets(),
            node_selector: Some(settings.node_selector.clone()).filter(|labels| !labels.is_empty()),
            tolerations: self.tolerations()?,
            affinity: Some(self.affinity(strictly_apart)?),
            priority_class_name: settings.priority_class_name.clone(),
            containers: vec![container],
            volumes: Some(volumes),
            ..pod
        };
        let mut labels = settings.labels.clone();
        labels.extend(self.config.labels(self.component, &self.region.name_any()));
        let template = PodTemplateSpec {
            metadata: Some(ObjectMeta {
                labels: Some(labels),
                annotations: Some(settings.annotations.clone()).filter(|annotations| !annotations.is_empty()),
                ..ObjectMeta::default()
            }),
            spec: Some(pod),
        };
        let (surge, unavailable) = if rollout.surge { (1, 0) } else { (0, 1) };
        Ok(Deployment {
            metadata: self.metadata(self.name()),
            spec: Some(DeploymentSpec {
                replicas: Some(rollout.replicas.into()),
                selector: self.label_selector(),
                strategy: Some(DeploymentStrategy {
                    type_: Some("RollingUpdate".to_owned()),
                    rolling_update: Some(RollingUpdateDeployment {
                        max_surge: Some(IntOrString::Int(surge)),
                        max_unavailable: Some(IntOrString::Int(unavailable)),
                    }),
                }),
                // A relay that is just ready has few routes; a second is enough for the first table.
                min_ready_seconds: Some(2),
                revision_history_limit: Some(3),
                template,
                ..DeploymentSpec::default()
            }),
            ..Deployment::default()
        })
    }
}

/// Where routers keep records.
fn store(
    etcd: &Etcd,
    region: &str,
    args: &mut Vec<String>,
    volumes: &mut Vec<(Volume, VolumeMount)>,
    env: &mut Vec<EnvVar>,
) {
    args.extend(etcd.endpoints.iter().map(|endpoint| format!("--etcd={endpoint}")));
    args.push(format!("--etcd-prefix={}/{region}", etcd.prefix));
    if let Some(secret) = &etcd.secret {
        args.push(format!("--etcd-ca={ETCD_DIR}/ca.crt"));
        if etcd.client_certificate {
            args.push(format!("--etcd-cert={ETCD_DIR}/tls.crt"));
            args.push(format!("--etcd-key={ETCD_DIR}/tls.key"));
        }
        volumes.push(secret_volume("etcd", secret, None, ETCD_DIR));
    }
    if let Some(secret) = &etcd.user_secret {
        env.push(EnvVar {
            name: "ANTIPHON_ROUTER_ETCD_USER".to_owned(),
            value_from: Some(EnvVarSource {
                secret_key_ref: Some(SecretKeySelector {
                    name: secret.clone(),
                    key: "username".to_owned(),
                    optional: None,
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        });
        args.push(format!("--etcd-password-file={ETCD_USER_DIR}/password"));
        let item = KeyToPath { key: "password".to_owned(), path: "password".to_owned(), mode: None };
        volumes.push(secret_volume("etcd-user", secret, Some(vec![item]), ETCD_USER_DIR));
    }
}

fn field(name: &str, path: &str) -> EnvVar {
    let source = ObjectFieldSelector { field_path: path.to_owned(), ..ObjectFieldSelector::default() };
    EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource { field_ref: Some(source), ..EnvVarSource::default() }),
        ..EnvVar::default()
    }
}

fn tcp(name: &str, port: u16) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: port.into(),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

fn udp(name: &str, port: u16, host_port: Option<u16>) -> ContainerPort {
    let host_port = host_port.map(Into::into);
    ContainerPort { protocol: Some("UDP".to_owned()), host_port, ..tcp(name, port) }
}

/// Of routers, for applications.
pub const API_PORT: u16 = 7_443;
/// Of relays, for callers.
pub const PUBLIC_PORT: u16 = 4_433;
/// Of relays, for workers and other relays.
pub const TUNNEL_PORT: u16 = 4_434;
/// That a relay can tell callers of.
const MOST_ADDRESSES: usize = 4;
const RELAY_DRAIN_SECONDS: i64 = 30;
const ROOT_DIR: &str = "/etc/antiphon/root";
const ETCD_DIR: &str = "/etc/antiphon/etcd";
const ETCD_USER_DIR: &str = "/etc/antiphon/etcd-user";

#[cfg(test)]
mod tests;
