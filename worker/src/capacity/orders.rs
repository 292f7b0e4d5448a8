//! What routers order, and what they are told of the sessions here.

use std::{collections::BTreeMap, time::Duration};

use antiphon_proto::v1::{MeasuredRtt, Phase, PhaseOrder, RevisionSessions};

use super::{Capacity, Terms};

impl Capacity {
    /// A router says whether to take new sessions, and until when to keep those that are here.
    pub(crate) fn order(&self, order: &PhaseOrder) {
        let inner = &mut *self.inner.lock();
        if !inner.phase.order(self.now(), order) {
            return;
        }
        let phase = inner.phase.phase();
        let sessions = inner.table.active();
        tracing::info!(?phase, deadline_ms = order.deadline_ms, reason = order.reason, sessions, "ordered by a router");
        inner.table.accept(phase == Phase::Active);
        self.publish(inner);
    }

    /// The present round trip of a session's caller.
    pub(crate) fn note_rtt(&self, terms: &Terms, rtt: Duration) {
        self.measured.lock().note(self.now(), terms.neighbourhood, rtt);
    }

    /// Round trips by where callers are.
    pub(crate) fn measured(&self) -> Vec<MeasuredRtt> {
        self.measured.lock().list(self.now())
    }

    /// Sessions by the revision of the agent that they began with.
    pub(crate) fn revisions(&self) -> Vec<RevisionSessions> {
        let inner = self.inner.lock();
        let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
        for (_, lease, _) in inner.table.iter().filter(|(.., active)| *active) {
            *counts.entry(&lease.attachment.behaviour.revision).or_default() += 1;
        }
        let count = |(revision, sessions): (&str, u32)| RevisionSessions { revision: revision.to_owned(), sessions };
        counts.into_iter().map(count).collect()
    }
}
