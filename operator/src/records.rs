//! What the store of each region is to hold: all regions, all agents of this cluster, all API keys.

pub mod keep;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use antiphon_crds::{VoiceAgent, VoiceRegion, compile};
use antiphon_proto::v1::{AgentRecord, ApplyRequest, KeyRecord, Phase, RegionRecord};
use antiphon_records as convert;
use kube::ResourceExt as _;
use prost::Message as _;

/// Records of one region's store, by name or id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Records {
    /// All regions of the fleet.
    pub regions: BTreeMap<String, RegionRecord>,
    /// All agents of this cluster.
    pub agents: BTreeMap<String, Arc<AgentRecord>>,
    /// All API keys.
    pub keys: BTreeMap<String, KeyRecord>,
    /// All regions that there are, those included that have no record yet.
    pub known_regions: BTreeSet<String>,
    /// Agents that are being deleted: who connects anew cannot know whether a store still has them.
    pub gone: BTreeSet<String>,
}

/// What a store has besides what this process has written to it.
#[derive(Clone, Debug, Default)]
pub struct Present {
    /// Ids of its API keys.
    pub keys: Vec<String>,
    /// Names of its regions.
    pub regions: Vec<String>,
}

impl Records {
    /// The changes that make a store of `from` one of these; none if they are the same. Without `from` everything is
    /// written, and keys that the store has (`present`) and that are not among these are removed.
    ///
    /// Each request stays well below what a router and its store take at a time; the first one holds regions and keys.
    #[must_use]
    pub fn changes(&self, from: Option<&Self>, present: &Present) -> Vec<ApplyRequest> {
        let nothing = Self::default();
        let old = from.unwrap_or(&nothing);
        let removed_keys = old.keys.keys().chain(&present.keys).filter(|id| !self.keys.contains_key(*id));
        let removed_agents = old.agents.keys().chain(&self.gone).filter(|name| !self.agents.contains_key(*name));
        let removed_agents: BTreeSet<_> =
            removed_agents.filter(|name| from.is_none() || old.agents.contains_key(*name)).collect();
        let regions = old.regions.keys().chain(&present.regions).collect::<BTreeSet<_>>().into_iter();
        let first = ApplyRequest {
            removed_regions: regions.filter(|name| !self.known_regions.contains(*name)).cloned().collect(),
            regions: changed(&self.regions, &old.regions),
            keys: changed(&self.keys, &old.keys),
            removed_keys: removed_keys.cloned().collect::<BTreeSet<_>>().into_iter().collect(),
            removed_agents: removed_agents.into_iter().cloned().collect(),
            ..ApplyRequest::default()
        };
        let mut requests = vec![first];
        let mut size = requests[0].encoded_len();
        for agent in changed(&self.agents, &old.agents) {
            let more = agent.encoded_len();
            if size + more > LARGEST {
                requests.push(ApplyRequest::default());
                size = 0;
            }
            size += more;
            requests.last_mut().expect("the first one is there").agents.push(Arc::unwrap_or_clone(agent));
        }
        requests.retain(|request| from.is_none() || *request != ApplyRequest::default());
        requests
    }
}

fn changed<T: Clone + PartialEq>(new: &BTreeMap<String, T>, old: &BTreeMap<String, T>) -> Vec<T> {
    new.iter().filter(|(name, record)| old.get(*name) != Some(*record)).map(|(_, record)| record.clone()).collect()
}

/// What all regions' stores are made of.
#[derive(Debug)]
pub struct Sources<'a> {
    /// All VoiceRegions, by name, those included that are being deleted.
    pub regions: &'a BTreeMap<String, Arc<VoiceRegion>>,
    /// The numbers that they have; one without a number is not recorded yet.
    pub numbers: &'a BTreeMap<String, u16>,
    /// All VoiceAgents.
    pub agents: &'a AgentRecords,
    /// All API keys.
    pub keys: &'a BTreeMap<String, KeyRecord>,
    /// Antiphon's namespace.
    pub namespace: &'a str,
    /// This cluster.
    pub cluster: &'a str,
}

/// The records of agents. Checking an agent takes a while, and there are many: each is looked at once per generation.
#[derive(Clone, Debug, Default)]
pub struct AgentRecords {
    known: BTreeMap<String, Looked>,
}

#[derive(Clone, Debug)]
struct Looked {
    uid: Option<String>,
    generation: Option<i64>,
    record: Known,
}

#[derive(Clone, Debug)]
enum Known {
    Valid(Arc<AgentRecord>),
    Invalid,
    Gone,
}

impl AgentRecords {
    /// Makes them those of these agents.
    pub fn update(&mut self, agents: &[Arc<VoiceAgent>]) {
        let mut before = std::mem::take(&mut self.known);
        for agent in agents {
            let name = agent.qualified_name();
            let (uid, generation) = (agent.uid(), agent.metadata.generation);
            let known = before.remove(&name).filter(|known| {
                known.uid == uid
                    && known.generation == generation
                    && generation.is_some()
                    && !matches!(known.record, Known::Gone)
            });
            let record = match known {
                _ if agent.metadata.deletion_timestamp.is_some() => Known::Gone,
                Some(known) => known.record,
                None if agent.validate().is_empty() => Known::Valid(convert::agent(&compile::plan_agent(agent)).into()),
                None => Known::Invalid,
            };
            self.known.insert(name, Looked { uid, generation, record });
        }
    }
}

/// What every store of this cluster is to hold. Resources that are wrong in themselves are left out: their own conditions
/// say what is wrong, and nobody else has to suffer from them.
#[must_use]
pub fn compile(sources: &Sources<'_>) -> Records {
    let valid: BTreeMap<String, &VoiceRegion> = sources
        .regions
        .iter()
        .filter(|(_, region)| region.validate().is_empty())
        .map(|(name, region)| (name.clone(), region.as_ref()))
        .collect();
    let plans = compile::plan_regions(&valid).unwrap_or_default();
    let known_regions = sources.regions.keys().cloned().collect();
    let mut records = Records { keys: sources.keys.clone(), known_regions, ..Records::default() };
    for mut plan in plans {
        let Some(number) = sources.numbers.get(&plan.name) else {
            continue;
        };
        plan.number = *number;
        let routers = match plan.cluster == sources.cluster {
            true => vec![fleet_address(&plan.name, sources.namespace)],
            false => plan.router_addresses.clone(),
        };
        let mut record = convert::region(&plan, routers);
        if valid.get(&plan.name).is_some_and(|region| region.metadata.deletion_timestamp.is_some()) {
            record.phase = Phase::Draining.into();
        }
        records.regions.insert(plan.name.clone(), record);
    }
    for (name, record) in &sources.agents.known {
        match &record.record {
            Known::Gone => drop(records.gone.insert(name.clone())),
            Known::Valid(record) => drop(records.agents.insert(name.clone(), record.clone())),
            Known::Invalid => {}
        }
    }
    records
}

/// The numbers that regions have: given by their specification or, once, by the operator and kept in their status. Of two
/// with the same number the older one has it: its calls have that number in their connection IDs.
#[must_use]
pub fn numbers(regions: &BTreeMap<String, Arc<VoiceRegion>>) -> BTreeMap<String, u16> {
    let mut by_age: Vec<_> = regions.iter().collect();
    by_age.sort_by_key(|(name, region)| (region.metadata.creation_timestamp.clone(), (*name).clone()));
    let mut taken = BTreeSet::new();
    let number = |region: &VoiceRegion| region.spec.number.or_else(|| region.status.as_ref()?.number);
    let numbered = by_age.into_iter().filter_map(|(name, region)| Some((name.clone(), number(region)?)));
    numbered.filter(|(_, number)| taken.insert(*number)).collect()
}

/// The number for a region that has none: the lowest free one after those that are due to regions before it by name.
/// Only in a fleet of one cluster: in another one nobody could settle who takes which.
///
/// # Errors
/// Why there is none, for the region's conditions.
pub fn free_number(region: &VoiceRegion, regions: &BTreeMap<String, Arc<VoiceRegion>>) -> Result<u16, &'static str> {
    if region.spec.number.is_some() {
        return Err("another region has this number: create the region anew with a number of its own");
    }
    if regions.values().any(|other| other.spec.cluster != region.spec.cluster) {
        return Err(
            "spec.number is required in a fleet of several clusters: create the region anew with a number that no \
                    other one has",
        );
    }
    let numbers = numbers(regions);
    let taken: BTreeSet<u16> = numbers.values().copied().collect();
    let before = regions.keys().filter(|name| **name < region.name_any() && !numbers.contains_key(*name)).count();
    (0..REGION_NUMBERS).filter(|number| !taken.contains(number)).nth(before).ok_or("a fleet has at most 1024 regions")
}

/// Where all routers of a region of this cluster are reached, also by workers and relays.
#[must_use]
pub fn fleet_address(region: &str, namespace: &str) -> String {
    format!("{region}-router-fleet.{namespace}.svc:{INTERNAL_PORT}")
}

/// All regions by name.
#[must_use]
pub fn by_name(regions: Vec<Arc<VoiceRegion>>) -> BTreeMap<String, Arc<VoiceRegion>> {
    regions.into_iter().map(|region| (region.name_any(), region)).collect()
}

/// Of routers, for the fleet's own processes.
pub const INTERNAL_PORT: u16 = 7_444;
/// Region numbers have ten bits.
const REGION_NUMBERS: u16 = 1_024;
/// Bytes of a request. A store takes 1 MiB at a time.
const LARGEST: usize = 400 << 10;

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use serde_json::json;

    use super::*;

    fn region(name: &str, cluster: &str, number: Option<u16>, kept: Option<u16>) -> (String, Arc<VoiceRegion>) {
        let mut spec = json!({"cluster": cluster, "cloud": "n", "location": {"latitude": 1, "longitude": 2},
            "router": {"addresses": ["far.example:7444"]}});
        if let Some(number) = number {
            spec["number"] = number.into();
        }
        let status = kept.map_or(json!(null), |kept| json!({"number": kept}));
        let region = json!({"apiVersion": "antiphon.dev/v1alpha1", "kind": "VoiceRegion",
            "metadata": {"name": name, "namespace": "ns"}, "spec": spec, "status": status});
        (name.to_owned(), Arc::new(serde_json::from_value(region).unwrap()))
    }

    fn agent(name: &str) -> Arc<VoiceAgent> {
        Arc::new(
            serde_json::from_value(json!({"apiVersion": "antiphon.dev/v1alpha1", "kind": "VoiceAgent",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"engine": {"type": "Echo"}, "regions": [{"name": "a"}]}}))
            .unwrap(),
        )
    }

    #[test]
    fn a_number_that_was_given_out_stays() {
        let regions: BTreeMap<_, _> = [
            region("a", "c", None, None),
            region("b", "c", Some(0), None),
            region("c", "c", None, Some(1)),
            region("d", "c", None, None),
        ]
        .into();
        assert_eq!(numbers(&regions), [("b".into(), 0), ("c".into(), 1)].into());
        assert_eq!(free_number(&regions["a"], &regions), Ok(2));
        assert_eq!(free_number(&regions["d"], &regions), Ok(3), "2 is a's");
    }

    #[test]
    fn two_regions_never_have_one_number() {
        let mut regions: BTreeMap<_, _> =
            [region("a", "c", Some(4), None), region("b", "c", None, Some(4)), region("c", "c", Some(4), None)].into();
        for (name, created) in [("a", 3), ("b", 1), ("c", 2)] {
            let time = k8s_openapi::jiff::Timestamp::from_second(created).unwrap();
            Arc::make_mut(regions.get_mut(name).unwrap()).metadata.creation_timestamp = Some(Time(time));
        }
        assert_eq!(numbers(&regions), [("b".into(), 4)].into(), "the oldest has it");
        assert!(free_number(&regions["c"], &regions).unwrap_err().contains("another region"));
    }

    #[test]
    fn with_several_clusters_numbers_have_to_be_given() {
        let regions: BTreeMap<_, _> = [region("a", "c", None, None), region("b", "other", Some(4), None)].into();
        assert_eq!(numbers(&regions), [("b".into(), 4)].into());
        assert!(free_number(&regions["a"], &regions).unwrap_err().contains("spec.number is required"));
    }

    fn compiled(agents: &[Arc<VoiceAgent>], keys: &[&str]) -> Records {
        let regions = [region("a", "c", Some(1), None), region("far", "other", Some(2), None)].into();
        let keys =
            keys.iter().map(|id| ((*id).to_owned(), KeyRecord { id: (*id).into(), ..Default::default() })).collect();
        let mut records = AgentRecords::default();
        records.update(agents);
        compile(&Sources {
            regions: &regions,
            numbers: &numbers(&regions),
            agents: &records,
            keys: &keys,
            namespace: "ns",
            cluster: "c",
        })
    }

    #[test]
    fn peers_are_reached_where_their_region_says() {
        let records = compiled(&[], &[]);
        assert_eq!(records.regions["a"].router_addresses, ["a-router-fleet.ns.svc:7444"]);
        assert_eq!(records.regions["far"].router_addresses, ["far.example:7444"]);
    }

    #[test]
    fn what_is_wrong_is_left_out_and_holds_up_nothing() {
        let mut broken = agent("broken");
        Arc::make_mut(&mut broken).metadata.name = Some("Not A Name".into());
        let records = compiled(&[agent("x"), broken], &[]);
        assert_eq!(records.agents.keys().collect::<Vec<_>>(), ["shop/x"]);
        assert_eq!(records.regions.len(), 2);
    }

    #[test]
    fn changes_name_what_changed_and_what_is_gone() {
        let old = compiled(&[agent("x"), agent("y")], &["k1", "k2"]);
        let new = compiled(&[agent("y"), agent("z")], &["k2"]);
        let changes = new.changes(Some(&old), &Present::default());
        assert_eq!(changes.len(), 1);
        assert_eq!((changes[0].regions.len(), changes[0].keys.len()), (0, 0));
        assert_eq!(changes[0].agents[0].behaviour.as_ref().unwrap().agent, "shop/z");
        assert_eq!(
            (&changes[0].removed_agents[..], &changes[0].removed_keys[..]),
            (&["shop/x".into()][..], &["k1".into()][..])
        );
        assert_eq!(old.changes(Some(&old), &Present::default()), []);
    }

    #[test]
    fn who_knows_nothing_writes_everything_and_removes_strange_keys() {
        let mut dying = agent("dying");
        Arc::make_mut(&mut dying).metadata.deletion_timestamp =
            serde_json::from_value(json!("2026-01-01T00:00:00Z")).ok();
        let changes = compiled(&[agent("x"), dying], &["k1"]).changes(
            None,
            &Present { keys: vec!["k1".into(), "strange".into()], regions: vec!["a".into(), "old".into()] },
        );
        assert_eq!((changes[0].regions.len(), changes[0].agents.len(), changes[0].keys.len()), (2, 1, 1));
        assert_eq!(
            (&changes[0].removed_keys[..], &changes[0].removed_regions[..]),
            (&["strange".into()][..], &["old".into()][..])
        );
        assert_eq!(changes[0].removed_agents, ["shop/dying"]);
    }

    #[test]
    fn many_agents_are_written_in_several_requests() {
        let record = compiled(&[agent("x")], &[]).agents["shop/x"].clone();
        let agents = (0..10_000).map(|index| (format!("shop/{index}"), record.clone())).collect();
        let changes = Records { agents, ..Records::default() }.changes(None, &Present::default());
        assert!(changes.len() > 1 && changes.iter().all(|change| change.encoded_len() <= LARGEST + 50_000));
        assert_eq!(changes.iter().map(|change| change.agents.len()).sum::<usize>(), 10_000);
    }

    #[test]
    fn an_agent_is_looked_at_once_per_generation() {
        let mut first = agent("x");
        Arc::make_mut(&mut first).metadata.generation = Some(1);
        let mut records = AgentRecords::default();
        records.update(&[first.clone()]);
        let mut second = first.clone();
        Arc::make_mut(&mut second).spec.suspend = true;
        let regions = |records: &AgentRecords| match &records.known["shop/x"].record {
            Known::Valid(record) => record.regions.len(),
            other => panic!("{other:?}"),
        };
        records.update(&[second.clone()]);
        assert_eq!(regions(&records), 1, "the same generation");
        Arc::make_mut(&mut second).metadata.generation = Some(2);
        records.update(&[second]);
        assert_eq!(regions(&records), 0);
    }
}
