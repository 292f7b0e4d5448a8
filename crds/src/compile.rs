//! What a fleet consists of, worked out from its resources.
//!
//! The operator carries this plan out on Kubernetes, `antiphon up` on one machine; only the carrying out differs. No I/O,
//! no clock: the same resources always give the same plan.
//!
//! [`compile`] takes a whole fleet and refuses it if anything is wrong, as `antiphon up` wants it. On a cluster resources
//! come one by one and one that is wrong must not hold up the others: [`plan_regions`], [`plan_agent`], [`plan_pools`] and
//! [`check_agent`] are the same for one resource at a time.

mod worker;

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use kube::ResourceExt;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    Codec, DrainPolicy, EngineType, FieldError, RegionPool, Resource, Serving, Tunnel, VoiceAgent, VoiceAgentSpec,
    VoiceRegion, Workload, rules,
};
pub use worker::{WorkerTemplate, worker_revision};

/// All parts of a fleet, each list in order of its names.
#[derive(Clone, Debug, PartialEq)]
pub struct FleetPlan {
    /// The regions.
    pub regions: Vec<RegionPlan>,
    /// The agents.
    pub agents: Vec<AgentPlan>,
    /// The workers, by agent, then by region.
    pub pools: Vec<PoolPlan>,
}

/// A region and the parts that belong to no agent.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionPlan {
    /// Name, unique in the fleet.
    pub name: String,
    /// Number in connection IDs, 0..1023, unique in the fleet.
    pub number: u16,
    /// The cluster that builds it.
    pub cluster: String,
    /// The cloud it is in.
    pub cloud: String,
    /// Degrees north, -90..=90.
    pub latitude: f64,
    /// Degrees east, -180..=180.
    pub longitude: f64,
    /// Residency zones it lies in.
    pub residency: Vec<String>,
    /// Classes of GPU it offers.
    pub gpu_classes: Vec<String>,
    /// Whether it takes new calls.
    pub serving: Serving,
    /// How many relays it has.
    pub relays: u16,
    /// How many routers it has.
    pub routers: u16,
    /// Where routers of other clusters reach its routers, "HOST:PORT".
    pub router_addresses: Vec<String>,
    /// Other regions reach its workers through its relays only.
    pub via_relays: bool,
}

/// An agent and how its calls are placed.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentPlan {
    /// "namespace/name".
    pub agent: String,
    /// What its workers have to know.
    pub behaviour: BehaviourPlan,
    /// Where its calls may be placed, in the order of the resource; empty while it is suspended.
    pub regions: Vec<AgentRegionPlan>,
    /// Class of GPU its workers need.
    pub gpu_class: Option<String>,
    /// Round trip up to which a region is near enough.
    pub rtt_ceiling: Duration,
    /// Round trip that is always too far.
    pub rtt_ceiling_max: Duration,
    /// What callers may ask for.
    pub codecs: Vec<Codec>,
    /// Calls of one tenant at a time; `None`: no limit.
    pub sessions_per_tenant: Option<u32>,
    /// What becomes of the calls of a worker that is to go.
    pub drain_policy: DrainPolicy,
    /// How long a worker that is to go keeps its calls.
    pub drain_deadline: Duration,
    /// Takes no calls and has no workers.
    pub suspended: bool,
}

/// What a worker has to know of its agent. Calls keep the behaviour they began with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BehaviourPlan {
    /// Hash of everything below: ten hex digits.
    pub revision: String,
    /// The engine.
    pub engine: EngineType,
    /// What the engine does.
    pub workload: Workload,
    /// Quiet that ends the caller's turn.
    pub end_silence: Duration,
    /// Shorter sounds are no turn.
    pub min_speech: Duration,
    /// Whether the caller may interrupt.
    pub interruptible: bool,
    /// Longest duration of a call.
    pub longest_session: Duration,
    /// From the end of a turn to the first sound of the answer.
    pub latency_budget: Duration,
}

/// One region of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentRegionPlan {
    /// Name of the region.
    pub region: String,
    /// How much it is liked, 1..=1000.
    pub weight: u32,
}

/// The workers of one agent in one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolPlan {
    /// "namespace/name" of the agent.
    pub agent: String,
    /// Name of the region.
    pub region: String,
    /// How many workers there are as long as nobody asks for another number: see [`PoolLimits::replicas_for`].
    pub replicas: u32,
    /// Limits of the agent here.
    pub limits: PoolLimits,
    /// Calls one worker holds.
    pub slots: u32,
    /// Class of GPU a worker needs.
    pub gpu_class: Option<String>,
}

/// What bounds the number of workers of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolLimits {
    /// Never fewer than these are counted as asked for.
    pub min_replicas: u32,
    /// Never more than these.
    pub max_replicas: u32,
    /// Multiplies what is asked for, 0..=1000.
    pub capacity_percent: u16,
    /// The agent is suspended: there are none.
    pub suspended: bool,
}

/// The resources make no fleet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// A resource contradicts itself or another one.
    #[error("{resource}: {error}")]
    Invalid {
        /// Kind and name.
        resource: String,
        /// What is wrong.
        error: FieldError,
    },
    /// There is nothing to place calls in.
    #[error("no regions: add at least one VoiceRegion")]
    NoRegions,
    /// Callers could not reach any worker.
    #[error("no relays: raise spec.relay.replicas of a VoiceRegion")]
    NoRelays,
    /// More regions than connection IDs can tell apart.
    #[error("{0} regions: a fleet has at most 1024")]
    TooManyRegions(usize),
}

/// Works out the fleet that these resources describe. Says the first thing that is wrong; for all of them see
/// [`crate::manifest::parse`].
pub fn compile(resources: &[Resource]) -> Result<FleetPlan, CompileError> {
    let invalid = |resource: &Resource, error| {
        let resource = format!("{} {}", resource.kind(), resource.name());
        CompileError::Invalid { resource, error }
    };
    for resource in resources {
        if let Some(error) = resource.validate().into_iter().next() {
            return Err(invalid(resource, error));
        }
    }
    if let Some((index, error)) = rules::check_fleet(resources).into_iter().next() {
        return Err(invalid(&resources[index], error));
    }
    // Sorted by name, so that the order of files does not matter.
    let mut regions: BTreeMap<String, &VoiceRegion> = BTreeMap::new();
    let mut agents: BTreeMap<String, &VoiceAgent> = BTreeMap::new();
    for resource in resources {
        match resource {
            Resource::VoiceRegion(region) => drop(regions.insert(region.name_any(), region)),
            Resource::VoiceAgent(agent) => drop(agents.insert(agent.qualified_name(), agent)),
        }
    }
    if regions.is_empty() {
        return Err(CompileError::NoRegions);
    }
    if regions.values().all(|region| region.spec.relay.replicas == 0) {
        return Err(CompileError::NoRelays);
    }
    let pools = agents.values().flat_map(|agent| plan_pools(agent, &regions)).collect();
    let agents = agents.values().map(|agent| plan_agent(agent)).collect();
    Ok(FleetPlan { regions: plan_regions(&regions)?, agents, pools })
}

/// Name of the WorkerPool of an agent in a region.
pub fn pool_name(agent: &str, region: &str) -> String {
    format!("{agent}-{region}")
}

impl PoolLimits {
    /// Workers that there are to be if `asked` are asked for: those within the limits, times the region's capacity,
    /// rounded up, at most the largest number.
    pub fn replicas_for(&self, asked: u32) -> u32 {
        if self.suspended {
            return 0;
        }
        let asked = asked.max(self.min_replicas).min(self.max_replicas);
        let scaled = (u64::from(asked) * u64::from(self.capacity_percent)).div_ceil(100);
        u32::try_from(scaled).unwrap_or(u32::MAX).min(self.max_replicas)
    }
}

/// Everything about an agent that does not fit the regions of its fleet, by their names.
pub fn check_agent<R: Borrow<VoiceRegion>>(agent: &VoiceAgent, regions: &BTreeMap<String, R>) -> Vec<FieldError> {
    rules::check_regions(agent, regions)
}

/// The regions of a fleet, in order of their names. Those without a number get the lowest free ones. Fails only if there
/// are more regions than numbers.
pub fn plan_regions<R: Borrow<VoiceRegion>>(regions: &BTreeMap<String, R>) -> Result<Vec<RegionPlan>, CompileError> {
    if regions.len() > usize::from(REGION_NUMBERS) {
        return Err(CompileError::TooManyRegions(regions.len()));
    }
    let taken: BTreeSet<u16> = regions.values().filter_map(|region| region.borrow().spec.number).collect();
    let mut free = (0..REGION_NUMBERS).filter(|number| !taken.contains(number));
    let mut plans = Vec::with_capacity(regions.len());
    for (name, region) in regions {
        let spec = &region.borrow().spec;
        let number = spec.number.or_else(|| free.next());
        plans.push(RegionPlan {
            name: name.clone(),
            number: number.ok_or(CompileError::TooManyRegions(regions.len()))?,
            cluster: spec.cluster.clone(),
            cloud: spec.cloud.clone(),
            latitude: spec.location.latitude,
            longitude: spec.location.longitude,
            residency: spec.residency.clone(),
            gpu_classes: spec.gpu_classes.clone(),
            serving: spec.serving,
            relays: spec.relay.replicas,
            routers: spec.router.replicas,
            router_addresses: spec.router.addresses.clone(),
            via_relays: spec.tunnel == Tunnel::ViaRelays,
        });
    }
    Ok(plans)
}

/// One agent by itself.
pub fn plan_agent(agent: &VoiceAgent) -> AgentPlan {
    let spec = &agent.spec;
    let placeable = spec.regions.iter().filter(|_| !spec.suspend);
    AgentPlan {
        agent: agent.qualified_name(),
        behaviour: plan_behaviour(spec),
        regions: placeable
            .map(|region| AgentRegionPlan { region: region.name.clone(), weight: region.weight })
            .collect(),
        gpu_class: spec.worker.gpu_class.clone(),
        rtt_ceiling: spec.latency.rtt_ceiling.duration(),
        rtt_ceiling_max: spec.latency.rtt_ceiling_max.duration(),
        codecs: spec.codecs.clone(),
        sessions_per_tenant: spec.sessions.per_tenant,
        drain_policy: spec.disruption.policy,
        drain_deadline: spec.disruption.deadline.duration(),
        suspended: spec.suspend,
    }
}

fn plan_behaviour(spec: &VoiceAgentSpec) -> BehaviourPlan {
    BehaviourPlan {
        revision: behaviour_revision(spec),
        engine: spec.engine.engine_type,
        workload: spec.workload,
        end_silence: spec.turn_taking.end_silence.duration(),
        min_speech: spec.turn_taking.min_speech.duration(),
        interruptible: spec.turn_taking.interruptible,
        longest_session: spec.sessions.longest.duration(),
        latency_budget: spec.latency.budget.duration(),
    }
}

/// Revision of an agent's behaviour: ten hex digits, a hash of what a worker has to know of its agent and of nothing
/// that changes its pod.
pub fn behaviour_revision(spec: &VoiceAgentSpec) -> String {
    let latency_budget = spec.latency.budget;
    revision(&(spec.engine.engine_type, spec.workload, &spec.turn_taking, spec.sessions.longest, latency_budget))
}

fn revision(content: &impl Serialize) -> String {
    let json = serde_json::to_vec(content).expect("it is plain data");
    hex::encode(&Sha256::digest(json)[..5])
}

/// The pools of one agent, in order of their regions' names. A region that is not there has no capacity.
pub fn plan_pools<R: Borrow<VoiceRegion>>(agent: &VoiceAgent, regions: &BTreeMap<String, R>) -> Vec<PoolPlan> {
    let spec = &agent.spec;
    let plan = |pool: &RegionPool| {
        let limits = PoolLimits {
            min_replicas: pool.min_replicas,
            max_replicas: pool.max_replicas,
            capacity_percent: regions.get(&pool.name).map_or(0, |found| found.borrow().spec.capacity_percent),
            suspended: spec.suspend,
        };
        PoolPlan {
            agent: agent.qualified_name(),
            region: pool.name.clone(),
            replicas: limits.replicas_for(pool.min_replicas),
            limits,
            slots: spec.sessions.slots_per_worker,
            gpu_class: spec.worker.gpu_class.clone(),
        }
    };
    let mut pools: Vec<PoolPlan> = spec.regions.iter().map(plan).collect();
    pools.sort_by(|a, b| a.region.cmp(&b.region));
    pools
}

/// Region numbers have ten bits.
const REGION_NUMBERS: u16 = 1_024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    fn region(name: &str, extra: &str) -> String {
        format!(
            "apiVersion: antiphon.dev/v1alpha1\nkind: VoiceRegion\nmetadata: {{name: {name}}}\nspec:\n  cluster: c\n  cloud: nimbus\n  location: {{latitude: 1, longitude: 2}}\n{extra}"
        )
    }

    fn agent(regions: &str, extra: &str) -> String {
        format!(
            "apiVersion: antiphon.dev/v1alpha1\nkind: VoiceAgent\nmetadata: {{name: frontdesk}}\nspec:\n  engine: {{type: Echo}}\n  regions: {regions}\n{extra}"
        )
    }

    fn plan(documents: &[String]) -> FleetPlan {
        let text = documents.join("\n---\n");
        compile(&manifest::parse(&[("test.yaml", &text)]).unwrap()).unwrap()
    }

    #[test]
    fn regions_without_a_number_get_the_lowest_free_ones_by_name() {
        let documents = [region("c", ""), region("a", ""), region("b", "  number: 0"), region("d", "  number: 2")];
        let mut reversed = documents.to_vec();
        reversed.reverse();
        for documents in [documents.to_vec(), reversed] {
            let numbers: Vec<(String, u16)> =
                plan(&documents).regions.into_iter().map(|region| (region.name, region.number)).collect();
            let expected = [("a", 1), ("b", 0), ("c", 3), ("d", 2)];
            assert_eq!(numbers, expected.map(|(name, number)| (name.to_owned(), number)));
        }
    }

    #[test]
    fn workers_asked_for_are_held_within_limits_and_multiplied_by_capacity() {
        for (asked, min_replicas, max_replicas, capacity_percent, expected) in [
            (2, 2, 10, 100, 2),
            (0, 2, 10, 100, 2),
            (5, 2, 10, 100, 5),
            (11, 2, 10, 100, 10),
            (2, 2, 10, 0, 0),
            (2, 2, 10, 1, 1),
            (3, 0, 10, 50, 2),
            (2, 2, 10, 1_000, 10),
            (2, 2, 3, 200, 3),
            (0, 0, 10, 1_000, 0),
            (u32::MAX, 0, 10_000, 1_000, 10_000),
            // Two edits of one agent may cross: a limit is a limit.
            (5, 9, 3, 100, 3),
        ] {
            let limits = PoolLimits { min_replicas, max_replicas, capacity_percent, suspended: false };
            assert_eq!(limits.replicas_for(asked), expected, "{asked} {limits:?}");
            assert_eq!(PoolLimits { suspended: true, ..limits }.replicas_for(asked), 0);
        }
    }

    #[test]
    fn a_region_is_reached_directly_unless_it_says_otherwise() {
        let plan = plan(&[region("a", ""), region("b", "  tunnel: ViaRelays"), region("c", "  tunnel: Direct")]);
        let via: Vec<bool> = plan.regions.iter().map(|region| region.via_relays).collect();
        assert_eq!(via, [false, true, false]);
    }

    #[test]
    fn pools_follow_regions_and_suspension() {
        let regions = [region("b", "  capacityPercent: 200"), region("a", "")];
        let pools = "[{name: b, minReplicas: 2}, {name: a}]";
        let running = plan(&[&regions[..], &[agent(pools, "  sessions: {slotsPerWorker: 60}")]].concat());
        let found: Vec<(&str, u32, u32)> =
            running.pools.iter().map(|pool| (pool.region.as_str(), pool.replicas, pool.slots)).collect();
        assert_eq!(found, [("a", 1, 60), ("b", 4, 60)]);
        assert_eq!(running.agents[0].agent, "default/frontdesk");
        assert_eq!(running.agents[0].regions.len(), 2);

        let suspended = plan(&[&regions[..], &[agent(pools, "  suspend: true")]].concat());
        assert!(suspended.pools.iter().all(|pool| pool.replicas == 0));
        assert!(suspended.agents[0].suspended && suspended.agents[0].regions.is_empty());
    }

    #[test]
    fn revision_changes_with_behaviour_alone() {
        let revision = |pools: &str, extra: &str| {
            let plan = plan(&[region("a", ""), agent(pools, extra)]);
            plan.agents[0].behaviour.revision.clone()
        };
        let base = revision("[{name: a}]", "");
        assert_eq!(base.len(), 10);
        assert_eq!(base, revision("[{name: a}]", "  turnTaking: {endSilence: 600ms}"), "defaults are values");
        assert_eq!(base, revision("[{name: a, minReplicas: 5}]", "  sessions: {slotsPerWorker: 3}"));
        for changed in [
            "  turnTaking: {endSilence: 700ms}",
            "  turnTaking: {interruptible: false}",
            "  sessions: {longest: 30m}",
            "  latency: {budget: 1s}",
        ] {
            assert_ne!(base, revision("[{name: a}]", changed), "{changed}");
        }
    }

    #[test]
    fn worker_revision_changes_with_the_pod_alone() {
        let of = |pools: &str, extra: &str| {
            let text = agent(pools, extra);
            let Resource::VoiceAgent(agent) =
                manifest::parse(&[("a", &region("a", "")), ("t", &text)]).unwrap().remove(1)
            else {
                panic!("{text}")
            };
            worker_revision(&agent.spec, "a", "worker:1")
        };
        let base = of("[{name: a}]", "");
        assert_eq!(base.len(), 10);
        for same in [
            "  turnTaking: {endSilence: 700ms}",
            "  sessions: {longest: 30m}",
            "  disruption: {deadline: 1m, safeToEvict: true}",
            "  rollout: {strategy: DrainFirst, paused: true, rollbackTo: 4be6c2d0aa}",
            "  suspend: true",
            "  worker: {shards: 1, image: worker:1, tolerations: []}",
        ] {
            assert_eq!(base, of("[{name: a, maxReplicas: 7}]", same), "{same}");
        }
        let changed = [
            "  sessions: {slotsPerWorker: 3}",
            "  engine: {type: Echo, apiKeySecretRef: {name: a, key: b}}",
            "  rollout: {restartedAt: 2026-11-21T18:00:00Z}",
            "  worker: {shards: 2}",
            "  worker: {image: worker:2}",
            "  worker: {env: [{name: A, value: b}]}",
            "  worker: {affinity: {nodeAffinity: {}}}",
            "  worker: {resources: {requests: {cpu: 1}}}",
            "  worker: {startupDeadline: 11m}",
        ];
        let mut revisions: Vec<String> = changed
            .iter()
            .map(|extra| match extra.strip_prefix("  engine: ") {
                // It is there already.
                Some(engine) => {
                    let text = agent("[{name: a}]", "").replace("{type: Echo}", engine);
                    let resources = manifest::parse(&[("a", &region("a", "")), ("t", &text)]).unwrap();
                    let Resource::VoiceAgent(agent) = &resources[1] else { panic!("{text}") };
                    worker_revision(&agent.spec, "a", "worker:1")
                }
                None => of("[{name: a}]", extra),
            })
            .collect();
        revisions.push(of("[{name: a, nodeSelector: {gpu: l4}}]", ""));
        revisions.push(of("[{name: a, tolerations: [{operator: Exists}]}]", ""));
        revisions.push(base);
        let distinct: BTreeSet<&String> = revisions.iter().collect();
        assert_eq!(distinct.len(), revisions.len(), "{revisions:#?}");
    }

    #[test]
    fn worker_revision_does_not_depend_on_the_order_of_fields() {
        let of = |affinity: &str| {
            let text = agent("[{name: a}]", &format!("  worker: {{affinity: {affinity}}}"));
            let resources = manifest::parse(&[("a", &region("a", "")), ("t", &text)]).unwrap();
            let Resource::VoiceAgent(agent) = &resources[1] else { panic!("{text}") };
            worker_revision(&agent.spec, "a", "worker:1")
        };
        assert_eq!(
            of("{podAffinity: {a: 1, b: 2}, nodeAffinity: {}}"),
            of("{nodeAffinity: {}, podAffinity: {b: 2, a: 1}}")
        );
    }

    #[test]
    fn worker_revision_is_the_same_in_every_version_that_has_more_fields() {
        let Resource::VoiceAgent(plain) =
            manifest::parse(&[("t", &agent("[{name: a}]", "")), ("a", &region("a", ""))]).unwrap().remove(0)
        else {
            panic!("no agent")
        };
        // Hash of {"slots":16,"worker":{"image":"worker:1"}}: a new field with a default must not show here.
        assert_eq!(worker_revision(&plain.spec, "a", "worker:1"), "b86a7373a6");
    }

    #[test]
    fn fleets_that_could_serve_nobody_are_refused() {
        let parsed = |text: String| manifest::parse(&[("test.yaml", &text)]).unwrap();
        assert_eq!(compile(&[]), Err(CompileError::NoRegions));
        let resources = parsed(region("a", "  relay: {replicas: 0}"));
        assert_eq!(compile(&resources), Err(CompileError::NoRelays));
        let alone = parsed([agent("[{name: a}]", ""), region("a", "")].join("\n---\n"));
        let error = compile(&alone[..1]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "VoiceAgent default/frontdesk: spec.regions[0].name: \"a\" is no VoiceRegion: add a VoiceRegion of this name"
        );
        let many: Vec<Resource> = (0..1_025).flat_map(|index| parsed(region(&format!("r{index}"), ""))).collect();
        assert_eq!(compile(&many), Err(CompileError::TooManyRegions(1_025)));
    }
}
