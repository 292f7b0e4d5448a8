//! What is shown of a call.

use std::{collections::BTreeMap, path::Path, time::Duration};

use antiphon_client::ClockSkew;
use antiphon_media::verify::{self, TurnReport};
use serde_json::{Value, json};

use crate::{
    caller::Called,
    present::{self, duration, out},
    words,
};

/// A call and what its recording proves.
pub(super) struct Timeline<'a> {
    pub(super) called: &'a Called,
    /// Of the turns whose answers were waited for.
    pub(super) found: &'a verify::Report,
    /// Turns that were to be said.
    pub(super) turns: usize,
    /// Why it ended before all turns were answered.
    pub(super) error: Option<&'a str>,
    pub(super) saved: Option<&'a Path>,
    /// Numbers of relays and their names, as far as known.
    pub(super) relays: &'a BTreeMap<u32, String>,
}

impl Timeline<'_> {
    pub(super) fn print(&self) {
        let Called { session, report, .. } = self.called;
        out!("session      {}", session.session);
        out!("placed       {}/{}: {}", session.region, session.worker, session.reason);
        out!("ticket       {}", duration(self.called.ticket));
        if let Some(clock) = self.called.clock.filter(|clock| clock.is_notable()) {
            out!("clock        {clock}: set one of them right");
        }
        out!("handshake    {} (attempt {})", duration(report.handshake), report.attempts);
        out!("active       {}", duration(report.activated));
        if let Some(first) = report.first_audio {
            out!("first audio  {} (the caller's own turn included)", duration(first));
        }
        out!("lasted       {}", duration(report.ended));
        out!();
        let rows = self.found.turns.iter().map(row).chain(self.unheard().map(|(turn, why)| {
            let dash = || "-".to_owned();
            vec![turn.to_string(), dash(), dash(), dash(), dash(), dash(), why.into()]
        }));
        present::print(&present::table(&HEADER, &RIGHT, rows));
        out!();
        let jitter = report.received.jitter;
        out!(
            "network      loss {:.2} %, {} made up, jitter {}, buffer {}, round trip {}",
            self.called.loss() * 100.0,
            present::count(usize::try_from(jitter.concealed).unwrap_or(usize::MAX), "frame"),
            duration(jitter.jitter),
            duration(jitter.delay),
            duration(report.rtt)
        );
        for switch in &report.switches {
            let gap = switch.gap.map_or("nothing heard since".into(), |gap| format!("quiet for {}", duration(gap)));
            let (from, to) = (self.relay(switch.switch.from), self.relay(switch.switch.to));
            let why = words::switched(switch.switch.reason);
            out!("relay        {to} instead of {from}, which {why}, at {}: {gap}", duration(switch.at));
        }
        if report.late_steps > 0 && self.found.turns.iter().any(|turn| !turn.problems.is_empty()) {
            let times = present::count(usize::try_from(report.late_steps).unwrap_or(usize::MAX), "time");
            out!("too busy     {times} this machine could not hear or speak for more than a frame");
        }
        if let Some(saved) = self.saved {
            out!("saved        {}", saved.display());
        }
    }

    pub(super) fn as_json(&self) -> Value {
        let Called { session, report, .. } = self.called;
        let turns = self.found.turns.iter().map(turn_json);
        let unheard = self.unheard().map(|(turn, why)| json!({"turn": turn, "problems": [why]}));
        let jitter = report.received.jitter;
        json!({
            "session": session.session,
            "region": session.region,
            "worker": session.worker,
            "reason": session.reason,
            "ticketMs": ms(self.called.ticket),
            "clockAheadOfRouterMs": self.called.clock.and_then(known_ms),
            "handshakeMs": ms(report.handshake),
            "attempts": report.attempts,
            "activatedMs": ms(report.activated),
            "firstAudioMs": report.first_audio.map(ms),
            "lastedMs": ms(report.ended),
            "turns": turns.chain(unheard).collect::<Vec<_>>(),
            "loss": present::rounded(self.called.loss(), 4),
            "concealedFrames": jitter.concealed,
            "jitterMs": ms(jitter.jitter),
            "rttMs": ms(report.rtt),
            "relaySwitches": report.switches.len(),
            "lateSteps": report.late_steps,
            "error": self.error,
            "saved": self.saved.map(|path| path.display().to_string()),
        })
    }

    /// Turns without a complete answer because the call was over.
    fn unheard(&self) -> impl Iterator<Item = (usize, &'static str)> {
        let (begun, interrupted) = (self.called.begun, self.error == Some("interrupted"));
        (self.found.turns.len() + 1..=self.turns).map(move |turn| match (turn <= begun, interrupted) {
            (true, true) => (turn, "interrupted"),
            (true, false) => (turn, "cut off"),
            (false, _) => (turn, "not said"),
        })
    }

    /// Name of the ticket's relay of this index, or its number.
    fn relay(&self, index: usize) -> String {
        let number = self.called.session.relays.get(index).map_or(0, |relay| relay.number);
        self.relays.get(&number).cloned().unwrap_or_else(|| number.to_string())
    }
}

fn row(turn: &TurnReport) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let heard = turn.answer.is_some();
    let problems: Vec<_> = turn.problems.iter().map(ToString::to_string).collect();
    vec![
        turn.turn.to_string(),
        or_dash(turn.response_delay.map(duration)),
        or_dash(turn.receipt.map(|receipt| format!("{:08x}", receipt.chain))),
        or_dash(turn.receipt.map(|receipt| format!("{:04x}", receipt.nonce))),
        or_dash(heard.then(|| format!("{:.2}", turn.similarity))),
        or_dash(heard.then(|| duration(turn.longest_silence))),
        if problems.is_empty() { "the caller's own words".into() } else { problems.join("; ") },
    ]
}

fn turn_json(turn: &TurnReport) -> Value {
    let heard = turn.answer.is_some();
    json!({
        "turn": turn.turn,
        "responseDelayMs": turn.response_delay.map(ms),
        "chain": turn.receipt.map(|r| format!("{:08x}", r.chain)),
        "process": turn.receipt.map(|r| format!("{:04x}", r.nonce)),
        "epoch": turn.receipt.map(|r| r.epoch),
        "similarity": heard.then(|| present::rounded(turn.similarity.into(), 3)),
        "longestSilenceMs": heard.then(|| ms(turn.longest_silence)),
        "problems": turn.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn ms(duration: Duration) -> f64 {
    present::rounded(duration.as_secs_f64() * 1000.0, 1)
}

/// Routers date their answers with whole seconds: less than one says nothing.
fn known_ms(clock: ClockSkew) -> Option<i64> {
    Some(clock.ahead_ms()).filter(|ms| ms.unsigned_abs() >= 1000)
}

const HEADER: [&str; 7] = ["TURN", "ANSWERED AFTER", "RECEIPT", "PROCESS", "LIKENESS", "LONGEST PAUSE", "ANSWER"];
const RIGHT: [usize; 4] = [0, 1, 4, 5];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unanswered_turn_has_no_figures() {
        let turn = TurnReport {
            turn: 1,
            receipt: None,
            expected_chain: 0,
            answer: None,
            similarity: 0.0,
            worst_segment: 0.0,
            response_delay: None,
            longest_silence: Duration::ZERO,
            problems: vec![verify::Problem::NoAnswer { turn: 1 }],
        };
        assert_eq!(row(&turn), ["1", "-", "-", "-", "-", "-", "turn 1 was not answered"]);
        let json = turn_json(&turn);
        assert_eq!((&json["similarity"], &json["longestSilenceMs"]), (&Value::Null, &Value::Null));
        let heard = TurnReport { answer: Some(0..1), similarity: 0.987_65, ..turn };
        assert_eq!(turn_json(&heard)["similarity"], 0.988);
        assert_eq!(ms(Duration::from_nanos(1_234_567)), 1.2);
    }
}
