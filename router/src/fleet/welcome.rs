//! What a worker or relay is given when it registers: its number and its keys, nobody else's (invariant I11).

use antiphon_core::id::{KeyGeneration, RelayNumber, ServerId, ShardNumber, WorkerNumber};
use antiphon_proto::{ticket, v1};

use super::{Fleet, keys::Keys};

impl Fleet {
    /// Everything a worker needs. `None`: it is not registered any more.
    pub(crate) fn worker_welcome(&self, number: WorkerNumber) -> Option<v1::WorkerWelcome> {
        let v1::WorkerKeys { cid_configs, ticket_keys, relays, reset_keys } = self.worker_keys(number)?;
        let state = self.state.lock();
        let region = self.own_number(&state)?;
        let worker = state.workers.get(&number)?;
        let behaviour = state.records.agents.get(&worker.hello.agent)?.behaviour.clone();
        Some(v1::WorkerWelcome {
            region_number: region.value().into(),
            worker_number: number.value().into(),
            server_name: worker.hello.server_name.clone(),
            cid_configs,
            ticket_keys,
            behaviour: Some(behaviour),
            relays,
            report_interval_ms: REPORT_INTERVAL_MS,
            reset_keys,
        })
    }

    /// All keys of a worker, each of every generation that is loaded.
    pub(crate) fn worker_keys(&self, number: WorkerNumber) -> Option<v1::WorkerKeys> {
        let (shards, ends, keys) = {
            let state = self.state.lock();
            let region = self.own_number(&state)?;
            (state.workers.get(&number)?.shard_ids(region), self.tunnel_ends(&state), state.keys.clone())
        };
        let ticket_key = |generation| ticket::public_key(&self.root.ticket_seed(generation)).to_vec().into();
        let relay = |(relay, tunnel_address): (RelayNumber, String)| v1::WorkerRelay {
            number: relay.value().into(),
            tunnel_address,
            keys: keys.generations().flat_map(|g| self.tunnel_keys(relay, g, &shards)).collect(),
        };
        Some(v1::WorkerKeys {
            cid_configs: self.cid_configs(&keys),
            ticket_keys: keys.generations().map(ticket_key).collect(),
            relays: ends.into_iter().map(relay).collect(),
            reset_keys: self.reset_keys(&shards, &keys),
        })
    }

    /// What one relay shares with each of a worker's shards.
    fn tunnel_keys(
        &self,
        relay: RelayNumber,
        generation: KeyGeneration,
        shards: &[(ShardNumber, ServerId)],
    ) -> Vec<v1::TunnelKeys> {
        let secret = self.root.relay_secret(relay, generation);
        let keys = shards.iter().map(|(shard, id)| {
            let keys = secret.tunnel_keys(*id);
            v1::TunnelKeys {
                shard: shard.value().into(),
                generation: generation.value(),
                up: keys.up.as_bytes().to_vec().into(),
                down: keys.down.as_bytes().to_vec().into(),
            }
        });
        keys.collect()
    }

    pub(super) fn reset_keys(&self, shards: &[(ShardNumber, ServerId)], keys: &Keys) -> Vec<v1::ResetKey> {
        let of_generation = |generation: KeyGeneration| {
            shards.iter().map(move |(shard, id)| v1::ResetKey {
                shard: shard.value().into(),
                generation: generation.value(),
                key: self.root.reset_key(*id, generation).to_vec().into(),
            })
        };
        keys.generations().flat_map(of_generation).collect()
    }

    /// The newest behaviour of a worker's agent. `None`: the agent or the worker is gone; what it has stays in force.
    pub(crate) fn worker_behaviour(&self, number: WorkerNumber) -> Option<v1::AgentBehaviour> {
        let state = self.state.lock();
        let agent = &state.workers.get(&number)?.hello.agent;
        Some(state.records.agents.get(agent)?.behaviour.clone())
    }

    /// Everything a relay needs except its routes.
    pub(crate) fn relay_welcome(&self, number: RelayNumber) -> v1::RelayWelcome {
        let v1::RelayKeys { cid_configs, secrets } = self.relay_keys(number);
        v1::RelayWelcome {
            relay_number: number.value().into(),
            cid_configs,
            secrets,
            report_interval_ms: REPORT_INTERVAL_MS,
        }
    }

    /// All keys of a relay, each of every generation that is loaded.
    pub(crate) fn relay_keys(&self, number: RelayNumber) -> v1::RelayKeys {
        let keys = self.state.lock().keys.clone();
        let secret = |generation: KeyGeneration| v1::RelaySecret {
            generation: generation.value(),
            secret: self.root.relay_secret(number, generation).as_bytes().to_vec().into(),
            sealing: generation == keys.minting(),
        };
        v1::RelayKeys { cid_configs: self.cid_configs(&keys), secrets: keys.generations().map(secret).collect() }
    }

    fn cid_configs(&self, keys: &Keys) -> Vec<v1::CidConfig> {
        let config = |generation: KeyGeneration| v1::CidConfig {
            config_id: generation.value() % CID_CONFIGS,
            generation: generation.value(),
            key: self.root.cid_key(generation).to_vec().into(),
            minting: generation == keys.minting(),
        };
        keys.generations().map(config).collect()
    }
}

/// How often workers and relays report.
pub(crate) const REPORT_INTERVAL_MS: u32 = 1000;
/// Configurations that a connection ID's first octet tells apart (draft-ietf-quic-load-balancers-21, section 3).
const CID_CONFIGS: u32 = 7;
