//! The command line.

mod examples;

use std::{path::PathBuf, time::Duration};

use antiphon_crds::{InvalidTimeSpan, TimeSpan};
use antiphon_proto::api_key::ApiKey;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::present::from_environment;
use examples::*;

/// Realtime voice sessions: run a fleet, make calls, look inside.
#[derive(Debug, Parser)]
#[command(name = "antiphon", version, propagate_version = true, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// Directory of the fleet: keys, identities, logs; $ANTIPHON_DIR or ~/.antiphon unless given.
    #[arg(long, global = true, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Print JSON for machines instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole fleet on this machine from manifests, without Kubernetes.
    #[command(after_help = UP_EXAMPLES)]
    Up(UpArgs),
    /// Call an agent: speak recordings, save what is answered.
    #[command(after_help = CALL_EXAMPLES)]
    Call(CallArgs),
    /// Show regions, routers, relays and workers.
    #[command(after_help = STATUS_EXAMPLES)]
    Status,
    /// List live sessions.
    #[command(after_help = SESSIONS_EXAMPLES)]
    Sessions(SessionsArgs),
    /// Say why a session is where it is.
    #[command(after_help = EXPLAIN_EXAMPLES)]
    Explain(ExplainArgs),
    /// Create, list and revoke API keys.
    #[command(after_help = KEYS_EXAMPLES)]
    Keys(KeysArgs),
    /// Say of workers that they are gone.
    #[command(after_help = WORKERS_EXAMPLES)]
    Workers(WorkersArgs),
    /// Say of relays that they are gone.
    #[command(after_help = RELAYS_EXAMPLES)]
    Relays(RelaysArgs),
    /// Prove it: three clouds, a hundred callers, relays lost on the way.
    #[command(after_help = DEMO_EXAMPLES)]
    Demo(DemoArgs),
    /// Encode and decode QUIC-LB connection IDs.
    #[command(after_help = CID_EXAMPLES)]
    Cid(CidArgs),
}

/// `antiphon up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Manifests: YAML files with VoiceRegion and VoiceAgent resources, or directories of them.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// How long live calls may go on after Ctrl-C; holds here instead of the agents'
    /// disruption.deadline.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = time)]
    pub stop_deadline: Duration,
}

/// Audio codec of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CodecArg {
    /// Opus.
    Opus,
    /// Linear PCM, 16 kHz; in manifests: L16At16k.
    #[value(name = "l16-16k", alias = "L16At16k")]
    L1616k,
    /// Linear PCM, 24 kHz; in manifests: L16At24k.
    #[value(name = "l16-24k", alias = "L16At24k")]
    L1624k,
}

/// `antiphon call`.
///
/// The exit code says whether every turn was answered, 0 or 1, or 130 after Ctrl-C; what the answers were, the table
/// says. So does --json, under `turns[].problems`.
#[derive(Debug, Args)]
pub struct CallArgs {
    /// The agent, NAMESPACE/NAME; NAME alone is in namespace `default`.
    pub agent: String,
    /// What to say: a WAV file per turn, in order; a built-in sentence unless given.
    #[arg(long, value_name = "IN")]
    pub wav: Vec<PathBuf>,
    /// Where to save what was heard, as WAV.
    #[arg(long, value_name = "OUT")]
    pub save: Option<PathBuf>,
    /// Where to write what QUIC did, as qlog, times in milliseconds. A second attempt to connect goes to FILE with `-1` before its extension,
    /// and so on.
    #[arg(long, value_name = "FILE")]
    pub qlog: Option<PathBuf>,
    /// Where the caller is, in degrees: 52.5,13.4 (north and east are positive).
    #[arg(long, value_name = "LAT,LON", value_parser = location, allow_hyphen_values = true)]
    pub from: Option<(f64, f64)>,
    /// Audio codec.
    #[arg(long, value_enum, ignore_case = true, default_value_t = CodecArg::Opus)]
    pub codec: CodecArg,
    /// Only in these regions.
    #[arg(long, value_name = "REGION")]
    pub region: Vec<String>,
    /// Who asks.
    #[command(flatten)]
    pub key: ApiKeyArg,
    /// Longest wait for an answer to begin and end.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
    pub patience: Duration,
}

/// Who asks.
#[derive(Debug, Default, Args)]
pub struct ApiKeyArg {
    /// API key; $ANTIPHON_API_KEY or the fleet's own unless given.
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
}

impl ApiKeyArg {
    /// The key that was given, on the command line or in the environment.
    ///
    /// # Errors
    /// It is none; says where it came from, and does not repeat it.
    pub(crate) fn given(&self) -> anyhow::Result<Option<String>> {
        let set = || from_environment(API_KEY).map(|key| (API_KEY, key.to_string_lossy().into_owned()));
        let given = self.api_key.clone().map(|key| ("--api-key", key)).or_else(set);
        let Some((from, text)) = given else { return Ok(None) };
        let key = ApiKey::parse(text.trim()).map_err(|error| anyhow::anyhow!("{from}: {error}"))?;
        Ok(Some(key.text().to_owned()))
    }
}

const API_KEY: &str = "ANTIPHON_API_KEY";

/// `antiphon sessions`.
#[derive(Debug, Args)]
pub struct SessionsArgs {
    /// At most this many, newest first.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub limit: u32,
    /// Who asks.
    #[command(flatten)]
    pub key: ApiKeyArg,
}

/// `antiphon explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// Session id, as `antiphon call` and `antiphon sessions` print it.
    pub session: String,
    /// Which relays and addresses a live session's packets used, how well, and why that changed.
    #[arg(long)]
    pub path: bool,
    /// Who asks.
    #[command(flatten)]
    pub key: ApiKeyArg,
}

/// `antiphon keys`.
#[derive(Debug, Args)]
pub struct KeysArgs {
    /// What to do with keys.
    #[command(subcommand)]
    pub command: KeysCommand,
}

/// What to do with keys.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a key and print it: this is the only time that it is shown.
    #[command(after_help = CREATE_EXAMPLES)]
    Create {
        /// Whose it is; quotas are per tenant. 1 to 63 of a-z, 0-9 and '-', not at the ends.
        #[arg(long, value_parser = tenant)]
        tenant: String,
        /// Only for these agents, NAMESPACE/NAME, NAME in namespace `default`, or NAMESPACE/*; all unless given.
        #[arg(long, value_name = "AGENT")]
        agent: Vec<String>,
    },
    /// List keys by their public part.
    #[command(after_help = LIST_EXAMPLES)]
    List,
    /// Revoke a key.
    #[command(after_help = REVOKE_EXAMPLES)]
    Revoke {
        /// Public part, as `keys list` prints it.
        id: String,
    },
    /// Move the fleet to its next generation of secrets, during live calls.
    #[command(after_help = ROTATE_EXAMPLES)]
    Rotate(RotateArgs),
    /// Show which generation of secrets each region wants, has loaded and uses.
    #[command(after_help = GENERATIONS_EXAMPLES)]
    Generations(GenerationsArgs),
}

/// `antiphon keys generations`.
#[derive(Debug, Args)]
pub struct GenerationsArgs {
    /// Wait until no generation but the newest is in use: live calls have moved to it, which takes up to three
    /// lifetimes of connection IDs, 30 minutes unless set otherwise.
    #[arg(long)]
    pub wait: bool,
    /// Longest wait.
    #[arg(long, value_name = "TIME", default_value = "45m", value_parser = time, requires = "wait")]
    pub patience: Duration,
}

/// `antiphon keys rotate`.
///
/// Connection-ID keys, tunnel secrets, ticket keys and reset keys move together. No call notices.
#[derive(Debug, Args)]
pub struct RotateArgs {
    /// Tell the regions and do not wait for them.
    #[arg(long, conflicts_with_all = ["until", "patience"])]
    pub no_wait: bool,
    /// What to wait for.
    #[arg(long, value_enum, default_value_t = RotateUntil::Minted)]
    pub until: RotateUntil,
    /// Longest wait; 5m, or 45m for --until unused.
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub patience: Option<Duration>,
}

impl RotateArgs {
    pub(crate) fn patience(&self) -> Duration {
        let usual = Duration::from_secs(match self.until {
            RotateUntil::Minted => 5 * 60,
            RotateUntil::Unused => 45 * 60,
        });
        self.patience.unwrap_or(usual)
    }
}

/// How far a rotation is to go before the command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RotateUntil {
    /// Everything new uses the new generation.
    Minted,
    /// And nothing uses an older one: live calls have moved too, which takes up to three lifetimes of connection IDs,
    /// 30 minutes unless set otherwise.
    Unused,
}

/// `antiphon workers`.
#[derive(Debug, Args)]
pub struct WorkersArgs {
    /// What to do with workers.
    #[command(subcommand)]
    pub command: WorkersCommand,
}

/// What to do with workers.
#[derive(Debug, Subcommand)]
pub enum WorkersCommand {
    /// A worker is dead and does not come back: its routes go, and relays tell its callers.
    Gone(GoneArgs),
}

/// `antiphon relays`.
#[derive(Debug, Args)]
pub struct RelaysArgs {
    /// What to do with relays.
    #[command(subcommand)]
    pub command: RelaysCommand,
}

/// What to do with relays.
#[derive(Debug, Subcommand)]
pub enum RelaysCommand {
    /// A relay is dead and does not come back: its number is free, and no caller is sent there.
    Gone(GoneArgs),
}

/// Who is gone.
///
/// Silence alone takes nobody out of a route table: somebody who knows has to say it. Nobody who is connected to his
/// router is taken for gone.
#[derive(Debug, Args)]
pub struct GoneArgs {
    /// Its name, as `antiphon status` prints it.
    pub name: String,
    /// Its region; needed only if several have one of this name.
    #[arg(long)]
    pub region: Option<String>,
}

/// `antiphon demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Concurrent callers.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=240))]
    pub calls: u32,
    /// Turns of each caller.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub turns: u32,
    /// Keep recordings, logs and report.json in this directory.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
}

/// `antiphon cid`.
#[derive(Debug, Args)]
pub struct CidArgs {
    /// Encode or decode.
    #[command(subcommand)]
    pub command: CidCommand,
}

/// What to do with a connection ID.
#[derive(Debug, Subcommand)]
pub enum CidCommand {
    /// Make a connection ID and print it.
    #[command(after_help = ENCODE_EXAMPLES)]
    Encode(CidEncodeArgs),
    /// Take a connection ID apart.
    #[command(after_help = DECODE_EXAMPLES)]
    Decode(CidDecodeArgs),
}

/// `antiphon cid encode`.
#[derive(Debug, Args)]
pub struct CidEncodeArgs {
    /// Server ID, hex, 1 to 15 octets.
    pub server_id: String,
    /// Nonce, hex, 4 to 18 octets, 19 at most together with the server ID.
    pub nonce: String,
    /// How it is encrypted.
    #[command(flatten)]
    pub key: CidKeyArgs,
    /// Configuration, the top three bits of the first octet; 0, or that of the fleet's generation, unless given.
    #[arg(long, value_name = "0..=6")]
    pub config: Option<u8>,
    /// Low five bits of the first octet, instead of the length of the rest.
    #[arg(long, value_name = "0..=31", value_parser = clap::value_parser!(u8).range(0..=31))]
    pub random_bits: Option<u8>,
}

/// `antiphon cid decode`.
#[derive(Debug, Args)]
pub struct CidDecodeArgs {
    /// Connection ID, hex; `0x`, colons and spaces do not matter.
    pub cid: String,
    /// How it is encrypted.
    #[command(flatten)]
    pub key: CidKeyArgs,
    /// Length of the server ID in octets.
    #[arg(long, default_value_t = 8, value_name = "OCTETS")]
    pub server_id_len: usize,
    /// Length of the nonce in octets; all that follows the server ID unless given.
    #[arg(long, value_name = "OCTETS")]
    pub nonce_len: Option<usize>,
    /// The low five bits of the first octet are random, not the length of the rest.
    #[arg(long)]
    pub random_bits: bool,
}

/// The key of a QUIC-LB configuration. Without one, connection IDs are plain text.
#[derive(Debug, Args)]
pub struct CidKeyArgs {
    /// AES-128 key, 32 hex digits; plain text without one.
    #[arg(long, value_name = "HEX", env = "ANTIPHON_CID_KEY", hide_env_values = true)]
    pub key: Option<String>,
    /// The key of the fleet in --dir; what it says is checked against that fleet if it runs.
    #[arg(long, conflicts_with = "key")]
    pub fleet: bool,
    /// Generation of the fleet's key; the one that fits unless given.
    #[arg(long, value_name = "NUMBER", requires = "fleet", value_parser = clap::value_parser!(u32).range(1..))]
    pub generation: Option<u32>,
}

/// As in manifests.
fn time(text: &str) -> Result<Duration, InvalidTimeSpan> {
    Ok(text.parse::<TimeSpan>()?.duration())
}

/// The rule of routers.
fn tenant(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edge = text.starts_with('-') || text.ends_with('-');
    if text.is_empty() || text.len() > 63 || edge || !text.chars().all(legal) {
        return Err("use 1 to 63 of a-z, 0-9 and '-', not at the ends".into());
    }
    Ok(text.to_owned())
}

fn location(text: &str) -> Result<(f64, f64), String> {
    let parse = || {
        let (latitude, longitude) = text.split_once(',')?;
        Some((latitude.trim().parse().ok()?, longitude.trim().parse().ok()?))
    };
    let (latitude, longitude): (f64, f64) =
        parse().ok_or("expected LATITUDE,LONGITUDE in degrees, such as 52.5,13.4")?;
    antiphon_core::geo::Location::new(latitude, longitude).map_err(|e| e.to_string())?;
    Ok((latitude, longitude))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_key_is_blamed_on_where_it_came_from_and_not_repeated() {
        let error = ApiKeyArg { api_key: Some("bla".into()) }.given().unwrap_err().to_string();
        assert!(error.starts_with("--api-key: ") && !error.contains("bla"), "{error}");
        let key = ApiKey::from_random(&[7; ApiKey::RANDOM]);
        let given = ApiKeyArg { api_key: Some(format!(" {}\n", key.text())) }.given().unwrap();
        assert_eq!(given.as_deref(), Some(key.text()));
    }

    #[test]
    fn a_tenant_is_what_routers_take() {
        for good in ["a", "acme-2", &"x".repeat(63)] {
            assert_eq!(tenant(good).as_deref(), Ok(good));
        }
        for bad in ["", "Acme", "-a", "a-", "a b", &"x".repeat(64)] {
            assert!(tenant(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn patience_is_as_long_as_what_is_waited_for() {
        let of = |args: &[&str]| {
            let cli = Cli::try_parse_from(["antiphon", "keys", "rotate"].iter().chain(args)).unwrap();
            let Command::Keys(KeysArgs { command: KeysCommand::Rotate(args) }) = cli.command else { panic!() };
            args.patience().as_secs()
        };
        assert_eq!([of(&[]), of(&["--until", "unused"]), of(&["--patience", "7s"])], [300, 2700, 7]);
    }
}
