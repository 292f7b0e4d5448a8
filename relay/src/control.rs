//! The connection to a router: registration, keys and routes in, reports out.
//!
//! The table stays in force while no router is there, and what was kept of it on disk is in force from the start
//! (invariant I8). Routers are tried in order; after a round without
//! success the relay waits, longer each time and never in step with others.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use antiphon_proto::v1::{self, fleet_client::FleetClient, relay_directive::Directive, relay_message::Message};
use antiphon_runtime::{
    admin::Readiness,
    pki::{Identity, Role},
    tls,
};
use anyhow::{Context as _, bail};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::{
    data_path::DataPath,
    metrics::{Metrics, Refused},
    state::State,
    table::{Outcome, Routing},
};

pub(crate) mod convert;

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

/// What the connection needs.
#[derive(Debug)]
pub struct Control {
    /// Addresses of routers, in order of preference.
    pub routers: Vec<String>,
    /// This relay's certificate.
    pub identity: Identity,
    /// How it introduces itself, less the number.
    pub hello: v1::RelayHello,
    /// Where tables go.
    pub data_path: Arc<DataPath>,
    /// `number`, `keys` and `routes` are set here.
    pub readiness: Readiness,
    /// What is counted.
    pub metrics: Metrics,
    /// What an earlier process kept.
    pub restored: Option<State>,
    /// Where the latest state goes, if anybody keeps it.
    pub latest: watch::Sender<Option<Arc<State>>>,
    /// Followed until it says `Leaving`.
    pub lifecycle: watch::Receiver<Lifecycle>,
}

/// Conditions of readiness that [`Control`] sets.
pub const CONDITIONS: [&str; 3] = ["number", "keys", "routes"];

enum End {
    /// The relay leaves.
    Left,
    /// The router went away after having been of use.
    Lost,
}

impl Control {
    /// Stays connected until the relay leaves or `stopping` fires.
    ///
    /// # Errors
    /// Never for what routers do or say: those are logged and tried again.
    pub async fn run(mut self, stopping: CancellationToken) -> anyhow::Result<()> {
        let mut session = Session {
            routing: Routing::new(),
            data_path: self.data_path.clone(),
            readiness: self.readiness.clone(),
            metrics: self.metrics.clone(),
            latest: self.latest.clone(),
            kept_at: None,
            was_ready: false,
        };
        if let Some(state) = self.restored.take() {
            session.restore(state);
        }
        let mut failures = 0;
        while *self.lifecycle.borrow() != Lifecycle::Leaving {
            let router = self.routers[failures % self.routers.len()].clone();
            let cut_off = cancelled_unless_leaving(stopping.clone(), self.lifecycle.clone());
            let ended = tokio::select! {
                ended = self.connect(&router, &mut session) => ended,
                () = cut_off => return Ok(()),
            };
            self.metrics.router_connected.set(0);
            match ended {
                Ok(End::Left) => return Ok(()),
                Ok(End::Lost) => {
                    tracing::warn!(router, "router went away; the table stays in force");
                    failures = 0;
                }
                Err(error) => {
                    tracing::warn!(router, "router: {error:#}");
                    failures += 1;
                }
            }
            let rounds = failures / self.routers.len();
            let mut lifecycle = self.lifecycle.clone();
            tokio::select! {
                () = sleep(backoff(rounds, rand::random())) => {}
                _ = lifecycle.wait_for(|l| *l == Lifecycle::Leaving) => {}
                () = stopping.cancelled() => return Ok(()),
            }
        }
        Ok(())
    }

    async fn connect(&mut self, router: &str, session: &mut Session) -> anyhow::Result<End> {
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let hello =
            v1::RelayHello { relay_number: session.routing.number().map(|n| n.value().into()), ..self.hello.clone() };
        outgoing.send(message(Message::Hello(hello))).await?;
        let mut lifecycle = self.lifecycle.clone();
        let registered = tokio::select! {
            registered = timeout(WELCOME_WITHIN, self.register(router, messages)) => registered,
            _ = lifecycle.wait_for(|l| *l == Lifecycle::Leaving) => return Ok(End::Left),
        };
        let (incoming, welcome) = registered.with_context(|| format!("no welcome within {WELCOME_WITHIN:?}"))??;
        let report_interval = session.welcome(&welcome)?;
        tracing::info!(router, number = ?session.routing.number(), "registered");
        self.metrics.router_connected.set(1);
        self.follow(incoming, outgoing, report_interval, session).await
    }

    async fn register(
        &self,
        router: &str,
        messages: mpsc::Receiver<v1::RelayMessage>,
    ) -> anyhow::Result<(Streaming<v1::RelayDirective>, v1::RelayWelcome)> {
        let region = &self.hello.region;
        let channel = tls::channel(router, &self.identity, Role::Router, region)?;
        let mut fleet = FleetClient::new(channel);
        let mut incoming = fleet.run_relay(ReceiverStream::new(messages)).await?.into_inner();
        match incoming.message().await?.and_then(|d| d.directive) {
            Some(Directive::Welcome(welcome)) => Ok((incoming, welcome)),
            Some(Directive::Routes(_)) | None => bail!("the router's first message is no welcome"),
        }
    }

    async fn follow(
        &mut self,
        mut incoming: Streaming<v1::RelayDirective>,
        outgoing: mpsc::Sender<v1::RelayMessage>,
        report_interval: Duration,
        session: &mut Session,
    ) -> anyhow::Result<End> {
        let mut reports = interval(report_interval);
        reports.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                directive = incoming.message() => match directive {
                    Ok(Some(directive)) => session.directive(directive)?,
                    Ok(None) => return Ok(End::Lost),
                    Err(status) => {
                        tracing::debug!(%status, "stream ended");
                        return Ok(End::Lost);
                    }
                },
                _ = reports.tick() => {
                    session.confirm();
                    self.report(&outgoing, session);
                }
                changed = self.lifecycle.changed() => {
                    changed.context("lifecycle is gone")?;
                    if *self.lifecycle.borrow_and_update() == Lifecycle::Leaving {
                        leave(incoming, outgoing).await;
                        return Ok(End::Left);
                    }
                    self.report(&outgoing, session);
                }
            }
        }
    }

    /// A report that finds no room is left out: the next one says more.
    fn report(&self, outgoing: &mpsc::Sender<v1::RelayMessage>, session: &Session) {
        let phase = match *self.lifecycle.borrow() {
            Lifecycle::Active => v1::Phase::Active,
            Lifecycle::Draining | Lifecycle::Leaving => v1::Phase::Draining,
        };
        let table = session.data_path.table();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let report = v1::RelayReport {
            phase: phase.into(),
            unix_ms: since_epoch.as_millis() as u64,
            table_version: table.version(),
            routes: table.len() as u32,
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

/// What outlives one connection.
struct Session {
    routing: Routing,
    data_path: Arc<DataPath>,
    readiness: Readiness,
    metrics: Metrics,
    latest: watch::Sender<Option<Arc<State>>>,
    kept_at: Option<Instant>,
    was_ready: bool,
}

impl Session {
    fn restore(&mut self, state: State) {
        let age = SystemTime::now().duration_since(state.confirmed).unwrap_or_default();
        let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
        tracing::info!(%age, "the state on disk is in force until a router answers");
        self.metrics.confirmed(state.confirmed);
        self.metrics.state_version.set(state.known.version as i64);
        self.routing = Routing::restore(state.known);
        self.put_in_force();
    }

    fn welcome(&mut self, welcome: &v1::RelayWelcome) -> anyhow::Result<Duration> {
        let interval = match welcome.report_interval_ms {
            0 => DEFAULT_REPORT_INTERVAL,
            ms => Duration::from_millis(ms.into()).clamp(MIN_REPORT_INTERVAL, MAX_REPORT_INTERVAL),
        };
        self.routing.welcome(convert::welcome(welcome).context("welcome")?);
        self.publish();
        Ok(interval)
    }

    fn directive(&mut self, directive: v1::RelayDirective) -> anyhow::Result<()> {
        match directive.directive {
            Some(Directive::Welcome(welcome)) => self.welcome(&welcome).map(|_interval| ()),
            Some(Directive::Routes(update)) => self.update(&update),
            // A later version's.
            None => Ok(()),
        }
    }

    fn update(&mut self, update: &v1::RouteUpdate) -> anyhow::Result<()> {
        let change = convert::change(update)
            .inspect_err(|_| self.metrics.refused_update(Refused::Malformed))
            .context("routes")?;
        let outcome = self.routing.apply(change).inspect_err(|_| self.metrics.refused_update(Refused::Gap))?;
        if let Outcome::RemovalsRefused { removals, of } = outcome {
            self.metrics.refused_update(Refused::MassRemoval);
            tracing::warn!(removals, of, "routes are kept: an unmarked update would remove too many");
        }
        self.publish();
        Ok(())
    }

    fn publish(&mut self) {
        self.put_in_force();
        self.keep();
    }

    /// What is in force is what is kept: also where that is less than a router wanted, or counted anew.
    fn keep(&mut self) {
        let confirmed = SystemTime::now();
        self.metrics.confirmed(confirmed);
        if self.latest.receiver_count() == 0 {
            return;
        }
        if let Some(known) = self.routing.known() {
            self.latest.send_replace(Some(Arc::new(State { confirmed, known })));
            self.kept_at = Some(Instant::now());
        }
    }

    /// The router is still there, and so has nothing to add.
    fn confirm(&mut self) {
        self.metrics.confirmed(SystemTime::now());
        if self.kept_at.is_some_and(|at| at.elapsed() >= KEEP_INTERVAL) {
            self.keep();
        }
    }

    fn put_in_force(&mut self) {
        let table = self.routing.table();
        self.metrics.routes.set(table.len() as i64);
        self.metrics.table_version.set(table.version() as i64);
        let (routes, version) = (table.len(), table.version());
        self.data_path.swap(table);
        let [number, keys, known] = CONDITIONS;
        self.readiness.set(number, self.routing.number().is_some());
        self.readiness.set(keys, self.routing.has_keys());
        self.readiness.set(known, self.routing.has_routes());
        if !self.was_ready && self.routing.has_keys() && self.routing.has_routes() {
            self.was_ready = true;
            tracing::info!(
                number = %self.data_path.table().relay(),
                public = %self.data_path.public(),
                tunnel = %self.data_path.tunnel(),
                routes,
                version,
                "ready"
            );
        }
    }
}

fn message(message: Message) -> v1::RelayMessage {
    v1::RelayMessage { message: Some(message) }
}

/// Doubles with every round of failures and is spread by `random` over its upper half.
fn backoff(rounds: usize, random: u16) -> Duration {
    let exponent = rounds.min(6) as u32;
    let longest = (FIRST_BACKOFF * 2u32.pow(exponent)).min(LONGEST_BACKOFF);
    longest / 2 + longest / 2 * u32::from(random) / u32::from(u16::MAX)
}

const OUTGOING: usize = 4;
/// A state that is still true is written again this often: its age after a restart is about that of the last contact.
const KEEP_INTERVAL: Duration = Duration::from_secs(60);
const WELCOME_WITHIN: Duration = Duration::from_secs(5);
const GOODBYE_WITHIN: Duration = Duration::from_secs(1);
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
const DEFAULT_REPORT_INTERVAL: Duration = Duration::from_secs(1);
const MIN_REPORT_INTERVAL: Duration = Duration::from_millis(50);
const MAX_REPORT_INTERVAL: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

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
