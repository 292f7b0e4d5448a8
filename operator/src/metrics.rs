//! What the operator counts.

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::error::Reason;

/// Kinds of object that are reconciled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "these are the labels as Prometheus shows them")]
pub enum Kind {
    /// VoiceAgent.
    voice_agent,
    /// VoiceRegion.
    voice_region,
    /// WorkerPool.
    worker_pool,
    /// Drain.
    drain,
}

/// What is done to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "these are the labels as Prometheus shows them")]
pub enum Verb {
    /// POST.
    create,
    /// PATCH, server-side apply included.
    patch,
    /// PUT.
    update,
    /// DELETE.
    delete,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    kind: Kind,
    reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerbLabel {
    verb: Verb,
}

/// The operator's metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    reconcile: Family<KindLabel, Histogram, fn() -> Histogram>,
    failures: Family<FailureLabels, Counter>,
    corrections: Counter,
    writes: Family<VerbLabel, Counter>,
    leading: Gauge,
    connected_regions: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            reconcile: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            failures: Family::default(),
            corrections: Counter::default(),
            writes: Family::default(),
            leading: Gauge::default(),
            connected_regions: Gauge::default(),
        }
    }
}

impl Metrics {
    /// Makes them and puts them into the registry, under `antiphon_operator_`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("antiphon_operator");
        let metrics = Self::default();
        let Self { reconcile, failures, corrections, writes, leading, connected_regions } = &metrics;
        registry.register("reconcile_seconds", "How long reconciling an object took", reconcile.clone());
        registry.register("reconcile_errors", "Reconciles that failed, by reason", failures.clone());
        let help = "Owned objects that somebody else had changed and that were put right";
        registry.register("drift_corrections", help, corrections.clone());
        registry.register("writes", "Requests to the API server that change something", writes.clone());
        registry.register("leading", "1 while this process holds the lease", leading.clone());
        let help = "Regions of this cluster whose routers report to this process";
        registry.register("connected_regions", help, connected_regions.clone());
        metrics
    }

    /// A reconcile is over.
    pub fn reconciled(&self, kind: Kind, took: Duration) {
        self.reconcile.get_or_create(&KindLabel { kind }).observe(took.as_secs_f64());
    }

    /// A reconcile failed.
    pub fn failed(&self, kind: Kind, reason: Reason) {
        self.failures.get_or_create(&FailureLabels { kind, reason }).inc();
    }

    /// An object that somebody had changed by hand was put right.
    pub fn corrected(&self) {
        self.corrections.inc();
    }

    /// A request that changes something was sent.
    pub fn wrote(&self, verb: Verb) {
        self.writes.get_or_create(&VerbLabel { verb }).inc();
    }

    /// Whether this process holds the lease.
    pub fn leads(&self, leads: bool) {
        self.leading.set(leads.into());
    }

    /// How many regions' routers report.
    pub fn connected(&self, regions: usize) {
        self.connected_regions.set(i64::try_from(regions).unwrap_or(i64::MAX));
    }
}

const SECONDS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 25.0];
