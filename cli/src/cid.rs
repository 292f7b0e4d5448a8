//! `antiphon cid`: QUIC-LB connection IDs by hand, for packet captures and for other implementations.

use std::{
    fmt,
    path::Path,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use antiphon_core::{
    cid::{Cid, CidError, Config, ConfigId, Kind, SessionNonce},
    id::{KeyGeneration, ServerId},
};
use anyhow::{Context as _, anyhow, bail, ensure};
use serde::Serialize;
use serde_json::json;

use crate::{
    args::{CidArgs, CidCommand, CidDecodeArgs, CidEncodeArgs, CidKeyArgs},
    fleet::read_root,
    sessions::age,
};

pub(crate) fn run(args: &CidArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    match &args.command {
        CidCommand::Encode(args) => {
            let cid = encode(args, key(&args.key, dir)?)?.to_string();
            if json {
                println!("{}", serde_json::to_string_pretty(&json!({ "cid": cid }))?);
            } else {
                println!("{cid}");
            }
        }
        CidCommand::Decode(args) => {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
            let taken = decode(args, key(&args.key, dir)?, now)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&taken)?);
            } else {
                print!("{taken}");
            }
            if taken.antiphon.is_some() && taken.encryption == PLAIN {
                eprintln!("hint: read as plain text; Antiphon encrypts its own: give --key, or --fleet");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn key(args: &CidKeyArgs, dir: &Path) -> anyhow::Result<Option<[u8; 16]>> {
    if args.fleet {
        let root = read_root(dir).context("--fleet")?;
        return Ok(Some(root.cid_key(KeyGeneration::new(args.generation)?)));
    }
    let Some(text) = &args.key else {
        return Ok(None);
    };
    let octets = octets("--key", text)?;
    let key = <[u8; 16]>::try_from(octets.as_slice());
    let wrong = |_| anyhow!("--key: {} octets: an AES-128 key has 16, 32 hex digits", octets.len());
    key.map(Some).map_err(wrong)
}

fn encode(args: &CidEncodeArgs, key: Option<[u8; 16]>) -> anyhow::Result<Cid> {
    let server_id = octets("SERVER_ID", &args.server_id)?;
    let nonce = octets("NONCE", &args.nonce)?;
    let id = ConfigId::new(args.config).context("--config")?;
    let config = Config::new(id, server_id.len(), nonce.len(), key, args.random_bits.is_none())
        .map_err(|error| blame(error, "SERVER_ID", "NONCE"))?;
    Ok(config.encode(&server_id, &nonce, args.random_bits.unwrap_or(0))?)
}

/// Takes a connection ID apart; `now` is the time since 1970.
fn decode(args: &CidDecodeArgs, key: Option<[u8; 16]>, now: Duration) -> anyhow::Result<Taken> {
    let cid = octets("CID", &args.cid)?;
    ensure!(cid.len() <= 20, "CID: {} octets: a connection ID of QUIC version 1 has at most 20", cid.len());
    let id = ConfigId::of_first_octet(cid[0]);
    let id = id.context("CID: it names no server, so there is nothing to take apart")?;
    let follow = cid.len() - 1;
    if !args.random_bits {
        check_encoded_length(cid[0], follow)?;
    }
    let rest = follow.saturating_sub(args.server_id_len);
    if args.nonce_len.is_none() {
        ensure!(
            rest >= 4,
            "CID: {follow} octets after the first leave {rest} for the nonce, which takes at least 4: \
             is the server ID shorter than {}? Name its length with --server-id-len",
            args.server_id_len
        );
    }
    let nonce_len = args.nonce_len.unwrap_or(rest);
    let config = Config::new(id, args.server_id_len, nonce_len, key, !args.random_bits)
        .map_err(|error| blame(error, "--server-id-len", "--nonce-len"))?;
    let decoded = config.decode(&cid).context("CID")?;
    let (server_id, nonce) = (decoded.server_id(), decoded.nonce());
    let layout = <[u8; 8]>::try_from(server_id).ok().zip(<[u8; 8]>::try_from(nonce).ok());
    Ok(Taken {
        configuration: id.value(),
        encryption: match key {
            None => PLAIN,
            Some(_) if config.cid_len() == 17 => "single-pass",
            Some(_) => "four-pass",
        },
        server_id: hex::encode(server_id),
        nonce: hex::encode(nonce),
        server_use: hex::encode(&cid[config.cid_len()..]),
        antiphon: layout.map(|(server, nonce)| Layout::of(server, nonce, now)),
    })
}

/// A person gives one whole connection ID: unlike on a packet's path, the encoded length has to be exact.
fn check_encoded_length(first: u8, follow: usize) -> anyhow::Result<()> {
    let encoded = usize::from(first & 0x1f);
    let remedy = match encoded {
        _ if encoded == follow => return Ok(()),
        5..=19 if encoded < follow => format!("give the first {} octets only", encoded + 1),
        5..=19 => "is it cut off?".into(),
        _ => "that cannot be a length".into(),
    };
    bail!(
        "CID: the first octet says that {encoded} octets follow it, {follow} do: {remedy} \
         (--random-bits if these bits are random instead of the length)"
    )
}

/// Says which argument an illegal length comes from.
fn blame(error: CidError, server_id: &str, nonce: &str) -> anyhow::Error {
    match error {
        CidError::ServerIdLength(_) => anyhow!("{server_id}: {error}"),
        CidError::NonceLength(_) => anyhow!("{nonce}: {error}"),
        _ => anyhow!("{server_id} and {nonce}: {error}"),
    }
}

/// Reads hex digits, `0x` in front or not, with colons and white space between octets; at least one octet.
fn octets(argument: &str, text: &str) -> anyhow::Result<Vec<u8>> {
    let (mut octets, mut half) = (Vec::new(), None);
    let text = text.trim_end();
    let start = text.trim_start();
    let digits = start.strip_prefix("0x").or_else(|| start.strip_prefix("0X")).unwrap_or(start);
    // Positions are those that the person sees.
    let skipped = text.chars().count() - digits.chars().count();
    for (position, c) in digits.chars().enumerate().map(|(index, c)| (skipped + index + 1, c)) {
        let separator = c == ':' || c.is_whitespace();
        match (c.to_digit(16), half) {
            (Some(digit), None) => half = Some(digit),
            (Some(digit), Some(high)) => {
                octets.push((high << 4 | digit) as u8);
                half = None;
            }
            (None, None) if separator => {}
            (None, Some(_)) if separator => {
                bail!("{argument}: {c:?} at position {position} parts an octet: write both of its digits, as in 0a")
            }
            (None, _) => {
                bail!("{argument}: {c:?} at position {position} is no hex digit: expected 0-9 and a-f")
            }
        }
    }
    ensure!(half.is_none(), "{argument}: odd number of hex digits: each octet has two, the last one lacks its second");
    ensure!(!octets.is_empty(), "{argument}: empty: expected hex digits, two for each octet");
    Ok(octets)
}

/// What a connection ID says.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Taken {
    configuration: u8,
    encryption: &'static str,
    server_id: String,
    nonce: String,
    /// Octets after the configuration's, for the server's own use.
    #[serde(skip_serializing_if = "String::is_empty")]
    server_use: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    antiphon: Option<Layout>,
}

/// Server ID and nonce in Antiphon's own layout. Any 8 and 8 octets can be read so.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    /// `region.worker.shard#incarnation`.
    server: String,
    region: u16,
    worker: u16,
    shard: u8,
    incarnation: u32,
    kind: &'static str,
    counter: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    expiry: Option<Expiry>,
}

/// Until when a client's first packet may carry an initial connection ID.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Expiry {
    /// RFC 3339.
    at: String,
    /// Seconds from now, negative in the past.
    in_s: i64,
    /// As a relay judges it now.
    expired: bool,
}

impl Layout {
    fn of(server_id: [u8; 8], nonce: [u8; 8], now: Duration) -> Self {
        let server = ServerId::from_bytes(server_id);
        let nonce = SessionNonce::from_u64(u64::from_be_bytes(nonce));
        Self {
            server: server.to_string(),
            region: server.region.value(),
            worker: server.worker.value(),
            shard: server.shard.value(),
            incarnation: server.incarnation.value(),
            kind: match nonce.kind() {
                Some(Kind::Connection) => "connection",
                Some(Kind::Initial) => "initial",
                None => "unknown",
            },
            counter: nonce.value() & COUNTER_MASK,
            expiry: (nonce.kind() == Some(Kind::Initial)).then(|| Expiry::of(nonce, now.as_secs())),
        }
    }
}

impl Expiry {
    /// The time travels modulo 2^22 seconds: the nearest one that fits is meant.
    fn of(nonce: SessionNonce, now: u64) -> Self {
        let ahead = (nonce.value() >> EXPIRY_SHIFT).wrapping_sub(now) % EXPIRY_MODULUS;
        let in_s = if ahead < EXPIRY_MODULUS / 2 { ahead as i64 } else { ahead as i64 - EXPIRY_MODULUS as i64 };
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(now.saturating_add_signed(in_s));
        Self { at: humantime::format_rfc3339_seconds(at).to_string(), in_s, expired: nonce.is_expired(now) }
    }
}

/// One line per part.
impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "configuration  {}", self.configuration)?;
        writeln!(f, "encryption     {}", self.encryption)?;
        writeln!(f, "server ID      {}", self.server_id)?;
        writeln!(f, "nonce          {}", self.nonce)?;
        if !self.server_use.is_empty() {
            writeln!(f, "server use     {}", self.server_use)?;
        }
        self.antiphon.iter().try_for_each(|layout| write!(f, "\n{layout}"))
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "as Antiphon's own layout")?;
        writeln!(f, "server         {}  (region.worker.shard#incarnation)", self.server)?;
        let kind = match self.kind {
            "connection" => "connection: of a live connection",
            "initial" => "initial: for a client's first packet",
            _ => "unknown: nobody mints it; forged, or the key is another",
        };
        writeln!(f, "kind           {kind}")?;
        if let Some(expiry) = &self.expiry {
            writeln!(f, "expires        {expiry}")?;
        }
        writeln!(f, "counter        {}", self.counter)
    }
}

impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let distance = age(Duration::from_secs(self.in_s.unsigned_abs()));
        f.write_str(&self.at)?;
        match (self.expired, self.in_s < 0) {
            (false, _) => write!(f, " (in {distance})"),
            (true, true) => write!(f, " (expired {distance} ago)"),
            (true, false) => write!(f, " (in {distance}: further ahead than relays accept)"),
        }
    }
}

const PLAIN: &str = "plaintext";
/// Layout of [`SessionNonce`]: kind (2 bits), expiry (22), counter (40).
const EXPIRY_SHIFT: u32 = 40;
const EXPIRY_MODULUS: u64 = 1 << 22;
const COUNTER_MASK: u64 = (1 << EXPIRY_SHIFT) - 1;
