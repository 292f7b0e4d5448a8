//! The placement service: plan, ask, answer with a ticket.
//!
//! A placement runs in a task of its own, so that a caller who goes away in the middle leaves no lease behind: the task
//! finishes, finds nobody waiting and gives back what it got.

mod ask;
mod decide;
mod quota;
mod rate;
mod sessions;

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use antiphon_core::{id::SessionId, placement::Verdict};
use antiphon_proto::{ticket::codec_label, v1};
use antiphon_runtime::Tasks;
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedMutexGuard, Semaphore, oneshot},
    time::Instant,
};

use crate::{
    auth::Caller,
    create::Create,
    field::FieldError,
    fleet::{Fleet, Target},
    memory::{Decisions, Incumbents},
    metrics::{Metrics, TicketOutcome},
    peering::Peers,
    refusals::{Failure, Reason},
};
use quota::Quota;
pub(crate) use rate::Question;
use rate::Rates;
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
    rates: Rates,
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
    /// Keeps the next placement of this session waiting until this one and all that it gives back are done.
    turn: Arc<OwnedMutexGuard<()>>,
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
            rates: Rates::default(),
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
        self.admit_rate(caller, &create)?;
        let admitted = self.admit_tenant(&caller.tenant, &create).await?;
        let session = self.place(caller.tenant.clone(), create, Scope::Fleet).await?;
        admitted.keep(&session, &self.fleet.region, self.fleet.clock.now());
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

    async fn place(self: &Arc<Self>, tenant: String, create: Create, scope: Scope) -> Result<v1::Session, Failure> {
        if let Some(agent) = self.fleet.records().agents.get(&create.agent)
            && !agent.codecs.contains(&create.codec)
        {
            let spoken: Vec<_> = agent.codecs.iter().filter_map(|codec| codec_label(*codec)).collect();
            let (agent, asked) = (&create.agent, create.codec_label());
            let problem = format!("agent {agent} does not speak {asked}, only {}", spoken.join(" and "));
            return Err(FieldError::new("codec", problem).into());
        }
        let permit = Arc::clone(&self.placements).try_acquire_owned();
        let permit =
            permit.map_err(|_| Failure::refused(Reason::Overloaded, "too many requests at once", 1000, vec![]))?;
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
        let turn = self.turn(create.session).lock_owned().await;
        let mut attempt = Attempt {
            tenant,
            create,
            scope,
            deadline: started + PLACEMENT_DEADLINE,
            tried: Vec::new(),
            findings: Vec::new(),
            turn: Arc::new(turn),
        };
        let outcome = self.decide(&mut attempt, &mut answer).await;
        self.metrics.placement_seconds.observe(started.elapsed().as_secs_f64());
        match outcome {
            Ok((session, decision)) => {
                let target = decision.target.clone();
                let remote = matches!(target, Target::Region { .. });
                self.decisions.lock().remember(create.session, decision);
                if answer.send(Ok(session)).is_ok() {
                    self.metrics.ticket(if remote { TicketOutcome::Remote } else { TicketOutcome::Local });
                } else {
                    self.metrics.ticket(TicketOutcome::Cancelled);
                    self.give_back_later(&attempt, target, None);
                }
            }
            Err(failure) => {
                // Nobody may be waiting any more; then nobody needs it.
                let _ = answer.send(Err(failure));
            }
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
}

/// Placements under way at once.
const MAX_PLACEMENTS: usize = 4096;
/// From the request to its answer, at the latest.
const PLACEMENT_DEADLINE: Duration = Duration::from_secs(5);
