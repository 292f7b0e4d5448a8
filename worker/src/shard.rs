//! A worker's QUIC endpoints: one UDP port, one thread and one endpoint each.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_core::{
    cid::{CidMinter, NonceCounter},
    id::{Incarnation, KeyGeneration, RegionNumber, RelayNumber, ServerId, ShardNumber, WorkerNumber},
    tunnel::Notice,
};
use antiphon_media::format::AudioFormat;
use antiphon_proto::v1::{Codec, WorkerRelay};
use antiphon_quic::{AudioBudget, Side, server_crypto, transport};
use antiphon_runtime::{Tasks, pki::Identity, tls};
use anyhow::{Context as _, anyhow};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use quinn::{Endpoint, EndpointConfig, QlogStream, ServerConfig, TokioRuntime};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    capacity::{Capacity, Door},
    cids::ShardCids,
    gate::Gate,
    keys::{KeySet, ResetKeys, ResetTable},
    metrics::Metrics,
    paths::Paths,
    qlog::QlogDir,
    relays::RelayTable,
    rotation::Rotation,
    session,
    socket::{RelayNotice, TunnelSocket},
};

/// What a session task needs of its shard.
#[derive(Debug)]
pub(crate) struct ShardContext {
    pub(crate) server_id: ServerId,
    pub(crate) gate: Arc<Mutex<Gate>>,
    pub(crate) paths: Arc<Paths>,
    pub(crate) relays: Arc<ArcSwap<RelayTable>>,
    pub(crate) rotation: Arc<Rotation>,
    pub(crate) capacity: Arc<Capacity>,
    pub(crate) metrics: Metrics,
    pub(crate) ticket_keys: Arc<ArcSwap<Vec<[u8; 32]>>>,
    pub(crate) draining_relays: watch::Receiver<DrainingRelays>,
    pub(crate) server_configs: ServerConfigs,
    pub(crate) qlog: Option<Arc<QlogDir>>,
    /// All sessions' steps are set by it.
    pub(crate) clock: Instant,
    /// Random per process: part of the echo engine's receipts.
    pub(crate) process_nonce: u16,
}

/// Relays that said they will stop, and when.
pub(crate) type DrainingRelays = BTreeMap<RelayNumber, Instant>;

/// One QUIC configuration per codec: buffers and floor depend on the frame size.
#[derive(Debug, Clone)]
pub(crate) struct ServerConfigs(Vec<(AudioFormat, Arc<ServerConfig>)>);

impl ServerConfigs {
    fn new(identity: &Identity, slots: u32) -> anyhow::Result<Self> {
        let crypto = Arc::new(server_crypto(tls::provider(), identity.presenter())?);
        let configs = AudioFormat::ALL.map(|format| {
            let mut config = ServerConfig::with_crypto(crypto.clone());
            config
                .transport_config(Arc::new(transport(Side::Worker, budget(format))))
                .max_incoming(usize::try_from(slots).unwrap_or(usize::MAX))
                .incoming_buffer_size(16 << 10)
                .incoming_buffer_size_total(u64::from(slots) * (16 << 10));
            (format, Arc::new(config))
        });
        Ok(Self(configs.into()))
    }

    pub(crate) fn of(&self, format: AudioFormat) -> Arc<ServerConfig> {
        let found = self.0.iter().find(|(of, _)| *of == format);
        found.expect("there is one for every format").1.clone()
    }

    /// The same for one connection whose doings are written down.
    pub(crate) fn with_qlog(&self, format: AudioFormat, qlog: QlogStream) -> Arc<ServerConfig> {
        let (mut config, mut transport) =
            (ServerConfig::clone(&self.of(format)), transport(Side::Worker, budget(format)));
        transport.qlog_stream(Some(qlog));
        config.transport_config(Arc::new(transport));
        Arc::new(config)
    }
}

fn budget(format: AudioFormat) -> AudioBudget {
    AudioBudget { frame_bytes: format.max_packet_bytes() + 1 }
}

/// The audio format of a codec on the wire.
pub(crate) const fn audio_format(codec: Codec) -> Option<AudioFormat> {
    match codec {
        Codec::Opus => Some(AudioFormat::Opus),
        Codec::L1616k => Some(AudioFormat::L16At16k),
        Codec::L1624k => Some(AudioFormat::L16At24k),
        Codec::Unspecified => None,
    }
}

/// What the shards are opened with.
pub(crate) struct ShardsConfig<'a> {
    pub(crate) numbers: (RegionNumber, WorkerNumber),
    pub(crate) incarnation: Incarnation,
    pub(crate) identity: &'a Identity,
    pub(crate) region: &'a str,
    pub(crate) slots: u32,
    pub(crate) pin: bool,
    pub(crate) cid_lifetime: Duration,
    pub(crate) qlog: Option<Arc<QlogDir>>,
    pub(crate) capacity: Arc<Capacity>,
    pub(crate) metrics: Metrics,
}

/// Handles to the running shards, for later changes of keys and relays.
#[derive(Debug)]
pub(crate) struct Shards {
    doors: Vec<Door>,
    relays: Vec<Arc<ArcSwap<RelayTable>>>,
    resets: Vec<Arc<ArcSwap<ResetTable>>>,
    ticket_keys: Arc<ArcSwap<Vec<[u8; 32]>>>,
    rotation: Arc<Rotation>,
    loaded: Vec<KeyGeneration>,
}

impl Shards {
    /// Starts one thread per socket and opens the doors.
    pub(crate) fn open(
        config: ShardsConfig<'_>,
        sockets: Vec<(std::net::UdpSocket, SocketAddr)>,
        keys: &KeySet,
        relays_known: &[WorkerRelay],
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let (codec, minting) = (keys.codec(), keys.minting());
        let rotation = Arc::new(Rotation::new(keys, config.cid_lifetime, std::time::Instant::now()));
        let server_configs = ServerConfigs::new(config.identity, config.slots)?;
        let ticket_keys = Arc::new(ArcSwap::from_pointee(keys.ticket_keys()));
        tracing::info!(region = config.region, worker = %config.numbers.1, shards = sockets.len(), "opening shards");
        let (mut doors, mut tables, mut resets) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (socket, _)) in (0_u8..).zip(sockets) {
            let (region, worker) = config.numbers;
            let shard = ShardNumber::new(number)?;
            let server_id = ServerId { region, worker, shard, incarnation: config.incarnation };
            let gate = Arc::new(Mutex::new(Gate::new(server_id, codec.clone(), config.slots)));
            let counter = NonceCounter::starting_at(rand::random());
            let minter = Arc::new(Mutex::new(CidMinter::new(server_id, minting.config, minting.key, counter)));
            let relays = Arc::new(ArcSwap::from_pointee(RelayTable::new(relays_known, number.into())?));
            let reset_table = Arc::new(ArcSwap::from_pointee(keys.resets(number.into())));
            let (draining, draining_relays) = watch::channel(DrainingRelays::new());
            let context = ShardContext {
                server_id,
                gate: gate.clone(),
                paths: Arc::default(),
                relays: relays.clone(),
                rotation: rotation.clone(),
                capacity: config.capacity.clone(),
                metrics: config.metrics.clone(),
                ticket_keys: ticket_keys.clone(),
                draining_relays,
                server_configs: server_configs.clone(),
                qlog: config.qlog.clone(),
                clock: Instant::now(),
                process_nonce: rand::random(),
            };
            let shard = Shard {
                context: Arc::new(context),
                socket,
                minter: minter.clone(),
                resets: reset_table.clone(),
                draining,
                core: config.pin.then_some(number),
            };
            shard.start(tasks)?;
            doors.push(Door { server_id, minter, gate, rotation: rotation.clone() });
            tables.push(relays);
            resets.push(reset_table);
        }
        config.capacity.open(doors.clone());
        Ok(Self { doors, relays: tables, resets, ticket_keys, rotation, loaded: keys.generations().collect() })
    }

    /// Goes on with other keys. Live sessions keep theirs for as long as the keys are loaded.
    pub(crate) fn set_keys(&mut self, keys: &KeySet, now: std::time::Instant) {
        self.loaded = keys.generations().collect();
        let (codec, minting) = (keys.codec(), keys.minting());
        self.ticket_keys.store(Arc::new(keys.ticket_keys()));
        for ((shard, door), resets) in (0..).zip(&self.doors).zip(&self.resets) {
            // What is minted next can already be read and reset.
            resets.store(Arc::new(keys.resets(shard)));
            door.gate.lock().set_codec(codec.clone());
            door.minter.lock().rotate(minting.config, minting.key);
        }
        self.rotation.set(keys, now);
    }

    /// The oldest key generation that a relay's tunnel still uses.
    pub(crate) fn oldest_tunnel_generation(&self) -> Option<KeyGeneration> {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.relays.iter().filter_map(|table| table.load().oldest_in_use(now_s)).min()
    }

    /// Takes over the relays that frames are accepted from, all shards or none.
    pub(crate) fn set_relays(&self, relays: &[WorkerRelay]) -> anyhow::Result<()> {
        let tables: Result<Vec<_>, _> = (0..).zip(&self.relays).map(|(n, _)| RelayTable::new(relays, n)).collect();
        for (slot, table) in self.relays.iter().zip(tables?) {
            slot.store(Arc::new(table.keeping(&slot.load(), &self.loaded)));
        }
        Ok(())
    }
}

struct Shard {
    context: Arc<ShardContext>,
    socket: std::net::UdpSocket,
    minter: Arc<Mutex<CidMinter>>,
    resets: Arc<ArcSwap<ResetTable>>,
    draining: watch::Sender<DrainingRelays>,
    core: Option<u8>,
}

impl Shard {
    /// Runs the shard on a thread of its own; the thread's end is a task's end.
    fn start(self, tasks: &Tasks) -> anyhow::Result<()> {
        let (done, outcome) = oneshot::channel();
        let stopping = tasks.stopping();
        let name = format!("shard-{}", self.context.server_id.shard);
        std::thread::Builder::new().name(name).spawn(move || {
            // Nobody to tell: then the process is ending anyway.
            let _ = done.send(self.run(stopping));
        })?;
        tasks.service("shard", async move { outcome.await.unwrap_or_else(|_| Err(anyhow!("thread panicked"))) });
        Ok(())
    }

    fn run(self, stopping: CancellationToken) -> anyhow::Result<()> {
        if let Some(core) = self.core {
            pin_to(core);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.serve(stopping))
    }

    async fn serve(self, stopping: CancellationToken) -> anyhow::Result<()> {
        let (notices, told) = mpsc::channel(64);
        let context = self.context;
        let metrics = context.metrics.shard.clone();
        let socket = TunnelSocket::new(
            self.socket,
            context.gate.clone(),
            context.relays.clone(),
            context.paths.clone(),
            notices,
            metrics,
        )?;
        let mut config = EndpointConfig::new(Arc::new(ResetKeys::new(self.resets)));
        let cids = ShardCids { minter: self.minter, lifetime: context.rotation.lifetime() };
        config.cid_generator(move || Box::new(cids.clone())).max_udp_payload_size(LARGEST_DATAGRAM)?;
        let server = context.server_configs.of(AudioFormat::Opus).as_ref().clone();
        let socket = Arc::new(socket);
        let endpoint = Endpoint::new_with_abstract_socket(config, Some(server), socket, Arc::new(TokioRuntime))?;
        let tasks = Tasks::new();
        tasks.service("accept", accept(endpoint.clone(), context, tasks.clone()));
        tasks.service("relay notices", note_draining(told, self.draining, tasks.stopping()));
        let outcome = tasks.wait(stopping.cancelled()).await;
        endpoint.close(0_u32.into(), b"worker stopped");
        // Bounded: a peer that does not answer must not keep the process.
        let _ = tokio::time::timeout(Duration::from_millis(500), endpoint.wait_idle()).await;
        outcome
    }
}

async fn accept(endpoint: Endpoint, context: Arc<ShardContext>, tasks: Tasks) -> anyhow::Result<()> {
    let stopping = tasks.stopping();
    while let Some(incoming) = stopping.run_until_cancelled(endpoint.accept()).await {
        let incoming = incoming.context("QUIC endpoint closed")?;
        tasks.spawn("session", session::serve(context.clone(), incoming, tasks.stopping()));
    }
    Ok(())
}

/// Remembers which relays will stop until they have; sessions watch the result.
async fn note_draining(
    mut told: mpsc::Receiver<RelayNotice>,
    draining: watch::Sender<DrainingRelays>,
    stopping: CancellationToken,
) -> anyhow::Result<()> {
    while let Some(Some(RelayNotice { relay, notice })) = stopping.run_until_cancelled(told.recv()).await {
        let Notice::Draining { deadline_ms } = notice;
        let now = Instant::now();
        let until = now + Duration::from_millis(deadline_ms.into());
        draining.send_if_modified(|relays| {
            relays.retain(|_, until| *until > now);
            relays.insert(relay, until).is_none()
        });
    }
    Ok(())
}

fn pin_to(core: u8) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = rustix::thread::CpuSet::new();
    set.set(usize::from(core) % cores);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::warn!(%error, core, "cannot pin the shard's thread");
    }
}

/// Ethernet's 1,500 bytes less IPv6, UDP and the tunnel header (invariant I3).
const LARGEST_DATAGRAM: u16 = 1500 - 40 - 8 - 32;
