//! Command line and environment of a worker.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Parser;

/// Session worker: holds voice sessions next to the speech engine.
#[derive(Debug, Clone, Parser)]
#[command(name = "antiphon-worker", version)]
pub struct Args {
    /// Name of this worker, unique in its region (a DNS label); the identity's, or that with `-` and more behind it.
    #[arg(long, env = "ANTIPHON_WORKER_NAME")]
    pub name: String,
    /// Region this worker runs in.
    #[arg(long, env = "ANTIPHON_WORKER_REGION")]
    pub region: String,
    /// The VoiceAgent it serves, NAMESPACE/NAME.
    #[arg(long, env = "ANTIPHON_WORKER_AGENT", value_parser = agent_name)]
    pub agent: String,
    /// Class of the GPU it has; none unless given.
    #[arg(long, env = "ANTIPHON_WORKER_GPU_CLASS", default_value = "")]
    pub gpu_class: String,
    /// Sessions it can hold.
    #[arg(long, env = "ANTIPHON_WORKER_SLOTS", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub slots: u32,
    /// QUIC endpoints, each with a UDP port and a thread of its own.
    #[arg(long, env = "ANTIPHON_WORKER_SHARDS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub shards: u8,
    /// Pin each shard's thread to a core of its own.
    #[arg(long, env = "ANTIPHON_WORKER_PIN")]
    pub pin: bool,
    /// Address that shards receive relays' frames on; shard N takes the port plus N, or any port for port 0.
    #[arg(long, env = "ANTIPHON_WORKER_TUNNEL", default_value = "0.0.0.0:4500")]
    pub tunnel: SocketAddr,
    /// IP address that relays reach the shards under; the tunnel's unless given.
    #[arg(long, env = "ANTIPHON_WORKER_TUNNEL_IP")]
    pub tunnel_ip: Option<std::net::IpAddr>,
    /// Address of the worker's own API for routers (gRPC, mTLS).
    #[arg(long, env = "ANTIPHON_WORKER_CONTROL", default_value = "0.0.0.0:4501")]
    pub control: SocketAddr,
    /// Address that routers reach the API under; unless given the bound one, or the tunnels' address with that port.
    #[arg(long, env = "ANTIPHON_WORKER_CONTROL_ADDRESS")]
    pub control_address: Option<String>,
    /// Routers of the region, IP:PORT or HOST:PORT; it registers with all of them, and where a name stands for several
    /// addresses, with all of those: names are looked up again every few seconds.
    #[arg(long, env = "ANTIPHON_WORKER_ROUTER", required = true, value_delimiter = ',')]
    pub router: Vec<String>,
    /// Directory with cert.pem, key.pem and ca.pem.
    #[arg(long, env = "ANTIPHON_WORKER_IDENTITY")]
    pub identity: PathBuf,
    /// Directory where it keeps its number and its agent's behaviour over restarts; made if absent, mode 700.
    #[arg(long, env = "ANTIPHON_WORKER_STATE")]
    pub state: Option<PathBuf>,
    /// Directory for a qlog file of each connection; off unless given.
    #[arg(long, env = "ANTIPHON_WORKER_QLOG")]
    pub qlog: Option<PathBuf>,
    /// Address of /livez, /readyz and /metrics.
    #[arg(long, env = "ANTIPHON_WORKER_ADMIN", default_value = "127.0.0.1:4502")]
    pub admin: SocketAddr,
    /// How long live sessions may go on after SIGTERM.
    #[arg(long, env = "ANTIPHON_WORKER_DRAIN_DEADLINE", default_value = "25s", value_parser = humantime::parse_duration)]
    pub drain_deadline: Duration,
    /// How long live connections use a connection ID. Three times that after a key rotation began to mint, nothing
    /// older is in use: 30 minutes at the default.
    #[arg(long, env = "ANTIPHON_WORKER_CID_LIFETIME", default_value = "10m", value_parser = cid_lifetime)]
    pub cid_lifetime: Duration,
    /// Log as JSON.
    #[arg(long, env = "ANTIPHON_WORKER_LOG_JSON")]
    pub log_json: bool,
}

/// Shorter ones would have every connection renew its IDs all the time.
fn cid_lifetime(text: &str) -> Result<Duration, String> {
    let lifetime = humantime::parse_duration(text).map_err(|e| e.to_string())?;
    if (Duration::from_millis(500)..=Duration::from_secs(86_400)).contains(&lifetime) {
        return Ok(lifetime);
    }
    Err("500 ms to 1 day expected".into())
}

fn agent_name(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(text.to_owned())
        }
        _ => Err("expected NAMESPACE/NAME".into()),
    }
}
