//! Workers that have ended while their pods are still there. Of pods that are gone the region's controller tells routers.

use antiphon_core::pool::PodState;
use kube::ResourceExt as _;

use super::{
    Round,
    observe::{Observed, pod_state, runs},
};
use crate::Error;

/// Reports workers whose containers are not running, so that their callers learn it within a round trip, and deletes
/// pods that are finished and count for nobody.
pub(super) async fn report(round: &Round<'_>, seen: &Observed) -> Result<(), Error> {
    let context = round.context;
    for pod in &seen.pods {
        let name = pod.name_any();
        if let Some(worker) = seen.fleet.workers.get(&name).filter(|_| seen.fleet.connected)
            // A container that is started again leads another life, under another incarnation.
            && !worker.connected
            && worker.incarnation != 0
            && pod.status.is_some()
            && !runs(pod)
            && context.links.report_worker_gone(round.names.region, &name, worker.incarnation).await?
        {
            let note = format!("worker {name} is not running any more; it held {} calls", worker.active);
            context.events.warning(round.pool, "WorkerDied", "Report", note).await;
        }
        if pod_state(pod) == PodState::Leaving
            && pod.metadata.deletion_timestamp.is_none()
            && context.applier.delete(pod.as_ref()).await?
        {
            let why = pod.status.as_ref().and_then(|status| status.reason.clone()).unwrap_or_default();
            let note = format!("pod {name} had ended ({why}) and was removed; another one takes its place");
            context.events.normal(round.pool, "PodEnded", "Delete", note).await;
        }
    }
    Ok(())
}
