//! Callers that cost little: real QUIC connections of activated sessions, packets that were encoded before.

use std::{
    net::{Ipv4Addr, SocketAddr},
    ops::Sub,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use antiphon_client::{ClientKey, Router};
use antiphon_media::format::FRAME;
use antiphon_proto::v1::{
    Activate, ClientMessage, Codec, ServerMessage, Session, client_message::Message as ToWorker,
    server_message::Message as FromWorker,
};
use antiphon_quic::{
    AudioBudget, AudioReceived, ControlReader, ControlWriter, Heartbeats, Side, activation_message, client_crypto,
    datagram, transport,
};
use antiphon_runtime::{Tasks, tls};
use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use quinn::{ClientConfig, Connection, ConnectionId, Endpoint};
use rustls_pki_types::CertificateDer;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::{fleet::request, sessions::FORMATS};

/// Connected callers, silent so far.
#[derive(Debug)]
pub(super) struct Callers(Vec<Caller>);

/// Datagrams with audio of all callers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packets {
    pub(super) sent: u64,
    pub(super) received: u64,
}

impl Sub for Packets {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { sent: self.sent - before.sent, received: self.received - before.received }
    }
}

impl Callers {
    /// Asks for sessions and activates them.
    pub(super) async fn connect(router: &Router, codec: Codec, count: usize) -> anyhow::Result<Self> {
        let endpoints = count.div_ceil(CALLERS_PER_SOCKET);
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let endpoints = (0..endpoints).map(|_| Endpoint::client(any)).collect::<Result<Vec<_>, _>>()?;
        let connecting = (0..count).map(|n| Caller::connect(router, codec, &endpoints[n % endpoints.len()]));
        Ok(Self(stream::iter(connecting).buffered(CONNECTING).try_collect().await?))
    }

    /// Keeps the sessions alive from now on, until the stop.
    pub(super) fn start(self, datagrams: Vec<Option<Bytes>>, cycle: usize, tasks: &Tasks) -> Running {
        let talking = Arc::new(Talking::default());
        let connections = self.0.iter().map(|caller| caller.connection.clone()).collect();
        let running = Running { connections, talking: talking.clone() };
        let stopping = tasks.stopping();
        tasks.spawn("callers", async move {
            stopping.run_until_cancelled(step_all(self.0, &datagrams, cycle, &talking)).await;
            Ok(())
        });
        running
    }
}

/// Callers whose clocks run.
#[derive(Debug)]
pub(super) struct Running {
    connections: Vec<Connection>,
    talking: Arc<Talking>,
}

#[derive(Debug, Default)]
struct Talking {
    begun: AtomicBool,
    sent: AtomicU64,
    latest_us: AtomicU64,
}

impl Running {
    /// Each begins within a cycle from now.
    pub(super) fn talk(&self) {
        self.talking.begun.store(true, Relaxed);
    }

    /// So far. What is received includes heartbeats: a worker that talks sends five a second.
    pub(super) fn packets(&self) -> Packets {
        let received = self.connections.iter().map(|connection| connection.stats().frame_rx.datagram).sum();
        Packets { sent: self.talking.sent.load(Relaxed), received }
    }

    /// How late the callers' own clock was at most since [`Self::forget_lateness`].
    pub(super) fn latest(&self) -> Duration {
        Duration::from_micros(self.talking.latest_us.load(Relaxed))
    }

    pub(super) fn forget_lateness(&self) {
        self.talking.latest_us.store(0, Relaxed);
    }

    /// Nobody has lost the connection.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let lost = self.connections.iter().find_map(Connection::close_reason);
        lost.map_or(Ok(()), |reason| bail!("a caller lost the connection: {reason}"))
    }
}

/// The clocks of all callers: evenly spread over 20 ms, like those of people who do not know each other.
async fn step_all(mut callers: Vec<Caller>, datagrams: &[Option<Bytes>], cycle: usize, talking: &Talking) {
    let began = Instant::now();
    let count = callers.len();
    let slots = usize::try_from(FRAME.as_millis()).expect("20 fits");
    let mut ticks = interval(Duration::from_millis(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut begun_at = None;
    for tick in 0.. {
        let due = ticks.tick().await;
        talking.latest_us.fetch_max(due.elapsed().as_micros() as u64, Relaxed);
        let now_us = began.elapsed().as_micros() as u64;
        if begun_at.is_none() && talking.begun.load(Relaxed) {
            begun_at = Some(tick / slots);
        }
        let frame = begun_at.map(|begun| tick / slots - begun);
        for (index, caller) in callers.iter_mut().enumerate().skip(tick % slots).step_by(slots) {
            // Spread over a cycle, so that at any time some speak and some listen.
            let frame = frame.and_then(|frame| frame.checked_sub(index * cycle / count));
            let says = frame.and_then(|frame| datagrams.get(frame)?.as_ref());
            talking.sent.fetch_add(says.is_some().into(), Relaxed);
            caller.step(now_us, says);
        }
    }
}

#[derive(Debug)]
struct Caller {
    connection: Connection,
    beats: Heartbeats,
    /// The worker ends the session when the stream ends.
    _control: (ControlWriter<ClientMessage>, ControlReader<ServerMessage>),
}

impl Caller {
    async fn connect(router: &Router, codec: Codec, endpoint: &Endpoint) -> anyhow::Result<Self> {
        let key = ClientKey::generate()?;
        let request = request(&key, codec);
        let session = router.create(&request).await.context("ticket")?;
        let relay = session.relays.first().context("a ticket without a relay")?.address.parse()?;
        let connecting = endpoint.connect_with(client_config(&session)?, relay, &session.server_name)?;
        let connection = connecting.await.context("handshake")?;
        let (send, receive) = connection.open_bi().await?;
        let (mut writer, mut reader) = (ControlWriter::new(send), ControlReader::<ServerMessage>::new(receive));
        let message = activation_message(&connection, request.session, request.epoch)?;
        let activate = Activate {
            session: request.session.as_bytes().to_vec().into(),
            epoch: request.epoch.value(),
            ticket: session.ticket,
            signature: key.sign(&message).into(),
        };
        writer.write(&ClientMessage { message: Some(ToWorker::Activate(activate)) }).await?;
        let answer = reader.read().await?.and_then(|message| message.message);
        ensure!(matches!(answer, Some(FromWorker::Activated(_))), "the worker says {answer:?}");
        Ok(Self { connection, beats: Heartbeats::new(0, request.epoch), _control: (writer, reader) })
    }

    /// 20 ms passed. What is heard stays with QUIC, which forgets it.
    fn step(&mut self, now_us: u64, says: Option<&Bytes>) {
        // A lost connection shows in the check afterwards.
        if let Some(audio) = says {
            self.beats.on_sent(now_us);
            let _ = self.connection.send_datagram(audio.clone());
        }
        if let Some(beat) = self.beats.poll(now_us, AudioReceived::default()) {
            let _ = self.connection.send_datagram(datagram::heartbeat(&beat));
        }
    }
}

fn client_config(session: &Session) -> anyhow::Result<ClientConfig> {
    let crypto = client_crypto(tls::provider(), CertificateDer::from(session.trust_anchor.to_vec()))?;
    let id = session.initial_connection_ids.first().context("a ticket without connection IDs")?;
    let id = ConnectionId::new(id);
    // The longest frames that any codec has.
    let frame_bytes = FORMATS.iter().map(|(_, format)| format.max_packet_bytes() + 1).max().unwrap_or_default();
    let mut config = ClientConfig::new(Arc::new(crypto));
    config
        .transport_config(Arc::new(transport(Side::Client, AudioBudget { frame_bytes })))
        .initial_dst_cid_provider(Arc::new(move || id));
    Ok(config)
}

/// A socket costs this process more than a connection; the worker cannot tell.
const CALLERS_PER_SOCKET: usize = 8;
/// At a time.
const CONNECTING: usize = 8;
