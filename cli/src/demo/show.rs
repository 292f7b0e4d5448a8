//! The demo's tables.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};

use super::outcome::{Outcome, Placed};
use crate::present::out;
use crate::{
    present::{self, duration, quantile},
    words,
};

pub(super) fn print(outcome: &Outcome) {
    out!();
    placements(outcome);
    out!();
    figures(outcome);
    out!();
    incidents(outcome);
    out!();
    failures(outcome);
    let calls = outcome.verdicts.len();
    let complete = outcome.verdicts.iter().filter(|verdict| verdict.passed()).count();
    let answers: usize = outcome.verdicts.iter().map(|verdict| verdict.answers).sum();
    let turns: usize = outcome.verdicts.iter().map(|verdict| verdict.turns).sum();
    out!(
        "{complete} of {calls} calls complete, {answers} of {turns} answers were the caller's own words with the right receipt; {}",
        duration(outcome.took)
    );
}

fn placements(outcome: &Outcome) {
    let mut groups: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for (verdict, place) in outcome.verdicts.iter().zip(&outcome.places) {
        if let Some(call) = &verdict.place {
            groups.entry((&call.region, kind_of(&call.reason))).or_default().push(place.city);
        }
    }
    let rows = groups.into_iter().map(|((region, reason), mut cities)| {
        let calls = cities.len().to_string();
        cities.dedup();
        cities.sort_unstable();
        cities.dedup();
        let cloud = outcome.regions.iter().find(|(name, _)| name == region).map_or("", |(_, cloud)| cloud);
        let named: Vec<_> = cities.iter().take(4).copied().collect();
        let more = match cities.len().saturating_sub(4) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        vec![region.to_owned(), cloud.to_owned(), calls, reason.to_owned(), format!("{}{more}", named.join(", "))]
    });
    present::print(&present::table(&["REGION", "CLOUD", "CALLS", "WHY THERE", "CALLERS IN"], &[2], rows));
}

/// The reason without its figures.
fn kind_of(reason: &str) -> &str {
    reason.split([':', '(']).next().unwrap_or(reason).trim()
}

type Figure = (&'static str, fn(&Placed) -> Vec<Duration>);

const FIGURES: [Figure; 8] = [
    ("ticket", |call| vec![call.ticket]),
    ("handshake", |call| vec![call.report.handshake]),
    ("active", |call| vec![call.report.activated]),
    ("first audio, own turn included", |call| call.report.first_audio.into_iter().collect()),
    ("answer after the caller's end", |call| call.response_delays.clone()),
    ("longest time without a packet", |call| vec![call.report.longest_gap]),
    ("longest pause in an answer", |call| vec![call.longest_silence]),
    ("jitter", |call| vec![call.report.received.jitter.jitter]),
];

fn sorted(outcome: &Outcome, figure: fn(&Placed) -> Vec<Duration>) -> Vec<Duration> {
    let mut values: Vec<_> = outcome.calls().flat_map(figure).collect();
    values.sort();
    values
}

fn figures(outcome: &Outcome) {
    let mut rows: Vec<_> = FIGURES
        .iter()
        .map(|(name, figure)| {
            let values = sorted(outcome, *figure);
            let at = |q| duration(quantile(&values, q));
            vec![(*name).to_owned(), at(0.0), at(0.5), at(0.95), at(1.0)]
        })
        .collect();
    let mut loss: Vec<_> = outcome.calls().map(|call| call.loss * 100.0).collect();
    loss.sort_by(f64::total_cmp);
    let at = |q: f64| {
        let index = (loss.len().saturating_sub(1) as f64 * q).round() as usize;
        loss.get(index).map_or("-".into(), |loss| format!("{loss:.2} %"))
    };
    rows.push(vec!["packets lost".into(), at(0.0), at(0.5), at(0.95), at(1.0)]);
    present::print(&present::table(&["PER CALL", "LEAST", "MEDIAN", "95 %", "MOST"], &[1, 2, 3, 4], rows));
}

fn incidents(outcome: &Outcome) {
    let rows = outcome.incidents.iter().map(|incident| {
        let effect = incident.effect(&outcome.verdicts);
        let lost = if effect.lost == 0 { "none".into() } else { effect.lost.to_string() };
        vec![incident.what.clone(), effect.callers.to_string(), duration(effect.longest_gap), lost]
    });
    let header = ["DURING THE CALLS", "CALLERS", "LONGEST WITHOUT A PACKET", "LOST"];
    present::print(&present::table(&header, &[1, 2, 3], rows));
}

fn failures(outcome: &Outcome) {
    let failed: Vec<_> = outcome.verdicts.iter().filter(|verdict| !verdict.passed()).collect();
    for verdict in failed.iter().take(MOST_FAILURES) {
        let city = outcome.places.get(verdict.caller).map_or("", |place| place.city);
        let answers = format!("{} of {} answers", verdict.answers, verdict.turns);
        out!("caller {:03} in {city}: {answers}: {}", verdict.caller, verdict.problems.join("; "));
    }
    if failed.len() > MOST_FAILURES {
        out!("… and {} more callers", failed.len() - MOST_FAILURES);
    }
    let late = outcome.verdicts.iter().filter_map(|verdict| verdict.place.as_ref()).map(|call| call.report.late_steps);
    let (steps, calls) = (late.clone().sum::<u64>(), late.filter(|steps| *steps > 0).count());
    if !failed.is_empty() && steps > 0 {
        out!(
            "this machine was too busy: {steps} times a caller here could not hear or speak for more than a frame \
             (in {calls} calls); end what else runs, or try fewer callers with --calls"
        );
    }
    for incident in outcome.unnoticed() {
        out!("{}: no caller was concerned, so it proves nothing", incident.what);
    }
    if !failed.is_empty() {
        out!();
    }
}

pub(super) fn as_json(outcome: &Outcome) -> Value {
    let ms = |d: Duration| present::rounded(d.as_secs_f64() * 1000.0, 1);
    let callers: Vec<_> = outcome
        .verdicts
        .iter()
        .map(|verdict| {
            let call = verdict.place.as_ref();
            json!({
                "caller": verdict.caller,
                "city": outcome.places.get(verdict.caller).map(|place| place.city),
                "region": call.map(|call| &call.region),
                "reason": call.map(|call| &call.reason),
                "ticketMs": call.map(|call| ms(call.ticket)),
                "handshakeMs": call.map(|call| ms(call.report.handshake)),
                "firstAudioMs": call.and_then(|call| call.report.first_audio).map(ms),
                "responseDelaysMs": call.map(|call| call.response_delays.iter().copied().map(ms).collect::<Vec<_>>()),
                "longestGapMs": call.map(|call| ms(call.report.longest_gap)),
                "loss": call.map(|call| call.loss),
                "similarity": call.map(|call| call.similarity),
                "switches": call.map(|call| call.report.switches.iter().map(|s| json!({
                    "atMs": ms(s.at), "from": s.switch.from, "to": s.switch.to,
                    "reason": words::switch_label(s.switch.reason), "gapMs": s.gap.map(ms),
                })).collect::<Vec<_>>()),
                "lateSteps": call.map(|call| call.report.late_steps),
                "answers": verdict.answers,
                "turns": verdict.turns,
                "problems": verdict.problems,
            })
        })
        .collect();
    let incidents: Vec<_> = outcome
        .incidents
        .iter()
        .map(|incident| {
            let effect = incident.effect(&outcome.verdicts);
            json!({"what": incident.what, "callers": effect.callers, "longestGapMs": ms(effect.longest_gap), "lost": effect.lost})
        })
        .collect();
    json!({"passed": outcome.passed(), "tookMs": ms(outcome.took), "callers": callers, "incidents": incidents})
}

const MOST_FAILURES: usize = 10;
