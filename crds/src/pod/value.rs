//! Parts of pods whose schema no derive can make.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value, json};

use crate::form;

/// An object of Kubernetes' own, kept as it is written. The API server checks it when pods are made.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(transparent)]
pub struct Fragment(pub Map<String, Value>);

/// An amount, as Kubernetes writes it: `500m`, `2`, `8Gi`. A whole number may be written without quotes.
#[derive(Serialize, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[serde(transparent)]
pub struct Quantity(pub String);

/// A number of things, or a share of them in percent, such as `2` or `25%`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// So many.
    Count(u32),
    /// So many of a hundred, 0..=100.
    Percent(u8),
}

/// Storage that containers of a pod can mount: a name and exactly one source of those of core/v1, such as `emptyDir`,
/// `persistentVolumeClaim`, `ephemeral`, `image`, `nfs`, `csi`, `configMap`, `secret` or `hostPath`.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// What `volumeMounts` call it.
    pub name: String,
    /// The source under its name in core/v1, as it is written.
    #[serde(flatten)]
    pub source: Map<String, Value>,
}

impl Fragment {
    /// The same as a type of Kubernetes. Fields that the type does not know are lost.
    pub fn parse<T: de::DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_value(Value::Object(self.0.clone()))
    }
}

impl JsonSchema for Fragment {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Fragment".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
    }
}

impl JsonSchema for Volume {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Volume".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {
                    "description": "What `volumeMounts` call it. Besides it, write exactly one source as in `kubectl explain pod.spec.volumes`: `emptyDir`, `persistentVolumeClaim`, `ephemeral`, `image`, `nfs`, `csi`, `configMap`, `secret`, `hostPath` and so on. Names that begin with `antiphon` are Antiphon's own.",
                    "type": "string",
                    "minLength": 1,
                    "maxLength": 63,
                    "pattern": form::LABEL.pattern,
                },
            },
            "x-kubernetes-preserve-unknown-fields": true,
            "x-kubernetes-validations": [{
                "rule": "!self.name.startsWith('antiphon')",
                "message": "names that begin with antiphon are Antiphon's own: choose another one",
                "fieldPath": ".name",
            }],
        })
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => Ok(Self(text)),
            Value::Number(number) if !number.is_f64() => Ok(Self(number.to_string())),
            _ => Err(de::Error::custom("a quantity is a string or a whole number")),
        }
    }
}

impl JsonSchema for Quantity {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "maxLength": 32,
            "pattern": form::QUANTITY.pattern,
        })
    }
}

impl Amount {
    /// So many of `whole`, rounded up.
    pub fn of(self, whole: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => {
                let share = (u64::from(whole) * u64::from(percent)).div_ceil(100);
                u32::try_from(share).unwrap_or(u32::MAX)
            }
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl Serialize for Amount {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Count(count) => serializer.serialize_u32(*count),
            Self::Percent(_) => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let percent = |text: &str| text.strip_suffix('%')?.parse().ok().filter(|percent| *percent <= 100);
        let found = match Value::deserialize(deserializer)? {
            Value::String(text) => percent(&text).map(Self::Percent),
            Value::Number(number) => number.as_u64().and_then(|count| u32::try_from(count).ok()).map(Self::Count),
            _ => None,
        };
        found.ok_or_else(|| de::Error::custom("a number or a percentage such as 25% is needed"))
    }
}

impl JsonSchema for Amount {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Amount".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "minimum": 0,
            "maximum": 10_000,
            "maxLength": 4,
            "pattern": form::PERCENT.pattern,
        })
    }
}

/// Values of labels (core/v1: at most 63 characters), at most 32 of them.
pub(crate) fn label_values(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 32,
        "additionalProperties": {"type": "string", "maxLength": 63},
    })
}

/// Values of annotations, at most 32 of them.
pub(crate) fn annotation_values(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 32,
        "additionalProperties": {"type": "string", "maxLength": 4_096},
    })
}

/// Labels of pods: [`label_values`] without Antiphon's own.
pub(crate) fn pod_labels(generator: &mut SchemaGenerator) -> Schema {
    foreign_keys(label_values(generator))
}

/// Annotations of pods: [`annotation_values`] without Antiphon's own.
pub(crate) fn pod_annotations(generator: &mut SchemaGenerator) -> Schema {
    foreign_keys(annotation_values(generator))
}

fn foreign_keys(mut map: Schema) -> Schema {
    let rule = OWN_PREFIXES.map(|prefix| format!("!key.startsWith('{prefix}')")).join(" && ");
    map.insert(
        "x-kubernetes-validations".to_owned(),
        json!([{
            "rule": format!("self.all(key, {rule})"),
            "message": format!("keys that begin with {} are Antiphon's own: choose others", OWN_PREFIXES.join(" or ")),
        }]),
    );
    map
}

/// How labels and annotations of Antiphon's own pods begin.
pub(crate) const OWN_PREFIXES: [&str; 2] = ["antiphon.dev/", "app.kubernetes.io/"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_may_be_whole_numbers_and_nothing_else() {
        for (value, expected) in [(json!("500m"), Some("500m")), (json!(2), Some("2")), (json!("0.5"), Some("0.5"))] {
            let quantity = serde_json::from_value::<Quantity>(value).ok();
            assert_eq!(quantity.as_ref().map(|quantity| quantity.0.as_str()), expected);
        }
        for value in [json!(0.5), json!(true), json!(null), json!([])] {
            assert!(serde_json::from_value::<Quantity>(value.clone()).is_err(), "{value}");
        }
    }

    #[test]
    fn amounts_are_numbers_or_percentages() {
        for (value, amount, of_ten) in [
            (json!(3), Amount::Count(3), 3),
            (json!("25%"), Amount::Percent(25), 3),
            (json!("0%"), Amount::Percent(0), 0),
            (json!("100%"), Amount::Percent(100), 10),
        ] {
            let found: Amount = serde_json::from_value(value.clone()).unwrap();
            assert_eq!((found, found.of(10)), (amount, of_ten));
            assert_eq!(serde_json::to_value(found).unwrap(), value);
        }
        for value in [json!("101%"), json!("25"), json!("%"), json!(-1), json!(1.5), json!(u64::MAX), json!(null)] {
            assert!(serde_json::from_value::<Amount>(value.clone()).is_err(), "{value}");
        }
    }

    #[test]
    fn what_kubernetes_knows_is_kept_as_it_is_written() {
        let text = json!({"name": "models", "hostPath": {"path": "/models", "newer": [1, {"than": "us"}]}});
        let volume: Volume = serde_json::from_value(text.clone()).unwrap();
        assert_eq!(serde_json::to_value(&volume).unwrap(), text);
        let fragment: Fragment = serde_json::from_value(json!({"maxSkew": 1, "newer": true})).unwrap();
        let known: k8s_openapi::api::core::v1::TopologySpreadConstraint =
            serde_json::from_value(json!({"maxSkew": 1, "topologyKey": "", "whenUnsatisfiable": ""})).unwrap();
        assert_eq!(fragment.parse::<k8s_openapi::api::core::v1::TopologySpreadConstraint>().unwrap(), known);
        assert!(serde_json::from_value::<Fragment>(json!(["list"])).is_err());
    }
}
