//! A congestion controller that never starves a conversation.
//!
//! NewReno (RFC 9002, section 7) decides, but the window never falls below what the agreed audio needs for
//! [`crate::AudioBudget::FLOOR`]. Loss shrinks a plain window below one talk spurt on long paths, and each change of
//! relay is a path migration that starts the window anew. The floor is a constant bit rate of one voice, so a
//! congested path gets no more than the call was admitted for.

use std::{any::Any, sync::Arc, time::Instant};

use quinn_proto::{
    RttEstimator,
    congestion::{Controller, ControllerFactory, ControllerMetrics, NewRenoConfig},
};

/// Builds controllers with a floor.
#[derive(Debug, Clone)]
pub struct AudioFloorConfig {
    floor: u64,
    inner: Arc<NewRenoConfig>,
}

impl AudioFloorConfig {
    /// `floor` and `initial` are bytes in flight.
    #[must_use]
    pub fn new(floor: u64, initial: u64) -> Self {
        let mut inner = NewRenoConfig::default();
        inner.initial_window(initial.max(floor));
        Self { floor, inner: Arc::new(inner) }
    }
}

impl ControllerFactory for AudioFloorConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(AudioFloor { floor: self.floor, inner: self.inner.clone().build(now, current_mtu) })
    }
}

struct AudioFloor {
    floor: u64,
    inner: Box<dyn Controller>,
}

impl Controller for AudioFloor {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_acked: Option<u64>) {
        self.inner.on_end_acks(now, in_flight, app_limited, largest_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        self.inner.on_congestion_event(now, sent, persistent, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window().max(self.floor)
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.inner.metrics();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { floor: self.floor, inner: self.inner.clone_box() })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window().max(self.floor)
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn persistent_congestion_leaves_the_floor() {
        let start = Instant::now();
        let mut controller = Arc::new(AudioFloorConfig::new(15_000, 20_000)).build(start, 1200);
        assert_eq!(controller.window(), 20_000);
        let later = start + std::time::Duration::from_millis(1);
        controller.on_congestion_event(later, later, true, 5_000);
        assert_eq!(controller.window(), 15_000);
        assert_eq!(controller.clone_box().window(), 15_000);
    }
}
