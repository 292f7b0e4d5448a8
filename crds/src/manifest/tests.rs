use super::*;

const REGION: &str = "\
apiVersion: antiphon.dev/v1alpha1
kind: VoiceRegion
metadata:
  name: frankfurt
spec:
  cluster: eu-1
  cloud: nimbus
  location: {latitude: 50.1, longitude: 8.7}
";

const AGENT: &str = "\
apiVersion: antiphon.dev/v1alpha1
kind: VoiceAgent
metadata:
  name: frontdesk
spec:
  engine:
    type: Echo
  regions:
    - name: frankfurt
      minReplicas: 2
      maxReplicas: 3
";

fn errors(text: &str) -> Vec<String> {
    match parse(&[("fleet.yaml", text)]) {
        Ok(resources) => panic!("accepted: {resources:?}"),
        Err(errors) => errors.0.iter().map(ToString::to_string).collect(),
    }
}

fn fleet(agent: &str) -> String {
    format!("{agent}---\n{REGION}")
}

#[test]
fn documents_become_resources_with_defaults() {
    let text = format!("# a comment\n---\n{AGENT}---\n---\n{REGION}");
    let resources = parse(&[("fleet.yaml", &text)]).unwrap();
    let [Resource::VoiceAgent(agent), Resource::VoiceRegion(region)] = &resources[..] else {
        panic!("{resources:?}");
    };
    assert_eq!(agent.qualified_name(), "default/frontdesk");
    assert_eq!(agent.spec.turn_taking.end_silence.to_string(), "600ms");
    assert_eq!(agent.spec.codecs.len(), 3);
    assert_eq!((region.spec.relay.replicas, region.spec.capacity_percent), (2, 100));
}

#[test]
fn fields_without_a_value_are_absent() {
    let agent = format!("{AGENT}  disruption:\n  worker:\n");
    parse(&[("fleet.yaml", &fleet(&agent))]).unwrap();
}

#[test]
fn status_is_ignored() {
    let agent = format!("{AGENT}status:\n  anything: {{goes: here}}\n");
    parse(&[("fleet.yaml", &fleet(&agent))]).unwrap();
}

#[test]
fn errors_name_file_line_resource_field_and_remedy() {
    for (from, to, expected) in MISTAKES {
        let agent = AGENT.replacen(from, to, 1);
        assert_ne!(agent, AGENT, "{from}");
        let found = errors(&fleet(&agent));
        assert!(found.iter().any(|error| error == expected), "{expected}: {found:#?}");
    }
}

/// A text of the agent's manifest, what replaces it, and the error of that.
const MISTAKES: &[(&str, &str, &str)] = &[
    (
        "maxReplicas: 3",
        "maxReplicas: 0",
        "fleet.yaml:11: VoiceAgent default/frontdesk: spec.regions[0].maxReplicas: 0 is less than minReplicas 2: raise maxReplicas or lower minReplicas",
    ),
    (
        "minReplicas: 2",
        "minReplica: 2",
        "fleet.yaml:10: VoiceAgent default/frontdesk: spec.regions[0].minReplica: is not a known field: did you mean minReplicas?",
    ),
    (
        "    type: Echo\n",
        "    type: Echo\n  turnTaking:\n    endSilence: 600\n",
        "fleet.yaml:9: VoiceAgent default/frontdesk: spec.turnTaking.endSilence: 600 is a whole number where a string is needed: write a duration such as 600ms, 90s, 15m or 1h30m",
    ),
    (
        "    type: Echo\n",
        "    type: Echo\n  turnTaking:\n    endSilence: 600 ms\n",
        "fleet.yaml:9: VoiceAgent default/frontdesk: spec.turnTaking.endSilence: \"600 ms\" does not have the right form: write a duration such as 600ms, 90s, 15m or 1h30m",
    ),
    (
        "    type: Echo\n",
        "    type: Echo\n  turnTaking: {endSilence: 1h}\n",
        "fleet.yaml:8: VoiceAgent default/frontdesk: spec.turnTaking.endSilence: \"1h\" does not lie between 100ms and 5s: choose a duration in this range",
    ),
    (
        "type: Echo",
        "type: Ecco",
        "fleet.yaml:7: VoiceAgent default/frontdesk: spec.engine.type: \"Ecco\" is not one of Echo: did you mean Echo?",
    ),
    (
        "    - name: frankfurt",
        "    - name: frankfrut",
        "fleet.yaml:9: VoiceAgent default/frontdesk: spec.regions[0].name: \"frankfrut\" is no VoiceRegion: did you mean frankfurt?",
    ),
    (
        "  name: frontdesk",
        "  name: Front Desk",
        "fleet.yaml:4: VoiceAgent default/Front Desk: metadata.name: \"Front Desk\" is no possible name: write at most 40 characters: lower-case letters, digits and '-', beginning with a letter and not ending with '-'",
    ),
    (
        "  name: frontdesk",
        "  name: frontdesk\n  label: {a: b}",
        "fleet.yaml:5: VoiceAgent default/frontdesk: metadata.label: is not a known field: did you mean labels?",
    ),
    (
        "kind: VoiceAgent",
        "kind: VoiceAgnet",
        "fleet.yaml:2: VoiceAgnet frontdesk: kind: \"VoiceAgnet\" is not a kind of Antiphon's: did you mean VoiceAgent?",
    ),
    (
        "kind: VoiceAgent",
        "kind: Deployment",
        "fleet.yaml:2: Deployment frontdesk: kind: \"Deployment\" is not a kind of Antiphon's: only VoiceAgent and VoiceRegion are read; remove other resources",
    ),
    (
        "kind: VoiceAgent",
        "kind: WorkerPool",
        "fleet.yaml:2: WorkerPool frontdesk: kind: \"WorkerPool\" is for clusters only: remove it, and set minReplicas in spec.regions of the VoiceAgent instead",
    ),
    (
        "kind: VoiceAgent",
        "kind: Drain",
        "fleet.yaml:2: Drain frontdesk: kind: \"Drain\" is for clusters only: remove it; `kubectl apply` takes it",
    ),
    (
        "antiphon.dev/v1alpha1",
        "antiphon.dev/v1",
        "fleet.yaml:1: VoiceAgent default/frontdesk: apiVersion: \"antiphon.dev/v1\" is not a known version: write antiphon.dev/v1alpha1",
    ),
    (
        "  engine:\n    type: Echo\n",
        "",
        "fleet.yaml:5: VoiceAgent default/frontdesk: spec.engine: is missing: The speech engine that listens and answers",
    ),
    (
        "    type: Echo\n",
        "    type: Echo\n  latency: {budget: 1m60s}\n",
        "fleet.yaml:8: VoiceAgent default/frontdesk: spec.latency.budget: \"1m60s\" does not lie between 50ms and 10s: choose a duration in this range",
    ),
    (
        "    type: Echo\n",
        "    type: Echo\n  codecs: [MP3]\n",
        "fleet.yaml:8: VoiceAgent default/frontdesk: spec.codecs[0]: \"MP3\" is not one of Opus, L16At16k, L16At24k: write one of these",
    ),
    (
        "    type: Echo\n",
        "    type: Echo\n  sessions: {slotsPerWorker: many}\n",
        "fleet.yaml:8: VoiceAgent default/frontdesk: spec.sessions.slotsPerWorker: \"many\" is a string where a whole number is needed: write a whole number from 1 to 4096",
    ),
    (
        "    type: Echo\n",
        "    type: Echo\n  disruption: 15m\n",
        "fleet.yaml:8: VoiceAgent default/frontdesk: spec.disruption: \"15m\" is a string where a map of fields is needed: write fields in it: deadline, policy, safeToEvict",
    ),
    (
        "  name: frontdesk\n",
        "  namespace: shop\n",
        "fleet.yaml:3: VoiceAgent: metadata.name: is missing: give the resource a name",
    ),
    ("spec:", "spce:", "fleet.yaml:5: VoiceAgent default/frontdesk: spce: is not a known field: did you mean spec?"),
    (
        "    type: Echo\n",
        "    type: Echo\n  workload: Translation\n",
        "fleet.yaml:8: VoiceAgent default/frontdesk: spec.workload: \"Translation\" cannot be done by engine Echo, which only holds conversations: set workload to Conversation or choose another engine",
    ),
    (
        "    type: Echo\n",
        "    type: Echo\n  placement: {residency: [us]}\n",
        "fleet.yaml:10: VoiceAgent default/frontdesk: spec.regions[0].name: \"frankfurt\" lies in no residency zone, not in us: remove the region from the agent, or change spec.placement.residency",
    ),
    (
        "    type: Echo\n",
        "    type: Echo\n  worker: {gpuClass: l4}\n",
        "fleet.yaml:10: VoiceAgent default/frontdesk: spec.regions[0].name: \"frankfurt\" has no GPU class l4, only machines without a GPU: add the class to the region's gpuClasses, or change spec.worker.gpuClass",
    ),
];

#[test]
fn a_region_behind_relays_needs_one() {
    let region = "apiVersion: antiphon.dev/v1alpha1\nkind: VoiceRegion\nmetadata: {name: a}\nspec:\n  cluster: c\n  cloud: c\n  location: {latitude: 1, longitude: 2}\n  relay: {replicas: 0}\n  tunnel: ViaRelays\n";
    let expected = "fleet.yaml:9: VoiceRegion a: spec.tunnel: \"ViaRelays\" needs a relay in this region, which has none: raise spec.relay.replicas or set tunnel to Direct";
    assert_eq!(errors(region), [expected]);
}

#[test]
fn all_errors_of_all_documents_are_reported() {
    let agent = AGENT.replace("Echo", "Parrot").replace("minReplicas: 2", "minReplicas: -1");
    let region = REGION.replace("50.1", "90.5").replace("cluster: eu-1", "cluster: EU");
    let found = errors(&format!("{agent}---\n{region}"));
    assert_eq!(found.len(), 4, "{found:#?}");
    assert!(found[2].starts_with("fleet.yaml:18: VoiceRegion frankfurt: spec.cluster: \"EU\""), "{found:#?}");
}

#[test]
fn duplicates_are_found_across_files() {
    let twice = parse(&[("a.yaml", REGION), ("b.yaml", REGION)]).unwrap_err();
    assert_eq!(
        twice.to_string(),
        "b.yaml:4: VoiceRegion frankfurt: metadata.name: \"frankfurt\" names a VoiceRegion that is declared twice, first at a.yaml:4: rename or remove one of them"
    );
    let numbered = |name| REGION.replace("frankfurt", name).replace("  cluster", "  number: 7\n  cluster");
    let same_number = parse(&[("a.yaml", &numbered("a")), ("b.yaml", &numbered("b"))]).unwrap_err();
    assert_eq!(
        same_number.to_string(),
        "b.yaml:6: VoiceRegion b: spec.number: 7 is the number of region a already, first at a.yaml:6: numbers are unique in the fleet: choose another, or leave both out"
    );
}

#[test]
fn the_same_agent_in_two_namespaces_is_two_agents() {
    let other = AGENT.replace("  name: frontdesk", "  name: frontdesk\n  namespace: other");
    let text = format!("{AGENT}---\n{other}---\n{REGION}");
    assert_eq!(parse(&[("fleet.yaml", &text)]).unwrap().len(), 3);
}

#[test]
fn broken_yaml_is_an_error_with_its_line() {
    let found = errors("apiVersion: antiphon.dev/v1alpha1\nkind: [VoiceAgent\nspec: x\n");
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("fleet.yaml:"), "{found:?}");
    assert!(found[0].contains("is not valid YAML"), "{found:?}");
    let twice = AGENT.replace("    type: Echo\n", "    type: Echo\n    type: Echo\n");
    let found = errors(&twice);
    assert_eq!(found, ["fleet.yaml:8: type is there twice: remove one of them"]);
    let found = errors(&format!("{AGENT}{REGION}"));
    let expected =
        "fleet.yaml:12: apiVersion is there twice: separate resources with a line of ---, or remove one of them";
    assert_eq!(found, [expected]);
}

#[test]
fn mistakes_of_every_kind_are_reported_at_once_in_the_order_of_lines() {
    let agent = "\
apiVersion: antiphon.dev/v1alpha1
kind: VoiceAgent
metadata: {name: frontdesk}
spec:
  latency: {budget: 1ms, rttCeiling: fast}
  engine: {type: Echo}
  workload: Translation
  regions:
    - name: nowhere
      maxReplicas: 1
      minReplicas: 2
      wieght: 7
  sessions: {slotsPerWorker: 9999, perTenant: none}
";
    let found = errors(&fleet(agent));
    let places: Vec<_> =
        found.iter().map(|error| error.split(": ").take(3).collect::<Vec<_>>()[0..3].join(" ")).collect();
    let at = |line: u32, field: &str| format!("fleet.yaml:{line} VoiceAgent default/frontdesk spec.{field}");
    let expected = [
        at(5, "latency.budget"),
        at(5, "latency.rttCeiling"),
        at(7, "workload"),
        at(9, "regions[0].name"),
        at(10, "regions[0].maxReplicas"),
        at(12, "regions[0].wieght"),
        at(13, "sessions.perTenant"),
        at(13, "sessions.slotsPerWorker"),
    ];
    assert_eq!(places, expected, "{found:#?}");
}

#[test]
fn a_field_is_not_compared_with_the_default_of_one_that_cannot_be_read() {
    let agent = AGENT.replace("minReplicas: 2", "minReplicas: none").replace("maxReplicas: 3", "maxReplicas: 0");
    let found = errors(&fleet(&agent));
    assert_eq!(found.len(), 1, "{found:#?}");
    let region = REGION.replace("frankfurt", "Frankfurt");
    let found = errors(&format!("{AGENT}---\n{region}"));
    assert_eq!(found.len(), 1, "nothing dangles: {found:#?}");
}

#[test]
fn one_mistake_hides_no_other_that_does_not_rest_on_it() {
    let agent = AGENT
        .replace("maxReplicas: 3", "maxReplicas: 1")
        .replace("name: frankfurt", "name: nowhere")
        .replace("    type: Echo\n", "    type: Echo\n  codecs: [MP3, 7]\n");
    let other = AGENT.replace("name: frontdesk", "name: 7");
    let found = errors(&format!("{agent}---\n{REGION}---\n{other}---\n{REGION}"));
    let fields: Vec<_> = found.iter().map(|error| error.split(": ").nth(2).unwrap()).collect();
    let expected = [
        "spec.codecs[0]",
        "spec.codecs[1]",
        "spec.regions[0].name",
        "spec.regions[0].maxReplicas",
        "metadata.name",
        "metadata.name",
    ];
    assert_eq!(fields, expected, "{found:#?}");
    let unread = parse(&[("a.yaml", AGENT), ("b.yaml", "kind: [")]).unwrap_err();
    assert_eq!(unread.0.len(), 1, "the region may stand in the other file: {unread}");
}

#[test]
fn standard_input_has_a_name() {
    let error = read(&[PathBuf::from("-")]).unwrap_err().to_string();
    assert!(error.ends_with(": standard input is /dev/stdin"), "{error}");
}

#[test]
fn a_directory_without_manifests_is_named_with_what_is_in_it() {
    let of = |name: &str| read(&[Path::new(env!("CARGO_MANIFEST_DIR")).join(name)]).unwrap_err().to_string();
    let sources = of("src/manifest");
    assert!(sources.contains("src/manifest: has no *.yaml, *.yml or *.json: name files"), "{sources}");
    let outer = of("../examples");
    assert!(outer.contains("directories in it are not searched: name one of "), "{outer}");
    assert!(outer.contains("../examples/one-cluster, ") && outer.ends_with("../examples/three-clouds"), "{outer}");
    let holder = tempfile::tempdir().unwrap();
    fs::create_dir(holder.path().join("inner")).unwrap();
    let single = read(&[holder.path().to_owned()]).unwrap_err().to_string();
    assert!(single.contains(": did you mean ") && single.ends_with("/inner?"), "{single}");
}

#[test]
fn what_is_no_resource_is_an_error() {
    for text in
        ["just text\n", "- a\n- list\n", "42\n", "a: 1\n", "", "---\n# nothing\n", "spec: {}\nkind: VoiceAgent\n"]
    {
        assert_eq!(errors(text).len(), 1, "{text:?}");
    }
}

#[test]
fn hostile_yaml_is_refused_without_effort() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let previous = level - 1;
        let items = vec![format!("*a{previous}"); 10].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{items}]\n"));
    }
    assert_eq!(errors(&bomb).len(), 1);
    assert_eq!(errors(&"[".repeat(100_000)).len(), 1);
    assert_eq!(errors(&format!("kind: {}\n", "V".repeat(1_000_000))).len(), 1);
}

#[test]
fn perturbed_manifests_never_panic() {
    let text = fleet(AGENT);
    for cut in 0..text.len() {
        let _ = parse(&[("cut.yaml", &text[..cut])]);
        if cut % 3 != 0 {
            continue;
        }
        for garbage in ["\u{0}", "*", "&x", "\t", "!!binary", "{", "\u{feff}", "é"] {
            let broken = format!("{}{garbage}{}", &text[..cut], &text[cut..]);
            let _ = parse(&[("broken.yaml", &broken)]);
        }
    }
}

#[test]
fn files_that_cannot_be_read_are_errors() {
    let error = read(&[PathBuf::from("/nonexistent/fleet.yaml")]).unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/fleet.yaml: cannot be read: "), "{error}");
    assert!(error.ends_with(": check the path"), "{error}");
}

#[test]
fn examples_are_valid_fleets() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut seen = 0;
    for entry in fs::read_dir(examples).unwrap() {
        let resources = read(&[entry.unwrap().path()]).unwrap();
        crate::compile::compile(&resources).unwrap();
        seen += 1;
    }
    assert!(seen > 0);
}

/// The YAML blocks of docs/manifests.md.
fn documented() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/manifests.md");
    let text = fs::read_to_string(path).unwrap();
    let blocks = text.split("```yaml\n").skip(1);
    blocks.map(|block| block.split("```").next().unwrap().to_owned()).collect()
}

#[test]
fn documentation_shows_valid_fleets() {
    let blocks = documented();
    let [agent, region, _pool, _drain, shortest] = &blocks[..] else { panic!("{} blocks", blocks.len()) };
    let full = parse(&[("agent", agent), ("region", region)]).unwrap();
    crate::compile::compile(&full).unwrap();
    crate::compile::compile(&parse(&[("shortest", shortest)]).unwrap()).unwrap();
}

#[test]
fn documentation_shows_every_field() {
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{JSONSchemaProps, JSONSchemaPropsOrArray};
    use kube::CustomResourceExt;

    use crate::{Drain, WorkerPool};

    /// Fields that no value of these shows; alternatives stand in a comment, as "or NAME:".
    fn absent(path: &str, schema: &JSONSchemaProps, shown: &[&Value], text: &str) -> Vec<String> {
        let shown: Vec<&Value> = shown.iter().copied().filter(|value| !value.is_null()).collect();
        if shown.is_empty() {
            let name = path.rsplit('.').next().unwrap();
            let missing = !text.contains(&format!("or {name}:"));
            return missing.then(|| path.to_owned()).into_iter().collect();
        }
        if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
            let inner: Vec<&Value> = shown.iter().flat_map(|list| list.as_array().unwrap()).collect();
            return absent(&format!("{path}[]"), items, &inner, text);
        }
        let properties = schema.properties.iter().flatten();
        let inner = |name: &String| shown.iter().map(|value| &value[name.as_str()]).collect::<Vec<_>>();
        properties.flat_map(|(name, field)| absent(&format!("{path}.{name}"), field, &inner(name), text)).collect()
    }

    let blocks = documented();
    let kinds = [VoiceAgent::crd(), VoiceRegion::crd(), WorkerPool::crd(), Drain::crd()];
    for (block, crd) in blocks.iter().zip(kinds) {
        let shown: Value = serde_saphyr::from_str(block).unwrap();
        assert_eq!(shown["kind"], crd.spec.names.kind);
        let schema = schema::of_spec(crd);
        assert_eq!(absent("spec", &schema, &[&shown["spec"]], block), [""; 0]);
        assert_eq!(schema::check(&schema, &FieldPath::of("spec"), &shown["spec"]), []);
    }
}
