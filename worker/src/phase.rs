//! Whether the worker takes new sessions, and until when it keeps those it has.
//!
//! Routers order it; the newest order holds, also while no router is there. A stop of the process outranks all of them
//! and is not undone.

use std::time::Duration;

use antiphon_core::clock::Millis;
use antiphon_proto::v1::{Phase, PhaseOrder};

/// A machine; the clock is an argument.
#[derive(Debug, Default)]
pub(crate) struct PhaseMachine {
    order: Option<Order>,
    stopping: bool,
}

#[derive(Debug)]
struct Order {
    phase: Phase,
    /// Sessions that are still there then are ended.
    deadline: Option<Millis>,
    unix_ms: u64,
}

impl PhaseMachine {
    /// Takes a router's order. `false`: it is not newer than the one that holds.
    pub(crate) fn order(&mut self, now: Millis, order: &PhaseOrder) -> bool {
        if self.order.as_ref().is_some_and(|present| present.unix_ms >= order.ordered_unix_ms) {
            return false;
        }
        // A phase of a newer release must not put a worker into service that was to be taken out of it.
        let phase = match Phase::try_from(order.phase) {
            Ok(known @ (Phase::Active | Phase::Cordoned | Phase::Draining)) => known,
            Ok(Phase::Unspecified) | Err(_) => Phase::Cordoned,
        };
        let deadline = now.after(Duration::from_millis(order.deadline_ms.into()));
        let deadline = (phase == Phase::Draining).then_some(deadline);
        self.order = Some(Order { phase, deadline, unix_ms: order.ordered_unix_ms });
        true
    }

    /// The process was asked to stop.
    pub(crate) const fn stop(&mut self) {
        self.stopping = true;
    }

    pub(crate) fn phase(&self) -> Phase {
        match &self.order {
            _ if self.stopping => Phase::Draining,
            Some(order) => order.phase,
            None => Phase::Active,
        }
    }

    /// Of the order that holds; 0: there is none.
    pub(crate) fn ordered_unix_ms(&self) -> u64 {
        self.order.as_ref().map_or(0, |order| order.unix_ms)
    }

    /// Whether sessions have had the time that the order left them.
    pub(crate) fn is_over(&self, now: Millis) -> bool {
        self.order.as_ref().and_then(|order| order.deadline).is_some_and(|deadline| deadline <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(phase: Phase, deadline_ms: u32, ordered_unix_ms: u64) -> PhaseOrder {
        PhaseOrder { phase: phase.into(), deadline_ms, reason: "test".into(), ordered_unix_ms }
    }

    #[test]
    fn the_newest_order_holds_whoever_repeats_an_older_one() {
        let mut machine = PhaseMachine::default();
        assert_eq!((machine.phase(), machine.ordered_unix_ms()), (Phase::Active, 0));
        assert!(machine.order(Millis(0), &order(Phase::Draining, 1000, 5)));
        assert!(!machine.order(Millis(9), &order(Phase::Draining, 1000, 5)), "a router said it again");
        assert!(machine.order(Millis(10), &order(Phase::Active, 0, 6)));
        assert!(!machine.order(Millis(20), &order(Phase::Draining, 1000, 5)), "a router comes back with what was");
        assert_eq!((machine.phase(), machine.ordered_unix_ms()), (Phase::Active, 6));
        assert!(!machine.is_over(Millis(5000)));
    }

    #[test]
    fn a_deadline_counts_from_its_order_and_is_undone_with_it() {
        let mut machine = PhaseMachine::default();
        machine.order(Millis(500), &order(Phase::Draining, 1000, 1));
        assert!(!machine.is_over(Millis(1499)));
        assert!(machine.is_over(Millis(1500)));
        machine.order(Millis(1500), &order(Phase::Draining, 60_000, 2));
        assert!(!machine.is_over(Millis(2000)), "the deadline was put off");
        machine.order(Millis(2000), &order(Phase::Draining, 0, 3));
        assert!(machine.is_over(Millis(2000)), "none at all ends sessions at once");
        machine.order(Millis(2001), &order(Phase::Cordoned, 0, 4));
        assert!(!machine.is_over(Millis(u64::MAX)), "who is cordoned keeps what it has");
    }

    #[test]
    fn a_stop_outranks_orders() {
        let mut machine = PhaseMachine::default();
        machine.stop();
        machine.order(Millis(0), &order(Phase::Active, 0, 1));
        assert_eq!(machine.phase(), Phase::Draining);
    }

    #[test]
    fn an_unknown_phase_brings_nobody_into_service() {
        let mut machine = PhaseMachine::default();
        machine.order(Millis(0), &PhaseOrder { phase: 77, ordered_unix_ms: 1, ..PhaseOrder::default() });
        assert_eq!(machine.phase(), Phase::Cordoned);
    }
}
