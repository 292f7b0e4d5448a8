//! `antiphon sessions`: live sessions of all regions, as any one router lists them.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use antiphon_client::{Listing, Router, RouterError};
use antiphon_proto::{ticket::codec_label, v1::SessionSummary};
use anyhow::{anyhow, bail, ensure};
use serde::Serialize;
use serde_json::json;
use tokio::time::timeout;

use crate::present::out;
use crate::{args::SessionsArgs, fleet::Context, present, status};

pub(crate) async fn run(args: &SessionsArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let context = Context::load(dir)?;
    let routers = routers(&context, args.key.given()?.as_deref())?;
    let asked_of = routers.clone();
    let asked = in_turn(routers, PATIENCE, async |router| router.list(args.limit).await).await?;
    let Some(Listing { sessions, mut missing }) = asked.answer else {
        bail!("no router answers ({}): is the fleet running?", asked.silent);
    };
    missing.extend(asked.silent.regions().into_iter().map(str::to_owned));
    missing.sort();
    missing.dedup();
    let clock = asked_of.iter().find_map(|(_, router)| router.clock_skew());
    if let Some(clock) = clock.filter(|clock| clock.is_notable()) {
        eprintln!("{clock}: set one of them right; ages are by the router's");
    }
    if json {
        let listing = json!({"sessions": sessions.iter().map(Listed::of).collect::<Vec<_>>(), "missing": missing});
        out!("{}", serde_json::to_string_pretty(&listing)?);
    } else if sessions.is_empty() {
        eprintln!("no sessions");
    } else {
        let relays = status::relay_names(&context).await;
        let now = clock.map_or_else(SystemTime::now, |clock| clock.router_time(SystemTime::now()));
        present::print(&present::table(&HEADER, &RIGHT, sessions.iter().map(|session| row(session, &relays, now))));
    }
    if missing.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let silent = if asked.silent.is_empty() { String::new() } else { format!(" ({})", asked.silent) };
    present::error(&anyhow!("calls of {} are missing: no answer from there{silent}", missing.join(", ")));
    Ok(ExitCode::FAILURE)
}

/// Clients of all routers, each with its region's name.
pub(crate) fn routers(context: &Context, key: Option<&str>) -> anyhow::Result<Vec<(String, Router)>> {
    ensure!(!context.routers.is_empty(), "the fleet has no router");
    let client = |router| context.client(router, key);
    context.routers.iter().map(|router| Ok((router.region.clone(), client(router)?))).collect()
}

/// Routers that did not do as asked, by reason.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Failed(BTreeMap<String, Vec<String>>);

impl Failed {
    pub(crate) fn add(&mut self, region: &str, reason: impl Into<String>) {
        self.0.entry(reason.into()).or_default().push(region.to_owned());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Region and reason of each.
    pub(crate) fn each(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().flat_map(|(reason, regions)| regions.iter().map(|region| (region.as_str(), reason.as_str())))
    }

    /// Regions of these routers.
    pub(crate) fn regions(&self) -> Vec<&str> {
        self.0.values().flatten().map(String::as_str).collect()
    }
}

/// `frankfurt, virginia: connection refused; osaka: no answer within 5 s`.
impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<_> = self.0.iter().map(|(reason, of)| format!("{}: {reason}", of.join(", "))).collect();
        f.write_str(&parts.join("; "))
    }
}

/// What asking one router after the other came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Asked<T> {
    /// The first answer; `None` if no router has one.
    pub(crate) answer: Option<T>,
    /// Who did not answer before that.
    pub(crate) silent: Failed,
}

/// Asks routers until one has an answer. One that does not know, or does not answer, leaves the question to the next.
///
/// # Errors
/// What every router would say again: the key is refused, the request is wrong.
pub(crate) async fn in_turn<R, T>(
    routers: impl IntoIterator<Item = (String, R)>,
    patience: Duration,
    ask: impl AsyncFn(R) -> Result<T, RouterError>,
) -> Result<Asked<T>, RouterError> {
    let mut silent = Failed::default();
    for (region, router) in routers {
        match timeout(patience, ask(router)).await {
            Ok(Ok(answer)) => return Ok(Asked { answer: Some(answer), silent }),
            Ok(Err(RouterError::NotFound(_))) => {}
            Ok(Err(RouterError::Unavailable { message, .. })) => silent.add(&region, message),
            Ok(Err(error)) => return Err(error),
            Err(_) => silent.add(&region, no_answer(patience)),
        }
    }
    Ok(Asked { answer: None, silent })
}

pub(crate) fn no_answer(patience: Duration) -> String {
    format!("no answer within {} s", patience.as_secs())
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

fn row(session: &SessionSummary, relays: &BTreeMap<u32, String>, now: SystemTime) -> Vec<String> {
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
        match relays.get(&session.relay) {
            _ if session.relay == 0 => "-".into(),
            // One of the session's own region needs no other name.
            Some(name) => name.strip_prefix(&format!("{}/", session.region)).unwrap_or(name).to_owned(),
            None => session.relay.to_string(),
        },
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

/// As [`age`], of milliseconds.
pub(crate) fn age_ms(ms: u32) -> String {
    age(Duration::from_millis(ms.into()))
}

/// Longest wait for one router; it waits for other regions itself.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
const HEADER: [&str; 10] = ["SESSION", "AGENT", "REGION", "WORKER", "STATE", "EPOCH", "AGE", "TURNS", "RELAY", "CODEC"];
const RIGHT: [usize; 3] = [5, 6, 7];

#[cfg(test)]
mod tests {
    use antiphon_proto::v1::Codec;

    use super::*;

    fn unavailable() -> RouterError {
        RouterError::Unavailable { address: "127.0.0.1:1".into(), message: "connection refused".into() }
    }

    async fn ask(answers: Vec<Result<u32, RouterError>>) -> Result<Asked<u32>, RouterError> {
        let names = ["osaka", "virginia", "oregon", "quito"].map(String::from);
        let answers = answers.into_iter().map(|answer| parking_lot::Mutex::new(Some(answer)));
        let ask = async |answer: parking_lot::Mutex<Option<_>>| answer.into_inner().expect("asked once");
        in_turn(names.into_iter().zip(answers), PATIENCE, ask).await
    }

    #[tokio::test]
    async fn the_first_router_that_knows_is_believed_and_the_silent_are_named() {
        let unknown = || RouterError::NotFound("nothing".into());
        let asked = ask(vec![Err(unavailable()), Err(unknown()), Ok(1), Ok(2)]).await.unwrap();
        assert_eq!((asked.answer, asked.silent.to_string()), (Some(1), "osaka: connection refused".into()));
        let asked = ask(vec![Err(unknown()), Err(unknown())]).await.unwrap();
        assert_eq!(asked, Asked { answer: None, silent: Failed::default() });
        let asked = ask(vec![Err(unavailable()), Err(unavailable())]).await.unwrap();
        assert_eq!((asked.answer, asked.silent.to_string()), (None, "osaka, virginia: connection refused".into()));
    }

    #[tokio::test]
    async fn a_refused_key_is_not_tried_elsewhere() {
        let refused = ask(vec![Err(RouterError::NotAllowed("no such key".into())), Ok(1)]).await;
        assert_eq!(refused.unwrap_err().to_string(), "not allowed: no such key");
    }

    #[tokio::test]
    async fn a_router_that_hangs_does_not_keep_the_next_from_answering() {
        let routers = [("osaka".to_owned(), true), ("quito".to_owned(), false)];
        let ask = async |hangs| if hangs { std::future::pending().await } else { Ok(7) };
        let asked = in_turn(routers, Duration::ZERO, ask).await.unwrap();
        assert_eq!((asked.answer, asked.silent.to_string()), (Some(7), "osaka: no answer within 0 s".into()));
    }

    #[test]
    fn ages_have_two_units_at_most() {
        let of = |s| age(Duration::from_secs(s));
        assert_eq!([0, 12, 59].map(of), ["0s", "12s", "59s"]);
        assert_eq!([60, 185, 3599].map(of), ["1m00s", "3m05s", "59m59s"]);
        assert_eq!([3600, 7620, 86_399].map(of), ["1h00m", "2h07m", "23h59m"]);
        assert_eq!([86_400, 442_800].map(of), ["1d00h", "5d03h"]);
    }

    #[test]
    fn rows_and_json_say_the_same() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let session = SessionSummary {
            session: "00000000000000000000000001".into(),
            agent: "shop/desk".into(),
            region: "frankfurt".into(),
            worker: "desk-0".into(),
            state: "active".into(),
            epoch: 1,
            since: Some((now - Duration::from_secs(185)).into()),
            turns: 4,
            relay: 65,
            codec: Codec::L1624k.into(),
            tenant: "acme".into(),
        };
        let cells = ["00000000000000000000000001", "shop/desk", "frankfurt", "desk-0", "active", "1"];
        let relays = BTreeMap::from([(65, "frankfurt/relay-0".to_owned()), (66, "osaka/relay-1".to_owned())]);
        let abroad = SessionSummary { relay: 66, ..session.clone() };
        assert_eq!(row(&abroad, &relays, now)[8], "osaka/relay-1");
        assert_eq!(row(&session, &BTreeMap::new(), now)[8], "65", "nobody said how it is called");
        assert_eq!(row(&session, &relays, now), [&cells[..], &["3m05s", "4", "relay-0", "l16-24k"]].concat());
        let json = serde_json::to_value(Listed::of(&session)).unwrap();
        assert_eq!(json["since"], "2027-01-15T07:56:55Z");
        assert_eq!((&json["relay"], &json["codec"]), (&65.into(), &"l16-24k".into()));

        let fresh = SessionSummary { relay: 0, since: Some((now + Duration::from_secs(1)).into()), ..session };
        assert_eq!(row(&fresh, &relays, now)[6..9], ["0s", "4", "-"], "another clock may be ahead");
        let unborn = SessionSummary { since: None, ..fresh };
        assert_eq!(row(&unborn, &relays, now)[6], "-");
    }
}
