//! Command line.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Places voice sessions on workers, issues their tickets and keeps the route table of one region.
#[derive(clap::Parser, Clone, Debug)]
#[command(name = "antiphon-router", version)]
pub struct Args {
    /// Name of the region that this router serves.
    #[arg(long, env = "ANTIPHON_ROUTER_REGION")]
    pub region: String,
    /// Where applications ask for sessions: HTTP/JSON and gRPC over TLS.
    #[arg(long, env = "ANTIPHON_ROUTER_PUBLIC", default_value = "127.0.0.1:8443")]
    pub public: SocketAddr,
    /// Where workers, relays, other routers and operators connect: gRPC over mutual TLS.
    #[arg(long, env = "ANTIPHON_ROUTER_INTERNAL", default_value = "127.0.0.1:8444")]
    pub internal: SocketAddr,
    /// Liveness, readiness and metrics: plain HTTP.
    #[arg(long, env = "ANTIPHON_ROUTER_ADMIN", default_value = "127.0.0.1:8445")]
    pub admin: SocketAddr,
    /// Directory with cert.pem, key.pem and ca.pem.
    #[arg(long, env = "ANTIPHON_ROUTER_IDENTITY")]
    pub identity: PathBuf,
    /// File with the fleet root, 64 hex digits, readable by its owner only.
    #[arg(long, env = "ANTIPHON_ROUTER_ROOT")]
    pub root: PathBuf,
    /// What the region's routers share, and where.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Log as JSON.
    #[arg(long, env = "ANTIPHON_ROUTER_LOG_JSON")]
    pub log_json: bool,
}

/// Where records and numbers are kept.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct StoreArgs {
    /// `http://HOST:PORT` or `https://HOST:PORT` of a member of the region's etcd; several times for several. Without it
    /// the store is in this process's memory, and the region has one router.
    #[arg(long, env = "ANTIPHON_ROUTER_ETCD", value_name = "URL", value_delimiter = ',')]
    pub etcd: Vec<String>,
    /// Below which path all keys are; `/antiphon/REGION` unless it is said.
    #[arg(long, env = "ANTIPHON_ROUTER_ETCD_PREFIX", value_name = "PATH")]
    pub etcd_prefix: Option<String>,
    /// Certificate (PEM) that etcd's own is signed with.
    #[arg(long, env = "ANTIPHON_ROUTER_ETCD_CA", value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// Certificate (PEM) to show to etcd.
    #[arg(long, env = "ANTIPHON_ROUTER_ETCD_CERT", value_name = "FILE")]
    pub etcd_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, env = "ANTIPHON_ROUTER_ETCD_KEY", value_name = "FILE")]
    pub etcd_key: Option<PathBuf>,
    /// User to log in to etcd as.
    #[arg(long, env = "ANTIPHON_ROUTER_ETCD_USER", value_name = "NAME")]
    pub etcd_user: Option<String>,
    /// File with that user's password, readable by its owner only.
    #[arg(long, env = "ANTIPHON_ROUTER_ETCD_PASSWORD_FILE", value_name = "FILE")]
    pub etcd_password_file: Option<PathBuf>,
    /// Directory, mode 700, to keep the last known records, numbers and routes in; made if absent. Without it a router
    /// starts knowing nothing but what its store, workers, relays and peers tell.
    #[arg(long, env = "ANTIPHON_ROUTER_STATE")]
    pub state: Option<PathBuf>,
    /// After a restart or a loss of the store, number only those who hold a number already for this many seconds.
    #[arg(long, env = "ANTIPHON_ROUTER_NEWCOMERS_WAIT", default_value = "6", value_parser = seconds)]
    pub newcomers_wait: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 0..=600) => Ok(Duration::from_secs(seconds)),
        _ => Err("expected 0 to 600 seconds".into()),
    }
}
