//! A stand-in for the routers: it hands each relay's connection to the test.

use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::SystemTime,
};

use antiphon_core::id::{KeyGeneration, RelayNumber};
use antiphon_proto::v1::{
    self,
    fleet_server::{Fleet, FleetServer},
    relay_directive::Directive,
    relay_message::Message,
};
use antiphon_relay::{Args, serve};
use antiphon_runtime::{
    pki::{FleetCa, PeerName, Role},
    tls,
};
use clap::Parser as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::fixture::{DEADLINE, GENERATION, Worker, config_of, relay_number, root};

type Outgoing = mpsc::Sender<Result<v1::RelayDirective, Status>>;

/// Hands every relay's connection to the test.
struct Router(mpsc::Sender<Registered>);

pub(crate) struct Registered {
    pub(crate) peer: PeerName,
    messages: Streaming<v1::RelayMessage>,
    directives: Outgoing,
}

#[tonic::async_trait]
impl Fleet for Router {
    type RunWorkerStream = ReceiverStream<Result<v1::WorkerDirective, Status>>;
    type RunRelayStream = ReceiverStream<Result<v1::RelayDirective, Status>>;

    async fn run_worker(
        &self,
        _request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::RunWorkerStream>, Status> {
        Err(Status::unimplemented("only relays here"))
    }

    async fn run_relay(
        &self,
        request: Request<Streaming<v1::RelayMessage>>,
    ) -> Result<Response<Self::RunRelayStream>, Status> {
        let peer = tls::peer_of(&request).map_err(|e| Status::unauthenticated(e.to_string()))?;
        let (directives, outgoing) = mpsc::channel(8);
        let registered = Registered { peer, messages: request.into_inner(), directives };
        self.0.send(registered).await.map_err(|_| Status::unavailable("over"))?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

impl Registered {
    pub(crate) async fn message(&mut self) -> Option<Message> {
        let next = timeout(DEADLINE, self.messages.message()).await.expect("a message in time");
        next.ok().flatten().and_then(|m| m.message)
    }

    pub(crate) async fn hello(&mut self) -> v1::RelayHello {
        match self.message().await {
            Some(Message::Hello(hello)) => hello,
            other => panic!("not a hello: {other:?}"),
        }
    }

    pub(crate) async fn report(&mut self, wanted: impl Fn(&v1::RelayReport) -> bool) -> v1::RelayReport {
        loop {
            match self.message().await {
                Some(Message::Report(report)) if wanted(&report) => return report,
                Some(Message::Report(_)) => {}
                other => panic!("not a report: {other:?}"),
            }
        }
    }

    pub(crate) async fn send(&self, directive: Directive) {
        let directive = v1::RelayDirective { directive: Some(directive) };
        self.directives.send(Ok(directive)).await.unwrap();
    }

    /// Ends the registration with an error.
    pub(crate) async fn refuse(self, status: Status) {
        self.directives.send(Err(status)).await.unwrap();
    }

    pub(crate) async fn welcome(&self) {
        self.welcome_as(relay_number(), &[GENERATION], GENERATION).await;
    }

    /// A welcome with keys of these generations.
    pub(crate) async fn welcome_as(&self, relay: RelayNumber, generations: &[u32], sealing: u32) {
        let v1::RelayKeys { cid_configs, secrets } = keys(relay, generations, sealing);
        let welcome =
            v1::RelayWelcome { relay_number: relay.value().into(), cid_configs, secrets, report_interval_ms: 50 };
        self.send(Directive::Welcome(welcome)).await;
    }

    pub(crate) async fn keys(&self, generations: &[u32], sealing: u32) {
        self.send(Directive::Keys(keys(relay_number(), generations, sealing))).await;
    }

    pub(crate) async fn neighbours(&self, neighbours: Vec<v1::RelayNeighbour>) {
        self.send(Directive::Neighbours(v1::RelayNeighbours { neighbours })).await;
    }

    pub(crate) async fn update(&self, update: v1::RouteUpdate) {
        self.send(Directive::Routes(update)).await;
    }

    pub(crate) async fn routes(&self, version: u64, full: bool, workers: &[&Worker]) {
        let upserts = workers
            .iter()
            .map(|w| v1::Route { server_id: w.server_id.to_u64(), tunnel_address: w.address().to_string() })
            .collect();
        self.send(Directive::Routes(v1::RouteUpdate { version, full, upserts, ..v1::RouteUpdate::default() })).await;
    }
}

/// What routers hand out of these generations.
fn keys(relay: RelayNumber, generations: &[u32], sealing: u32) -> v1::RelayKeys {
    let generations = || generations.iter().map(|g| KeyGeneration::new(*g).unwrap());
    let cid = |g: KeyGeneration| v1::CidConfig {
        config_id: config_of(g).value().into(),
        generation: g.value(),
        key: root().cid_key(g).to_vec().into(),
        minting: g.value() == sealing,
    };
    let secret = |g: KeyGeneration| v1::RelaySecret {
        generation: g.value(),
        secret: root().relay_secret(relay, g).as_bytes().to_vec().into(),
        sealing: g.value() == sealing,
    };
    v1::RelayKeys { cid_configs: generations().map(cid).collect(), secrets: generations().map(secret).collect() }
}

/// A router that accepts relays of one region: its address, and where they come up.
pub(crate) async fn listen(region: &str) -> (String, mpsc::Receiver<Registered>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (registered, registrations) = mpsc::channel(4);
    let ca = FleetCa::from_seed(&root().ca_seed()).unwrap();
    let peer = PeerName::new("router-1", Role::Router, region).unwrap();
    let identity = ca.issue(&peer, &[], SystemTime::now()).unwrap();
    let server = Server::builder()
        .tls_config(tls::grpc_server(&identity))
        .unwrap()
        .add_service(FleetServer::new(Router(registered)))
        .serve_with_incoming(TcpListenerStream::new(listener));
    antiphon_runtime::Tasks::new().service("router", async move { Ok(server.await?) });
    (address, registrations)
}

/// A router and the arguments of a relay that registers there.
pub(crate) struct Fixture {
    _identity: tempfile::TempDir,
    line: Vec<String>,
    pub(crate) args: Args,
    pub(crate) admin: SocketAddr,
    pub(crate) registrations: mpsc::Receiver<Registered>,
}

pub(crate) async fn fixture(extra: &[&str]) -> Fixture {
    fixture_in("here", "relay-1", extra).await
}

pub(crate) async fn fixture_in(region: &str, name: &str, extra: &[&str]) -> Fixture {
    let ca = FleetCa::from_seed(&root().ca_seed()).unwrap();
    let identity = tempfile::tempdir().unwrap();
    let peer = PeerName::new(name, Role::Relay, region).unwrap();
    ca.issue(&peer, &[], SystemTime::now()).unwrap().save(identity.path()).unwrap();
    let (router, registrations) = listen(region).await;
    // Free a moment ago, and the system hands ports out in turn.
    let admin = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // The first router is nobody: that keeps the relay from nothing.
    let routers = format!("127.0.0.1:1,{router}");
    let (dir, admin_text) = (identity.path().to_str().unwrap(), admin.to_string());
    let mut line = vec!["antiphon-relay", "--identity", dir, "--admin", &admin_text, "--cores", "2"];
    line.extend(["--router", &routers]);
    for (flag, default) in [("--public", "127.0.0.1:0"), ("--tunnel", "127.0.0.1:0")] {
        if !extra.contains(&flag) {
            line.extend([flag, default]);
        }
    }
    line.extend(extra);
    let line: Vec<String> = line.into_iter().map(String::from).collect();
    Fixture { args: Args::parse_from(&line), line, _identity: identity, admin, registrations }
}

impl Fixture {
    pub(crate) async fn registered(&mut self) -> Registered {
        timeout(DEADLINE, self.registrations.recv()).await.expect("a relay in time").unwrap()
    }

    /// A process of its own, which ends with the handle.
    pub(crate) fn spawn(&self) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_antiphon-relay"));
        let child = command.args(&self.line[1..]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Process(child.unwrap())
    }

    pub(crate) async fn http(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    pub(crate) async fn eventually_http(&self, path: &str, wanted: &str) {
        let waiting = async {
            while !self.http(path).await.contains(wanted) {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("{path} never says {wanted}"));
    }

    pub(crate) async fn eventually_admin(&self) {
        let waiting = async {
            while TcpStream::connect(self.admin).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, waiting).await.expect("an admin port in time");
    }
}

/// A relay as a process of its own; killed when dropped.
pub(crate) struct Process(Child);

impl Process {
    /// Without any chance to say goodbye.
    pub(crate) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs until the test is done with it, and gives what [`serve`] gave.
pub(crate) struct Running {
    pub(crate) stop: Arc<Notify>,
    pub(crate) ended: tokio::sync::oneshot::Receiver<anyhow::Result<()>>,
}

pub(crate) fn start(args: Args) -> Running {
    let (stop, (send, ended)) = (Arc::new(Notify::new()), tokio::sync::oneshot::channel());
    let stopped = stop.clone();
    let tasks = antiphon_runtime::Tasks::new();
    tasks.spawn("relay", async move {
        let outcome = serve(args, async move { stopped.notified().await }).await;
        let _ = send.send(outcome);
        Ok(())
    });
    Running { stop, ended }
}
