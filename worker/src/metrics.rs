//! Metrics of a worker.

use antiphon_core::{cid::SessionCid, lease::ReserveRefusal};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::gate::GateDrop;

/// Why a frame or datagram was dropped before QUIC. A closed set: the metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drop {
    /// No frame of ours: too short, another version, the wrong direction, no hops left.
    Frame,
    /// The tag does not match.
    Tag,
    /// Too old or from the future.
    Stale,
    /// The relay or its key generation is unknown.
    UnknownRelay,
    /// Longer than any QUIC packet of ours.
    TooLong,
    /// The system's receive call failed.
    System,
    /// Stopped at the gate.
    Gate(GateDrop),
}

impl Drop {
    const fn label(self) -> &'static str {
        match self {
            Self::Frame => "frame",
            Self::Tag => "tag",
            Self::Stale => "stale",
            Self::UnknownRelay => "unknown_relay",
            Self::TooLong => "too_long",
            Self::System => "system",
            Self::Gate(reason) => reason.label(),
        }
    }
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// What a shard's socket counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct ShardMetrics {
    pub(crate) received: Counter,
    pub(crate) sent: Counter,
    pub(crate) clock_skew: Gauge,
    dropped: Family<Reason, Counter>,
}

impl ShardMetrics {
    pub(crate) fn dropped(&self, reason: Drop) {
        self.dropped.get_or_create(&Reason { reason: reason.label() }).inc();
    }
}

/// How an activation ended. A closed set: the metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ActivationOutcome {
    Activated,
    Refused(antiphon_proto::v1::RefusedCode),
    NoActivate,
}

impl ActivationOutcome {
    const fn label(self) -> &'static str {
        use antiphon_proto::v1::RefusedCode as Code;
        match self {
            Self::Activated => "activated",
            Self::NoActivate => "no_activate",
            Self::Refused(Code::Unspecified) => "unspecified",
            Self::Refused(Code::Malformed) => "malformed",
            Self::Refused(Code::TicketInvalid) => "ticket_invalid",
            Self::Refused(Code::TicketExpired) => "ticket_expired",
            Self::Refused(Code::WrongClient) => "wrong_client",
            Self::Refused(Code::WrongWorker) => "wrong_worker",
            Self::Refused(Code::LeaseGone) => "lease_gone",
            Self::Refused(Code::StaleEpoch) => "stale_epoch",
        }
    }
}

/// All metrics of the process.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) shard: ShardMetrics,
    pub(crate) routers: Gauge,
    pub(crate) slots: Gauge,
    pub(crate) reserved: Gauge,
    pub(crate) active: Gauge,
    grants: Counter,
    refusals: Family<Reason, Counter>,
    activations: Family<Reason, Counter>,
    pub(crate) turns: Counter,
    pub(crate) interruptions: Counter,
    pub(crate) concealed: Counter,
    pub(crate) late_ticks: Counter,
    pub(crate) answer_delay: Histogram,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            shard: ShardMetrics::default(),
            routers: Gauge::default(),
            slots: Gauge::default(),
            reserved: Gauge::default(),
            active: Gauge::default(),
            grants: Counter::default(),
            refusals: Family::default(),
            activations: Family::default(),
            turns: Counter::default(),
            interruptions: Counter::default(),
            concealed: Counter::default(),
            late_ticks: Counter::default(),
            answer_delay: Histogram::new(exponential_buckets(0.05, 1.5, 12)),
        };
        let m = &metrics;
        let r = registry.sub_registry_with_prefix("antiphon_worker");
        r.register("received_frames", "Tunnel frames received", m.shard.received.clone());
        r.register("sent_frames", "Tunnel frames sent", m.shard.sent.clone());
        r.register("dropped_frames", "Frames dropped before QUIC, by reason", m.shard.dropped.clone());
        let skew = "Seconds that the clock of the relay furthest off is ahead of this one";
        r.register("clock_skew_seconds", skew, m.shard.clock_skew.clone());
        r.register("routers", "Routers that this worker is registered with", m.routers.clone());
        r.register("slots", "Sessions this worker can hold", m.slots.clone());
        r.register("reserved_sessions", "Leases without an owner yet", m.reserved.clone());
        r.register("active_sessions", "Sessions with an active owner", m.active.clone());
        r.register("lease_grants", "Leases granted", m.grants.clone());
        r.register("lease_refusals", "Leases refused, by reason", m.refusals.clone());
        r.register("activations", "Activations, by outcome", m.activations.clone());
        r.register("turns", "Caller turns heard to their end", m.turns.clone());
        r.register("interruptions", "Answers stopped because the caller spoke", m.interruptions.clone());
        r.register("concealed_frames", "Uplink frames of 20 ms that had to be concealed", m.concealed.clone());
        r.register("late_ticks", "Frames of 20 ms that the session task came too late for", m.late_ticks.clone());
        r.register("answer_delay_seconds", "End of the caller's turn to first answer frame", m.answer_delay.clone());
        metrics
    }

    pub(crate) fn granted(&self) {
        self.grants.inc();
    }

    pub(crate) fn refused(&self, refusal: ReserveRefusal) {
        self.refusals.get_or_create(&Reason { reason: refusal.label() }).inc();
    }

    pub(crate) fn activation(&self, outcome: ActivationOutcome) {
        self.activations.get_or_create(&Reason { reason: outcome.label() }).inc();
    }
}

const _: () = assert!(SessionCid::LEN == 17, "the gate's packet offsets are for 17-byte connection IDs");
