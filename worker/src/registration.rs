//! The worker's links to its region's routers: all of them, each on its own.
//!
//! One router's answer is needed to begin. After that sessions live on without any: every link is tried again for as
//! long as the process runs (invariant I8).

use std::{error::Error as _, sync::Arc, time::Duration};

use antiphon_proto::v1::{
    Deregister, WorkerDirective, WorkerMessage, WorkerWelcome, fleet_client::FleetClient, worker_directive::Directive,
    worker_message::Message,
};
use antiphon_runtime::{
    Tasks, cause,
    members::{self, Member, Resolver},
    pki::{Identity, Role},
    tls,
};
use anyhow::{Context as _, bail};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, interval, sleep, timeout},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::{
    capacity::Capacity,
    metrics::Metrics,
    standing::{Standing, StandingError},
};

/// One router and the way to it.
#[derive(Debug)]
pub(crate) struct Link {
    router: Member,
    identity: Identity,
    standing: Arc<Standing>,
    changed: watch::Receiver<()>,
    metrics: Metrics,
}

/// Keeps a link to each router: to every address that the names stand for.
pub(crate) fn start(
    routers: &[String],
    resolver: Arc<dyn Resolver>,
    identity: &Identity,
    standing: &Arc<Standing>,
    capacity: &Capacity,
    metrics: &Metrics,
    tasks: &Tasks,
) {
    let (identity, standing, metrics) = (identity.clone(), standing.clone(), metrics.clone());
    let (changed, stopping) = (capacity.subscribe(), tasks.stopping());
    let link = move |router| {
        let (identity, standing, metrics) = (identity.clone(), standing.clone(), metrics.clone());
        let link = Link { router, identity, standing, changed: changed.clone(), metrics };
        link.run(stopping.clone())
    };
    tasks.service("registration", members::follow(routers.to_vec(), resolver, tasks.clone(), link));
}

impl Link {
    /// Stays registered until the process stops or the address is given up.
    async fn run(self, stopping: CancellationToken) -> anyhow::Result<()> {
        let left = self.router.left().clone();
        tokio::select! {
            ended = self.stay(stopping) => ended,
            () = left.cancelled() => Ok(()),
        }
    }

    async fn stay(mut self, stopping: CancellationToken) -> anyhow::Result<()> {
        let mut failures = 0_u32;
        loop {
            let began = Instant::now();
            // Deregistration happens inside, when the stop comes.
            let ended = self.stand(&stopping).await;
            if stopping.is_cancelled() {
                return Ok(());
            }
            if let Err(error) = ended {
                if error.downcast_ref().is_some_and(StandingError::is_fatal) {
                    return Err(error);
                }
                tracing::warn!(router = %self.router.address, "not registered: {}", cause::text(error.as_ref()));
            }
            failures = if began.elapsed() > LONGEST_PAUSE { 0 } else { failures.saturating_add(1) };
            if stopping.run_until_cancelled(sleep(pause(failures))).await.is_none() {
                return Ok(());
            }
        }
    }

    /// One registration, from hello to the end of the stream.
    async fn stand(&mut self, stopping: &CancellationToken) -> anyhow::Result<()> {
        let hello = self.standing.hello();
        let channel = tls::channel(&self.router.address.to_string(), &self.identity, Role::Router, &hello.region)?;
        let (sender, receiver) = mpsc::channel(16);
        sender.send(message(Message::Hello(hello))).await?;
        let mut fleet = FleetClient::new(channel);
        // A router that takes the connection and then says nothing must not hold the link for ever.
        let opening = timeout(PATIENCE, open(&mut fleet, ReceiverStream::new(receiver)));
        let Some(opened) = stopping.run_until_cancelled(opening).await else {
            return Ok(());
        };
        let (welcome, directives) = opened.context("router does not answer")??;
        self.standing.welcome(&welcome)?;
        let _connected = self.router.connected();
        tracing::info!(router = %self.router.address, number = welcome.worker_number, "registered");
        self.metrics.routers.inc();
        let every = Duration::from_millis(welcome.report_interval_ms.clamp(100, 60_000).into());
        let ended = self.attend(directives, &sender, every, stopping).await;
        self.metrics.routers.dec();
        ended
    }

    /// Reports and carries out directives for as long as the stream lasts.
    async fn attend(
        &mut self,
        mut directives: Streaming<WorkerDirective>,
        sender: &mpsc::Sender<WorkerMessage>,
        every: Duration,
        stopping: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut ticks = interval(every);
        loop {
            tokio::select! {
                directive = directives.next() => match directive {
                    Some(Ok(directive)) => self.standing.carry_out(directive)?,
                    Some(Err(status)) => bail!("router ended the stream: {}", status.message()),
                    None => bail!("router closed the stream"),
                },
                _ = ticks.tick() => self.report(sender)?,
                Ok(()) = self.changed.changed() => {
                    self.report(sender)?;
                    // At most ten reports a second, however often counts change.
                    sleep(Duration::from_millis(100)).await;
                }
                () = stopping.cancelled() => {
                    sender.send(message(Message::Deregister(Deregister {}))).await?;
                    // The router closes the stream once it has taken the routes away.
                    while let Ok(Some(Ok(_))) = timeout(Duration::from_secs(1), directives.next()).await {}
                    return Ok(());
                }
            }
        }
    }

    fn report(&self, sender: &mpsc::Sender<WorkerMessage>) -> anyhow::Result<()> {
        match sender.try_send(message(Message::Report(self.standing.report()))) {
            Err(mpsc::error::TrySendError::Closed(_)) => bail!("router closed the stream"),
            // The next report says the same or newer.
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
        }
    }
}

/// Opens the stream and waits for the welcome, which comes first.
async fn open(
    fleet: &mut FleetClient<tonic::transport::Channel>,
    messages: ReceiverStream<WorkerMessage>,
) -> anyhow::Result<(WorkerWelcome, Streaming<WorkerDirective>)> {
    let mut directives = fleet.run_worker(messages).await.map_err(refused)?.into_inner();
    match directives.next().await {
        Some(Ok(WorkerDirective { directive: Some(Directive::Welcome(welcome)) })) => Ok((welcome, directives)),
        Some(Ok(_)) => bail!("router began with something other than a welcome"),
        Some(Err(status)) => Err(refused(status)),
        None => bail!("router closed the stream"),
    }
}

/// Only a router that was reached can refuse.
fn refused(status: Status) -> anyhow::Error {
    let reached = status.source().is_none();
    anyhow::Error::new(status).context(if reached { "router refused" } else { "router is not reached" })
}

const fn message(message: Message) -> WorkerMessage {
    WorkerMessage { message: Some(message) }
}

/// 100 ms doubling to [`LONGEST_PAUSE`], with jitter so that a fleet does not return in step.
fn pause(failures: u32) -> Duration {
    let base = Duration::from_millis(100 << failures.min(6)).min(LONGEST_PAUSE);
    base.mul_f64(rand::random_range(0.5..1.0))
}

/// Longest wait for a router's welcome.
const PATIENCE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
