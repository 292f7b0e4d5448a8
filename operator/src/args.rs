//! The command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};

/// Builds voice regions, agents and their workers on Kubernetes.
#[derive(Clone, Debug, Parser)]
#[command(name = "antiphon-operator", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Log JSON instead of text.
    #[arg(long, env = "ANTIPHON_OPERATOR_LOG_JSON", global = true)]
    pub log_json: bool,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Run the operator.
    Run(Box<RunArgs>),
    /// Make the fleet root if there is none, and the issuer of certificates from it. Never replaces a root.
    Bootstrap(BootstrapArgs),
    /// Apply the CustomResourceDefinitions of this release, unless the cluster has newer ones.
    ApplyCrds(ApplyCrdsArgs),
    /// Drain and remove all of Antiphon's resources while the operator still runs.
    Teardown(TeardownArgs),
    /// Prepare a member of the managed etcd before etcd itself starts: for an init container.
    EtcdMember(crate::etcd_member::EtcdMemberArgs),
}

/// Where Antiphon lives.
#[derive(Args, Clone, Debug)]
pub struct Place {
    /// Antiphon's own namespace.
    #[arg(long, env = "ANTIPHON_OPERATOR_NAMESPACE", default_value = "antiphon-system")]
    pub namespace: String,
    /// Name of the release: the label `app.kubernetes.io/instance` of what is made.
    #[arg(long, env = "ANTIPHON_OPERATOR_INSTANCE", default_value = "antiphon")]
    pub instance: String,
}

/// `run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// Name of this cluster, a DNS label. VoiceRegions with this `spec.cluster` are built here, others are peers.
    #[arg(long, env = "ANTIPHON_OPERATOR_CLUSTER")]
    pub cluster: String,
    /// Namespaces of VoiceAgents, besides Antiphon's own; all of the cluster unless given.
    #[arg(long, env = "ANTIPHON_OPERATOR_WATCH_NAMESPACE", value_name = "NS", value_delimiter = ',')]
    pub watch_namespace: Vec<String>,
    /// Whether nodes are watched, which takes a permission on the whole cluster. Without it a drained node is noticed
    /// only by the pods that are evicted.
    #[arg(long, env = "ANTIPHON_OPERATOR_WATCH_NODES", default_value_t = true, action = clap::ArgAction::Set)]
    pub watch_nodes: bool,
    /// Name of this process; in a pod its name.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pub identity: Option<String>,
    /// Metrics and health: plain HTTP.
    #[arg(long, env = "ANTIPHON_OPERATOR_ADMIN", value_name = "IP:PORT", default_value = "[::]:8080")]
    pub admin: SocketAddr,
    /// What pods run.
    #[command(flatten)]
    pub images: ImageArgs,
    /// The regions' store.
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// Certificates.
    #[command(flatten)]
    pub certificates: CertificateArgs,
}

/// What pods run.
#[derive(Args, Clone, Debug)]
pub struct ImageArgs {
    /// Image of routers.
    #[arg(long, env = "ANTIPHON_OPERATOR_ROUTER_IMAGE", default_value = concat!("antiphon/router:", env!("CARGO_PKG_VERSION")))]
    pub router_image: String,
    /// Image of relays.
    #[arg(long, env = "ANTIPHON_OPERATOR_RELAY_IMAGE", default_value = concat!("antiphon/relay:", env!("CARGO_PKG_VERSION")))]
    pub relay_image: String,
    /// Image of workers whose VoiceAgent names none.
    #[arg(long, env = "ANTIPHON_OPERATOR_WORKER_IMAGE", default_value = concat!("antiphon/worker:", env!("CARGO_PKG_VERSION")))]
    pub worker_image: String,
    /// `Always`, `IfNotPresent` or `Never`; as Kubernetes decides unless given.
    #[arg(long, env = "ANTIPHON_OPERATOR_IMAGE_PULL_POLICY", value_parser = ["Always", "IfNotPresent", "Never"])]
    pub image_pull_policy: Option<String>,
    /// Secrets in Antiphon's namespace to pull the images of routers and relays with.
    #[arg(long, env = "ANTIPHON_OPERATOR_IMAGE_PULL_SECRET", value_name = "SECRET", value_delimiter = ',')]
    pub image_pull_secret: Vec<String>,
    /// `resources` of routers, as in a pod: JSON.
    #[arg(
        long,
        env = "ANTIPHON_OPERATOR_ROUTER_RESOURCES",
        value_name = "JSON",
        default_value = r#"{"requests":{"cpu":"100m","memory":"64Mi"},"limits":{"memory":"512Mi"}}"#
    )]
    pub router_resources: String,
    /// `resources` of relays, as in a pod: JSON.
    #[arg(
        long,
        env = "ANTIPHON_OPERATOR_RELAY_RESOURCES",
        value_name = "JSON",
        default_value = r#"{"requests":{"cpu":"200m","memory":"32Mi"},"limits":{"memory":"256Mi"}}"#
    )]
    pub relay_resources: String,
}

/// The regions' store.
#[derive(Args, Clone, Debug)]
pub struct EtcdArgs {
    /// URLs of etcd. Without them each region has one router, which keeps records in memory.
    #[arg(long, env = "ANTIPHON_OPERATOR_ETCD_ENDPOINTS", value_name = "URL", value_delimiter = ',')]
    pub etcd_endpoints: Vec<String>,
    /// Secret in Antiphon's namespace with `ca.crt` and, if etcd asks for a client certificate, `tls.crt` and `tls.key`.
    #[arg(long, env = "ANTIPHON_OPERATOR_ETCD_SECRET", value_name = "SECRET")]
    pub etcd_secret: Option<String>,
    /// The Secret of `--etcd-secret` has no client certificate: etcd asks for none.
    #[arg(long, env = "ANTIPHON_OPERATOR_ETCD_CA_ONLY")]
    pub etcd_ca_only: bool,
    /// Secret in Antiphon's namespace with `username` and `password`, if etcd wants a user.
    #[arg(long, env = "ANTIPHON_OPERATOR_ETCD_USER_SECRET", value_name = "SECRET")]
    pub etcd_user_secret: Option<String>,
    /// Path that keys are under; the region's name is added.
    #[arg(long, env = "ANTIPHON_OPERATOR_ETCD_PREFIX", value_name = "PATH", default_value = "/antiphon")]
    pub etcd_prefix: String,
}

/// Certificates.
#[derive(Args, Clone, Debug)]
pub struct CertificateArgs {
    /// Secret with the fleet root, which routers mount.
    #[arg(long, env = "ANTIPHON_OPERATOR_ROOT_SECRET", value_name = "SECRET", default_value = ROOT_SECRET)]
    pub root_secret: String,
    /// Directory with the issuer's `tls.crt`, `tls.key` and `ca.crt`: certificates are issued by the operator.
    #[arg(long, env = "ANTIPHON_OPERATOR_ISSUER", value_name = "DIR", required_unless_present = "cert_manager_issuer")]
    pub issuer: Option<PathBuf>,
    /// cert-manager issues certificates instead: `Issuer/NAME` or `ClusterIssuer/NAME`, made from the same key. Agents
    /// in namespaces of their own need a ClusterIssuer.
    #[arg(
        long,
        env = "ANTIPHON_OPERATOR_CERT_MANAGER_ISSUER",
        value_name = "KIND/NAME",
        conflicts_with = "issuer",
        requires = "operator_identity"
    )]
    pub cert_manager_issuer: Option<String>,
    /// Directory with the operator's own `cert.pem`, `key.pem` and `ca.pem`; issued by itself unless given.
    #[arg(long, env = "ANTIPHON_OPERATOR_IDENTITY", value_name = "DIR")]
    pub operator_identity: Option<PathBuf>,
}

/// `bootstrap`.
#[derive(Args, Clone, Debug)]
pub struct BootstrapArgs {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// Secret with the fleet root.
    #[arg(long, env = "ANTIPHON_OPERATOR_ROOT_SECRET", value_name = "SECRET", default_value = ROOT_SECRET)]
    pub root_secret: String,
    /// Secret with the issuer of certificates.
    #[arg(long, env = "ANTIPHON_OPERATOR_ISSUER_SECRET", value_name = "SECRET", default_value = ISSUER_SECRET)]
    pub issuer_secret: String,
    /// A root must be there already: fail instead of making one. For every cluster of a fleet but the first.
    #[arg(long, env = "ANTIPHON_OPERATOR_REQUIRE_ROOT")]
    pub require_root: bool,
}

/// `apply-crds`.
#[derive(Args, Clone, Debug)]
pub struct ApplyCrdsArgs {
    /// How long to wait until the API server serves them.
    #[arg(long, env = "ANTIPHON_OPERATOR_CRD_TIMEOUT", value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    pub timeout: std::time::Duration,
}

/// `teardown`.
#[derive(Args, Clone, Debug)]
pub struct TeardownArgs {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// Namespaces of VoiceAgents, besides Antiphon's own; all of the cluster unless given.
    #[arg(long, env = "ANTIPHON_OPERATOR_WATCH_NAMESPACE", value_name = "NS", value_delimiter = ',')]
    pub watch_namespace: Vec<String>,
    /// How long calls may take to end.
    #[arg(long, env = "ANTIPHON_OPERATOR_TEARDOWN_TIMEOUT", value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    pub timeout: std::time::Duration,
}

/// Where the fleet root is unless another Secret is named.
pub const ROOT_SECRET: &str = "antiphon-fleet-root";
/// Where the issuer is unless another Secret is named.
pub const ISSUER_SECRET: &str = "antiphon-issuer";
