//! VoiceRegions: routers and relays where this cluster builds the region, knowledge of it where another one does.

use std::sync::Arc;

use antiphon_runtime::Tasks;
use kube::{ResourceExt as _, runtime::controller::Action};

use crate::{Context, Error, controller, metrics::Kind};

/// Notes which regions have to be looked at when something changes.
pub fn listen(context: &Arc<Context>) {
    let queue = context.queues.regions.clone();
    context.caches.regions.on_change(move |region| queue.push_object(region));
}

/// Begins to reconcile.
pub fn start(context: &Arc<Context>, tasks: &Tasks) {
    let (cache, queue) = (context.caches.regions.clone(), context.queues.regions.clone());
    let stopping = tasks.stopping();
    let reconcile = |region: Arc<antiphon_crds::VoiceRegion>, _context: Arc<Context>| async move {
        tracing::debug!(region = region.name_any(), "region");
        Ok::<_, Error>(Action::await_change())
    };
    tasks.service("regions", controller::run(context.clone(), Kind::voice_region, cache, queue, reconcile, stopping));
}
