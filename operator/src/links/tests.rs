//! Against a router's internal port with real mutual TLS; only what is behind it is a stand-in.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use antiphon_proto::v1::{
    self, ApplyRequest, ApplyResponse, FleetStatusRequest, KeyRecord, ListKeysRequest, ListKeysResponse, RegionDigest,
    RegionRecord, ReportRelayGoneResponse, ReportWorkerGoneResponse, WatchFleetRequest,
    admin_server::{Admin, AdminServer},
};
use antiphon_runtime::pki::{FleetCa, PeerName, Role};
use parking_lot::Mutex;
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, transport::Server};

use super::*;

type Listener = mpsc::Sender<Result<FleetStatusResponse, Status>>;

/// A router: what was applied, and what it says.
#[derive(Clone, Default)]
struct Router {
    applied: Arc<Mutex<Vec<ApplyRequest>>>,
    keys: Arc<Mutex<Vec<String>>>,
    listeners: Arc<Mutex<Vec<Listener>>>,
    refuse: Arc<Mutex<bool>>,
    changed: Arc<Notify>,
}

impl Router {
    fn status(&self, hash: &str) -> FleetStatusResponse {
        let digest = RegionDigest { region: "a".into(), ..RegionDigest::default() };
        let region = RegionStatus { digest: Some(digest), local: true, ..RegionStatus::default() };
        let old = RegionDigest { region: "old".into(), ..RegionDigest::default() };
        let old = RegionStatus { digest: Some(old), ..RegionStatus::default() };
        FleetStatusResponse { regions: vec![region, old], records_hash: hash.into(), ..FleetStatusResponse::default() }
    }

    fn say(&self, hash: &str) {
        let status = self.status(hash);
        self.listeners.lock().retain(|listener| listener.try_send(Ok(status.clone())).is_ok());
    }

    /// Waits until so many changes were applied.
    async fn applied(&self, count: usize) -> Vec<ApplyRequest> {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                let applied = self.applied.lock().clone();
                if applied.len() >= count {
                    return applied;
                }
                changed.await;
            }
        };
        timeout(SOON, waiting).await.expect("changes are applied")
    }

    async fn serve(&self, ca: &FleetCa, tasks: &Tasks) -> SocketAddr {
        let peer = PeerName::new("a-router", Role::Router, "a").unwrap();
        let identity = ca.issue(&peer, &[], std::time::SystemTime::now()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = antiphon_runtime::tls::incoming(listener, &identity).unwrap();
        let serving = Server::builder()
            .add_service(AdminServer::new(self.clone()))
            .serve_with_incoming_shutdown(incoming, tasks.stopping().cancelled_owned());
        tasks.spawn("router", async move { Ok(serving.await?) });
        address
    }
}

#[tonic::async_trait]
impl Admin for Router {
    type WatchFleetStream = ReceiverStream<Result<FleetStatusResponse, Status>>;

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        if *self.refuse.lock() {
            return Err(Status::invalid_argument("agents[0]: is wrong"));
        }
        let hash = {
            let mut applied = self.applied.lock();
            applied.push(request.into_inner());
            format!("h{}", applied.len())
        };
        self.changed.notify_waiters();
        Ok(Response::new(ApplyResponse { records_hash: hash }))
    }

    async fn list_keys(&self, _: Request<ListKeysRequest>) -> Result<Response<ListKeysResponse>, Status> {
        let keys = self.keys.lock().iter().map(|id| KeyRecord { id: id.clone(), ..KeyRecord::default() }).collect();
        Ok(Response::new(ListKeysResponse { keys }))
    }

    async fn fleet_status(&self, _: Request<FleetStatusRequest>) -> Result<Response<FleetStatusResponse>, Status> {
        Ok(Response::new(self.status("")))
    }

    async fn watch_fleet(&self, _: Request<WatchFleetRequest>) -> Result<Response<Self::WatchFleetStream>, Status> {
        let (listener, stream) = mpsc::channel(8);
        let hash = format!("h{}", self.applied.lock().len());
        listener.try_send(Ok(self.status(&hash))).unwrap();
        self.listeners.lock().push(listener);
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn set_worker_phase(
        &self,
        request: Request<SetWorkerPhaseRequest>,
    ) -> Result<Response<SetWorkerPhaseResponse>, Status> {
        let known = request.into_inner().name == "w";
        Ok(Response::new(SetWorkerPhaseResponse { known, ..SetWorkerPhaseResponse::default() }))
    }

    async fn report_worker_gone(
        &self,
        _: Request<ReportWorkerGoneRequest>,
    ) -> Result<Response<ReportWorkerGoneResponse>, Status> {
        Ok(Response::new(ReportWorkerGoneResponse { known: true }))
    }

    async fn report_relay_gone(
        &self,
        _: Request<ReportRelayGoneRequest>,
    ) -> Result<Response<ReportRelayGoneResponse>, Status> {
        Ok(Response::new(ReportRelayGoneResponse { known: true }))
    }
}

struct World {
    ca: FleetCa,
    tasks: Tasks,
    fence: Fence,
    links: RouterLinks,
    _dir: tempfile::TempDir,
}

fn world() -> World {
    let ca = FleetCa::from_seed(&[5; 32]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tls.key"), ca.key_pem()).unwrap();
    let credentials = Arc::new(Credentials::of_issuer(dir.path(), "c").unwrap());
    let (tasks, fence) = (Tasks::new(), Fence::open());
    let links = RouterLinks::new(credentials, fence.clone(), Arc::default(), tasks.clone());
    World { ca, tasks, fence, links, _dir: dir }
}

fn records(number: u32, keys: &[&str]) -> Arc<Records> {
    let region = RegionRecord { name: "a".into(), number, ..RegionRecord::default() };
    let key = |id: &&str| ((*id).to_owned(), KeyRecord { id: (*id).into(), ..KeyRecord::default() });
    Arc::new(Records {
        regions: BTreeMap::from([("a".to_owned(), region)]),
        known_regions: ["a".to_owned()].into(),
        keys: keys.iter().map(key).collect(),
        ..Records::default()
    })
}

impl World {
    /// Waits until what is known of the region is as `wanted`.
    async fn until(&self, wanted: impl Fn(&View) -> bool) -> View {
        let changed = Arc::new(Notify::new());
        let note = changed.clone();
        self.links.on_change(move |_, _| note.notify_one());
        let waiting = async {
            loop {
                match self.links.view("a").filter(&wanted) {
                    Some(view) => return view,
                    None => changed.notified().await,
                }
            }
        };
        timeout(SOON, waiting).await.expect("the view changes")
    }
}

#[tokio::test]
async fn the_next_router_is_tried_and_gets_everything_and_then_what_changes() {
    let world = world();
    let router = Router::default();
    router.keys.lock().push("strange".into());
    let address = router.serve(&world.ca, &world.tasks).await;
    // Nobody listens at the first one.
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    world.links.set_records("a", records(1, &["k"]));
    world.links.set_routers("a", vec![dead.to_string(), address.to_string()]);
    let first = router.applied(1).await.remove(0);
    assert_eq!((first.regions.len(), first.keys.len(), &first.removed_keys[..]), (1, 1, &["strange".to_owned()][..]));
    assert_eq!(first.removed_regions, ["old"]);
    world.links.set_records("a", records(1, &["k", "l"]));
    let second = router.applied(2).await.remove(1);
    assert_eq!((second.regions.len(), second.keys.len()), (0, 1));
    assert_eq!(second.keys[0].id, "l");
    let view = world.until(|view| view.applied.as_ref().is_some_and(|records| records.keys.len() == 2)).await;
    assert!(view.connected && view.local().is_some());
    world.tasks.wait(std::future::ready(())).await.unwrap();
}

#[tokio::test]
async fn a_store_that_is_not_as_it_was_written_is_written_again() {
    let world = world();
    let router = Router::default();
    let address = router.serve(&world.ca, &world.tasks).await;
    world.links.set_records("a", records(1, &[]));
    world.links.set_routers("a", vec![address.to_string()]);
    router.applied(1).await;
    world.until(|view| view.applied.is_some()).await;
    // Once may be from before; twice is a fact.
    router.say("h1");
    router.say("other");
    router.say("h1");
    router.say("other");
    router.say("other");
    let applied = router.applied(2).await;
    assert_eq!(applied[1], applied[0]);
    world.tasks.wait(std::future::ready(())).await.unwrap();
}

#[tokio::test]
async fn what_a_router_refuses_is_said_and_offered_again() {
    let world = world();
    let router = Router::default();
    *router.refuse.lock() = true;
    let address = router.serve(&world.ca, &world.tasks).await;
    world.links.set_records("a", records(1, &[]));
    world.links.set_routers("a", vec![address.to_string()]);
    let view = world.until(|view| !view.problem.is_empty()).await;
    assert_eq!(view.problem, "records: agents[0]: is wrong");
    *router.refuse.lock() = false;
    router.applied(1).await;
    world.until(|view| view.problem.is_empty() && view.applied.is_some()).await;
    world.tasks.wait(std::future::ready(())).await.unwrap();
}

#[tokio::test]
async fn orders_need_a_connection_and_the_lease() {
    let world = world();
    let order = || SetWorkerPhaseRequest { name: "w".into(), phase: v1::Phase::Draining.into(), ..Default::default() };
    let refused = world.links.set_worker_phase("a", order()).await.unwrap_err();
    assert!(matches!(refused, Error::NoRouter(_)), "{refused}");
    let router = Router::default();
    let address = router.serve(&world.ca, &world.tasks).await;
    world.links.set_routers("a", vec![address.to_string()]);
    world.until(|view| view.connected).await;
    assert!(world.links.set_worker_phase("a", order()).await.unwrap().known);
    assert!(world.links.report_relay_gone("a", "r").await.unwrap());
    world.fence.close();
    let refused = world.links.set_worker_phase("a", order()).await.unwrap_err();
    assert!(matches!(refused, Error::Fenced(_)), "{refused}");
    world.tasks.wait(std::future::ready(())).await.unwrap();
}

#[tokio::test]
async fn a_lost_connection_is_noticed_and_what_was_known_stays() {
    let world = world();
    let router = Router::default();
    let router_tasks = Tasks::new();
    let address = router.serve(&world.ca, &router_tasks).await;
    world.links.set_routers("a", vec![address.to_string()]);
    world.until(|view| view.connected).await;
    router.listeners.lock().clear();
    router_tasks.wait(std::future::ready(())).await.unwrap();
    let view = world.until(|view| !view.connected).await;
    assert!(view.status.is_some() && !view.problem.is_empty());
    world.links.remove("a");
    assert!(world.links.view("a").is_none());
    world.tasks.wait(std::future::ready(())).await.unwrap();
}

const SOON: Duration = Duration::from_secs(20);
