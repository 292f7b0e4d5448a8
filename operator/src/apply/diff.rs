//! What differs between an object as it is wanted and as it is.

use std::fmt;

use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

/// A short hash of a JSON value; objects are in order of their keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest([u8; 10]);

impl Digest {
    /// Of a value.
    #[must_use]
    pub fn of(value: &Value) -> Self {
        // Another crate of the build may have serde_json keep keys as they came.
        let mut sorted = value.clone();
        sorted.sort_all_objects();
        let hash = Sha256::digest(sorted.to_string());
        let mut short = [0; 10];
        short.copy_from_slice(&hash[..10]);
        Self(short)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Without nulls, which in an apply mean nothing: the API server keeps none. Empty lists and maps stay: some of them
/// say something (a NetworkPolicy's empty pod selector is all pods).
#[must_use]
pub fn pruned(value: Value) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields.into_iter().filter(|(_, field)| !field.is_null()).map(|(key, field)| (key, pruned(field))).collect(),
        ),
        Value::Array(items) => Value::Array(items.into_iter().map(pruned).collect()),
        other => other,
    }
}

/// Whether `live` has everything that `wanted` has; what else it has is another's, or a default.
#[must_use]
pub fn contains(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => wanted.iter().all(|(key, wanted)| match live.get(key) {
            Some(live) => contains(live, wanted),
            None => is_empty(wanted),
        }),
        (Value::Array(live), Value::Array(wanted)) => match key_of(wanted) {
            Some(key) => wanted.iter().all(|item| find(live, key, item).is_some_and(|found| contains(found, item))),
            None => live.len() == wanted.len() && live.iter().zip(wanted).all(|(live, wanted)| contains(live, wanted)),
        },
        (live, wanted) => live == wanted,
    }
}

/// Of `live` what `wanted` speaks of.
#[must_use]
pub fn projected(live: &Value, wanted: &Value) -> Value {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => Value::Object(
            wanted
                .iter()
                .map(|(key, wanted)| (key.clone(), live.get(key).map_or(Value::Null, |live| projected(live, wanted))))
                .collect::<Map<_, _>>(),
        ),
        (Value::Array(live), Value::Array(wanted)) => match key_of(wanted) {
            Some(key) => wanted
                .iter()
                .map(|item| find(live, key, item).map_or(Value::Null, |found| projected(found, item)))
                .collect(),
            None if live.len() == wanted.len() => {
                live.iter().zip(wanted).map(|(live, wanted)| projected(live, wanted)).collect()
            }
            None => Value::Array(live.clone()),
        },
        (live, _) => live.clone(),
    }
}

/// The API server leaves out what is empty.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.values().all(is_empty),
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Null => true,
        _ => false,
    }
}

/// The field that tells the items of a list apart, as the API's list maps have them; others may add items of their own.
fn key_of(items: &[Value]) -> Option<&'static str> {
    let distinct = |key: &&&'static str| {
        let mut seen = std::collections::BTreeSet::new();
        items.iter().all(|item| item.get(**key).and_then(Value::as_str).is_some_and(|name| seen.insert(name)))
    };
    if items.is_empty() { None } else { ["name", "uid"].iter().find(distinct).copied() }
}

fn find<'a>(live: &'a [Value], key: &str, item: &Value) -> Option<&'a Value> {
    live.iter().find(|found| found.get(key) == item.get(key))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn defaults_and_other_peoples_fields_are_no_difference() {
        let wanted = json!({"spec": {"replicas": 2, "containers": [{"name": "relay", "image": "a:1"}], "empty": {}}});
        let live = json!({"spec": {
            "replicas": 2, "strategy": "default", "containers": [
                {"name": "injected", "image": "x"}, {"name": "relay", "image": "a:1", "imagePullPolicy": "IfNotPresent"}
            ]
        }});
        assert!(contains(&live, &wanted));
    }

    #[test]
    fn a_changed_missing_or_reordered_value_is_a_difference() {
        let wanted = json!({"a": 1, "list": [{"port": 1}, {"port": 2}], "args": ["--x", "--y"]});
        assert!(contains(&wanted, &wanted));
        for live in [
            json!({"a": 2, "list": [{"port": 1}, {"port": 2}], "args": ["--x", "--y"]}),
            json!({"list": [{"port": 1}, {"port": 2}], "args": ["--x", "--y"]}),
            json!({"a": 1, "list": [{"port": 1}], "args": ["--x", "--y"]}),
            json!({"a": 1, "list": [{"port": 1}, {"port": 2}], "args": ["--y", "--x"]}),
            json!({"a": 1, "list": [{"port": 1}, {"port": 2}], "args": ["--x", "--y", "--z"]}),
        ] {
            assert!(!contains(&live, &wanted), "{live}");
        }
    }

    #[test]
    fn a_projection_shows_only_what_is_asked_for() {
        let wanted = json!({"cpu": "1000m", "list": [{"name": "a", "x": 1}]});
        let live = json!({"cpu": "1", "memory": "2Gi", "list": [{"name": "b"}, {"name": "a", "x": 1, "y": 2}]});
        assert_eq!(projected(&live, &wanted), json!({"cpu": "1", "list": [{"name": "a", "x": 1}]}));
    }

    #[test]
    fn digests_do_not_depend_on_the_order_of_keys() {
        let (a, b) = (r#"{"a": 1, "b": 2}"#, r#"{"b": 2, "a": 1}"#);
        let digest = |text| Digest::of(&serde_json::from_str(text).unwrap());
        assert_eq!(digest(a), digest(b));
        assert_eq!(digest(a).to_string().len(), 20);
    }
}
