//! The region in few words: for peers, and for people.

use std::{collections::BTreeMap, time::Duration};

use antiphon_core::{
    clock::Millis,
    id::RelayNumber,
    placement::{Freshness, Phase, Verdict},
};
use antiphon_proto::v1;

use super::{Fleet, State, peers::Peer, relays::Relay, strangers::Stranger, workers::Worker};
use crate::records::proto_phase;

impl Fleet {
    /// What peers need to place into this region; `None` before the region has its record.
    pub(crate) fn digest(&self) -> Option<v1::RegionDigest> {
        let now = self.clock.now();
        self.digest_in(&self.state.lock(), now)
    }

    fn digest_in(&self, state: &State, now: Millis) -> Option<v1::RegionDigest> {
        let record = state.records.regions.get(&self.region)?;
        let mut pools: BTreeMap<(&str, &str), v1::PoolDigest> = BTreeMap::new();
        for worker in state.workers.values().filter(|w| w.in_service(now)) {
            let (agent, gpu_class) = (&worker.hello.agent, &worker.hello.gpu_class);
            let pool = pools.entry((agent, gpu_class)).or_insert_with(|| v1::PoolDigest {
                agent: agent.clone(),
                gpu_class: gpu_class.clone(),
                ..v1::PoolDigest::default()
            });
            pool.workers += 1;
            pool.slots = pool.slots.saturating_add(worker.slots());
            pool.free = pool.free.saturating_add(worker.free());
        }
        Some(v1::RegionDigest {
            region: record.name.clone(),
            number: record.number.value().into(),
            cloud: record.cloud.clone(),
            location: record.location.map(|l| v1::Location { latitude: l.latitude(), longitude: l.longitude() }),
            phase: proto_phase(record.phase).into(),
            residency: record.residency.clone(),
            pools: pools.into_values().collect(),
            relays: state.relays.iter().map(|(n, r)| r.info(*n, now)).collect(),
            loaded_generations: state.keys.said.loaded.clone(),
            minting_generation: state.keys.said.minting,
            oldest_generation: state.keys.said.oldest,
            wanted_generation: state.keys.said.wanted,
            via_relays: record.via_relays,
            gone_relays: state.gone_relays(now),
            measured: state.own_measured(),
            ..v1::RegionDigest::default()
        })
    }

    /// All regions, and the workers of the own one.
    pub(crate) fn status(&self) -> v1::FleetStatusResponse {
        let now = self.clock.now();
        let state = self.state.lock();
        let strangers = self.strangers(&state);
        let region = |record: &crate::records::Region| {
            let local = record.name == self.region;
            let strangers = || strangers.iter().filter(|_| local);
            let peer = state.peers.get(&record.name);
            let digest = if local {
                self.digest_in(&state, now)
            } else {
                let known = peer.and_then(|p| p.digest(now)).map(|d| v1::RegionDigest::clone(d));
                Some(known.unwrap_or_else(|| v1::RegionDigest {
                    region: record.name.clone(),
                    number: record.number.value().into(),
                    cloud: record.cloud.clone(),
                    phase: proto_phase(record.phase).into(),
                    ..v1::RegionDigest::default()
                }))
            };
            let heard = peer.and_then(Peer::heard);
            let workers = state.workers.values().filter(|_| local);
            let relays = state.relays.iter().filter(|_| local);
            v1::RegionStatus {
                digest,
                digest_age_ms: match (local, heard) {
                    (true, _) => 0,
                    (false, Some(at)) => millis(now.since(at)),
                    (false, None) => u32::MAX,
                },
                local,
                workers: workers
                    .map(|w| worker_status(w, &state, now))
                    .chain(strangers().filter_map(Stranger::worker_status))
                    .collect(),
                relays: relays
                    .map(|(number, relay)| relay_status(*number, relay, now))
                    .chain(strangers().filter_map(|stranger| stranger.relay_status(record.number)))
                    .collect(),
                clock_ahead_ms: peer.map_or(0, Peer::clock_ahead_ms),
            }
        };
        v1::FleetStatusResponse {
            regions: state.records.regions.values().map(region).collect(),
            rotation_held_up_by: state.keys.held_up_by.iter().map(ToString::to_string).collect(),
            records_hash: state.records_hash.clone(),
            store_age_ms: u32::try_from(self.store.age().as_millis()).unwrap_or(u32::MAX),
        }
    }

    /// Workers that take part in placement and relays that are connected.
    pub(crate) fn in_service(&self) -> (usize, usize) {
        let now = self.clock.now();
        let state = self.state.lock();
        let workers = state.workers.values().filter(|w| w.in_service(now));
        let relays = state.relays.values().filter(|r| r.stream.is_some());
        (workers.count(), relays.count())
    }
}

fn worker_status(worker: &Worker, state: &State, now: Millis) -> v1::WorkerStatus {
    let needed = state.records.agents.get(&worker.hello.agent);
    let needed = needed.map(|a| a.policy.gpu_class.as_str());
    let report = worker.report.as_ref();
    let age = report.map(|r| now.since(r.at));
    let why_not = if worker.stream.is_none() {
        "its control stream is broken".to_owned()
    } else if let Some(needed) = needed.filter(|n| !n.is_empty() && *n != worker.hello.gpu_class) {
        format!("its GPU class is {:?}, the agent needs {needed:?}", worker.hello.gpu_class)
    } else if needed.is_none() {
        "its agent is gone".to_owned()
    } else {
        match age {
            None => "it has not reported yet".to_owned(),
            Some(_) if let Freshness::ClockBehind { by } = worker.freshness() => {
                Verdict::ClockBehind { by }.to_string()
            }
            Some(age) if !worker.in_service(now) && worker.phase() == Phase::Active => {
                format!("its last report is {} ms old", age.as_millis())
            }
            Some(_) if worker.phase() != Phase::Active => {
                let draining = worker.phase() == Phase::Draining;
                format!("it is {}", if draining { "draining" } else { "cordoned" })
            }
            Some(_) if worker.free() == 0 => "it has no free lease".to_owned(),
            Some(_) => String::new(),
        }
    };
    v1::WorkerStatus {
        name: worker.hello.name.clone(),
        number: worker.number.value().into(),
        agent: worker.hello.agent.clone(),
        gpu_class: worker.hello.gpu_class.clone(),
        phase: proto_phase(worker.phase()).into(),
        slots: worker.slots(),
        reserved: report.map_or(0, |r| r.reserved),
        active: report.map_or(0, |r| r.active),
        report_age_ms: age.map_or(u32::MAX, millis),
        placeable: why_not.is_empty(),
        why_not,
        clock_ahead_ms: report.map_or(0, |r| r.clock_ahead_ms),
        loaded_generations: worker.keys.loaded.clone(),
        oldest_generation: worker.keys.oldest.unwrap_or(0),
        incarnation: worker.hello.incarnation.value(),
        connected: worker.stream.is_some(),
        revisions: report.map(|r| r.revisions.clone()).unwrap_or_default(),
    }
}

fn relay_status(number: RelayNumber, relay: &Relay, now: Millis) -> v1::RelayStatus {
    v1::RelayStatus {
        relay: Some(relay.info(number, now)),
        name: relay.hello.name.clone(),
        routes: relay.routes,
        clock_ahead_ms: relay.clock_ahead_ms,
        loaded_generations: relay.keys.loaded.clone(),
        connected: relay.stream.is_some(),
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
