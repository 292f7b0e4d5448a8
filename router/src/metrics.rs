//! Metrics of the router.

use antiphon_runtime::crowd::Bound;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::{
    fleet::Furthest,
    refusals::{Failure, Reason},
};

/// How a request for a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum TicketOutcome {
    Local,
    Remote,
    Refused,
    Rejected,
    Cancelled,
}

/// How one reservation at a worker or region ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum AttemptOutcome {
    Granted,
    Refused,
    Unreachable,
}

/// Which bound a connection to the public port was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ConnectionBound {
    /// That of its source address.
    Source,
    /// That of all together.
    Total,
}

/// Whose clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ClockOf {
    Workers,
    Relays,
    Peers,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClockLabels {
    of: ClockOf,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    bound: ConnectionBound,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TicketLabels {
    outcome: TicketOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabels {
    outcome: AttemptOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    reason: Reason,
}

/// What the router counts.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    tickets: Family<TicketLabels, Counter>,
    refusals: Family<RefusalLabels, Counter>,
    attempts: Family<AttemptLabels, Counter>,
    pub(crate) placement_seconds: Histogram,
    pub(crate) workers: Gauge,
    pub(crate) relays: Gauge,
    pub(crate) digest_age_seconds: Gauge<f64, std::sync::atomic::AtomicU64>,
    pub(crate) store_age_seconds: Gauge<f64, std::sync::atomic::AtomicU64>,
    pub(crate) connections: Gauge,
    connections_refused: Family<ConnectionLabels, Counter>,
    clock_ahead_seconds: Family<ClockLabels, Gauge<f64, std::sync::atomic::AtomicU64>>,
}

impl Metrics {
    /// Registers everything under `antiphon_router_`.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("antiphon_router");
        let metrics = Self {
            tickets: Family::default(),
            refusals: Family::default(),
            attempts: Family::default(),
            placement_seconds: Histogram::new(SECONDS),
            workers: Gauge::default(),
            relays: Gauge::default(),
            digest_age_seconds: Gauge::default(),
            store_age_seconds: Gauge::default(),
            connections: Gauge::default(),
            connections_refused: Family::default(),
            clock_ahead_seconds: Family::default(),
        };
        registry.register("tickets", "Requests for a session by outcome", metrics.tickets.clone());
        registry.register("refusals", "Refused requests for a session by reason", metrics.refusals.clone());
        registry.register(
            "attempts",
            "Workers and regions asked to take a session, by outcome",
            metrics.attempts.clone(),
        );
        registry.register(
            "placement_seconds",
            "From a request for a session to its answer",
            metrics.placement_seconds.clone(),
        );
        registry.register("workers", "Workers in placement", metrics.workers.clone());
        registry.register("relays", "Connected relays", metrics.relays.clone());
        registry.register(
            "digest_age_seconds",
            "Age of the oldest digest of another region",
            metrics.digest_age_seconds.clone(),
        );
        let help = "How long the store has been out of reach";
        registry.register("store_age_seconds", help, metrics.store_age_seconds.clone());
        registry.register("connections", "Open connections at the public port", metrics.connections.clone());
        registry.register(
            "connections_refused",
            "Connections closed at once at the public port, by the bound that they were over",
            metrics.connections_refused.clone(),
        );
        registry.register(
            "clock_ahead_seconds",
            "How far the clock is ahead of this router's that is furthest from it, by whose it is",
            metrics.clock_ahead_seconds.clone(),
        );
        metrics
    }

    pub(crate) fn clocks(&self, furthest: Furthest) {
        let Furthest { workers, relays, peers } = furthest;
        for (of, ms) in [(ClockOf::Workers, workers), (ClockOf::Relays, relays), (ClockOf::Peers, peers)] {
            #[allow(clippy::cast_precision_loss, reason = "a gauge of seconds")]
            self.clock_ahead_seconds.get_or_create(&ClockLabels { of }).set(ms as f64 / 1000.0);
        }
    }

    pub(crate) fn connection_refused(&self, bound: ConnectionBound) {
        self.connections_refused.get_or_create(&ConnectionLabels { bound }).inc();
    }

    pub(crate) fn ticket(&self, outcome: TicketOutcome) {
        self.tickets.get_or_create(&TicketLabels { outcome }).inc();
    }

    pub(crate) fn failure(&self, failure: &Failure) {
        match failure {
            Failure::Refused(_, reason) => {
                let labels = RefusalLabels { reason: *reason };
                self.refusals.get_or_create(&labels).inc();
                self.ticket(TicketOutcome::Refused);
            }
            Failure::Unauthenticated(_)
            | Failure::Forbidden(_)
            | Failure::Invalid(_)
            | Failure::NotFound(_)
            | Failure::Conflict(_)
            | Failure::Unavailable(_) => self.ticket(TicketOutcome::Rejected),
        }
    }

    pub(crate) fn attempt(&self, outcome: AttemptOutcome) {
        self.attempts.get_or_create(&AttemptLabels { outcome }).inc();
    }
}

impl TicketOutcome {
    const fn label(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
            Self::Refused => "refused",
            Self::Rejected => "rejected",
            Self::Cancelled => "cancelled",
        }
    }
}

impl AttemptOutcome {
    const fn label(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
        }
    }
}

impl ClockOf {
    const fn label(self) -> &'static str {
        match self {
            Self::Workers => "workers",
            Self::Relays => "relays",
            Self::Peers => "peers",
        }
    }
}

impl From<Bound> for ConnectionBound {
    fn from(bound: Bound) -> Self {
        match bound {
            Bound::Source => Self::Source,
            Bound::Total => Self::Total,
        }
    }
}

impl ConnectionBound {
    const fn label(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Total => "total",
        }
    }
}

macro_rules! label_value {
    ($($type:ty),+) => {$(
        impl EncodeLabelValue for $type {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
                self.label().encode(encoder)
            }
        }
    )+};
}

label_value!(TicketOutcome, AttemptOutcome, ClockOf, ConnectionBound, Reason);

/// From a decision without any network to the longest that a caller waits.
const SECONDS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
