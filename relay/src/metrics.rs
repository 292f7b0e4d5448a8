//! What the relay counts. Labels are closed sets.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use crate::forward::{DropReason, Sender, Skew};

/// Which way datagrams go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From clients to workers.
    Up,
    /// From workers to clients.
    Down,
}

impl Way {
    const ALL: [Self; 2] = [Self::Up, Self::Down];

    const fn label(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// Why an update of the routes was not, or not wholly, applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It would have removed too much.
    MassRemoval,
    /// One before it is missing.
    Gap,
    /// It makes no sense.
    Malformed,
    /// Another router says otherwise.
    Disagreement,
}

impl Refused {
    const ALL: [Self; 4] = [Self::MassRemoval, Self::Gap, Self::Malformed, Self::Disagreement];

    const fn label(self) -> &'static str {
        match self {
            Self::MassRemoval => "mass_removal",
            Self::Gap => "gap",
            Self::Malformed => "malformed",
            Self::Disagreement => "disagreement",
        }
    }
}

type ByLabel = Family<[(&'static str, &'static str); 1], Counter>;

/// Handles to all series; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    received_packets: [Counter; 2],
    received_bytes: [Counter; 2],
    forwarded_packets: [Counter; 2],
    forwarded_bytes: [Counter; 2],
    sends: [Counter; 2],
    batches: [Histogram; 2],
    dropped: [Counter; DropReason::ALL.len()],
    receive_errors: Counter,
    refused_updates: [Counter; Refused::ALL.len()],
    resets: Counter,
    skew: [Gauge; 2],
    /// Regions reached through their relays.
    pub regions: Gauge,
    /// Relays of other regions that are known.
    pub neighbours: Gauge,
    neighbour_switches: Counter,
    /// Newest key generation that all threads can use.
    pub loaded_generation: Gauge,
    /// Routable server IDs.
    pub routes: Gauge,
    /// Version of the routes in force.
    pub table_version: Gauge,
    /// Routers connected.
    pub router_connected: Gauge,
    /// Routes that are not in force because a relay of another region has their address.
    pub refused_routes: Gauge,
    /// Version of the routes on disk.
    pub state_version: Gauge,
    /// Writes of the state that failed.
    pub state_write_errors: Counter,
    confirmed: Arc<Confirmed>,
}

impl Metrics {
    /// Registers all series; every label value exists from the start, at zero.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("antiphon_relay");
        let mut family = |name: &str, help: &str| {
            let family = ByLabel::default();
            registry.register(name, help, family.clone());
            family
        };
        let received_packets = family("received_packets", "Datagrams and frames received");
        let received_bytes = family("received_bytes", "Bytes of UDP payload received");
        let forwarded_packets = family("forwarded_packets", "Datagrams and frames sent on");
        let forwarded_bytes = family("forwarded_bytes", "Bytes of UDP payload sent on");
        let sends = family("sends", "System calls that sent a train of datagrams");
        let dropped = family("dropped_packets", "Datagrams and frames dropped");
        let refused = family("refused_updates", "Updates of the routes not wholly applied");
        let batches = Family::<[(&str, &str); 1], Histogram>::new_with_constructor(|| {
            Histogram::new([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0, 2048.0])
        });
        registry.register("batch_packets", "Datagrams per batch received", batches.clone());
        let receive_errors = Counter::default();
        registry.register("receive_errors", "Receive calls that failed", receive_errors.clone());
        let resets = Counter::default();
        registry.register("stateless_resets", "Stateless resets sent in the name of dead workers", resets.clone());
        let neighbour_switches = Counter::default();
        let help = "Relays of other regions left because they had fallen silent";
        registry.register("neighbour_switches", help, neighbour_switches.clone());
        let state_write_errors = Counter::default();
        registry.register("state_write_errors", "Failed writes of the state", state_write_errors.clone());
        let confirmed = Arc::new(Confirmed::default());
        registry.register_collector(Box::new(confirmed.clone()));
        let skew = Family::<[(&str, &str); 1], Gauge>::default();
        let help = "How far the clock of the last stale but genuine frame's sender was ahead; negative for behind";
        registry.register_with_unit("clock_skew", help, Unit::Seconds, skew.clone());
        let mut gauge = |name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let by_way = |family: &ByLabel| Way::ALL.map(|w| family.get_or_create_owned(&[("direction", w.label())]));
        Self {
            received_packets: by_way(&received_packets),
            received_bytes: by_way(&received_bytes),
            forwarded_packets: by_way(&forwarded_packets),
            forwarded_bytes: by_way(&forwarded_bytes),
            sends: by_way(&sends),
            batches: Way::ALL.map(|w| batches.get_or_create_owned(&[("direction", w.label())])),
            dropped: DropReason::ALL.map(|r| dropped.get_or_create_owned(&[("reason", r.label())])),
            receive_errors,
            refused_updates: Refused::ALL.map(|r| refused.get_or_create_owned(&[("reason", r.label())])),
            resets,
            skew: Way::ALL.map(|w| skew.get_or_create_owned(&[("direction", w.label())])),
            regions: gauge("regions", "Regions reached through their relays"),
            neighbours: gauge("neighbours", "Relays of other regions"),
            neighbour_switches,
            loaded_generation: gauge("loaded_generation", "Newest key generation that all threads can use"),
            routes: gauge("routes", "Routable server IDs"),
            refused_routes: gauge("refused_routes", "Routes refused: a relay of another region has their address"),
            table_version: gauge("table_version", "Version of the routes in force"),
            router_connected: gauge("router_connected", "Routers connected"),
            state_version: gauge("state_version", "Version of the routes on disk"),
            state_write_errors,
            confirmed,
        }
    }

    /// A router stood behind what is in force at this moment.
    pub fn confirmed(&self, at: SystemTime) {
        let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.confirmed.unix_ms.store(since_epoch.as_millis() as u64, Ordering::Relaxed);
    }

    /// Datagrams dropped for a reason so far.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped[reason as usize].get()
    }

    /// Datagrams sent on so far.
    #[must_use]
    pub fn forwarded(&self, way: Way) -> u64 {
        self.forwarded_packets[way as usize].get()
    }

    /// System calls that sent so far.
    #[must_use]
    pub fn sends(&self, way: Way) -> u64 {
        self.sends[way as usize].get()
    }

    /// Takes over how often relays of other regions were left because they had fallen silent.
    pub fn switched(&self, so_far: u64) {
        self.neighbour_switches.inc_by(so_far.saturating_sub(self.neighbour_switches.get()));
    }

    /// Stateless resets sent so far.
    #[must_use]
    pub fn resets(&self) -> u64 {
        self.resets.get()
    }

    /// How far ahead the last stale but genuine frame's clock was, in seconds.
    #[must_use]
    pub fn skew(&self, way: Way) -> i64 {
        self.skew[way as usize].get()
    }

    /// Counts a failed receive call.
    pub fn receive_error(&self) {
        self.receive_errors.inc();
    }

    /// Counts an update that was not wholly applied.
    pub fn refused_update(&self, why: Refused) {
        self.refused_updates[why as usize].inc();
    }
}

/// When a router last stood behind what is in force. Its age is worked out when somebody asks.
#[derive(Debug, Default)]
struct Confirmed {
    /// Unix time; zero for never.
    unix_ms: AtomicU64,
}

impl Confirmed {
    fn age(&self, now: SystemTime) -> Duration {
        match self.unix_ms.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            ms => now.duration_since(UNIX_EPOCH + Duration::from_millis(ms)).unwrap_or_default(),
        }
    }
}

impl Collector for Confirmed {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let age = ConstGauge::new(self.age(SystemTime::now()).as_secs_f64());
        let help = "Time since a router stood behind what is in force";
        age.encode(encoder.encode_descriptor("state_age_seconds", help, None, age.metric_type())?)
    }
}

/// Counts of one batch, kept by one thread without sharing and added to [`Metrics`] when the batch ends.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    received: [Volume; 2],
    forwarded: [Volume; 2],
    sends: [u64; 2],
    dropped: [u64; DropReason::ALL.len()],
    resets: u64,
    skew: [Option<i16>; 2],
}

#[derive(Clone, Copy, Debug, Default)]
struct Volume {
    packets: u64,
    bytes: u64,
}

impl Tally {
    /// A datagram came in.
    pub const fn received(&mut self, way: Way, bytes: usize) {
        let volume = &mut self.received[way as usize];
        volume.packets += 1;
        volume.bytes += bytes as u64;
    }

    /// A train left with one system call.
    pub const fn sent(&mut self, way: Way, packets: usize, bytes: usize) {
        self.sends[way as usize] += 1;
        let volume = &mut self.forwarded[way as usize];
        volume.packets += packets as u64;
        volume.bytes += bytes as u64;
    }

    /// Datagrams went nowhere.
    pub const fn dropped(&mut self, reason: DropReason, packets: usize) {
        self.dropped[reason as usize] += packets as u64;
    }

    /// A stateless reset was sent.
    pub const fn reset(&mut self) {
        self.resets += 1;
    }

    /// A genuine frame was stale: down from workers, up from other regions' relays.
    pub const fn skewed(&mut self, skew: Skew) {
        let way = match skew.sender {
            Sender::Shard(_) => Way::Down,
            Sender::Relay(_) => Way::Up,
        };
        self.skew[way as usize] = Some(skew.ahead_s);
    }

    /// Adds everything to the shared series and starts over.
    pub fn publish(&mut self, metrics: &Metrics) {
        for way in Way::ALL {
            let at = way as usize;
            let (received, forwarded) = (self.received[at], self.forwarded[at]);
            if received.packets > 0 {
                metrics.received_packets[at].inc_by(received.packets);
                metrics.received_bytes[at].inc_by(received.bytes);
                metrics.batches[at].observe(received.packets as f64);
            }
            if forwarded.packets > 0 {
                metrics.forwarded_packets[at].inc_by(forwarded.packets);
                metrics.forwarded_bytes[at].inc_by(forwarded.bytes);
                metrics.sends[at].inc_by(self.sends[at]);
            }
        }
        if self.resets > 0 {
            metrics.resets.inc_by(self.resets);
        }
        for (gauge, ahead) in metrics.skew.iter().zip(self.skew) {
            if let Some(ahead) = ahead {
                gauge.set(ahead.into());
            }
        }
        for (counter, count) in metrics.dropped.iter().zip(self.dropped) {
            if count > 0 {
                counter.inc_by(count);
            }
        }
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text;

    #[test]
    fn an_age_counts_from_the_last_confirmation_and_never_below_zero() {
        let at = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let metrics = Metrics::register(&mut Registry::default());
        assert_eq!(metrics.confirmed.age(at), Duration::ZERO, "never");
        metrics.confirmed(at);
        assert_eq!(metrics.confirmed.age(at + Duration::from_secs(90)), Duration::from_secs(90));
        assert_eq!(metrics.confirmed.age(at - Duration::from_secs(90)), Duration::ZERO, "the clock went back");
    }

    #[test]
    fn every_reason_moves_exactly_its_own_series() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let mut tally = Tally::default();
        for (count, reason) in (1..).zip(DropReason::ALL) {
            tally.dropped(reason, count);
        }
        tally.received(Way::Up, 100);
        tally.sent(Way::Down, 3, 300);
        tally.publish(&metrics);
        tally.publish(&metrics);
        let mut shown = String::new();
        text::encode(&mut shown, &registry).unwrap();
        for (count, reason) in (1u64..).zip(DropReason::ALL) {
            let line = format!("antiphon_relay_dropped_packets_total{{reason=\"{}\"}} {count}\n", reason.label());
            assert!(shown.contains(&line), "{line}{shown}");
        }
        for line in [
            "antiphon_relay_received_bytes_total{direction=\"up\"} 100\n",
            "antiphon_relay_received_packets_total{direction=\"down\"} 0\n",
            "antiphon_relay_forwarded_packets_total{direction=\"down\"} 3\n",
            "antiphon_relay_sends_total{direction=\"down\"} 1\n",
            "antiphon_relay_batch_packets_count{direction=\"up\"} 1\n",
            "antiphon_relay_refused_updates_total{reason=\"gap\"} 0\n",
            "antiphon_relay_state_age_seconds 0.0\n",
            "antiphon_relay_state_write_errors_total 0\n",
        ] {
            assert!(shown.contains(line), "{line}{shown}");
        }
    }
}
