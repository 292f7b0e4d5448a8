//! `antiphon keys`: API keys at every router, and the list that a fleet's directory keeps of them.
//!
//! A router in memory mode forgets keys when it stops. What `keys create` made is therefore also in `keys.json`, hashed
//! as routers store it, for the fleet to apply again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use antiphon_proto::{
    api_key::{ApiKey, is_id},
    v1::{ApplyRequest, KeyRecord, ListKeysRequest, admin_client::AdminClient},
};
use antiphon_runtime::pki::write_secret;
use anyhow::{Context as _, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::timeout;
use tonic::{Response, Status, transport::Channel};

use crate::{
    args::{KeysArgs, KeysCommand},
    fleet::{Context, key_record, new_key},
    present,
};

pub(crate) async fn run(args: &KeysArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let context = Context::load(dir)?;
    ensure!(!context.routers.is_empty(), "the fleet has no router");
    match &args.command {
        KeysCommand::Create { tenant, agent } => create(&context, dir, tenant, agent, json).await,
        KeysCommand::List => list(&context, json).await,
        KeysCommand::Revoke { id } => revoke(&context, dir, id, json).await,
    }
}

async fn create(
    context: &Context,
    dir: &Path,
    tenant: &str,
    agents: &[String],
    json: bool,
) -> anyhow::Result<ExitCode> {
    let in_default = |agent: &String| if agent.contains('/') { agent.clone() } else { format!("default/{agent}") };
    let key = new_key();
    let record = key_record(&key, tenant, agents.iter().map(in_default).collect());
    // Before any router has it: one that starts in between is told as well.
    change_stored(dir, |keys| keys.push(record.clone()))?;
    let request = ApplyRequest { keys: vec![record.clone()], ..ApplyRequest::default() };
    let failed = apply(context, &request).await;
    if failed.len() == context.routers.len() {
        change_stored(dir, |keys| keys.retain(|stored| stored.id != record.id))?;
        bail!("no key was made, as no router took it: {}", reasons(&failed));
    }
    if json {
        let missing: Vec<_> = failed.iter().map(|(region, _)| region).collect();
        let made = json!({
            "key": key.text(), "id": record.id, "tenant": record.tenant, "agents": record.agents, "missing": missing,
        });
        println!("{}", serde_json::to_string_pretty(&made)?);
    } else {
        println!("{}", key.text());
        eprintln!("shown once, store it now: for {}, tenant {tenant}", allowed(&record.agents));
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    present::error(&anyhow!(
        "the key works, but not in every region: {}. A router gets it when `antiphon up` starts it again; \
         or revoke it (`antiphon keys revoke {}`) and create another when all routers answer",
        reasons(&failed),
        record.id
    ));
    Ok(ExitCode::FAILURE)
}

async fn list(context: &Context, json: bool) -> anyhow::Result<ExitCode> {
    let (lists, failed) = lists(context).await;
    ensure!(!lists.is_empty(), "no router answers: {}", reasons(&failed));
    let (keys, differences) = merge(lists);
    if json {
        let keys: Vec<_> =
            keys.iter().map(|key| json!({"id": key.id, "tenant": key.tenant, "agents": key.agents})).collect();
        println!("{}", serde_json::to_string_pretty(&keys)?);
    } else if keys.is_empty() {
        eprintln!("no keys");
    } else {
        let rows = keys.iter().map(|key| vec![key.id.clone(), key.tenant.clone(), allowed(&key.agents)]);
        present::print(&present::table(&["ID", "TENANT", "AGENTS"], &[], rows));
    }
    for (region, reason) in &failed {
        eprintln!("router of {region} not asked: {reason}");
    }
    for difference in differences {
        eprintln!("{difference}");
    }
    Ok(ExitCode::SUCCESS)
}

async fn revoke(context: &Context, dir: &Path, id: &str, json: bool) -> anyhow::Result<ExitCode> {
    // Who found a key where it should not be has the whole of it.
    let whole = ApiKey::parse(id.trim()).ok();
    let id = whole.as_ref().map_or_else(|| id.trim(), ApiKey::id);
    ensure!(
        is_id(id),
        "not the public part of a key: expected 12 characters of 0-9 and a-z, as `antiphon keys list` prints them"
    );
    if context.api_key().is_ok_and(|own| own.id() == id) {
        let file = context.api_key_file.display();
        bail!(
            "{id} is the fleet's own key, which `antiphon` itself uses: for another one, stop the fleet and remove {file}"
        );
    }
    let (lists, failed) = lists(context).await;
    let has_it = |keys: &[KeyRecord]| keys.iter().any(|key| key.id == id);
    if !has_it(&stored(dir)?) && !lists.iter().any(|(_, keys)| has_it(keys)) {
        ensure!(failed.is_empty(), "no router that answers has key {id}: {}", reasons(&failed));
        bail!("there is no key {id}: `antiphon keys list` prints those that there are");
    }
    change_stored(dir, |keys| keys.retain(|stored| stored.id != id))?;
    let request = ApplyRequest { removed_keys: vec![id.to_owned()], ..ApplyRequest::default() };
    let failed = apply(context, &request).await;
    if json {
        let missing: Vec<_> = failed.iter().map(|(region, _)| region).collect();
        println!("{}", serde_json::to_string_pretty(&json!({"revoked": id, "missing": missing}))?);
    }
    if failed.is_empty() {
        if !json {
            println!("revoked {id}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    present::error(&anyhow!(
        "key {id} is not revoked everywhere: {}. Such a router may take it until it starts again: \
         run `antiphon keys revoke {id}` again when it answers",
        reasons(&failed)
    ));
    Ok(ExitCode::FAILURE)
}

/// Region and reason of each router that did not do as asked.
type Failed = Vec<(String, String)>;

/// Tells every router at once.
async fn apply(context: &Context, request: &ApplyRequest) -> Failed {
    let (_, failed) = ask_all(context, async |mut admin| admin.apply(request.clone()).await).await;
    failed
}

/// The keys of every router that answers.
async fn lists(context: &Context) -> (Vec<(String, Vec<KeyRecord>)>, Failed) {
    let (lists, failed) = ask_all(context, async |mut admin| admin.list_keys(ListKeysRequest {}).await).await;
    (lists.into_iter().map(|(region, list)| (region, list.keys)).collect(), failed)
}

async fn ask_all<T>(
    context: &Context,
    ask: impl AsyncFn(AdminClient<Channel>) -> Result<Response<T>, Status>,
) -> (Vec<(String, T)>, Failed) {
    let questions = context.routers.iter().map(async |router| {
        let answer = match context.admin(router) {
            Err(error) => Err(format!("{error:#}")),
            Ok(admin) => match timeout(PATIENCE, ask(admin)).await {
                Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
                Ok(answer) => answer.map(Response::into_inner).map_err(|status| what_happened(&status)),
            },
        };
        (router.region.clone(), answer)
    });
    let (mut answers, mut failed) = (Vec::new(), Failed::new());
    for (region, answer) in futures::future::join_all(questions).await {
        match answer {
            Ok(answer) => answers.push((region, answer)),
            Err(reason) => failed.push((region, reason)),
        }
    }
    (answers, failed)
}

/// A transport error's own text says nothing; its innermost cause does.
fn what_happened(status: &Status) -> String {
    let mut source = std::error::Error::source(status);
    let mut text = status.message().to_owned();
    while let Some(error) = source {
        text = error.to_string();
        source = error.source();
    }
    text
}

/// `frankfurt: reason; virginia: reason`, regions with the same reason together.
fn reasons(failed: &[(String, String)]) -> String {
    let mut regions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (region, reason) in failed {
        regions.entry(reason).or_default().push(region);
    }
    let parts: Vec<_> = regions.iter().map(|(reason, of)| format!("router of {}: {reason}", of.join(", "))).collect();
    parts.join("; ")
}

/// All keys by tenant and id, and a line for each router that lacks one.
fn merge(lists: Vec<(String, Vec<KeyRecord>)>) -> (Vec<KeyRecord>, Vec<String>) {
    let mut all: BTreeMap<(String, String), KeyRecord> = BTreeMap::new();
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (region, keys) in lists {
        seen.entry(region.clone()).or_default().extend(keys.iter().map(|key| key.id.clone()));
        all.extend(keys.into_iter().map(|key| ((key.tenant.clone(), key.id.clone()), key)));
    }
    let keys: Vec<_> = all.into_values().collect();
    let lacking = |(region, has): (&String, &BTreeSet<String>)| {
        let lacks: Vec<_> = keys.iter().map(|key| key.id.as_str()).filter(|id| !has.contains(*id)).collect();
        (!lacks.is_empty()).then(|| format!("the router of {region} does not have {}", lacks.join(", ")))
    };
    let differences = seen.iter().filter_map(lacking).collect();
    (keys, differences)
}

fn allowed(agents: &[String]) -> String {
    if agents.is_empty() { "all agents".into() } else { agents.join(", ") }
}

/// One key in `keys.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StoredKey {
    id: String,
    /// Of the whole key, 64 hex digits.
    sha256: String,
    tenant: String,
    agents: Vec<String>,
}

/// The keys that `keys create` made in a fleet's directory and nobody revoked; the fleet's own is not among them.
///
/// # Errors
/// The file is not readable or not what it should be.
pub(crate) fn stored(dir: &Path) -> anyhow::Result<Vec<KeyRecord>> {
    let path = dir.join(FILE);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.with_context(|| path.display().to_string())?,
    };
    let record = |key: StoredKey| {
        let sha256 = <[u8; 32]>::try_from(hex::decode(&key.sha256).unwrap_or_default());
        let sha256 = sha256.map_err(|_| anyhow!("key {}: sha256 is not 64 hex digits", key.id))?;
        Ok(KeyRecord { id: key.id, sha256: sha256.to_vec().into(), tenant: key.tenant, agents: key.agents })
    };
    let keys: anyhow::Result<Vec<StoredKey>> = serde_json::from_str(&text).map_err(Into::into);
    let keys: anyhow::Result<Vec<_>> = keys.and_then(|keys| keys.into_iter().map(record).collect());
    keys.with_context(|| format!("{} is not a fleet's list of keys", path.display()))
}

/// Replaces `keys.json` as a whole; two commands at once take turns.
fn change_stored(dir: &Path, change: impl FnOnce(&mut Vec<KeyRecord>)) -> anyhow::Result<()> {
    let path = dir.join(FILE);
    let store = || -> anyhow::Result<()> {
        let lock = fs::OpenOptions::new().create(true).append(true).open(dir.join(LOCK))?;
        lock.lock()?;
        let mut keys = stored(dir)?;
        change(&mut keys);
        let keys = keys.into_iter().map(|key| StoredKey {
            id: key.id,
            sha256: hex::encode(&key.sha256),
            tenant: key.tenant,
            agents: key.agents,
        });
        let text = serde_json::to_string_pretty(&keys.collect::<Vec<_>>())?;
        let next = dir.join(NEXT);
        write_secret(&next, text.as_bytes())?;
        Ok(fs::rename(&next, &path)?)
    };
    store().with_context(|| path.display().to_string())
}

const PATIENCE: Duration = Duration::from_secs(5);
const FILE: &str = "keys.json";
const NEXT: &str = "keys.json.next";
const LOCK: &str = "keys.json.lock";
