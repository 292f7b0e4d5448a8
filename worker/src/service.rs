//! The worker's own API for routers: reserve, release, list.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use antiphon_core::id::{Epoch, SessionId};
use antiphon_proto::v1::{
    Codec, DescribePathRequest, ListSessionsRequest, ListSessionsResponse, ReleaseRequest, ReleaseResponse,
    ReserveGrant, ReserveRefusal, ReserveRequest, ReserveResponse, SessionPath, SessionSummary,
    reserve_response::Result as Outcome, worker_server::Worker,
};
use antiphon_runtime::{pki::Role, tls};
use tonic::{Request, Response, Status};

use crate::capacity::{self, Capacity, Terms};

/// Serves one worker's capacity.
#[derive(Debug, Clone)]
pub(crate) struct WorkerService {
    pub(crate) capacity: Arc<Capacity>,
    pub(crate) region: String,
    pub(crate) name: String,
}

impl WorkerService {
    /// Only routers of the worker's own region may ask.
    fn authorize<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let peer = tls::peer_of(request).map_err(|e| Status::unauthenticated(e.to_string()))?;
        if peer.role == Role::Router && peer.region == self.region {
            return Ok(());
        }
        Err(Status::permission_denied(format!("{peer} asked; only routers of {} may", self.region)))
    }

    fn summary(&self, terms: &Terms, active: bool) -> SessionSummary {
        SessionSummary {
            session: terms.session.to_string(),
            agent: terms.behaviour.agent.clone(),
            region: self.region.clone(),
            worker: self.name.clone(),
            state: if active { "active" } else { "reserved" }.into(),
            epoch: terms.epoch.value(),
            since: Some(terms.since.into()),
            turns: terms.turns.load(Ordering::Relaxed),
            relay: terms.relay.load(Ordering::Relaxed),
            codec: terms.codec.into(),
            tenant: terms.tenant.clone(),
        }
    }
}

#[tonic::async_trait]
impl Worker for WorkerService {
    async fn reserve(&self, request: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        self.authorize(&request)?;
        let request = check(&request.into_inner())?;
        let outcome = match self.capacity.reserve(&request) {
            Ok(terms) => Outcome::Grant(ReserveGrant {
                lease: terms.lease.0,
                initial_connection_ids: terms.attempts.iter().map(|(cid, _)| cid.as_bytes().to_vec().into()).collect(),
                expires_at: Some(terms.expires_at.into()),
                server_id: terms.server_id.to_u64(),
                agent_revision: terms.behaviour.revision.clone(),
                free: self.capacity.counts().free,
            }),
            Err(refusal) => Outcome::Refusal(ReserveRefusal {
                reason: refusal.label().into(),
                detail: refusal.to_string(),
                free: self.capacity.counts().free,
            }),
        };
        Ok(Response::new(ReserveResponse { result: Some(outcome) }))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        self.authorize(&request)?;
        let request = request.into_inner();
        let session = session_id(&request.session)?;
        let epoch = (request.epoch > 0).then(|| Epoch::new(request.epoch)).transpose();
        let epoch = epoch.map_err(|e| Status::invalid_argument(e.to_string()))?;
        let released = self.capacity.release(session, epoch, &request.tenant);
        Ok(Response::new(ReleaseResponse { released }))
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        self.authorize(&request)?;
        let request = request.into_inner();
        let limit = match request.limit {
            0 => 1_000,
            n => n.min(10_000) as usize,
        };
        let mut sessions = self.capacity.sessions();
        sessions.retain(|(terms, _)| [terms.tenant.as_str(), ""].contains(&request.tenant.as_str()));
        sessions.sort_by_key(|(terms, _)| std::cmp::Reverse(terms.since));
        let sessions = sessions.iter().take(limit).map(|(terms, active)| self.summary(terms, *active)).collect();
        Ok(Response::new(ListSessionsResponse { sessions }))
    }

    async fn describe_path(&self, request: Request<DescribePathRequest>) -> Result<Response<SessionPath>, Status> {
        self.authorize(&request)?;
        let request = request.into_inner();
        let session = session_id(&request.session)?;
        let sessions = self.capacity.sessions();
        let own =
            |terms: &Terms| terms.session == session && [terms.tenant.as_str(), ""].contains(&request.tenant.as_str());
        let found = sessions.iter().find(|(terms, active)| *active && own(terms));
        let (terms, _) = found.ok_or_else(|| Status::not_found(format!("{session} is not active here")))?;
        Ok(Response::new(SessionPath {
            session: session.to_string(),
            region: self.region.clone(),
            worker: self.name.clone(),
            epoch: terms.epoch.value(),
            age_ms: u32::try_from(terms.age().as_millis()).unwrap_or(u32::MAX),
            ..terms.path.lock().describe()
        }))
    }
}

fn check(request: &ReserveRequest) -> Result<capacity::Request, Status> {
    let invalid = |what: &str| Status::invalid_argument(what.to_owned());
    let codec = match Codec::try_from(request.codec) {
        Ok(Codec::Unspecified) | Err(_) => return Err(invalid("codec: say which")),
        Ok(codec) => codec,
    };
    let epoch = Epoch::new(request.epoch).ok().filter(|e| e.value() > 0);
    Ok(capacity::Request {
        session: session_id(&request.session)?,
        epoch: epoch.ok_or_else(|| invalid("epoch: starts at 1"))?,
        agent: request.agent.clone(),
        tenant: request.tenant.clone(),
        client_key: request.client_key.as_ref().try_into().map_err(|_| invalid("client_key: 32 bytes"))?,
        codec,
        ttl: Duration::from_millis(request.ttl_ms.into()),
        neighbourhood: request.neighbourhood,
    })
}

fn session_id(bytes: &[u8]) -> Result<SessionId, Status> {
    let bytes = bytes.try_into().map_err(|_| Status::invalid_argument("session: 16 bytes"))?;
    Ok(SessionId::from_bytes(bytes))
}
