//! The worker's standing with its region's router: who it is, what it gets told, what it reports.
//!
//! The router's answer is needed once, to begin. After that sessions live on without any router: the registration is
//! tried again for as long as the process runs (invariant I8).

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_core::id::{Incarnation, KeyGeneration, RegionNumber, WorkerNumber};
use antiphon_proto::v1::{
    CidConfig, Deregister, Phase, ResetKey, Shard, WorkerDirective, WorkerHello, WorkerMessage, WorkerRelay,
    WorkerReport, WorkerWelcome, fleet_client::FleetClient, worker_directive::Directive, worker_message::Message,
};
use antiphon_runtime::{
    Tasks,
    admin::Readiness,
    pki::{Identity, Role},
    tls,
};
use anyhow::{Context as _, bail};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::Streaming;

use crate::{
    Args,
    capacity::Capacity,
    keys::{KeySet, KeysError},
    metrics::Metrics,
    shard::{Shards, ShardsConfig},
};

/// Registers, reports and carries out directives.
#[derive(Debug)]
pub(crate) struct Registration {
    routers: Vec<String>,
    identity: Identity,
    hello: WorkerHello,
    sockets: Option<Vec<(std::net::UdpSocket, SocketAddr)>>,
    shards: Option<Shards>,
    numbers: Option<(RegionNumber, WorkerNumber)>,
    capacity: Arc<Capacity>,
    metrics: Metrics,
    pin: bool,
    cid_lifetime: Duration,
    /// Key generations in use, oldest first.
    loaded: Vec<u32>,
}

impl Registration {
    pub(crate) fn new(
        args: &Args,
        identity: &Identity,
        sockets: Vec<(std::net::UdpSocket, SocketAddr)>,
        control_address: String,
        capacity: Arc<Capacity>,
        metrics: Metrics,
    ) -> Self {
        let shards =
            (0..).zip(&sockets).map(|(number, (_, address))| Shard { number, tunnel_address: address.to_string() });
        let hello = WorkerHello {
            name: args.name.clone(),
            region: args.region.clone(),
            agent: args.agent.clone(),
            gpu_class: args.gpu_class.clone(),
            slots: args.slots,
            incarnation: rand::random(),
            worker_number: None,
            shards: shards.collect(),
            control_address,
        };
        Self {
            routers: args.router.clone(),
            identity: identity.clone(),
            hello,
            sockets: Some(sockets),
            shards: None,
            numbers: None,
            capacity,
            metrics,
            pin: args.pin,
            cid_lifetime: args.cid_lifetime,
            loaded: Vec::new(),
        }
    }

    /// Stays registered until the process stops; tries the routers in turn.
    pub(crate) async fn run(mut self, tasks: Tasks, readiness: Readiness) -> anyhow::Result<()> {
        let stopping = tasks.stopping();
        let mut failures = 0_u32;
        let routers = self.routers.clone();
        for router in routers.iter().cycle() {
            let standing = self.stand(router, &tasks, &readiness);
            // Deregistration happens inside, when the stop comes.
            match standing.await {
                Ok(()) if stopping.is_cancelled() => return Ok(()),
                Ok(()) => failures = 0,
                Err(error) if error.is::<Fatal>() => return Err(error),
                Err(error) => {
                    failures = failures.saturating_add(1);
                    tracing::warn!(%router, "registration: {error:#}");
                }
            }
            let pause = backoff(failures);
            if stopping.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return Ok(());
            }
        }
        bail!("no router given")
    }

    /// One registration, from hello to the end of the stream.
    async fn stand(&mut self, router: &str, tasks: &Tasks, readiness: &Readiness) -> anyhow::Result<()> {
        let stopping = tasks.stopping();
        let channel = tls::channel(router, &self.identity, Role::Router, &self.hello.region)?;
        let (sender, receiver) = mpsc::channel(16);
        sender.send(message(Message::Hello(self.hello.clone()))).await?;
        let mut fleet = FleetClient::new(channel);
        let opening = fleet.run_worker(ReceiverStream::new(receiver));
        let Some(opened) = stopping.run_until_cancelled(opening).await else {
            return Ok(());
        };
        let mut directives = opened.context("router refused")?.into_inner();
        let welcome = first_welcome(&mut directives).await?;
        let every = Duration::from_millis(welcome.report_interval_ms.clamp(100, 60_000).into());
        self.begin(&welcome, tasks)?;
        readiness.set("registered", true);
        tracing::info!(%router, number = welcome.worker_number, "registered");
        let mut ticks = tokio::time::interval(every);
        loop {
            tokio::select! {
                directive = directives.next() => match directive {
                    Some(Ok(directive)) => self.carry_out(directive)?,
                    Some(Err(status)) => bail!("router ended the stream: {}", status.message()),
                    None => bail!("router closed the stream"),
                },
                _ = ticks.tick() => self.report(&sender)?,
                () = self.capacity.changed() => {
                    self.report(&sender)?;
                    // At most ten reports a second, however often counts change.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                () = stopping.cancelled() => {
                    sender.send(message(Message::Deregister(Deregister {}))).await?;
                    // The router closes the stream once it has taken the routes away.
                    while let Ok(Some(Ok(_))) = tokio::time::timeout(Duration::from_secs(1), directives.next()).await {}
                    return Ok(());
                }
            }
        }
    }

    fn report(&self, sender: &mpsc::Sender<WorkerMessage>) -> anyhow::Result<()> {
        let counts = self.capacity.counts();
        let phase = if counts.draining { Phase::Draining } else { Phase::Active };
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        let tunnels = self.shards.as_ref().and_then(Shards::oldest_tunnel_generation);
        let oldest = self.capacity.oldest_generation().into_iter().chain(tunnels).min();
        let report = WorkerReport {
            phase: phase.into(),
            slots: counts.slots,
            reserved: counts.reserved,
            active: counts.active,
            unix_ms: u64::try_from(unix_ms).unwrap_or(u64::MAX),
            loaded_generations: self.loaded.clone(),
            oldest_generation: oldest.map_or(0, KeyGeneration::value),
        };
        match sender.try_send(message(Message::Report(report))) {
            Err(mpsc::error::TrySendError::Closed(_)) => bail!("router closed the stream"),
            // The next report says the same or newer.
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
        }
    }

    /// Opens the shards on the first welcome; takes over keys and relays on later ones.
    fn begin(&mut self, welcome: &WorkerWelcome, tasks: &Tasks) -> anyhow::Result<()> {
        let region = u16::try_from(welcome.region_number).ok().and_then(|n| RegionNumber::new(n).ok());
        let worker = u16::try_from(welcome.worker_number).ok().and_then(|n| WorkerNumber::new(n).ok());
        let numbers = region.zip(worker).context("router's numbers are out of range")?;
        if self.shards.is_some() {
            if self.numbers != Some(numbers) {
                // Connection IDs of live sessions name the old number: only a new process can take a new one.
                return Err(Fatal("the router numbered this worker anew while it is running").into());
            }
            return self.take_over(welcome);
        }
        let keys = self.key_set(&welcome.cid_configs, &welcome.ticket_keys, &welcome.reset_keys)?;
        let incarnation = Incarnation::new(self.hello.incarnation)?;
        let sockets = self.sockets.take().context("the first registration failed half way")?;
        let config = ShardsConfig {
            numbers,
            incarnation,
            identity: &self.identity,
            region: &self.hello.region,
            slots: self.hello.slots,
            pin: self.pin,
            cid_lifetime: self.cid_lifetime,
            capacity: self.capacity.clone(),
            metrics: self.metrics.clone(),
        };
        let shards = Shards::open(config, sockets, &keys, &welcome.relays, tasks);
        let shards = shards.map_err(|e| e.context(Fatal("opening the shards")))?;
        self.shards = Some(shards);
        self.loaded = keys.generations().map(KeyGeneration::value).collect();
        self.numbers = Some(numbers);
        self.hello.worker_number = Some(welcome.worker_number);
        if let Some(behaviour) = welcome.behaviour.clone() {
            self.capacity.set_behaviour(behaviour);
        }
        Ok(())
    }

    /// A later welcome brings what was missed while there was no router: keys, relays, behaviour.
    fn take_over(&mut self, welcome: &WorkerWelcome) -> anyhow::Result<()> {
        if let Some(behaviour) = welcome.behaviour.clone() {
            self.capacity.set_behaviour(behaviour);
        }
        let keys = self.key_set(&welcome.cid_configs, &welcome.ticket_keys, &welcome.reset_keys)?;
        self.set_keys(&keys, &welcome.relays)
    }

    fn set_keys(&mut self, keys: &KeySet, relays: &[WorkerRelay]) -> anyhow::Result<()> {
        let shards = self.shards.as_ref().context("keys before the welcome")?;
        shards.set_relays(relays)?;
        shards.set_keys(keys);
        self.loaded = keys.generations().map(KeyGeneration::value).collect();
        Ok(())
    }

    fn key_set(&self, configs: &[CidConfig], tickets: &[Bytes], resets: &[ResetKey]) -> Result<KeySet, KeysError> {
        let shards = u32::try_from(self.hello.shards.len()).unwrap_or(u32::MAX);
        KeySet::new(configs, tickets, resets, shards)
    }

    fn carry_out(&mut self, directive: WorkerDirective) -> anyhow::Result<()> {
        let shards = self.shards.as_ref().context("directive before the welcome")?;
        match directive.directive {
            Some(Directive::Relays(relays)) => shards.set_relays(&relays.relays),
            Some(Directive::Behaviour(behaviour)) => {
                tracing::info!(revision = behaviour.revision, "agent revision");
                self.capacity.set_behaviour(behaviour);
                Ok(())
            }
            Some(Directive::Welcome(welcome)) => self.take_over(&welcome),
            Some(Directive::Keys(new)) => {
                let keys = self.key_set(&new.cid_configs, &new.ticket_keys, &new.reset_keys)?;
                self.set_keys(&keys, &new.relays)
            }
            // A newer router may know more: what is not understood is not acted on.
            None => Ok(()),
        }
    }
}

/// Nothing that another try would mend.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("{0}")]
struct Fatal(&'static str);

async fn first_welcome(directives: &mut Streaming<WorkerDirective>) -> anyhow::Result<WorkerWelcome> {
    let first = tokio::time::timeout(Duration::from_secs(5), directives.next()).await;
    match first.context("router does not answer")? {
        Some(Ok(WorkerDirective { directive: Some(Directive::Welcome(welcome)) })) => Ok(welcome),
        Some(Ok(_)) => bail!("router began with something other than a welcome"),
        Some(Err(status)) => bail!("router refused: {}", status.message()),
        None => bail!("router closed the stream"),
    }
}

const fn message(message: Message) -> WorkerMessage {
    WorkerMessage { message: Some(message) }
}

/// 100 ms doubling to 5 s, with jitter so that a fleet does not return in step.
fn backoff(failures: u32) -> Duration {
    let base = Duration::from_millis(100 << failures.min(6)).min(Duration::from_secs(5));
    base.mul_f64(rand::random_range(0.5..1.0))
}
