//! How an operator runs: everything that is decided before it starts.

use std::collections::BTreeMap;

use anyhow::{bail, ensure};
use k8s_openapi::api::core::v1::ResourceRequirements;

use crate::args::{CertificateArgs, EtcdArgs};

/// What the command line said, in the form that controllers use.
#[derive(Clone, Debug)]
pub struct Config {
    /// This cluster's name; VoiceRegions that name it are built here.
    pub cluster: String,
    /// Antiphon's namespace.
    pub namespace: String,
    /// Where else VoiceAgents may be; empty: everywhere.
    pub watch_namespaces: Vec<String>,
    /// Whether nodes are watched: it takes a permission on the whole cluster. Without it a drained node is noticed only
    /// by the pods that are evicted.
    pub watch_nodes: bool,
    /// The release, as in the label `app.kubernetes.io/instance`.
    pub instance: String,
    /// This process, as events and the lease name it.
    pub identity: String,
    /// What pods run.
    pub images: Images,
    /// Of routers.
    pub router_resources: ResourceRequirements,
    /// Of relays.
    pub relay_resources: ResourceRequirements,
    /// Where routers keep records.
    pub etcd: Option<Etcd>,
    /// Name of the Secret with the fleet root.
    pub root_secret: String,
    /// Who issues certificates.
    pub certificates: Certificates,
}

/// Images and how they are pulled.
#[derive(Clone, Debug)]
pub struct Images {
    /// Of routers.
    pub router: String,
    /// Of relays.
    pub relay: String,
    /// Of workers, unless an agent names its own.
    pub worker: String,
    /// `Always`, `IfNotPresent` or `Never`; `None`: as Kubernetes decides.
    pub pull_policy: Option<String>,
    /// Secrets to pull them with, in Antiphon's namespace.
    pub pull_secrets: Vec<String>,
}

/// The regions' etcd.
#[derive(Clone, Debug)]
pub struct Etcd {
    /// URLs.
    pub endpoints: Vec<String>,
    /// Secret (`ca.crt`, `tls.crt`, `tls.key`) to reach it with.
    pub secret: Option<String>,
    /// Whether that Secret has a client certificate.
    pub client_certificate: bool,
    /// Secret (`username`, `password`) to log in with.
    pub user_secret: Option<String>,
    /// Path that keys are under, before the region's name.
    pub prefix: String,
}

/// Who issues certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Certificates {
    /// The operator, with the fleet's issuer.
    Own,
    /// cert-manager, with an issuer of its own kind and name.
    CertManager {
        /// `Issuer` or `ClusterIssuer`.
        kind: String,
        /// Its name.
        name: String,
    },
}

impl Etcd {
    /// What the command line says; nothing without endpoints.
    ///
    /// # Errors
    /// The prefix is no path, or endpoints and Secret do not go together.
    pub fn of(args: &EtcdArgs) -> anyhow::Result<Option<Self>> {
        let EtcdArgs { etcd_endpoints, etcd_secret, etcd_ca_only, etcd_user_secret, etcd_prefix } = args;
        if etcd_endpoints.is_empty() {
            return Ok(None);
        }
        ensure!(etcd_prefix.starts_with('/'), "--etcd-prefix {etcd_prefix:?} does not begin with '/'");
        let secured = etcd_endpoints.iter().any(|endpoint| endpoint.starts_with("https://"));
        ensure!(!secured || etcd_secret.is_some(), "--etcd-secret is needed for etcd endpoints with https");
        Ok(Some(Self {
            endpoints: etcd_endpoints.clone(),
            secret: etcd_secret.clone(),
            client_certificate: !etcd_ca_only,
            user_secret: etcd_user_secret.clone(),
            prefix: etcd_prefix.trim_end_matches('/').to_owned(),
        }))
    }
}

impl Certificates {
    /// What the command line says.
    ///
    /// # Errors
    /// The issuer is not `Issuer/NAME` or `ClusterIssuer/NAME`.
    pub fn of(args: &CertificateArgs) -> anyhow::Result<Self> {
        let Some(text) = &args.cert_manager_issuer else {
            return Ok(Self::Own);
        };
        match text.split_once('/') {
            Some((kind @ ("Issuer" | "ClusterIssuer"), name)) if !name.is_empty() => {
                Ok(Self::CertManager { kind: kind.to_owned(), name: name.to_owned() })
            }
            _ => bail!("--cert-manager-issuer {text:?}: expected Issuer/NAME or ClusterIssuer/NAME"),
        }
    }
}

impl Config {
    /// Namespaces to watch; empty: all. Antiphon's own is among them.
    #[must_use]
    pub fn watched_namespaces(&self) -> Vec<String> {
        if self.watch_namespaces.is_empty() {
            return Vec::new();
        }
        let mut namespaces = self.watch_namespaces.clone();
        namespaces.push(self.namespace.clone());
        namespaces.sort();
        namespaces.dedup();
        namespaces
    }

    /// Labels of an object of a region; more are added by who makes it.
    #[must_use]
    pub fn labels(&self, component: crate::labels::Component, region: &str) -> BTreeMap<String, String> {
        crate::labels::common(&self.instance, component, region)
    }
}
