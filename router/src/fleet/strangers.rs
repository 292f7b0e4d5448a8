//! Workers and relays that hold a number of the region and never spoke to this router.
//!
//! It may have started after them, or they reach other routers only. Numbers are freed by evidence alone, so each of them
//! may be alive: rotations wait for it, and an operator who knows better says so.

use antiphon_core::id::{Incarnation, RegionNumber, RelayNumber, ServerId, ShardNumber, WorkerNumber};
use antiphon_proto::v1;

use super::{Fleet, State};
use crate::store::{Holder, Kind};

/// One of them, as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stranger {
    kind: Kind,
    number: u16,
    pub(super) name: String,
    /// Of a worker, if the store has it.
    agent: String,
    incarnation: Incarnation,
}

impl Fleet {
    /// All of them, workers first.
    pub(super) fn strangers(&self, state: &State) -> Vec<Stranger> {
        let mut strangers = Vec::new();
        self.store.holders(&mut |kind, number, holder| {
            let registered = match kind {
                Kind::Worker => state.has_worker(number, holder),
                Kind::Relay => state.relays.values().any(|relay| relay.hello.name == holder.name),
            };
            if !registered {
                let Holder { name, agent, incarnation, .. } = holder.clone();
                strangers.push(Stranger { kind, number, name, agent, incarnation });
            }
        });
        strangers
    }

    /// Somebody who must know says that a worker is gone; an incarnation of 0 means whichever there is. `false`: nobody
    /// of this name is registered here or holds a number.
    pub(crate) async fn worker_reported_gone(&self, name: &str, incarnation: u32) -> bool {
        let registered = self.worker_gone(name, incarnation).await;
        let of = |s: &Stranger| incarnation == 0 || s.incarnation.value() == incarnation;
        let Some(stranger) = self.stranger(Kind::Worker, name).filter(of) else {
            return registered;
        };
        let number = WorkerNumber::new(stranger.number).expect("every u16 is a worker number");
        {
            let mut state = self.state.lock();
            if let Some(region) = self.own_number(&state) {
                // How many shards it has is not known here: a router that knows hears of its life's end by any of them.
                let shard = ShardNumber::new(0).expect("the first shard");
                let id = ServerId { region, worker: number, shard, incarnation: stranger.incarnation };
                let reset_keys = self.reset_keys(&[(shard, id)], &state.keys);
                let server = v1::DeadServer { server_id: id.to_u64(), reset_keys };
                let now = self.clock.now();
                state.dead.insert(server, true, now);
            }
        }
        self.store.release_worker(number, stranger.incarnation).await;
        self.topology.send_modify(|n| *n += 1);
        true
    }

    /// The same of a relay.
    pub(crate) async fn relay_reported_gone(&self, name: &str) -> bool {
        if self.relay_gone(name).await {
            return true;
        }
        let Some(stranger) = self.stranger(Kind::Relay, name) else {
            return false;
        };
        {
            let (mut state, now) = (self.state.lock(), self.clock.now());
            if let Some(number) = self.own_number(&state).and_then(|region| stranger.relay_number(region)) {
                state.gone_relays.insert(number, now);
            }
        }
        self.store.release_relay(name).await;
        self.topology.send_modify(|n| *n += 1);
        true
    }

    fn stranger(&self, kind: Kind, name: &str) -> Option<Stranger> {
        let strangers = self.strangers(&self.state.lock());
        strangers.into_iter().find(|stranger| stranger.kind == kind && stranger.name == name)
    }
}

impl Stranger {
    /// For people, and for those who look after processes: it is missed here. `None`: it is a relay.
    pub(super) fn worker_status(&self) -> Option<v1::WorkerStatus> {
        (self.kind == Kind::Worker).then(|| v1::WorkerStatus {
            name: self.name.clone(),
            number: self.number.into(),
            agent: self.agent.clone(),
            phase: v1::Phase::Cordoned.into(),
            report_age_ms: u32::MAX,
            why_not: "it has not registered with this router".to_owned(),
            incarnation: self.incarnation.value(),
            ..v1::WorkerStatus::default()
        })
    }

    /// The same of a relay.
    pub(super) fn relay_status(&self, region: RegionNumber) -> Option<v1::RelayStatus> {
        (self.kind == Kind::Relay).then(|| {
            let number = self.relay_number(region).map_or(0, |number| number.value().into());
            let phase = v1::Phase::Cordoned.into();
            let relay = v1::RelayInfo { number, phase, missing: true, ..v1::RelayInfo::default() };
            v1::RelayStatus { relay: Some(relay), name: self.name.clone(), ..v1::RelayStatus::default() }
        })
    }

    fn relay_number(&self, region: RegionNumber) -> Option<RelayNumber> {
        RelayNumber::of_region(region, u8::try_from(self.number).ok()?).ok()
    }
}

impl State {
    /// Whether this life of a worker is registered here.
    fn has_worker(&self, number: u16, holder: &Holder) -> bool {
        let is = |w: &super::Worker| w.hello.incarnation == holder.incarnation && w.hello.name == holder.name;
        let same_number = WorkerNumber::new(number).ok().and_then(|number| self.workers.get(&number));
        same_number.is_some_and(is) || self.workers.values().any(is)
    }
}
