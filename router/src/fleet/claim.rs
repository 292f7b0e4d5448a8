//! Claims on workers' free leases: counted as taken while their workers are asked.

use std::sync::Arc;

use antiphon_core::id::{Incarnation, WorkerNumber};
use tonic::transport::Channel;

use super::Fleet;

/// One lease that is being asked for; settles when it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(super) fleet: Arc<Fleet>,
    pub(crate) number: WorkerNumber,
    pub(crate) name: String,
    pub(crate) server_name: String,
    pub(crate) incarnation: Incarnation,
    pub(crate) channel: Channel,
}

impl Claim {
    /// The worker answered, and this many leases were free then. Answers overtake each other: the one that left the
    /// least counts, until a report says otherwise.
    pub(crate) fn answered(&self, free: u32) {
        let mut state = self.fleet.state.lock();
        if let Some(worker) = state.workers.get_mut(&self.number)
            && worker.hello.incarnation == self.incarnation
        {
            worker.taken = worker.taken.max(worker.slots().saturating_sub(free));
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.fleet.state.lock();
        let mut news = true;
        if let Some(worker) = state.workers.get_mut(&self.number)
            && worker.hello.incarnation == self.incarnation
        {
            worker.claims = worker.claims.saturating_sub(1);
            let (room, agent) = (worker.free() > 0, worker.hello.agent.clone());
            state.refresh_worker(self.number);
            // Whoever waits learns nothing from one more full answer while others are on their way; waking a thousand
            // for each of a hundred would cost more than placing them.
            news = room || !state.is_asking(&agent);
        }
        drop(state);
        if news {
            self.fleet.settled.send_modify(|n| *n += 1);
        }
        self.fleet.capacity.send_modify(|n| *n += 1);
    }
}
