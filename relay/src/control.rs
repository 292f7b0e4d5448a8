//! The connections to the region's routers: registration, keys and routes in, reports out.
//!
//! There is one [`Link`] per router, that is per address that their names stand for, each on its own; what they bring is put together in [`Knowledge`]. The table stays
//! in force while no router is there, and what was kept of it on disk is in force from the start (invariant I8). A link
//! without success waits, longer each time and never in step with others.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_proto::v1::{self, fleet_client::FleetClient, relay_directive::Directive, relay_message::Message};
use antiphon_runtime::{
    cause,
    members::Member,
    pki::{Identity, Role},
    tls,
};
use anyhow::{Context as _, bail};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use crate::public::Addresses;

pub(crate) mod convert;
mod knowledge;

pub use knowledge::{CONDITIONS, Knowledge};

/// Where the relay is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifecycle {
    /// Forwards.
    Active,
    /// Forwards, and wants clients to go elsewhere.
    Draining,
    /// Is done; its registration may go.
    Leaving,
}

/// The connection to one router.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its address.
    pub router: Member,
    /// Its position among the routers.
    pub index: usize,
    /// This relay's certificate.
    pub identity: Identity,
    /// How the relay introduces itself, less the number and the public addresses.
    pub hello: v1::RelayHello,
    /// Where clients reach it; the link waits for that, and registers anew when it changes.
    pub addresses: watch::Receiver<Addresses>,
    /// Where all links put what they hear.
    pub knowledge: Arc<Mutex<Knowledge>>,
    /// Followed until it says `Leaving`.
    pub lifecycle: watch::Receiver<Lifecycle>,
}

enum End {
    /// The relay leaves.
    Left,
    /// The router went away after having been of use for that long.
    Lost(Duration),
    /// The relay has another address.
    Moved,
}

impl Link {
    /// Stays connected until the relay leaves, `stopping` fires or the address is given up.
    ///
    /// # Errors
    /// Never for what routers do or say: those are logged and tried again.
    pub async fn run(self, stopping: CancellationToken) -> anyhow::Result<()> {
        let (left, index, knowledge) = (self.router.left().clone(), self.index, self.knowledge.clone());
        tokio::select! {
            ended = self.stay(stopping) => return ended,
            () = left.cancelled() => {}
        }
        knowledge.lock().leave(index);
        Ok(())
    }

    async fn stay(mut self, stopping: CancellationToken) -> anyhow::Result<()> {
        let (mut failures, mut name_is_taken) = (0, false);
        while *self.lifecycle.borrow() != Lifecycle::Leaving {
            let cut_off = cancelled_unless_leaving(stopping.clone(), self.lifecycle.clone());
            let ended = tokio::select! {
                ended = self.connect() => ended,
                () = cut_off => return Ok(()),
            };
            self.knowledge.lock().disconnected(self.index);
            let router = self.router.address;
            name_is_taken &= ended.is_err();
            match ended {
                Ok(End::Left) => return Ok(()),
                Ok(End::Moved) => failures = 0,
                Ok(End::Lost(lasted)) => {
                    tracing::warn!(%router, "router went away; the table stays in force");
                    failures = if lasted >= STEADY { 0 } else { failures + 1 };
                }
                Err(error) => {
                    // Its predecessor may be about to be given up, so it goes on trying, but says so once.
                    let (told, name) = (name_is_taken, &self.hello.name);
                    name_is_taken = is_taken(&error);
                    match (name_is_taken, told) {
                        (true, false) => tracing::error!(
                            %router,
                            "the name {name} is in use: {}. Relays need names of their own (--name); this one takes \
                             its place once the router has given the other one up",
                            cause::text(error.as_ref())
                        ),
                        (true, true) => tracing::debug!(%router, name, "the name is still in use"),
                        (false, _) => tracing::warn!(%router, "not registered: {}", cause::text(error.as_ref())),
                    }
                    failures += 1;
                }
            }
            let mut lifecycle = self.lifecycle.clone();
            tokio::select! {
                () = sleep(backoff(failures, rand::random())) => {}
                _ = lifecycle.wait_for(|l| *l == Lifecycle::Leaving) => {}
                () = stopping.cancelled() => return Ok(()),
            }
        }
        Ok(())
    }

    async fn connect(&mut self) -> anyhow::Result<End> {
        let mut lifecycle = self.lifecycle.clone();
        tokio::select! {
            known = self.addresses.wait_for(|addresses| !addresses.is_empty()) => drop(known?),
            _ = lifecycle.wait_for(|l| *l == Lifecycle::Leaving) => return Ok(End::Left),
        }
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let relay_number = self.knowledge.lock().number().map(|n| n.value().into());
        let mut addresses = self.addresses.borrow_and_update().iter().map(ToString::to_string).collect::<Vec<_>>();
        let more_public_addresses = addresses.split_off(1);
        let public_address = addresses.remove(0);
        let hello = v1::RelayHello { relay_number, public_address, more_public_addresses, ..self.hello.clone() };
        outgoing.send(message(Message::Hello(hello))).await?;
        let registered = tokio::select! {
            registered = timeout(WELCOME_WITHIN, self.register(messages)) => registered,
            _ = lifecycle.wait_for(|l| *l == Lifecycle::Leaving) => return Ok(End::Left),
        };
        let (incoming, welcome) = registered.with_context(|| format!("no welcome within {WELCOME_WITHIN:?}"))??;
        let report_interval = report_interval(&welcome);
        self.knowledge.lock().welcome(self.index, &welcome)?;
        tracing::info!(router = %self.router.address, number = welcome.relay_number, "registered");
        let _connected = self.router.connected();
        self.follow(incoming, outgoing, report_interval).await
    }

    async fn register(
        &self,
        messages: mpsc::Receiver<v1::RelayMessage>,
    ) -> anyhow::Result<(Streaming<v1::RelayDirective>, v1::RelayWelcome)> {
        let region = &self.hello.region;
        let channel = tls::channel(&self.router.address.to_string(), &self.identity, Role::Router, region)?;
        let mut fleet = FleetClient::new(channel);
        let mut incoming = fleet.run_relay(ReceiverStream::new(messages)).await?.into_inner();
        match incoming.message().await?.and_then(|d| d.directive) {
            Some(Directive::Welcome(welcome)) => Ok((incoming, welcome)),
            _ => bail!("the router's first message is no welcome"),
        }
    }

    async fn follow(
        &mut self,
        mut incoming: Streaming<v1::RelayDirective>,
        outgoing: mpsc::Sender<v1::RelayMessage>,
        report_interval: Duration,
    ) -> anyhow::Result<End> {
        let began = Instant::now();
        let mut reports = interval(report_interval);
        reports.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                directive = incoming.message() => match directive {
                    Ok(Some(directive)) => self.knowledge.lock().directive(self.index, directive)?,
                    Ok(None) => return Ok(End::Lost(began.elapsed())),
                    Err(status) => {
                        tracing::debug!(%status, "stream ended");
                        return Ok(End::Lost(began.elapsed()));
                    }
                },
                _ = reports.tick() => {
                    self.knowledge.lock().confirm();
                    self.report(&outgoing);
                }
                changed = self.addresses.changed() => {
                    changed.context("addresses are gone")?;
                    tracing::info!(router = %self.router.address, "clients reach this relay elsewhere now: registering anew");
                    return Ok(End::Moved);
                }
                changed = self.lifecycle.changed() => {
                    changed.context("lifecycle is gone")?;
                    if *self.lifecycle.borrow_and_update() == Lifecycle::Leaving {
                        leave(incoming, outgoing).await;
                        return Ok(End::Left);
                    }
                    self.report(&outgoing);
                }
            }
        }
    }

    /// A report that finds no room is left out: the next one says more.
    fn report(&self, outgoing: &mpsc::Sender<v1::RelayMessage>) {
        let phase = match *self.lifecycle.borrow() {
            Lifecycle::Active => v1::Phase::Active,
            Lifecycle::Draining | Lifecycle::Leaving => v1::Phase::Draining,
        };
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let report = v1::RelayReport {
            phase: phase.into(),
            unix_ms: since_epoch.as_millis() as u64,
            ..self.knowledge.lock().report(self.index)
        };
        if outgoing.try_send(message(Message::Report(report))).is_err() {
            tracing::debug!("router does not take reports");
        }
    }
}

/// Says goodbye and waits, briefly, until the router has heard it.
async fn leave(mut incoming: Streaming<v1::RelayDirective>, outgoing: mpsc::Sender<v1::RelayMessage>) {
    let goodbye = async {
        // Without a listener there is nobody to say it to.
        let _ = outgoing.send(message(Message::Deregister(v1::Deregister {}))).await;
        drop(outgoing);
        while let Ok(Some(_)) = incoming.message().await {}
    };
    if timeout(GOODBYE_WITHIN, goodbye).await.is_err() {
        tracing::warn!("router did not confirm the deregistration");
    }
}

async fn cancelled_unless_leaving(stopping: CancellationToken, lifecycle: watch::Receiver<Lifecycle>) {
    stopping.cancelled().await;
    if *lifecycle.borrow() == Lifecycle::Leaving {
        std::future::pending::<()>().await;
    }
}

/// Whether the router knows another relay of the name that is alive.
fn is_taken(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Status>().is_some_and(|status| status.code() == Code::AlreadyExists)
}

fn report_interval(welcome: &v1::RelayWelcome) -> Duration {
    match welcome.report_interval_ms {
        0 => DEFAULT_REPORT_INTERVAL,
        ms => Duration::from_millis(ms.into()).clamp(MIN_REPORT_INTERVAL, MAX_REPORT_INTERVAL),
    }
}

fn message(message: Message) -> v1::RelayMessage {
    v1::RelayMessage { message: Some(message) }
}

/// Doubles with every failure and is spread by `random` over its upper half.
fn backoff(failures: usize, random: u16) -> Duration {
    let exponent = failures.min(6) as u32;
    let longest = (FIRST_BACKOFF * 2u32.pow(exponent)).min(LONGEST_BACKOFF);
    longest / 2 + longest / 2 * u32::from(random) / u32::from(u16::MAX)
}

const OUTGOING: usize = 4;
const WELCOME_WITHIN: Duration = Duration::from_secs(5);
const GOODBYE_WITHIN: Duration = Duration::from_secs(1);
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// A connection that lasts shorter is a failure, too: two that drive each other out do it ever more slowly.
const STEADY: Duration = Duration::from_secs(10);
const DEFAULT_REPORT_INTERVAL: Duration = Duration::from_secs(1);
const MIN_REPORT_INTERVAL: Duration = Duration::from_millis(50);
const MAX_REPORT_INTERVAL: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_use_is_told_from_other_refusals() {
        let refused = |status: Status| anyhow::Error::from(status);
        assert!(is_taken(&refused(Status::already_exists("relay a is connected"))));
        assert!(!is_taken(&refused(Status::unavailable("no record yet"))));
        assert!(!is_taken(&anyhow::anyhow!("no welcome")));
        let within = Err::<(), _>(Status::already_exists("relay a is connected")).context("no welcome within 5 s");
        assert!(is_taken(&within.unwrap_err()), "also with words around it");
    }

    #[test]
    fn backoff_grows_to_its_bound_and_is_spread() {
        assert_eq!(backoff(0, 0), FIRST_BACKOFF / 2);
        assert_eq!(backoff(0, u16::MAX), FIRST_BACKOFF);
        assert!(backoff(3, 0) > backoff(0, u16::MAX));
        for random in [0, 1, 40_000, u16::MAX] {
            let longest = backoff(usize::MAX, random);
            assert!(longest >= LONGEST_BACKOFF / 2 && longest <= LONGEST_BACKOFF);
        }
    }
}
