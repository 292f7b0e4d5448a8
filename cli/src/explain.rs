//! `antiphon explain`: why a session is where it is, and which way its packets go.

mod path;

use std::{collections::BTreeMap, path::Path, process::ExitCode, time::SystemTime};

use antiphon_core::id::SessionId;
use antiphon_proto::v1::{Candidate, Explanation};
use anyhow::{anyhow, bail};
use serde::Serialize;

use crate::present::out;
use crate::{
    args::ExplainArgs,
    fleet::Context,
    present,
    sessions::{Failed, PATIENCE, age, in_turn, routers},
    status,
};

pub(crate) async fn run(args: &ExplainArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let session = args.session.trim().parse::<SessionId>();
    let session = session.map_err(|error| anyhow!("{error}, as `antiphon sessions` lists them"))?.to_string();
    let context = Context::load(dir)?;
    let routers = routers(&context, args.key.given()?.as_deref())?;
    if args.path {
        let asked = in_turn(routers, PATIENCE, async |router| router.path(&session).await).await?;
        let Some(found) = asked.answer else {
            bail!("{}", not_live(&session, &asked.silent));
        };
        let relays = if json { BTreeMap::new() } else { status::relay_names(&context).await };
        path::show(&found, &relays, json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let asked = in_turn(routers, PATIENCE, async |router| router.explain(&session).await).await?;
    let Some(explanation) = asked.answer else {
        bail!("{}", unknown(&session, &asked.silent));
    };
    if json {
        out!("{}", serde_json::to_string_pretty(&Explained::of(&explanation))?);
    } else {
        print!("{}", headline(&explanation, SystemTime::now()));
        out!();
        present::print(&candidates(&explanation.candidates));
    }
    Ok(ExitCode::SUCCESS)
}

/// Only the region that placed a session remembers why, and only for a while.
fn unknown(session: &str, silent: &Failed) -> String {
    if silent.is_empty() {
        return format!(
            "no router remembers session {session}: it was placed too long ago or before a router's start, \
             is another tenant's, or was never placed"
        );
    }
    format!("no router that answers remembers session {session} ({})", silent)
}

/// Only the worker that has a session knows its way.
fn not_live(session: &str, silent: &Failed) -> String {
    let hint = "the way of packets is known while a call lives, and to its tenant; `antiphon sessions` lists live ones";
    if silent.is_empty() {
        return format!("session {session} is not live: {hint}");
    }
    format!("no router that answers finds session {session} alive ({silent}): {hint}")
}

/// Where, why, when, at which attempt.
fn headline(explanation: &Explanation, now: SystemTime) -> String {
    let Explanation { session, agent, region, worker, reason, attempts, .. } = explanation;
    let decided = explanation.decided_at.and_then(|at| SystemTime::try_from(at).ok());
    let decided = decided.map_or("-".into(), |at| {
        let ago = age(now.duration_since(at).unwrap_or_default());
        format!("{} ({ago} ago)", humantime::format_rfc3339_seconds(at))
    });
    format!(
        "session   {session}\nagent     {agent}\nplaced    {region}/{worker}\nreason    {reason}\n\
         decided   {decided}\nattempts  {attempts}\n"
    )
}

/// What was found about each region and worker.
pub(crate) fn candidates(candidates: &[Candidate]) -> present::Table {
    present::table(&HEADER, &RIGHT, candidates.iter().map(row))
}

fn row(candidate: &Candidate) -> Vec<String> {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    vec![
        candidate.region.clone(),
        or_dash(&candidate.worker),
        candidate.verdict.clone(),
        if candidate.estimated_rtt_ms == 0 { "-".into() } else { format!("{} ms", candidate.estimated_rtt_ms) },
        candidate.free.to_string(),
        candidate.score.map_or("-".into(), |score| format!("{score:.1}")),
        or_dash(&candidate.detail),
    ]
}

/// For machines, in the form of `GET /v1/sessions/{session}/explain`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Explained<'a> {
    session: &'a str,
    agent: &'a str,
    region: &'a str,
    worker: &'a str,
    reason: &'a str,
    decided_at: Option<String>,
    attempts: u32,
    candidates: Vec<Weighed<'a>>,
}

/// One candidate, in the form of the HTTP API.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Weighed<'a> {
    region: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    worker: &'a str,
    verdict: &'a str,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    estimated_rtt_ms: Option<u32>,
    free: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f64>,
}

impl<'a> Weighed<'a> {
    pub(crate) fn of(candidate: &'a Candidate) -> Self {
        Self {
            region: &candidate.region,
            worker: &candidate.worker,
            verdict: &candidate.verdict,
            detail: &candidate.detail,
            estimated_rtt_ms: Some(candidate.estimated_rtt_ms).filter(|ms| *ms > 0),
            free: candidate.free,
            score: candidate.score.map(|score| present::rounded(score, 1)),
        }
    }
}

impl<'a> Explained<'a> {
    fn of(explanation: &'a Explanation) -> Self {
        Self {
            session: &explanation.session,
            agent: &explanation.agent,
            region: &explanation.region,
            worker: &explanation.worker,
            reason: &explanation.reason,
            decided_at: explanation.decided_at.map(|at| at.to_string()),
            attempts: explanation.attempts,
            candidates: explanation.candidates.iter().map(Weighed::of).collect(),
        }
    }
}

const HEADER: [&str; 7] = ["REGION", "WORKER", "VERDICT", "RTT", "FREE", "SCORE", "DETAIL"];
const RIGHT: [usize; 3] = [3, 4, 5];

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::args::ApiKeyArg;

    fn explanation() -> Explanation {
        let candidate = |region: &str, verdict: &str| Candidate {
            region: region.into(),
            verdict: verdict.into(),
            ..Candidate::default()
        };
        Explanation {
            session: "00000000000000000000000001".into(),
            agent: "shop/desk".into(),
            region: "frankfurt".into(),
            worker: "desk-0".into(),
            reason: "nearest".into(),
            decided_at: Some((SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)).into()),
            candidates: vec![
                Candidate { estimated_rtt_ms: 23, free: 60, score: Some(23.46), ..candidate("frankfurt", "chosen") },
                Candidate { worker: "desk-0".into(), detail: "took it".into(), ..candidate("frankfurt", "chosen") },
            ],
            attempts: 2,
        }
    }

    #[test]
    fn the_headline_says_where_why_when_and_at_which_attempt() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_185);
        let expected = "\
session   00000000000000000000000001
agent     shop/desk
placed    frankfurt/desk-0
reason    nearest
decided   2027-01-15T08:00:00Z (3m05s ago)
attempts  2
";
        assert_eq!(headline(&explanation(), now), expected);
        let undated = Explanation { decided_at: None, ..explanation() };
        assert!(headline(&undated, now).contains("decided   -\n"));
    }

    #[test]
    fn what_is_unknown_is_a_dash_and_absent_from_json() {
        let rows: Vec<_> = explanation().candidates.iter().map(row).collect();
        assert_eq!(rows[0], ["frankfurt", "-", "chosen", "23 ms", "60", "23.5", "-"]);
        assert_eq!(rows[1], ["frankfurt", "desk-0", "chosen", "-", "0", "-", "took it"]);
        let best = Candidate { score: Some(0.0), ..Candidate::default() };
        assert_eq!((&*row(&best)[5], Weighed::of(&best).score), ("0.0", Some(0.0)), "nothing is better");
        let json = serde_json::to_value(Explained::of(&explanation())).unwrap();
        assert_eq!(json["decidedAt"], "2027-01-15T08:00:00Z");
        let region = serde_json::json!({
            "region": "frankfurt", "verdict": "chosen", "detail": "", "estimatedRttMs": 23, "free": 60, "score": 23.5,
        });
        assert_eq!(json["candidates"][0], region);
        let worker = serde_json::json!({
            "region": "frankfurt", "worker": "desk-0", "verdict": "chosen", "detail": "took it", "free": 0,
        });
        assert_eq!(json["candidates"][1], worker);
    }

    #[test]
    fn an_unknown_session_is_told_apart_from_a_router_that_was_not_asked() {
        assert!(unknown("x", &Failed::default()).contains("another tenant's"));
        let mut silent = Failed::default();
        assert!(not_live("x", &silent).starts_with("session x is not live: "));
        silent.add("frankfurt", "Connection refused");
        let text = not_live("x", &silent);
        assert!(text.starts_with("no router that answers finds session x alive (frankfurt: Connection ref"), "{text}");
        let text = unknown("x", &silent);
        assert_eq!(text, "no router that answers remembers session x (frankfurt: Connection refused)");
    }

    #[tokio::test]
    async fn a_malformed_session_id_is_refused_before_a_fleet_is_looked_for() {
        for bad in ["", "abc", "8zzzzzzzzzzzzzzzzzzzzzzzzz", "0000000000000000000000000u"] {
            let args = ExplainArgs { session: bad.into(), path: false, key: ApiKeyArg::default() };
            let error = run(&args, Path::new("/nonexistent"), false).await.unwrap_err().to_string();
            assert!(error.contains("is not a session id: expected 26 characters"), "{error}");
        }
    }
}
