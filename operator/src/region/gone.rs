//! Relays and workers that are gone for good: routers keep their routes until somebody who knows says so.
//!
//! Two things have to be true: the router has lost the process's stream, and its pod has ended or is not there any more,
//! by the API server's own word and not by the cache's alone.

use std::collections::BTreeSet;

use antiphon_crds::VoiceRegion;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt as _};
use parking_lot::Mutex;

use crate::{Context, Error, links::View};

/// Whom routers were told of already: region, name and incarnation.
pub(super) type Told = Mutex<BTreeSet<(String, String, u32)>>;

/// Whether a pod is on its way out or has ended.
pub(super) fn is_ending(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some() || has_ended(pod)
}

/// Whether nothing runs in a pod any more and nothing will.
fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

/// A process that its router has lost.
#[derive(Debug, PartialEq, Eq)]
struct Lost {
    namespace: String,
    name: String,
    incarnation: u32,
    relay: bool,
}

/// Processes of a region that its routers know and are not connected to.
fn lost(view: &View, namespace: &str) -> Vec<Lost> {
    let Some(local) = view.local() else {
        return Vec::new();
    };
    let relays = local.relays.iter().filter(|relay| !relay.connected).map(|relay| Lost {
        namespace: namespace.to_owned(),
        name: relay.name.clone(),
        incarnation: 0,
        relay: true,
    });
    let workers = local.workers.iter().filter(|worker| !worker.connected).filter_map(|worker| {
        let (namespace, _) = worker.agent.split_once('/')?;
        let (namespace, name) = (namespace.to_owned(), worker.name.clone());
        Some(Lost { namespace, name, incarnation: worker.incarnation, relay: false })
    });
    relays.chain(workers).collect()
}

/// Tells a region's routers who of those that they miss is gone.
pub(super) async fn report(told: &Told, region: &VoiceRegion, view: &View, context: &Context) -> Result<(), Error> {
    let name = region.name_any();
    let lost = lost(view, &context.config.namespace);
    // Whom they do not miss any more may be missed again.
    told.lock().retain(|(of, process, _)| *of != name || lost.iter().any(|lost| lost.name == *process));
    for lost in lost {
        let key = (name.clone(), lost.name.clone(), lost.incarnation);
        if told.lock().contains(&key) {
            continue;
        }
        if let Some(pod) = context.caches.pods.find(&lost.namespace, &lost.name)
            && !has_ended(&pod)
        {
            continue;
        }
        let pods: Api<Pod> = Api::namespaced(context.client.clone(), &lost.namespace);
        if pods.get_opt(&lost.name).await?.is_some_and(|pod| !has_ended(&pod)) {
            continue;
        }
        let known = match lost.relay {
            true => context.links.report_relay_gone(&name, &lost.name).await?,
            false => context.links.report_worker_gone(&name, &lost.name, lost.incarnation).await?,
        };
        told.lock().insert(key);
        if known {
            let what = if lost.relay { "relay" } else { "worker" };
            let note = format!("{what} {}/{} is gone: its routes are taken out", lost.namespace, lost.name);
            tracing::info!(region = name, process = lost.name, "{what} is gone");
            context.events.normal(region, if lost.relay { "RelayGone" } else { "WorkerGone" }, "Report", note).await;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use antiphon_proto::v1::{FleetStatusResponse, RegionStatus, RelayStatus, WorkerStatus};

    use super::*;

    #[test]
    fn only_those_that_a_router_misses_are_looked_for() {
        let worker = |name: &str, connected| WorkerStatus {
            name: name.into(),
            agent: "shop/frontdesk".into(),
            incarnation: 7,
            connected,
            ..WorkerStatus::default()
        };
        let local = RegionStatus {
            local: true,
            workers: vec![worker("here", true), worker("lost", false)],
            relays: vec![RelayStatus { name: "r".into(), ..RelayStatus::default() }],
            ..RegionStatus::default()
        };
        let status = FleetStatusResponse { regions: vec![local], ..FleetStatusResponse::default() };
        let view = View { status: Some(Arc::new(status)), ..View::default() };
        let found = lost(&view, "antiphon-system");
        let names: Vec<_> =
            found.iter().map(|lost| (lost.namespace.as_str(), lost.name.as_str(), lost.relay)).collect();
        assert_eq!(names, [("antiphon-system", "r", true), ("shop", "lost", false)]);
    }
}
