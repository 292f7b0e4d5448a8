//! Sessions of one tenant at one agent, bounded by the agent's limit (invariant I12).
//!
//! The workers know which sessions there are; the router asks them at most once a second per tenant and agent and adds
//! what it granted since. Routers of different regions see each other's grants with that delay. What a worker or region
//! held that does not answer goes on to count for [`BENEFIT`], and no longer: when a region is lost its callers call
//! again, and places that nobody holds any more must not keep them out.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use antiphon_core::{
    clock::Millis,
    id::{Epoch, SessionId},
};
use antiphon_proto::v1;
use parking_lot::Mutex;

use super::Admission;
use crate::{
    create::Create,
    refusals::{Failure, Reason},
};

type Counters = Arc<Mutex<HashMap<(String, String), Counter>>>;
type Ownership = (SessionId, Epoch);

/// Counters by tenant and agent.
#[derive(Debug, Default)]
pub(super) struct Quota {
    counters: Counters,
}

/// The sessions of one tenant at one agent.
#[derive(Debug, Default)]
struct Counter {
    listed_at: Option<Millis>,
    /// Of those who wait for the same answers one asks.
    refreshing: Arc<tokio::sync::Mutex<()>>,
    /// Grants so far.
    grants: u64,
    known: BTreeMap<Ownership, Standing>,
    /// What [`Self::known`] weighs against the limit.
    weight: usize,
}

/// Why a session is counted at one epoch: at least one holds.
#[derive(Clone, Debug, Default)]
struct Standing {
    /// Who said so last: a worker of this region, or another region.
    listed: Option<Holder>,
    /// Which grant of the counter it was, and whose, if it was not listed since.
    granted: Option<(u64, Holder)>,
    /// Requests that are being placed.
    under_way: u32,
}

/// Who holds a session.
#[derive(Clone, Debug)]
struct Holder {
    /// The name under which it would be missing.
    name: Arc<str>,
    /// When it said so.
    at: Millis,
}

impl Holder {
    /// It does not answer, and may still hold what it held.
    fn has_benefit(&self, missing: &[String], now: Millis) -> bool {
        now.since(self.at) <= BENEFIT && missing.iter().any(|name| **name == *self.name)
    }
}

impl Standing {
    const fn counts(&self) -> bool {
        self.listed.is_some() || self.granted.is_some() || self.under_way > 0
    }
}

impl Counter {
    /// Counts a request in, unless that raises the weight above the limit. The same request again raises nothing.
    fn admit(&mut self, ownership: Ownership, limit: usize) -> bool {
        let added = if self.known.contains_key(&ownership) { 0 } else { self.next_weight(ownership.0) };
        if added > 0 && self.weight + added > limit {
            return false;
        }
        self.change(ownership, |standing| standing.under_way += 1);
        true
    }

    /// A request was placed, or not.
    fn settle(&mut self, ownership: Ownership, placed: Option<Holder>) {
        self.grants += u64::from(placed.is_some());
        let serial = self.grants;
        self.change(ownership, |standing| {
            standing.under_way = standing.under_way.saturating_sub(1);
            if let Some(holder) = placed {
                standing.granted = Some((serial, holder));
            }
        });
    }

    /// What was said replaces what was said before and the grants that were already known of, but for what those have
    /// who are `missing`.
    fn listed(&mut self, sessions: &[(Ownership, Arc<str>)], missing: &[String], grants_before: u64, now: Millis) {
        let known: Vec<Ownership> = self.known.keys().copied().collect();
        for ownership in known {
            self.change(ownership, |standing| {
                standing.listed = standing.listed.take().filter(|holder| holder.has_benefit(missing, now));
                let granted = standing.granted.take();
                standing.granted =
                    granted.filter(|(serial, holder)| *serial > grants_before || holder.has_benefit(missing, now));
            });
        }
        for (ownership, name) in sessions {
            let holder = Holder { name: Arc::clone(name), at: now };
            self.change(*ownership, |standing| standing.listed = Some(holder));
        }
        self.listed_at = Some(now);
    }

    fn change(&mut self, ownership: Ownership, change: impl FnOnce(&mut Standing)) {
        let old = self.known.remove(&ownership);
        let weight = self.next_weight(ownership.0);
        let counted = old.is_some();
        let mut standing = old.unwrap_or_default();
        change(&mut standing);
        if counted {
            self.weight -= weight;
        }
        if standing.counts() {
            self.weight += weight;
            self.known.insert(ownership, standing);
        }
    }

    /// What one more epoch of a session weighs. A session that moves holds a lease at its old and at its new owner and
    /// is still one; more epochs than that are as good as more sessions.
    fn next_weight(&self, session: SessionId) -> usize {
        let epochs = self.known.range((session, Epoch::FIRST)..).take_while(|((s, _), _)| *s == session);
        usize::from(epochs.count() != 1)
    }

    fn idle(&self, now: Millis) -> bool {
        self.listed_at.is_none_or(|at| now.since(at) > IDLE) && self.known.values().all(|s| s.under_way == 0)
    }
}

/// One session that counts while it is being placed, and afterwards if it is kept.
#[derive(Debug)]
#[must_use = "dropping it takes the session out of the count"]
pub(super) struct Admitted {
    of: Option<(Counters, (String, String), Ownership)>,
    placed: Option<Holder>,
}

impl Admitted {
    /// The session was placed.
    pub(super) fn keep(mut self, session: &v1::Session, own_region: &str, now: Millis) {
        self.placed = Some(Holder { name: holder_name(&session.region, &session.worker, own_region), at: now });
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Some((counters, key, ownership)) = &self.of
            && let Some(counter) = counters.lock().get_mut(key)
        {
            counter.settle(*ownership, self.placed.take());
        }
    }
}

impl Admission {
    /// Counts a session in, or refuses it because its tenant has as many as the agent allows.
    pub(super) async fn admit_tenant(self: &Arc<Self>, tenant: &str, create: &Create) -> Result<Admitted, Failure> {
        let records = self.fleet.records();
        let limit = records.agents.get(&create.agent).map_or(0, |a| a.sessions_per_tenant);
        if limit == 0 {
            return Ok(Admitted { of: None, placed: None });
        }
        let key = (tenant.to_owned(), create.agent.clone());
        self.refresh(&key).await;
        let ownership = (create.session, create.epoch);
        let mut counters = self.quota.counters.lock();
        let counter = counters.entry(key.clone()).or_default();
        if !counter.admit(ownership, usize::try_from(limit).unwrap_or(usize::MAX)) {
            let text = format!("{tenant} has {limit} sessions at {}, its limit", create.agent);
            return Err(Failure::refused(Reason::TenantLimit, text, 1000, vec![]));
        }
        let of = Some((Arc::clone(&self.quota.counters), key, ownership));
        Ok(Admitted { of, placed: None })
    }

    async fn refresh(self: &Arc<Self>, key: &(String, String)) {
        let stale = |this: &Self| {
            let now = this.fleet.clock.now();
            let counters = this.quota.counters.lock();
            let listed_at = counters.get(key).and_then(|c| c.listed_at);
            listed_at.is_none_or(|at| now.since(at) > COUNT_LIFETIME)
        };
        if !stale(self) {
            return;
        }
        let turn = {
            let mut counters = self.quota.counters.lock();
            if counters.len() >= MAX_COUNTERS {
                let now = self.fleet.clock.now();
                counters.retain(|_, c| !c.idle(now));
            }
            Arc::clone(&counters.entry(key.clone()).or_default().refreshing)
        };
        // Other tenants do not wait for this one's answers.
        let _turn = turn.lock().await;
        if !stale(self) {
            return;
        }
        let before = self.quota.counters.lock().entry(key.clone()).or_default().grants;
        let listing = self.list(&key.0, MAX_LISTED).await;
        let own = &self.fleet.region;
        let sessions = listing.sessions.iter().filter(|s| s.agent == key.1);
        let sessions: Vec<_> =
            sessions.filter_map(|s| Some((ownership(s)?, holder_name(&s.region, &s.worker, own)))).collect();
        let mut counters = self.quota.counters.lock();
        let counter = counters.entry(key.clone()).or_default();
        counter.listed(&sessions, &listing.missing, before, self.fleet.clock.now());
    }
}

fn ownership(summary: &v1::SessionSummary) -> Option<Ownership> {
    Some((summary.session.parse().ok()?, Epoch::new(summary.epoch.max(1)).ok()?))
}

/// The name under which whoever holds a session would be missing.
fn holder_name(region: &str, worker: &str, own_region: &str) -> Arc<str> {
    if region == own_region { worker.into() } else { region.into() }
}

/// How long sessions of who does not answer go on to count: a caller gives a silent call up after as long.
const BENEFIT: Duration = Duration::from_secs(5);

const COUNT_LIFETIME: Duration = Duration::from_secs(1);
const IDLE: Duration = Duration::from_secs(60);
const MAX_COUNTERS: usize = 10_000;
const MAX_LISTED: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn of(session: u8, epoch: u32) -> Ownership {
        (SessionId::from_bytes([session; 16]), Epoch::new(epoch).unwrap())
    }

    fn at(ownership: Ownership) -> (Ownership, Arc<str>) {
        (ownership, "w-1".into())
    }

    fn placed(name: &str) -> Option<Holder> {
        Some(Holder { name: name.into(), at: Millis(0) })
    }

    #[test]
    fn sessions_of_who_does_not_answer_go_on_to_count() {
        let mut counter = Counter::default();
        counter.listed(&[at(of(1, 1)), (of(2, 1), "virginia".into())], &[], 0, Millis(0));
        counter.listed(&[], &["virginia".into()], 0, Millis(1));
        assert_eq!(counter.weight, 1, "of the worker that answered nothing is left");
        assert!(counter.admit(of(3, 1), 2));
        counter.settle(of(3, 1), placed("w-1"));
        counter.listed(&[], &["w-1".into()], counter.grants, Millis(2));
        assert_eq!(counter.weight, 1, "the grant is at the one who is missing");
        counter.listed(&[], &["w-2".into()], counter.grants, Millis(3));
        assert_eq!(counter.weight, 0, "its worker has answered: another one's silence says nothing of it");
    }

    #[test]
    fn a_lost_region_keeps_its_callers_out_no_longer_than_they_take_to_call_again() {
        let mut counter = Counter::default();
        let lost = ["virginia".to_owned()];
        counter.listed(&[(of(1, 1), "virginia".into())], &[], 0, Millis(0));
        counter.listed(&[], &lost, 0, Millis(5_000));
        assert!(!counter.admit(of(2, 1), 1), "it may be a moment's silence");
        counter.listed(&[], &lost, 0, Millis(5_001));
        assert!(counter.admit(of(2, 1), 1));
    }

    #[test]
    fn the_same_request_counts_once_before_and_after_it_is_listed() {
        let mut counter = Counter::default();
        for _ in 0..3 {
            assert!(counter.admit(of(1, 1), 1));
            counter.settle(of(1, 1), placed("w-1"));
        }
        assert!(!counter.admit(of(2, 1), 1));
        counter.listed(&[of(1, 1)].map(at), &[], counter.grants, Millis(0));
        assert!(counter.admit(of(1, 1), 1));
        assert!(!counter.admit(of(2, 1), 1));
        counter.settle(of(1, 1), None);
        assert_eq!(counter.weight, 1, "a repeat that fails leaves the session counted");
    }

    #[test]
    fn an_ended_session_counts_again_when_it_comes_back() {
        let mut counter = Counter::default();
        assert!(counter.admit(of(1, 1), 1));
        counter.settle(of(1, 1), placed("w-1"));
        counter.listed(&[], &[], counter.grants, Millis(0));
        assert_eq!((counter.weight, counter.known.len()), (0, 0));
        assert!(counter.admit(of(2, 1), 1));
        assert!(!counter.admit(of(1, 1), 1), "its former place is taken");
    }

    #[test]
    fn a_grant_during_the_listing_is_not_lost() {
        let mut counter = Counter::default();
        let before = counter.grants;
        assert!(counter.admit(of(1, 1), 2));
        assert!(counter.admit(of(2, 1), 2));
        counter.settle(of(1, 1), placed("w-1"));
        counter.listed(&[], &[], before, Millis(0));
        assert_eq!(counter.weight, 2);
        counter.settle(of(2, 1), None);
        assert_eq!(counter.weight, 1);
    }

    #[test]
    fn a_moving_session_is_one_and_many_epochs_are_many() {
        let mut counter = Counter::default();
        counter.listed(&[of(1, 1), of(2, 1)].map(at), &[], 0, Millis(0));
        assert!(counter.admit(of(1, 2), 2), "a session may move at the limit");
        assert_eq!(counter.weight, 2);
        assert!(!counter.admit(of(1, 3), 2));
        counter.listed(&[of(1, 2), of(2, 1)].map(at), &[], 0, Millis(1));
        counter.settle(of(1, 2), None);
        assert!(counter.admit(of(1, 3), 2), "the old owner is gone");
    }
}
