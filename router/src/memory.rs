//! What a router remembers of its decisions, bounded and lost with the process without harm.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use antiphon_core::{
    clock::Millis,
    geo::Cell,
    id::{Epoch, RegionNumber, SessionId},
};
use antiphon_proto::v1;

use crate::{create::Create, fleet::Target};

/// Where a session was placed and why.
#[derive(Clone, Debug)]
pub(crate) struct Decision {
    pub(crate) tenant: String,
    pub(crate) epoch: Epoch,
    pub(crate) client_key: [u8; 32],
    pub(crate) codec: v1::Codec,
    pub(crate) target: Target,
    pub(crate) explanation: v1::Explanation,
}

impl Decision {
    /// Whether a request is the one that was decided, sent again.
    pub(crate) fn is_of(&self, tenant: &str, create: &Create) -> bool {
        self.tenant == tenant
            && self.client_key == create.client_key
            && self.codec == create.codec
            && self.explanation.agent == create.agent
    }
}

/// The newest decisions, by session.
#[derive(Debug, Default)]
pub(crate) struct Decisions {
    by_session: HashMap<SessionId, (u64, Decision)>,
    /// Oldest first; an entry whose serial is not the session's is superseded.
    order: VecDeque<(u64, SessionId)>,
    candidates: usize,
    last: u64,
}

impl Decisions {
    pub(crate) fn remember(&mut self, session: SessionId, decision: Decision) {
        self.last += 1;
        self.candidates += decision.explanation.candidates.len();
        self.order.push_back((self.last, session));
        if let Some((_, old)) = self.by_session.insert(session, (self.last, decision)) {
            self.candidates -= old.explanation.candidates.len();
        }
        while self.order.len() > MAX_DECISIONS || self.candidates > MAX_CANDIDATES {
            let Some((serial, session)) = self.order.pop_front() else {
                break;
            };
            if self.by_session.get(&session).is_some_and(|(s, _)| *s == serial)
                && let Some((_, old)) = self.by_session.remove(&session)
            {
                self.candidates -= old.explanation.candidates.len();
            }
        }
    }

    pub(crate) fn of(&self, session: SessionId) -> Option<&Decision> {
        self.by_session.get(&session).map(|(_, decision)| decision)
    }
}

/// The region chosen lately per agent and neighbourhood, for the planner's hysteresis.
#[derive(Debug, Default)]
pub(crate) struct Incumbents {
    chosen: BTreeMap<(String, Cell), (RegionNumber, Millis)>,
}

impl Incumbents {
    pub(crate) fn of(&self, agent: &str, cell: Cell, now: Millis) -> Option<RegionNumber> {
        let (region, at) = self.chosen.get(&(agent.to_owned(), cell))?;
        (now.since(*at) <= INCUMBENCY).then_some(*region)
    }

    pub(crate) fn remember(&mut self, agent: &str, cell: Cell, region: RegionNumber, now: Millis) {
        if self.chosen.len() >= MAX_INCUMBENTS {
            self.chosen.retain(|_, (_, at)| now.since(*at) <= INCUMBENCY);
        }
        // Still full: this neighbourhood goes without until others expire.
        if self.chosen.len() < MAX_INCUMBENTS {
            self.chosen.insert((agent.to_owned(), cell), (region, now));
        }
    }
}

/// Explanations that are kept.
const MAX_DECISIONS: usize = 10_000;
/// Their lines together: bounds the memory of a fleet with many regions and workers.
const MAX_CANDIDATES: usize = 500_000;
const MAX_INCUMBENTS: usize = 10_000;
const INCUMBENCY: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use antiphon_core::geo::Location;

    fn decision(candidates: usize) -> Decision {
        Decision {
            tenant: "acme".into(),
            epoch: Epoch::FIRST,
            client_key: [0; 32],
            codec: v1::Codec::Opus,
            target: Target::Region { name: "x".into() },
            explanation: v1::Explanation {
                candidates: vec![v1::Candidate::default(); candidates],
                ..v1::Explanation::default()
            },
        }
    }

    fn session(n: u128) -> SessionId {
        SessionId::from_bytes(n.to_be_bytes())
    }

    #[test]
    fn the_oldest_decisions_are_forgotten_first() {
        let mut decisions = Decisions::default();
        for n in 0..MAX_DECISIONS as u128 + 5 {
            decisions.remember(session(n), decision(1));
        }
        assert!(decisions.of(session(4)).is_none());
        assert!(decisions.of(session(5)).is_some());
        assert_eq!(decisions.candidates, MAX_DECISIONS);
    }

    #[test]
    fn long_explanations_count_for_more() {
        let mut decisions = Decisions::default();
        decisions.remember(session(1), decision(MAX_CANDIDATES - 1));
        decisions.remember(session(2), decision(2));
        assert!(decisions.of(session(1)).is_none());
        assert!(decisions.of(session(2)).is_some());
        // A session that is decided again is one session, and not forgotten with its former decision.
        for _ in 0..MAX_DECISIONS {
            decisions.remember(session(2), decision(1));
        }
        assert!(decisions.of(session(2)).is_some());
        assert_eq!(decisions.candidates, 1);
    }

    #[test]
    fn incumbency_ends() {
        let mut incumbents = Incumbents::default();
        let cell = Location::new(50.0, 8.0).unwrap().cell();
        let region = RegionNumber::new(3).unwrap();
        incumbents.remember("a/b", cell, region, Millis(0));
        assert_eq!(incumbents.of("a/b", cell, Millis(60_000)), Some(region));
        assert_eq!(incumbents.of("a/b", cell, Millis(60_001)), None);
        assert_eq!(incumbents.of("a/c", cell, Millis(0)), None);
    }
}
