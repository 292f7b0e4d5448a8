//! YAML documents as trees that remember the line of every value.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};
use serde_saphyr::{Options, Spanned};

use crate::field::{FieldPath, Step};

/// A value of a document.
#[derive(Clone, Debug)]
pub(super) struct Node {
    line: u64,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Scalar(Value),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Clone, Debug)]
struct Entry {
    key: String,
    /// Line of the key.
    line: u64,
    value: Node,
}

impl Node {
    /// All documents of a text that are not empty. The reader bounds depth, aliases and size.
    pub(super) fn documents(text: &str) -> Result<Vec<Self>, serde_saphyr::Error> {
        // `yes` and `on` are strings in YAML 1.2.
        let options: Options = serde_saphyr::options! { strict_booleans: true };
        serde_saphyr::from_multiple_with_options(text, options)
    }

    /// The same without lines. A field of no value is left out: for Kubernetes null is absent.
    pub(super) fn to_json(&self) -> Value {
        match &self.kind {
            Kind::Scalar(value) => value.clone(),
            Kind::List(items) => Value::Array(items.iter().map(Self::to_json).collect()),
            Kind::Map(entries) => {
                let fields = entries.iter().map(|entry| (entry.key.clone(), entry.value.to_json()));
                Value::Object(fields.filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>())
            }
        }
    }

    /// Line of a field, or of the innermost thing around it that is there.
    pub(super) fn line_of(&self, path: &FieldPath) -> u64 {
        let (mut node, mut line) = (self, self.line);
        for step in path.steps() {
            match (step, &node.kind) {
                (Step::Field(name), Kind::Map(entries)) => {
                    let Some(entry) = entries.iter().find(|entry| entry.key == *name) else {
                        break;
                    };
                    (node, line) = (&entry.value, entry.line);
                }
                (Step::Item(index), Kind::List(items)) => {
                    let Some(item) = items.get(*index) else { break };
                    (node, line) = (item, item.line);
                }
                _ => break,
            }
        }
        line
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Kind>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), kind: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KindVisitor)
    }
}

struct KindVisitor;

impl<'de> Visitor<'de> for KindVisitor {
    type Value = Kind;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: Error>(self) -> Result<Kind, E> {
        Ok(Kind::Scalar(Value::Null))
    }

    fn visit_none<E: Error>(self) -> Result<Kind, E> {
        Ok(Kind::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Kind, D::Error> {
        Kind::deserialize(deserializer)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Kind, E> {
        Ok(Kind::Scalar(value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Kind, E> {
        Ok(Kind::Scalar(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Kind, E> {
        Ok(Kind::Scalar(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Kind, E> {
        // JSON has no infinities; as a string it is rejected where a number is needed, and shown as written.
        let number = serde_json::Number::from_f64(value).map(Value::Number);
        Ok(Kind::Scalar(number.unwrap_or_else(|| Value::String(value.to_string()))))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Kind, E> {
        Ok(Kind::Scalar(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Kind, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Kind::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Kind, A::Error> {
        let mut map = Vec::new();
        while let Some((key, value)) = entries.next_entry::<Spanned<String>, Node>()? {
            map.push(Entry { key: key.value, line: key.referenced.line(), value });
        }
        Ok(Kind::Map(map))
    }
}
