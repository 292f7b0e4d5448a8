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

use antiphon_core::{
    clock::Millis,
    id::{KeyGeneration, RelayNumber},
    keys::TunnelKey,
    tunnel::{ClientAddr, Direction, Ecn, HEADER_LEN, Header, INITIAL_HOP_LIMIT, KeySlot, Notice, coarse_time},
};
use anyhow::Context as _;
use arc_swap::{ArcSwap, Guard};
use mio::Waker;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::{forward::Now, limits::Limits, metrics::Metrics, socket, table::Table};

mod core;
mod skew;

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
    /// What each lets pass.
    pub limits: Limits,
}

/// The running threads. They stop when this is dropped.
#[derive(Debug)]
pub struct DataPath {
    shared: Arc<Shared>,
    /// Generations that all threads can use.
    loaded: Mutex<Vec<KeyGeneration>>,
    stop: Arc<AtomicBool>,
    wakers: Vec<Waker>,
    notifier: std::net::UdpSocket,
    public: SocketAddr,
    tunnel: SocketAddr,
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    table: ArcSwap<InForce>,
    /// Per thread: the table that it uses, or a later one.
    used: Vec<AtomicU64>,
    clock: Clock,
}

/// A table, and how many came before it.
#[derive(Debug)]
struct InForce {
    sequence: u64,
    table: Arc<Table>,
}

impl std::ops::Deref for InForce {
    type Target = Table;

    fn deref(&self) -> &Table {
        &self.table
    }
}

impl Shared {
    fn new(threads: usize) -> Self {
        Self {
            table: ArcSwap::from_pointee(InForce { sequence: 0, table: Arc::new(Table::empty()) }),
            used: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            clock: Clock::new(),
        }
    }

    fn table(&self) -> Guard<Arc<InForce>> {
        self.table.load()
    }

    /// Brings a list of generations that all threads can use up to date. While some thread may still use an earlier
    /// table nothing is added, but what the latest one has not is gone.
    fn update_loaded(&self, loaded: &mut Vec<KeyGeneration>) {
        let table = self.table();
        if self.used.iter().all(|used| used.load(Ordering::Acquire) >= table.sequence) {
            *loaded = table.loaded_generations().to_vec();
        } else {
            loaded.retain(|generation| table.loaded_generations().contains(generation));
        }
    }

    fn swap(&self, table: Table) {
        let sequence = self.table().sequence + 1;
        self.table.store(Arc::new(InForce { sequence, table: Arc::new(table) }));
    }

    /// The table to use from now on, for that thread.
    fn in_force(&self, thread: usize) -> Guard<Arc<InForce>> {
        let (table, used) = (self.table.load(), &self.used[thread]);
        if used.load(Ordering::Relaxed) != table.sequence {
            used.store(table.sequence, Ordering::Release);
        }
        table
    }
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
            shared: Arc::new(Shared::new(config.cores)),
            loaded: Mutex::default(),
            stop: Arc::new(AtomicBool::new(false)),
            wakers: Vec::with_capacity(config.cores),
        };
        let cpus = config.pin.then(allowed_cpus).unwrap_or_default();
        for (index, (front, back)) in fronts.into_iter().zip(backs).enumerate() {
            let (core, waker) = Core::new(front, back, index, path.shared.clone(), metrics.clone(), &config.limits)?;
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

    /// Puts a table in force, from every thread's next batch on. One caller at a time.
    pub fn swap(&self, table: Table) {
        self.shared.swap(table);
        // A thread that waits says which table it uses, too.
        self.wake();
    }

    /// The table in force.
    #[must_use]
    pub fn table(&self) -> Arc<Table> {
        self.shared.table().table.clone()
    }

    /// Generations of keys that every thread can decode and verify with, in order. A new one counts from the moment on
    /// when no thread uses a table without it any more.
    #[must_use]
    pub fn loaded_generations(&self) -> Vec<KeyGeneration> {
        let mut loaded = self.loaded.lock();
        self.shared.update_loaded(&mut loaded);
        loaded.clone()
    }

    /// When the last client's datagram was sent on, if one was.
    #[must_use]
    pub fn last_client_datagram(&self) -> Option<Instant> {
        self.shared.clock.last()
    }

    /// How often another relay of a region was taken because the one in use had fallen silent.
    #[must_use]
    pub fn switches(&self) -> u64 {
        self.shared.table().switches()
    }

    /// Tells every shard in the table, the workers of regions behind their relays through those, and the relays whose
    /// clients come through this one; gives the number of notices sent.
    pub fn notify(&self, notice: Notice) -> usize {
        let (table, now) = (self.shared.table(), self.shared.clock.now());
        let own = table.relay();
        let up = |address, slot, key| self.tell(notice, Direction::Up, own, now, (address, slot, key));
        let shards = table.routes().filter(|(_, r)| up(r.address, r.slot, &r.key)).count();
        let regions = table.ways(now.ms).filter(|(_, n)| up(n.address, n.slot, &n.key)).count();
        let down = |n: &&crate::neighbour::Neighbour| {
            let sealing = n.sealing_for_its_clients();
            sealing.is_some_and(|(slot, key)| self.tell(notice, Direction::Down, own, now, (n.address, slot, key)))
        };
        shards + regions + table.neighbours().iter().filter(down).count()
    }

    fn tell(
        &self,
        notice: Notice,
        direction: Direction,
        relay: RelayNumber,
        now: Now,
        (address, key_slot, key): (SocketAddr, KeySlot, &TunnelKey),
    ) -> bool {
        let header = Header {
            direction,
            key_slot,
            hop_limit: INITIAL_HOP_LIMIT,
            ecn: Ecn::NotEct,
            client: ClientAddr::RELAY,
            relay,
            time: coarse_time(now.unix_s),
        };
        let mut frame = [0; HEADER_LEN + Notice::LEN];
        frame[HEADER_LEN..].copy_from_slice(&notice.to_bytes());
        let sealed = header.seal_frame(key, &mut frame).is_ok();
        let address = socket::in_family(address, self.tunnel.is_ipv6());
        // What is lost is repeated.
        sealed && address.is_some_and(|a| self.notifier.send_to(&frame, a).is_ok())
    }

    /// Makes the threads end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
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

/// The threads' clocks, and when the last client's datagram was sent on.
#[derive(Debug)]
struct Clock {
    start: Instant,
    /// Milliseconds since `start`, plus one; zero for never.
    last: AtomicU64,
}

impl Clock {
    fn new() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0) }
    }

    fn now(&self) -> Now {
        let unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Now { unix_s, ms: Millis(self.start.elapsed().as_millis() as u64) }
    }

    fn record(&self, now: Now) {
        if self.last.load(Ordering::Relaxed) <= now.ms.0 {
            self.last.fetch_max(now.ms.0 + 1, Ordering::Relaxed);
        }
    }

    fn last(&self) -> Option<Instant> {
        let since = self.last.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.start + Duration::from_millis(since))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_counts_once_the_last_thread_has_moved_on() {
        let shared = Shared::new(2);
        let generation = |n| KeyGeneration::new(n).unwrap();
        let swap = |generations: &[u32]| {
            let loaded = generations.iter().map(|g| generation(*g)).collect();
            shared.swap(Table { loaded, ..Table::empty() });
        };
        let mut loaded = Vec::new();
        let mut now = |used: &[usize]| -> Vec<u32> {
            used.iter().for_each(|thread| drop(shared.in_force(*thread)));
            shared.update_loaded(&mut loaded);
            loaded.iter().map(|g| g.value()).collect()
        };
        swap(&[1]);
        assert_eq!((now(&[]), now(&[0]), now(&[1])), (vec![], vec![], vec![1]));
        swap(&[1, 2]);
        assert_eq!((now(&[1]), now(&[0])), (vec![1], vec![1, 2]));
        swap(&[2, 3]);
        assert_eq!((now(&[]), now(&[0, 1])), (vec![2], vec![2, 3]), "what is to go is not counted any more");
    }
}
