//! Sessions of one tenant at one agent, bounded by the agent's limit (invariant I12).
//!
//! The workers know which sessions there are; the router asks them at most once a second per tenant and agent and adds
//! what it granted since. Routers of different regions see each other's grants with that delay.

use std::{collections::HashMap, sync::Arc, time::Duration};

use antiphon_core::clock::Millis;
use parking_lot::Mutex;

use super::Admission;
use crate::{
    create::Create,
    refusals::{Failure, Reason},
};

type Counters = Arc<Mutex<HashMap<(String, String), Counter>>>;

/// Counters by tenant and agent.
#[derive(Debug, Default)]
pub(super) struct Quota {
    counters: Counters,
    refreshing: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    counted: Option<(u32, Millis)>,
    granted_since: u32,
    under_way: u32,
}

/// One session that counts while it is being placed, and afterwards if it is kept.
#[derive(Debug)]
#[must_use = "dropping it takes the session out of the count"]
pub(super) struct Admitted {
    of: Option<(Counters, (String, String))>,
}

impl Admitted {
    /// The session was placed.
    pub(super) fn keep(self) {
        if let Some((counters, key)) = &self.of
            && let Some(counter) = counters.lock().get_mut(key)
        {
            counter.granted_since += 1;
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Some((counters, key)) = &self.of
            && let Some(counter) = counters.lock().get_mut(key)
        {
            counter.under_way = counter.under_way.saturating_sub(1);
        }
    }
}

impl Admission {
    /// Counts a session in, or refuses it because its tenant has as many as the agent allows.
    pub(super) async fn admit_tenant(self: &Arc<Self>, tenant: &str, create: &Create) -> Result<Admitted, Failure> {
        let records = self.fleet.records();
        let limit = records.agents.get(&create.agent).map_or(0, |a| a.sessions_per_tenant);
        let known = self.decisions.lock().of(create.session).is_some();
        if limit == 0 || known {
            return Ok(Admitted { of: None });
        }
        let key = (tenant.to_owned(), create.agent.clone());
        self.refresh(&key).await;
        let mut counters = self.quota.counters.lock();
        let counter = counters.entry(key.clone()).or_default();
        let counted = counter.counted.map_or(0, |(n, _)| n);
        if counted.saturating_add(counter.granted_since + counter.under_way) >= limit {
            let text = format!("{tenant} has {limit} sessions at {}, its limit", create.agent);
            return Err(Failure::refused(Reason::TenantLimit, text, 1000, vec![]));
        }
        counter.under_way += 1;
        let of = Some((Arc::clone(&self.quota.counters), key));
        Ok(Admitted { of })
    }

    async fn refresh(self: &Arc<Self>, key: &(String, String)) {
        let stale = |this: &Self| {
            let now = this.fleet.clock.now();
            let counters = this.quota.counters.lock();
            let counted = counters.get(key).and_then(|c| c.counted);
            counted.is_none_or(|(_, at)| now.since(at) > COUNT_LIFETIME)
        };
        if !stale(self) {
            return;
        }
        let _turn = self.quota.refreshing.lock().await;
        if !stale(self) {
            return;
        }
        let before = {
            let mut counters = self.quota.counters.lock();
            if counters.len() >= MAX_COUNTERS {
                let now = self.fleet.clock.now();
                let idle = |c: &Counter| c.counted.is_none_or(|(_, at)| now.since(at) > IDLE);
                counters.retain(|_, c| c.under_way > 0 || !idle(c));
            }
            counters.entry(key.clone()).or_default().granted_since
        };
        let listed = self.list(&key.0, MAX_LISTED).await.sessions;
        let counted = listed.iter().filter(|s| s.agent == key.1).count();
        let mut counters = self.quota.counters.lock();
        let counter = counters.entry(key.clone()).or_default();
        let counted = u32::try_from(counted).unwrap_or(u32::MAX);
        counter.counted = Some((counted, self.fleet.clock.now()));
        counter.granted_since = counter.granted_since.saturating_sub(before);
    }
}

const COUNT_LIFETIME: Duration = Duration::from_secs(1);
const IDLE: Duration = Duration::from_secs(60);
const MAX_COUNTERS: usize = 10_000;
const MAX_LISTED: usize = 10_000;
