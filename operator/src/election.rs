//! Leader election with a `coordination.k8s.io` Lease.
//!
//! Who may take a lease is decided by what this process has seen on its own clock: a Lease that did not change for its
//! whole duration is nobody's, whatever times are written in it. Every change is a replacement of the version that was
//! read, so of two who try one succeeds. `leaseTransitions` grows with each holder: the fencing token.
//!
//! The holder stops writing earlier than anybody else can begin: [`Timing::hold`] after it *sent* its last successful
//! renewal, while others wait [`Timing::lease`] after they *saw* it.

use std::time::Duration;

use anyhow::bail;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{Api, api::PostParams, core::ObjectMeta};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::fence::Fence;

/// How long what takes.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A Lease that did not change for so long is free.
    pub lease: Duration,
    /// How long the holder writes after its last renewal.
    pub hold: Duration,
    /// How often it renews, and how often others look.
    pub renew: Duration,
    /// How long a Lease has to be absent before a newcomer makes it: if it was deleted by hand, the holder, who renews
    /// more often, has it back before that.
    pub absent: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(10),
            hold: Duration::from_secs(8),
            renew: Duration::from_secs(2),
            absent: Duration::from_secs(3),
        }
    }
}

/// One candidate.
#[derive(Debug)]
pub struct Elector {
    api: Api<Lease>,
    name: String,
    identity: String,
    timing: Timing,
    /// The version that was seen last, and when first; `None` stands for no Lease.
    seen: Option<(Option<String>, Instant)>,
    /// Whether a Lease was ever seen, and how many holders the last one had had.
    met: bool,
    transitions: i32,
    /// As this process wrote it last.
    held: Option<Lease>,
}

/// How an attempt went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// This process holds the lease; the number of holders before it.
    Leader(i32),
    /// Another one does, or nobody yet.
    Follower(Option<String>),
}

impl Elector {
    /// A candidate under a name that no other one has.
    #[must_use]
    pub fn new(api: Api<Lease>, name: String, identity: String, timing: Timing) -> Self {
        Self { api, name, identity, timing, seen: None, met: false, transitions: 0, held: None }
    }

    /// Waits until this process holds the lease and opens the fence; the fencing token. Trouble with the API server is
    /// logged and waited out.
    pub async fn acquire(&mut self, fence: &Fence) -> i32 {
        let mut last = None;
        loop {
            let began = Instant::now();
            match self.attempt(self.timing.hold).await {
                Ok(Standing::Leader(token)) => {
                    fence.open_until(began + self.timing.hold);
                    return token;
                }
                Ok(Standing::Follower(holder)) => {
                    if last.as_ref() != Some(&holder) {
                        tracing::info!(holder = holder.as_deref().unwrap_or("nobody"), "waiting for the lease");
                    }
                    last = Some(holder);
                }
                Err(problem) => tracing::warn!(problem, "the lease cannot be read or taken"),
            }
            sleep(self.timing.renew).await;
        }
    }

    /// One attempt that ends in time.
    async fn attempt(&mut self, limit: Duration) -> Result<Standing, String> {
        match timeout(limit, self.step()).await {
            Ok(outcome) => outcome.map_err(|error| error.to_string()),
            Err(_elapsed) => Err("the API server does not answer".to_owned()),
        }
    }

    /// Renews the lease until the stop and gives it back then.
    ///
    /// # Errors
    /// It is lost: the process has to end. The fence is closed.
    pub async fn hold(mut self, fence: Fence, stopping: CancellationToken) -> anyhow::Result<()> {
        let mut until = Instant::now() + self.timing.hold;
        let mut pause = self.timing.renew;
        let outcome = loop {
            tokio::select! {
                () = stopping.cancelled() => break Ok(()),
                () = sleep(pause) => {}
            }
            let began = Instant::now();
            match self.attempt(until.saturating_duration_since(began)).await {
                Ok(Standing::Leader(_)) => {
                    until = began + self.timing.hold;
                    fence.open_until(until);
                    pause = self.timing.renew;
                }
                Ok(Standing::Follower(holder)) => {
                    break Err(format!("the lease is {}'s now", holder.as_deref().unwrap_or("nobody")));
                }
                Err(problem) if Instant::now() < until => {
                    tracing::warn!(problem, "the lease could not be renewed");
                    pause = RETRY;
                }
                Err(problem) => break Err(format!("the lease could not be renewed in time: {problem}")),
            }
        };
        fence.close();
        match outcome {
            Ok(()) => {
                // Best effort: others take a lease that nobody gives back, only later.
                if let Ok(Err(error)) = timeout(RELEASE, self.release()).await {
                    tracing::warn!(%error, "the lease could not be given back");
                }
                Ok(())
            }
            Err(lost) => bail!("{lost}"),
        }
    }

    /// One attempt to take or renew the lease.
    ///
    /// # Errors
    /// The API server refuses or cannot be reached; then nothing is known.
    pub async fn step(&mut self) -> Result<Standing, kube::Error> {
        // The usual renewal is one request. It fails if anything at all changed the Lease.
        if let Some(held) = self.held.clone()
            && let Some(standing) = self.replace(held).await?
        {
            return Ok(standing);
        }
        let Some(lease) = self.api.get_opt(&self.name).await? else {
            return self.create().await;
        };
        self.met = true;
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.unwrap_or_default();
        let unchanged_for = self.unchanged_for(lease.metadata.resource_version.clone());
        if holder != self.identity && !holder.is_empty() && unchanged_for < self.timing.lease {
            self.held = None;
            return Ok(Standing::Follower(Some(holder)));
        }
        Ok(self.replace(lease).await?.unwrap_or(Standing::Follower(None)))
    }

    /// Nobody has it. A newcomer gives a holder whose Lease was deleted the time to make it again.
    async fn create(&mut self) -> Result<Standing, kube::Error> {
        let absent_for = self.unchanged_for(None);
        let wait = if self.met { self.timing.lease } else { self.timing.absent };
        if self.held.is_none() && absent_for < wait {
            return Ok(Standing::Follower(None));
        }
        let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
        let lease = Lease { metadata, spec: Some(self.spec(self.transitions + i32::from(self.met), None)) };
        match self.api.create(&PostParams::default(), &lease).await {
            Ok(created) => Ok(self.took(created)),
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                self.held = None;
                Ok(Standing::Follower(None))
            }
            Err(error) => Err(error),
        }
    }

    /// Writes the lease over the version that was read; `None` if that version is no longer there.
    async fn replace(&mut self, mut lease: Lease) -> Result<Option<Standing>, kube::Error> {
        let spec = lease.spec.take().unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or(0);
        // What is held goes on; also a renewal whose answer was lost.
        let goes_on = self.held.is_some() && spec.holder_identity.as_ref() == Some(&self.identity);
        lease.spec = Some(match goes_on {
            true => self.spec(transitions, spec.acquire_time),
            false => self.spec(transitions.saturating_add(1), None),
        });
        match self.api.replace(&self.name, &PostParams::default(), &lease).await {
            Ok(stored) => Ok(Some(self.took(stored))),
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn took(&mut self, stored: Lease) -> Standing {
        self.met = true;
        self.transitions = stored.spec.as_ref().and_then(|spec| spec.lease_transitions).unwrap_or(0);
        self.held = Some(stored);
        Standing::Leader(self.transitions)
    }

    /// For how long this process has seen this version, and no other one.
    fn unchanged_for(&mut self, version: Option<String>) -> Duration {
        let now = Instant::now();
        match &self.seen {
            Some((seen, since)) if *seen == version => now - *since,
            _ => {
                self.seen = Some((version, now));
                Duration::ZERO
            }
        }
    }

    /// Leaves the lease to nobody, so that the next one need not wait.
    async fn release(&mut self) -> Result<(), kube::Error> {
        let Some(mut lease) = self.held.take() else {
            return Ok(());
        };
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(String::new());
            spec.renew_time = Some(MicroTime(Timestamp::now()));
        }
        self.api.replace(&self.name, &PostParams::default(), &lease).await.map(drop)
    }

    fn spec(&self, transitions: i32, acquired: Option<MicroTime>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.timing.lease.as_secs()).ok(),
            acquire_time: Some(acquired.unwrap_or_else(|| now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }
}

const RETRY: Duration = Duration::from_millis(500);
const RELEASE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests;
