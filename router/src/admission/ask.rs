//! Asking one worker or one region, and giving back.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_core::id::{ServerId, SessionId};
use antiphon_proto::{
    refusal,
    ticket::{self, TicketClaims},
    v1::{self, peer_client::PeerClient, reserve_response, worker_client::WorkerClient},
};
use tokio::time::timeout;
use tonic::{Code, Request, Status, transport::Channel};

use super::{Admission, Attempt};
use crate::{
    fleet::{Claim, Target, neighbourhood},
    metrics::AttemptOutcome,
};

/// What somebody who was asked to take a session answered.
#[derive(Debug)]
pub(super) enum Answer {
    Granted(Box<v1::Session>),
    /// Why not.
    Refused(String),
    /// The session is somebody else's, or newer, there: nobody else may be asked. What to tell the caller.
    Conflict(String),
    /// It may have granted; what went wrong.
    Unreachable(String),
    /// Not asked: no lease was left.
    Skipped,
}

impl Admission {
    pub(super) async fn ask(self: &Arc<Self>, attempt: &Attempt<'_>, target: &Target, claim: Option<Claim>) -> Answer {
        let (answer, claim) = match target {
            Target::Worker(number, _) => {
                let Some(claim) = claim.or_else(|| self.fleet.claim(*number)) else {
                    return Answer::Skipped;
                };
                (self.ask_worker(attempt, &claim).await, Some(claim))
            }
            Target::Region { name } => (self.ask_region(attempt, name).await, None),
        };
        match &answer {
            Answer::Granted(_) => self.metrics.attempt(AttemptOutcome::Granted),
            Answer::Refused(_) | Answer::Conflict(_) => self.metrics.attempt(AttemptOutcome::Refused),
            Answer::Unreachable(_) => {
                self.metrics.attempt(AttemptOutcome::Unreachable);
                self.give_back_later(attempt, target.clone(), claim);
            }
            Answer::Skipped => {}
        }
        answer
    }

    /// Gives back what somebody may have granted without our hearing of it. The claim stays until then: who waits for
    /// a lease waits for this one too.
    pub(super) fn give_back_later(self: &Arc<Self>, attempt: &Attempt<'_>, target: Target, claim: Option<Claim>) {
        let (this, turn) = (Arc::clone(self), Arc::clone(&attempt.turn));
        let (session, epoch) = (attempt.create.session, attempt.create.epoch.value());
        let tenant = attempt.tenant.to_owned();
        self.tasks.spawn("give back", async move {
            for pause in RELEASE_PAUSES {
                if this.give_back(&target, session, epoch, &tenant).await.is_some() {
                    break;
                }
                tokio::time::sleep(pause).await;
            }
            drop(claim);
            drop(turn);
            Ok(())
        });
    }

    async fn ask_worker(&self, attempt: &Attempt<'_>, claim: &Claim) -> Answer {
        let create = attempt.create;
        let mut request = Request::new(v1::ReserveRequest {
            session: create.session.as_bytes().to_vec().into(),
            epoch: create.epoch.value(),
            agent: create.agent.clone(),
            client_key: create.client_key.to_vec().into(),
            codec: create.codec.into(),
            ttl_ms: LEASE_TTL_MS,
            tenant: attempt.tenant.to_owned(),
            neighbourhood: create.location.map_or(0, neighbourhood),
        });
        request.set_timeout(RESERVE_DEADLINE);
        let mut worker = WorkerClient::new(claim.channel.clone());
        let answer = match timeout(RESERVE_DEADLINE, worker.reserve(request)).await {
            Err(_late) => return Answer::Unreachable("did not answer in time".to_owned()),
            Ok(Err(status)) => return Answer::Unreachable(describe(&status)),
            Ok(Ok(response)) => response.into_inner().result,
        };
        match answer {
            Some(reserve_response::Result::Grant(grant)) => {
                claim.answered(grant.free);
                match self.session(attempt, claim, grant) {
                    Ok(session) => Answer::Granted(Box::new(session)),
                    Err(problem) => Answer::Unreachable(problem),
                }
            }
            Some(reserve_response::Result::Refusal(refusal)) => {
                claim.answered(refusal.free);
                match refusal.reason.as_str() {
                    "other_client" => Answer::Conflict(foreign(create.session)),
                    reason => Answer::Refused(format!("{reason}: {}", refusal.detail)),
                }
            }
            None => Answer::Unreachable("answered neither grant nor refusal".to_owned()),
        }
    }

    /// The answer to the application: the worker's grant and the ticket for it.
    fn session(&self, attempt: &Attempt<'_>, claim: &Claim, grant: v1::ReserveGrant) -> Result<v1::Session, String> {
        let create = attempt.create;
        let server_id = ServerId::from_u64(grant.server_id);
        let own = self.fleet.records();
        let own = own.regions.get(&self.fleet.region).map(|r| r.number);
        let its = (server_id.worker, server_id.incarnation) == (claim.number, claim.incarnation);
        if !its || Some(server_id.region) != own || grant.initial_connection_ids.is_empty() {
            return Err("granted what is not its own to grant".to_owned());
        }
        let now = unix_s(SystemTime::now());
        let fallback = SystemTime::now() + Duration::from_millis(LEASE_TTL_MS.into());
        let expires_at = grant.expires_at.unwrap_or_else(|| fallback.into());
        let claims = TicketClaims {
            v: ticket::VERSION,
            session: create.session,
            epoch: create.epoch,
            agent: create.agent.clone(),
            region: self.fleet.region.clone(),
            server_id,
            client_key: create.client_key,
            codec: create.codec,
            tenant: attempt.tenant.to_owned(),
            iat: now,
            exp: u64::try_from(expires_at.seconds).unwrap_or(0),
            lease: grant.lease,
        };
        let ticket = self.fleet.ticket_signer().sign(&claims);
        Ok(v1::Session {
            session: create.session.to_string(),
            epoch: create.epoch.value(),
            ticket: ticket.map_err(|e| e.to_string())?,
            initial_connection_ids: grant.initial_connection_ids,
            relays: self.fleet.relays_for(create.location, &self.fleet.region),
            server_name: claim.server_name.clone(),
            trust_anchor: self.fleet.identity.ca().to_vec().into(),
            expires_at: Some(expires_at),
            codec: create.codec.into(),
            region: self.fleet.region.clone(),
            worker: claim.name.clone(),
            reason: String::new(),
        })
    }

    async fn ask_region(&self, attempt: &Attempt<'_>, name: &str) -> Answer {
        // One router only: another one might place the same session a second time.
        let Some(channel) = self.routers(name).into_iter().next() else {
            return Answer::Refused("has no router that can be reached".to_owned());
        };
        self.fleet.debit(name, &attempt.create.agent);
        let mut request = Request::new(v1::PlaceRequest {
            request: Some(attempt.create.to_proto()),
            tenant: attempt.tenant.to_owned(),
        });
        request.set_timeout(PLACE_DEADLINE);
        let mut peer = PeerClient::new(channel);
        match timeout(PLACE_DEADLINE, peer.place(request)).await {
            Err(_late) => Answer::Unreachable("did not answer in time".to_owned()),
            Ok(Ok(response)) => Answer::Granted(Box::new(response.into_inner())),
            Ok(Err(status)) if status.code() == Code::AlreadyExists => Answer::Conflict(status.message().to_owned()),
            Ok(Err(status)) => match refusal::of_status(&status) {
                Some(refusal) => Answer::Refused(format!("{}: {}", refusal.reason, refusal.detail)),
                None => Answer::Unreachable(describe(&status)),
            },
        }
    }

    /// Gives a lease back, or ends the session, where it was placed. `Some(false)`: it was not there; `None`: no answer.
    pub(super) async fn give_back(
        &self,
        target: &Target,
        session: SessionId,
        epoch: u32,
        tenant: &str,
    ) -> Option<bool> {
        let request = || {
            let session = session.as_bytes().to_vec().into();
            let mut request = Request::new(v1::ReleaseRequest { session, epoch, tenant: tenant.to_owned() });
            request.set_timeout(RELEASE_DEADLINE);
            request
        };
        let released = match target {
            Target::Worker(number, _) => {
                let channel = self.fleet.worker_channel(*number)?;
                let answer = timeout(RELEASE_DEADLINE, WorkerClient::new(channel).release(request())).await;
                let released = answer.ok()?.ok()?.into_inner().released;
                if released {
                    self.fleet.released(*number);
                }
                released
            }
            Target::Region { name } => {
                let ask = |channel| {
                    let request = request();
                    async move { PeerClient::new(channel).release(request).await }
                };
                self.ask_routers(name, RELEASE_DEADLINE, ask).await?.into_inner().released
            }
        };
        Some(released)
    }

    /// Channels to a region's routers, in the order to ask them.
    fn routers(&self, region: &str) -> Vec<Channel> {
        let addresses = self.fleet.routers_of(region);
        addresses.iter().filter_map(|address| self.peers.channel(region, address).ok()).collect()
    }

    /// Asks one router of a region after the other until one answers. For questions that may be asked twice.
    pub(super) async fn ask_routers<T, F: Future<Output = Result<T, Status>>>(
        &self,
        region: &str,
        deadline: Duration,
        ask: impl Fn(Channel) -> F,
    ) -> Option<T> {
        for channel in self.routers(region) {
            match timeout(deadline, ask(channel)).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%error, region, "a router failed to answer"),
                Err(_late) => tracing::debug!(region, "a router did not answer in time"),
            }
        }
        None
    }
}

/// A worker holds the session for another tenant or client key, which stays untold.
fn foreign(session: SessionId) -> String {
    format!("session {session} belongs to another client: ask for a session of your own by leaving it out")
}

/// What a gRPC error says, in one line.
fn describe(status: &Status) -> String {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => "did not answer in time".to_owned(),
        code => format!("failed: {code:?}: {}", status.message()),
    }
}

fn unix_s(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// How long a lease may stay unused.
const LEASE_TTL_MS: u32 = 30_000;
const RESERVE_DEADLINE: Duration = Duration::from_secs(1);
const PLACE_DEADLINE: Duration = Duration::from_secs(2);
const RELEASE_DEADLINE: Duration = Duration::from_secs(1);
/// After each try to give back; then the lease is left to expire.
const RELEASE_PAUSES: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(400), Duration::ZERO];
