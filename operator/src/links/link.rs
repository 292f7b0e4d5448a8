//! One region's connection, over and over.

use std::{sync::Arc, time::Duration};

use antiphon_proto::v1::{WatchFleetRequest, admin_client::AdminClient};
use antiphon_runtime::{pki::Role, tls};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Streaming, transport::Channel};

use super::{ANSWER, Region, Shared};
use crate::records::{Present, Records};

/// Connects and connects again until the region is forgotten or the process stops.
pub(super) async fn run(shared: Arc<Shared>, region: Arc<Region>) -> anyhow::Result<()> {
    let (mut attempt, mut failures) = (0_usize, 0_u32);
    let mut wanted = region.wanted.subscribe();
    loop {
        let found = wanted.borrow_and_update().routers.clone();
        let outcome = tokio::select! {
            () = region.stop.cancelled() => return Ok(()),
            outcome = connect(&shared, &region, &found, attempt) => outcome,
        };
        region.client.lock().take();
        attempt = attempt.wrapping_add(1);
        failures = match outcome {
            Outcome::Never(_) => failures.saturating_add(1),
            Outcome::Lost(_) | Outcome::Left => 1,
        };
        if let Outcome::Never(problem) | Outcome::Lost(problem) = outcome {
            let known = region.view.lock().problem == problem;
            if !known {
                tracing::info!(region = region.name, problem, "no connection to a router");
                shared.change(&region, |view| {
                    view.connected = false;
                    view.problem = problem;
                });
            }
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << failures.min(5)).min(LONGEST_PAUSE);
        tokio::select! {
            () = region.stop.cancelled() => return Ok(()),
            () = sleep(pause) => {}
            Ok(()) = wanted.changed() => failures = 0,
        }
    }
}

/// How a connection ended.
enum Outcome {
    /// It did not come about.
    Never(String),
    /// It was there.
    Lost(String),
    /// Its router is to be left.
    Left,
}

async fn connect(shared: &Shared, region: &Region, routers: &[String], attempt: usize) -> Outcome {
    let Some(address) = routers.get(attempt % routers.len().max(1)) else {
        // Until there is one.
        return match region.wanted.subscribe().wait_for(|wanted| !wanted.routers.is_empty()).await {
            Ok(_) => Outcome::Left,
            Err(_) => Outcome::Never("no router runs".to_owned()),
        };
    };
    let at = |problem: String| format!("router at {address}: {problem}");
    let channel = match shared.credentials.identity() {
        Ok(identity) => tls::channel(address, &identity, Role::Router, &region.name).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let mut client = match channel {
        Ok(channel) => AdminClient::new(channel).max_decoding_message_size(LARGEST_STATUS),
        Err(problem) => return Outcome::Never(at(problem)),
    };
    match timeout(ANSWER, client.watch_fleet(WatchFleetRequest {})).await {
        Err(_elapsed) => Outcome::Never(at("no answer".to_owned())),
        Ok(Err(status)) => Outcome::Never(at(status.message().to_owned())),
        Ok(Ok(stream)) => {
            *region.client.lock() = Some(client.clone());
            let link =
                Link { shared, region, client, stored: None, hash: None, odd: 0, retry: None, heard_once: false };
            link.follow(stream.into_inner(), address).await
        }
    }
}

/// A connection that is there.
struct Link<'a> {
    shared: &'a Shared,
    region: &'a Region,
    client: AdminClient<Channel>,
    /// What the store has, as far as this connection knows.
    stored: Option<Arc<Records>>,
    /// What the router called it after it was written.
    hash: Option<String>,
    /// How often in a row it called it something else.
    odd: u32,
    /// When records that were refused are offered again.
    retry: Option<Instant>,
    /// Whether it has said what it has; what should not be there is known only then.
    heard_once: bool,
}

impl Link<'_> {
    async fn follow(
        mut self,
        mut stream: Streaming<antiphon_proto::v1::FleetStatusResponse>,
        address: &str,
    ) -> Outcome {
        let mut wanted = self.region.wanted.subscribe();
        wanted.mark_changed();
        loop {
            let retry = self.retry;
            tokio::select! {
                message = stream.message() => match message {
                    Ok(Some(status)) => self.heard(status),
                    Ok(None) => return Outcome::Lost(format!("router at {address} ended the connection")),
                    Err(status) => return Outcome::Lost(format!("router at {address}: {}", status.message())),
                },
                Ok(()) = wanted.changed() => {}
                () = at(retry) => self.retry = None,
            }
            let now = wanted.borrow_and_update().clone();
            if !now.routers.iter().any(|router| router == address) {
                return Outcome::Left;
            }
            if let Some(records) = now.records
                && self.heard_once
                && self.stored.as_ref() != Some(&records)
                && self.retry.is_none()
            {
                self.write(records).await;
            }
        }
    }

    fn heard(&mut self, status: antiphon_proto::v1::FleetStatusResponse) {
        self.heard_once = true;
        // Another router may say so a moment before it has heard of a change; the second time it is a fact.
        let differs = self.hash.as_ref().is_some_and(|hash| *hash != status.records_hash);
        self.odd = if differs { self.odd + 1 } else { 0 };
        if self.odd > 1 {
            tracing::info!(
                region = self.region.name,
                "the store's records are not those that were written: writing them again"
            );
            (self.stored, self.hash, self.odd) = (None, None, 0);
        }
        let refused = self.retry.is_some();
        self.shared.change(self.region, |view| {
            view.status = Some(Arc::new(status));
            view.heard = Some(Instant::now());
            view.connected = true;
            if !refused {
                view.problem.clear();
            }
        });
    }

    async fn write(&mut self, records: Arc<Records>) {
        match self.try_write(&records).await {
            Ok(hash) => {
                (self.hash, self.odd, self.stored) = (Some(hash), 0, Some(records.clone()));
                self.shared.change(self.region, |view| {
                    view.applied = Some(records);
                    view.problem.clear();
                });
            }
            Err(problem) => {
                tracing::warn!(region = self.region.name, problem, "records could not be written");
                self.retry = Some(Instant::now() + RETRY);
                self.shared.change(self.region, |view| view.problem = format!("records: {problem}"));
            }
        }
    }

    /// Writes what has changed since the last time; everything at first. Returns what the router calls the result.
    async fn try_write(&mut self, records: &Records) -> Result<String, String> {
        let said = |status: tonic::Status| status.message().to_owned();
        let late = |_elapsed| "no answer".to_owned();
        let mut present = Present::default();
        if self.stored.is_none() {
            let keys = timeout(ANSWER, self.client.list_keys(antiphon_proto::v1::ListKeysRequest {})).await;
            present.keys = keys.map_err(late)?.map_err(said)?.into_inner().keys.into_iter().map(|key| key.id).collect();
            let status = self.region.view.lock().status.clone();
            let digests = status.iter().flat_map(|status| &status.regions).filter_map(|region| region.digest.as_ref());
            present.regions = digests.map(|digest| digest.region.clone()).collect();
        }
        let mut hash = self.hash.clone().unwrap_or_default();
        for request in records.changes(self.stored.as_deref(), &present) {
            self.shared.fence.check().map_err(|fenced| fenced.to_string())?;
            // Some of it may have been written if this fails.
            let applied = timeout(ANSWER, self.client.apply(request)).await;
            match applied.map_err(late).and_then(|applied| applied.map_err(said)) {
                Ok(applied) => hash = applied.into_inner().records_hash,
                Err(problem) => {
                    self.stored = None;
                    return Err(problem);
                }
            }
        }
        Ok(hash)
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
const RETRY: Duration = Duration::from_secs(3);
/// A region of ten thousand workers says a few megabytes.
const LARGEST_STATUS: usize = 64 << 20;
