//! What a worker or relay is given when it registers: its number and its keys, nobody else's (invariant I11).

use antiphon_core::id::{KeyGeneration, RelayNumber, ShardNumber, WorkerNumber};
use antiphon_proto::{ticket, v1};

use super::{Fleet, hello::server_id};

impl Fleet {
    /// Everything a worker needs. `None`: it is not registered any more.
    pub(crate) fn worker_welcome(&self, number: WorkerNumber) -> Option<v1::WorkerWelcome> {
        let relays = self.worker_relays(number)?;
        let state = self.state.lock();
        let region = self.own_number(&state)?;
        let worker = state.workers.get(&number)?;
        let behaviour = state.records.agents.get(&worker.hello.agent)?.behaviour.clone();
        let reset_key = |(shard, _): &(ShardNumber, String)| {
            let id = server_id(region, number, *shard, worker.hello.incarnation);
            v1::ResetKey {
                shard: shard.value().into(),
                generation: generation().value(),
                key: self.root.reset_key(id, generation()).to_vec().into(),
            }
        };
        Some(v1::WorkerWelcome {
            region_number: region.value().into(),
            worker_number: number.value().into(),
            server_name: worker.hello.server_name.clone(),
            cid_configs: self.cid_configs(),
            ticket_keys: vec![ticket::public_key(&self.root.ticket_seed(generation())).to_vec().into()],
            behaviour: Some(behaviour),
            relays,
            report_interval_ms: REPORT_INTERVAL_MS,
            reset_keys: worker.hello.shards.iter().map(reset_key).collect(),
        })
    }

    /// The relays that a worker accepts frames from, with the keys of each of its shards.
    pub(crate) fn worker_relays(&self, number: WorkerNumber) -> Option<Vec<v1::WorkerRelay>> {
        let ends = self.tunnel_ends();
        let (region, hello) = {
            let state = self.state.lock();
            let region = self.own_number(&state)?;
            (region, state.workers.get(&number)?.hello.clone())
        };
        let relay = |(relay, tunnel_address): (RelayNumber, String)| {
            let secret = self.root.relay_secret(relay, generation());
            let keys = hello.shards.iter().map(|(shard, _)| {
                let id = server_id(region, number, *shard, hello.incarnation);
                let keys = secret.tunnel_keys(id);
                v1::TunnelKeys {
                    shard: shard.value().into(),
                    generation: generation().value(),
                    up: keys.up.as_bytes().to_vec().into(),
                    down: keys.down.as_bytes().to_vec().into(),
                }
            });
            v1::WorkerRelay { number: relay.value().into(), tunnel_address, keys: keys.collect() }
        };
        Some(ends.into_iter().map(relay).collect())
    }

    /// The newest behaviour of a worker's agent. `None`: the agent or the worker is gone; what it has stays in force.
    pub(crate) fn worker_behaviour(&self, number: WorkerNumber) -> Option<v1::AgentBehaviour> {
        let state = self.state.lock();
        let agent = &state.workers.get(&number)?.hello.agent;
        Some(state.records.agents.get(agent)?.behaviour.clone())
    }

    /// Everything a relay needs except its routes.
    pub(crate) fn relay_welcome(&self, number: RelayNumber) -> v1::RelayWelcome {
        let secret = self.root.relay_secret(number, generation());
        v1::RelayWelcome {
            relay_number: number.value().into(),
            cid_configs: self.cid_configs(),
            secrets: vec![v1::RelaySecret {
                generation: generation().value(),
                secret: secret.as_bytes().to_vec().into(),
                sealing: true,
            }],
            report_interval_ms: REPORT_INTERVAL_MS,
        }
    }

    /// Seed of the key that signs tickets.
    pub(crate) fn ticket_seed(&self) -> [u8; 32] {
        self.root.ticket_seed(generation())
    }

    fn cid_configs(&self) -> Vec<v1::CidConfig> {
        vec![v1::CidConfig {
            config_id: generation().value() % CID_CONFIGS,
            generation: generation().value(),
            key: self.root.cid_key(generation()).to_vec().into(),
            minting: true,
        }]
    }
}

/// The generation in use. A later one is minted only after every region reports that it loaded it.
fn generation() -> KeyGeneration {
    KeyGeneration::new(1).expect("every u32 is a generation")
}

/// How often workers and relays report.
pub(crate) const REPORT_INTERVAL_MS: u32 = 1000;
/// Configurations that a connection ID's first octet tells apart (draft-ietf-quic-load-balancers-21, section 3).
const CID_CONFIGS: u32 = 7;
