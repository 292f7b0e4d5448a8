//! The status as a stream: whoever watches is told what changed, not what merely got older.

use std::{sync::Arc, time::Duration};

use antiphon_proto::v1::FleetStatusResponse;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use tonic::Status;

use crate::fleet::Fleet;

/// Tells the status at once and whenever it changed, until nobody listens.
pub(super) async fn tell(fleet: Arc<Fleet>, listener: mpsc::Sender<Result<FleetStatusResponse, Status>>) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = None;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = listener.closed() => return,
        }
        let status = fleet.status();
        let essence = essence(&status);
        if told.as_ref() == Some(&essence) {
            continue;
        }
        // One that does not take the last one yet gets the newest later.
        match listener.try_send(Ok(status)) {
            Ok(()) => told = Some(essence),
            Err(mpsc::error::TrySendError::Full(_)) => {}
            Err(mpsc::error::TrySendError::Closed(_)) => return,
        }
    }
}

/// The status without what changes by time alone: ages and clocks in coarse steps, and no words made of them.
fn essence(status: &FleetStatusResponse) -> FleetStatusResponse {
    let mut essence = status.clone();
    essence.store_age_ms /= AGE_STEP_MS;
    for region in &mut essence.regions {
        region.digest_age_ms /= AGE_STEP_MS;
        region.clock_ahead_ms /= CLOCK_STEP_MS;
        if let Some(digest) = &mut region.digest {
            digest.unix_ms = 0;
            digest.measured.clear();
        }
        for worker in &mut region.workers {
            worker.report_age_ms /= AGE_STEP_MS;
            worker.clock_ahead_ms /= CLOCK_STEP_MS;
            worker.why_not.clear();
        }
        for relay in &mut region.relays {
            relay.clock_ahead_ms /= CLOCK_STEP_MS;
        }
    }
    essence
}

const INTERVAL: Duration = Duration::from_secs(1);
/// Reports are younger than this while all is well.
const AGE_STEP_MS: u32 = 10_000;
const CLOCK_STEP_MS: i64 = 5_000;

#[cfg(test)]
mod tests {
    use antiphon_proto::v1::{RegionStatus, WorkerStatus};

    use super::*;

    fn status(change: impl FnOnce(&mut WorkerStatus)) -> FleetStatusResponse {
        let mut worker = WorkerStatus { name: "w".into(), report_age_ms: 20, active: 1, ..WorkerStatus::default() };
        change(&mut worker);
        let region = RegionStatus { workers: vec![worker], ..RegionStatus::default() };
        FleetStatusResponse { regions: vec![region], ..FleetStatusResponse::default() }
    }

    #[test]
    fn growing_older_is_no_news_and_everything_else_is() {
        let before = essence(&status(|_| {}));
        type Change = fn(&mut WorkerStatus);
        let table: [(Change, bool); 6] = [
            (|w| w.report_age_ms = 900, false),
            (|w| w.clock_ahead_ms = -3, false),
            (|w| w.why_not = "its last report is 3007 ms old".into(), false),
            (|w| w.report_age_ms = 10_000, true),
            (|w| w.placeable = true, true),
            (|w| w.active = 2, true),
        ];
        for (change, news) in table {
            assert_eq!(essence(&status(change)) != before, news);
        }
    }
}
