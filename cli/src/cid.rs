//! `antiphon cid`: QUIC-LB connection IDs by hand, for packet captures and for other implementations.

mod fleet;

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

use crate::present::out;
use crate::{
    args::{CidArgs, CidCommand, CidDecodeArgs, CidEncodeArgs},
    present,
    sessions::age,
};
use fleet::{Known, Named};

pub(crate) async fn run(args: &CidArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    match &args.command {
        CidCommand::Encode(args) => {
            let cid = match args.key.fleet {
                true => encode_for_fleet(args, dir).await?,
                false => encode(args, args.config.unwrap_or(0), key(args.key.key.as_deref())?)?,
            };
            let cid = cid.to_string();
            if json {
                out!("{}", serde_json::to_string_pretty(&json!({ "cid": cid }))?);
            } else {
                out!("{cid}");
            }
        }
        CidCommand::Decode(args) => {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
            let taken = match args.key.fleet {
                true => fleet::take_apart(args, &fleet::root(dir)?, &Known::ask(dir).await, now)?,
                false => decode(args, key(args.key.key.as_deref())?, now)?,
            };
            if json {
                out!("{}", serde_json::to_string_pretty(&taken)?);
            } else {
                out!("{}", taken.to_string().trim_end());
            }
            if let Some(problem) = taken.problem() {
                present::error(&anyhow!("{problem}"));
                return Ok(ExitCode::FAILURE);
            }
            if taken.antiphon.is_some() && taken.encryption == PLAIN {
                eprintln!("hint: read as plain text; Antiphon encrypts its own: give --key, or --fleet");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn key(text: Option<&str>) -> anyhow::Result<Option<[u8; 16]>> {
    let Some(text) = text.filter(|key| !key.is_empty()) else {
        return Ok(None);
    };
    let octets = octets("--key", text)?;
    let key = <[u8; 16]>::try_from(octets.as_slice());
    let wrong = |_| anyhow!("--key: {} octets: an AES-128 key has 16, 32 hex digits", octets.len());
    key.map(Some).map_err(wrong)
}

/// With the key of the generation given, else of the one that the fleet uses for what is new.
async fn encode_for_fleet(args: &CidEncodeArgs, dir: &Path) -> anyhow::Result<Cid> {
    let root = fleet::root(dir)?;
    let generation = match args.key.generation {
        Some(generation) => generation,
        None => Known::ask(dir).await.minting()?,
    };
    if let Some(config) = args.config {
        fleet::check_generation(generation, ConfigId::new(config).context("--config")?)?;
    }
    encode(args, fleet::config_of(generation), Some(root.cid_key(KeyGeneration::new(generation)?)))
}

fn encode(args: &CidEncodeArgs, config: u8, key: Option<[u8; 16]>) -> anyhow::Result<Cid> {
    let server_id = octets("SERVER_ID", &args.server_id)?;
    let nonce = octets("NONCE", &args.nonce)?;
    let id = ConfigId::new(config).context("--config")?;
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
        generation: None,
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
    /// Of the fleet's keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u32>,
    encryption: &'static str,
    server_id: String,
    nonce: String,
    /// Octets after the configuration's, for the server's own use.
    #[serde(skip_serializing_if = "String::is_empty")]
    server_use: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    antiphon: Option<Layout>,
}

impl Taken {
    /// Server ID and nonce of Antiphon's own layout.
    fn layout(&self) -> Option<(ServerId, SessionNonce)> {
        self.antiphon.as_ref().map(|layout| layout.parts)
    }

    /// Adds what the fleet says to it.
    fn of_fleet(&mut self, generation: u32, named: Named) {
        self.generation = Some(generation);
        if let Some(layout) = &mut self.antiphon {
            layout.named = named;
        }
    }

    /// Why it may be none of the fleet's.
    fn problem(&self) -> Option<&str> {
        self.antiphon.as_ref()?.named.problem.as_deref()
    }
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
    #[serde(flatten)]
    named: Named,
    #[serde(skip)]
    parts: (ServerId, SessionNonce),
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
            named: Named::default(),
            parts: (server, nonce),
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
        if let Some(generation) = self.generation {
            writeln!(f, "generation     {generation}")?;
        }
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
        let Named { region, worker, .. } = &self.named;
        match (region, worker) {
            (Some(region), Some(worker)) => writeln!(f, "worker         {region}/{worker}")?,
            (Some(region), None) => writeln!(f, "region         {region}")?,
            _ => {}
        }
        let kind = match self.kind {
            "connection" => "connection: for live connections",
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

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{CidKeyArgs, Cli, Command};

    const KEY: &str = "8f95f09245765f80256934e50c66207f";
    const NOW: u64 = 1_800_000_000;

    /// `antiphon cid …` up to what it prints.
    fn cid(arguments: &[&str]) -> anyhow::Result<String> {
        let cli = Cli::try_parse_from(["antiphon", "cid"].iter().chain(arguments))?;
        let Command::Cid(args) = cli.command else { panic!("{arguments:?} is another command") };
        match &args.command {
            CidCommand::Encode(args) => {
                Ok(encode(args, args.config.unwrap_or(0), key(args.key.key.as_deref())?)?.to_string())
            }
            CidCommand::Decode(args) => {
                Ok(decode(args, key(args.key.key.as_deref())?, Duration::from_secs(NOW))?.to_string())
            }
        }
    }

    /// Draft 21 of QUIC-LB, appendix B and section 5.4.2.4. Left out: row 1 of B.1, whose digits are incomplete there.
    /// The 18-octet row of B.2 says configuration 3 but prints the first octet of configuration 0.
    #[test]
    fn published_vectors_are_encoded_and_decoded() {
        let example = "fdf726a9893ec05c0632d3956680baf0";
        for (config, server_id, nonce, key, encryption, expected) in [
            ("0", "c4605e", "4504cc4f", None, "plaintext", "07c4605e4504cc4f"),
            ("0", "ed793a", "ee080dbf", Some(KEY), "four-pass", "0720b1d07b359d3c"),
            (
                "2",
                "ed793a51d49b8f5f",
                "ee080dbf48c0d1e5",
                Some(KEY),
                "single-pass",
                "504dd2d05a7b0de9b2b9907afb5ecf8cc3",
            ),
            (
                "0",
                "ed793a51d49b8f5fab",
                "ee080dbf48c0d1e55d",
                Some(KEY),
                "four-pass",
                "125779c9cc86beb3a3a4a3ca96fce4bfe0cdbc",
            ),
            ("0", "31441a", "9c69c275", Some(example), "four-pass", "0767947d29be054a"),
        ] {
            let key: Vec<_> = key.into_iter().flat_map(|key| ["--key", key]).collect();
            let made = cid(&[&["encode", server_id, nonce, "--config", config], &key[..]].concat()).unwrap();
            assert_eq!(made, expected);
            let length = (server_id.len() / 2).to_string();
            let taken = cid(&[&["decode", expected, "--server-id-len", &length], &key[..]].concat()).unwrap();
            let lines = format!(
                "configuration  {config}\nencryption     {encryption}\n\
                 server ID      {server_id}\nnonce          {nonce}\n"
            );
            assert!(taken.starts_with(&lines), "{taken}");
        }
    }

    /// The frozen connection IDs of the layout's own tests: region 3, worker 7, shard 1, expiring at [`NOW`].
    #[test]
    fn antiphons_own_layout_is_spelled_out() {
        let decode = |cid_hex| cid(&["decode", cid_hex, "--key", "11111111111111111111111111111111"]).unwrap();
        let initial = "\
configuration  2
encryption     single-pass
server ID      00c001c1deadbeef
nonce          49d200123456789a

as Antiphon's own layout
server         3.7.1#deadbeef  (region.worker.shard#incarnation)
kind           initial: for a client's first packet
expires        2027-01-15T08:00:00Z (in 0s)
counter        78187493530
";
        assert_eq!(decode("50e37afbbb303e8e4beed1ce6b41856885"), initial);
        let connection = decode("50321e808ee40bb87d8406cce0828668e7");
        assert!(connection.contains("kind           connection: for live connections\ncounter        78187493531\n"));
    }

    #[test]
    fn expiry_is_the_nearest_time_that_fits() {
        let expiry = |end: u64| Expiry::of(SessionNonce::initial(end, 5), NOW);
        for (end, text) in [
            (NOW + 25, "2027-01-15T08:00:25Z (in 25s)"),
            (NOW - 185, "2027-01-15T07:56:55Z (expired 3m05s ago)"),
            (NOW + 601, "2027-01-15T08:10:01Z (in 10m01s: further ahead than relays accept)"),
        ] {
            assert_eq!(expiry(end).to_string(), text);
            assert_eq!(expiry(end).in_s, end as i64 - NOW as i64);
        }
    }

    #[test]
    fn every_legal_shape_can_be_named() {
        assert_eq!(cid(&["encode", "aa", "bbccddee", "--random-bits", "31", "--config", "6"]).unwrap(), "dfaabbccddee");
        let taken = cid(&["decode", "dfaabbccddee", "--random-bits", "--server-id-len", "1"]).unwrap();
        assert!(taken.contains("server ID      aa\nnonce          bbccddee\n"), "{taken}");
        let taken = cid(&["decode", "07aabbccddee0102", "--server-id-len", "1", "--nonce-len", "4"]).unwrap();
        assert!(taken.contains("nonce          bbccddee\nserver use     0102\n"), "{taken}");
        let plain = cid(&["decode", "07c4605e4504cc4f", "--server-id-len", "3"]).unwrap();
        for spelled in ["0x07c4605e4504cc4f", "07:c4:60:5e:45:04:cc:4f", " 07C4605E 4504CC4F\n"] {
            assert_eq!(cid(&["decode", spelled, "--server-id-len", "3"]).unwrap(), plain, "{spelled}");
        }
    }

    #[test]
    fn mistakes_name_the_argument_and_the_remedy() {
        let short = "07c4605e4504cc4f";
        for (arguments, expected) in [
            (&["decode", "07:zz"][..], "CID: 'z' at position 4 is no hex digit: expected 0-9 and a-f"),
            (&["decode", " 0x0g"], "CID: 'g' at position 5 is no hex digit"),
            (&["decode", "07:c:46"], "CID: ':' at position 5 parts an octet"),
            (&["decode", "07c"], "CID: odd number of hex digits"),
            (&["decode", ""], "CID: empty: expected hex digits"),
            (&["decode", "0x"], "CID: empty"),
            (&["decode", "07aabb"], "CID: the first octet says that 7 octets follow it, 2 do: is it cut off?"),
            (&["decode", "07c4605e4504cc4faa"], "7 octets follow it, 8 do: give the first 8 octets only"),
            (&["decode", "1fc4605e"], "31 octets follow it, 3 do: that cannot be a length"),
            (&["decode", "e7c4605e4504cc4f"], "unroutable codepoint 7"),
            (&["decode", &"11".repeat(21)], "CID: 21 octets: a connection ID of QUIC version 1 has at most 20"),
            (&["decode", short], "leave 0 for the nonce, which takes at least 4: is the server ID shorter than 8?"),
            (
                &["decode", short, "--server-id-len", "0"],
                "--server-id-len: server ID of 0 octets is out of range 1..=15",
            ),
            (&["decode", short, "--server-id-len", "3", "--nonce-len", "3"], "--nonce-len: nonce of 3 octets"),
            (&["decode", short, "--server-id-len", "3", "--nonce-len", "5"], "has 8 octets, the configuration needs 9"),
            (&["decode", short, "--key", "abcd"], "--key: 2 octets: an AES-128 key has 16, 32 hex digits"),
            (&["decode", short, "--fleet", "--generation", "0"], "0 is not in 1.."),
            (&["decode", short, "--fleet", "--key", KEY], "cannot be used with"),
            (&["encode", "", "aabbccdd"], "SERVER_ID: empty"),
            (&["encode", "aa", "bb"], "NONCE: nonce of 1 octets is out of range 4..=18"),
            (
                &["encode", "00112233445566778899", "00112233445566778899"],
                "SERVER_ID and NONCE: server ID and nonce take 20",
            ),
            (&["encode", "aa", "bbccddee", "--config", "7"], "--config: configuration 7 is out of range 0..=6"),
            (&["encode", "aa", "bbccddee", "--random-bits", "32"], "32 is not in 0..=31"),
        ] {
            let error = cid(arguments).map_err(|error| format!("{error:#}")).unwrap_err();
            assert!(error.contains(expected), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn where_no_fleet_is_the_text_is_that_of_other_commands() {
        let error = fleet::root(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(error.starts_with("no fleet in /nonexistent: start one with `antiphon up FILE…`"), "{error}");
    }

    #[test]
    fn json_has_the_same_parts() {
        let args = CidDecodeArgs {
            cid: "50e37afbbb303e8e4beed1ce6b41856885".into(),
            key: CidKeyArgs { key: None, fleet: false, generation: None },
            server_id_len: 8,
            nonce_len: None,
            random_bits: false,
        };
        let taken = decode(&args, Some([0x11; 16]), Duration::from_secs(NOW + 1)).unwrap();
        let expected = json!({
            "configuration": 2,
            "encryption": "single-pass",
            "serverId": "00c001c1deadbeef",
            "nonce": "49d200123456789a",
            "antiphon": {
                "server": "3.7.1#deadbeef",
                "region": 3,
                "worker": 7,
                "shard": 1,
                "incarnation": 0xdead_beef_u32,
                "kind": "initial",
                "counter": 0x12_3456_789a_u64,
                "expiry": {"at": "2027-01-15T08:00:00Z", "inS": -1, "expired": true},
            },
        });
        assert_eq!(serde_json::to_value(&taken).unwrap(), expected);
    }
}
