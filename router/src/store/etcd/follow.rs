//! Follows etcd: list or go on, set right what was lost, watch; from the start again when that ends.

use std::{convert::Infallible, sync::Arc, time::Duration};

use antiphon_runtime::cause;
use etcd_client::{GetOptions, KvClient, WatchOptions, WatchResponse};
use futures::FutureExt as _;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use super::{
    ATTEMPTS, Etcd, OPERATION, Pending,
    connect::told,
    keys::{Entry, FORMAT, Identity},
    mirror::{Done, Mirror, Step},
    plan,
};
use crate::store::{Claims, Reached, StoreError};

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{}", cause::text(.0.as_ref()))]
    Failed(anyhow::Error),
    #[error("{}", told(.0))]
    Answer(etcd_client::Error),
    #[error(transparent)]
    Refused(StoreError),
    #[error("no answer within {} s", OPERATION.as_secs())]
    Silent,
    #[error("the watch says nothing any more")]
    WatchSilent,
    #[error("the watch was ended: {0}")]
    WatchOver(String),
    #[error("the changes since are not kept any more")]
    Compacted,
    #[error("everything was deleted")]
    Emptied,
    #[error("somebody else sets the same things right")]
    Overtaken,
    #[error("it is not this region's: {0}")]
    Foreign(String),
    #[error("a transaction failed")]
    Lost,
}

impl Ended {
    /// Whether the next connection may be made at once.
    fn at_once(&self) -> bool {
        matches!(self, Self::Compacted | Self::Emptied | Self::Overtaken)
    }
}

impl From<etcd_client::Error> for Ended {
    fn from(error: etcd_client::Error) -> Self {
        Self::Answer(error)
    }
}

/// What is known when a connection begins.
struct Before {
    mirror: Mirror,
    claims: Claims,
    reached: Reached,
    live: bool,
}

/// What a store has been through since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Past {
    /// It went on.
    Kept,
    /// It was made anew.
    Replaced,
    /// It is an earlier state of itself.
    WentBack,
}

impl Etcd {
    /// Follows etcd for ever.
    pub(super) async fn follow(&self) {
        let (mut failures, mut go_on) = (0_u32, true);
        let mut said: Option<Instant> = None;
        loop {
            let session = self.state.lock().session;
            let Err(ended) = self.session(go_on).await;
            go_on = !matches!(ended, Ended::Compacted);
            let was_connected = self.state.lock().session != session;
            // Who lost it has said why.
            if !matches!(ended, Ended::Lost) {
                self.lose(session + u64::from(was_connected), &ended.to_string());
            }
            failures = if was_connected { 0 } else { failures.saturating_add(1) };
            if was_connected || said.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
                said = Some(Instant::now());
                let error = self.unavailable(&self.state.lock());
                let knows = self.records.borrow().revision > 0;
                let meanwhile = if knows { "what is known goes on" } else { "nothing is known until it answers" };
                tracing::warn!(etcd = self.config.shown(), "{meanwhile}: {error}");
            }
            if failures > 0 || !ended.at_once() {
                sleep(backoff(failures)).await;
            }
        }
    }

    /// One connection, until it ends. With `go_on` what happened since the last one is asked for, if that can be told.
    async fn session(&self, go_on: bool) -> Result<Infallible, Ended> {
        // A loss that was noticed twice is not one of this connection.
        let _ = self.lost.notified().now_or_never();
        let mut client = self.config.connect().await.map_err(Ended::Failed)?;
        let mut kv = client.kv_client().max_decoding_message_size(LARGEST_ANSWER);
        let before = {
            let state = self.state.lock();
            let (mirror, claims) = (state.mirror.clone(), state.claims().clone());
            Before { mirror, claims, reached: state.reached.clone(), live: state.live }
        };
        let probe = self.read(&mut kv, Entry::Identity.path(), None).await?;
        let header = probe.header().ok_or_else(|| Ended::WatchOver("an answer without a header".into()))?;
        let (cluster, now) = (header.cluster_id(), header.revision());
        let there = Mirror::listed(probe.kvs(), &self.config.prefix, now);
        let past = before.past(cluster, now, &there);
        let mut fresh = if go_on && before.live && past == Past::Kept && there.identity.is_some() {
            before.mirror.clone()
        } else {
            let all = self.read(&mut kv, String::new(), Some(GetOptions::new().with_prefix())).await?;
            let revision = all.header().map_or(now, etcd_client::ResponseHeader::revision);
            Mirror::listed(all.kvs(), &self.config.prefix, revision)
        };
        self.set_right(&mut kv, &mut fresh, &before, past).await?;
        let options = WatchOptions::new().with_prefix().with_start_revision(fresh.complete + 1).with_progress_notify();
        let mut watch = timeout(OPERATION, client.watch(format!("{}/", self.config.prefix), Some(options)))
            .await
            .map_err(|_| Ended::Silent)??;
        self.connected(&mut kv, fresh, cluster).await?;

        let (mut tick, mut spoken) = (interval(PROBE), Instant::now());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut settled_at, mut kept_at) = (None, Instant::now());
        loop {
            let settling = self.state.lock().mirror.settling();
            settled_at = settling.then(|| settled_at.unwrap_or_else(|| Instant::now() + self.newcomers_wait));
            tokio::select! {
                message = watch.message() => {
                    let message = message?.ok_or_else(|| Ended::WatchOver("without a reason".into()))?;
                    spoken = Instant::now();
                    self.take(&message)?;
                }
                _ = tick.tick() => {
                    let alive = self.read(&mut kv, Entry::Identity.path(), None).await?;
                    self.state.lock().heard(alive.header());
                    if kept_at.elapsed() >= KEEP_CONTACT {
                        kept_at = Instant::now();
                        self.news.send_modify(|n| *n += 1);
                    }
                    if spoken.elapsed() >= WATCH_SILENCE {
                        return Err(Ended::WatchSilent);
                    }
                    watch.request_progress().await?;
                }
                () = sleep_until(settled_at.unwrap_or_else(Instant::now)), if settled_at.is_some() => {
                    self.transact(|mirror| Ok(plan::settle(mirror, false))).await.map_err(|_| Ended::Lost)?;
                    tracing::info!("newcomers are numbered again");
                }
                () = self.lost.notified() => return Err(Ended::Lost),
            }
        }
    }

    async fn read(
        &self,
        kv: &mut KvClient,
        path: String,
        options: Option<GetOptions>,
    ) -> Result<etcd_client::GetResponse, Ended> {
        let key = format!("{}/{path}", self.config.prefix);
        Ok(timeout(OPERATION, kv.get(key, options)).await.map_err(|_| Ended::Silent)??)
    }

    /// The mirror as good as new, and what was done without etcd told to it; then it is in force.
    async fn connected(&self, kv: &mut KvClient, mut fresh: Mirror, cluster: u64) -> Result<(), Ended> {
        loop {
            let pending = {
                let mut state = self.state.lock();
                if state.pending.is_empty() {
                    (state.mirror, state.offline, state.client) = (fresh, None, Some(kv.clone()));
                    state.session += 1;
                    let store = state.mirror.identity.as_ref().map_or_else(String::new, |identity| identity.id.clone());
                    state.reached = Reached { cluster, revision: state.mirror.complete, store };
                    if std::mem::replace(&mut state.live, true) {
                        self.reconnects.inc();
                    }
                    state.heard(None);
                    self.publish(&state);
                    self.connected.send_replace(true);
                    tracing::info!(
                        etcd = self.config.shown(),
                        revision = state.mirror.base.revision,
                        "etcd is in reach"
                    );
                    return Ok(());
                }
                state.pending.clone()
            };
            for ((kind, name), todo) in pending {
                match &todo {
                    Pending::Claim(claim) => {
                        let number = self.transact_on(kv, &mut fresh, |m| plan::claim(m, claim)).await;
                        match number {
                            Ok(number) if Some(number) == claim.held => {}
                            Ok(_) | Err(Ended::Refused(_)) => {
                                let number = claim.held;
                                tracing::error!(name, number, "what it kept while etcd was away is another's number");
                            }
                            Err(ended) => return Err(ended),
                        }
                    }
                    Pending::Release(incarnation) => {
                        self.transact_on(kv, &mut fresh, |m| Ok(plan::release(m, kind, &name, *incarnation))).await?;
                    }
                }
                let mut state = self.state.lock();
                let key = (kind, name);
                // It may have changed its mind meanwhile.
                if state.pending.get(&key) == Some(&todo) {
                    state.pending.remove(&key);
                }
            }
        }
    }

    /// Sees whose store it is; fills an empty one, and gives back what one that went back in time has lost.
    async fn set_right(&self, kv: &mut KvClient, fresh: &mut Mirror, before: &Before, past: Past) -> Result<(), Ended> {
        // What only a snapshot says may be long out of date.
        let claims = if before.live { before.claims.clone() } else { before.claims.clone().doubted() };
        let seen = Arc::clone(&self.records.borrow());
        if fresh.is_empty_store() {
            let identity = Identity {
                format: FORMAT,
                fleet: hex::encode(self.owner.fleet),
                region: self.owner.region.clone(),
                id: hex::encode(rand::random::<[u8; 8]>()),
                settling: true,
            };
            for step in plan::fill(fresh, &identity, &seen, &claims) {
                self.once(kv, fresh, step).await?;
            }
            tracing::warn!(
                etcd = self.config.shown(),
                regions = seen.regions.len(),
                agents = seen.agents.len(),
                keys = seen.keys.len(),
                "the store was empty and has what this router knew; newcomers are numbered in {} s",
                self.newcomers_wait.as_secs(),
            );
        }
        self.check(fresh)?;
        if past != Past::Kept {
            // Whoever made it anew knew no less than we do; an earlier state of itself knows less.
            let win = past == Past::WentBack && before.live;
            let steps = plan::missing(fresh, &claims, win);
            if !steps.is_empty() {
                self.transact_on(kv, fresh, |mirror| Ok(plan::settle(mirror, true))).await?;
            }
            for step in steps {
                self.once(kv, fresh, step).await?;
            }
        }
        self.transact_on(kv, fresh, |mirror| Ok(plan::raise(mirror, &seen))).await?;
        while !self.transact_on(kv, fresh, |mirror| Ok(plan::spread(mirror))).await? {}
        Ok(())
    }

    /// Whether the store is of this fleet and region, in a format that we know.
    fn check(&self, mirror: &Mirror) -> Result<(), Ended> {
        let Some(identity) = &mirror.identity else {
            return Err(Ended::Foreign("who it belongs to cannot be read".into()));
        };
        let problem = if identity.format > FORMAT {
            format!("it has format {}, this router knows {FORMAT} and older", identity.format)
        } else if identity.region != self.owner.region {
            format!("it is of region {}", identity.region)
        } else if identity.fleet != hex::encode(self.owner.fleet) {
            "it is of a fleet with another trust anchor".into()
        } else {
            return Ok(());
        };
        Err(Ended::Foreign(problem))
    }

    async fn transact_on<T>(
        &self,
        kv: &mut KvClient,
        mirror: &mut Mirror,
        plan: impl Fn(&Mirror) -> Result<Step<T>, StoreError>,
    ) -> Result<T, Ended> {
        for _ in 0..ATTEMPTS {
            let step = plan(mirror).map_err(Ended::Refused)?;
            if self.attempt(kv, mirror, &step).await? {
                return Ok(step.outcome);
            }
        }
        Err(Ended::Overtaken)
    }

    async fn once<T>(&self, kv: &mut KvClient, mirror: &mut Mirror, step: Step<T>) -> Result<(), Ended> {
        if self.attempt(kv, mirror, &step).await? { Ok(()) } else { Err(Ended::Overtaken) }
    }

    async fn attempt<T>(&self, kv: &mut KvClient, mirror: &mut Mirror, step: &Step<T>) -> Result<bool, Ended> {
        if step.writes.is_empty() {
            return Ok(true);
        }
        let transaction = mirror.transaction(step, &self.config.prefix);
        let answer = timeout(OPERATION, kv.txn(transaction)).await.map_err(|_| Ended::Silent)??;
        match mirror.transacted(step, &answer, &self.config.prefix) {
            Done::Yes => Ok(true),
            Done::No => Ok(false),
            Done::Emptied => Err(Ended::Overtaken),
        }
    }

    /// Takes what the watch tells.
    fn take(&self, response: &WatchResponse) -> Result<(), Ended> {
        if response.compact_revision() > 0 {
            return Err(Ended::Compacted);
        }
        if response.canceled() {
            return Err(Ended::WatchOver(response.cancel_reason().to_owned()));
        }
        let mut state = self.state.lock();
        state.heard(response.header());
        if response.events().is_empty() {
            return Ok(());
        }
        // A store that loses its identity was wiped, as it seems: what else goes with it stays in force here.
        let mut next = state.mirror.identity.clone();
        for event in response.events() {
            let of_identity =
                event.kv().is_some_and(|kv| kv.key() == format!("{}/store", self.config.prefix).as_bytes());
            if of_identity && event.event_type() == etcd_client::EventType::Delete {
                next = None;
            }
        }
        if next.is_none() {
            return Err(Ended::Emptied);
        }
        state.mirror.watched(response, &self.config.prefix);
        self.check(&state.mirror)?;
        self.publish(&state);
        Ok(())
    }
}

impl Before {
    /// What the store that is there now has been through since.
    fn past(&self, cluster: u64, revision: i64, there: &Mirror) -> Past {
        let Reached { cluster: before, revision: reached, store } = &self.reached;
        if *reached == 0 {
            return Past::Kept;
        }
        match &there.identity {
            Some(identity) if identity.id != *store => Past::Replaced,
            Some(_) if cluster != *before || revision < *reached => Past::WentBack,
            Some(_) => Past::Kept,
            None => Past::Replaced,
        }
    }
}

/// 100 ms doubling to 2 s, spread, so that routers do not return in step.
fn backoff(failures: u32) -> Duration {
    let longest = Duration::from_millis(100 << failures.min(5)).min(Duration::from_secs(2));
    longest.mul_f64(rand::random_range(0.5..1.0))
}

/// How often etcd is asked whether it is there.
const PROBE: Duration = Duration::from_secs(2);
/// A watch that does not say even that nothing happened, although it is asked.
const WATCH_SILENCE: Duration = Duration::from_secs(10);
/// How often the snapshot learns that etcd is still there.
const KEEP_CONTACT: Duration = Duration::from_secs(60);
/// How often the log says that etcd is away.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// Far above what a region has; etcd itself holds a few gigabytes.
const LARGEST_ANSWER: usize = 256 << 20;
