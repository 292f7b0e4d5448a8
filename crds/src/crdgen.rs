//! The CustomResourceDefinitions as YAML.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Value, json};

use crate::{Drain, VoiceAgent, VoiceRegion, WorkerPool};

/// One file of each of [`DIRECTORIES`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrdFile {
    /// Name of the file, without a directory.
    pub name: String,
    /// Its whole content.
    pub yaml: String,
}

/// All CustomResourceDefinitions as they are applied to a cluster, in order of their names.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    crds().iter().map(|crd| serde_json::from_value(finished(crd)).expect("it was one before")).collect()
}

/// All CustomResourceDefinitions as files, in order of their names.
pub fn files() -> Vec<CrdFile> {
    crds().iter().map(file).collect()
}

fn crds() -> [CustomResourceDefinition; 4] {
    [Drain::crd(), VoiceAgent::crd(), VoiceRegion::crd(), WorkerPool::crd()]
}

fn file(crd: &CustomResourceDefinition) -> CrdFile {
    let name = format!("{}.{}.yaml", crd.spec.group, crd.spec.names.plural);
    let yaml = serde_saphyr::to_string(&finished(crd)).expect("JSON values are YAML values");
    CrdFile { name, yaml: format!("{HEADER}{yaml}") }
}

fn finished(crd: &CustomResourceDefinition) -> Value {
    let mut value = serde_json::to_value(crd).expect("definitions are plain data");
    tidy(&mut value);
    bound_conditions(&mut value["spec"]["versions"][0]["schema"]["openAPIV3Schema"]);
    // Whatever order another crate's features make maps keep.
    value.sort_all_objects();
    value
}

/// Makes the schema what `kubectl explain` and the API server want to read: paragraphs of one line each, no formats that
/// OpenAPI does not know, whole numbers without a fraction, and no field that may be null: the API server then takes null as
/// absent.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
                map.remove("format");
            }
            map.remove("nullable");
            if let Some(Value::String(text)) = map.get_mut("description") {
                *text = paragraphs(text);
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        Value::Number(number) => {
            let whole = number.as_f64().filter(|n| number.is_f64() && n.fract() == 0.0 && n.abs() < 1e15);
            if let Some(whole) = whole.and_then(|n| format!("{n:.0}").parse::<i64>().ok()) {
                *value = Value::from(whole);
            }
        }
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// Gives conditions the bounds that Kubernetes documents for them and leaves to each resource (meta/v1, Condition).
fn bound_conditions(schema: &mut Value) {
    let conditions = &mut schema["properties"]["status"]["properties"]["conditions"];
    let fields = &mut conditions["items"]["properties"];
    for (field, keyword, bound) in [
        ("message", "maxLength", json!(32_768)),
        ("reason", "minLength", json!(1)),
        ("reason", "maxLength", json!(1_024)),
        ("reason", "pattern", json!("^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")),
        ("status", "enum", json!(["True", "False", "Unknown"])),
        ("type", "maxLength", json!(316)),
    ] {
        fields[field][keyword] = bound;
    }
}

/// The text with each paragraph on one line.
pub(crate) fn paragraphs(text: &str) -> String {
    let paragraphs: Vec<String> =
        text.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    paragraphs.join("\n\n")
}

/// Where the files are committed, counted from the workspace: for `kubectl apply`, and for the Helm chart.
pub const DIRECTORIES: [&str; 2] = ["crds/yaml", "charts/antiphon/crds"];

const HEADER: &str = "# Generated from the Rust types by `cargo xtask crds`. Do not edit.\n";

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn committed_yaml_is_what_the_types_generate() {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let generated = files();
        let names: Vec<&str> = generated.iter().map(|file| file.name.as_str()).collect();
        for directory in DIRECTORIES.map(|directory| workspace.join(directory)) {
            let mut committed: Vec<String> = std::fs::read_dir(&directory)
                .expect("it exists: run `cargo xtask crds`")
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            committed.sort();
            assert_eq!(committed, names, "run `cargo xtask crds`");
            for file in &generated {
                let path = directory.join(&file.name);
                let text = std::fs::read_to_string(&path).unwrap();
                assert!(text == file.yaml, "{} is out of date: run `cargo xtask crds`", path.display());
            }
        }
    }

    /// Walks a schema and hands every node to `check` with its path.
    fn walk(path: &str, schema: &Value, check: &mut impl FnMut(&str, &Value)) {
        check(path, schema);
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            walk(&format!("{path}.{name}"), property, check);
        }
        for (name, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
            if schema[name].is_object() {
                walk(&format!("{path}{mark}"), &schema[name], check);
            }
        }
    }

    /// Kind and schema of each file.
    fn schemas() -> Vec<(String, Value)> {
        files()
            .iter()
            .map(|file| {
                let mut crd: Value = serde_saphyr::from_str(&file.yaml).unwrap();
                let kind = crd["spec"]["names"]["kind"].as_str().unwrap().to_owned();
                (kind, crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].take())
            })
            .collect()
    }

    #[test]
    fn every_field_is_documented() {
        for (kind, schema) in schemas() {
            walk(&kind, &schema, &mut |path, node| {
                // Items are documented by the list that holds them.
                assert!(
                    path.ends_with("[]") || path.ends_with("{}") || node["description"].is_string(),
                    "{path} has no description"
                );
            });
        }
    }

    #[test]
    fn every_list_and_string_is_bounded() {
        for (kind, schema) in schemas() {
            walk(&kind, &schema, &mut |path, node| {
                let bounded = match node["type"].as_str() {
                    Some("array") => node["maxItems"].is_u64(),
                    Some("string") => ["maxLength", "enum", "format"].iter().any(|bound| !node[bound].is_null()),
                    Some("object") if !node["additionalProperties"].is_null() => node["maxProperties"].is_u64(),
                    None => node["maxLength"].is_u64(),
                    _ => true,
                };
                assert!(bounded, "{path} is unbounded");
            });
        }
    }

    #[test]
    fn every_number_of_a_spec_is_bounded() {
        for (kind, schema) in schemas() {
            walk(&kind, &schema["properties"]["spec"], &mut |path, node| {
                if matches!(node["type"].as_str(), Some("integer" | "number")) {
                    let bounded = node["minimum"].is_number() && node["maximum"].is_number();
                    assert!(bounded, "{path} is unbounded");
                }
            });
        }
    }

    #[test]
    fn schemas_are_structural() {
        for (kind, schema) in schemas() {
            walk(&kind, &schema, &mut |path, node| {
                let either = node["x-kubernetes-int-or-string"] == true;
                assert!(node["type"].is_string() != either, "{path} has no type");
                for keyword in ["oneOf", "anyOf", "allOf", "$ref", "uniqueItems"] {
                    assert!(node[keyword].is_null(), "{path} uses {keyword}");
                }
            });
        }
    }
}
