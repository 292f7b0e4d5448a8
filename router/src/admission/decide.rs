//! One placement from plan to grant: ask the targets in order, plan again with what was learnt, refuse with reasons.

use std::{sync::Arc, time::SystemTime};

use antiphon_core::placement::{RefusalReason, Verdict};
use antiphon_proto::v1;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::{Admission, Attempt, Finding, Scope, ask::Answer};
use crate::{
    fleet::{Fleet, NoPlace, Planned, Target, amend},
    memory::Decision,
    refusals::{Failure, Reason},
};

impl Admission {
    pub(super) async fn decide(
        self: &Arc<Self>,
        attempt: &mut Attempt<'_>,
        answer: &mut oneshot::Sender<Result<v1::Session, Failure>>,
    ) -> Result<(v1::Session, Decision), Failure> {
        if let Some(again) = self.decide_again(attempt).await? {
            return Ok(again);
        }
        let mut settled = self.fleet.settled.subscribe();
        loop {
            settled.borrow_and_update();
            let planned = match self.plan(attempt) {
                Ok(planned) => planned,
                // Leases are being asked for that may come free again: the last word is not spoken.
                Err(no_place) if no_place.unsettled => {
                    let wait = timeout_at(attempt.deadline, settled.changed());
                    tokio::select! {
                        waited = wait => match waited {
                            Ok(_) => continue,
                            Err(_late) => return Err(refused(no_place, attempt)),
                        },
                        () = answer.closed() => return Err(gone()),
                    }
                }
                Err(no_place) => return Err(refused(no_place, attempt)),
            };
            if let Some(placed) = self.try_targets(attempt, planned, answer).await? {
                return Ok(placed);
            }
        }
    }

    fn plan(self: &Arc<Self>, attempt: &Attempt<'_>) -> Result<Planned, NoPlace> {
        let create = attempt.create;
        let now = self.fleet.clock.now();
        let cell = create.location.map(|l| l.cell());
        let incumbent = cell.and_then(|c| self.incumbents.lock().of(&create.agent, c, now));
        let here_only = attempt.scope == Scope::Region;
        self.fleet.plan(create, here_only, incumbent, rand::random())
    }

    /// The same request again: whoever took it is asked first, and answers the same.
    async fn decide_again(
        self: &Arc<Self>,
        attempt: &mut Attempt<'_>,
    ) -> Result<Option<(v1::Session, Decision)>, Failure> {
        let create = attempt.create;
        let known = self.decisions.lock().of(create.session).cloned();
        let Some(mut decision) = known else {
            return Ok(None);
        };
        let own = decision.tenant == attempt.tenant;
        if decision.epoch > create.epoch && own {
            let text = format!("epoch {} is older than {}", create.epoch, decision.epoch);
            return Err(Failure::Conflict(text));
        }
        if decision.epoch < create.epoch && own {
            return Ok(None);
        }
        if !decision.is_of(attempt.tenant, create) {
            let text = "this session is placed already with other properties";
            return Err(Failure::Conflict(text.to_owned()));
        }
        let target = decision.target.clone();
        match self.ask(attempt, &target, None).await {
            Answer::Granted(mut session) => {
                session.reason.clone_from(&decision.explanation.reason);
                session.worker.clone_into(&mut decision.explanation.worker);
                Ok(Some((*session, decision)))
            }
            // Not asked again: its late answer will be given back.
            Answer::Unreachable(detail) => {
                attempt.found(&self.fleet, &target, Verdict::Unreachable, detail);
                attempt.tried.push(target);
                Ok(None)
            }
            Answer::Conflict(text) => Err(Failure::Conflict(text)),
            // It changed its mind; the request is planned like a new one.
            Answer::Refused(_) | Answer::Skipped => Ok(None),
        }
    }

    async fn try_targets(
        self: &Arc<Self>,
        attempt: &mut Attempt<'_>,
        planned: Planned,
        answer: &oneshot::Sender<Result<v1::Session, Failure>>,
    ) -> Result<Option<(v1::Session, Decision)>, Failure> {
        let Planned { targets, mut claim, mut candidates } = planned;
        let mut asked = 0;
        for target in targets {
            let claim = claim.take();
            if attempt.tried.contains(&target) {
                continue;
            }
            if answer.is_closed() {
                return Err(gone());
            }
            let late = Instant::now() >= attempt.deadline;
            if late || attempt.tried.len() >= MAX_ATTEMPTS {
                break;
            }
            asked += 1;
            attempt.tried.push(target.clone());
            match self.ask(attempt, &target, claim).await {
                Answer::Granted(session) => {
                    attempt.amend(&mut candidates);
                    let decided = self.decided(attempt, *session, target, candidates);
                    return Ok(Some(decided));
                }
                Answer::Conflict(text) => return Err(Failure::Conflict(text)),
                Answer::Refused(detail) => attempt.found(&self.fleet, &target, Verdict::Refused, detail),
                Answer::Unreachable(detail) => {
                    attempt.found(&self.fleet, &target, Verdict::Unreachable, detail);
                }
                Answer::Skipped => attempt.found(&self.fleet, &target, Verdict::Full, Verdict::Full.to_string()),
            }
        }
        if asked > 0 {
            return Ok(None);
        }
        attempt.amend(&mut candidates);
        let here = &self.fleet.region;
        if attempt.findings.iter().any(|f| f.region == *here) {
            let text = "its workers refused or did not answer".to_owned();
            amend(&mut candidates, here, "", Verdict::Refused, Some(text));
        }
        let text = "everybody who was asked refused or did not answer";
        Err(Failure::refused(Reason::NoCapacity, text, RETRY_MS, candidates))
    }

    fn decided(
        &self,
        attempt: &Attempt<'_>,
        mut session: v1::Session,
        target: Target,
        mut candidates: Vec<v1::Candidate>,
    ) -> (v1::Session, Decision) {
        let create = attempt.create;
        amend(&mut candidates, &session.region, "", Verdict::Chosen, None);
        amend(&mut candidates, &session.region, &session.worker, Verdict::Chosen, None);
        let attempts = attempt.tried.len();
        session.reason = reason(&session, &candidates, attempts);
        let records = self.fleet.records();
        if let (Some(location), Some(region)) = (create.location, records.regions.get(&session.region)) {
            let now = self.fleet.clock.now();
            self.incumbents.lock().remember(&create.agent, location.cell(), region.number, now);
        }
        let explanation = v1::Explanation {
            session: session.session.clone(),
            agent: create.agent.clone(),
            region: session.region.clone(),
            worker: session.worker.clone(),
            reason: session.reason.clone(),
            decided_at: Some(SystemTime::now().into()),
            candidates,
            attempts: u32::try_from(attempts).unwrap_or(u32::MAX),
        };
        let decision = Decision {
            tenant: attempt.tenant.to_owned(),
            epoch: create.epoch,
            client_key: create.client_key,
            codec: create.codec,
            target,
            explanation,
        };
        (session, decision)
    }
}

impl Attempt<'_> {
    fn found(&mut self, fleet: &Fleet, target: &Target, verdict: Verdict, detail: String) {
        let (region, worker) = match target {
            Target::Worker(_, name) => (fleet.region.clone(), name.clone()),
            Target::Region { name } => (name.clone(), String::new()),
        };
        self.findings.push(Finding { region, worker, verdict, detail });
    }

    /// Puts what was found by asking over what was planned.
    fn amend(&self, candidates: &mut [v1::Candidate]) {
        for finding in &self.findings {
            amend(candidates, &finding.region, &finding.worker, finding.verdict, Some(finding.detail.clone()));
        }
    }
}

fn refused(no_place: NoPlace, attempt: &Attempt<'_>) -> Failure {
    let NoPlace { refusal, mut candidates, .. } = no_place;
    attempt.amend(&mut candidates);
    let retry = refusal.retry_after.map_or(0, |d| d.as_millis().max(1));
    let text = match refusal.reason {
        RefusalReason::NoSuchAgent => format!("there is no agent {}", attempt.create.agent),
        reason => reason.to_string(),
    };
    let retry = u32::try_from(retry).unwrap_or(u32::MAX);
    Failure::refused(refusal.reason.into(), text, retry, candidates)
}

fn gone() -> Failure {
    Failure::Unavailable("the caller went away".to_owned())
}

/// Workers and regions asked for one request.
const MAX_ATTEMPTS: usize = 8;
const RETRY_MS: u32 = 1000;

/// Why the session is where it is, in one line: the kind of reason, a colon, the figures.
fn reason(session: &v1::Session, candidates: &[v1::Candidate], attempts: usize) -> String {
    let regions = || candidates.iter().filter(|c| c.worker.is_empty());
    let Some(chosen) = regions().find(|c| c.region == session.region) else {
        return format!("placed: {} took it at attempt {attempts}", session.worker);
    };
    let (rtt, free) = (chosen.estimated_rtt_ms, chosen.free);
    let nearer = regions().filter(|c| c.estimated_rtt_ms > 0 && c.estimated_rtt_ms < rtt);
    let kind = match nearer.min_by_key(|c| c.estimated_rtt_ms) {
        _ if rtt == 0 => "best region for a caller whose place is unknown".to_owned(),
        None => "nearest region".to_owned(),
        Some(nearest) => format!("best region, {} {}", nearest.region, Verdict::predicate(&nearest.verdict)),
    };
    let distance = if rtt == 0 { String::new() } else { format!("about {rtt} ms away, ") };
    format!("{kind}: {distance}{free} free; {} took it at attempt {attempts}", session.worker)
}
