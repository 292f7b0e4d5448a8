//! What the operator compiles from resources and routers act on: regions, agents, API keys.

use std::{collections::BTreeMap, time::Duration};

use antiphon_core::{
    generation,
    geo::{GeoError, Location},
    id::RegionNumber,
    placement::{AgentPolicy, Phase, RELAX_OVER},
};
use antiphon_proto::{api_key, ticket::codec_label, v1};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::field::{self, FieldError};

/// A region of the fleet.
#[derive(Clone, Debug, PartialEq)]
pub struct Region {
    /// Name, unique in the fleet.
    pub name: String,
    /// Number, unique in the fleet.
    pub number: RegionNumber,
    /// The cloud it is in.
    pub cloud: String,
    /// Where it is.
    pub location: Option<Location>,
    /// Whether it takes new sessions.
    pub phase: Phase,
    /// Residency zones it is in.
    pub residency: Vec<String>,
    /// `host:port` of each of its routers for other routers; empty: not reachable.
    pub router_addresses: Vec<String>,
    /// Whether other regions reach its workers through its relays only.
    pub via_relays: bool,
}

/// An agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Agent {
    /// What its workers have to know.
    pub behaviour: v1::AgentBehaviour,
    /// What placement has to know.
    pub policy: AgentPolicy,
    /// What callers may ask for; never empty.
    pub codecs: Vec<v1::Codec>,
    /// Sessions of one tenant at a time; 0: no limit.
    pub sessions_per_tenant: u32,
    /// Tickets for one tenant; 0: no limit.
    pub tickets_per_minute_per_tenant: u32,
}

/// An API key, without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// SHA-256 of the whole text.
    pub sha256: [u8; 32],
    /// Whose it is.
    pub tenant: String,
    /// `namespace/name` or `namespace/*`; empty: all agents.
    pub agents: Vec<String>,
    /// Tickets that it may ask for; 0: the router's default.
    pub tickets_per_minute: u32,
}

impl Key {
    /// Whether the key may be used for an agent.
    #[must_use]
    pub fn allows(&self, agent: &str) -> bool {
        let matches = |pattern: &String| match pattern.strip_suffix('*') {
            Some(prefix) => agent.starts_with(prefix),
            None => agent == pattern,
        };
        self.agents.is_empty() || self.agents.iter().any(matches)
    }

    /// As it travels.
    pub(crate) fn record(&self, id: &str) -> v1::KeyRecord {
        v1::KeyRecord {
            id: id.to_owned(),
            sha256: self.sha256.to_vec().into(),
            tenant: self.tenant.clone(),
            agents: self.agents.clone(),
            tickets_per_minute: self.tickets_per_minute,
        }
    }
}

/// All records at one revision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Records {
    /// Grows with each change, over restarts and losses of the store too.
    pub revision: u64,
    /// By name.
    pub regions: BTreeMap<String, Region>,
    /// By `namespace/name`.
    pub agents: BTreeMap<String, Agent>,
    /// By id.
    pub keys: BTreeMap<String, Key>,
    /// The generation of keys that the region is to move to; 0 until somebody says so, which means the first.
    pub key_generation: u32,
    /// The generation that the region's routers began to use; 0: not known. Never goes down.
    pub minting_generation: u32,
}

impl Records {
    /// The records after a change, all of it or nothing.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn apply(&self, change: &v1::ApplyRequest) -> Result<Self, FieldError> {
        let mut next = self.clone();
        // First: another region may have the number from now on.
        for name in &change.removed_regions {
            next.regions.remove(name);
        }
        for (index, record) in change.regions.iter().enumerate() {
            let at = format!("regions[{index}]");
            let region = region(record).map_err(|e| e.below(&at))?;
            let taken = |r: &Region| r.number == region.number && r.name != region.name;
            if let Some(other) = next.regions.values().find(|r| taken(r)) {
                return Err(FieldError::new(
                    format!("{at}.number"),
                    format!("{} is the number of region {}", region.number, other.name),
                ));
            }
            next.regions.insert(region.name.clone(), region);
        }
        for (index, record) in change.agents.iter().enumerate() {
            let agent = agent(record).map_err(|e| e.below(&format!("agents[{index}]")))?;
            next.agents.insert(agent.behaviour.agent.clone(), agent);
        }
        for (index, record) in change.keys.iter().enumerate() {
            let (id, key) = key(record).map_err(|e| e.below(&format!("keys[{index}]")))?;
            next.keys.insert(id, key);
        }
        // Before the region has a record nothing runs in it: a new one may join the fleet at any generation.
        next.key_generation = match (self.regions.is_empty(), change.key_generation) {
            (true, asked) if asked > 0 => asked,
            (_, asked) => generation::wanted(self.key_generation, asked)
                .map_err(|e| FieldError::new("keyGeneration", e.to_string()))?,
        };
        next.minting_generation = self.minting_generation.max(change.minting_generation);
        for id in &change.removed_keys {
            next.keys.remove(id);
        }
        for name in &change.removed_agents {
            next.agents.remove(name);
        }
        next.revision += 1;
        Ok(next)
    }
}

impl Records {
    /// SHA-256 of what operators write, in hex: the same wherever the records are the same.
    pub(crate) fn hash(&self) -> String {
        let written = v1::ApplyRequest { key_generation: 0, minting_generation: 0, ..self.all() };
        hex::encode(Sha256::digest(written.encode_to_vec()))
    }

    /// Everything, as one change from nothing.
    pub(crate) fn all(&self) -> v1::ApplyRequest {
        v1::ApplyRequest {
            regions: self.regions.values().map(Into::into).collect(),
            agents: self.agents.values().map(Into::into).collect(),
            keys: self.keys.iter().map(|(id, key)| key.record(id)).collect(),
            key_generation: self.key_generation,
            minting_generation: self.minting_generation,
            ..v1::ApplyRequest::default()
        }
    }

    /// The inverse of [`Self::all`]. What another release wrote and this one does not understand is left out, and said.
    pub(crate) fn from_all(revision: u64, all: &v1::ApplyRequest) -> (Self, Vec<FieldError>) {
        let mut records = Self {
            revision,
            key_generation: all.key_generation,
            minting_generation: all.minting_generation,
            ..Self::default()
        };
        let mut errors = Vec::new();
        let mut checked = |outcome: Result<(), FieldError>| errors.extend(outcome.err());
        for record in &all.regions {
            checked(region(record).map(|region| drop(records.regions.insert(region.name.clone(), region))));
        }
        for record in &all.agents {
            let name = |agent: &Agent| agent.behaviour.agent.clone();
            checked(agent(record).map(|agent| drop(records.agents.insert(name(&agent), agent))));
        }
        for record in &all.keys {
            checked(key(record).map(|(id, key)| drop(records.keys.insert(id, key))));
        }
        (records, errors)
    }
}

impl From<&Region> for v1::RegionRecord {
    fn from(region: &Region) -> Self {
        let point = |l: Location| v1::Location { latitude: l.latitude(), longitude: l.longitude() };
        Self {
            name: region.name.clone(),
            number: region.number.value().into(),
            cloud: region.cloud.clone(),
            location: region.location.map(point),
            phase: proto_phase(region.phase).into(),
            residency: region.residency.clone(),
            router_address: region.router_addresses.first().cloned().unwrap_or_default(),
            via_relays: region.via_relays,
            router_addresses: region.router_addresses.clone(),
        }
    }
}

impl From<&Agent> for v1::AgentRecord {
    fn from(agent: &Agent) -> Self {
        let entry = |(region, weight): &(String, u32)| v1::AgentRegion { region: region.clone(), weight: *weight };
        let ms = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        Self {
            behaviour: Some(agent.behaviour.clone()),
            regions: agent.policy.regions.iter().flatten().map(entry).collect(),
            gpu_class: agent.policy.gpu_class.clone(),
            rtt_ceiling_ms: ms(agent.policy.rtt_ceiling),
            rtt_ceiling_max_ms: ms(agent.policy.rtt_ceiling_max),
            codecs: agent.codecs.iter().map(|codec| i32::from(*codec)).collect(),
            sessions_per_tenant: agent.sessions_per_tenant,
            tickets_per_minute_per_tenant: agent.tickets_per_minute_per_tenant,
        }
    }
}

/// The domain's phase; unspecified counts as active.
#[must_use]
pub(crate) fn phase(phase: i32) -> Phase {
    match v1::Phase::try_from(phase) {
        Ok(v1::Phase::Cordoned) => Phase::Cordoned,
        Ok(v1::Phase::Draining) => Phase::Draining,
        // A value of a newer release must not bring something into service.
        Err(_) => Phase::Cordoned,
        Ok(v1::Phase::Active | v1::Phase::Unspecified) => Phase::Active,
    }
}

/// The protocol's phase.
#[must_use]
pub(crate) const fn proto_phase(phase: Phase) -> v1::Phase {
    match phase {
        Phase::Active => v1::Phase::Active,
        Phase::Cordoned => v1::Phase::Cordoned,
        Phase::Draining => v1::Phase::Draining,
    }
}

/// Checks a point; `None` stays `None`.
pub(crate) fn location(location: Option<&v1::Location>) -> Result<Option<Location>, FieldError> {
    let checked = location.map(|l| Location::new(l.latitude, l.longitude));
    checked.transpose().map_err(|error| {
        let path = match error {
            GeoError::Latitude(_) => "location.latitude",
            GeoError::Longitude(_) => "location.longitude",
        };
        FieldError::new(path, error.to_string())
    })
}

pub(crate) fn region(record: &v1::RegionRecord) -> Result<Region, FieldError> {
    let number = u16::try_from(record.number).ok();
    let number = number.and_then(|n| RegionNumber::new(n).ok());
    for (index, zone) in record.residency.iter().enumerate() {
        field::label(&format!("residency[{index}]"), zone)?;
    }
    Ok(Region {
        name: field::label("name", &record.name)?,
        number: number
            .ok_or_else(|| FieldError::new("number", format!("{} is out of range 0..=1023", record.number)))?,
        cloud: record.cloud.clone(),
        location: location(record.location.as_ref())?,
        phase: phase(record.phase),
        residency: record.residency.clone(),
        router_addresses: router_addresses(record)?,
        via_relays: record.via_relays,
    })
}

/// All addresses in order, each once.
fn router_addresses(record: &v1::RegionRecord) -> Result<Vec<String>, FieldError> {
    let named = |(index, address)| (format!("routerAddresses[{index}]"), address);
    let first = [("routerAddress".to_owned(), &record.router_address)];
    let all = first.into_iter().filter(|(_, a)| !a.is_empty());
    let mut addresses = Vec::with_capacity(1);
    for (path, address) in all.chain(record.router_addresses.iter().enumerate().map(named)) {
        if !address.contains(':') {
            return Err(FieldError::new(path, "expected HOST:PORT"));
        }
        if !addresses.contains(address) {
            addresses.push(address.clone());
        }
    }
    if addresses.len() > MAX_ROUTERS {
        let problem = format!("has {} addresses, at most {MAX_ROUTERS}", addresses.len());
        return Err(FieldError::new("routerAddresses", problem));
    }
    Ok(addresses)
}

pub(crate) fn agent(record: &v1::AgentRecord) -> Result<Agent, FieldError> {
    let Some(behaviour) = record.behaviour.clone() else {
        return Err(FieldError::new("behaviour", "is required"));
    };
    field::agent("behaviour.agent", &behaviour.agent)?;
    if behaviour.engine.is_empty() {
        return Err(FieldError::new("behaviour.engine", "is required, such as \"echo\""));
    }
    let mut regions = Vec::with_capacity(record.regions.len());
    for (index, entry) in record.regions.iter().enumerate() {
        let at = format!("regions[{index}]");
        let name = field::label("region", &entry.region).map_err(|e| e.below(&at))?;
        if !(1..=1000).contains(&entry.weight) {
            let problem = format!("{} is out of range 1..=1000", entry.weight);
            return Err(FieldError::new(format!("{at}.weight"), problem));
        }
        regions.push((name, entry.weight));
    }
    let any = AgentPolicy::default();
    let (preferred, max) = match (record.rtt_ceiling_ms, record.rtt_ceiling_max_ms) {
        (0, 0) => (any.rtt_ceiling, any.rtt_ceiling_max),
        (0, max) => (millis(max), millis(max)),
        (preferred, 0) => (millis(preferred), millis(preferred)),
        (preferred, max) if preferred <= max => (millis(preferred), millis(max)),
        (preferred, max) => {
            let problem = format!("{max} is below rttCeilingMs, which is {preferred}");
            return Err(FieldError::new("rttCeilingMaxMs", problem));
        }
    };
    let codec = |(index, codec): (usize, &i32)| match v1::Codec::try_from(*codec) {
        Ok(codec) if codec_label(codec).is_some() => Ok(codec),
        _ => Err(FieldError::new(format!("codecs[{index}]"), "is no codec")),
    };
    let mut codecs = record.codecs.iter().enumerate().map(codec).collect::<Result<Vec<_>, _>>()?;
    if codecs.is_empty() {
        codecs = vec![v1::Codec::Opus, v1::Codec::L1616k, v1::Codec::L1624k];
    }
    Ok(Agent {
        policy: AgentPolicy {
            gpu_class: record.gpu_class.clone(),
            rtt_ceiling: preferred,
            rtt_ceiling_max: max,
            relax_over: RELAX_OVER,
            regions: Some(regions),
        },
        behaviour,
        codecs,
        sessions_per_tenant: record.sessions_per_tenant,
        tickets_per_minute_per_tenant: record.tickets_per_minute_per_tenant,
    })
}

pub(crate) fn key(record: &v1::KeyRecord) -> Result<(String, Key), FieldError> {
    if !api_key::is_id(&record.id) {
        return Err(FieldError::new("id", "expected 12 characters of base32"));
    }
    let sha256 = record.sha256.as_ref().try_into();
    let sha256 = sha256.map_err(|_| FieldError::new("sha256", "expected 32 bytes"))?;
    for (index, pattern) in record.agents.iter().enumerate() {
        let at = format!("agents[{index}]");
        match pattern.strip_suffix("/*") {
            Some(namespace) => field::label(&at, namespace)?,
            None => field::agent(&at, pattern)?,
        };
    }
    let key = Key {
        sha256,
        tenant: field::label("tenant", &record.tenant)?,
        agents: record.agents.clone(),
        tickets_per_minute: record.tickets_per_minute,
    };
    Ok((record.id.clone(), key))
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

/// Routers of one region.
const MAX_ROUTERS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn region(name: &str, number: u32) -> v1::RegionRecord {
        v1::RegionRecord { name: name.into(), number, ..v1::RegionRecord::default() }
    }

    fn agent_record() -> v1::AgentRecord {
        v1::AgentRecord {
            behaviour: Some(v1::AgentBehaviour {
                agent: "shop/desk".into(),
                engine: "echo".into(),
                ..v1::AgentBehaviour::default()
            }),
            ..v1::AgentRecord::default()
        }
    }

    #[test]
    fn a_change_is_taken_whole_or_not_at_all() {
        let good = v1::ApplyRequest {
            regions: vec![region("frankfurt", 1)],
            agents: vec![agent_record()],
            ..v1::ApplyRequest::default()
        };
        let records = Records::default().apply(&good).unwrap();
        assert_eq!((records.revision, records.regions.len()), (1, 1));
        let bad = v1::ApplyRequest {
            regions: vec![region("virginia", 2), region("osaka", 1)],
            ..v1::ApplyRequest::default()
        };
        let error = records.apply(&bad).unwrap_err();
        assert_eq!(error.to_string(), "regions[1].number: 1 is the number of region frankfurt");
        let gone = v1::ApplyRequest {
            removed_agents: vec!["shop/desk".into(), "never/was".into()],
            ..v1::ApplyRequest::default()
        };
        assert!(records.apply(&gone).unwrap().agents.is_empty());
    }

    #[test]
    fn the_number_of_a_removed_region_is_free_at_once() {
        let region = |name: &str| v1::RegionRecord { name: name.into(), number: 1, ..v1::RegionRecord::default() };
        let change = |regions: &[&str], removed: &[&str]| v1::ApplyRequest {
            regions: regions.iter().map(|name| region(name)).collect(),
            removed_regions: removed.iter().map(|name| (*name).into()).collect(),
            ..v1::ApplyRequest::default()
        };
        let before = Records::default().apply(&change(&["old"], &[])).unwrap();
        let after = before.apply(&change(&["new"], &["old", "never-was"])).unwrap();
        assert_eq!(after.regions.keys().collect::<Vec<_>>(), ["new"]);
    }

    #[test]
    fn impossible_values_name_their_field() {
        let agent = |change: fn(&mut v1::AgentRecord)| {
            let mut record = agent_record();
            change(&mut record);
            v1::ApplyRequest { agents: vec![record], ..v1::ApplyRequest::default() }
        };
        let region = |record| v1::ApplyRequest { regions: vec![record], ..v1::ApplyRequest::default() };
        let key = |id: &str, sha256: &'static [u8], agents: &str| v1::ApplyRequest {
            keys: vec![v1::KeyRecord {
                id: id.into(),
                sha256: sha256.into(),
                tenant: "acme".into(),
                agents: vec![agents.into()],
                tickets_per_minute: 0,
            }],
            ..v1::ApplyRequest::default()
        };
        let nowhere = v1::Location { latitude: 91.0, longitude: 0.0 };
        let table = [
            (region(self::region("Frankfurt", 1)), "regions[0].name"),
            (region(self::region("f", 1024)), "regions[0].number"),
            (
                region(v1::RegionRecord { location: Some(nowhere), ..self::region("f", 1) }),
                "regions[0].location.latitude",
            ),
            (agent(|a| a.behaviour = None), "agents[0].behaviour"),
            (agent(|a| a.behaviour.as_mut().unwrap().agent = "x".into()), "agents[0].behaviour.agent"),
            (agent(|a| a.behaviour.as_mut().unwrap().engine.clear()), "agents[0].behaviour.engine"),
            (
                agent(|a| a.regions = vec![v1::AgentRegion { region: "f".into(), weight: 0 }]),
                "agents[0].regions[0].weight",
            ),
            (agent(|a| (a.rtt_ceiling_ms, a.rtt_ceiling_max_ms) = (100, 50)), "agents[0].rttCeilingMaxMs"),
            (agent(|a| a.codecs = vec![0]), "agents[0].codecs[0]"),
            (key("short", &[0; 32], "a/b"), "keys[0].id"),
            (key("000000000000", &[0; 31], "a/b"), "keys[0].sha256"),
            (key("000000000000", &[0; 32], "a*"), "keys[0].agents[0]"),
        ];
        for (change, path) in table {
            assert_eq!(Records::default().apply(&change).unwrap_err().path, path);
        }
    }

    #[test]
    fn what_is_kept_of_a_record_makes_the_same_record_again() {
        let change = v1::ApplyRequest {
            regions: vec![v1::RegionRecord {
                location: Some(v1::Location { latitude: 50.11, longitude: 8.68 }),
                phase: v1::Phase::Draining.into(),
                residency: vec!["eu".into()],
                router_addresses: vec!["10.0.0.1:8444".into(), "10.0.0.2:8444".into()],
                via_relays: true,
                ..region("frankfurt", 1)
            }],
            agents: vec![v1::AgentRecord {
                regions: vec![v1::AgentRegion { region: "frankfurt".into(), weight: 7 }],
                gpu_class: "l4".into(),
                rtt_ceiling_ms: 90,
                tickets_per_minute_per_tenant: 11,
                ..agent_record()
            }],
            keys: vec![v1::KeyRecord {
                id: "000000000000".into(),
                sha256: vec![3; 32].into(),
                tenant: "acme".into(),
                agents: vec!["shop/*".into()],
                tickets_per_minute: 5,
            }],
            key_generation: 2,
            minting_generation: 1,
            ..v1::ApplyRequest::default()
        };
        let records = Records::default().apply(&change).unwrap();
        let again = records.all();
        assert_eq!(Records::default().apply(&again).unwrap(), records);
        assert_eq!(Records::from_all(1, &again), (records, vec![]));
    }

    #[test]
    fn keys_are_limited_to_their_agents() {
        let key = |agents: &[&str]| Key {
            sha256: [0; 32],
            tenant: "acme".into(),
            agents: agents.iter().map(|a| (*a).to_owned()).collect(),
            tickets_per_minute: 0,
        };
        assert!(key(&[]).allows("any/thing"));
        assert!(key(&["shop/*"]).allows("shop/desk"));
        assert!(!key(&["shop/*"]).allows("shopping/desk"));
        assert!(key(&["a/b", "shop/desk"]).allows("shop/desk"));
        assert!(!key(&["shop/desk"]).allows("shop/desk2"));
    }
}
