//! The command line.

use std::{
    net::{IpAddr, SocketAddr},
    num::{NonZeroU16, NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use clap::Parser;

use crate::limits::Limits;

/// Forwards QUIC datagrams between clients and voice workers, without state.
#[derive(Clone, Debug, Parser)]
#[command(name = "antiphon-relay", version)]
pub struct Args {
    /// Name of this relay: the identity's, which is the default, or that with `-` and more behind it.
    #[arg(long, env = "ANTIPHON_RELAY_NAME")]
    pub name: Option<String>,
    /// Region that it belongs to; has to be the identity's, which is the default.
    #[arg(long, env = "ANTIPHON_RELAY_REGION")]
    pub region: Option<String>,
    /// UDP address for clients. On a host with several addresses bind the one that is advertised: answers leave from it.
    #[arg(long, env = "ANTIPHON_RELAY_PUBLIC", value_name = "IP:PORT", default_value = "[::]:4433")]
    pub public: SocketAddr,
    /// Where clients reach it, if that is not what `--public` says (address translation, or all addresses bound). Give
    /// an IPv4 and an IPv6 address if it has both: clients try them side by side.
    #[arg(long, env = "ANTIPHON_RELAY_PUBLIC_ADDRESS", value_name = "IP:PORT", value_delimiter = ',')]
    pub public_address: Vec<SocketAddr>,
    /// File with those addresses, one per line, for when they are not known before the relay runs, such as a load
    /// balancer's: it is read again every few seconds. Until there is one, the relay waits and is not ready.
    #[arg(long, env = "ANTIPHON_RELAY_PUBLIC_ADDRESS_FILE", value_name = "FILE", conflicts_with = "public_address")]
    pub public_address_file: Option<PathBuf>,
    /// UDP address for workers.
    #[arg(long, env = "ANTIPHON_RELAY_TUNNEL", value_name = "IP:PORT", default_value = "[::]:4434")]
    pub tunnel: SocketAddr,
    /// Where workers reach it, if that is not what `--tunnel` says.
    #[arg(long, env = "ANTIPHON_RELAY_TUNNEL_ADDRESS", value_name = "IP:PORT")]
    pub tunnel_address: Option<SocketAddr>,
    /// The same with the bound port: the IP address alone, of either version.
    #[arg(long, env = "ANTIPHON_RELAY_TUNNEL_IP", value_name = "IP", conflicts_with = "tunnel_address")]
    pub tunnel_ip: Option<IpAddr>,
    /// All routers of the region; the relay registers with each, and where a name stands for several addresses, with all
    /// of those: names are looked up again every few seconds. Give it several times or with commas.
    #[arg(long, env = "ANTIPHON_RELAY_ROUTER", value_name = "HOST:PORT", value_delimiter = ',', required = true)]
    pub router: Vec<String>,
    /// Directory with `cert.pem`, `key.pem` and `ca.pem`.
    #[arg(long, env = "ANTIPHON_RELAY_IDENTITY", value_name = "DIR")]
    pub identity: PathBuf,
    /// Directory to keep keys and routes in, so that a restart needs no router; made if absent. Nothing is kept unless
    /// given.
    #[arg(long, env = "ANTIPHON_RELAY_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// TCP address of `/livez`, `/readyz` and `/metrics`.
    #[arg(long, env = "ANTIPHON_RELAY_ADMIN", value_name = "IP:PORT", default_value = "127.0.0.1:9464")]
    pub admin: SocketAddr,
    /// Forwarding threads, each pinned to a core; as many as there are cores unless given.
    #[arg(long, env = "ANTIPHON_RELAY_CORES", value_name = "N")]
    pub cores: Option<NonZeroUsize>,
    /// Whether forwarding threads are pinned to cores; turn it off where the relay shares few cores with others.
    #[arg(long, env = "ANTIPHON_RELAY_PIN", default_value_t = true, action = clap::ArgAction::Set)]
    pub pin: bool,
    /// How long a planned stop may take at most.
    #[arg(long, env = "ANTIPHON_RELAY_DRAIN_DEADLINE", value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    pub drain_deadline: Duration,
    /// Packets a second that pass of any one connection ID from one client address, per core and relay that they come in
    /// at; ten times that from all addresses, of which those that came before have a tenth of it each for certain.
    #[arg(long, env = "ANTIPHON_RELAY_CID_RATE", value_name = "N", default_value_t = Limits::default().cid_rate)]
    pub cid_rate: NonZeroU16,
    /// Initial packets a second, counted apart, likewise; the share is 8 at least.
    #[arg(long, env = "ANTIPHON_RELAY_INITIAL_RATE", value_name = "N", default_value_t = Limits::default().initial_rate)]
    pub initial_rate: NonZeroU16,
    /// Stateless resets a second that a core sends in the name of workers that are proven dead.
    #[arg(long, env = "ANTIPHON_RELAY_RESET_RATE", value_name = "N", default_value_t = Limits::default().reset_rate)]
    pub reset_rate: NonZeroU32,
    /// Log JSON instead of text.
    #[arg(long, env = "ANTIPHON_RELAY_LOG_JSON")]
    pub log_json: bool,
}
