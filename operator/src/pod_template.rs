//! What the pods of a pool's workers are made from.
//!
//! A ReplicaSet is made once per worker revision and its template never changes, so nothing may be in here that is not
//! in the revision ([`WorkerTemplate`]), apart from what this version of the operator decides for all pods.

use std::collections::BTreeMap;

use antiphon_crds::{EngineContainer, Worker, compile::WorkerTemplate, pod::Fragment};
use k8s_openapi::{
    api::{
        apps::v1::{ReplicaSet, ReplicaSetSpec},
        core::v1::{
            Capabilities, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource, HTTPGetAction,
            KeyToPath, LocalObjectReference, ObjectFieldSelector, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
            SeccompProfile, SecretVolumeSource, SecurityContext, Toleration, Volume, VolumeMount,
        },
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    Error,
    config::Config,
    labels::{AGENT, Component, POOL, WORKER_REVISION, common},
};

/// The pool whose pods these are.
#[derive(Clone, Copy, Debug)]
pub struct PoolNames<'a> {
    /// The agent's namespace, and so the pool's.
    pub namespace: &'a str,
    /// Name of the WorkerPool.
    pub pool: &'a str,
    /// Name of the VoiceAgent.
    pub agent: &'a str,
    /// Name of the VoiceRegion.
    pub region: &'a str,
}

impl PoolNames<'_> {
    /// What the pool's workers are called before the hyphen, and what their certificate names: at most 45 characters, no
    /// two pools share it.
    #[must_use]
    pub fn identity(&self) -> String {
        let hash = hex::encode(&Sha256::digest(format!("{}/{}", self.namespace, self.pool))[..4]);
        let mut short: String = self.pool.chars().take(LONGEST_IDENTITY - 1 - hash.len()).collect();
        while short.ends_with('-') {
            short.pop();
        }
        format!("{short}-{hash}")
    }

    /// Name of the ReplicaSet of a worker revision.
    #[must_use]
    pub fn replica_set(&self, revision: &str) -> String {
        format!("{}-{revision}", self.identity())
    }

    /// Labels of everything that is the pool's.
    #[must_use]
    pub fn labels(&self, config: &Config) -> BTreeMap<String, String> {
        let mut labels = common(&config.instance, Component::Worker, self.region);
        labels.insert(AGENT.to_owned(), self.agent.to_owned());
        labels.insert(POOL.to_owned(), self.pool.to_owned());
        labels
    }
}

/// The ReplicaSet of a worker revision, with so many pods.
///
/// # Errors
/// A part of the template that is passed on as it is written is no such part of a pod.
pub fn replica_set(
    names: &PoolNames<'_>,
    template: &WorkerTemplate,
    owner: OwnerReference,
    replicas: u32,
    config: &Config,
) -> Result<ReplicaSet, Error> {
    let revision = template.revision();
    let mut labels = names.labels(config);
    labels.insert(WORKER_REVISION.to_owned(), revision.clone());
    let selector = [(POOL, names.pool), (WORKER_REVISION, &revision)];
    Ok(ReplicaSet {
        metadata: ObjectMeta {
            name: Some(names.replica_set(&revision)),
            namespace: Some(names.namespace.to_owned()),
            labels: Some(labels.clone()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(i32::try_from(replicas).unwrap_or(i32::MAX)),
            selector: LabelSelector {
                match_labels: Some(selector.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
                ..LabelSelector::default()
            },
            template: Some(pod_template(names, template, labels, config)?),
            ..ReplicaSetSpec::default()
        }),
        status: None,
    })
}

fn pod_template(
    names: &PoolNames<'_>,
    template: &WorkerTemplate,
    labels: BTreeMap<String, String>,
    config: &Config,
) -> Result<PodTemplateSpec, Error> {
    let worker = &template.worker;
    let mut all_labels = worker.labels.clone();
    all_labels.extend(labels);
    let mut annotations = worker.annotations.clone();
    annotations.extend(EVICTION.map(|(key, busy, _)| (key.to_owned(), busy.to_owned())));
    let security = worker.security_context.clone().unwrap_or_default();
    let pull_secrets = worker.image_pull_secrets.iter();
    let spec = PodSpec {
        init_containers: worker
            .engine_container
            .as_ref()
            .map(|engine| Ok::<_, Error>(vec![sidecar(engine)?]))
            .transpose()?,
        containers: vec![container(names, template, config)?],
        volumes: Some(volumes(names, template)?),
        image_pull_secrets: Some(pull_secrets.map(|s| LocalObjectReference { name: s.name.clone() }).collect()),
        resource_claims: Some(convert("spec.worker.resourceClaims", &worker.resource_claims)?),
        service_account_name: worker.service_account_name.clone(),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        priority_class_name: worker.priority_class_name.clone(),
        runtime_class_name: worker.runtime_class_name.clone(),
        node_selector: Some(worker.node_selector.clone()),
        affinity: worker.affinity.as_ref().map(|affinity| fragment("spec.worker.affinity", affinity)).transpose()?,
        tolerations: Some(tolerations(worker)?),
        topology_spread_constraints: Some(spread(names, worker)?),
        termination_grace_period_seconds: i64::try_from(worker.termination_grace.duration().as_secs()).ok(),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(security.run_as_user.unwrap_or(USER)),
            run_as_group: Some(security.run_as_group.unwrap_or(USER)),
            fs_group: Some(security.fs_group.unwrap_or(USER)),
            supplemental_groups: Some(security.supplemental_groups).filter(|groups| !groups.is_empty()),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..SeccompProfile::default() }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    };
    let metadata = ObjectMeta { labels: Some(all_labels), annotations: Some(annotations), ..ObjectMeta::default() };
    Ok(PodTemplateSpec { metadata: Some(metadata), spec: Some(spec) })
}

/// The worker's own container.
fn container(names: &PoolNames<'_>, template: &WorkerTemplate, config: &Config) -> Result<Container, Error> {
    let worker = &template.worker;
    let mut env = vec![
        field("ANTIPHON_WORKER_NAME", "metadata.name"),
        // Relays and routers reach it there.
        field("ANTIPHON_WORKER_TUNNEL_IP", "status.podIP"),
    ];
    env.extend(convert::<_, Vec<EnvVar>>("spec.worker.env", &worker.env)?);
    let mut mounts = vec![mount(IDENTITY_VOLUME, IDENTITY_PATH, true), mount(STATE_VOLUME, STATE_PATH, false)];
    if template.api_key.is_some() {
        mounts.push(mount(ENGINE_KEY_VOLUME, ENGINE_KEY_PATH, true));
    }
    mounts.extend(convert::<_, Vec<VolumeMount>>("spec.worker.volumeMounts", &worker.volume_mounts)?);
    let starts = i32::try_from(worker.startup_deadline.duration().as_secs().div_ceil(PROBE_PERIOD)).unwrap_or(i32::MAX);
    Ok(Container {
        name: CONTAINER.to_owned(),
        image: worker.image.clone(),
        image_pull_policy: pull_policy(&worker.image_pull_policy)?.or_else(|| config.images.pull_policy.clone()),
        args: Some(arguments(names, template, config)),
        env: Some(env),
        env_from: Some(convert("spec.worker.envFrom", &worker.env_from)?),
        resources: worker
            .resources
            .as_ref()
            .map(|resources| convert("spec.worker.resources", resources))
            .transpose()?,
        volume_mounts: Some(mounts),
        ports: Some(ports(worker.shards)),
        startup_probe: Some(probe("/readyz", starts.max(1))),
        readiness_probe: Some(probe("/readyz", 3)),
        liveness_probe: Some(probe("/livez", 6)),
        security_context: Some(locked_down(true)),
        ..Container::default()
    })
}

fn arguments(names: &PoolNames<'_>, template: &WorkerTemplate, config: &Config) -> Vec<String> {
    let worker = &template.worker;
    // The kubelet kills at the end of the grace; what ends calls in order comes a moment before.
    let last_words = worker.termination_grace.duration().saturating_sub(LAST_WORDS);
    let mut arguments = vec![
        format!("--region={}", names.region),
        format!("--agent={}/{}", names.namespace, names.agent),
        format!("--slots={}", template.slots),
        format!("--shards={}", worker.shards),
        format!("--tunnel=0.0.0.0:{TUNNEL_PORT}"),
        format!("--control=0.0.0.0:{CONTROL_PORT}"),
        format!("--router={}-router-fleet.{}.svc:{ROUTER_PORT}", names.region, config.namespace),
        format!("--identity={IDENTITY_PATH}"),
        format!("--state={STATE_PATH}"),
        format!("--admin=0.0.0.0:{ADMIN_PORT}"),
        format!("--drain-deadline={}s", last_words.as_secs()),
        "--log-json".to_owned(),
    ];
    arguments.extend(worker.gpu_class.as_ref().map(|class| format!("--gpu-class={class}")));
    arguments
}

/// A native sidecar: it starts before the worker and ends after it.
fn sidecar(engine: &EngineContainer) -> Result<Container, Error> {
    let at = |field: &str| format!("spec.worker.engineContainer.{field}");
    Ok(Container {
        name: "engine".to_owned(),
        image: Some(engine.image.clone()),
        image_pull_policy: pull_policy(&engine.image_pull_policy)?,
        command: Some(engine.command.clone()),
        args: Some(engine.args.clone()),
        env: Some(convert(&at("env"), &engine.env)?),
        env_from: Some(convert(&at("envFrom"), &engine.env_from)?),
        resources: engine.resources.as_ref().map(|resources| convert(&at("resources"), resources)).transpose()?,
        volume_mounts: Some(convert(&at("volumeMounts"), &engine.volume_mounts)?),
        startup_probe: engine.startup_probe.as_ref().map(|p| fragment(&at("startupProbe"), p)).transpose()?,
        restart_policy: Some("Always".to_owned()),
        security_context: Some(locked_down(engine.read_only_root_filesystem)),
        ..Container::default()
    })
}

fn volumes(names: &PoolNames<'_>, template: &WorkerTemplate) -> Result<Vec<Volume>, Error> {
    let item = |key: &str, path: &str| KeyToPath { key: key.to_owned(), path: path.to_owned(), mode: None };
    let secret = |name: String, items: Vec<KeyToPath>| SecretVolumeSource {
        secret_name: Some(name),
        items: Some(items),
        default_mode: Some(0o440),
        optional: None,
    };
    let identity = vec![item("tls.crt", "cert.pem"), item("tls.key", "key.pem"), item("ca.crt", "ca.pem")];
    let mut volumes = vec![
        Volume {
            name: IDENTITY_VOLUME.to_owned(),
            secret: Some(secret(names.identity(), identity)),
            ..Volume::default()
        },
        Volume { name: STATE_VOLUME.to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() },
    ];
    if let Some(key) = &template.api_key {
        volumes.push(Volume {
            name: ENGINE_KEY_VOLUME.to_owned(),
            secret: Some(secret(key.name.clone(), vec![item(&key.key, "key")])),
            ..Volume::default()
        });
    }
    volumes.extend(convert::<_, Vec<Volume>>("spec.worker.volumes", &template.worker.volumes)?);
    Ok(volumes)
}

/// Calls live on while a node is out of touch, so its pods stay for longer than the five minutes that are usual.
fn tolerations(worker: &Worker) -> Result<Vec<Toleration>, Error> {
    let mut tolerations: Vec<Toleration> = convert("spec.worker.tolerations", &worker.tolerations)?;
    for key in ["node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"] {
        tolerations.push(Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some("NoExecute".to_owned()),
            toleration_seconds: Some(OUT_OF_TOUCH),
            value: None,
        });
    }
    Ok(tolerations)
}

/// Constraints without a selector count the pool's own workers.
fn spread<T: DeserializeOwned>(names: &PoolNames<'_>, worker: &Worker) -> Result<T, Error> {
    let constraints = worker.topology_spread_constraints.iter().map(|constraint| {
        let mut constraint = constraint.0.clone();
        constraint.entry("labelSelector").or_insert_with(|| json!({"matchLabels": {POOL: names.pool}}));
        Value::Object(constraint)
    });
    convert("spec.worker.topologySpreadConstraints", &constraints.collect::<Vec<_>>())
}

fn ports(shards: u8) -> Vec<ContainerPort> {
    let port = |name: &str, port: u16, protocol: &str| ContainerPort {
        name: Some(name.to_owned()),
        container_port: port.into(),
        protocol: Some(protocol.to_owned()),
        ..ContainerPort::default()
    };
    let mut ports = vec![port("control", CONTROL_PORT, "TCP"), port("admin", ADMIN_PORT, "TCP")];
    ports.extend((0..shards).map(|shard| port(&format!("tunnel-{shard}"), TUNNEL_PORT + u16::from(shard), "UDP")));
    ports
}

fn probe(path: &str, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("admin".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: i32::try_from(PROBE_PERIOD).ok(),
        timeout_seconds: Some(2),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

/// What the restricted Pod Security profile asks of a container.
fn locked_down(read_only: bool) -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(read_only),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        ..SecurityContext::default()
    }
}

fn field(name: &str, path: &str) -> EnvVar {
    let field_ref = Some(ObjectFieldSelector { field_path: path.to_owned(), api_version: None });
    let value_from = Some(EnvVarSource { field_ref, ..EnvVarSource::default() });
    EnvVar { name: name.to_owned(), value: None, value_from }
}

fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(read_only),
        ..VolumeMount::default()
    }
}

fn pull_policy(policy: &Option<impl Serialize>) -> Result<Option<String>, Error> {
    policy.as_ref().map(|policy| convert("imagePullPolicy", policy)).transpose()
}

fn fragment<T: DeserializeOwned>(field: &str, fragment: &Fragment) -> Result<T, Error> {
    convert(field, fragment)
}

/// The same in Kubernetes' own type: the forms are the same.
fn convert<F: Serialize + ?Sized, T: DeserializeOwned>(field: &str, from: &F) -> Result<T, Error> {
    serde_json::to_value(from)
        .and_then(serde_json::from_value)
        .map_err(|error| Error::Spec(format!("{field} is not what Kubernetes takes there: {error}")))
}

/// Annotations by which autoscalers of nodes know whether they may evict a pod: the key, its value while the worker may
/// hold calls, and afterwards.
pub const EVICTION: [(&str, &str, &str); 2] = [
    ("cluster-autoscaler.kubernetes.io/safe-to-evict", "false", "true"),
    ("karpenter.sh/do-not-disrupt", "true", "false"),
];
/// Name of the worker's container.
pub const CONTAINER: &str = "worker";

const LONGEST_IDENTITY: usize = 45;
/// The user of the images.
const USER: i64 = 65_532;
const IDENTITY_VOLUME: &str = "antiphon-identity";
const IDENTITY_PATH: &str = "/var/run/antiphon/identity";
const STATE_VOLUME: &str = "antiphon-state";
const STATE_PATH: &str = "/var/lib/antiphon";
const ENGINE_KEY_VOLUME: &str = "antiphon-engine-key";
const ENGINE_KEY_PATH: &str = "/var/run/antiphon/engine";
const ROUTER_PORT: u16 = 7_444;
const CONTROL_PORT: u16 = 4_501;
const TUNNEL_PORT: u16 = 5_000;
const ADMIN_PORT: u16 = 7_445;
/// Seconds.
const PROBE_PERIOD: u64 = 2;
/// Seconds that a pod stays on a node that is out of touch.
const OUT_OF_TOUCH: i64 = 3_600;
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(5);

#[cfg(test)]
mod tests;
