//! `antiphon keys rotate` and `antiphon keys generations`: moving a fleet to its next generation of keys.
//!
//! Regions do it themselves, step by step, once they are told which generation is wanted; this command tells them and
//! watches. Being interrupted, or run twice, changes nothing: whoever runs it again sees where the fleet is.

use std::{path::Path, process::ExitCode, time::Duration};

use antiphon_core::generation::WINDOW;
use antiphon_proto::v1::{ApplyRequest, FleetStatusResponse};
use anyhow::{bail, ensure};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::present::out;
use crate::{
    args::{GenerationsArgs, RotateArgs, RotateUntil},
    fleet::Context,
    keys::{NO_RECORD, ask_all, statuses},
    present::{self, Progress},
    sessions::Failed,
};

pub(crate) async fn generations(args: &GenerationsArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let context = Context::load(dir)?;
    let (mut regions, mut failed) = look(&context).await?;
    let target = wanted(&regions);
    let mut ended = true;
    if args.wait {
        (regions, ended) = watch(&context, target, RotateUntil::Unused, args.patience, json).await?;
        failed = look(&context).await?.1;
    }
    show(&regions, json.then(|| json!({"missing": failed.regions(), "finished": is_finished(&regions, target)})))?;
    if !ended && !json {
        eprintln!("not there yet: {MOVES}");
    }
    if failed.is_empty() {
        return Ok(if ended { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    eprintln!("not every router answers ({failed}): what is known of its region comes from it alone");
    Ok(ExitCode::FAILURE)
}

pub(crate) async fn rotate(args: &RotateArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let context = Context::load(dir)?;
    let (regions, failed) = look(&context).await?;
    ensure!(
        failed.is_empty(),
        "nothing was changed: every region has to take part, and not every router answers ({failed})"
    );
    let target = match next(&regions) {
        Next::Begin(target) => {
            if let Some(users) = users_of_too_old(&regions, target) {
                bail!(
                    "nothing was changed: {WINDOW} generations are there at a time at most, and {users}. {MOVES}: \
                     wait with `antiphon keys generations --wait`"
                );
            }
            target
        }
        Next::Finish(target) => {
            eprintln!("the rotation to generation {target} has begun already: this goes on with it");
            target
        }
    };
    tell(&context, target).await?;
    let until = if args.no_wait { None } else { Some(args.until) };
    let (regions, finished) = match until {
        None => (look(&context).await?.0, true),
        Some(until) => watch(&context, target, until, args.patience(), json).await?,
    };
    let minted = regions.iter().all(|region| region.minting >= target);
    show(
        &regions,
        json.then(|| json!({"generation": target, "minting": minted, "finished": is_finished(&regions, target)})),
    )?;
    if !json {
        eprintln!("{}", advice(target, until, finished));
    }
    Ok(if finished { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn advice(target: u32, until: Option<RotateUntil>, finished: bool) -> String {
    match (until, finished) {
        (None, _) => format!("generation {target} is wanted; `antiphon keys generations` shows how far regions are"),
        (Some(RotateUntil::Minted), true) => {
            format!("everything new uses generation {target}. {MOVES}: `antiphon keys generations --wait` waits for it")
        }
        (Some(RotateUntil::Unused), true) => format!("generation {target} is all that is used"),
        (Some(_), false) => format!(
            "not there yet: what holds it up is named above. The fleet goes on by itself; \
             `antiphon keys rotate` waits again for generation {target}"
        ),
    }
}

/// Tells every router; regions that are there already take it as nothing new.
async fn tell(context: &Context, target: u32) -> anyhow::Result<()> {
    let request = ApplyRequest { key_generation: target, ..ApplyRequest::default() };
    let (told, failed) = ask_all(context, async |mut admin| admin.apply(request.clone()).await).await;
    if failed.is_empty() {
        return Ok(());
    }
    if told.is_empty() {
        bail!("no router takes generation {target} ({failed})");
    }
    bail!(
        "not every router takes generation {target} ({failed}). Nothing new uses it before all do: run \
         `antiphon keys rotate` again, after `antiphon keys generations --wait` if too old a generation is in use"
    )
}

/// Looks until the target is reached or patience ends; says what changes. Returns the last look and whether it is.
async fn watch(
    context: &Context,
    target: u32,
    until: RotateUntil,
    patience: Duration,
    json: bool,
) -> anyhow::Result<(Vec<RegionKeys>, bool)> {
    let progress = Progress::new(json);
    let deadline = Instant::now() + patience;
    let mut before: Vec<RegionKeys> = Vec::new();
    loop {
        let (regions, failed) = look(context).await?;
        for change in changes(&before, &regions, target) {
            progress.note(&change);
        }
        progress.say(waiting(&regions, &failed, target));
        let there = failed.is_empty() && regions.iter().all(|region| region.is_there(target, until));
        if there || Instant::now() > deadline {
            progress.clear();
            return Ok((regions, there));
        }
        before = regions;
        tokio::time::sleep(LOOK).await;
    }
}

/// Where one region is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct RegionKeys {
    region: String,
    wanted: u32,
    loaded: Vec<u32>,
    minting: u32,
    /// 0: nothing is in use.
    oldest: u32,
    held_up_by: Vec<String>,
}

impl RegionKeys {
    fn is_there(&self, target: u32, until: RotateUntil) -> bool {
        self.minting >= target
            && match until {
                RotateUntil::Minted => true,
                RotateUntil::Unused => self.oldest == 0 || self.oldest >= target,
            }
    }

    fn has_loaded(&self, generation: u32) -> bool {
        self.loaded.contains(&generation)
    }

    fn row(&self) -> Vec<String> {
        let or_dash = |generation: u32| if generation == 0 { "-".into() } else { generation.to_string() };
        let loaded: Vec<_> = self.loaded.iter().map(ToString::to_string).collect();
        vec![
            self.region.clone(),
            or_dash(self.wanted),
            if loaded.is_empty() { "-".into() } else { loaded.join(", ") },
            or_dash(self.minting),
            or_dash(self.oldest),
            if self.held_up_by.is_empty() { "-".into() } else { self.held_up_by.join("\n") },
        ]
    }

    fn json(&self) -> Value {
        json!({
            "region": self.region, "wanted": self.wanted, "loaded": self.loaded, "minting": self.minting,
            "oldestInUse": (self.oldest > 0).then_some(self.oldest), "heldUpBy": self.held_up_by,
        })
    }
}

/// Every region as its own router sees it; one whose router is away, as others last heard it.
async fn look(context: &Context) -> anyhow::Result<(Vec<RegionKeys>, Failed)> {
    ensure!(!context.routers.is_empty(), "the fleet has no router");
    let (answers, failed) = statuses(context).await;
    if answers.is_empty() {
        let is_empty = failed.each().any(|(_, reason)| reason == NO_RECORD);
        let hint = if is_empty { "there are no keys before" } else { "is the fleet running?" };
        bail!("no router can say which keys there are ({failed}): {hint}");
    }
    Ok((regions(&answers), failed))
}

/// The generation that regions are to move to, or are at.
fn wanted(regions: &[RegionKeys]) -> u32 {
    regions.iter().map(|region| region.wanted.max(region.minting)).max().unwrap_or(0).max(1)
}

/// Whether nothing older is in use anywhere and nothing is left to do.
fn is_finished(regions: &[RegionKeys], target: u32) -> bool {
    regions.iter().all(|region| region.is_there(target, RotateUntil::Unused) && region.held_up_by.is_empty())
}

/// Who uses what would have to be unloaded for another generation: `frankfurt still uses generation 1`.
fn users_of_too_old(regions: &[RegionKeys], target: u32) -> Option<String> {
    let floor = (target + 1).saturating_sub(WINDOW);
    let users = regions.iter().filter(|region| (1..floor).contains(&region.oldest));
    let users: Vec<_> =
        users.map(|region| format!("{} still uses generation {}", region.region, region.oldest)).collect();
    (!users.is_empty()).then(|| users.join(", "))
}

/// What to do about relays and workers that stand in the way and do not come back.
fn gone_hint(regions: &[RegionKeys]) -> Option<&'static str> {
    let is_member = |who: &str| !regions.iter().any(|region| region.region == who);
    let absent = |what: &str| what == "is not heard" || what.starts_with("has not loaded");
    let causes = regions.iter().flat_map(|region| &region.held_up_by).filter_map(|cause| cause.split_once(": "));
    let mut absent = causes.filter(|(who, what)| is_member(who) && absent(what));
    absent
        .next()
        .map(|_| "of one that does not come back say so: `antiphon relays gone NAME` or `antiphon workers gone NAME`")
}

fn regions(answers: &[(String, FleetStatusResponse)]) -> Vec<RegionKeys> {
    let mut found: Vec<RegionKeys> = Vec::new();
    // What is said by the region itself comes first and wins.
    for local in [true, false] {
        for (_, answer) in answers {
            for region in answer.regions.iter().filter(|region| region.local == local) {
                let Some(digest) = &region.digest else { continue };
                if found.iter().any(|known| known.region == digest.region) {
                    continue;
                }
                found.push(RegionKeys {
                    region: digest.region.clone(),
                    wanted: digest.wanted_generation,
                    loaded: digest.loaded_generations.clone(),
                    minting: digest.minting_generation,
                    oldest: digest.oldest_generation,
                    held_up_by: if local { answer.rotation_held_up_by.clone() } else { Vec::new() },
                });
            }
        }
    }
    found.sort_by(|a, b| a.region.cmp(&b.region));
    found
}

/// Which generation to move to.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// A new one.
    Begin(u32),
    /// One that some region was told of, and that not all use for what is new.
    Finish(u32),
}

fn next(regions: &[RegionKeys]) -> Next {
    let wanted = wanted(regions);
    // A fleet that was never rotated may have nothing to say: the first generation needs no telling.
    let settled = |region: &RegionKeys| region.wanted.max(1) == wanted && region.minting.max(1) == wanted;
    if regions.iter().all(settled) { Next::Begin(wanted + 1) } else { Next::Finish(wanted) }
}

/// What has happened between two looks.
fn changes(before: &[RegionKeys], after: &[RegionKeys], target: u32) -> Vec<String> {
    type Done = fn(&RegionKeys, u32) -> bool;
    let steps: [(&str, &str, Done); 3] = [
        ("has loaded generation", "", |region, target| region.has_loaded(target)),
        ("uses generation", " for everything new", |region, target| region.minting >= target),
        ("uses nothing older than generation", "", |region, target| region.is_there(target, RotateUntil::Unused)),
    ];
    let mut said = Vec::new();
    for region in after {
        let old = before.iter().find(|old| old.region == region.region);
        for (what, more, done) in steps {
            if done(region, target) && !old.is_some_and(|old| done(old, target)) {
                said.push(format!("{} {what} {target}{more}", region.region));
            }
        }
    }
    said
}

/// One line on what is still to come.
fn waiting(regions: &[RegionKeys], failed: &Failed, target: u32) -> String {
    if !failed.is_empty() {
        return format!("generation {target}: waiting for routers ({failed})");
    }
    let behind: Vec<_> = regions.iter().filter(|region| !region.held_up_by.is_empty()).collect();
    match behind.first() {
        None => format!("generation {target}: regions agreeing"),
        Some(first) => {
            let more =
                if behind.len() > 1 { format!(" (and {} more regions)", behind.len() - 1) } else { String::new() };
            format!("generation {target}: {} waits for {}{more}", first.region, first.held_up_by.join("; "))
        }
    }
}

fn show(regions: &[RegionKeys], json: Option<Value>) -> anyhow::Result<()> {
    if let Some(mut json) = json {
        json["regions"] = regions.iter().map(RegionKeys::json).collect();
        out!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(());
    }
    present::print(&present::table(&HEADER, &[1, 3, 4], regions.iter().map(RegionKeys::row)));
    if let Some(hint) = gone_hint(regions) {
        eprintln!("{hint}");
    }
    Ok(())
}

const MOVES: &str = "Live calls move to a new generation by themselves within three lifetimes of connection IDs \
                     (--cid-lifetime), which is 30 minutes unless set otherwise";

const HEADER: [&str; 6] = ["REGION", "WANTED", "LOADED", "NEW USES", "OLDEST IN USE", "HELD UP BY"];
const LOOK: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests;
