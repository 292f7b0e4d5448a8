//! Regions with their routers, stand-in workers, relays and applications, all in this process, on loopback.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use antiphon_core::{
    id::{Incarnation, RegionNumber, ServerId, ShardNumber, WorkerNumber},
    keys::FleetRoot,
};
use antiphon_proto::{
    api_key::ApiKey,
    v1::{
        self, admin_client::AdminClient, fleet_client::FleetClient, reserve_response, sessions_client::SessionsClient,
        worker_directive::Directive, worker_message::Message, worker_server,
    },
};
use antiphon_router::{Memory, Ports};
use antiphon_runtime::{
    Tasks,
    pki::{FleetCa, Identity, PeerName, Role, shared_dns},
    tls,
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    time::{interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::Channel};

pub(crate) const AGENT: &str = "shop/desk";
pub(crate) const FRANKFURT: (f64, f64) = (50.11, 8.68);
pub(crate) const VIRGINIA: (f64, f64) = (38.95, -77.45);

/// Runs until the condition holds; fails after [`DEADLINE`].
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        let mut tick = interval(Duration::from_millis(10));
        while !holds().await {
            tick.tick().await;
        }
    };
    assert!(timeout(DEADLINE, wait).await.is_ok(), "never: {what}");
}

/// A value that has to come within [`DEADLINE`].
pub(crate) async fn soon<T>(what: &str, value: impl Future<Output = T>) -> T {
    match timeout(DEADLINE, value).await {
        Ok(value) => value,
        Err(_) => panic!("never: {what}"),
    }
}

/// One fleet.
pub(crate) struct World {
    pub(crate) root: FleetRoot,
    pub(crate) key: ApiKey,
    ca: FleetCa,
}

/// One region's router. Ends with the value.
pub(crate) struct Region {
    pub(crate) name: String,
    pub(crate) public: SocketAddr,
    pub(crate) internal: SocketAddr,
    pub(crate) admin: SocketAddr,
    tasks: Tasks,
    identity: Identity,
}

impl Drop for Region {
    fn drop(&mut self) {
        self.tasks.stopping().cancel();
    }
}

impl World {
    pub(crate) fn new() -> Self {
        let root = FleetRoot::from_bytes([7; 32]);
        Self { ca: FleetCa::from_seed(&root.ca_seed()).unwrap(), root, key: ApiKey::from_random(&[9; ApiKey::RANDOM]) }
    }

    pub(crate) fn identity(&self, name: &str, role: Role, region: &str) -> Identity {
        let peer = PeerName::new(name, role, region).unwrap();
        let agent = (role == Role::Worker).then_some(AGENT);
        self.ca.issue_for(&peer, agent, &[], SystemTime::now()).unwrap()
    }

    /// A router without records.
    pub(crate) async fn router(&self, name: &str) -> Region {
        self.router_with(name, "router-1", Arc::new(Memory::default())).await
    }

    /// Two routers of a region that share a store; all know the agent, the key, and both addresses.
    pub(crate) async fn siblings(&self, name: &str) -> [Region; 2] {
        let store = Arc::new(Memory::default());
        let one = self.router_with(name, "router-1", Arc::<Memory>::clone(&store)).await;
        let two = self.router_with(name, "router-2", store).await;
        let mut change = self.agent(&[name]);
        let mut record = one.record(1, FRANKFURT);
        record.router_addresses = vec![one.internal.to_string(), two.internal.to_string()];
        change.regions = vec![record];
        self.apply(&one, change).await.unwrap();
        [one, two]
    }

    async fn router_with(&self, name: &str, router: &str, store: Arc<Memory>) -> Region {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let ports = Ports::bind(any, any, any).await.unwrap();
        let address = |l: &TcpListener| l.local_addr().unwrap();
        let (public, internal) = (address(&ports.public), address(&ports.internal));
        let admin = address(&ports.admin);
        let identity = self.identity(router, Role::Router, name);
        let tasks = Tasks::new();
        antiphon_router::start(identity.clone(), self.root.clone(), store, ports, &tasks).unwrap();
        Region { name: name.to_owned(), public, internal, admin, tasks, identity }
    }

    /// A region alone, with the agent and the key.
    pub(crate) async fn region(&self, name: &str) -> Region {
        let region = self.router(name).await;
        let mut change = self.agent(&[name]);
        change.regions = vec![region.record(1, FRANKFURT)];
        self.apply(&region, change).await.unwrap();
        region
    }

    /// The agent in these regions, and the key.
    pub(crate) fn agent(&self, regions: &[&str]) -> v1::ApplyRequest {
        let region = |name: &&str| v1::AgentRegion { region: (*name).to_owned(), weight: 100 };
        let agent = v1::AgentRecord {
            behaviour: Some(v1::AgentBehaviour {
                agent: AGENT.into(),
                revision: "r1".into(),
                engine: "echo".into(),
                ..v1::AgentBehaviour::default()
            }),
            regions: regions.iter().map(region).collect(),
            ..v1::AgentRecord::default()
        };
        v1::ApplyRequest { agents: vec![agent], keys: vec![key_record(&self.key, &[])], ..v1::ApplyRequest::default() }
    }

    pub(crate) fn operator(&self, region: &Region) -> AdminClient<Channel> {
        AdminClient::new(self.channel(region, "op-1", Role::Operator, &region.name))
    }

    /// A channel to the internal port as somebody.
    pub(crate) fn channel(&self, region: &Region, name: &str, role: Role, of: &str) -> Channel {
        let identity = self.identity(name, role, of);
        let address = region.internal.to_string();
        tls::channel(&address, &identity, Role::Router, &region.name).unwrap()
    }

    pub(crate) async fn apply(&self, region: &Region, change: v1::ApplyRequest) -> Result<v1::ApplyResponse, Status> {
        self.operator(region).apply(change).await.map(Response::into_inner)
    }

    pub(crate) async fn status(&self, region: &Region) -> v1::FleetStatusResponse {
        let mut admin = self.operator(region);
        let status = admin.fleet_status(v1::FleetStatusRequest {}).await;
        status.unwrap().into_inner()
    }

    /// Whether a worker takes part in placement.
    pub(crate) async fn placeable(&self, region: &Region, worker: &str) -> bool {
        let status = self.status(region).await;
        let workers = status.regions.iter().flat_map(|r| &r.workers);
        workers.clone().any(|w| w.name == worker && w.placeable)
    }

    /// A registered worker in placement.
    pub(crate) async fn worker(&self, region: &Region, name: &str, slots: u32) -> Worker {
        let worker = self.stand_in(region, name, slots).await;
        let welcome = worker.register(self, region).await;
        welcome.unwrap();
        eventually("the worker is in placement", async || self.placeable(region, name).await).await;
        worker
    }

    /// A worker that serves its API and is not registered.
    pub(crate) async fn stand_in(&self, region: &Region, name: &str, slots: u32) -> Worker {
        let identity = self.identity(name, Role::Worker, &region.name);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (changed, _) = watch::channel(());
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            region: region.name.clone(),
            slots,
            server_id: Mutex::default(),
            sessions: Mutex::default(),
            asked: AtomicU32::new(0),
            mute: AtomicBool::new(false),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            keys: Mutex::default(),
            oldest: AtomicU32::new(0),
            clock_ahead_s: AtomicI64::new(0),
            measured: Mutex::default(),
            order: Mutex::default(),
            stubborn: Mutex::new(false),
            changed,
        });
        let worker = Worker {
            shared: Arc::clone(&shared),
            incarnation: Mutex::new(Incarnation::new(rand::random()).unwrap()),
            control_address: listener.local_addr().unwrap(),
            tasks: Tasks::new(),
            streams: Mutex::default(),
        };
        let server = tonic::transport::Server::builder()
            .tls_config(tls::grpc_server(&identity))
            .unwrap()
            .add_service(worker_server::WorkerServer::from_arc(shared))
            .serve_with_incoming_shutdown(
                tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true)),
                worker.tasks.stopping().cancelled_owned(),
            );
        worker.tasks.spawn("worker api", async move { Ok(server.await?) });
        worker
    }
}

pub(crate) fn key_record(key: &ApiKey, agents: &[&str]) -> v1::KeyRecord {
    v1::KeyRecord {
        id: key.id().to_owned(),
        sha256: key.sha256().to_vec().into(),
        tenant: "acme".into(),
        agents: agents.iter().map(|a| (*a).to_owned()).collect(),
        ..v1::KeyRecord::default()
    }
}

pub(crate) fn point((latitude, longitude): (f64, f64)) -> v1::Location {
    v1::Location { latitude, longitude }
}

/// An Ed25519 public key.
pub(crate) fn client_key() -> [u8; 32] {
    antiphon_proto::ticket::public_key(&[5; 32])
}

pub(crate) fn create() -> v1::CreateSessionRequest {
    v1::CreateSessionRequest {
        agent: AGENT.into(),
        client_key: client_key().to_vec().into(),
        ..v1::CreateSessionRequest::default()
    }
}

impl Region {
    /// A router that runs elsewhere: its public, internal and admin port.
    pub(crate) fn elsewhere(world: &World, name: &str, [public, internal, admin]: [SocketAddr; 3]) -> Self {
        let identity = world.identity("router-1", Role::Router, name);
        Self { name: name.to_owned(), public, internal, admin, tasks: Tasks::new(), identity }
    }

    pub(crate) fn record(&self, number: u32, place: (f64, f64)) -> v1::RegionRecord {
        v1::RegionRecord {
            name: self.name.clone(),
            number,
            cloud: "test".into(),
            location: Some(point(place)),
            phase: v1::Phase::Active.into(),
            router_address: self.internal.to_string(),
            ..v1::RegionRecord::default()
        }
    }

    /// Another connection of an application.
    pub(crate) fn sessions(&self) -> SessionsClient<Channel> {
        let name = shared_dns(Role::Router, &self.name);
        let channel = tls::public_channel(&self.public.to_string(), self.identity.ca_pem(), &name);
        SessionsClient::new(channel.unwrap())
    }

    pub(crate) fn public_channel(&self) -> Channel {
        let name = shared_dns(Role::Router, &self.name);
        tls::public_channel(&self.public.to_string(), self.identity.ca_pem(), &name).unwrap()
    }

    /// One HTTP/1.1 request on a connection of its own.
    pub(crate) async fn http(&self, request: ::http::Request<Full<Bytes>>) -> Answer {
        self.http_over(TcpStream::connect(self.public).await.unwrap(), request).await
    }

    /// Requests over HTTP/2, one after the other on one connection.
    pub(crate) async fn http2(&self, requests: Vec<::http::Request<Full<Bytes>>>) -> Vec<Answer> {
        let stream = self.tls(TcpStream::connect(self.public).await.unwrap(), &[b"h2"]).await;
        let executor = hyper_util::rt::TokioExecutor::new();
        let handshake = hyper::client::conn::http2::handshake(executor, TokioIo::new(stream)).await;
        let (mut client, connection) = handshake.unwrap();
        let answers = async {
            let mut answers = Vec::new();
            for request in requests {
                let (parts, body) = client.send_request(request).await.unwrap().into_parts();
                answers.push(Answer::new(parts, &body.collect().await.unwrap().to_bytes()));
            }
            answers
        };
        tokio::select! {
            answers = answers => answers,
            ended = connection => panic!("connection ended early: {ended:?}"),
        }
    }

    async fn tls(&self, tcp: TcpStream, protocols: &[&[u8]]) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.identity.ca()).unwrap();
        let mut config = rustls::ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = shared_dns(Role::Router, &self.name).try_into().unwrap();
        connector.connect(name, tcp).await.unwrap()
    }

    /// One HTTP/1.1 request on this connection.
    pub(crate) async fn http_over(&self, tcp: TcpStream, request: ::http::Request<Full<Bytes>>) -> Answer {
        let stream = self.tls(tcp, &[]).await;
        let (mut client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        // Both end together: the connection is only driven for this one answer.
        let answer = async {
            let response = client.send_request(request).await.unwrap();
            let (parts, body) = response.into_parts();
            (parts, body.collect().await.unwrap().to_bytes())
        };
        let (parts, body) = tokio::select! {
            answer = answer => answer,
            ended = connection => panic!("connection ended early: {ended:?}"),
        };
        Answer::new(parts, &body)
    }

    /// A request to the admin port.
    pub(crate) async fn admin_get(&self, path: &str) -> (u16, String) {
        let stream = TcpStream::connect(self.admin).await.unwrap();
        let (mut client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let request = ::http::Request::get(path).header("host", "admin");
        let request = request.body(Full::<Bytes>::default()).unwrap();
        let answer = async {
            let response = client.send_request(request).await.unwrap();
            let status = response.status().as_u16();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            (status, String::from_utf8(body.to_vec()).unwrap())
        };
        tokio::select! {
            answer = answer => answer,
            ended = connection => panic!("connection ended early: {ended:?}"),
        }
    }

    /// Whether the metrics have this line.
    pub(crate) async fn counts(&self, line: &str) -> bool {
        let (_, metrics) = self.admin_get("/metrics").await;
        metrics.lines().any(|l| l == line)
    }

    /// A JSON request with an API key.
    pub(crate) async fn ask(&self, key: &ApiKey, method: &str, path: &str, body: Option<Value>) -> Answer {
        let mut request = ::http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "router")
            .header("authorization", format!("Bearer {}", key.text()));
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.map_or_else(Vec::new, |b| b.to_string().into_bytes());
        self.http(request.body(Full::new(body.into())).unwrap()).await
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: ::http::HeaderMap,
    pub(crate) body: Value,
}

impl Answer {
    fn new(parts: ::http::response::Parts, body: &[u8]) -> Self {
        Self {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body: serde_json::from_slice(body).unwrap_or(Value::Null),
        }
    }
}

/// A gRPC request with an API key.
pub(crate) fn with_key<T>(key: &ApiKey, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = format!("Bearer {}", key.text()).parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    request
}

/// A stand-in worker. Its API ends with the value.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) incarnation: Mutex<Incarnation>,
    control_address: SocketAddr,
    tasks: Tasks,
    /// Its open registrations, one for each router.
    streams: Mutex<Vec<mpsc::Sender<v1::WorkerMessage>>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tasks.stopping().cancel();
    }
}

/// What the stand-in's API and its registration share.
pub(crate) struct Shared {
    pub(crate) name: String,
    region: String,
    slots: u32,
    pub(crate) server_id: Mutex<Option<ServerId>>,
    pub(crate) sessions: Mutex<BTreeMap<Bytes, v1::ReserveRequest>>,
    /// How often it was asked to reserve.
    pub(crate) asked: AtomicU32,
    /// Permits for answers to `Reserve`.
    pub(crate) gate: Semaphore,
    /// Stays connected and says nothing.
    pub(crate) mute: AtomicBool,
    /// Its keys, as it was last given them.
    pub(crate) keys: Mutex<v1::WorkerKeys>,
    /// Oldest key generation that its sessions use; 0: none.
    pub(crate) oldest: AtomicU32,
    /// Its clock's error.
    pub(crate) clock_ahead_s: AtomicI64,
    /// Round trips that its callers have.
    pub(crate) measured: Mutex<Vec<v1::MeasuredRtt>>,
    /// The newest order that it was given.
    order: Mutex<Option<v1::PhaseOrder>>,
    /// Refuses although it has room.
    pub(crate) stubborn: Mutex<bool>,
    changed: watch::Sender<()>,
}

/// A registration under way: its directives.
pub(crate) struct Registered {
    pub(crate) welcome: v1::WorkerWelcome,
    pub(crate) directives: mpsc::Receiver<v1::WorkerDirective>,
}

impl Worker {
    pub(crate) fn hello(&self) -> v1::WorkerHello {
        v1::WorkerHello {
            name: self.shared.name.clone(),
            region: self.shared.region.clone(),
            agent: AGENT.into(),
            slots: self.shared.slots,
            incarnation: self.incarnation.lock().value(),
            shards: vec![v1::Shard { number: 0, tunnel_address: "127.0.0.1:4000".into() }],
            control_address: self.control_address.to_string(),
            ..v1::WorkerHello::default()
        }
    }

    /// Registers and reports, at every change and at every tick, until [`Self::disconnect`].
    pub(crate) async fn register(&self, world: &World, region: &Region) -> Result<Registered, Status> {
        self.register_with(world, region, self.hello()).await
    }

    pub(crate) async fn register_with(
        &self,
        world: &World,
        region: &Region,
        hello: v1::WorkerHello,
    ) -> Result<Registered, Status> {
        let channel = world.channel(region, &self.shared.name, Role::Worker, &region.name);
        let (messages, stream) = mpsc::channel(16);
        let send = |message| v1::WorkerMessage { message: Some(message) };
        messages.try_send(send(Message::Hello(hello))).unwrap();
        let mut fleet = FleetClient::new(channel);
        let directives = fleet.run_worker(ReceiverStream::new(stream)).await?;
        let mut directives = directives.into_inner();
        let first = directives.message().await?.and_then(|d| d.directive);
        let Some(Directive::Welcome(welcome)) = first else {
            panic!("no welcome: {first:?}");
        };
        *self.shared.server_id.lock() = Some(ServerId {
            region: RegionNumber::new(u16::try_from(welcome.region_number).unwrap()).unwrap(),
            worker: WorkerNumber::new(u16::try_from(welcome.worker_number).unwrap()).unwrap(),
            shard: ShardNumber::new(0).unwrap(),
            incarnation: *self.incarnation.lock(),
        });
        *self.shared.keys.lock() = v1::WorkerKeys {
            cid_configs: welcome.cid_configs.clone(),
            ticket_keys: welcome.ticket_keys.clone(),
            relays: welcome.relays.clone(),
            reset_keys: welcome.reset_keys.clone(),
        };
        self.streams.lock().push(messages.clone());
        let (shared, weak) = (Arc::clone(&self.shared), messages.downgrade());
        let mut changed = self.shared.changed.subscribe();
        self.tasks.spawn("reports", async move {
            let mut tick = interval(Duration::from_millis(200));
            loop {
                tokio::select! {
                    _ = changed.changed() => {}
                    _ = tick.tick() => {}
                }
                if shared.mute.load(Ordering::SeqCst) {
                    continue;
                }
                let order = shared.order.lock().clone();
                let sessions = u32::try_from(shared.sessions.lock().len()).unwrap();
                let report = v1::WorkerReport {
                    phase: order.as_ref().map_or(v1::Phase::Active, v1::PhaseOrder::phase).into(),
                    ordered_unix_ms: order.map_or(0, |order| order.ordered_unix_ms),
                    slots: shared.slots,
                    measured: shared.measured.lock().clone(),
                    reserved: sessions,
                    revisions: vec![v1::RevisionSessions { revision: "r1".into(), sessions }],
                    loaded_generations: shared.loaded(),
                    oldest_generation: shared.oldest.load(Ordering::SeqCst),
                    unix_ms: shared.unix_ms(),
                    ..v1::WorkerReport::default()
                };
                let Some(messages) = weak.upgrade() else {
                    return Ok(());
                };
                let message = send(Message::Report(report));
                if messages.send(message).await.is_err() {
                    return Ok(());
                }
            }
        });
        // Whether or not anybody looks at them, directives are taken for as long as the stream lives.
        let (seen, look) = mpsc::channel(64);
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn("directives", async move {
            while let Ok(Some(directive)) = directives.message().await {
                match &directive.directive {
                    Some(Directive::Keys(keys)) => shared.keys.lock().clone_from(keys),
                    Some(Directive::Phase(order)) => shared.take_order(order),
                    Some(Directive::Relays(relays)) => shared.keys.lock().relays.clone_from(&relays.relays),
                    _ => {}
                }
                shared.changed.send_replace(());
                let _ = seen.try_send(directive);
            }
            Ok(())
        });
        Ok(Registered { welcome, directives: look })
    }

    /// Another process takes its name.
    pub(crate) fn begin_life(&self, incarnation: Incarnation) {
        self.disconnect();
        *self.incarnation.lock() = incarnation;
        *self.shared.order.lock() = None;
    }

    /// Breaks the registrations' streams.
    pub(crate) fn disconnect(&self) {
        self.streams.lock().clear();
    }

    /// Says goodbye.
    pub(crate) async fn deregister(&self) {
        let streams = std::mem::take(&mut *self.streams.lock());
        for stream in streams {
            let goodbye = v1::WorkerMessage { message: Some(Message::Deregister(v1::Deregister {})) };
            stream.send(goodbye).await.unwrap();
        }
    }

    /// Holds a session that no router has placed.
    pub(crate) fn hold(&self, session: [u8; 16], tenant: &str, epoch: u32) {
        let request = v1::ReserveRequest {
            session: session.to_vec().into(),
            epoch,
            agent: AGENT.into(),
            client_key: client_key().to_vec().into(),
            codec: v1::Codec::Opus.into(),
            ttl_ms: 30_000,
            tenant: tenant.to_owned(),
            neighbourhood: 0,
        };
        self.shared.sessions.lock().insert(request.session.clone(), request);
    }

    /// The sessions that it holds.
    pub(crate) fn sessions(&self) -> Vec<String> {
        let sessions = self.shared.sessions.lock();
        let text = |id: &Bytes| antiphon_core::id::SessionId::from_bytes(id.as_ref().try_into().unwrap()).to_string();
        sessions.keys().map(text).collect()
    }

    pub(crate) fn held(&self) -> usize {
        self.shared.sessions.lock().len()
    }

    pub(crate) fn asked(&self) -> u32 {
        self.shared.asked.load(Ordering::SeqCst)
    }
}

impl Shared {
    /// As a worker does: what is not newer changes nothing.
    fn take_order(&self, order: &v1::PhaseOrder) {
        let mut present = self.order.lock();
        if present.as_ref().is_none_or(|present| present.ordered_unix_ms < order.ordered_unix_ms) {
            *present = Some(order.clone());
        }
    }

    /// The key generations that it holds.
    pub(crate) fn loaded(&self) -> Vec<u32> {
        self.keys.lock().cid_configs.iter().map(|c| c.generation).collect()
    }

    fn unix_ms(&self) -> u64 {
        let now = i64::try_from(SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap();
        u64::try_from(now + 1000 * self.clock_ahead_s.load(Ordering::SeqCst)).unwrap()
    }

    /// The one that it mints with.
    pub(crate) fn minting(&self) -> u32 {
        self.keys.lock().cid_configs.iter().filter(|c| c.minting).map(|c| c.generation).sum()
    }
}

#[tonic::async_trait]
impl worker_server::Worker for Shared {
    async fn reserve(&self, request: Request<v1::ReserveRequest>) -> Result<Response<v1::ReserveResponse>, Status> {
        let request = request.into_inner();
        self.asked.fetch_add(1, Ordering::SeqCst);
        let permit = self.gate.acquire().await.unwrap();
        drop(permit);
        let mut sessions = self.sessions.lock();
        let slots = usize::try_from(self.slots).unwrap();
        let room = sessions.contains_key(&request.session) || sessions.len() < slots;
        let client = |r: &v1::ReserveRequest| (r.tenant.clone(), r.client_key.clone());
        let foreign = sessions.get(&request.session).is_some_and(|s| client(s) != client(&request));
        let result = if foreign {
            reserve_response::Result::Refusal(v1::ReserveRefusal {
                reason: "other_client".into(),
                detail: "this session belongs to another client".into(),
                free: u32::try_from(slots - sessions.len()).unwrap(),
            })
        } else if room && !*self.stubborn.lock() {
            let server_id = self.server_id.lock().unwrap().to_u64();
            sessions.insert(request.session.clone(), request);
            reserve_response::Result::Grant(v1::ReserveGrant {
                lease: 42,
                initial_connection_ids: vec![vec![1; 17].into(), vec![2; 17].into()],
                expires_at: Some((SystemTime::now() + Duration::from_secs(30)).into()),
                server_id,
                agent_revision: "r1".into(),
                free: u32::try_from(slots - sessions.len()).unwrap(),
            })
        } else {
            reserve_response::Result::Refusal(v1::ReserveRefusal {
                reason: "full".into(),
                detail: "all slots are taken".into(),
                free: 0,
            })
        };
        drop(sessions);
        self.changed.send_replace(());
        Ok(Response::new(v1::ReserveResponse { result: Some(result) }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        let request = request.into_inner();
        let mut sessions = self.sessions.lock();
        let owned = |s: &v1::ReserveRequest| request.tenant.is_empty() || s.tenant == request.tenant;
        let released = sessions.get(&request.session).is_some_and(owned);
        if released {
            sessions.remove(&request.session);
        }
        drop(sessions);
        self.changed.send_replace(());
        Ok(Response::new(v1::ReleaseResponse { released }))
    }

    async fn list_sessions(
        &self,
        _request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let sessions = self.sessions.lock();
        let summary = |s: &v1::ReserveRequest| v1::SessionSummary {
            session: antiphon_core::id::SessionId::from_bytes(s.session.as_ref().try_into().unwrap()).to_string(),
            agent: s.agent.clone(),
            region: self.region.clone(),
            worker: self.name.clone(),
            state: "reserved".into(),
            epoch: s.epoch,
            since: Some(SystemTime::now().into()),
            codec: s.codec,
            tenant: s.tenant.clone(),
            ..v1::SessionSummary::default()
        };
        Ok(Response::new(v1::ListSessionsResponse { sessions: sessions.values().map(summary).collect() }))
    }

    async fn describe_path(
        &self,
        request: Request<v1::DescribePathRequest>,
    ) -> Result<Response<v1::SessionPath>, Status> {
        let request = request.into_inner();
        let sessions = self.sessions.lock();
        let owned = |s: &&v1::ReserveRequest| request.tenant.is_empty() || s.tenant == request.tenant;
        let session = sessions.get(&request.session).filter(owned);
        let session = session.ok_or_else(|| Status::not_found("no such session"))?;
        let id = antiphon_core::id::SessionId::from_bytes(session.session.as_ref().try_into().unwrap());
        Ok(Response::new(v1::SessionPath {
            session: id.to_string(),
            region: self.region.clone(),
            worker: self.name.clone(),
            epoch: session.epoch,
            paths: vec![v1::PathUse { relay: 64, current: true, rtt_us: 20_000, ..v1::PathUse::default() }],
            events: vec![v1::PathEvent { kind: "opened".into(), relay: 64, ..v1::PathEvent::default() }],
            ..v1::SessionPath::default()
        }))
    }
}

/// A registered relay and its copy of the route table.
pub(crate) struct Relay {
    pub(crate) welcome: v1::RelayWelcome,
    pub(crate) keys: v1::RelayKeys,
    pub(crate) neighbours: Vec<v1::RelayNeighbour>,
    pub(crate) routes: BTreeMap<u64, String>,
    /// Relays of regions that are reached through these only.
    pub(crate) regions: BTreeMap<u32, Vec<u32>>,
    /// Reset keys of servers that are known to be dead.
    pub(crate) dead: BTreeMap<u64, Vec<v1::ResetKey>>,
    pub(crate) version: u64,
    pub(crate) removals_intended: bool,
    directives: Streaming<v1::RelayDirective>,
    messages: mpsc::Sender<v1::RelayMessage>,
}

impl Relay {
    pub(crate) async fn register(world: &World, region: &Region, name: &str) -> Self {
        Self::register_as(world, region, name, None).await
    }

    /// One that says which number it holds.
    pub(crate) async fn register_as(world: &World, region: &Region, name: &str, relay_number: Option<u32>) -> Self {
        let channel = world.channel(region, name, Role::Relay, &region.name);
        let (messages, stream) = mpsc::channel(16);
        let hello = v1::RelayHello {
            name: name.into(),
            region: region.name.clone(),
            public_address: "127.0.0.1:5000".into(),
            tunnel_address: "127.0.0.1:5001".into(),
            relay_number,
            more_public_addresses: Vec::new(),
        };
        let hello = v1::relay_message::Message::Hello(hello);
        let hello = v1::RelayMessage { message: Some(hello) };
        messages.try_send(hello).unwrap();
        let mut fleet = FleetClient::new(channel);
        let directives = fleet.run_relay(ReceiverStream::new(stream)).await;
        let mut relay = Self {
            welcome: v1::RelayWelcome::default(),
            keys: v1::RelayKeys::default(),
            neighbours: Vec::new(),
            routes: BTreeMap::new(),
            regions: BTreeMap::new(),
            dead: BTreeMap::new(),
            version: 0,
            removals_intended: false,
            directives: directives.unwrap().into_inner(),
            messages,
        };
        relay.follow("the first table", |r| r.version > 0).await;
        relay
    }

    /// Takes updates until the condition holds. Versions have to be consecutive.
    pub(crate) async fn follow(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        while !holds(self) {
            let directive = soon(what, self.directives.message()).await;
            match directive.unwrap().unwrap().directive.unwrap() {
                v1::relay_directive::Directive::Welcome(welcome) => {
                    let (cid_configs, secrets) = (welcome.cid_configs.clone(), welcome.secrets.clone());
                    self.load(v1::RelayKeys { cid_configs, secrets }).await;
                    self.welcome = welcome;
                }
                v1::relay_directive::Directive::Keys(keys) => self.load(keys).await,
                v1::relay_directive::Directive::Routes(update) => self.take(update),
                v1::relay_directive::Directive::Neighbours(new) => self.neighbours = new.neighbours,
            }
        }
    }

    /// Takes keys and says that it has them.
    async fn load(&mut self, keys: v1::RelayKeys) {
        let report = v1::RelayReport {
            phase: v1::Phase::Active.into(),
            loaded_generations: keys.cid_configs.iter().map(|c| c.generation).collect(),
            ..v1::RelayReport::default()
        };
        self.keys = keys;
        self.report(report).await;
    }

    pub(crate) async fn report(&self, report: v1::RelayReport) {
        let report = v1::RelayMessage { message: Some(v1::relay_message::Message::Report(report)) };
        self.messages.send(report).await.unwrap();
    }

    fn take(&mut self, update: v1::RouteUpdate) {
        assert_eq!(update.version, self.version + 1);
        assert_eq!(update.full, self.version == 0);
        self.version = update.version;
        self.removals_intended = update.mass_removal_intended;
        for route in update.upserts {
            self.routes.insert(route.server_id, route.tunnel_address);
        }
        for id in &update.removals {
            assert!(self.routes.remove(id).is_some());
        }
        for region in update.region_upserts {
            // Its relays are known by then.
            assert!(region.relays.iter().all(|r| self.neighbours.iter().any(|n| n.number == *r)));
            self.regions.insert(region.region_number, region.relays);
        }
        for number in &update.region_removals {
            assert!(self.regions.remove(number).is_some());
        }
        for server in update.dead {
            assert!(self.dead.insert(server.server_id, server.reset_keys).is_none(), "told twice");
        }
    }
}

const DEADLINE: Duration = Duration::from_secs(20);
