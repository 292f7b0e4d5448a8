//! `antiphon keys`: API keys at every router, and the list that a fleet's directory keeps of them.
//!
//! A router in memory mode forgets keys when it stops. What `keys create` made is therefore also in `keys.json`, hashed
//! as routers store it, for the fleet to apply again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
    process::ExitCode,
};

use antiphon_crds::nearest;
use antiphon_proto::{
    api_key::{ApiKey, is_id},
    v1::{
        ApplyRequest, FleetStatusRequest, FleetStatusResponse, KeyRecord, ListKeysRequest, admin_client::AdminClient,
    },
};
use antiphon_runtime::pki::write_secret;
use anyhow::{Context as _, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::timeout;
use tonic::{Response, Status, transport::Channel};

use crate::present::out;
use crate::{
    args::{KeysArgs, KeysCommand},
    fleet::{Context, key_record, new_key},
    present, rotation,
    sessions::{Failed, PATIENCE, no_answer},
    status,
};

pub(crate) async fn run(args: &KeysArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let context = Context::load(dir)?;
    ensure!(!context.routers.is_empty(), "the fleet has no router");
    match &args.command {
        KeysCommand::Create { tenant, agent } => create(&context, dir, tenant, agent, json).await,
        KeysCommand::List => list(&context, json).await,
        KeysCommand::Revoke { id } => revoke(&context, dir, id, json).await,
        KeysCommand::Rotate(args) => rotation::rotate(args, dir, json).await,
        KeysCommand::Generations(args) => rotation::generations(args, dir, json).await,
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
    let agents: Vec<_> = agents.iter().map(in_default).collect();
    let known = if agents.is_empty() { Vec::new() } else { status::agents(context).await };
    for agent in agents.iter().filter(|agent| !is_known(agent, &known)) {
        let hint = nearest(agent, known.iter().map(String::as_str)).map(|near| format!(": did you mean {near}?"));
        eprintln!("warning: no agent {agent} has workers{}", hint.unwrap_or_default());
    }
    let key = new_key();
    let record = key_record(&key, tenant, agents);
    // Before any router has it: one that starts in between is told as well.
    change_stored(dir, |keys| keys.push(record.clone()))?;
    let request = ApplyRequest { keys: vec![record.clone()], ..ApplyRequest::default() };
    let failed = apply(context, &request).await;
    if failed.regions().len() == context.routers.len() {
        change_stored(dir, |keys| keys.retain(|stored| stored.id != record.id))?;
        bail!("no key was made, as no router took it ({failed})");
    }
    let shown = if json {
        let made = json!({
            "key": key.text(), "id": record.id, "tenant": record.tenant, "agents": record.agents,
            "missing": failed.regions(),
        });
        present::try_line(&serde_json::to_string_pretty(&made)?)
    } else {
        present::try_line(key.text())
    };
    if let Err(error) = shown {
        return Err(unseen(context, dir, &record.id, error).await);
    }
    if !json {
        eprintln!("shown once, store it now: for {}, tenant {tenant}", allowed(&record.agents));
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    present::error(&anyhow!(
        "the key does not work in every region ({failed}). A router gets it when `antiphon up` starts it again; \
         or revoke it (`antiphon keys revoke {}`) and create another when all routers answer",
        record.id
    ));
    Ok(ExitCode::FAILURE)
}

/// Whether `NAMESPACE/NAME` is one of these agents, or `NAMESPACE/*` has any of them.
fn is_known(agent: &str, known: &[String]) -> bool {
    match agent.strip_suffix('*') {
        Some(namespace) => known.iter().any(|known| known.starts_with(namespace)),
        None => known.iter().any(|known| known == agent),
    }
}

/// Revokes a key that could not be printed: nobody could ever use it.
async fn unseen(context: &Context, dir: &Path, id: &str, error: io::Error) -> anyhow::Error {
    let removed = ApplyRequest { removed_keys: vec![id.to_owned()], ..ApplyRequest::default() };
    let failed = apply(context, &removed).await;
    let forgotten = change_stored(dir, |keys| keys.retain(|stored| stored.id != id));
    let error = anyhow::Error::new(error);
    if failed.is_empty() && forgotten.is_ok() {
        return error.context("the new key could not be printed and was revoked");
    }
    error.context(format!("the new key could not be printed: revoke it with `antiphon keys revoke {id}`"))
}

async fn list(context: &Context, json: bool) -> anyhow::Result<ExitCode> {
    let (lists, failed) = lists(context).await;
    ensure!(!lists.is_empty(), "no router answers ({failed}): is the fleet running?");
    let (keys, differences) = merge(lists);
    if json {
        let keys: Vec<_> =
            keys.iter().map(|key| json!({"id": key.id, "tenant": key.tenant, "agents": key.agents})).collect();
        out!("{}", serde_json::to_string_pretty(&keys)?);
    } else if keys.is_empty() {
        eprintln!("no keys");
    } else {
        let rows = keys.iter().map(|key| vec![key.id.clone(), key.tenant.clone(), allowed(&key.agents)]);
        present::print(&present::table(&["ID", "TENANT", "AGENTS"], &[], rows));
    }
    if !failed.is_empty() {
        eprintln!("not every router answers ({failed}): its keys may differ");
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
        ensure!(failed.is_empty(), "no router that answers has key {id} ({failed})");
        bail!("there is no key {id}: `antiphon keys list` prints those that there are");
    }
    change_stored(dir, |keys| keys.retain(|stored| stored.id != id))?;
    let request = ApplyRequest { removed_keys: vec![id.to_owned()], ..ApplyRequest::default() };
    let failed = apply(context, &request).await;
    if json {
        out!("{}", serde_json::to_string_pretty(&json!({"revoked": id, "missing": failed.regions()}))?);
    }
    if failed.is_empty() {
        if !json {
            out!("revoked {id}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    present::error(&anyhow!(
        "key {id} is not revoked everywhere ({failed}). Such a router may accept it until it starts again: \
         run `antiphon keys revoke {id}` again when it answers"
    ));
    Ok(ExitCode::FAILURE)
}

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

/// Asks the router of every region at once.
pub(crate) async fn ask_all<T>(
    context: &Context,
    ask: impl AsyncFn(AdminClient<Channel>) -> Result<Response<T>, Status>,
) -> (Vec<(String, T)>, Failed) {
    let questions = context.routers.iter().map(async |router| {
        let answer = match context.admin(router) {
            Err(error) => Err(format!("{error:#}")),
            Ok(admin) => match timeout(PATIENCE, ask(admin)).await {
                Err(_) => Err(no_answer(PATIENCE)),
                Ok(answer) => answer.map(Response::into_inner).map_err(|status| what_happened(&status)),
            },
        };
        (router.region.clone(), answer)
    });
    let (mut answers, mut failed) = (Vec::new(), Failed::default());
    for (region, answer) in futures::future::join_all(questions).await {
        match answer {
            Ok(answer) => answers.push((region, answer)),
            Err(reason) => failed.add(&region, reason),
        }
    }
    (answers, failed)
}

/// The fleet as each router sees it that knows of its own region.
pub(crate) async fn statuses(context: &Context) -> (Vec<(String, FleetStatusResponse)>, Failed) {
    let (answers, mut failed) =
        ask_all(context, async |mut admin| admin.fleet_status(FleetStatusRequest {}).await).await;
    let knows_itself = |status: &FleetStatusResponse| status.regions.iter().any(|region| region.local);
    let (answers, empty): (Vec<_>, Vec<_>) = answers.into_iter().partition(|(_, status)| knows_itself(status));
    for (region, _) in empty {
        failed.add(&region, NO_RECORD);
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
        let sha256 = sha256.to_vec().into();
        Ok(KeyRecord { id: key.id, sha256, tenant: key.tenant, agents: key.agents, ..KeyRecord::default() })
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

/// What a router does that has just started and was not given its fleet yet.
pub(crate) const NO_RECORD: &str = "waits for its region record";
const FILE: &str = "keys.json";
const NEXT: &str = "keys.json.next";
const LOCK: &str = "keys.json.lock";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use antiphon_runtime::pki::FleetCa;

    use super::*;
    use crate::stand_in::{NOBODY, Told, context, with_router};

    fn record(id: u8, tenant: &str) -> KeyRecord {
        let id = format!("{id:012}");
        let (sha256, agents) = (vec![7; 32].into(), vec!["shop/*".into()]);
        KeyRecord { id, sha256, tenant: tenant.into(), agents, ..KeyRecord::default() }
    }

    #[test]
    fn stored_keys_are_hashes_that_only_their_owner_reads() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(stored(dir.path()).unwrap(), []);
        change_stored(dir.path(), |keys| keys.extend([record(1, "acme"), record(2, "beta")])).unwrap();
        change_stored(dir.path(), |keys| keys.retain(|key| key.tenant == "beta")).unwrap();
        assert_eq!(stored(dir.path()).unwrap(), [record(2, "beta")]);
        let file = fs::metadata(dir.path().join(FILE)).unwrap();
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        assert!(!dir.path().join(NEXT).exists());
    }

    #[test]
    fn agents_of_a_key_are_compared_with_those_that_there_are() {
        let known = ["shop/desk".to_owned()];
        let found = ["shop/desk", "shop/*", "shop/desks", "hotel/*"].map(|agent| is_known(agent, &known));
        assert_eq!(found, [true, true, false, false]);
    }

    #[test]
    fn commands_at_once_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for id in 0..8 {
                let dir = dir.path();
                scope.spawn(move || change_stored(dir, |keys| keys.push(record(id, "acme"))).unwrap());
            }
        });
        assert_eq!(stored(dir.path()).unwrap().len(), 8);
    }

    #[test]
    fn a_damaged_list_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let short = r#"[{"id": "000000000001", "sha256": "07", "tenant": "acme", "agents": []}]"#;
        for (text, why) in [("[", "EOF"), (r#"[{"key": 1}]"#, "unknown field"), (short, "sha256 is not 64 hex digits")]
        {
            fs::write(dir.path().join(FILE), text).unwrap();
            let error = change_stored(dir.path(), |keys| keys.clear()).unwrap_err();
            let error = format!("{error:#}");
            assert!(error.contains("keys.json is not a fleet's list of keys") && error.contains(why), "{error}");
            assert_eq!(fs::read_to_string(dir.path().join(FILE)).unwrap(), text);
        }
    }

    #[test]
    fn lists_are_merged_and_differences_named() {
        let of = |region: &str, ids: &[u8]| (region.to_owned(), ids.iter().map(|id| record(*id, "acme")).collect());
        let (keys, differences) = merge(vec![of("osaka", &[1, 2]), of("quito", &[2]), of("oregon", &[1, 2])]);
        assert_eq!(keys, [record(1, "acme"), record(2, "acme")]);
        assert_eq!(differences, ["the router of quito does not have 000000000001"]);
    }

    #[tokio::test]
    async fn a_key_is_created_listed_and_revoked_everywhere() {
        let (dir, ca, told) = (tempfile::tempdir().unwrap(), FleetCa::from_seed(&[3; 32]).unwrap(), Told::default());
        with_router(&ca, told.clone(), async |address| {
            let context = context(&dir, &ca, &[address]);
            let made = create(&context, dir.path(), "acme", &["desk".into(), "shop/*".into()], false).await.unwrap();
            assert_eq!(made, ExitCode::SUCCESS);
            let kept = stored(dir.path()).unwrap();
            assert_eq!(kept[0].agents, ["default/desk", "shop/*"]);
            assert_eq!(kept, told.keys(), "what a router has is what is kept");
            let revoked = revoke(&context, dir.path(), &kept[0].id, false).await.unwrap();
            assert_eq!((revoked, told.ids(), stored(dir.path()).unwrap()), (ExitCode::SUCCESS, Vec::new(), Vec::new()));
            let again = revoke(&context, dir.path(), &kept[0].id, false).await.unwrap_err().to_string();
            assert!(again.starts_with(&format!("there is no key {}", kept[0].id)), "{again}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_router_that_is_away_fails_the_command_but_not_the_others() {
        let (dir, ca, told) = (tempfile::tempdir().unwrap(), FleetCa::from_seed(&[3; 32]).unwrap(), Told::default());
        with_router(&ca, told.clone(), async |address| {
            let context = context(&dir, &ca, &[address, NOBODY.into()]);
            let made = create(&context, dir.path(), "acme", &[], false).await.unwrap();
            assert_eq!(made, ExitCode::FAILURE);
            let kept = stored(dir.path()).unwrap();
            assert_eq!(told.ids(), [kept[0].id.clone()]);
            assert_eq!(list(&context, false).await.unwrap(), ExitCode::SUCCESS);
            let unknown = revoke(&context, dir.path(), "000000000000", false).await.unwrap_err().to_string();
            assert!(unknown.starts_with("no router that answers has key 000000000000 (region-1: "), "{unknown}");
            let revoked = revoke(&context, dir.path(), &kept[0].id, false).await.unwrap();
            assert_eq!((revoked, told.ids(), stored(dir.path()).unwrap()), (ExitCode::FAILURE, Vec::new(), Vec::new()));
        })
        .await;
    }

    #[tokio::test]
    async fn a_key_that_no_router_takes_is_not_kept() {
        let (dir, ca, told) = (tempfile::tempdir().unwrap(), FleetCa::from_seed(&[3; 32]).unwrap(), Told::default());
        with_router(&ca, told.clone(), async |address| {
            let context = context(&dir, &ca, &[address]);
            let error = create(&context, dir.path(), "refused", &[], false).await.unwrap_err().to_string();
            assert_eq!(error, "no key was made, as no router took it (region-0: no such tenant)");
        })
        .await;
        let away = context(&dir, &ca, &[NOBODY.into()]);
        let error = create(&away, dir.path(), "acme", &[], false).await.unwrap_err().to_string();
        assert!(error.starts_with("no key was made") && error.contains("refused"), "{error}");
        assert_eq!(stored(dir.path()).unwrap(), []);
        let error = list(&away, false).await.unwrap_err().to_string();
        assert!(error.ends_with("is the fleet running?"), "{error}");
    }

    #[tokio::test]
    async fn only_what_can_be_revoked_is() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), FleetCa::from_seed(&[3; 32]).unwrap());
        let context = context(&dir, &ca, &[NOBODY.into()]);
        let own = new_key();
        fs::write(&context.api_key_file, own.text()).unwrap();
        for id in [own.id(), own.text()] {
            let error = revoke(&context, dir.path(), id, false).await.unwrap_err().to_string();
            assert!(error.contains("is the fleet's own key"), "{error}");
            assert!(!error.contains(own.text()), "a secret is not repeated");
        }
        let error = revoke(&context, dir.path(), "nope", false).await.unwrap_err().to_string();
        assert!(error.starts_with("not the public part of a key"), "{error}");
    }
}
