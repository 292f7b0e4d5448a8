//! Command line.

use std::{net::SocketAddr, path::PathBuf};

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
    /// Log as JSON.
    #[arg(long, env = "ANTIPHON_ROUTER_LOG_JSON")]
    pub log_json: bool,
}
