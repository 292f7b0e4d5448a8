//! `antiphon sessions`: live sessions of all regions, as any one router lists them.

use std::{
    path::Path,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use antiphon_client::{Router, RouterError};
use antiphon_proto::{ticket::codec_label, v1::SessionSummary};
use anyhow::{bail, ensure};
use serde::Serialize;
use tokio::time::timeout;

use crate::{args::SessionsArgs, fleet::Context, present};

pub(crate) async fn run(args: &SessionsArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let routers = routers(&Context::load(dir)?, args.api_key.as_deref())?;
    let asked = in_turn(routers, async |router| router.list(args.limit).await).await?;
    let Some(sessions) = asked.answer else {
        bail!("no router answers ({}): is the fleet running?", asked.silent.join("; "));
    };
    for silent in &asked.silent {
        eprintln!("{silent}; calls in its region may be missing here");
    }
    if json {
        let sessions: Vec<_> = sessions.iter().map(Listed::of).collect();
        println!("{}", serde_json::to_string_pretty(&sessions)?);
    } else if sessions.is_empty() {
        eprintln!("no sessions");
    } else {
        let now = SystemTime::now();
        present::print(&present::table(&HEADER, &RIGHT, sessions.iter().map(|session| row(session, now))));
    }
    Ok(ExitCode::SUCCESS)
}

/// Clients of all routers, each with its region's name.
pub(crate) fn routers(context: &Context, key: Option<&str>) -> anyhow::Result<Vec<(String, Router)>> {
    ensure!(!context.routers.is_empty(), "the fleet has no router");
    let client = |router| context.client(router, key);
    context.routers.iter().map(|router| Ok((router.region.clone(), client(router)?))).collect()
}

/// What asking one router after the other came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Asked<T> {
    /// The first answer; `None` if no router has one.
    pub(crate) answer: Option<T>,
    /// Who did not answer before that, and why: a line for each.
    pub(crate) silent: Vec<String>,
}

/// Asks routers until one has an answer. One that does not know, or does not answer, leaves the question to the next.
///
/// # Errors
/// What every router would say again: the key is refused, the request is wrong.
pub(crate) async fn in_turn<R, T>(
    routers: impl IntoIterator<Item = (String, R)>,
    ask: impl AsyncFn(R) -> Result<T, RouterError>,
) -> Result<Asked<T>, RouterError> {
    let mut silent = Vec::new();
    for (region, router) in routers {
        match timeout(PATIENCE, ask(router)).await {
            Ok(Ok(answer)) => return Ok(Asked { answer: Some(answer), silent }),
            Ok(Err(RouterError::NotFound(_))) => {}
            Ok(Err(error @ RouterError::Unavailable { .. })) => silent.push(format!("{region}: {error}")),
            Ok(Err(error)) => return Err(error),
            Err(_) => silent.push(format!("{region}: the router gives no answer within {} s", PATIENCE.as_secs())),
        }
    }
    Ok(Asked { answer: None, silent })
}

/// One session for machines, in the form of `GET /v1/sessions`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed<'a> {
    session: &'a str,
    agent: &'a str,
    region: &'a str,
    worker: &'a str,
    state: &'a str,
    epoch: u32,
    since: Option<String>,
    turns: u32,
    relay: u32,
    codec: &'static str,
}

impl<'a> Listed<'a> {
    fn of(session: &'a SessionSummary) -> Self {
        Self {
            session: &session.session,
            agent: &session.agent,
            region: &session.region,
            worker: &session.worker,
            state: &session.state,
            epoch: session.epoch,
            since: session.since.map(|since| since.to_string()),
            turns: session.turns,
            relay: session.relay,
            codec: codec_label(session.codec()).unwrap_or("unspecified"),
        }
    }
}

fn row(session: &SessionSummary, now: SystemTime) -> Vec<String> {
    let since = session.since.and_then(|since| SystemTime::try_from(since).ok());
    // Clocks differ: a session of the near future has just begun.
    let lasted = since.map(|since| now.duration_since(since).unwrap_or_default());
    vec![
        session.session.clone(),
        session.agent.clone(),
        session.region.clone(),
        session.worker.clone(),
        session.state.clone(),
        session.epoch.to_string(),
        lasted.map_or("-".into(), age),
        session.turns.to_string(),
        if session.relay == 0 { "-".into() } else { session.relay.to_string() },
        codec_label(session.codec()).unwrap_or("-").into(),
    ]
}

/// `12s`, `3m05s`, `2h07m`, `5d03h`: whole units, the second one with two digits.
pub(crate) fn age(age: Duration) -> String {
    let s = age.as_secs();
    let (minutes, hours, days) = (s / 60, s / 3600, s / 86_400);
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{minutes}m{:02}s", s % 60),
        3600..86_400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// Longest wait for one router; it waits for other regions itself.
const PATIENCE: Duration = Duration::from_secs(5);
const HEADER: [&str; 10] = ["SESSION", "AGENT", "REGION", "WORKER", "STATE", "EPOCH", "AGE", "TURNS", "RELAY", "CODEC"];
const RIGHT: [usize; 4] = [5, 6, 7, 8];
