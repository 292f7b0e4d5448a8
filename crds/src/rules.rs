//! What the schema of one field cannot say: rules within a resource, the same that the API server evaluates as CEL, and
//! rules between the resources of a fleet.

use std::collections::BTreeMap;

use kube::ResourceExt;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    EngineType, TimeSpan, Tunnel, VoiceAgent, VoiceRegion, Workload, agent,
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
        if self.spec.tunnel == Tunnel::Direct || self.spec.relay.replicas > 0 {
            return Vec::new();
        }
        let path = FieldPath::of("spec.tunnel");
        let hint = "raise spec.relay.replicas or set tunnel to Direct";
        vec![FieldError::new(path, &json!(self.spec.tunnel), "needs a relay in this region, which has none", hint)]
    }
}

/// What is wrong with the name of a resource.
pub(crate) fn check_name(name: &str) -> Vec<FieldError> {
    let regex = regex::Regex::new(form::NAME.pattern).expect("patterns of schemas are tested");
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
    let mut regions = BTreeMap::new();
    let mut numbers = BTreeMap::new();
    let mut agents = BTreeMap::new();
    for (index, resource) in resources.iter().enumerate() {
        let path = FieldPath::of("metadata.name");
        let duplicate = |what: &str| {
            let hint = "rename or remove one of them";
            let problem = format!("names {what} that is declared twice");
            FieldError::new(path.clone(), &Value::from(resource.name()), problem, hint)
        };
        match resource {
            Resource::VoiceAgent(_) => {
                if agents.insert(resource.name(), index).is_some() {
                    errors.push((index, duplicate("a VoiceAgent")));
                }
            }
            Resource::VoiceRegion(region) => {
                if regions.insert(resource.name(), &**region).is_some() {
                    errors.push((index, duplicate("a VoiceRegion")));
                }
                let number = region.spec.number;
                let Some(number) = number else { continue };
                if let Some(other) = numbers.insert(number, resource.name()) {
                    errors.push((index, number_taken(number, &other)));
                }
            }
        }
    }
    for (index, resource) in resources.iter().enumerate() {
        if let Resource::VoiceAgent(agent) = resource {
            errors.extend(check_regions(agent, &regions).into_iter().map(|error| (index, error)));
        }
    }
    errors
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
pub(crate) fn check_regions(agent: &VoiceAgent, regions: &BTreeMap<String, &VoiceRegion>) -> Vec<FieldError> {
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
        let offered = &region.spec.residency;
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
        let classes = &region.spec.gpu_classes;
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
mod tests {
    use super::*;

    fn agent() -> Value {
        json!({
            "apiVersion": "antiphon.dev/v1alpha1",
            "kind": "VoiceAgent",
            "metadata": {"name": "frontdesk"},
            "spec": {"engine": {"type": "Echo"}, "regions": [{"name": "frankfurt"}]},
        })
    }

    fn region() -> Value {
        json!({
            "apiVersion": "antiphon.dev/v1alpha1",
            "kind": "VoiceRegion",
            "metadata": {"name": "frankfurt"},
            "spec": {
                "number": 7,
                "cluster": "eu-1",
                "cloud": "nimbus",
                "location": {"latitude": 50.1, "longitude": 8.7},
            },
        })
    }

    fn with<K: serde::de::DeserializeOwned>(mut resource: Value, pointer: &str, value: Value) -> K {
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        // Fields with defaults may be absent on the way.
        let mut node = &mut resource;
        for step in parent.split('/').skip(1) {
            node = match step.parse::<usize>() {
                Ok(index) => &mut node[index],
                Err(_) => &mut node[step],
            };
        }
        node[field] = value;
        serde_json::from_value(resource).unwrap()
    }

    /// What the API server's rules and ours say of the same resource: the paths of the fields that are wrong.
    fn verdicts(agent: &VoiceAgent) -> (Vec<String>, Vec<String>) {
        let ours = agent.validate().iter().map(|error| error.path.to_string()).collect();
        let theirs = match agent.validate_cel() {
            Ok(()) => Vec::new(),
            Err(errors) => errors.iter().map(|error| error.message.clone()).collect(),
        };
        (ours, theirs)
    }

    #[test]
    fn the_api_server_and_we_agree_on_agents() {
        let long = "a".repeat(41);
        for (pointer, value, valid) in [
            ("/metadata/name", json!("frontdesk"), true),
            ("/metadata/name", json!("a"), true),
            ("/metadata/name", json!("a".repeat(40)), true),
            ("/metadata/name", json!(long), false),
            ("/metadata/name", json!("7up"), false),
            ("/metadata/name", json!("a-"), false),
            ("/metadata/name", json!("a.b"), false),
            ("/spec/regions/0/minReplicas", json!(10), true),
            ("/spec/regions/0/minReplicas", json!(11), false),
            ("/spec/regions/0/maxReplicas", json!(1), true),
            ("/spec/regions/0/maxReplicas", json!(0), false),
            ("/spec/workload", json!("Conversation"), true),
            ("/spec/workload", json!("Translation"), false),
            ("/spec/workload", json!("Transcription"), false),
            ("/spec/sessions/longest", json!("10s"), true),
            ("/spec/sessions/longest", json!("9s999ms"), false),
            ("/spec/sessions/longest", json!("24h"), true),
            ("/spec/sessions/longest", json!("24h1ms"), false),
            ("/spec/turnTaking/endSilence", json!("100ms"), true),
            ("/spec/turnTaking/endSilence", json!("99ms"), false),
            ("/spec/turnTaking/endSilence", json!("5s"), true),
            ("/spec/turnTaking/endSilence", json!("5001ms"), false),
            ("/spec/turnTaking/minSpeech", json!("20ms"), true),
            ("/spec/turnTaking/minSpeech", json!("19ms"), false),
            ("/spec/turnTaking/minSpeech", json!("2s1ms"), false),
            ("/spec/latency/budget", json!("50ms"), true),
            ("/spec/latency/budget", json!("49ms"), false),
            ("/spec/latency/budget", json!("1h"), false),
            ("/spec/latency/rttCeiling", json!("300ms"), true),
            ("/spec/latency/rttCeiling", json!("301ms"), false),
            ("/spec/latency/rttCeiling", json!("4ms"), false),
            ("/spec/latency/rttCeilingMax", json!("80ms"), true),
            ("/spec/latency/rttCeilingMax", json!("79ms"), false),
            ("/spec/latency/rttCeilingMax", json!("5001ms"), false),
            ("/spec/disruption/deadline", json!("0s"), true),
            ("/spec/disruption/deadline", json!("24h1s"), false),
        ] {
            let agent: VoiceAgent = with(agent(), pointer, value.clone());
            let (ours, theirs) = verdicts(&agent);
            assert_eq!(ours.is_empty(), valid, "{pointer} {value}: {ours:?}");
            assert_eq!(theirs.is_empty(), valid, "{pointer} {value}: {theirs:?}");
        }
    }

    #[test]
    fn the_api_server_and_we_agree_on_regions() {
        for (name, valid) in [("frankfurt", true), ("Frankfurt", false), ("a.b", false)] {
            let region: VoiceRegion = with(region(), "/metadata/name", json!(name));
            assert_eq!(region.validate().is_empty(), valid, "{name}");
            assert_eq!(region.validate_cel().is_ok(), valid, "{name}");
        }
        for (tunnel, relays, valid) in
            [("Direct", 0, true), ("Direct", 1, true), ("ViaRelays", 0, false), ("ViaRelays", 1, true)]
        {
            let mut document = region();
            document["spec"]["tunnel"] = json!(tunnel);
            let region: VoiceRegion = with(document, "/spec/relay", json!({"replicas": relays}));
            assert_eq!(region.validate().is_empty(), valid, "{tunnel} {relays}");
            assert_eq!(region.validate_cel().is_ok(), valid, "{tunnel} {relays}");
        }
    }

    #[test]
    fn cluster_and_number_of_a_region_never_change() {
        let old: VoiceRegion = serde_json::from_value(region()).unwrap();
        assert!(old.validate_cel_update(&old).is_ok());
        for (pointer, value) in
            [("/spec/cluster", json!("eu-2")), ("/spec/number", json!(8)), ("/spec/number", Value::Null)]
        {
            let new: VoiceRegion = with(region(), pointer, value.clone());
            assert!(new.validate().is_empty(), "{pointer}: {value} is valid by itself");
            assert!(new.validate_cel_update(&old).is_err(), "{pointer}: {value}");
        }
        let unnumbered: VoiceRegion = with(region(), "/spec/number", Value::Null);
        assert!(old.validate_cel_update(&unnumbered).is_err(), "a number cannot be added");
        let scaled: VoiceRegion = with(region(), "/spec/capacityPercent", json!(50));
        assert!(scaled.validate_cel_update(&old).is_ok());
    }

    #[test]
    fn bounds_hold_for_resources_that_no_schema_has_seen() {
        let agent: VoiceAgent = with(agent(), "/spec/sessions/slotsPerWorker", json!(0));
        assert_eq!(
            agent.validate()[0].to_string(),
            "spec.sessions.slotsPerWorker: 0 does not lie between 1 and 4096: Calls one worker holds at a time, 1 to 4096. A worker never grants more, whatever it is asked for"
        );
        let region: VoiceRegion = with(region(), "/spec/number", json!(1024));
        assert_eq!(region.validate()[0].path.to_string(), "spec.number");
    }
}
