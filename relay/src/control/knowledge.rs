//! What all links bring together, put in force and kept.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use antiphon_core::id::RelayNumber;
use antiphon_proto::v1::{self, relay_directive::Directive};
use antiphon_runtime::admin::Readiness;
use anyhow::Context as _;
use tokio::sync::watch;

use super::convert;
use crate::{
    data_path::DataPath,
    metrics::{Metrics, Refused},
    routing::{Disagreement, Outcome, Routing},
    state::State,
    table::Table,
};

/// What the relay knows, and who is to learn of it.
#[derive(Debug)]
pub struct Knowledge {
    routing: Routing,
    data_path: Arc<DataPath>,
    readiness: Readiness,
    metrics: Metrics,
    latest: watch::Sender<Option<Arc<State>>>,
    kept_at: Option<Instant>,
    was_ready: bool,
}

/// Conditions of readiness that are set here.
pub const CONDITIONS: [&str; 3] = ["number", "keys", "routes"];

impl Knowledge {
    /// Goes on from `restored`, which an earlier process kept; what is in force goes to `latest` if anybody keeps it.
    #[must_use]
    pub fn new(
        restored: Option<State>,
        data_path: Arc<DataPath>,
        readiness: Readiness,
        metrics: Metrics,
        latest: watch::Sender<Option<Arc<State>>>,
    ) -> Self {
        let routing = Routing::new(0);
        let mut knowledge = Self { routing, data_path, readiness, metrics, latest, kept_at: None, was_ready: false };
        if let Some(state) = restored {
            knowledge.restore(state);
        }
        knowledge
    }

    fn restore(&mut self, state: State) {
        let age = SystemTime::now().duration_since(state.confirmed).unwrap_or_default();
        let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
        tracing::info!(%age, "the state on disk is in force until a router answers");
        self.metrics.confirmed(state.confirmed);
        self.metrics.state_version.set(state.known.version as i64);
        self.routing = Routing::restore(0, state.known);
        self.put_in_force();
    }

    pub(super) fn number(&self) -> Option<RelayNumber> {
        self.routing.number()
    }

    pub(super) fn welcome(&mut self, router: usize, welcome: &v1::RelayWelcome) -> anyhow::Result<()> {
        let welcome = convert::welcome(welcome).inspect_err(|_| self.malformed()).context("welcome")?;
        self.routing.welcome(router, welcome).inspect_err(|error| self.disagreed(error))?;
        self.publish();
        Ok(())
    }

    /// The position of a router that comes.
    pub fn join(&mut self) -> usize {
        self.routing.join()
    }

    /// A router is no longer named.
    pub(super) fn leave(&mut self, router: usize) {
        self.routing.leave(router);
        self.count_routers();
    }

    pub(super) fn disconnected(&mut self, router: usize) {
        self.routing.disconnected(router);
        self.count_routers();
    }

    pub(super) fn directive(&mut self, router: usize, directive: v1::RelayDirective) -> anyhow::Result<()> {
        match directive.directive {
            Some(Directive::Welcome(welcome)) => return self.welcome(router, &welcome),
            Some(Directive::Routes(update)) => self.update(router, &update)?,
            Some(Directive::Keys(keys)) => {
                let keys = convert::keys(&keys).inspect_err(|_| self.malformed()).context("keys")?;
                self.routing.rotate(router, keys).inspect_err(|error| self.disagreed(error))?;
            }
            Some(Directive::Neighbours(list)) => {
                let list = convert::neighbours(&list).inspect_err(|_| self.malformed()).context("neighbours")?;
                let outcome = self.routing.neighbours(router, list);
                self.count(outcome, "relays of other regions");
            }
            // A later version's.
            None => return Ok(()),
        }
        self.publish();
        Ok(())
    }

    fn update(&mut self, router: usize, update: &v1::RouteUpdate) -> anyhow::Result<()> {
        let change = convert::change(update).inspect_err(|_| self.malformed()).context("routes")?;
        let applied = self.routing.apply(router, unix_seconds(), change);
        let outcome = applied.inspect_err(|_| self.metrics.refused_update(Refused::Gap))?;
        self.count(outcome, "routes");
        Ok(())
    }

    fn count(&self, outcome: Outcome, what: &str) {
        if let Outcome::RemovalsRefused { removals, of } = outcome {
            self.metrics.refused_update(Refused::MassRemoval);
            tracing::warn!(removals, of, "{what} are kept: an unmarked update would remove too many");
        }
    }

    fn malformed(&self) {
        self.metrics.refused_update(Refused::Malformed);
    }

    fn disagreed(&self, _: &Disagreement) {
        self.metrics.refused_update(Refused::Disagreement);
    }

    /// What there is to report to a router, less phase and time.
    pub(super) fn report(&self, router: usize) -> v1::RelayReport {
        let loaded = self.data_path.loaded_generations();
        self.metrics.loaded_generation.set(loaded.last().map_or(0, |g| g.value().into()));
        self.metrics.switched(self.data_path.switches());
        v1::RelayReport {
            table_version: self.routing.version_of(router).unwrap_or(0),
            routes: self.data_path.table().len() as u32,
            loaded_generations: loaded.iter().map(|g| g.value()).collect(),
            ..v1::RelayReport::default()
        }
    }

    /// A router is still there, and so has nothing to add.
    pub(super) fn confirm(&mut self) {
        self.metrics.confirmed(SystemTime::now());
        if self.kept_at.is_some_and(|at| at.elapsed() >= KEEP_INTERVAL) {
            self.keep();
        }
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

    fn put_in_force(&mut self) {
        let table = self.routing.table();
        let (routes, version) = (table.len(), table.version());
        self.metrics.routes.set(routes as i64);
        self.tell_refused(&table);
        self.metrics.table_version.set(version as i64);
        self.metrics.regions.set(table.region_count() as i64);
        self.metrics.neighbours.set(table.neighbours().len() as i64);
        self.data_path.swap(table);
        self.count_routers();
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

    /// Once, when there are more of them than before.
    fn tell_refused(&self, table: &Table) {
        let refused = table.refused();
        if let Some(first) = refused.first()
            && refused.len() as i64 > self.metrics.refused_routes.get()
        {
            tracing::warn!(
                refused = refused.len(),
                server_id = %first,
                "workers are not reached: they say that they live at the tunnel address of another region's relay"
            );
        }
        self.metrics.refused_routes.set(refused.len() as i64);
    }

    fn count_routers(&self) {
        self.metrics.router_connected.set(self.routing.connected() as i64);
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A state that is still true is written again this often: its age after a restart is about that of the last contact.
const KEEP_INTERVAL: Duration = Duration::from_secs(60);
