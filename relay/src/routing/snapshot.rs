//! From what was collected to what the data path reads.

use antiphon_core::tunnel::KeySlot;

use super::{Adjacent, REMEMBERED_S, Routing, Welcome};
use crate::{
    keyring::{CidKey, Keyring},
    neighbour::{Neighbour, Ways},
    reset::ResetKey,
    table::{Dead, Route, ShardKey, Source, Table, shard_of},
};

impl Routing {
    /// The snapshot for the data path. Without keys it routes nothing.
    #[must_use]
    pub fn table(&self) -> Table {
        let mut table = Table { version: self.version(), ..Table::empty() };
        let Some(Welcome { relay, keys }) = &self.welcome else {
            return table;
        };
        table.relay = *relay;
        table.loaded = keys.loaded();
        table.codec = keys.codec();
        // Before the shards, which have to leave their addresses alone.
        self.add_neighbours(&mut table, keys);
        self.add_shards(&mut table, keys);
        self.add_dead(&mut table, keys);
        table
    }

    /// A shard at the address of another region's relay is refused: one worker's certificate must not be enough to cut
    /// off what goes through that relay.
    fn add_shards(&self, table: &mut Table, keys: &Keyring) {
        for (server_id, shard) in &self.shards {
            if matches!(table.sources.get(&shard.address), Some(Source::Neighbour(_))) {
                table.refused.push(*server_id);
                continue;
            }
            let sealing = shard.keys.iter().find(|(generation, _)| *generation == keys.sealing);
            let Some((generation, sealing)) = sealing else {
                continue;
            };
            let route = Route { address: shard.address, slot: KeySlot::of(*generation), key: sealing.up.clone() };
            table.routes.insert(server_id.to_u64(), route);
            table.shards.insert(shard_of(server_id.to_u64()));
            let down = shard.keys.iter().map(|(generation, keys)| ShardKey {
                server_id: *server_id,
                slot: KeySlot::of(*generation),
                key: keys.down.clone(),
            });
            if let Source::Shards(all) =
                table.sources.entry(shard.address).or_insert_with(|| Source::Shards(Vec::new()))
            {
                all.extend(down);
            }
        }
    }

    /// In the order of their numbers, which is how the table finds them.
    fn add_neighbours(&self, table: &mut Table, keys: &Keyring) {
        for Adjacent { record, own, contact } in self.neighbours.values() {
            let Some((generation, sealing)) = own.iter().find(|(g, _)| *g == keys.sealing) else {
                continue;
            };
            table.sources.insert(record.address, Source::Neighbour(table.neighbours.len()));
            let mut theirs = record.keys.clone();
            theirs.sort_unstable_by_key(|(generation, _)| *generation);
            table.neighbours.push(Neighbour {
                number: record.number,
                address: record.address,
                slot: KeySlot::of(*generation),
                key: sealing.up.clone(),
                returning: own.iter().map(|(g, keys)| (KeySlot::of(*g), keys.down.clone())).collect(),
                theirs,
                contact: contact.clone(),
            });
        }
        for (number, region) in &self.regions {
            let position = |relay| table.neighbours.binary_search_by_key(relay, |n| n.number).ok();
            let relays: Vec<_> = region.relays.iter().filter_map(position).collect();
            if *number != table.relay.region() && !relays.is_empty() {
                table.regions.insert(*number, Ways { relays, choice: region.choice.clone() });
            }
        }
    }

    fn add_dead(&self, table: &mut Table, keys: &Keyring) {
        for (server, heard) in self.dead.values() {
            let key = |cid: &CidKey| {
                let (_, key) = server.keys.iter().find(|(g, _)| *g == cid.generation)?;
                Some((cid.config.value(), ResetKey::new(key)))
            };
            let dead =
                Dead { until: heard.saturating_add(REMEMBERED_S), keys: keys.cid.iter().filter_map(key).collect() };
            table.dead.insert(server.server_id.to_u64(), dead);
        }
    }
}
