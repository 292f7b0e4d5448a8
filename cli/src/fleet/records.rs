//! The plan as the records that routers keep.

use antiphon_crds::compile::FleetPlan;
use antiphon_proto::v1::{ApplyRequest, KeyRecord};
use antiphon_records::{agent, region};

use super::Context;

pub(super) fn of(plan: &FleetPlan, context: &Context, keys: Vec<KeyRecord>) -> ApplyRequest {
    let routers = |name: &str| -> Vec<String> {
        context
            .routers
            .iter()
            .find(|router| router.region == name)
            .map(|router| router.internal.clone())
            .into_iter()
            .collect()
    };
    ApplyRequest {
        regions: plan.regions.iter().map(|plan| region(plan, routers(&plan.name))).collect(),
        agents: plan.agents.iter().map(agent).collect(),
        keys,
        // The generation of keys is no part of the manifests: `antiphon keys rotate` moves it.
        ..ApplyRequest::default()
    }
}
