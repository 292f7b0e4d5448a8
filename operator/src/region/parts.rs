//! What routers and relays have in common: names, labels, and the objects around their pods.

use std::collections::BTreeMap;

use antiphon_crds::{VoiceRegion, pod::PodSettings};
use k8s_openapi::{
    api::{
        core::v1::{
            Affinity, Capabilities, Container, HTTPGetAction, KeyToPath, LocalObjectReference, PodAffinityTerm,
            PodAntiAffinity, PodSecurityContext, Probe, ResourceRequirements, SeccompProfile, SecretVolumeSource,
            SecurityContext, ServiceAccount, Toleration, Volume, VolumeMount, WeightedPodAffinityTerm,
        },
        networking::v1::{
            NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
        },
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};
use kube::{Resource as _, ResourceExt as _};

use crate::{
    config::Config,
    labels::{self, Component},
};

/// A region's routers or relays.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The region.
    pub region: &'a VoiceRegion,
    /// Which of them.
    pub component: Component,
    /// How the operator runs.
    pub config: &'a Config,
}

impl Part<'_> {
    /// `REGION-router` or `REGION-relay`, which is also the name in their certificate.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}-{}", self.region.name_any(), self.component.label())
    }

    /// The Secret with their certificate.
    #[must_use]
    pub fn identity(&self) -> String {
        format!("{}-identity", self.name())
    }

    /// Metadata of an object of this name.
    #[must_use]
    pub fn metadata(&self, name: String) -> ObjectMeta {
        ObjectMeta {
            name: Some(name),
            namespace: self.region.namespace(),
            labels: Some(self.config.labels(self.component, &self.region.name_any())),
            owner_references: Some(vec![self.owner()]),
            ..ObjectMeta::default()
        }
    }

    /// The region as the owner of its parts.
    #[must_use]
    pub fn owner(&self) -> OwnerReference {
        self.region.controller_owner_ref(&()).unwrap_or_default()
    }

    /// What selects their pods.
    #[must_use]
    pub fn selector(&self) -> BTreeMap<String, String> {
        labels::selector(&self.config.instance, self.component, &self.region.name_any())
    }

    /// The same as the API has it.
    #[must_use]
    pub fn label_selector(&self) -> LabelSelector {
        LabelSelector { match_labels: Some(self.selector()), ..LabelSelector::default() }
    }

    /// The account of their pods: it has no permissions and no token.
    #[must_use]
    pub fn service_account(&self) -> ServiceAccount {
        ServiceAccount {
            metadata: self.metadata(self.name()),
            automount_service_account_token: Some(false),
            ..ServiceAccount::default()
        }
    }

    /// One of them at a time may be evicted; those that are not ready at any time.
    #[must_use]
    pub fn disruption_budget(&self) -> PodDisruptionBudget {
        PodDisruptionBudget {
            metadata: self.metadata(self.name()),
            spec: Some(PodDisruptionBudgetSpec {
                max_unavailable: Some(IntOrString::Int(1)),
                selector: Some(self.label_selector()),
                unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
                ..PodDisruptionBudgetSpec::default()
            }),
            ..PodDisruptionBudget::default()
        }
    }

    /// Who may connect: anybody to `open` ports (what comes there is authenticated), pods of the cluster to the admin
    /// port.
    #[must_use]
    pub fn network_policy(&self, open: &[(&str, u16)]) -> NetworkPolicy {
        let port = |(protocol, port): (&str, u16)| NetworkPolicyPort {
            protocol: Some(protocol.to_owned()),
            port: Some(IntOrString::Int(port.into())),
            ..NetworkPolicyPort::default()
        };
        let pods = NetworkPolicyPeer { namespace_selector: Some(LabelSelector::default()), ..Default::default() };
        let rules = vec![
            NetworkPolicyIngressRule { ports: Some(open.iter().copied().map(port).collect()), from: None },
            NetworkPolicyIngressRule { ports: Some(vec![port(("TCP", ADMIN_PORT))]), from: Some(vec![pods]) },
        ];
        NetworkPolicy {
            metadata: self.metadata(self.name()),
            spec: Some(NetworkPolicySpec {
                pod_selector: Some(self.label_selector()),
                policy_types: Some(vec!["Ingress".to_owned()]),
                ingress: Some(rules),
                ..NetworkPolicySpec::default()
            }),
        }
    }

    /// Where they run.
    #[must_use]
    pub fn settings(&self) -> &PodSettings {
        match self.component {
            Component::Router => &self.region.spec.router.pod,
            _ => &self.region.spec.relay.pod,
        }
    }

    /// What each of them needs.
    ///
    /// # Errors
    /// The settings are not what a pod has.
    pub fn resources(&self) -> Result<ResourceRequirements, serde_json::Error> {
        let usual = match self.component {
            Component::Router => &self.config.router_resources,
            _ => &self.config.relay_resources,
        };
        match &self.settings().resources {
            None => Ok(usual.clone()),
            Some(resources) => serde_json::from_value(serde_json::to_value(resources)?),
        }
    }

    /// Taints that they bear.
    ///
    /// # Errors
    /// The settings are not what a pod has.
    pub fn tolerations(&self) -> Result<Option<Vec<Toleration>>, serde_json::Error> {
        let tolerations = &self.settings().tolerations;
        let convert = |toleration| serde_json::from_value(serde_json::to_value(toleration)?);
        let converted: Vec<Toleration> = tolerations.iter().map(convert).collect::<Result<_, serde_json::Error>>()?;
        Ok(Some(converted).filter(|tolerations| !tolerations.is_empty()))
    }

    /// Attraction: as the settings say, or rather apart; strictly apart where two cannot share a node.
    ///
    /// # Errors
    /// The settings are not what a pod has.
    pub fn affinity(&self, strictly_apart: bool) -> Result<Affinity, serde_json::Error> {
        if let Some(affinity) = &self.settings().affinity {
            return affinity.parse();
        }
        let term = PodAffinityTerm {
            label_selector: Some(self.label_selector()),
            topology_key: "kubernetes.io/hostname".to_owned(),
            ..PodAffinityTerm::default()
        };
        let apart = match strictly_apart {
            true => PodAntiAffinity {
                required_during_scheduling_ignored_during_execution: Some(vec![term]),
                ..PodAntiAffinity::default()
            },
            false => PodAntiAffinity {
                preferred_during_scheduling_ignored_during_execution: Some(vec![WeightedPodAffinityTerm {
                    weight: 100,
                    pod_affinity_term: term,
                }]),
                ..PodAntiAffinity::default()
            },
        };
        Ok(Affinity { pod_anti_affinity: Some(apart), ..Affinity::default() })
    }

    /// Secrets to pull images with.
    #[must_use]
    pub fn pull_secrets(&self) -> Option<Vec<LocalObjectReference>> {
        let secrets = &self.config.images.pull_secrets;
        let references = secrets.iter().map(|name| LocalObjectReference { name: name.clone() });
        Some(references.collect::<Vec<_>>()).filter(|secrets| !secrets.is_empty())
    }
}

/// What passes the restricted Pod Security profile; the group reads mounted Secrets.
#[must_use]
pub fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..SeccompProfile::default() }),
        ..PodSecurityContext::default()
    }
}

/// The same for a container.
#[must_use]
pub fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), ..Capabilities::default() }),
        read_only_root_filesystem: Some(true),
        ..SecurityContext::default()
    }
}

/// A container that is asked at its admin port whether it lives and is ready.
#[must_use]
pub fn container(name: &str, image: &str, config: &Config, args: Vec<String>) -> Container {
    let probe = |path: &str, failures: i32| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::Int(ADMIN_PORT.into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(5),
        timeout_seconds: Some(3),
        failure_threshold: Some(failures),
        ..Probe::default()
    };
    Container {
        name: name.to_owned(),
        image: Some(image.to_owned()),
        image_pull_policy: config.images.pull_policy.clone(),
        command: Some(vec![format!("/antiphon-{name}")]),
        args: Some(args),
        // Half a minute: a busy node is no reason to end calls.
        liveness_probe: Some(probe("/livez", 6)),
        readiness_probe: Some(probe("/readyz", 1)),
        security_context: Some(container_security()),
        ..Container::default()
    }
}

/// A `kubernetes.io/tls` Secret as the three files of an identity.
#[must_use]
pub fn identity_volume(secret: &str) -> (Volume, VolumeMount) {
    let items = [("tls.crt", "cert.pem"), ("tls.key", "key.pem"), ("ca.crt", "ca.pem")];
    let items = items.map(|(key, path)| KeyToPath { key: key.to_owned(), path: path.to_owned(), mode: None });
    secret_volume("identity", secret, Some(items.to_vec()), IDENTITY_DIR)
}

/// A Secret as files, readable by the group.
#[must_use]
pub fn secret_volume(name: &str, secret: &str, items: Option<Vec<KeyToPath>>, path: &str) -> (Volume, VolumeMount) {
    let source = SecretVolumeSource {
        secret_name: Some(secret.to_owned()),
        default_mode: Some(0o440),
        items,
        ..SecretVolumeSource::default()
    };
    let volume = Volume { name: name.to_owned(), secret: Some(source), ..Volume::default() };
    let mount = VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    (volume, mount)
}

/// A directory that outlives containers, not pods.
#[must_use]
pub fn state_volume() -> (Volume, VolumeMount) {
    let volume = Volume { name: "state".to_owned(), empty_dir: Some(Default::default()), ..Volume::default() };
    let mount = VolumeMount { name: "state".to_owned(), mount_path: STATE_DIR.to_owned(), ..VolumeMount::default() };
    (volume, mount)
}

/// Of all parts, for probes and metrics.
pub const ADMIN_PORT: u16 = 7_445;
/// Where identities are mounted.
pub const IDENTITY_DIR: &str = "/etc/antiphon/identity";
/// A directory that outlives containers.
pub const STATE_DIR: &str = "/var/lib/antiphon";
/// Of all images.
pub const USER: i64 = 65_532;
