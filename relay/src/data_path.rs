//! The forwarding threads: each has its own sockets and memory and shares nothing with the others but the table.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use antiphon_core::tunnel::{ClientAddr, Direction, Ecn, HEADER_LEN, Header, INITIAL_HOP_LIMIT, Notice, coarse_time};
use anyhow::Context as _;
use arc_swap::ArcSwap;
use mio::Waker;
use tokio::sync::mpsc;

use crate::{metrics::Metrics, socket, table::Table};

mod core;

use core::Core;

/// Where and how to forward.
#[derive(Clone, Debug)]
pub struct Config {
    /// For clients.
    pub public: SocketAddr,
    /// For workers.
    pub tunnel: SocketAddr,
    /// Threads, at least one.
    pub cores: usize,
    /// Whether each is pinned to a core.
    pub pin: bool,
}

/// The running threads. They stop when this is dropped.
#[derive(Debug)]
pub struct DataPath {
    table: Arc<ArcSwap<Table>>,
    activity: Arc<Activity>,
    stop: Arc<AtomicBool>,
    wakers: Vec<Waker>,
    notifier: std::net::UdpSocket,
    public: SocketAddr,
    tunnel: SocketAddr,
}

/// How the threads ended.
#[derive(Debug)]
pub struct Exits(mpsc::Receiver<anyhow::Result<()>>);

impl DataPath {
    /// Binds the ports and starts the threads. Nothing is forwarded until [`Self::swap`].
    ///
    /// # Errors
    /// An address cannot be bound, or the system refuses a thread.
    pub fn start(config: &Config, metrics: &Metrics) -> anyhow::Result<(Self, Exits)> {
        let bind = |what, address| {
            socket::bind_group(address, config.cores)
                .with_context(|| format!("binding the {what} port {address} (UDP)"))
        };
        let fronts = bind("public", config.public)?;
        let backs = bind("tunnel", config.tunnel)?;
        let (exited, exits) = mpsc::channel(config.cores);
        let mut path = Self {
            public: fronts[0].local_addr()?,
            tunnel: backs[0].local_addr()?,
            notifier: backs[0].try_clone()?,
            table: Arc::new(ArcSwap::from_pointee(Table::empty())),
            activity: Arc::new(Activity::new()),
            stop: Arc::new(AtomicBool::new(false)),
            wakers: Vec::with_capacity(config.cores),
        };
        let cpus = config.pin.then(allowed_cpus).unwrap_or_default();
        for (index, (front, back)) in fronts.into_iter().zip(backs).enumerate() {
            let (core, waker) = Core::new(front, back, path.table.clone(), metrics.clone(), path.activity.clone())?;
            path.wakers.push(waker);
            let cpu = (!cpus.is_empty()).then(|| cpus[index % cpus.len()]);
            start_thread(core, index, cpu, path.stop.clone(), exited.clone())?;
        }
        Ok((path, Exits(exits)))
    }

    /// Where clients' datagrams are received.
    #[must_use]
    pub const fn public(&self) -> SocketAddr {
        self.public
    }

    /// Where workers' frames are received.
    #[must_use]
    pub const fn tunnel(&self) -> SocketAddr {
        self.tunnel
    }

    /// Puts a table in force, from every thread's next batch on.
    pub fn swap(&self, table: Table) {
        self.table.store(Arc::new(table));
    }

    /// The table in force.
    #[must_use]
    pub fn table(&self) -> Arc<Table> {
        self.table.load_full()
    }

    /// When the last client's datagram was sent on, if one was.
    #[must_use]
    pub fn last_client_datagram(&self) -> Option<Instant> {
        self.activity.last()
    }

    /// Tells every shard in the table; gives the number of notices sent.
    pub fn notify(&self, notice: Notice) -> usize {
        let table = self.table.load();
        let tell = |route: &&crate::table::Route| {
            let header = Header {
                direction: Direction::Up,
                key_slot: route.slot,
                hop_limit: INITIAL_HOP_LIMIT,
                ecn: Ecn::NotEct,
                client: ClientAddr::RELAY,
                relay: table.relay(),
                time: coarse_time(unix_seconds()),
            };
            let mut frame = [0; HEADER_LEN + Notice::LEN];
            frame[HEADER_LEN..].copy_from_slice(&notice.to_bytes());
            let sealed = header.seal_frame(&route.key, &mut frame).is_ok();
            let address = socket::in_family(route.address, self.tunnel.is_ipv6());
            // What is lost is repeated.
            sealed && address.is_some_and(|a| self.notifier.send_to(&frame, a).is_ok())
        };
        table.routes().filter(tell).count()
    }

    /// Makes the threads end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        for waker in &self.wakers {
            if let Err(error) = waker.wake() {
                tracing::warn!(%error, "waking a forwarding thread");
            }
        }
    }
}

impl Drop for DataPath {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Exits {
    /// Completes when a thread fails, or all have ended.
    ///
    /// # Errors
    /// The first failure.
    pub async fn wait(&mut self) -> anyhow::Result<()> {
        while let Some(outcome) = self.0.recv().await {
            outcome?;
        }
        Ok(())
    }
}

fn start_thread(
    core: Core,
    index: usize,
    cpu: Option<usize>,
    stop: Arc<AtomicBool>,
    exited: mpsc::Sender<anyhow::Result<()>>,
) -> io::Result<()> {
    let body = move || {
        let mut exit = Exit { outcome: Err(anyhow::anyhow!("forwarding thread {index} panicked")), exited };
        if let Some(cpu) = cpu {
            pin(cpu);
        }
        exit.outcome = core.run(&stop).with_context(|| format!("forwarding thread {index}"));
    };
    thread::Builder::new().name(format!("relay-{index}")).spawn(body).map(|_detached| ())
}

/// Reports how its thread ended, also by a panic.
struct Exit {
    outcome: anyhow::Result<()>,
    exited: mpsc::Sender<anyhow::Result<()>>,
}

impl Drop for Exit {
    fn drop(&mut self) {
        let outcome = std::mem::replace(&mut self.outcome, Ok(()));
        // There is a place for every thread.
        let _ = self.exited.try_send(outcome);
    }
}

/// When the last client's datagram was sent on, as the threads see it.
#[derive(Debug)]
struct Activity {
    start: Instant,
    /// Milliseconds since `start`, plus one; zero for never.
    last: AtomicU64,
}

impl Activity {
    fn new() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0) }
    }

    fn record(&self) {
        let since = self.start.elapsed().as_millis() as u64;
        self.last.fetch_max(since + 1, Ordering::Relaxed);
    }

    fn last(&self) -> Option<Instant> {
        let since = self.last.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.start + Duration::from_millis(since))
    }
}

fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

fn allowed_cpus() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        Err(error) => {
            tracing::warn!(%error, "forwarding threads are not pinned");
            Vec::new()
        }
    }
}

fn pin(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::warn!(%error, cpu, "forwarding thread is not pinned");
    }
}
