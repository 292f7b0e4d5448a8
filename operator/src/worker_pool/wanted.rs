//! What is wanted of a pool: what its agent, its region and whoever scales it say.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use antiphon_core::{
    pool::Policy,
    rollout::{RolloutPolicy, Strategy},
};
use antiphon_crds::{
    DrainPolicy, RolloutStrategy, VoiceAgent, VoiceRegion, WorkerPool,
    compile::{self, PoolLimits, WorkerTemplate},
};
use kube::{Resource as _, ResourceExt as _};

use super::observe::{Observed, pod_state, revision_of};
use crate::{
    Context, Error,
    error::Reason,
    pod_template::{self, PoolNames},
};

/// What is wanted, and what stands in the way.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) policy: Policy,
    /// What somebody asked for.
    pub(super) asked: u32,
    /// What bounds it; `None`: there are to be no workers at all.
    pub(super) limits: Option<PoolLimits>,
    /// Pods of the wanted revision are made from it.
    pub(super) template: Option<WorkerTemplate>,
    /// Whether the API server takes the template: `None` if it was not asked.
    pub(super) refused: Option<String>,
    /// `rollout.rollbackTo` names a revision that is not there.
    pub(super) unknown_revision: Option<String>,
    /// Why there are to be no workers.
    pub(super) nobody: Option<&'static str>,
    /// How long calls may go on where nothing else says so.
    pub(super) default_deadline: Duration,
    /// Node autoscalers may evict workers that hold calls.
    pub(super) safe_to_evict: bool,
}

impl Wanted {
    pub(super) async fn of(pool: &WorkerPool, names: &PoolNames<'_>, context: &Context, seen: &Observed) -> Self {
        let asked = pool.spec.replicas.unwrap_or(1);
        let agent = context.caches.agents.find(names.namespace, names.agent);
        let region = context.caches.regions.find(&context.config.namespace, names.region);
        let reason = nobody(pool, agent.as_deref(), region.as_deref(), &context.config.cluster);
        let Some(agent) = agent else { return Self::nothing(asked, reason) };
        let mut wanted = Self::by(&agent, region, names, asked, seen, &context.config.images.worker);
        if let Some(reason) = reason {
            wanted.policy.target = 0;
            wanted.nobody = Some(reason);
        }
        wanted.try_template(pool, names, context, seen).await;
        wanted
    }

    /// An agent that is gone takes its workers with it.
    fn nothing(asked: u32, nobody: Option<&'static str>) -> Self {
        Self {
            policy: Policy {
                target: 0,
                rollout: RolloutPolicy {
                    revision: String::new(),
                    strategy: Strategy::Auto,
                    max_surge: 1,
                    canary: None,
                    paused: false,
                },
                drain_deadline: DEFAULT_DEADLINE,
                history: 0,
            },
            asked,
            limits: None,
            template: None,
            refused: None,
            unknown_revision: None,
            nobody: nobody.or(Some("its VoiceAgent is gone")),
            default_deadline: DEFAULT_DEADLINE,
            safe_to_evict: false,
        }
    }

    fn by(
        agent: &VoiceAgent,
        region: Option<Arc<VoiceRegion>>,
        names: &PoolNames<'_>,
        asked: u32,
        seen: &Observed,
        image: &str,
    ) -> Self {
        let spec = &agent.spec;
        let regions: BTreeMap<String, Arc<VoiceRegion>> =
            region.into_iter().map(|region| (names.region.to_owned(), region)).collect();
        let planned = compile::plan_pools(agent, &regions).into_iter().find(|plan| plan.region == names.region);
        let limits = planned.map(|plan| plan.limits);
        let target = limits.map_or(0, |limits| limits.replicas_for(asked));
        let template = WorkerTemplate::of(spec, names.region, image);
        let newest = template.revision();
        let rollback = spec.rollout.rollback_to.clone().filter(|revision| *revision != newest);
        let known = rollback.as_ref().is_none_or(|revision| seen.set(revision).is_some());
        let revision = rollback.clone().filter(|_| known).unwrap_or_else(|| newest.clone());
        let deadline = match spec.disruption.policy {
            DrainPolicy::WaitForCalls => spec.disruption.deadline.duration(),
            DrainPolicy::EndCalls => Duration::ZERO,
        };
        let canary = spec.rollout.canary.as_ref().filter(|canary| canary.paused).map(|canary| canary.of(target));
        Self {
            policy: Policy {
                target,
                rollout: RolloutPolicy {
                    strategy: match spec.rollout.strategy {
                        RolloutStrategy::Auto => Strategy::Auto,
                        RolloutStrategy::SurgeFirst => Strategy::SurgeFirst,
                        RolloutStrategy::DrainFirst => Strategy::DrainFirst,
                    },
                    max_surge: spec.rollout.max_surge.of(target).max(1),
                    canary,
                    // Going back to what is not there would mean going on.
                    paused: spec.rollout.paused || !known,
                    revision: revision.clone(),
                },
                drain_deadline: deadline,
                history: spec.rollout.revision_history_limit as usize,
            },
            asked,
            limits,
            template: (revision == newest).then_some(template),
            refused: None,
            unknown_revision: rollback.filter(|_| !known),
            nobody: None,
            default_deadline: deadline,
            safe_to_evict: spec.disruption.safe_to_evict,
        }
    }

    /// A template that no pod has been made from yet is shown to the API server first. One that it refuses changes
    /// nothing: the pool stays as it is.
    async fn try_template(&mut self, pool: &WorkerPool, names: &PoolNames<'_>, context: &Context, seen: &Observed) {
        let Some(template) = &self.template else { return };
        if self.policy.target == 0 || seen.set(&self.policy.rollout.revision).is_some() {
            return;
        }
        let owner = pool.controller_owner_ref(&()).unwrap_or_default();
        let outcome = match pod_template::replica_set(names, template, owner, 0, &context.config) {
            Ok(set) => context.applier.dry_run(&set).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => {}
            Err(error) if matches!(error.reason(), Reason::invalid | Reason::spec | Reason::forbidden) => {
                self.refuse(&error, seen);
            }
            // It will be asked again, by the step that makes the ReplicaSet.
            Err(error) => tracing::debug!(%error, "a worker template could not be tried"),
        }
    }

    fn refuse(&mut self, error: &Error, seen: &Observed) {
        self.refused = Some(error.to_string());
        self.template = None;
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for pod in seen.pods.iter().filter(|pod| pod_state(pod) != antiphon_core::pool::PodState::Leaving) {
            *counts.entry(revision_of(pod.labels())).or_default() += 1;
        }
        match counts.into_iter().max_by_key(|(_, count)| *count) {
            Some((revision, _)) => self.policy.rollout.revision = revision.to_owned(),
            None => self.policy.target = 0,
        }
        self.policy.rollout.paused = true;
    }
}

fn nobody(
    pool: &WorkerPool,
    agent: Option<&VoiceAgent>,
    region: Option<&VoiceRegion>,
    cluster: &str,
) -> Option<&'static str> {
    let listed = |agent: &VoiceAgent| agent.spec.regions.iter().any(|region| region.name == pool.spec.region);
    if pool.metadata.deletion_timestamp.is_some() {
        return Some("it is being deleted");
    }
    match (agent, region) {
        (None, _) => Some("its VoiceAgent is gone"),
        (Some(agent), _) if agent.metadata.deletion_timestamp.is_some() => Some("its VoiceAgent is being deleted"),
        (Some(agent), _) if !listed(agent) => Some("its VoiceAgent does not name this region any more"),
        (_, None) => Some("its VoiceRegion is gone"),
        (_, Some(region)) if region.metadata.deletion_timestamp.is_some() => Some("its VoiceRegion is being deleted"),
        (_, Some(region)) if region.spec.cluster != cluster => Some("another cluster builds its VoiceRegion"),
        (Some(agent), _) if agent.spec.suspend => Some("its VoiceAgent is suspended"),
        _ => None,
    }
}

/// Of calls whose agent nobody can ask any more.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(900);
