//! The route table: server ID → address of its shard. Updates are full states or deltas.
//!
//! A route leaves only on evidence: it is named in a delta, or a newer incarnation holds its place. A full state that
//! would take away more than a tenth proves nothing but that its sender knows little (it may have just started), so
//! what it lacks is kept (invariant I8).

use std::{collections::BTreeMap, sync::Arc};

use antiphon_core::id::ServerId;
use antiphon_proto::v1;

/// Server ID as a number → `ip:port`.
pub(crate) type RouteMap = BTreeMap<u64, Arc<str>>;

/// The full state as an update.
pub(crate) fn full(version: u64, routes: &RouteMap) -> v1::RouteUpdate {
    v1::RouteUpdate { version, full: true, upserts: routes.iter().map(route).collect(), ..v1::RouteUpdate::default() }
}

/// What turns `old` into `new`. Each removal rests on evidence, so any number is intended.
pub(crate) fn delta(version: u64, old: &Arc<RouteMap>, new: &Arc<RouteMap>) -> v1::RouteUpdate {
    if Arc::ptr_eq(old, new) {
        return v1::RouteUpdate { version, ..v1::RouteUpdate::default() };
    }
    let changed = new.iter().filter(|(id, address)| old.get(id) != Some(address));
    let removals: Vec<u64> = old.keys().filter(|id| !new.contains_key(id)).copied().collect();
    let upserts: Vec<v1::Route> = changed.map(route).collect();
    v1::RouteUpdate {
        version,
        upserts,
        mass_removal_intended: !removals.is_empty(),
        removals,
        ..v1::RouteUpdate::default()
    }
}

/// Number of a server's region.
pub(crate) fn region_of(server_id: u64) -> u16 {
    ServerId::from_u64(server_id).region.value()
}

/// Puts a route in the place of what is known to be older.
pub(super) fn insert(routes: &mut RouteMap, server_id: u64, address: Arc<str>) {
    make_room(routes, server_id);
    routes.insert(server_id, address);
}

/// A newer incarnation in the same place proves that the older ones are gone.
pub(super) fn make_room(routes: &mut RouteMap, server_id: u64) {
    let place = server_id >> 32 << 32;
    let held = routes.range(place..=(place | u64::from(u32::MAX)));
    let older: Vec<u64> = held.map(|(id, _)| *id).filter(|id| *id != server_id).collect();
    older.iter().for_each(|id| drop(routes.remove(id)));
}

/// Takes a peer's update. Routes of other regions are none of its business and are skipped; says how many.
pub(crate) fn merge(routes: &mut RouteMap, update: &v1::RouteUpdate, region: u16) -> usize {
    let ours = |id: u64| region_of(id) == region;
    let mut skipped = 0;
    if update.full {
        let missing: Vec<u64> = {
            let named: std::collections::BTreeSet<u64> = update.upserts.iter().map(|r| r.server_id).collect();
            routes.keys().filter(|id| !named.contains(id)).copied().collect()
        };
        if update.mass_removal_intended || missing.len() * 10 <= routes.len() {
            missing.iter().for_each(|id| drop(routes.remove(id)));
        }
    }
    for route in &update.upserts {
        let id = route.server_id;
        if !ours(id) || route.tunnel_address.parse::<std::net::SocketAddr>().is_err() {
            skipped += 1;
            continue;
        }
        insert(routes, id, route.tunnel_address.as_str().into());
    }
    for id in &update.removals {
        if ours(*id) {
            routes.remove(id);
        } else {
            skipped += 1;
        }
    }
    skipped
}

pub(super) fn route((server_id, address): (&u64, &Arc<str>)) -> v1::Route {
    v1::Route { server_id: *server_id, tunnel_address: address.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Server IDs of region 1: worker `n`, incarnation `i`.
    fn id(n: u64, i: u64) -> u64 {
        1 << 54 | n << 38 | i
    }

    fn table(ids: impl IntoIterator<Item = u64>) -> RouteMap {
        ids.into_iter().map(|id| (id, "127.0.0.1:1".into())).collect()
    }

    #[test]
    fn a_poor_full_state_takes_nothing_away() {
        let mut routes = table((0..20).map(|n| id(n, 1)));
        merge(&mut routes, &full(1, &table([id(0, 1)])), 1);
        assert_eq!(routes.len(), 20);
        // Two of twenty are a tenth.
        merge(&mut routes, &full(2, &table((2..20).map(|n| id(n, 1)))), 1);
        assert_eq!(routes.len(), 18);
        let mut intended = full(3, &table([id(5, 1)]));
        intended.mass_removal_intended = true;
        merge(&mut routes, &intended, 1);
        assert_eq!(routes, table([id(5, 1)]));
    }

    #[test]
    fn a_newer_incarnation_replaces_the_older() {
        let mut routes = table([id(1, 7), id(2, 7)]);
        merge(&mut routes, &full(1, &table([id(1, 8)])), 1);
        assert_eq!(routes, table([id(1, 8), id(2, 7)]));
    }

    #[test]
    fn a_peer_cannot_touch_routes_of_others() {
        let mut routes = table([id(1, 7)]);
        let foreign = 2 << 54 | 5;
        let update = v1::RouteUpdate {
            upserts: full(1, &table([foreign])).upserts,
            removals: vec![foreign],
            ..v1::RouteUpdate::default()
        };
        assert_eq!(merge(&mut routes, &update, 1), 2);
        assert_eq!(routes, table([id(1, 7)]));
        let nonsense = v1::RouteUpdate {
            upserts: vec![v1::Route { server_id: id(3, 1), tunnel_address: "nowhere".into() }],
            ..v1::RouteUpdate::default()
        };
        assert_eq!(merge(&mut routes, &nonsense, 1), 1);
    }

    proptest! {
        #[test]
        fn deltas_rebuild_the_table(a in prop::collection::btree_set(0_u64..30, 0..20), b in prop::collection::btree_set(0_u64..30, 0..20)) {
            let (old, new) = (table(a.iter().map(|n| id(*n, 1))), table(b.iter().map(|n| id(*n, 1))));
            let mut routes = old.clone();
            let update = delta(2, &Arc::new(old), &Arc::new(new.clone()));
            prop_assert_eq!(merge(&mut routes, &update, 1), 0);
            prop_assert_eq!(routes, new);
        }
    }
}
