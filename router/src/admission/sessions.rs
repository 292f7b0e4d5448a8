//! Sessions that exist: list, explain, delete.

use std::{sync::Arc, time::Duration};

use antiphon_core::id::{SessionId, WorkerNumber};
use antiphon_proto::v1::{self, peer_client::PeerClient, worker_client::WorkerClient};
use futures::{StreamExt as _, stream};
use tokio::time::timeout;
use tonic::{Code, Request, Response, Status, transport::Channel};

use super::Admission;
use crate::{auth::Caller, fleet::Target, refusals::Failure};

/// Sessions, and who did not answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listing {
    /// Newest first.
    pub(crate) sessions: Vec<v1::SessionSummary>,
    /// Workers and regions whose sessions are not listed because they did not answer in time.
    pub(crate) missing: Vec<String>,
}

impl Listing {
    fn merge(&mut self, name: String, answer: Option<Vec<v1::SessionSummary>>) {
        match answer {
            Some(sessions) => self.sessions.extend(sessions),
            None => self.missing.push(name),
        }
    }

    fn cut(mut self, limit: usize) -> Self {
        let since = |s: &v1::SessionSummary| s.since.map(|t| (t.seconds, t.nanos));
        self.sessions.sort_by_key(|s| std::cmp::Reverse(since(s)));
        self.sessions.truncate(limit);
        self.missing.sort();
        self
    }
}

impl Admission {
    /// A tenant's sessions in all regions.
    pub(crate) async fn list(self: &Arc<Self>, tenant: &str, limit: usize) -> Listing {
        let own = self.list_here(tenant, MAX_LISTED);
        let peers = stream::iter(self.fleet.peer_regions())
            .map(|name| async move {
                // Whoever is out of touch would only be waited for.
                if self.fleet.is_silent(&name) {
                    return (name, None);
                }
                let ask = self.ask_routers(&name, LIST_DEADLINE, |channel| list_peer(channel, tenant));
                let answer = timeout(LIST_DEADLINE, ask).await.ok().flatten();
                (name, answer)
            })
            .buffer_unordered(FAN_OUT)
            .collect::<Vec<_>>();
        let (mut listing, peers) = tokio::join!(own, peers);
        for (name, answer) in peers {
            listing.merge(name, answer);
        }
        // The only place that shows sessions to applications: whatever others sent, no tenant sees another's.
        listing.sessions.retain(|s| s.tenant == tenant);
        listing.cut(limit)
    }

    /// A tenant's sessions in this region; all tenants' if it is empty.
    pub(crate) async fn list_here(&self, tenant: &str, limit: usize) -> Listing {
        let mut listing = Listing::default();
        let answers = stream::iter(self.fleet.worker_channels())
            .map(|(name, channel)| async move { (name, list_worker(channel, tenant).await) })
            .buffer_unordered(FAN_OUT)
            .collect::<Vec<_>>()
            .await;
        for (name, answer) in answers {
            listing.merge(name, answer);
        }
        listing.cut(limit)
    }

    /// Opens the connection to a worker before the first session needs it.
    pub(crate) async fn warm(&self, number: WorkerNumber) {
        if let Some(channel) = self.fleet.worker_channel(number) {
            let answer = list_worker(channel, NOBODY).await;
            tracing::debug!(%number, reachable = answer.is_some(), "worker's API");
        }
    }

    /// Why a session is where it is.
    pub(crate) fn explain(&self, caller: &Caller, session: SessionId) -> Result<v1::Explanation, Failure> {
        let decisions = self.decisions.lock();
        let decision = decisions.of(session);
        // Another tenant's session looks like none.
        let own = decision.filter(|d| d.tenant == caller.tenant);
        let unknown = || {
            Failure::NotFound(format!(
                "no decision about session {session} is remembered here: only the router that placed it knows, for a while; \
                 each router of the region can be asked by its own address"
            ))
        };
        own.map(|d| d.explanation.clone()).ok_or_else(unknown)
    }

    /// The way of a live session's packets, wherever it is.
    pub(crate) async fn path(self: &Arc<Self>, tenant: &str, session: SessionId) -> Result<v1::SessionPath, Failure> {
        let known = self.decided_target(tenant, session);
        if let Some(target) = known
            && let Some(Some(path)) = self.ask_path(&target, tenant, session).await
        {
            return Ok(path);
        }
        let regions = self.fleet.peer_regions().into_iter().map(|name| Target::Region { name });
        let targets = self.fleet.worker_targets().into_iter().chain(regions);
        self.path_among(targets.collect(), tenant, session).await
    }

    /// The same among the workers of this region only.
    pub(crate) async fn path_here(&self, tenant: &str, session: SessionId) -> Result<v1::SessionPath, Failure> {
        self.path_among(self.fleet.worker_targets(), tenant, session).await
    }

    async fn path_among(
        &self,
        targets: Vec<Target>,
        tenant: &str,
        session: SessionId,
    ) -> Result<v1::SessionPath, Failure> {
        let mut answers = stream::iter(targets)
            .map(|target| async move { (self.ask_path(&target, tenant, session).await, target) })
            .buffer_unordered(FAN_OUT);
        let mut silent = Vec::new();
        while let Some((answer, target)) = answers.next().await {
            match answer {
                Some(Some(path)) => return Ok(path),
                Some(None) => {}
                None => silent.push(target.name().to_owned()),
            }
        }
        if silent.is_empty() {
            return Err(Failure::NotFound(format!("session {session} is nowhere in the fleet")));
        }
        silent.sort();
        Err(Failure::Unavailable(format!(
            "session {session} may be at {}, which did not answer: try again",
            silent.join(", ")
        )))
    }

    /// `Some(None)`: it is not there; `None`: no answer.
    async fn ask_path(&self, target: &Target, tenant: &str, session: SessionId) -> Option<Option<v1::SessionPath>> {
        let request = || {
            let session = session.as_bytes().to_vec().into();
            let mut request = Request::new(v1::DescribePathRequest { session, tenant: tenant.to_owned() });
            request.set_timeout(LIST_DEADLINE);
            request
        };
        let found = |answer: Result<Response<v1::SessionPath>, Status>| match answer {
            Ok(response) => Ok(Some(response.into_inner())),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status),
        };
        match target {
            Target::Worker(number, _) => {
                let channel = self.fleet.worker_channel(*number)?;
                let answer = timeout(LIST_DEADLINE, WorkerClient::new(channel).describe_path(request())).await;
                found(answer.ok()?).ok()
            }
            Target::Region { name } => {
                let ask = |channel| {
                    let request = request();
                    async move { found(PeerClient::new(channel).describe_path(request).await) }
                };
                self.ask_routers(name, LIST_DEADLINE, ask).await
            }
        }
    }

    /// Where a tenant's session was placed, if this router remembers.
    fn decided_target(&self, tenant: &str, session: SessionId) -> Option<Target> {
        let decisions = self.decisions.lock();
        let own = decisions.of(session).filter(|d| d.tenant == tenant);
        own.map(|d| d.target.clone())
    }

    /// Ends a session or gives its lease back, wherever it is. One that is nowhere is no error.
    pub(crate) async fn delete(self: &Arc<Self>, tenant: &str, session: SessionId) -> Result<(), Failure> {
        let known = self.decided_target(tenant, session);
        if let Some(target) = known
            && self.give_back(&target, session, 0, tenant).await == Some(true)
        {
            return Ok(());
        }
        let regions = self.fleet.peer_regions().into_iter().map(|name| Target::Region { name });
        let targets = self.fleet.worker_targets().into_iter().chain(regions);
        self.release_among(targets.collect(), tenant, session, 0).await.map(drop)
    }

    /// The same among the workers of this region only.
    pub(crate) async fn delete_here(&self, tenant: &str, session: SessionId, epoch: u32) -> Result<bool, Failure> {
        self.release_among(self.fleet.worker_targets(), tenant, session, epoch).await
    }

    async fn release_among(
        &self,
        targets: Vec<Target>,
        tenant: &str,
        session: SessionId,
        epoch: u32,
    ) -> Result<bool, Failure> {
        let answers = stream::iter(targets)
            .map(|target| async move {
                let answer = self.give_back(&target, session, epoch, tenant).await;
                (target, answer)
            })
            .buffer_unordered(FAN_OUT)
            .collect::<Vec<_>>()
            .await;
        if answers.iter().any(|(_, answer)| *answer == Some(true)) {
            return Ok(true);
        }
        let silent = answers.iter().filter(|(_, answer)| answer.is_none());
        let silent: Vec<&str> = silent.map(|(target, _)| target.name()).collect();
        if silent.is_empty() {
            return Ok(false);
        }
        Err(Failure::Unavailable(format!(
            "session {session} may be at {}, which did not answer: try again",
            silent.join(", ")
        )))
    }
}

impl Target {
    fn name(&self) -> &str {
        match self {
            Self::Worker(_, name) | Self::Region { name } => name,
        }
    }
}

async fn list_worker(channel: Channel, tenant: &str) -> Option<Vec<v1::SessionSummary>> {
    let mut worker = WorkerClient::new(channel);
    let answer = timeout(LIST_DEADLINE, worker.list_sessions(request(tenant))).await;
    Some(answer.ok()?.ok()?.into_inner().sessions)
}

async fn list_peer(channel: Channel, tenant: &str) -> Result<Vec<v1::SessionSummary>, Status> {
    let mut peer = PeerClient::new(channel).max_decoding_message_size(MAX_LISTING_BYTES);
    Ok(peer.list_sessions(request(tenant)).await?.into_inner().sessions)
}

fn request(tenant: &str) -> Request<v1::ListSessionsRequest> {
    let limit = u32::try_from(MAX_LISTED).unwrap_or(u32::MAX);
    let mut request = Request::new(v1::ListSessionsRequest { limit, tenant: tenant.to_owned() });
    request.set_timeout(LIST_DEADLINE);
    request
}

/// No tenant has this name: whoever is asked for its sessions only shows that it answers.
const NOBODY: &str = "-";
/// Sessions in one listing at most.
pub(crate) const MAX_LISTED: usize = 10_000;
/// Questions under way at once.
const FAN_OUT: usize = 32;
const LIST_DEADLINE: Duration = Duration::from_secs(1);
const MAX_LISTING_BYTES: usize = 16 << 20;
