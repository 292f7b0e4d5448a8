//! Keeps the records of this cluster's regions what the resources say.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt as _;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{AgentRecords, Sources};
use crate::{Context, api_keys};

/// Fires when a resource changed that records are made of.
pub fn listen(context: &Context) -> Arc<Notify> {
    let changed = Arc::new(Notify::new());
    let notes = [(); 3].map(|()| changed.clone());
    let [regions, agents, keys] = notes;
    context.caches.regions.on_change(move |_| regions.notify_one());
    context.caches.agents.on_change(move |_| agents.notify_one());
    context.caches.api_keys.on_change(move |_| keys.notify_one());
    changed
}

/// Works out the records after each change and hands them to the connections, until the stop.
///
/// # Errors
/// Never.
pub async fn keep(context: Arc<Context>, changed: Arc<Notify>, stopping: CancellationToken) -> anyhow::Result<()> {
    let mut keeper = Keeper { agents: AgentRecords::default(), warned: BTreeMap::new() };
    loop {
        keeper.update(&context).await;
        tokio::select! {
            () = stopping.cancelled() => return Ok(()),
            () = changed.notified() => {}
        }
        // What is applied together is written together.
        sleep(SETTLE).await;
    }
}

struct Keeper {
    agents: AgentRecords,
    /// Secrets that are no API keys and were said to be none: name and version.
    warned: BTreeMap<String, String>,
}

impl Keeper {
    async fn update(&mut self, context: &Context) {
        let config = &context.config;
        let regions = super::by_name(context.caches.regions.all());
        self.agents.update(&context.caches.agents.all());
        let secrets = context.caches.api_keys.all();
        let (keys, wrong) = api_keys::records(secrets.iter().map(Arc::as_ref));
        self.warn(context, &wrong).await;
        let records = Arc::new(super::compile(&Sources {
            regions: &regions,
            numbers: &super::numbers(&regions),
            agents: &self.agents,
            keys: &keys,
            namespace: &config.namespace,
            cluster: &config.cluster,
        }));
        for (name, region) in &regions {
            if region.spec.cluster == config.cluster && records.regions.contains_key(name) {
                context.links.set_records(name, records.clone());
            }
        }
    }

    async fn warn(&mut self, context: &Context, wrong: &[(&Secret, String)]) {
        let mut warned = BTreeMap::new();
        for (secret, problem) in wrong {
            let (name, version) = (secret.name_any(), secret.resource_version().unwrap_or_default());
            if self.warned.get(&name) != Some(&version) {
                tracing::warn!(secret = name, problem, "not an API key");
                context.events.warning(*secret, "NotAnApiKey", "Compile", problem.clone()).await;
            }
            warned.insert(name, version);
        }
        self.warned = warned;
    }
}

const SETTLE: Duration = Duration::from_millis(200);
