//! What the demo found, and whether that is good enough.

use std::time::Duration;

use antiphon_client::{CallReport, SwitchReason};
use antiphon_crds::compile::FleetPlan;
use antiphon_media::{script::ScriptTurn, verify};

use super::world::Place;
use crate::{
    caller::{CallFailure, Called},
    fleet::ProcessSpec,
};

/// One caller's call, judged by its recording.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) caller: usize,
    pub(super) place: Option<Placed>,
    pub(super) problems: Vec<String>,
    /// Answers that were the caller's own words behind the right receipt.
    pub(super) answers: usize,
    pub(super) turns: usize,
}

/// What is known of a call that came about.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) region: String,
    pub(super) reason: String,
    pub(super) ticket: Duration,
    pub(super) report: CallReport,
    pub(super) relays: Vec<String>,
    pub(super) response_delays: Vec<Duration>,
    pub(super) longest_silence: Duration,
    pub(super) similarity: f32,
    pub(super) loss: f64,
}

impl Verdict {
    pub(super) fn of(caller: usize, called: Result<Called, CallFailure>, script: &[ScriptTurn]) -> Self {
        let turns = script.len();
        let called = match called {
            Ok(called) => called,
            Err(failure) => {
                return Self { caller, place: None, problems: vec![failure.to_string()], answers: 0, turns };
            }
        };
        let found = called.verify(script);
        let mut problems: Vec<_> = called.broken.iter().map(ToString::to_string).collect();
        problems.extend(found.all_problems().map(ToString::to_string));
        if called.report.rebinds.is_empty() {
            problems.push("its UDP address did not change".into());
        }
        if called.report.rebinds.iter().any(|rebind| rebind.gap.is_none()) {
            problems.push("nothing was heard after its UDP address changed".into());
        }
        let answers = found.turns.iter().filter(|turn| turn.receipt.is_some() && turn.problems.is_empty()).count();
        Self { caller, place: Some(Placed::of(&called, &found)), problems, answers, turns }
    }

    pub(super) fn passed(&self) -> bool {
        self.problems.is_empty() && self.answers == self.turns
    }
}

impl Placed {
    fn of(called: &Called, found: &verify::Report) -> Self {
        Self {
            region: called.session.region.clone(),
            reason: called.session.reason.clone(),
            ticket: called.ticket,
            report: called.report.clone(),
            relays: called.session.relays.iter().map(|relay| relay.address.clone()).collect(),
            response_delays: found.turns.iter().filter_map(|turn| turn.response_delay).collect(),
            longest_silence: found.longest_silence(),
            similarity: found.least_similarity(),
            loss: called.loss(),
        }
    }
}

/// What was done to the fleet or its callers.
#[derive(Debug, Clone)]
pub(super) struct Incident {
    pub(super) what: String,
    kind: IncidentKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum IncidentKind {
    AddressesChanged(usize),
    RelayDrained(String),
    RelayKilled(String),
}

/// How an incident went: callers concerned, and how long the worst was without a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Effect {
    pub(super) callers: usize,
    pub(super) longest_gap: Duration,
    /// Callers who heard nothing any more.
    pub(super) lost: usize,
}

impl Incident {
    pub(super) fn addresses_changed(callers: usize) -> Self {
        Self { what: "UDP address changed".into(), kind: IncidentKind::AddressesChanged(callers) }
    }

    pub(super) fn relay_drained(region: &str, relay: &ProcessSpec) -> Self {
        let kind = IncidentKind::RelayDrained(relay.ip.to_string());
        Self { what: format!("relay {region}/{} drained", relay.name), kind }
    }

    pub(super) fn relay_killed(region: &str, relay: &ProcessSpec) -> Self {
        let kind = IncidentKind::RelayKilled(relay.ip.to_string());
        Self { what: format!("relay {region}/{} killed", relay.name), kind }
    }

    /// What the callers noticed of it.
    pub(super) fn effect(&self, verdicts: &[Verdict]) -> Effect {
        let calls = verdicts.iter().filter_map(|verdict| verdict.place.as_ref());
        let gaps: Vec<Option<Duration>> = match &self.kind {
            IncidentKind::AddressesChanged(_) => {
                calls.flat_map(|call| call.report.rebinds.iter().map(|rebind| rebind.gap)).collect()
            }
            IncidentKind::RelayDrained(ip) => calls.flat_map(|c| left(c, ip, &[SwitchReason::Draining])).collect(),
            IncidentKind::RelayKilled(ip) => {
                calls.flat_map(|c| left(c, ip, &[SwitchReason::Silent, SwitchReason::Refused])).collect()
            }
        };
        Effect {
            callers: gaps.len(),
            longest_gap: gaps.iter().flatten().max().copied().unwrap_or_default(),
            lost: gaps.iter().filter(|gap| gap.is_none()).count(),
        }
    }

    /// Whether it happened to anybody at all: an incident that nobody noticed proves nothing.
    fn told(&self, verdicts: &[Verdict]) -> bool {
        let effect = self.effect(verdicts);
        match &self.kind {
            IncidentKind::AddressesChanged(expected) => effect.callers >= *expected,
            IncidentKind::RelayDrained(_) | IncidentKind::RelayKilled(_) => effect.callers > 0,
        }
    }
}

/// A caller's last change away from a relay for one of these reasons.
fn left(call: &Placed, ip: &str, reasons: &[SwitchReason]) -> Option<Option<Duration>> {
    let from = |index: usize| call.relays.get(index).and_then(|address| address.rsplit_once(':')).map(|(ip, _)| ip);
    let switch = call
        .report
        .switches
        .iter()
        .rev()
        .find(|s| reasons.contains(&s.switch.reason) && from(s.switch.from) == Some(ip));
    // A switch to a relay that is silent too is followed by another one: what counts is that packets came again.
    switch.map(|switch| {
        let later = call.report.switches.iter().filter(|s| s.at >= switch.at).find_map(|s| s.gap);
        switch.gap.or(later)
    })
}

/// The whole demo.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) regions: Vec<(String, String)>,
    pub(super) places: Vec<Place>,
    pub(super) verdicts: Vec<Verdict>,
    pub(super) incidents: Vec<Incident>,
    pub(super) took: Duration,
}

impl Outcome {
    pub(super) fn new(
        plan: &FleetPlan,
        places: Vec<Place>,
        verdicts: Vec<Verdict>,
        incidents: Vec<Incident>,
        took: Duration,
    ) -> Self {
        let regions = plan.regions.iter().map(|region| (region.name.clone(), region.cloud.clone())).collect();
        Self { regions, places, verdicts, incidents, took }
    }

    /// Every call complete, every answer the caller's own, every incident noticed.
    pub(super) fn passed(&self) -> bool {
        self.verdicts.iter().all(Verdict::passed) && self.unnoticed().next().is_none()
    }

    /// Incidents that happened to nobody.
    pub(super) fn unnoticed(&self) -> impl Iterator<Item = &Incident> {
        self.incidents.iter().filter(|incident| !incident.told(&self.verdicts))
    }

    /// Calls that came about.
    pub(super) fn calls(&self) -> impl Iterator<Item = &Placed> {
        self.verdicts.iter().filter_map(|verdict| verdict.place.as_ref())
    }
}
