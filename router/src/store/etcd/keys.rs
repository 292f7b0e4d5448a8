//! Names and values of everything that is written to etcd; `docs/etcd.md` lists them for people.

use antiphon_core::id::Incarnation;
use serde::{Deserialize, Serialize};

use crate::store::claims::{Holder, Kind};

/// One key, below the prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry<'a> {
    /// Whose store it is. Without it the store is empty, or being filled.
    Identity,
    /// Counts changes of the records.
    Revision,
    Generations,
    /// A change that is in force and not yet spread over the records.
    Change,
    Region(&'a str),
    Agent(&'a str),
    ApiKey(&'a str),
    /// Who holds a number.
    Number(Kind, u16),
    /// Which number a name has.
    Name(Kind, &'a str),
}

impl<'a> Entry<'a> {
    pub(super) fn path(&self) -> String {
        match self {
            Self::Identity => "store".into(),
            Self::Revision => "records/revision".into(),
            Self::Generations => "records/generations".into(),
            Self::Change => "records/change".into(),
            Self::Region(name) => format!("records/regions/{name}"),
            Self::Agent(name) => format!("records/agents/{name}"),
            Self::ApiKey(id) => format!("records/keys/{id}"),
            Self::Number(kind, number) => format!("numbers/{}/{number:05}", plural(*kind)),
            Self::Name(kind, name) => format!("names/{}/{name}", plural(*kind)),
        }
    }

    /// The inverse of [`Self::path`]; `None`: a key of another release.
    pub(super) fn parse(path: &'a str) -> Option<Self> {
        let key = match path {
            "store" => Self::Identity,
            "records/revision" => Self::Revision,
            "records/generations" => Self::Generations,
            "records/change" => Self::Change,
            _ => {
                let (group, rest) = path.split_once('/')?;
                let (kind, name) = rest.split_once('/')?;
                match (group, kind) {
                    ("records", "regions") => Self::Region(name),
                    ("records", "agents") => Self::Agent(name),
                    ("records", "keys") => Self::ApiKey(name),
                    ("numbers", _) => {
                        let kind = singular(kind)?;
                        let number = name.parse().ok().filter(|n| u32::from(*n) < kind.numbers());
                        Self::Number(kind, number?)
                    }
                    ("names", _) => Self::Name(singular(kind)?, name),
                    _ => return None,
                }
            }
        };
        Some(key)
    }
}

/// Value of [`Entry::Identity`], as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Of all values below the prefix.
    pub(super) format: u16,
    /// SHA-256 of the fleet's trust anchor, hexadecimal.
    pub(super) fleet: String,
    pub(super) region: String,
    /// Random; another one means that the store was made anew.
    pub(super) id: String,
    /// The store was new or had lost something: newcomers are not numbered yet.
    pub(super) settling: bool,
}

/// Value of [`Entry::Generations`], as JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Generations {
    pub(super) wanted: u32,
    pub(super) minting: u32,
}

/// Value of [`Entry::Number`], as JSON. That of [`Entry::Name`] is the number in decimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HolderValue {
    name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    agent: String,
    incarnation: u32,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    unconfirmed: bool,
}

impl From<&Holder> for HolderValue {
    fn from(holder: &Holder) -> Self {
        let Holder { name, agent, incarnation, unconfirmed } = holder.clone();
        Self { name, agent, incarnation: incarnation.value(), unconfirmed }
    }
}

impl From<HolderValue> for Holder {
    fn from(value: HolderValue) -> Self {
        let incarnation = Incarnation::new(value.incarnation).expect("every u32 is an incarnation");
        Self { name: value.name, agent: value.agent, incarnation, unconfirmed: value.unconfirmed }
    }
}

/// A value as JSON.
pub(super) fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("strings and numbers have a form in JSON")
}

const fn plural(kind: Kind) -> &'static str {
    match kind {
        Kind::Worker => "workers",
        Kind::Relay => "relays",
    }
}

fn singular(text: &str) -> Option<Kind> {
    [Kind::Worker, Kind::Relay].into_iter().find(|kind| plural(*kind) == text)
}

/// Format of what is written. A router does not touch a store of a later one.
pub(super) const FORMAT: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_found_again_by_its_path() {
        let table = [
            (Entry::Identity, "store"),
            (Entry::Revision, "records/revision"),
            (Entry::Generations, "records/generations"),
            (Entry::Change, "records/change"),
            (Entry::Region("north"), "records/regions/north"),
            (Entry::Agent("shop/desk"), "records/agents/shop/desk"),
            (Entry::ApiKey("000000000000"), "records/keys/000000000000"),
            (Entry::Number(Kind::Worker, 7), "numbers/workers/00007"),
            (Entry::Number(Kind::Relay, 63), "numbers/relays/00063"),
            (Entry::Name(Kind::Worker, "w-1"), "names/workers/w-1"),
            (Entry::Name(Kind::Relay, "r-1"), "names/relays/r-1"),
        ];
        for (key, path) in table {
            assert_eq!(key.path(), path);
            assert_eq!(Entry::parse(path), Some(key));
        }
        for foreign in ["", "stores", "numbers/relays/64", "numbers/gpus/1", "names/x", "later/thing/x"] {
            assert_eq!(Entry::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_holder_reads_well() {
        let incarnation = Incarnation::new(77).unwrap();
        let holder = Holder { name: "w-1".into(), agent: "shop/desk".into(), incarnation, unconfirmed: false };
        let text = json(&HolderValue::from(&holder));
        assert_eq!(text, br#"{"name":"w-1","agent":"shop/desk","incarnation":77}"#);
        assert_eq!(Holder::from(serde_json::from_slice::<HolderValue>(&text).unwrap()), holder);
    }
}
