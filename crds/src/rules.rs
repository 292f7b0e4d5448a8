//! What the schema of one field cannot say: rules within a resource, the same that the API server evaluates as CEL, and
//! rules between the resources of a fleet.

mod pod;

use std::{borrow::Borrow, collections::BTreeMap};

use kube::ResourceExt;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    EngineType, IngressType, RelayServiceType, RouterServiceType, TimeSpan, Tunnel, VoiceAgent, VoiceRegion, Workload,
    agent,
    field::{FieldError, FieldPath},
    form,
    schema::{self, Checked},
    time_span::Range,
};

/// A resource of the group.
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    /// An agent.
    VoiceAgent(Box<VoiceAgent>),
    /// A region.
    VoiceRegion(Box<VoiceRegion>),
}

impl Resource {
    /// Its kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::VoiceAgent(_) => "VoiceAgent",
            Self::VoiceRegion(_) => "VoiceRegion",
        }
    }

    /// Its name in the fleet: "namespace/name" of an agent, the bare name of a region, which is unique in the fleet.
    pub fn name(&self) -> String {
        match self {
            Self::VoiceAgent(agent) => agent.qualified_name(),
            Self::VoiceRegion(region) => region.name_any(),
        }
    }

    /// A region by its name.
    pub(crate) fn region(&self) -> Option<(String, &VoiceRegion)> {
        match self {
            Self::VoiceAgent(_) => None,
            Self::VoiceRegion(region) => Some((region.name_any(), region)),
        }
    }

    /// The rules of the API server that are not the schema's.
    pub(crate) fn rules(&self) -> Vec<FieldError> {
        match self {
            Self::VoiceAgent(agent) => agent.rules(),
            Self::VoiceRegion(region) => region.rules(),
        }
    }

    /// Everything that is wrong with it by itself.
    pub fn validate(&self) -> Vec<FieldError> {
        match self {
            Self::VoiceAgent(agent) => agent.validate(),
            Self::VoiceRegion(region) => region.validate(),
        }
    }
}

impl VoiceAgent {
    /// "namespace/name"; an agent without a namespace is in `default`.
    pub fn qualified_name(&self) -> String {
        let namespace = self.namespace().unwrap_or_else(|| "default".to_owned());
        format!("{namespace}/{}", self.name_any())
    }

    /// Everything that the API server would reject, in the order of the schema, then of the rules.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut errors = check_name(&self.name_any());
        errors.extend(check_schema::<Self>(&self.spec));
        errors.extend(self.rules());
        errors
    }

    /// The rules of the API server that are not the schema's.
    pub(crate) fn rules(&self) -> Vec<FieldError> {
        let spec = &self.spec;
        let at = FieldPath::of;
        let mut errors = Vec::new();
        for (index, region) in spec.regions.iter().enumerate() {
            let (min, max) = (region.min_replicas, region.max_replicas);
            if max < min {
                errors.push(FieldError::new(
                    at("spec.regions").item(index).field("maxReplicas"),
                    &json!(max),
                    format!("is less than minReplicas {min}"),
                    "raise maxReplicas or lower minReplicas",
                ));
            }
            let path = at("spec.regions").item(index);
            errors.extend(pod::check_tolerations(&path, &region.tolerations));
        }
        match (spec.engine.engine_type, spec.workload) {
            (EngineType::Echo, Workload::Translation | Workload::Transcription) => {
                errors.push(FieldError::new(
                    at("spec.workload"),
                    &json!(spec.workload),
                    "cannot be done by engine Echo, which only holds conversations",
                    "set workload to Conversation or choose another engine",
                ));
            }
            (EngineType::Echo, Workload::Conversation) => {}
        }
        errors.extend(pod::check_worker(&at("spec.worker"), &spec.worker));
        if let Some(canary) = &spec.rollout.canary {
            let set = [("count", canary.count.is_some()), ("percent", canary.percent.is_some())];
            errors.extend(exactly_one(&at("spec.rollout.canary"), &set));
        }
        errors.extend(self.time_spans().into_iter().filter_map(|(path, value, range)| {
            let hint = "choose a duration in this range";
            Some(FieldError::new(at(path), &json!(value), range.problem(value)?, hint))
        }));
        let latency = &spec.latency;
        if latency.rtt_ceiling_max < latency.rtt_ceiling {
            errors.push(FieldError::new(
                at("spec.latency.rttCeilingMax"),
                &json!(latency.rtt_ceiling_max),
                format!("is less than rttCeiling {}", latency.rtt_ceiling),
                "raise rttCeilingMax or lower rttCeiling",
            ));
        }
        errors
    }

    fn time_spans(&self) -> Vec<(&'static str, TimeSpan, Range)> {
        let spec = &self.spec;
        let scale_down = spec.autoscaling.as_ref().map(|autoscaling| {
            ("spec.autoscaling.scaleDownDelay", autoscaling.scale_down_delay, agent::SCALE_DOWN_DELAY)
        });
        let always = [
            ("spec.sessions.longest", spec.sessions.longest, agent::LONGEST),
            ("spec.turnTaking.endSilence", spec.turn_taking.end_silence, agent::END_SILENCE),
            ("spec.turnTaking.minSpeech", spec.turn_taking.min_speech, agent::MIN_SPEECH),
            ("spec.latency.budget", spec.latency.budget, agent::BUDGET),
            ("spec.latency.rttCeiling", spec.latency.rtt_ceiling, agent::RTT_CEILING),
            ("spec.latency.rttCeilingMax", spec.latency.rtt_ceiling_max, agent::RTT_CEILING),
            ("spec.disruption.deadline", spec.disruption.deadline, agent::DEADLINE),
            ("spec.worker.startupDeadline", spec.worker.startup_deadline, agent::STARTUP_DEADLINE),
            ("spec.worker.terminationGrace", spec.worker.termination_grace, agent::TERMINATION_GRACE),
        ];
        always.into_iter().chain(scale_down).collect()
    }
}

impl VoiceRegion {
    /// Everything that the API server would reject when the region is created.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut errors = check_name(&self.name_any());
        errors.extend(check_schema::<Self>(&self.spec));
        errors.extend(self.rules());
        errors
    }

    /// The rules of the API server that are not the schema's.
    pub(crate) fn rules(&self) -> Vec<FieldError> {
        let spec = &self.spec;
        let at = FieldPath::of;
        let mut errors = Vec::new();
        if spec.tunnel == Tunnel::ViaRelays && spec.relay.replicas == 0 {
            let hint = "raise spec.relay.replicas or set tunnel to Direct";
            let problem = "needs a relay in this region, which has none";
            errors.push(FieldError::new(at("spec.tunnel"), &json!(spec.tunnel), problem, hint));
        }
        errors.extend(pod::check_settings(&at("spec.relay.pod"), &spec.relay.pod));
        errors.extend(pod::check_settings(&at("spec.router.pod"), &spec.router.pod));
        errors.extend(self.misplaced());
        errors
    }

    /// Fields that go with another type of ingress or Service than theirs.
    fn misplaced(&self) -> Vec<FieldError> {
        let ingress = &self.spec.relay.ingress;
        let router = &self.spec.router.service;
        let behind = ingress.ingress_type == IngressType::Service;
        let (balanced, relay_ports, class) = ingress.service.as_ref().map_or((true, false, false), |service| {
            let balanced = service.service_type == RelayServiceType::LoadBalancer;
            (balanced, service.node_port.is_some(), service.load_balancer_class.is_some())
        });
        let router_ports = router.service_type == RouterServiceType::NodePort;
        let misplaced = [
            ("spec.relay.ingress.service", ingress.service.is_some() && !behind, "Service"),
            ("spec.relay.ingress.service.nodePort", relay_ports && balanced, "NodePort"),
            ("spec.relay.ingress.service.loadBalancerClass", class && !balanced, "LoadBalancer"),
            ("spec.router.service.apiNodePort", router.api_node_port.is_some() && !router_ports, "NodePort"),
            ("spec.router.service.internalNodePort", router.internal_node_port.is_some() && !router_ports, "NodePort"),
        ];
        let misplaced = misplaced.into_iter().filter(|(_, wrong, _)| *wrong);
        misplaced
            .map(|(path, _, goes_with)| {
                let problem = format!("goes with type {goes_with}");
                FieldError::without_value(FieldPath::of(path), problem, "remove it or change the type")
            })
            .collect()
    }
}

/// What is wrong with an object of which exactly one field has to be set.
fn exactly_one(path: &FieldPath, fields: &[(&str, bool)]) -> Option<FieldError> {
    let set: Vec<&str> = fields.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
    let problem = match set[..] {
        [_] => return None,
        [] => "says nothing".to_owned(),
        _ => format!("has {}", set.join(" and ")),
    };
    let names: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    Some(FieldError::without_value(path.clone(), problem, format!("set exactly one of {}", names.join(", "))))
}

/// What is wrong with the name of a resource.
pub(crate) fn check_name(name: &str) -> Vec<FieldError> {
    let (_, regex) = form::of_pattern(form::NAME.pattern);
    if name.chars().count() <= LONGEST_NAME && regex.is_match(name) {
        return Vec::new();
    }
    let problem = if name.is_empty() { "is empty" } else { "is no possible name" };
    let hint = format!("write at most {LONGEST_NAME} characters: {}", form::NAME.meaning);
    vec![FieldError::new(FieldPath::of("metadata.name"), &Value::from(name), problem, hint)]
}

fn check_schema<K: Checked>(spec: &impl Serialize) -> Vec<FieldError> {
    let spec = serde_json::to_value(spec).expect("specs are plain data");
    schema::check(K::spec_schema(), &FieldPath::of("spec"), &spec)
}

/// Everything that does not fit together in a fleet of these resources, each with the index of the resource that it is
/// about.
pub(crate) fn check_fleet(resources: &[Resource]) -> Vec<(usize, FieldError)> {
    let mut errors = Vec::new();
    for clash in clashes(resources) {
        errors.push((clash.index, clash.error));
    }
    let regions: BTreeMap<String, &VoiceRegion> = resources.iter().filter_map(Resource::region).collect();
    for (index, resource) in resources.iter().enumerate() {
        if let Resource::VoiceAgent(agent) = resource {
            errors.extend(check_regions(agent, &regions).into_iter().map(|error| (index, error)));
        }
    }
    errors
}

/// Two resources that take the same name or number.
pub(crate) struct Clash {
    /// Of the one that comes later.
    pub(crate) index: usize,
    /// Of the one that has it already.
    pub(crate) first: usize,
    pub(crate) error: FieldError,
}

/// What is taken twice among these resources.
pub(crate) fn clashes(resources: &[Resource]) -> Vec<Clash> {
    let mut clashes = Vec::new();
    let mut names = BTreeMap::new();
    let mut numbers = BTreeMap::new();
    for (index, resource) in resources.iter().enumerate() {
        if let Some(first) = names.get(&(resource.kind(), resource.name())).copied() {
            let problem = format!("names a {} that is declared twice", resource.kind());
            let path = FieldPath::of("metadata.name");
            let error = FieldError::new(path, &Value::from(resource.name()), problem, "rename or remove one of them");
            clashes.push(Clash { index, first, error });
        } else {
            names.insert((resource.kind(), resource.name()), index);
        }
        let Some((_, region)) = resource.region() else { continue };
        let Some(number) = region.spec.number else { continue };
        match numbers.get(&number).copied() {
            Some(first) => {
                let other: &Resource = &resources[first];
                clashes.push(Clash { index, first, error: number_taken(number, &other.name()) });
            }
            None => drop(numbers.insert(number, index)),
        }
    }
    clashes
}

fn number_taken(number: u16, other: &str) -> FieldError {
    FieldError::new(
        FieldPath::of("spec.number"),
        &json!(number),
        format!("is the number of region {other} already"),
        "numbers are unique in the fleet: choose another, or leave both out",
    )
}

/// Whether the regions of an agent exist and offer what it needs.
pub(crate) fn check_regions<R: Borrow<VoiceRegion>>(
    agent: &VoiceAgent,
    regions: &BTreeMap<String, R>,
) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let residency = &agent.spec.placement.residency;
    for (index, pool) in agent.spec.regions.iter().enumerate() {
        let path = FieldPath::of("spec.regions").item(index).field("name");
        let name = Value::from(pool.name.as_str());
        let Some(region) = regions.get(&pool.name) else {
            let hint = match schema::nearest(&pool.name, regions.keys().map(String::as_str)) {
                Some(near) => format!("did you mean {near}?"),
                None if regions.is_empty() => "add a VoiceRegion of this name".to_owned(),
                None => {
                    let names: Vec<&str> = regions.keys().map(String::as_str).collect();
                    format!("add a VoiceRegion of this name; there are {}", names.join(", "))
                }
            };
            errors.push(FieldError::new(path, &name, "is no VoiceRegion", hint));
            continue;
        };
        let offer = &region.borrow().spec;
        let offered = &offer.residency;
        if !residency.is_empty() && !residency.iter().any(|zone| offered.contains(zone)) {
            let problem = format!("lies in {}, not in {}", list(offered, "no residency zone"), list(residency, "any"));
            let hint = "remove the region from the agent, or change spec.placement.residency";
            errors.push(FieldError::new(path.clone(), &name, problem, hint));
        }
        for zone in pool.residency.iter().filter(|zone| !offered.contains(zone)) {
            let problem = format!("lies in {}, not in {zone}", list(offered, "no residency zone"));
            let hint = "remove the region from the agent, or change its residency there";
            errors.push(FieldError::new(path.clone(), &name, problem, hint));
        }
        let classes = &offer.gpu_classes;
        if let Some(class) = agent.spec.worker.gpu_class.as_ref().filter(|class| !classes.contains(class)) {
            let problem = format!("has no GPU class {class}, only {}", list(classes, "machines without a GPU"));
            let hint = "add the class to the region's gpuClasses, or change spec.worker.gpuClass";
            errors.push(FieldError::new(path, &name, problem, hint));
        }
    }
    errors
}

fn list(names: &[String], none: &str) -> String {
    if names.is_empty() { none.to_owned() } else { names.join(", ") }
}

/// Characters of a name: leaves room for what is derived from it within the 63 of a DNS label.
const LONGEST_NAME: usize = 40;

#[cfg(test)]
mod tests;
