use std::path::Path;

use kube::core::cel::ValidationErrors;
use serde::{Deserialize, de::DeserializeOwned};

use super::*;
use crate::{Drain, WorkerPool};

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

fn with<K: DeserializeOwned>(mut resource: Value, pointer: &str, value: Value) -> K {
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

/// `refused.yaml`.
#[derive(Deserialize)]
struct Refusals {
    bases: BTreeMap<String, Value>,
    refused: Vec<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    kind: String,
    at: String,
    value: Value,
    #[serde(default)]
    update: bool,
    message: String,
}

impl Refusals {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("refused.yaml");
        serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }
}

impl Refusal {
    /// The messages of the API server's rules, and what we find by ourselves.
    fn verdicts(&self, base: &Value) -> (Vec<String>, Vec<FieldError>) {
        let case = || -> Value { with(base.clone(), &self.at, self.value.clone()) };
        match &*self.kind {
            "VoiceAgent" => {
                let agent: VoiceAgent = read(case());
                (
                    self.messages(base, &agent, VoiceAgent::validate_cel, VoiceAgent::validate_cel_update),
                    agent.validate(),
                )
            }
            "VoiceRegion" => {
                let region: VoiceRegion = read(case());
                let theirs = self.messages(base, &region, VoiceRegion::validate_cel, VoiceRegion::validate_cel_update);
                (theirs, region.validate())
            }
            "WorkerPool" => {
                let pool: WorkerPool = read(case());
                (self.messages(base, &pool, WorkerPool::validate_cel, WorkerPool::validate_cel_update), Vec::new())
            }
            "Drain" => {
                let drain: Drain = read(case());
                (self.messages(base, &drain, Drain::validate_cel, Drain::validate_cel_update), Vec::new())
            }
            other => panic!("{other}"),
        }
    }

    fn messages<K: DeserializeOwned>(
        &self,
        base: &Value,
        case: &K,
        create: impl Fn(&K) -> Result<(), ValidationErrors>,
        update: impl Fn(&K, &K) -> Result<(), ValidationErrors>,
    ) -> Vec<String> {
        let base: K = read(base.clone());
        create(&base).unwrap_or_else(|error| panic!("the base of {} is refused: {error:?}", self.kind));
        let verdict = if self.update { update(case, &base) } else { create(case) };
        verdict.err().iter().flat_map(|errors| errors.iter().map(|error| error.message.clone())).collect()
    }
}

fn read<K: DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

#[test]
fn what_is_refused_is_refused_with_our_words() {
    let Refusals { bases, refused } = Refusals::read();
    for case in &refused {
        let (theirs, ours) = case.verdicts(&bases[&case.kind]);
        let which = format!("{} {} {}", case.kind, case.at, case.value);
        assert!(theirs.contains(&case.message), "{which}: {theirs:?}");
        // Updates are refused by the API server alone, and so are kinds that only clusters have.
        let has_own = matches!(&*case.kind, "VoiceAgent" | "VoiceRegion") && !case.update;
        assert_eq!(!ours.is_empty(), has_own, "{which}: {ours:?}");
    }
}

#[test]
fn every_rule_of_ours_has_a_case() {
    fn messages(node: &Value, found: &mut Vec<String>) {
        for rule in node["x-kubernetes-validations"].as_array().into_iter().flatten() {
            found.push(rule["message"].as_str().expect("rules have messages").to_owned());
        }
        let inner = node["properties"].as_object().into_iter().flat_map(|fields| fields.values());
        inner.chain([&node["items"]]).filter(|inner| inner.is_object()).for_each(|inner| messages(inner, found));
    }

    let Refusals { refused, .. } = Refusals::read();
    for crd in crate::crdgen::definitions() {
        let kind = crd.spec.names.kind.clone();
        let crd = serde_json::to_value(crd).unwrap();
        let mut rules = Vec::new();
        messages(&crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"], &mut rules);
        assert!(!rules.is_empty(), "{kind}");
        for message in rules {
            // Ranges are one rule with many bounds; each bound has its own case above.
            let covered = refused.iter().any(|case| case.kind == kind && case.message == message);
            assert!(covered || message.starts_with("must lie between"), "{kind}: {message}");
        }
    }
}
