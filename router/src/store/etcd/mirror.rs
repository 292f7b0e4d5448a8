//! What etcd holds below the prefix, key by key, and transactions on it. Nothing here talks to anybody.

use std::collections::{BTreeMap, BTreeSet};

use antiphon_proto::v1;
use etcd_client::{
    Compare, CompareOp, EventType, GetOptions, KeyValue, Txn, TxnOp, TxnOpResponse, TxnResponse, WatchResponse,
};
use prost::Message as _;

use super::keys::{Entry, Generations, HolderValue, Identity};
use crate::{
    records::{self, Records},
    store::claims::{Claims, Kind},
};

/// A copy of all that is below the prefix.
#[derive(Clone, Debug, Default)]
pub(super) struct Mirror {
    /// `None`: the store is empty, or being filled by somebody.
    pub(super) identity: Option<Identity>,
    /// Records without the change that is not spread yet.
    pub(super) base: Records,
    pub(super) change: Option<v1::ApplyRequest>,
    pub(super) claims: Claims,
    /// What the keys of names say. It is ahead of the claims if such a key was read alone.
    names: BTreeMap<(Kind, String), u16>,
    /// Up to which of etcd's revisions it is complete.
    pub(super) complete: i64,
    /// etcd's revision of each key.
    modified: BTreeMap<String, i64>,
    /// When keys were deleted of which the watch may still tell something older.
    deleted: BTreeMap<String, i64>,
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    Yes,
    /// Something had changed; the mirror has it now.
    No,
    /// The store is not there any more; the mirror is as it was.
    Emptied,
}

/// What one transaction does, if nothing that it rests on has changed. Every step rests on the store's identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step<T> {
    /// Keys that have to be as they are in the mirror.
    pub(super) rests_on: Vec<String>,
    /// Keys to write; `None`: to delete.
    pub(super) writes: BTreeMap<String, Option<Vec<u8>>>,
    /// What to read anew if something has changed.
    pub(super) refresh: Refresh,
    /// What has been achieved then.
    pub(super) outcome: T,
}

/// What to read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refresh {
    /// The keys that the step rests on.
    Keys,
    /// Those, and all records: they make sense together only.
    Records,
}

impl Mirror {
    /// What a snapshot knows. It is nobody's state until etcd was read.
    pub(super) fn of_snapshot(records: &Records, claims: Claims) -> Self {
        Self { base: records.clone(), claims, ..Self::default() }
    }

    /// Whether nobody has made it a store.
    pub(super) fn is_empty_store(&self) -> bool {
        self.modified(&Entry::Identity.path()) == 0
    }

    /// All records, the change that is not spread included.
    pub(super) fn records(&self) -> Records {
        let mut records = self.base.clone();
        if let Some(change) = &self.change {
            match records.apply(change) {
                Ok(changed) => records = Records { revision: self.base.revision, ..changed },
                Err(error) => tracing::warn!("a pending change of the records is ignored: {error}"),
            }
        }
        // Routers never write such a thing; people with etcdctl might.
        let mut numbers = BTreeMap::new();
        records.regions.retain(|name, region| {
            let first = numbers.entry(region.number.value()).or_insert_with(|| name.clone());
            let unique = first == name;
            if !unique {
                tracing::warn!("region {name} is ignored: it has the number of region {first}");
            }
            unique
        });
        records
    }

    /// The number that a name has according to its own key.
    pub(super) fn named(&self, kind: Kind, name: &str) -> Option<u16> {
        self.names.get(&(kind, name.to_owned())).copied()
    }

    /// Whether newcomers have to wait.
    pub(super) fn settling(&self) -> bool {
        self.identity.as_ref().is_none_or(|identity| identity.settling)
    }

    /// etcd's revision of a key; 0: it is not there.
    fn modified(&self, path: &str) -> i64 {
        self.modified.get(path).copied().unwrap_or(0)
    }

    /// Takes a key's value, unless a newer one is there. What cannot be read leaves the former value in force.
    pub(super) fn put(&mut self, path: &str, value: &[u8], modified: i64) {
        let deleted = self.deleted.get(path).copied().unwrap_or(0);
        if modified <= self.modified(path).max(deleted) {
            return;
        }
        self.modified.insert(path.to_owned(), modified);
        if let Err(problem) = self.read(path, value) {
            tracing::warn!(key = path, "a value in etcd is not used: {problem}");
        }
    }

    fn read(&mut self, path: &str, value: &[u8]) -> Result<(), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        match Entry::parse(path) {
            Some(Entry::Identity) => self.identity = Some(serde_json::from_slice(value).map_err(|e| text(&e))?),
            Some(Entry::Revision) => self.base.revision = decimal(value)?,
            Some(Entry::Generations) => {
                let Generations { wanted, minting } = serde_json::from_slice(value).map_err(|e| text(&e))?;
                (self.base.key_generation, self.base.minting_generation) = (wanted, minting);
            }
            Some(Entry::Change) => self.change = Some(v1::ApplyRequest::decode(value).map_err(|e| text(&e))?),
            Some(Entry::Region(name)) => {
                let record = v1::RegionRecord::decode(value).map_err(|e| text(&e))?;
                let region = records::region(&record).map_err(|e| text(&e))?;
                named(name, &region.name)?;
                self.base.regions.insert(name.to_owned(), region);
            }
            Some(Entry::Agent(name)) => {
                let record = v1::AgentRecord::decode(value).map_err(|e| text(&e))?;
                let agent = records::agent(&record).map_err(|e| text(&e))?;
                named(name, &agent.behaviour.agent)?;
                self.base.agents.insert(name.to_owned(), agent);
            }
            Some(Entry::ApiKey(name)) => {
                let record = v1::KeyRecord::decode(value).map_err(|e| text(&e))?;
                let (id, key) = records::key(&record).map_err(|e| text(&e))?;
                named(name, &id)?;
                self.base.keys.insert(id, key);
            }
            Some(Entry::Number(kind, number)) => {
                let holder: HolderValue = serde_json::from_slice(value).map_err(|e| text(&e))?;
                self.claims.of_mut(kind).put(number, holder.into());
            }
            Some(Entry::Name(kind, name)) => {
                let number = u16::try_from(decimal(value)?).map_err(|e| text(&e))?;
                self.names.insert((kind, name.to_owned()), number);
            }
            None => return Err("its key is not known to this release".into()),
        }
        Ok(())
    }

    /// Takes a key away, unless it was written later.
    pub(super) fn delete(&mut self, path: &str, revision: i64) {
        if revision <= self.modified(path) {
            return;
        }
        self.modified.remove(path);
        self.deleted.insert(path.to_owned(), revision);
        match Entry::parse(path) {
            Some(Entry::Identity) => self.identity = None,
            Some(Entry::Change) => self.change = None,
            Some(Entry::Region(name)) => drop(self.base.regions.remove(name)),
            Some(Entry::Agent(name)) => drop(self.base.agents.remove(name)),
            Some(Entry::ApiKey(id)) => drop(self.base.keys.remove(id)),
            Some(Entry::Number(kind, number)) => self.claims.of_mut(kind).remove(number),
            Some(Entry::Name(kind, name)) => drop(self.names.remove(&(kind, name.to_owned()))),
            // Counters never go back.
            Some(Entry::Revision | Entry::Generations) | None => {}
        }
    }

    /// Takes what a range holds at a revision: what is not among `found` is gone.
    fn replace(&mut self, range: &str, whole: bool, found: &[KeyValue], prefix: &str, revision: i64) {
        let mut present = BTreeSet::new();
        for kv in found {
            if let Some(path) = path_below(prefix, kv) {
                present.insert(path.to_owned());
                self.put(path, kv.value(), kv.mod_revision());
            }
        }
        let inside = |path: &&String| if whole { path.starts_with(range) } else { *path == range };
        let gone: Vec<_> =
            self.modified.keys().filter(inside).filter(|path| !present.contains(*path)).cloned().collect();
        gone.iter().for_each(|path| self.delete(path, revision));
    }

    /// Everything below the prefix at a revision.
    pub(super) fn listed(kvs: &[KeyValue], prefix: &str, revision: i64) -> Self {
        let mut mirror = Self { complete: revision, ..Self::default() };
        for kv in kvs {
            if let Some(path) = path_below(prefix, kv) {
                mirror.put(path, kv.value(), kv.mod_revision());
            }
        }
        mirror
    }

    /// Takes what the watch tells.
    pub(super) fn watched(&mut self, response: &WatchResponse, prefix: &str) {
        for event in response.events() {
            let Some((kv, path)) = event.kv().and_then(|kv| Some((kv, path_below(prefix, kv)?))) else {
                continue;
            };
            match event.event_type() {
                EventType::Put => self.put(path, kv.value(), kv.mod_revision()),
                EventType::Delete => self.delete(path, kv.mod_revision()),
            }
            self.complete = self.complete.max(kv.mod_revision());
        }
        let complete = self.complete;
        self.deleted.retain(|_, revision| *revision > complete);
    }

    /// The step as a transaction.
    pub(super) fn transaction<T>(&self, step: &Step<T>, prefix: &str) -> Txn {
        let full = |path: &str| format!("{prefix}/{path}");
        let same = |path: &String| Compare::mod_revision(full(path), CompareOp::Equal, self.modified(path));
        let write = |(path, value): (&String, &Option<Vec<u8>>)| match value {
            Some(value) => TxnOp::put(full(path), value.clone(), None),
            None => TxnOp::delete(full(path), None),
        };
        let identity = [Entry::Identity.path()];
        let rests_on = || identity.iter().chain(&step.rests_on);
        let mut reads: Vec<TxnOp> = rests_on().map(|path| TxnOp::get(full(path), None)).collect();
        if step.refresh == Refresh::Records {
            reads.push(TxnOp::get(full(RECORDS), Some(GetOptions::new().with_prefix())));
        }
        Txn::new()
            .when(rests_on().map(same).collect::<Vec<_>>())
            .and_then(step.writes.iter().map(write).collect::<Vec<_>>())
            .or_else(reads)
    }

    /// Takes the outcome of [`Self::transaction`].
    pub(super) fn transacted<T>(&mut self, step: &Step<T>, response: &TxnResponse, prefix: &str) -> Done {
        let revision = response.header().map_or(0, etcd_client::ResponseHeader::revision);
        if response.succeeded() {
            for (path, value) in &step.writes {
                match value {
                    Some(value) => self.put(path, value, revision),
                    None => self.delete(path, revision),
                }
            }
            return Done::Yes;
        }
        let identity = Entry::Identity.path();
        let reads = response.op_responses();
        if let Some(TxnOpResponse::Get(found)) = reads.first()
            && found.kvs().is_empty()
            && self.modified(&identity) != 0
        {
            return Done::Emptied;
        }
        let keys = [identity.as_str()].into_iter().chain(step.rests_on.iter().map(String::as_str));
        let ranges = keys.map(|path| (path, false)).chain([(RECORDS, true)]);
        for ((range, whole), read) in ranges.zip(reads) {
            if let TxnOpResponse::Get(found) = read {
                self.replace(range, whole, found.kvs(), prefix, revision);
            }
        }
        Done::No
    }
}

/// Writes that turn some records into others.
pub(super) fn difference(before: &Records, after: &Records) -> BTreeMap<String, Option<Vec<u8>>> {
    let mut writes = BTreeMap::new();
    macro_rules! compare {
        ($field:ident, $key:ident, $encode:expr) => {
            for (name, record) in &after.$field {
                if before.$field.get(name) != Some(record) {
                    writes.insert(Entry::$key(name).path(), Some($encode(name, record).encode_to_vec()));
                }
            }
            for name in before.$field.keys().filter(|name| !after.$field.contains_key(*name)) {
                writes.insert(Entry::$key(name).path(), None);
            }
        };
    }
    compare!(regions, Region, |_, region| v1::RegionRecord::from(region));
    compare!(agents, Agent, |_, agent| v1::AgentRecord::from(agent));
    compare!(keys, ApiKey, |id, key: &records::Key| key.record(id));
    writes
}

/// The generations, if they differ.
pub(super) fn generations(before: &Records, after: &Records) -> Option<(String, Option<Vec<u8>>)> {
    let of = |records: &Records| Generations { wanted: records.key_generation, minting: records.minting_generation };
    (of(before) != of(after)).then(|| (Entry::Generations.path(), Some(super::keys::json(&of(after)))))
}

fn path_below<'a>(prefix: &str, kv: &'a KeyValue) -> Option<&'a str> {
    kv.key_str().ok()?.strip_prefix(prefix)?.strip_prefix('/')
}

fn decimal(value: &[u8]) -> Result<u64, String> {
    let text = std::str::from_utf8(value).map_err(|e| e.to_string())?;
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

fn named(key: &str, record: &str) -> Result<(), String> {
    if key == record { Ok(()) } else { Err(format!("it is the record of {record}")) }
}

const RECORDS: &str = "records/";
