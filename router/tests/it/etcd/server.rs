//! A real etcd on loopback, and a way to it that can be cut.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use antiphon_router::StoreArgs;
use antiphon_runtime::Tasks;
use etcd_client::{Client, ConnectOptions};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
};

use crate::world::{eventually, soon};

/// An etcd with a data directory of its own. Ends with the value, and with the test's thread.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    data: TempDir,
    peers: SocketAddr,
    options: Vec<String>,
    scheme: &'static str,
    child: Option<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Where the binary is; fetched if need be.
fn binary() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/etcd-server");
    let output = Command::new("sh").arg(script).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "no etcd; what was tried is above");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end())
}

/// A port that nobody has and that the system hands out to nobody, so that it is still there after a restart.
fn free() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    static FIRST: LazyLock<u16> = LazyLock::new(rand::random);
    loop {
        let step = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 10_000 + u16::try_from((u32::from(*FIRST) + step) % 20_000).unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if std::net::TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with("http", &[], None).await
    }

    /// With TLS and these options; `login` is for the first question.
    pub(crate) async fn with(scheme: &'static str, options: &[String], login: Option<ConnectOptions>) -> Self {
        let (data, options) = (tempfile::tempdir().unwrap(), options.to_vec());
        let mut server = Self { address: free(), peers: free(), data, options, scheme, child: None };
        server.run();
        server.answers(login).await;
        server
    }

    /// Starts it, also again, on the same data.
    pub(crate) fn run(&mut self) {
        let url = self.url();
        let peers = format!("http://{}", self.peers);
        // setpriv ends it with whoever started it, also if that is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(binary()).arg("--data-dir").arg(self.data.path().join("etcd"));
        command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url, "--name", "etcd"]);
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.args(["--initial-cluster", &format!("etcd={peers}")]).args(&self.options);
        let log = std::fs::File::create(self.data.path().join("log")).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log).env_clear();
        self.child = Some(command.spawn().unwrap());
    }

    async fn answers(&mut self, login: Option<ConnectOptions>) {
        let url = self.url();
        eventually("etcd answers", async || {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("etcd ended with {status}:\n{}", std::fs::read_to_string(self.data.path().join("log")).unwrap());
            }
            let Ok(mut client) = Client::connect([&url], login.clone()).await else {
                return false;
            };
            tokio::time::timeout(Duration::from_secs(1), client.status()).await.is_ok_and(|status| status.is_ok())
        })
        .await;
    }

    /// Starts it again and waits until it answers.
    pub(crate) async fn restart(&mut self) {
        self.run();
        self.answers(None).await;
    }

    /// As a power cut would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// All that it keeps.
    pub(crate) fn data(&self) -> PathBuf {
        self.data.path().join("etcd")
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    pub(crate) async fn client(&self) -> Client {
        soon("a connection to etcd", Client::connect([self.url()], None)).await.unwrap()
    }

    /// For a store at this address, which may be a [`Cable`]'s.
    pub(crate) fn args(&self, address: SocketAddr) -> StoreArgs {
        StoreArgs { etcd: vec![format!("{}://{address}", self.scheme)], ..StoreArgs::default() }
    }
}

/// What a cable does with what is said on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Open,
    /// Questions arrive, answers do not.
    NoAnswers,
    /// Nothing arrives, and nobody is told.
    Silent,
    /// Connections end, and none can be made.
    Cut,
}

/// A way to a server that can be disturbed.
pub(crate) struct Cable {
    pub(crate) address: SocketAddr,
    way: Arc<watch::Sender<Way>>,
    tasks: Tasks,
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.tasks.stopping().cancel();
    }
}

impl Cable {
    pub(crate) async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (way, tasks) = (Arc::new(watch::Sender::new(Way::Open)), Tasks::new());
        let (ways, owner, stopping) = (Arc::clone(&way), tasks.clone(), tasks.stopping());
        tasks.spawn("cable", async move {
            while let Some(Ok((near, _))) = stopping.run_until_cancelled(listener.accept()).await {
                let (ways, stopping) = (Arc::clone(&ways), stopping.clone());
                owner.spawn("connection", async move {
                    stopping.run_until_cancelled(carry(near, server, &ways)).await;
                    Ok(())
                });
            }
            Ok(())
        });
        Self { address, way, tasks }
    }

    pub(crate) fn is(&self, way: Way) {
        self.way.send_replace(way);
    }
}

async fn carry(near: TcpStream, server: SocketAddr, ways: &watch::Sender<Way>) {
    let Ok(far) = TcpStream::connect(server).await else {
        return;
    };
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    let mut cut = ways.subscribe();
    tokio::select! {
        _ = cut.wait_for(|way| *way == Way::Cut) => {}
        () = copy(near_in, far_out, ways.subscribe(), &[Way::Open, Way::NoAnswers]) => {}
        () = copy(far_in, near_out, ways.subscribe(), &[Way::Open]) => {}
    }
}

async fn copy(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, mut ways: watch::Receiver<Way>, open: &[Way]) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if ways.wait_for(|way| open.contains(way)).await.is_err() || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
