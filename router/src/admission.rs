//! The placement service: plan, ask, answer with a ticket.
//!
//! A placement runs in a task of its own, so that a caller who goes away in the middle leaves no lease behind: the task
//! finishes, finds nobody waiting and gives back what it got.

mod ask;
mod quota;
mod sessions;

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use antiphon_core::{
    id::SessionId,
    placement::{RefusalReason, Verdict},
};
use antiphon_proto::v1;
use antiphon_runtime::Tasks;
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, oneshot},
    time::{Instant, timeout_at},
};

use crate::{
    auth::Caller,
    create::Create,
    field::FieldError,
    fleet::{Fleet, NoPlace, Planned, Target, amend},
    memory::{Decision, Decisions, Incumbents},
    metrics::{Metrics, TicketOutcome},
    peering::Peers,
    refusals::{Failure, Reason},
};
use ask::Answer;
use quota::Quota;
pub(crate) use sessions::{Listing, MAX_LISTED};

/// Admits sessions.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) peers: Peers,
    pub(crate) tasks: Tasks,
    pub(crate) metrics: Metrics,
    decisions: Mutex<Decisions>,
    incumbents: Mutex<Incumbents>,
    /// One placement of a session at a time: a retry must not be placed beside its original.
    turns: Mutex<HashMap<SessionId, Weak<tokio::sync::Mutex<()>>>>,
    placements: Arc<Semaphore>,
    quota: Quota,
}

/// On whose behalf, and how far a placement may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// An application asked: any region.
    Fleet,
    /// Another region's router asked: this region only.
    Region,
}

/// What was found when somebody was asked.
#[derive(Debug)]
struct Finding {
    region: String,
    worker: String,
    verdict: Verdict,
    detail: String,
}

/// A placement under way.
#[derive(Debug)]
struct Attempt<'a> {
    tenant: &'a str,
    create: &'a Create,
    scope: Scope,
    deadline: Instant,
    tried: Vec<Target>,
    findings: Vec<Finding>,
    /// Who may hold a lease of this session although we got no answer.
    unsure: Vec<Target>,
}

impl Admission {
    pub(crate) fn new(fleet: Arc<Fleet>, tasks: Tasks, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            peers: Peers::new(&fleet.identity),
            fleet,
            tasks,
            metrics,
            decisions: Mutex::default(),
            incumbents: Mutex::default(),
            turns: Mutex::default(),
            placements: Arc::new(Semaphore::new(MAX_PLACEMENTS)),
            quota: Quota::default(),
        })
    }

    /// A session for an application.
    pub(crate) async fn create(
        self: &Arc<Self>,
        caller: &Caller,
        request: &v1::CreateSessionRequest,
    ) -> Result<v1::Session, Failure> {
        let outcome = self.admit(caller, request).await;
        if let Err(failure) = &outcome {
            self.metrics.failure(failure);
        }
        outcome
    }

    async fn admit(
        self: &Arc<Self>,
        caller: &Caller,
        request: &v1::CreateSessionRequest,
    ) -> Result<v1::Session, Failure> {
        let create = Create::check(request, SessionId::from_bytes(rand::random()))?;
        if !caller.allows(&create.agent) {
            let text = format!("this API key is not for agent {}", create.agent);
            return Err(Failure::Forbidden(text));
        }
        let admitted = self.admit_tenant(&caller.tenant, &create).await?;
        let session = self
            .place(caller.tenant.clone(), create, Scope::Fleet)
            .await?;
        admitted.keep();
        Ok(session)
    }

    /// A session in this region for another region's router, which has checked the caller.
    pub(crate) async fn place_here(
        self: &Arc<Self>,
        tenant: &str,
        request: &v1::CreateSessionRequest,
    ) -> Result<v1::Session, Failure> {
        let create = Create::check(request, SessionId::from_bytes(rand::random()))?;
        if !create.regions.is_empty() && !create.regions.contains(&self.fleet.region) {
            let problem = format!("does not name {}", self.fleet.region);
            return Err(FieldError::new("constraints.regions", problem).into());
        }
        self.place(tenant.to_owned(), create, Scope::Region).await
    }

    async fn place(
        self: &Arc<Self>,
        tenant: String,
        create: Create,
        scope: Scope,
    ) -> Result<v1::Session, Failure> {
        if let Some(agent) = self.fleet.records().agents.get(&create.agent)
            && !agent.codecs.contains(&create.codec)
        {
            let problem = format!(
                "agent {} does not speak {}",
                create.agent,
                create.codec_label()
            );
            return Err(FieldError::new("codec", problem).into());
        }
        let permit = Arc::clone(&self.placements).try_acquire_owned();
        let permit = permit.map_err(|_| {
            Failure::refused(
                Reason::Overloaded,
                "too many requests at once",
                1000,
                vec![],
            )
        })?;
        let (answer, outcome) = oneshot::channel();
        let this = Arc::clone(self);
        self.tasks.spawn("placement", async move {
            this.run(&tenant, &create, scope, answer).await;
            drop(permit);
            Ok(())
        });
        let stopping = |_| Failure::Unavailable("the router is stopping: try again".into());
        outcome.await.map_err(stopping)?
    }

    async fn run(
        self: &Arc<Self>,
        tenant: &str,
        create: &Create,
        scope: Scope,
        mut answer: oneshot::Sender<Result<v1::Session, Failure>>,
    ) {
        let started = Instant::now();
        let turn = self.turn(create.session);
        let _turn = turn.lock().await;
        let mut attempt = Attempt {
            tenant,
            create,
            scope,
            deadline: started + PLACEMENT_DEADLINE,
            tried: Vec::new(),
            findings: Vec::new(),
            unsure: Vec::new(),
        };
        let outcome = self.decide(&mut attempt, &mut answer).await;
        self.metrics
            .placement_seconds
            .observe(started.elapsed().as_secs_f64());
        match outcome {
            Ok((session, decision)) => {
                let target = decision.target.clone();
                let remote = matches!(target, Target::Region { .. });
                self.decisions.lock().remember(create.session, decision);
                if answer.send(Ok(session)).is_ok() {
                    self.metrics.ticket(if remote {
                        TicketOutcome::Remote
                    } else {
                        TicketOutcome::Local
                    });
                } else {
                    self.metrics.ticket(TicketOutcome::Cancelled);
                    attempt.unsure.push(target);
                }
            }
            Err(failure) => {
                // Nobody may be waiting any more; then nobody needs it.
                let _ = answer.send(Err(failure));
            }
        }
        for target in &attempt.unsure {
            self.give_back(target, create.session, create.epoch.value(), tenant)
                .await;
        }
    }

    /// The lock of a session's placements; locks that nobody holds are swept when there are many.
    fn turn(&self, session: SessionId) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock();
        if let Some(turn) = turns.get(&session).and_then(Weak::upgrade) {
            return turn;
        }
        if turns.len() >= 2 * MAX_PLACEMENTS {
            turns.retain(|_, turn| turn.strong_count() > 0);
        }
        let turn = Arc::default();
        turns.insert(session, Arc::downgrade(&turn));
        turn
    }

    async fn decide(
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
        self.fleet
            .plan(create, here_only, incumbent, rand::random())
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
        if decision.epoch > create.epoch {
            let text = format!("epoch {} is older than {}", create.epoch, decision.epoch);
            return Err(Failure::Conflict(text));
        }
        if decision.epoch < create.epoch && decision.tenant == attempt.tenant {
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
        let Planned {
            targets,
            mut claim,
            mut candidates,
        } = planned;
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
                Answer::Refused(detail) => {
                    attempt.found(&self.fleet, &target, Verdict::Refused, detail)
                }
                Answer::Unreachable(detail) => {
                    attempt.found(&self.fleet, &target, Verdict::Unreachable, detail);
                }
                Answer::Skipped => attempt.found(
                    &self.fleet,
                    &target,
                    Verdict::Full,
                    Verdict::Full.to_string(),
                ),
            }
        }
        if asked > 0 {
            return Ok(None);
        }
        attempt.amend(&mut candidates);
        let text = "everybody who was asked refused or did not answer";
        Err(Failure::refused(
            Reason::NoCapacity,
            text,
            RETRY_MS,
            candidates,
        ))
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
        amend(
            &mut candidates,
            &session.region,
            &session.worker,
            Verdict::Chosen,
            None,
        );
        let line = candidates
            .iter()
            .find(|c| c.region == session.region && c.worker.is_empty());
        let eligible = |c: &&v1::Candidate| c.worker.is_empty() && c.score > 0.0;
        let attempts = attempt.tried.len();
        session.reason = format!(
            "{} of {} eligible region(s){}; {} took it at attempt {attempts}",
            session.region,
            candidates.iter().filter(eligible).count().max(1),
            match line {
                Some(line) if line.estimated_rtt_ms > 0 => format!(
                    ", about {} ms away, {} free",
                    line.estimated_rtt_ms, line.free
                ),
                Some(line) => format!(", {} free", line.free),
                None => String::new(),
            },
            session.worker,
        );
        let records = self.fleet.records();
        if let (Some(location), Some(region)) =
            (create.location, records.regions.get(&session.region))
        {
            let now = self.fleet.clock.now();
            self.incumbents
                .lock()
                .remember(&create.agent, location.cell(), region.number, now);
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
            Target::Region { name, .. } => (name.clone(), String::new()),
        };
        self.findings.push(Finding {
            region,
            worker,
            verdict,
            detail,
        });
    }

    /// Puts what was found by asking over what was planned.
    fn amend(&self, candidates: &mut [v1::Candidate]) {
        for finding in &self.findings {
            amend(
                candidates,
                &finding.region,
                &finding.worker,
                finding.verdict,
                Some(finding.detail.clone()),
            );
        }
    }
}

fn refused(no_place: NoPlace, attempt: &Attempt<'_>) -> Failure {
    let NoPlace {
        refusal,
        mut candidates,
        ..
    } = no_place;
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

/// Placements under way at once.
const MAX_PLACEMENTS: usize = 4096;
/// Workers and regions asked for one request.
const MAX_ATTEMPTS: usize = 8;
/// From the request to its answer, at the latest.
const PLACEMENT_DEADLINE: Duration = Duration::from_secs(5);
const RETRY_MS: u32 = 1000;
