//! `antiphon explain --path`: which way a live session's packets went, how well, and why that changed.

use std::{collections::BTreeMap, time::Duration};

use antiphon_proto::v1::{PathEvent, PathUse, SessionPath};
use serde::Serialize;

use crate::present::out;
use crate::{present, sessions::age};

/// `relays`: numbers of relays and their names, as far as known.
pub(super) fn show(path: &SessionPath, relays: &BTreeMap<u32, String>, json: bool) -> anyhow::Result<()> {
    if json {
        out!("{}", serde_json::to_string_pretty(&Walked::of(path))?);
        return Ok(());
    }
    print!("{}", headline(path));
    out!();
    present::print(&present::table(&PATHS, &PATHS_RIGHT, path.paths.iter().map(|used| way(used, relays))));
    out!();
    if path.events.is_empty() {
        out!("nothing has happened to it");
    } else {
        present::print(&present::table(&EVENTS, &[0], path.events.iter().map(|happened| event(happened, relays))));
    }
    Ok(())
}

fn headline(path: &SessionPath) -> String {
    let SessionPath { session, region, worker, epoch, age_ms, audio_received, audio_lost, audio_concealed, .. } = path;
    let sent = (audio_received + audio_lost).max(1);
    let loss = *audio_lost as f64 / sent as f64 * 100.0;
    format!(
        "session   {session}, epoch {epoch}, {} old\nworker    {region}/{worker}\n\
         audio     {audio_received} of the caller's packets came, {audio_lost} lost ({loss:.2} %), {} made up\n",
        age(Duration::from_millis((*age_ms).into())),
        present::count(usize::try_from(*audio_concealed).unwrap_or(usize::MAX), "frame"),
    )
}

/// `+3.200 s`: since the session began.
fn at(ms: u32) -> String {
    format!("+{:.3} s", f64::from(ms) / 1000.0)
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

/// `north/relay-0 (65)`: texts of events name numbers.
fn named(relay: u32, relays: &BTreeMap<u32, String>) -> String {
    match relays.get(&relay) {
        _ if relay == 0 => "-".into(),
        Some(name) => format!("{name} ({relay})"),
        None => relay.to_string(),
    }
}

fn way(path: &PathUse, relays: &BTreeMap<u32, String>) -> Vec<String> {
    let us = Duration::from_micros(path.rtt_us.into());
    vec![
        named(path.relay, relays),
        or_dash(&path.client_address),
        or_dash(&path.next_hop),
        at(path.since_ms),
        if path.current { "in use" } else { "left" }.into(),
        path.received_packets.to_string(),
        path.sent_packets.to_string(),
        path.lost_packets.to_string(),
        if path.rtt_us == 0 { "-".into() } else { present::duration(us) },
    ]
}

fn event(event: &PathEvent, relays: &BTreeMap<u32, String>) -> Vec<String> {
    let relay = named(event.relay, relays);
    vec![at(event.at_ms), event.kind.replace('_', " "), relay, or_dash(&event.detail)]
}

/// For machines, in the form of `GET /v1/sessions/{session}/path`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Walked<'a> {
    session: &'a str,
    region: &'a str,
    worker: &'a str,
    epoch: u32,
    age_ms: u32,
    paths: Vec<Way<'a>>,
    events: Vec<Happened<'a>>,
    audio_received: u64,
    audio_lost: u64,
    audio_concealed: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Way<'a> {
    relay: u32,
    client_address: &'a str,
    next_hop: &'a str,
    since_ms: u32,
    current: bool,
    received_packets: u64,
    sent_packets: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rtt_us: Option<u32>,
    lost_packets: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Happened<'a> {
    at_ms: u32,
    kind: &'a str,
    relay: u32,
    detail: &'a str,
}

impl<'a> Walked<'a> {
    fn of(path: &'a SessionPath) -> Self {
        let way = |p: &'a PathUse| Way {
            relay: p.relay,
            client_address: &p.client_address,
            next_hop: &p.next_hop,
            since_ms: p.since_ms,
            current: p.current,
            received_packets: p.received_packets,
            sent_packets: p.sent_packets,
            rtt_us: Some(p.rtt_us).filter(|us| *us > 0),
            lost_packets: p.lost_packets,
        };
        let happened = |e: &'a PathEvent| Happened { at_ms: e.at_ms, kind: &e.kind, relay: e.relay, detail: &e.detail };
        Self {
            session: &path.session,
            region: &path.region,
            worker: &path.worker,
            epoch: path.epoch,
            age_ms: path.age_ms,
            paths: path.paths.iter().map(way).collect(),
            events: path.events.iter().map(happened).collect(),
            audio_received: path.audio_received,
            audio_lost: path.audio_lost,
            audio_concealed: path.audio_concealed,
        }
    }
}

const PATHS: [&str; 9] = ["RELAY", "CALLER AT", "ANSWERS GO TO", "SINCE", "STATE", "IN", "OUT", "LOST", "ROUND TRIP"];
const PATHS_RIGHT: [usize; 5] = [3, 5, 6, 7, 8];
const EVENTS: [&str; 4] = ["AT", "WHAT", "RELAY", "DETAIL"];

#[cfg(test)]
mod tests {
    use super::*;

    fn path() -> SessionPath {
        let left = PathUse {
            relay: 65,
            client_address: "192.0.2.7:40000".into(),
            next_hop: "127.77.1.2:4434".into(),
            received_packets: 410,
            sent_packets: 390,
            rtt_us: 23_400,
            lost_packets: 12,
            ..PathUse::default()
        };
        let current = PathUse { relay: 66, since_ms: 8_204, current: true, rtt_us: 0, ..left.clone() };
        let changed = PathEvent {
            at_ms: 8_204,
            kind: "relay_changed".into(),
            relay: 66,
            detail: "the caller came through relay 66 instead of 65".into(),
        };
        SessionPath {
            session: "00000000000000000000000001".into(),
            region: "frankfurt".into(),
            worker: "desk-0".into(),
            epoch: 1,
            age_ms: 61_500,
            paths: vec![left, current],
            events: vec![changed],
            audio_received: 990,
            audio_lost: 10,
            audio_concealed: 7,
        }
    }

    #[test]
    fn the_headline_says_whose_way_it_is_and_how_well_the_caller_was_heard() {
        let expected = "\
session   00000000000000000000000001, epoch 1, 1m01s old
worker    frankfurt/desk-0
audio     990 of the caller's packets came, 10 lost (1.00 %), 7 frames made up
";
        assert_eq!(headline(&path()), expected);
        let unheard = SessionPath { audio_received: 0, audio_lost: 0, ..path() };
        assert!(headline(&unheard).contains("0 lost (0.00 %)"));
    }

    #[test]
    fn rows_and_json_say_the_same() {
        let path = path();
        let ways: Vec<_> =
            path.paths.iter().map(|used| way(used, &BTreeMap::from([(66, "frankfurt/relay-1".into())]))).collect();
        let cells = ["65", "192.0.2.7:40000", "127.77.1.2:4434", "+0.000 s", "left", "410", "390", "12", "23 ms"];
        assert_eq!(ways[0], cells);
        assert_eq!(ways[1][0], "frankfurt/relay-1 (66)");
        assert_eq!((&*ways[1][3], &*ways[1][4], &*ways[1][8]), ("+8.204 s", "in use", "-"));
        let detail = "the caller came through relay 66 instead of 65";
        assert_eq!(event(&path.events[0], &BTreeMap::new()), ["+8.204 s", "relay changed", "66", detail]);
        let json = serde_json::to_value(Walked::of(&path)).unwrap();
        assert_eq!((&json["paths"][0]["rttUs"], &json["paths"][1]["current"]), (&23_400.into(), &true.into()));
        assert!(json["paths"][1].get("rttUs").is_none());
        assert_eq!(json["events"][0]["kind"], "relay_changed");
    }
}
