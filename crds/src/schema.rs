//! Checks a value against the schema of its resource, as strictly as `kubectl --validate=strict` does, and says all that
//! is wrong at once.

use std::{collections::BTreeMap, sync::LazyLock};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;
use serde_json::{Map, Value};

use crate::{
    VoiceAgent, VoiceRegion,
    crdgen::paragraphs,
    field::{FieldError, FieldPath},
    form,
};

/// Everything about `value` that `schema` does not admit.
///
/// Knows the keywords that the schemas of this crate use; a test holds them to that.
pub(crate) fn check(schema: &JSONSchemaProps, path: &FieldPath, value: &Value) -> Vec<FieldError> {
    let mut checker = Checker { errors: Vec::new() };
    checker.value(schema, path, value);
    checker.errors
}

/// A kind whose specs are checked against its schema.
pub(crate) trait Checked: CustomResourceExt {
    /// The schema of its `spec`, made once.
    fn spec_schema() -> &'static JSONSchemaProps;
}

impl Checked for VoiceAgent {
    fn spec_schema() -> &'static JSONSchemaProps {
        static SCHEMA: LazyLock<JSONSchemaProps> = LazyLock::new(|| of_spec(VoiceAgent::crd()));
        &SCHEMA
    }
}

impl Checked for VoiceRegion {
    fn spec_schema() -> &'static JSONSchemaProps {
        static SCHEMA: LazyLock<JSONSchemaProps> = LazyLock::new(|| of_spec(VoiceRegion::crd()));
        &SCHEMA
    }
}

/// The schema of its `spec`.
pub(crate) fn of_spec(crd: CustomResourceDefinition) -> JSONSchemaProps {
    let version = crd.spec.versions.into_iter().next();
    version
        .and_then(|version| version.schema?.open_api_v3_schema?.properties?.remove("spec"))
        .expect("derived definitions have a spec")
}

struct Checker {
    errors: Vec<FieldError>,
}

impl Checker {
    fn value(&mut self, schema: &JSONSchemaProps, path: &FieldPath, value: &Value) {
        let expected = match schema.x_kubernetes_int_or_string {
            Some(true) => INT_OR_STRING,
            _ => schema.type_.as_deref().unwrap_or_default(),
        };
        match (expected, value) {
            (INT_OR_STRING, Value::String(text)) => self.string(schema, path, text),
            (INT_OR_STRING, Value::Number(number)) if number.is_i64() || number.is_u64() => {
                self.number(schema, path, value);
            }
            ("object", Value::Object(map)) => self.object(schema, path, map),
            ("array", Value::Array(items)) => self.array(schema, path, items),
            ("string", Value::String(text)) => self.string(schema, path, text),
            ("integer", Value::Number(number)) if number.is_i64() || number.is_u64() => {
                self.number(schema, path, value);
            }
            ("number", Value::Number(_)) => self.number(schema, path, value),
            ("boolean", Value::Bool(_)) => {}
            _ => {
                let problem = format!("is {} where {} is needed", kind_of(value), article(expected));
                self.report(path, value, problem, form_of(schema, expected, value));
            }
        }
    }

    fn object(&mut self, schema: &JSONSchemaProps, path: &FieldPath, map: &Map<String, Value>) {
        let empty = BTreeMap::new();
        let properties = schema.properties.as_ref().unwrap_or(&empty);
        let count = i64::try_from(map.len()).unwrap_or(i64::MAX);
        if let Some(max) = schema.max_properties.filter(|max| count > *max) {
            let problem = format!("has {count} entries, more than {max}");
            self.errors.push(FieldError::without_value(path.clone(), problem, documentation(schema)));
            return;
        }
        let others = match &schema.additional_properties {
            Some(JSONSchemaPropsOrBool::Schema(others)) => Some(&**others),
            _ => None,
        };
        let anything = schema.x_kubernetes_preserve_unknown_fields == Some(true);
        for (name, value) in map {
            match properties.get(name).or(others) {
                Some(property) => self.value(property, &path.field(name), value),
                None if anything => {}
                None => self.errors.push(unknown_field(&path.field(name), name, properties.keys())),
            }
        }
        for name in schema.required.iter().flatten() {
            if !map.contains_key(name) {
                let hint = properties.get(name).map(documentation).unwrap_or_default();
                self.errors.push(FieldError::without_value(path.field(name), "is missing", hint));
            }
        }
    }

    fn array(&mut self, schema: &JSONSchemaProps, path: &FieldPath, items: &[Value]) {
        let count = i64::try_from(items.len()).unwrap_or(i64::MAX);
        let bound = match (schema.min_items, schema.max_items) {
            (Some(min), _) if count < min => Some(format!("has {count} items, fewer than {min}")),
            (_, Some(max)) if count > max => Some(format!("has {count} items, more than {max}")),
            _ => None,
        };
        if let Some(problem) = bound {
            self.errors.push(FieldError::without_value(path.clone(), problem, documentation(schema)));
            return;
        }
        if let Some(JSONSchemaPropsOrArray::Schema(item_schema)) = &schema.items {
            for (index, item) in items.iter().enumerate() {
                self.value(item_schema, &path.item(index), item);
            }
        }
        self.duplicates(schema, path, items);
    }

    /// Lists that are sets or maps hold each value or key once.
    fn duplicates(&mut self, schema: &JSONSchemaProps, path: &FieldPath, items: &[Value]) {
        let keys: &[String] = match schema.x_kubernetes_list_type.as_deref() {
            Some("set") => &[],
            Some("map") => schema.x_kubernetes_list_map_keys.as_deref().unwrap_or_default(),
            _ => return,
        };
        let key_of = |item: &Value| match keys {
            [] => vec![item.clone()],
            keys => keys.iter().map(|key| item[key].clone()).collect(),
        };
        for (index, item) in items.iter().enumerate() {
            let key = key_of(item);
            let Some(first) = items[..index].iter().position(|earlier| key_of(earlier) == key) else {
                continue;
            };
            let at = keys.first().map_or(path.item(index), |name| path.item(index).field(name));
            self.report(&at, &key[0], format!("is there already, at index {first}"), "remove one of them");
        }
    }

    fn string(&mut self, schema: &JSONSchemaProps, path: &FieldPath, text: &str) {
        let value = Value::from(text);
        if let Some(admitted) = &schema.enum_ {
            if !admitted.iter().any(|one| one.0 == value) {
                let names: Vec<&str> = admitted.iter().filter_map(|one| one.0.as_str()).collect();
                let hint = match nearest(text, names.iter().copied()) {
                    Some(near) => format!("did you mean {near}?"),
                    None => "write one of these".to_owned(),
                };
                let problem = format!("is not one of {}", names.join(", "));
                self.report(path, &value, problem, hint);
            }
            return;
        }
        let length = i64::try_from(text.chars().count()).unwrap_or(i64::MAX);
        if schema.min_length.is_some_and(|min| length < min) {
            self.report(path, &value, "is empty", documentation(schema));
        } else if let Some(max) = schema.max_length.filter(|max| length > *max) {
            let problem = format!("has {length} characters, more than {max}");
            self.report(path, &value, problem, "shorten it");
        } else if let Some(pattern) = &schema.pattern {
            let (form, regex) = form::of_pattern(pattern);
            if !regex.is_match(text) {
                self.report(path, &value, "does not have the right form", format!("write {}", form.meaning));
            }
        }
    }

    fn number(&mut self, schema: &JSONSchemaProps, path: &FieldPath, value: &Value) {
        let number = value.as_f64().unwrap_or(f64::NAN);
        let (min, max) = (schema.minimum, schema.maximum);
        let below = min.is_some_and(|min| number < min);
        let above = max.is_some_and(|max| number > max);
        if !(below || above) {
            return;
        }
        let problem = match (min, max) {
            (Some(min), Some(max)) => format!("does not lie between {min} and {max}"),
            (Some(min), None) => format!("is less than {min}"),
            (None, Some(max)) => format!("is more than {max}"),
            (None, None) => return,
        };
        self.report(path, value, problem, documentation(schema));
    }

    fn report(&mut self, path: &FieldPath, value: &Value, problem: impl Into<String>, hint: impl Into<String>) {
        self.errors.push(FieldError::new(path.clone(), value, problem, hint));
    }
}

/// The error for a field that is none, with the nearest of those that are.
pub(crate) fn unknown_field<'a>(
    path: &FieldPath,
    name: &str,
    known: impl Iterator<Item = &'a String> + Clone,
) -> FieldError {
    let hint = match nearest(name, known.clone().map(String::as_str)) {
        Some(near) => format!("did you mean {near}?"),
        None => {
            let names: Vec<&str> = known.map(String::as_str).collect();
            format!("the fields here are {}", names.join(", "))
        }
    };
    FieldError::without_value(path.clone(), "is not a known field", hint)
}

/// The candidate that `text` is most likely a slip of.
pub fn nearest<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // The distance's cost grows with the product of the lengths, and the text is somebody else's.
    if text.len() > LONGEST_SLIP {
        return None;
    }
    let lower = text.to_lowercase();
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 5)
        .min()
        .map(|(_, candidate)| candidate)
}

/// First paragraph of a field's documentation.
fn documentation(schema: &JSONSchemaProps) -> String {
    let text = paragraphs(schema.description.as_deref().unwrap_or_default());
    text.split("\n\n").next().unwrap_or_default().trim_end_matches('.').to_owned()
}

/// What to write where a value of another type stands.
fn form_of(schema: &JSONSchemaProps, expected: &str, value: &Value) -> String {
    let pattern = || schema.pattern.as_ref().map(|pattern| form::of_pattern(pattern).0.meaning);
    let range = || match (schema.minimum, schema.maximum) {
        (Some(min), Some(max)) => format!(" from {min} to {max}"),
        (Some(min), None) => format!(" from {min} on"),
        _ => String::new(),
    };
    match expected {
        "boolean" => "write true or false".to_owned(),
        "integer" => format!("write a whole number{}", range()),
        "number" => format!("write a number{}", range()),
        "array" => "write a list: [a, b], or lines that begin with -".to_owned(),
        "object" => match &schema.properties {
            Some(fields) => {
                let names: Vec<&str> = fields.keys().map(String::as_str).collect();
                format!("write fields in it: {}", names.join(", "))
            }
            None => "write fields in it, as in {name: value}".to_owned(),
        },
        _ => match (pattern(), &schema.enum_, value) {
            (Some(meaning), ..) => format!("write {meaning}"),
            (None, Some(admitted), _) => {
                let names: Vec<&str> = admitted.iter().filter_map(|one| one.0.as_str()).collect();
                format!("write one of {}", names.join(", "))
            }
            (None, None, Value::Number(_) | Value::Bool(_)) => "put it in quotes".to_owned(),
            _ => "write a text".to_owned(),
        },
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a fractional number",
        Value::Number(_) => "a whole number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map of fields",
    }
}

fn article(schema_type: &str) -> &'static str {
    match schema_type {
        "object" => "a map of fields",
        "array" => "a list",
        "string" => "a string",
        "integer" => "a whole number",
        "number" => "a number",
        "boolean" => "a boolean",
        INT_OR_STRING => "a whole number or a string",
        _ => "something else",
    }
}

/// Stands for the type of what is a whole number or a string.
const INT_OR_STRING: &str = "int-or-string";

/// Bytes of a word up to which a slip is looked for.
const LONGEST_SLIP: usize = 64;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What `check` understands; anything else in a schema would be ignored silently.
    const KEYWORDS: [&str; 23] = [
        "additionalProperties",
        "default",
        "description",
        "enum",
        "format",
        "items",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minimum",
        // Null is absent and never gets here.
        "nullable",
        "pattern",
        "properties",
        "required",
        "type",
        "x-kubernetes-int-or-string",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-list-type",
        "x-kubernetes-preserve-unknown-fields",
        // Checked by `rules`.
        "x-kubernetes-validations",
    ];

    fn keywords(schema: &Value, found: &mut Vec<String>) {
        found.extend(schema.as_object().unwrap().keys().cloned());
        if let Some(pattern) = schema["pattern"].as_str() {
            // Panics if no form has it.
            form::of_pattern(pattern);
        }
        for property in schema["properties"].as_object().into_iter().flatten() {
            keywords(property.1, found);
        }
        for inner in ["items", "additionalProperties"].map(|name| &schema[name]) {
            if inner.is_object() {
                keywords(inner, found);
            }
        }
    }

    #[test]
    fn specs_use_only_keywords_that_are_checked() {
        for crd in [VoiceAgent::crd(), VoiceRegion::crd()] {
            let crd = serde_json::to_value(crd).unwrap();
            let root = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
            let mut found = Vec::new();
            keywords(&root["properties"]["spec"], &mut found);
            found.retain(|keyword| !KEYWORDS.contains(&keyword.as_str()));
            assert_eq!(found, Vec::<String>::new());
        }
    }

    fn schema() -> JSONSchemaProps {
        serde_json::from_value(json!({
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 4, "description": "A name.\n\nMore."},
                "count": {"type": "integer", "minimum": 0, "maximum": 9, "description": "How\nmany."},
                "mode": {"type": "string", "enum": ["Active", "Idle"]},
                "tags": {
                    "type": "array", "maxItems": 2, "x-kubernetes-list-type": "set", "items": {"type": "string"}
                }
            }
        }))
        .unwrap()
    }

    fn errors(value: &Value) -> Vec<String> {
        check(&schema(), &FieldPath::of("spec"), value).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn valid_value_has_no_errors() {
        assert_eq!(errors(&json!({"name": "a", "count": 9, "mode": "Idle", "tags": ["x"]})), [""; 0]);
    }

    #[test]
    fn errors_name_field_value_problem_and_remedy() {
        for (value, expected) in [
            (json!({}), "spec.name: is missing: A name"),
            (json!({"name": 7}), "spec.name: 7 is a whole number where a string is needed: put it in quotes"),
            (json!({"name": ""}), "spec.name: \"\" is empty: A name"),
            (json!({"name": "aaaaa"}), "spec.name: \"aaaaa\" has 5 characters, more than 4: shorten it"),
            (json!({"name": "a", "count": 10}), "spec.count: 10 does not lie between 0 and 9: How many"),
            (
                json!({"name": "a", "count": 1.5}),
                "spec.count: 1.5 is a fractional number where a whole number is needed: write a whole number from 0 to 9",
            ),
            (json!({"name": "a", "cuont": 1}), "spec.cuont: is not a known field: did you mean count?"),
            (
                json!({"name": "a", "zzzzzzzz": 1}),
                "spec.zzzzzzzz: is not a known field: the fields here are count, mode, name, tags",
            ),
            (
                json!({"name": "a", "mode": "active"}),
                "spec.mode: \"active\" is not one of Active, Idle: did you mean Active?",
            ),
            (
                json!({"name": "a", "tags": ["x", "x"]}),
                "spec.tags[1]: \"x\" is there already, at index 0: remove one of them",
            ),
            (json!({"name": "a", "tags": ["x", "y", "z"]}), "spec.tags: has 3 items, more than 2"),
            (
                json!([]),
                "spec: [] is a list where a map of fields is needed: write fields in it: count, mode, name, tags",
            ),
        ] {
            assert_eq!(errors(&value), [expected]);
        }
    }

    #[test]
    fn all_errors_are_reported_at_once() {
        assert_eq!(errors(&json!({"count": -1, "mode": true, "x": 0})).len(), 4);
    }
}
