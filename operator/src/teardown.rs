//! Removes all of Antiphon's resources while the operator lives: it drains what they stand for and lets them go.
//!
//! Agents and Drains first, then regions: workers that still hold calls need their routers.

use std::time::Duration;

use antiphon_crds::{Drain, VoiceAgent, VoiceRegion, WorkerPool};
use anyhow::{Context as _, bail};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams},
};
use tokio::time::{Instant, sleep};

use crate::{apply::Owned, args::TeardownArgs};

/// Deletes everything and waits until it is gone.
///
/// # Errors
/// The API server refuses, or something is still there after the time that was given; it is named.
pub async fn run(client: Client, args: &TeardownArgs) -> anyhow::Result<()> {
    let client = &client;
    let deadline = Instant::now() + args.timeout;
    let home = vec![args.place.namespace.clone()];
    let mut everywhere = args.watch_namespace.clone();
    if !everywhere.is_empty() {
        everywhere.extend(home.clone());
        everywhere.sort();
        everywhere.dedup();
    }
    // A Drain that stays would hold up nothing, but nobody would ever take it back.
    remove::<Drain>(client, &everywhere, deadline).await?;
    remove::<VoiceAgent>(client, &everywhere, deadline).await?;
    // Those that somebody made by hand.
    remove::<WorkerPool>(client, &everywhere, deadline).await?;
    remove::<VoiceRegion>(client, &home, deadline).await
}

async fn remove<K: Owned>(client: &Client, namespaces: &[String], deadline: Instant) -> anyhow::Result<()> {
    let kind = K::kind(&()).into_owned();
    let mut said = usize::MAX;
    loop {
        let objects = list::<K>(client, namespaces).await.with_context(|| format!("listing {kind}s"))?;
        if objects.is_empty() {
            tracing::info!(kind, "none is left");
            return Ok(());
        }
        for object in objects.iter().filter(|object| object.meta().deletion_timestamp.is_none()) {
            let api: Api<K> = Api::namespaced(client.clone(), &object.namespace().unwrap_or_default());
            match api.delete(&object.name_any(), &DeleteParams::background()).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                Err(error) => return Err(error).with_context(|| format!("deleting {kind} {}", object.name_any())),
            }
        }
        if objects.len() != said {
            said = objects.len();
            tracing::info!(kind, left = said, "drains and removes");
        }
        if Instant::now() >= deadline {
            let names: Vec<String> = objects
                .iter()
                .take(10)
                .map(|object| format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any()))
                .collect();
            bail!(
                "{said} {kind}s are still there, {} among them: calls go on, or no operator runs. Wait for longer with --timeout, or end the calls with a Drain of policy EndCalls",
                names.join(", ")
            );
        }
        sleep(PAUSE).await;
    }
}

/// A kind whose definition is gone has no objects.
async fn list<K: Owned>(client: &Client, namespaces: &[String]) -> Result<Vec<K>, kube::Error> {
    let apis: Vec<Api<K>> = match namespaces {
        [] => vec![Api::all(client.clone())],
        namespaces => namespaces.iter().map(|namespace| Api::namespaced(client.clone(), namespace)).collect(),
    };
    let mut objects = Vec::new();
    for api in apis {
        match api.list(&ListParams::default()).await {
            Ok(list) => objects.extend(list.items),
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(objects)
}

const PAUSE: Duration = Duration::from_secs(1);
