//! `Peer`, for routers of other regions.

use std::{sync::Arc, time::Duration};

use antiphon_proto::v1::{
    DescribePathRequest, ListSessionsRequest, ListSessionsResponse, PlaceRequest, RegionDigest, RegionUpdate,
    ReleaseRequest, ReleaseResponse, RouteUpdate, Session, SessionPath, WatchRegionRequest, peer_server::Peer,
};
use antiphon_runtime::pki::Role;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Pace, STREAM_QUEUE};
use crate::{
    admission::Admission,
    auth,
    create::{limit, session_bytes},
    fleet::{Fleet, RegionMap, RouteMap, delta, full, tell_regions, unix_ms},
};

#[derive(Clone, Debug)]
pub(super) struct Service(pub(super) Arc<Admission>);

#[tonic::async_trait]
impl Peer for Service {
    type WatchRegionStream = ReceiverStream<Result<RegionUpdate, Status>>;

    async fn watch_region(
        &self,
        request: Request<WatchRegionRequest>,
    ) -> Result<Response<Self::WatchRegionStream>, Status> {
        auth::peer(&request, Role::Router, None)?;
        let fleet = Arc::clone(&self.0.fleet);
        let wanted = &request.get_ref().region;
        if *wanted != fleet.region {
            let text = format!("this router serves {}, not {wanted:?}", fleet.region);
            return Err(Status::not_found(text));
        }
        if !fleet.has_region() {
            let text = format!("region {} has no record yet", fleet.region);
            return Err(Status::unavailable(text));
        }
        let (updates, stream) = mpsc::channel(STREAM_QUEUE);
        let stopping = self.0.tasks.stopping();
        self.0.tasks.spawn("peer stream", async move {
            stopping.run_until_cancelled(tell(fleet, updates)).await;
            Ok(())
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn place(&self, request: Request<PlaceRequest>) -> Result<Response<Session>, Status> {
        auth::peer(&request, Role::Router, None)?;
        let PlaceRequest { request, tenant } = request.into_inner();
        let request = request.ok_or_else(|| Status::invalid_argument("request: is required"))?;
        Ok(Response::new(self.0.place_here(&tenant, &request).await?))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        auth::peer(&request, Role::Router, None)?;
        let request = request.into_inner();
        let session = session_bytes(&request.session)?;
        let released = self.0.delete_here(&request.tenant, session, request.epoch).await?;
        Ok(Response::new(ReleaseResponse { released }))
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        auth::peer(&request, Role::Router, None)?;
        let request = request.get_ref();
        let listing = self.0.list_here(&request.tenant, limit(request.limit)?).await;
        Ok(Response::new(ListSessionsResponse { sessions: listing.sessions }))
    }

    async fn describe_path(&self, request: Request<DescribePathRequest>) -> Result<Response<SessionPath>, Status> {
        auth::peer(&request, Role::Router, None)?;
        let DescribePathRequest { session, tenant } = request.into_inner();
        Ok(Response::new(self.0.path_here(&tenant, session_bytes(&session)?).await?))
    }
}

/// A full state, then changes, and at least every [`HEARTBEAT`] a sign that what was told is current. Ends with the
/// stream.
async fn tell(fleet: Arc<Fleet>, updates: mpsc::Sender<Result<RegionUpdate, Status>>) {
    let (mut topology, mut capacity) = (fleet.topology.subscribe(), fleet.capacity.subscribe());
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pace = Pace::new();
    let mut told = ToldRoutes::default();
    let mut told_digest = None;
    let mut silent = 0;
    pace.mark();
    loop {
        let due = tokio::select! {
            changed = topology.changed() => { if changed.is_err() { return } pace.mark(); false }
            changed = capacity.changed() => { if changed.is_err() { return } pace.mark(); false }
            _ = heartbeat.tick() => true,
            () = pace.due() => true,
            () = updates.closed() => return,
        };
        if !due {
            continue;
        }
        pace.sent();
        let digest = fleet.digest();
        let news = told_digest != digest || silent >= DIGEST_EVERY;
        silent = if news { 0 } else { silent + 1 };
        let update = RegionUpdate {
            routes: told.update(&fleet, Audience::Peer),
            digest: digest.clone().filter(|_| news).map(|d| RegionDigest { unix_ms: unix_ms(), ..d }),
        };
        told_digest = digest;
        // A peer that does not take its updates is cut off and asks again for a full state.
        if updates.try_send(Ok(update)).is_err() {
            return;
        }
    }
}

/// Who is told of routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Audience {
    /// A relay of this region: everything.
    Relay,
    /// A router: what this region alone can know.
    Peer,
}

/// What one receiver was told of routes.
#[derive(Debug, Default)]
pub(super) struct ToldRoutes {
    version: u64,
    routes: Option<Arc<RouteMap>>,
    regions: Arc<RegionMap>,
    dead: u64,
}

impl ToldRoutes {
    /// What brings the receiver up to date; a full state at first, `None` if nothing is new.
    pub(super) fn update(&mut self, fleet: &Fleet, audience: Audience) -> Option<RouteUpdate> {
        let (routes, regions) = match audience {
            Audience::Relay => (fleet.all_routes(), fleet.region_routes()),
            Audience::Peer => (fleet.own_routes(), Arc::default()),
        };
        let version = self.version + 1;
        let mut update = match &self.routes {
            Some(old) => delta(version, old, &routes),
            None => full(version, &routes),
        };
        tell_regions(&mut update, &self.regions, &regions);
        (update.dead, self.dead) = fleet.dead_since(self.dead, audience == Audience::Peer);
        let news = update.full
            || !(update.upserts.is_empty()
                && update.removals.is_empty()
                && update.region_upserts.is_empty()
                && update.region_removals.is_empty()
                && update.dead.is_empty());
        (self.routes, self.regions) = (Some(routes), regions);
        self.version += u64::from(news);
        news.then_some(update)
    }
}

const HEARTBEAT: Duration = Duration::from_secs(1);
/// Heartbeats after which the digest is told although nothing changed: it says what time it is.
const DIGEST_EVERY: u32 = 5;
