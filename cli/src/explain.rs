//! `antiphon explain`: why a session is where it is.

use std::{path::Path, process::ExitCode, time::SystemTime};

use antiphon_core::id::SessionId;
use antiphon_proto::v1::{Candidate, Explanation};
use anyhow::{Context as _, bail};
use serde::Serialize;

use crate::{
    args::ExplainArgs,
    fleet::Context,
    present,
    sessions::{age, in_turn, routers},
};

pub(crate) async fn run(args: &ExplainArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let session = args.session.trim().parse::<SessionId>();
    let session = session.context("`antiphon sessions` lists those that there are")?.to_string();
    let routers = routers(&Context::load(dir)?, args.api_key.as_deref())?;
    let asked = in_turn(routers, async |router| router.explain(&session).await).await?;
    let Some(explanation) = asked.answer else {
        bail!("{}", unknown(&session, &asked.silent));
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&Explained::of(&explanation))?);
    } else {
        print!("{}", headline(&explanation, SystemTime::now()));
        println!();
        present::print(&present::table(&HEADER, &RIGHT, explanation.candidates.iter().map(row)));
    }
    Ok(ExitCode::SUCCESS)
}

/// Only the region that placed a session remembers why, and only for a while.
fn unknown(session: &str, silent: &[String]) -> String {
    if silent.is_empty() {
        return format!(
            "no router remembers session {session}: it was placed too long ago or before a router's start, \
             is another tenant's, or was never placed"
        );
    }
    format!("no router that answers remembers session {session} ({})", silent.join("; "))
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

fn row(candidate: &Candidate) -> Vec<String> {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    vec![
        candidate.region.clone(),
        or_dash(&candidate.worker),
        candidate.verdict.clone(),
        if candidate.estimated_rtt_ms == 0 { "-".into() } else { format!("{} ms", candidate.estimated_rtt_ms) },
        candidate.free.to_string(),
        if candidate.score == 0.0 { "-".into() } else { format!("{:.1}", candidate.score) },
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

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Weighed<'a> {
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

impl<'a> Explained<'a> {
    fn of(explanation: &'a Explanation) -> Self {
        let weighed = |candidate: &'a Candidate| Weighed {
            region: &candidate.region,
            worker: &candidate.worker,
            verdict: &candidate.verdict,
            detail: &candidate.detail,
            estimated_rtt_ms: Some(candidate.estimated_rtt_ms).filter(|ms| *ms > 0),
            free: candidate.free,
            score: Some(candidate.score).filter(|score| *score != 0.0),
        };
        Self {
            session: &explanation.session,
            agent: &explanation.agent,
            region: &explanation.region,
            worker: &explanation.worker,
            reason: &explanation.reason,
            decided_at: explanation.decided_at.map(|at| at.to_string()),
            attempts: explanation.attempts,
            candidates: explanation.candidates.iter().map(weighed).collect(),
        }
    }
}

const HEADER: [&str; 7] = ["REGION", "WORKER", "VERDICT", "RTT", "FREE", "SCORE", "DETAIL"];
const RIGHT: [usize; 3] = [3, 4, 5];
