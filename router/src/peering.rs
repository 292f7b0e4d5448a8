//! Watching other regions: one stream per region, reopened for as long as the region has its record (invariant I11).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use antiphon_proto::v1::{WatchRegionRequest, peer_client::PeerClient};
use antiphon_runtime::{
    Tasks, cause,
    pki::{Identity, Role},
    tls::{self, TlsError},
};
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

use crate::fleet::{Fleet, unix_ms};

/// Channels to routers, made once per address.
#[derive(Debug)]
pub(crate) struct Peers {
    identity: Identity,
    channels: Mutex<BTreeMap<(String, String), Channel>>,
}

impl Peers {
    pub(crate) fn new(identity: &Identity) -> Self {
        Self { identity: identity.clone(), channels: Mutex::default() }
    }

    /// The channel to a region's router; its certificate has to name that region.
    pub(crate) fn channel(&self, region: &str, address: &str) -> Result<Channel, TlsError> {
        let mut channels = self.channels.lock();
        let key = (region.to_owned(), address.to_owned());
        if let Some(channel) = channels.get(&key) {
            return Ok(channel.clone());
        }
        if channels.len() >= MAX_CHANNELS {
            // Addresses that are no longer in use; those that are come back at once.
            channels.clear();
        }
        let channel = tls::channel(address, &self.identity, Role::Router, region)?;
        channels.insert(key, channel.clone());
        Ok(channel)
    }
}

/// Watches every region that has a record with an address, as records come and go.
pub(crate) async fn watch_all(fleet: Arc<Fleet>, tasks: Tasks) -> anyhow::Result<()> {
    let stopping = tasks.stopping();
    let mut topology = fleet.topology.subscribe();
    let mut watched: BTreeMap<(String, String), CancellationToken> = BTreeMap::new();
    loop {
        topology.borrow_and_update();
        let wanted = fleet.routers_to_watch();
        watched.retain(|peer, stop| {
            let keep = wanted.contains(peer);
            if !keep {
                stop.cancel();
            }
            keep
        });
        for (region, address) in wanted {
            let key = (region.clone(), address.clone());
            watched.entry(key).or_insert_with(|| {
                let stop = stopping.child_token();
                let watch = watch(Arc::clone(&fleet), region, address);
                let until = stop.clone();
                tasks.spawn("peer watch", async move {
                    until.run_until_cancelled(watch).await;
                    Ok(())
                });
                stop
            });
        }
        tokio::select! {
            changed = topology.changed() => changed?,
            () = stopping.cancelled() => return Ok(()),
        }
    }
}

async fn watch(fleet: Arc<Fleet>, region: String, address: String) {
    let (mut failures, mut heard) = (0_u32, false);
    loop {
        let error = match tls::channel(&address, &fleet.identity, Role::Router, &region) {
            Ok(channel) => listen(&fleet, &region, &address, channel, (&mut failures, &mut heard)).await,
            Err(error) => error.to_string(),
        };
        fleet.peer_lost(&region, &address);
        match (failures, heard) {
            (0, true) => tracing::warn!(region, address, error, "peer lost, its routes stay"),
            (0, false) => tracing::warn!(region, address, error, "peer is not reached yet, trying on"),
            _ => {}
        }
        failures += 1;
        let ceiling = LONGEST_PAUSE.min(SHORTEST_PAUSE * 2_u32.pow(failures.min(10)));
        // Drawn, so that regions that lost a third one do not come back in step.
        sleep(ceiling.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}

/// Takes updates until the stream breaks; says why it did. With the first one the failures before are over.
async fn listen(
    fleet: &Fleet,
    region: &str,
    address: &str,
    channel: Channel,
    (failures, heard): (&mut u32, &mut bool),
) -> String {
    let mut peer = PeerClient::new(channel).max_decoding_message_size(MAX_UPDATE_BYTES);
    let request = WatchRegionRequest { region: region.to_owned() };
    let late = || Status::deadline_exceeded("silent");
    let open = timeout(SILENCE, peer.watch_region(request)).await;
    let mut updates = match open.unwrap_or_else(|_| Err(late())) {
        Ok(response) => response.into_inner(),
        Err(status) => return cause::text(&status),
    };
    loop {
        let next = timeout(SILENCE, updates.message()).await;
        match next.unwrap_or_else(|_| Err(late())) {
            Ok(Some(update)) => {
                if std::mem::take(failures) > 0 {
                    tracing::info!(region, address, "peer is {}", if *heard { "back" } else { "reached" });
                }
                *heard = true;
                fleet.peer_reported(region, address, update, unix_ms());
            }
            Ok(None) => return "closed".to_owned(),
            Err(status) => return cause::text(&status),
        }
    }
}

/// Peers are heard at least every second; longer silence means that the stream is dead.
const SILENCE: Duration = Duration::from_secs(4);
/// Far more than routers in a fleet.
const MAX_CHANNELS: usize = 4096;
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A full table of 100,000 routes takes about 4 MB.
const MAX_UPDATE_BYTES: usize = 16 << 20;
