//! Several routers, and none.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use antiphon_core::{
    id::{Incarnation, RegionNumber, ServerId, ShardNumber, WorkerNumber},
    keys::FleetRoot,
};
use antiphon_proto::v1::{
    self, AgentBehaviour, RelayDirective, RelayMessage, WorkerDirective, WorkerHello, WorkerKeys, WorkerMessage,
    WorkerReport, WorkerWelcome,
    fleet_server::{Fleet, FleetServer},
    worker_directive::Directive,
    worker_message::Message,
};
use antiphon_runtime::{
    Tasks,
    admin::Readiness,
    members::{self, Resolver},
    pki::{FleetCa, Identity, PeerName, Role},
    tls,
};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::rig::generation;
use crate::{
    capacity::Capacity,
    metrics::Metrics,
    registration,
    standing::{READY, Settings, Standing},
    state::{Owner, StateDir},
};

fn root() -> FleetRoot {
    FleetRoot::from_bytes([42; 32])
}

fn identity(name: &str, role: Role) -> Identity {
    let ca = FleetCa::from_seed(&root().ca_seed()).unwrap();
    ca.issue(&PeerName::new(name, role, "north").unwrap(), &[], SystemTime::now()).unwrap()
}

/// A router with one number to give.
#[derive(Clone, Default)]
struct FakeRouter(Arc<Mutex<Heard>>);

#[derive(Default)]
struct Heard {
    number: u32,
    hellos: Vec<WorkerHello>,
    reports: Vec<WorkerReport>,
    deregistered: usize,
    directives: Option<mpsc::Sender<Result<WorkerDirective, Status>>>,
}

impl FakeRouter {
    async fn start(number: u32, tasks: &Tasks) -> (Self, String) {
        Self::start_at("127.0.0.1:0", number, tasks).await
    }

    async fn start_at(address: &str, number: u32, tasks: &Tasks) -> (Self, String) {
        let router = Self::default();
        router.0.lock().number = number;
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let incoming = tls::incoming(listener, &identity("router-0", Role::Router)).unwrap();
        let (service, stopping) = (FleetServer::new(router.clone()), tasks.stopping());
        tasks.spawn("router", async move {
            let server = tonic::transport::Server::builder().add_service(service);
            Ok(server.serve_with_incoming_shutdown(incoming, stopping.cancelled_owned()).await?)
        });
        (router, address)
    }

    async fn tell(&self, directive: Directive) {
        let directives = self.0.lock().directives.clone().unwrap();
        directives.send(Ok(WorkerDirective { directive: Some(directive) })).await.unwrap();
    }

    fn loaded(&self) -> Vec<u32> {
        self.0.lock().reports.last().map(|report| report.loaded_generations.clone()).unwrap_or_default()
    }
}

fn keys(hello: &WorkerHello, number: u32, generations: &[u32], minting: u32) -> WorkerKeys {
    let server_id = ServerId {
        region: RegionNumber::new(1).unwrap(),
        worker: WorkerNumber::new(u16::try_from(number).unwrap()).unwrap(),
        shard: ShardNumber::new(0).unwrap(),
        incarnation: Incarnation::new(hello.incarnation).unwrap(),
    };
    let config = |n: &u32| v1::CidConfig {
        config_id: n % 7,
        generation: *n,
        key: root().cid_key(generation(*n)).to_vec().into(),
        minting: *n == minting,
    };
    let reset = |n: &u32| v1::ResetKey {
        shard: 0,
        generation: *n,
        key: root().reset_key(server_id, generation(*n)).to_vec().into(),
    };
    WorkerKeys {
        cid_configs: generations.iter().map(config).collect(),
        reset_keys: generations.iter().map(reset).collect(),
        ..WorkerKeys::default()
    }
}

fn behaviour(revision: &str) -> AgentBehaviour {
    AgentBehaviour { revision: revision.into(), engine: "echo".into(), ..AgentBehaviour::default() }
}

#[tonic::async_trait]
impl Fleet for FakeRouter {
    type RunWorkerStream = ReceiverStream<Result<WorkerDirective, Status>>;
    type RunRelayStream = ReceiverStream<Result<RelayDirective, Status>>;

    async fn run_worker(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::RunWorkerStream>, Status> {
        let mut messages = request.into_inner();
        let (sender, receiver) = mpsc::channel(16);
        let Some(Ok(WorkerMessage { message: Some(Message::Hello(hello)) })) = messages.next().await else {
            return Err(Status::invalid_argument("hello first"));
        };
        let number = self.0.lock().number;
        let WorkerKeys { cid_configs, reset_keys, .. } = keys(&hello, number, &[1], 1);
        let welcome = WorkerWelcome {
            region_number: 1,
            worker_number: number,
            cid_configs,
            reset_keys,
            behaviour: Some(behaviour("first")),
            report_interval_ms: 100,
            ..WorkerWelcome::default()
        };
        let _ = sender.send(Ok(WorkerDirective { directive: Some(Directive::Welcome(welcome)) })).await;
        {
            let mut heard = self.0.lock();
            heard.hellos.push(hello);
            heard.directives = Some(sender);
        }
        let heard = self.0.clone();
        let tasks = Tasks::new();
        tasks.spawn("messages", async move {
            while let Some(Ok(message)) = messages.next().await {
                match message.message {
                    Some(Message::Report(report)) => heard.lock().reports.push(report),
                    Some(Message::Deregister(_)) => {
                        let mut heard = heard.lock();
                        heard.deregistered += 1;
                        heard.directives = None;
                    }
                    _ => {}
                }
            }
            Ok(())
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn run_relay(&self, _: Request<Streaming<RelayMessage>>) -> Result<Response<Self::RunRelayStream>, Status> {
        Err(Status::unimplemented("no relays here"))
    }
}

/// A worker's control plane side, without its servers.
struct Side {
    tasks: Tasks,
    readiness: Readiness,
    standing: Arc<Standing>,
}

impl Side {
    fn start(routers: &[String], state: Option<&Path>) -> Self {
        Self::start_with(routers, Arc::new(members::System), state)
    }

    fn start_with(routers: &[String], resolver: Arc<dyn Resolver>, state: Option<&Path>) -> Self {
        let (tasks, readiness) = (Tasks::new(), Readiness::new(&[READY]));
        let identity = identity("worker-0", Role::Worker);
        let metrics = Metrics::new(&mut Registry::default());
        let capacity = Arc::new(Capacity::new("default/echo".into(), 4, metrics.clone()));
        let settings = Settings {
            identity: identity.clone(),
            pin: false,
            cid_lifetime: super::rig::CID_LIFETIME,
            qlog: None,
            capacity: capacity.clone(),
            metrics: metrics.clone(),
            readiness: readiness.clone(),
            tasks: tasks.clone(),
        };
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let hello = WorkerHello {
            region: "north".into(),
            slots: 4,
            shards: vec![v1::Shard { number: 0, tunnel_address: address.to_string() }],
            ..WorkerHello::default()
        };
        let kept = state.map(|path| StateDir::open(path, Owner::of(&identity, "default/echo")).unwrap());
        let standing = Arc::new(Standing::new(settings, hello, vec![(socket, address)], kept).unwrap());
        registration::start(routers, resolver, &identity, &standing, &capacity, &metrics, &tasks);
        Self { tasks, readiness, standing }
    }

    fn is_ready(&self) -> bool {
        self.readiness.missing().is_empty()
    }

    async fn stop(self) {
        self.tasks.wait(std::future::ready(())).await.unwrap();
    }
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let reached = async {
        let mut ticks = tokio::time::interval(std::time::Duration::from_millis(10));
        while !condition() {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), reached).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn it_stands_with_every_router_and_does_what_any_of_them_says() {
    let tasks = Tasks::new();
    let (first, first_address) = FakeRouter::start(9, &tasks).await;
    let (second, second_address) = FakeRouter::start(9, &tasks).await;
    // Takes connections and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_address = silent.local_addr().unwrap().to_string();
    let worker = Side::start(&[silent_address, first_address, second_address], None);
    until("both know it", || !first.loaded().is_empty() && !second.loaded().is_empty()).await;
    assert!(worker.is_ready());
    let hello = first.0.lock().hellos[0].clone();
    second.tell(Directive::Keys(keys(&hello, 9, &[1, 2], 1))).await;
    until("both hear that it has loaded", || first.loaded() == [1, 2] && second.loaded() == [1, 2]).await;
    first.tell(Directive::Keys(keys(&hello, 9, &[1], 1))).await;
    first.tell(Directive::Keys(keys(&hello, 9, &[1, 2], 2))).await;
    second.tell(Directive::Keys(keys(&hello, 9, &[1, 2], 1))).await;
    second.tell(Directive::Keys(keys(&hello, 9, &[2], 2))).await;
    until("it has gone on", || first.loaded() == [2] && second.loaded() == [2]).await;
    let mut told: Vec<_> = first.0.lock().reports.iter().map(|report| report.loaded_generations.clone()).collect();
    told.dedup();
    assert_eq!(told, [vec![1], vec![1, 2], vec![2]], "never back to what a router that is behind says");
    worker.stop().await;
    let deregistered = |router: &FakeRouter| router.0.lock().deregistered;
    until("it has left both", || deregistered(&first) == 1 && deregistered(&second) == 1).await;
    tasks.wait(std::future::ready(())).await.unwrap();
}

/// A name server of one name.
#[derive(Debug, Default)]
struct Names {
    addresses: Mutex<Vec<SocketAddr>>,
    lookups: AtomicUsize,
}

impl Resolver for Names {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        assert_eq!(name, "routers.test:7444");
        let addresses = self.addresses.lock().clone();
        self.lookups.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move { if addresses.is_empty() { Err(io::ErrorKind::NotFound.into()) } else { Ok(addresses) } })
    }
}

impl Names {
    /// Names these from now on, and waits until that has been heard.
    async fn change(&self, change: impl FnOnce(&mut Vec<SocketAddr>)) {
        change(&mut self.addresses.lock());
        let before = self.lookups.load(Ordering::SeqCst);
        // The one under way may still give the old answer, and what comes of the next is done before the one after it.
        until("the name is looked up", || self.lookups.load(Ordering::SeqCst) > before + 2).await;
    }
}

#[tokio::test]
async fn a_name_is_all_routers_that_it_stands_for_as_they_come_and_go() {
    let (tasks, going) = (Tasks::new(), Tasks::new());
    let (first, first_address) = FakeRouter::start(9, &going).await;
    let (second, second_address) = FakeRouter::start(9, &tasks).await;
    let [first_address, second_address] = [first_address, second_address].map(|a| a.parse::<SocketAddr>().unwrap());
    let names = Arc::new(Names::default());
    names.addresses.lock().push(first_address);
    let worker = Side::start_with(&["routers.test:7444".into()], names.clone(), None);
    until("the first knows it", || !first.loaded().is_empty()).await;
    names.addresses.lock().push(second_address);
    until("the second, which came later, knows it", || !second.loaded().is_empty()).await;
    // The first is left out while it lives: nothing ends.
    names.change(|addresses| *addresses = vec![second_address]).await;
    let (before, of_second) = (first.0.lock().reports.len(), second.0.lock().reports.len());
    until("it goes on reporting", || {
        first.0.lock().reports.len() > before && second.0.lock().reports.len() > of_second
    })
    .await;
    assert_eq!(first.0.lock().hellos.len(), 1);
    assert_eq!(first.0.lock().deregistered, 0);
    // It dies and another one takes its place; nobody deregisters anywhere.
    going.stopping().cancel();
    first.0.lock().directives = None;
    going.wait(std::future::ready(())).await.unwrap();
    let (third, third_address) = FakeRouter::start(9, &tasks).await;
    names.addresses.lock().push(third_address.parse().unwrap());
    until("the third knows it", || !third.loaded().is_empty()).await;
    // A name server that is away takes nobody away.
    names.change(Vec::clear).await;
    let before = third.0.lock().reports.len();
    until("it goes on reporting", || third.0.lock().reports.len() > before).await;
    assert_eq!(second.0.lock().hellos.len(), 1);
    worker.stop().await;
    let deregistered = |router: &FakeRouter| router.0.lock().deregistered;
    until("it has left those that are there", || deregistered(&second) == 1 && deregistered(&third) == 1).await;
    tasks.wait(std::future::ready(())).await.unwrap();
}

#[tokio::test]
async fn a_router_that_says_another_number_changes_nothing() {
    let tasks = Tasks::new();
    let (first, first_address) = FakeRouter::start(9, &tasks).await;
    let (stranger, stranger_address) = FakeRouter::start(10, &tasks).await;
    let worker = Side::start(&[first_address], None);
    until("the first knows it", || !first.loaded().is_empty()).await;
    let hello = worker.standing.hello();
    assert_eq!(hello.worker_number, Some(9));
    let WorkerKeys { cid_configs, reset_keys, .. } = keys(&hello, 10, &[1, 2], 2);
    let welcome =
        WorkerWelcome { region_number: 1, worker_number: 10, cid_configs, reset_keys, ..WorkerWelcome::default() };
    let refused = worker.standing.welcome(&welcome).unwrap_err();
    assert_eq!(refused.to_string(), "the router numbers this worker 10 of region 1, but it is 9 of 1");
    assert!(!refused.is_fatal());
    assert_eq!(worker.standing.report().loaded_generations, [1]);
    worker.stop().await;
    // A worker that holds nothing, with no other router, begins again under the new number.
    let alone = Side::start(&[stranger_address], None);
    until("it is numbered", || alone.is_ready()).await;
    stranger.0.lock().number = 11;
    stranger.0.lock().directives = None;
    let ended = alone.tasks.wait(std::future::pending()).await.unwrap_err();
    assert!(format!("{ended:#}").contains("starting again"), "{ended:#}");
    tasks.wait(std::future::ready(())).await.unwrap();
}

#[tokio::test]
async fn a_restart_without_any_router_keeps_number_and_behaviour_and_leads_a_new_life() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let tasks = Tasks::new();
    let (router, address) = FakeRouter::start(9, &tasks).await;
    let worker = Side::start(&[address], Some(&path));
    until("it is registered", || !router.loaded().is_empty()).await;
    let before = worker.standing.hello();
    worker.stop().await;
    tasks.wait(std::future::ready(())).await.unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let worker = Side::start(&[address], Some(&path));
    assert!(worker.is_ready(), "no router has to answer for it");
    let after = worker.standing.hello();
    assert_eq!((before.worker_number, after.worker_number), (Some(9), Some(9)));
    assert_ne!(before.incarnation, after.incarnation);
    worker.stop().await;

    let tasks = Tasks::new();
    let (router, address) = FakeRouter::start(9, &tasks).await;
    let worker = Side::start(&[address], Some(&path));
    until("it is registered again", || !router.loaded().is_empty()).await;
    let hellos = router.0.lock().hellos.clone();
    assert_eq!(hellos[0].worker_number, Some(9), "it says which number it holds");
    assert!(![before.incarnation, after.incarnation].contains(&hellos[0].incarnation));
    worker.stop().await;
    tasks.wait(std::future::ready(())).await.unwrap();
}
