use super::*;
use crate::{keyring::tests::ring, table::Table};
use antiphon_core::keys::TunnelKey;

const NOW: u64 = 1_800_000_000;

fn shard(n: u64) -> ServerId {
    ServerId::from_u64(n << 32 | 7)
}

fn address(n: u64) -> SocketAddr {
    format!("127.0.0.1:{}", 1000 + n).parse().unwrap()
}

fn relay(n: u16) -> RelayNumber {
    RelayNumber::new(n).unwrap()
}

fn region(n: u16) -> RegionNumber {
    RegionNumber::new(n).unwrap()
}

fn welcome() -> Welcome {
    Welcome { relay: relay(65), keys: ring(&[1, 2], 1) }
}

fn full(version: u64, shards: std::ops::Range<u64>) -> RouteChange {
    RouteChange {
        version,
        full: true,
        upserts: shards.map(|n| (shard(n), address(n))).collect(),
        ..RouteChange::default()
    }
}

fn removal(version: u64, count: u64) -> RouteChange {
    RouteChange { version, removals: (0..count).map(shard).collect(), ..RouteChange::default() }
}

/// One router that has welcomed the relay.
fn welcomed() -> Routing {
    let mut routing = Routing::new(1);
    routing.welcome(0, welcome()).unwrap();
    routing
}

/// Two of them.
fn welcomed_by_two() -> Routing {
    let mut routing = Routing::new(2);
    routing.welcome(0, welcome()).unwrap();
    routing.welcome(1, welcome()).unwrap();
    routing
}

fn has(routing: &Routing, n: u64) -> bool {
    routing.table().route(shard(n).to_u64()).is_some()
}

#[test]
fn keys_and_routes_may_come_in_either_order() {
    let mut first = welcomed();
    first.apply(0, NOW, full(1, 0..3)).unwrap();
    let mut second = Routing::new(1);
    assert!(!second.has_routes() && !second.has_keys());
    second.apply(0, NOW, full(1, 0..3)).unwrap();
    assert!(second.table().is_empty(), "no keys yet");
    second.welcome(0, welcome()).unwrap();
    for table in [first.table(), second.table()] {
        let keys = RelaySecret::from_bytes([1; 32]).tunnel_keys(shard(1));
        let route = table.route(shard(1).to_u64()).unwrap();
        assert_eq!((route.address, &route.key), (address(1), &keys.up));
        let Some(crate::table::Source::Shards(sources)) = table.source(address(1)) else { panic!("no shard") };
        assert_eq!((sources.len(), &sources[0].key), (2, &keys.down));
        assert_eq!((table.len(), table.version(), table.relay().value()), (3, 1, 65));
    }
}

#[test]
fn deltas_follow_each_other_or_are_refused() {
    let mut routing = welcomed();
    let delta = |version| RouteChange {
        version,
        upserts: vec![(shard(9), address(9))],
        removals: vec![shard(0)],
        ..RouteChange::default()
    };
    assert_eq!(routing.apply(0, NOW, delta(1)), Err(ChangeError::Gap { have: 0, got: 1 }));
    routing.apply(0, NOW, full(4, 0..3)).unwrap();
    assert_eq!(routing.apply(0, NOW, delta(6)), Err(ChangeError::Gap { have: 4, got: 6 }));
    assert_eq!(routing.apply(0, NOW, delta(5)), Ok(Outcome::Applied));
    assert!(!has(&routing, 0) && has(&routing, 9));
    assert!(routing.apply(0, NOW, full(1, 0..1)).is_ok(), "a router that starts anew counts anew");
}

#[test]
fn a_restart_changes_nothing_and_a_poor_router_takes_nothing_away_after_it() {
    let mut before = welcomed();
    assert!(before.known().is_none(), "no routes yet");
    before.apply(0, NOW, full(7, 0..5)).unwrap();
    let mut after = Routing::restore(1, before.known().unwrap());
    let (was, is) = (before.table(), after.table());
    assert_eq!((is.len(), is.version(), is.relay()), (5, 7, was.relay()));
    for n in 0..5 {
        let (was, is) = (was.route(shard(n).to_u64()).unwrap(), is.route(shard(n).to_u64()).unwrap());
        assert_eq!((is.address, is.slot, &is.key), (was.address, was.slot, &was.key));
    }
    let refused = Ok(Outcome::RemovalsRefused { removals: 4, of: 5 });
    assert_eq!(after.apply(0, NOW, full(1, 4..6)), refused);
    let known = after.known().unwrap();
    assert_eq!((known.version, known.routes.len()), (1, 6), "what is in force is what is kept");
}

#[test]
fn a_router_that_knows_little_takes_no_route_of_a_small_fleet_away() {
    let mut routing = welcomed();
    routing.apply(0, NOW, full(9, 1..4)).unwrap();
    assert!(matches!(routing.apply(0, NOW, full(1, 2..3)).unwrap(), Outcome::RemovalsRefused { .. }));
    assert_eq!(routing.table().len(), 3);
    let named = RouteChange { version: 2, removals: vec![shard(1)], ..RouteChange::default() };
    routing.apply(0, NOW, named).unwrap();
    assert_eq!(routing.table().len(), 2);
}

#[test]
fn a_mass_removal_needs_its_mark_but_never_holds_new_routes_up() {
    let mut routing = welcomed();
    routing.apply(0, NOW, full(1, 0..20)).unwrap();
    let refused = Ok(Outcome::RemovalsRefused { removals: 20, of: 20 });
    assert_eq!(routing.apply(0, NOW, full(1, 50..51)), refused);
    assert_eq!(routing.table().len(), 21);
    assert_eq!(routing.apply(0, NOW, removal(2, 2)), Ok(Outcome::Applied));
    let marked = RouteChange { mass_removal_intended: true, ..full(3, 0..1) };
    assert_eq!(routing.apply(0, NOW, marked), Ok(Outcome::Applied));
    assert_eq!(routing.table().len(), 1);
    let small = routing.apply(0, NOW, removal(4, 1));
    assert_eq!(small, Ok(Outcome::Applied), "a delta of a small table names what is gone");
}

#[test]
fn one_routers_full_list_takes_nothing_away_that_another_holds() {
    let mut routing = welcomed_by_two();
    routing.apply(0, NOW, full(1, 0..20)).unwrap();
    routing.apply(1, NOW, full(5, 10..30)).unwrap();
    assert_eq!((routing.table().len(), routing.table().version()), (30, 5));
    let marked = RouteChange { mass_removal_intended: true, ..full(6, 10..11) };
    assert_eq!(routing.apply(1, NOW, marked), Ok(Outcome::Applied));
    assert_eq!(routing.table().len(), 20, "20..30 were the other's alone");
    let refused = Ok(Outcome::RemovalsRefused { removals: 20, of: 20 });
    assert_eq!(routing.apply(0, NOW, full(1, 0..0)), refused, "each router is guarded by itself");
}

#[test]
fn what_one_router_names_as_gone_is_gone_whoever_held_it() {
    let mut routing = welcomed_by_two();
    routing.apply(0, NOW, full(1, 0..5)).unwrap();
    routing.apply(1, NOW, full(1, 0..5)).unwrap();
    routing.disconnected(1);
    assert_eq!(routing.apply(0, NOW, removal(2, 1)), Ok(Outcome::Applied));
    assert!(!has(&routing, 0));
    let absent = RouteChange { mass_removal_intended: true, ..full(3, 2..5) };
    routing.apply(0, NOW, absent).unwrap();
    assert!(has(&routing, 1), "absence from a list is no evidence against another router's word");
}

#[test]
fn versions_are_counted_per_router() {
    let mut routing = welcomed_by_two();
    routing.apply(0, NOW, full(7, 0..1)).unwrap();
    routing.apply(1, NOW, full(2, 0..1)).unwrap();
    routing.apply(1, NOW, removal(3, 0)).unwrap();
    assert_eq!((routing.version_of(0), routing.version_of(1)), (Some(7), Some(3)));
    assert_eq!(routing.apply(1, NOW, removal(8, 0)), Err(ChangeError::Gap { have: 3, got: 8 }));
}

#[test]
fn what_is_restored_counts_as_every_routers_word() {
    let mut before = welcomed();
    before.apply(0, NOW, full(1, 0..30)).unwrap();
    let mut after = Routing::restore(2, before.known().unwrap());
    after.welcome(0, welcome()).unwrap();
    assert_eq!(after.apply(0, NOW, full(1, 0..29)), Ok(Outcome::Applied));
    assert!(has(&after, 29), "the other router may still hold it");
    after.apply(1, NOW, full(1, 0..29)).unwrap();
    assert!(!has(&after, 29));
}

#[test]
fn a_router_that_comes_takes_over_the_words_of_one_that_left() {
    let mut routing = Routing::new(0);
    let (first, second) = (routing.join(), routing.join());
    for router in [first, second] {
        routing.welcome(router, welcome()).unwrap();
        routing.apply(router, NOW, full(1, 0..30)).unwrap();
    }
    routing.leave(first);
    assert_eq!(routing.connected(), 1);
    routing.apply(second, NOW, full(2, 0..29)).unwrap();
    assert!(has(&routing, 29), "what the first said is still there");
    let third = routing.join();
    assert_eq!(third, first);
    routing.welcome(third, welcome()).unwrap();
    routing.apply(third, NOW, full(1, 0..29)).unwrap();
    assert!(!has(&routing, 29), "its successor does not say so");
    let fourth = routing.join();
    assert_eq!(fourth, 2, "nobody has left: a position of its own");
    // After a restart everybody who comes is taken to have said what is on disk.
    let mut after = Routing::restore(0, routing.known().unwrap());
    assert_eq!(after.table().len(), 29, "before anybody comes");
    let (one, two) = (after.join(), after.join());
    after.welcome(one, welcome()).unwrap();
    after.apply(one, NOW, full(1, 0..28)).unwrap();
    assert!(has(&after, 28), "the other one may still hold it");
    after.apply(two, NOW, full(1, 0..28)).unwrap();
    assert!(!has(&after, 28));
}

#[test]
fn routers_that_disagree_are_not_followed_while_the_first_is_there() {
    let mut routing = welcomed_by_two();
    let other = || Welcome { relay: relay(66), ..welcome() };
    let error = routing.welcome(1, other()).unwrap_err();
    assert_eq!(error, Disagreement::Number { have: relay(65), got: relay(66) });
    let mut keys = welcome().keys;
    keys.secrets[1].1 = RelaySecret::from_bytes([99; 32]);
    assert!(matches!(routing.rotate(1, keys), Err(Disagreement::Keys(_))));
    assert_eq!(routing.number(), Some(relay(65)));
    routing.disconnected(0);
    routing.welcome(1, other()).unwrap();
    assert_eq!(routing.number(), Some(relay(66)), "nobody contradicts");
}

#[test]
fn a_rotation_moves_sealing_and_keeps_what_either_router_still_uses() {
    let mut routing = welcomed_by_two();
    routing.apply(0, NOW, full(1, 0..1)).unwrap();
    let slot = |routing: &Routing| routing.table().route(shard(0).to_u64()).unwrap().slot.index();
    let loaded =
        |routing: &Routing| -> Vec<u32> { routing.table().loaded_generations().iter().map(|g| g.value()).collect() };
    assert_eq!((slot(&routing), loaded(&routing)), (1, vec![1, 2]));
    routing.rotate(0, ring(&[1, 2, 3], 2)).unwrap();
    assert_eq!((slot(&routing), loaded(&routing)), (2, vec![1, 2, 3]));
    routing.rotate(0, ring(&[2, 3], 3)).unwrap();
    assert_eq!((slot(&routing), loaded(&routing)), (3, vec![1, 2, 3]), "the other router is behind");
    routing.disconnected(1);
    routing.rotate(0, ring(&[2, 3], 3)).unwrap();
    assert_eq!(loaded(&routing), [2, 3]);
    routing.welcome(1, Welcome { relay: relay(65), keys: ring(&[2], 2) }).unwrap();
    assert_eq!((slot(&routing), loaded(&routing)), (3, vec![2, 3]), "and takes nothing back");
}

fn neighbour(n: u16) -> NeighbourRecord {
    NeighbourRecord { number: relay(n), address: address(n.into()), keys: Vec::new() }
}

fn via(version: u64, full: bool, number: u16, relays: &[u16]) -> RouteChange {
    let relays = relays.iter().map(|n| relay(*n)).collect();
    RouteChange { version, full, region_upserts: vec![(region(number), relays)], ..RouteChange::default() }
}

fn ways(table: &Table) -> Vec<(u16, Vec<u16>)> {
    let numbers = |ways: &crate::neighbour::Ways| -> Vec<_> {
        ways.relays.iter().map(|at| table.neighbours()[*at].number.value()).collect()
    };
    let mut all: Vec<_> = table.regions.iter().map(|(r, ways)| (r.value(), numbers(ways))).collect();
    all.sort_unstable();
    all
}

#[test]
fn regions_are_reached_through_the_relays_that_any_router_names() {
    let mut routing = welcomed_by_two();
    routing.neighbours(0, vec![neighbour(130), neighbour(128)]);
    routing.neighbours(1, vec![neighbour(129)]);
    routing.apply(0, NOW, via(1, true, 2, &[128, 130])).unwrap();
    routing.apply(1, NOW, via(1, true, 2, &[129, 140])).unwrap();
    assert_eq!(ways(&routing.table()), [(2, vec![128, 129, 130])], "140 has no address");
    let own = RouteChange { region_upserts: vec![(region(1), vec![relay(128)])], ..via(2, false, 3, &[]) };
    routing.apply(0, NOW, own).unwrap();
    assert_eq!(ways(&routing.table()).len(), 1, "never to the own region, never through nobody");
    let gone = RouteChange { version: 2, region_removals: vec![region(2)], ..RouteChange::default() };
    routing.apply(1, NOW, gone).unwrap();
    assert!(ways(&routing.table()).is_empty());
}

#[test]
fn neighbours_keep_what_is_known_of_them_and_an_empty_list_takes_none_away() {
    let mut routing = welcomed();
    routing.neighbours(0, vec![neighbour(128), neighbour(129), neighbour(66)]);
    let contact = |routing: &Routing| routing.table().neighbours()[0].contact.clone();
    let before = contact(&routing);
    assert_eq!(routing.table().neighbours().len(), 2, "66 is of the own region");
    assert!(matches!(routing.neighbours(0, Vec::new()), Outcome::RemovalsRefused { .. }));
    routing.neighbours(0, vec![NeighbourRecord { address: address(7), ..neighbour(128) }]);
    assert!(Arc::ptr_eq(&before, &contact(&routing)));
    let table = routing.table();
    assert_eq!(table.neighbours().len(), 1);
    let known = table.neighbour_at(address(7)).unwrap();
    let keys = RelaySecret::from_bytes([1; 32]).hop_keys(relay(128));
    assert_eq!((known.number, &known.key), (relay(128), &keys.up));
    assert!(table.neighbour_at(address(128)).is_none(), "its former address");
}

#[test]
fn all_that_is_known_survives_a_restart() {
    let mut before = welcomed();
    let generation = KeyGeneration::new(1).unwrap();
    let keys = TunnelKeys { up: TunnelKey::from_bytes([8; 16]), down: TunnelKey::from_bytes([9; 16]) };
    before.neighbours(0, vec![NeighbourRecord { keys: vec![(generation, keys)], ..neighbour(128) }]);
    let dead = DeadServer { server_id: shard(8), keys: vec![(generation, [4; 32])] };
    before.apply(0, NOW, RouteChange { dead: vec![dead.clone()], ..via(1, true, 2, &[128]) }).unwrap();
    let known = before.known().unwrap();
    let after = Routing::restore(1, known.clone());
    assert_eq!(ways(&after.table()), ways(&before.table()));
    assert!(after.table().neighbour(relay(128)).unwrap().sealing_for_its_clients().is_some());
    assert!(after.table().is_dead(shard(8).to_u64(), NOW + REMEMBERED_S - 1));
    assert!(!after.table().is_dead(shard(8).to_u64(), NOW + REMEMBERED_S), "its age goes on");
    assert_eq!(known.dead, [(dead, NOW)]);
}

#[test]
fn dead_servers_are_forgotten_in_time_and_in_number() {
    let mut routing = welcomed();
    let dead = |n| DeadServer { server_id: shard(n), keys: Vec::new() };
    let change = |version, numbers: std::ops::Range<u64>| RouteChange {
        dead: numbers.map(dead).collect(),
        ..full(version, 0..0)
    };
    routing.apply(0, NOW, change(1, 0..10)).unwrap();
    routing.apply(0, NOW + 1, change(2, 10..MAX_DEAD as u64 + 5)).unwrap();
    assert_eq!(routing.dead.len(), MAX_DEAD);
    assert!(routing.dead.contains_key(&shard(MAX_DEAD as u64 + 4)), "the eldest went");
    routing.apply(0, NOW + REMEMBERED_S, change(3, 0..0)).unwrap();
    assert!(routing.dead.keys().all(|id| *id >= shard(10)));
}

fn dead(n: u64) -> DeadServer {
    DeadServer { server_id: shard(n), keys: Vec::new() }
}

/// The shard's next life.
fn successor(n: u64) -> ServerId {
    ServerId::from_u64(shard(n).to_u64() ^ 0xff)
}

fn lives(routing: &Routing, id: ServerId) -> bool {
    let table = routing.table();
    assert!(table.route(id.to_u64()).is_none() || !table.is_dead(id.to_u64(), NOW), "{id} is both");
    table.route(id.to_u64()).is_some()
}

#[test]
fn a_proven_death_takes_the_route_away_whoever_holds_it() {
    let mut routing = welcomed_by_two();
    routing.apply(0, NOW, full(1, 0..3)).unwrap();
    routing.apply(1, NOW, full(1, 0..3)).unwrap();
    // A small fleet, whose list never gets past the guard against mass removals.
    let restarted = RouteChange { dead: vec![dead(0)], ..full(1, 1..3) };
    assert_eq!(routing.apply(0, NOW, restarted), Ok(Outcome::Applied), "a death is no removal");
    assert!(!has(&routing, 0) && has(&routing, 1));
    assert!(routing.table().is_dead(shard(0).to_u64(), NOW));
    assert_eq!(routing.known().unwrap().routes.len(), 2, "nor is it kept on disk");
    assert_eq!(routing.apply(1, NOW, full(2, 1..3)), Ok(Outcome::Applied), "the other router has nothing to remove");
}

#[test]
fn a_death_that_was_none_is_taken_back_by_the_servers_route() {
    let mut routing = welcomed();
    routing.apply(0, NOW, full(1, 0..3)).unwrap();
    routing.apply(0, NOW, RouteChange { version: 2, dead: vec![dead(0)], ..RouteChange::default() }).unwrap();
    assert!(!has(&routing, 0));
    let back = RouteChange { version: 3, upserts: vec![(shard(0), address(0))], ..RouteChange::default() };
    routing.apply(0, NOW, back).unwrap();
    assert!(lives(&routing, shard(0)));
    assert!(routing.known().unwrap().dead.is_empty());
}

#[test]
fn a_new_incarnation_is_evidence_against_the_older_one() {
    let mut routing = welcomed_by_two();
    routing.apply(0, NOW, full(1, 0..2)).unwrap();
    routing.apply(1, NOW, full(1, 0..2)).unwrap();
    // Worker and router were killed together: the router's first list knows of no death.
    let list = RouteChange { upserts: vec![(successor(0), address(7)), (shard(1), address(1))], ..full(1, 0..0) };
    assert_eq!(routing.apply(0, NOW, list.clone()), Ok(Outcome::Applied), "nothing is missing");
    assert!(lives(&routing, successor(0)) && lives(&routing, shard(0)), "the other router holds the older one");
    assert_eq!(routing.apply(1, NOW, list), Ok(Outcome::Applied));
    assert!(lives(&routing, successor(0)) && !lives(&routing, shard(0)) && lives(&routing, shard(1)));
    assert!(routing.table().has_other_incarnation(shard(0).to_u64()));
}

#[test]
fn a_router_with_an_old_list_takes_no_living_server_away() {
    let mut routing = welcomed_by_two();
    let news = RouteChange { upserts: vec![(successor(0), address(7))], dead: vec![dead(0)], ..full(1, 1..2) };
    routing.apply(0, NOW, news.clone()).unwrap();
    routing.apply(1, NOW, RouteChange { upserts: vec![(shard(0), address(0))], ..full(1, 0..0) }).unwrap();
    assert!(lives(&routing, successor(0)) && !lives(&routing, shard(0)), "what is dead and replaced stays so");
    routing.apply(0, NOW + REMEMBERED_S, RouteChange { dead: Vec::new(), ..news }).unwrap();
    // Once the death is forgotten both are in force: nobody knows better.
    let old = RouteChange { upserts: vec![(shard(0), address(0))], ..full(1, 0..0) };
    routing.apply(1, NOW + REMEMBERED_S, old).unwrap();
    assert!(lives(&routing, successor(0)) && lives(&routing, shard(0)));
}

#[test]
fn a_state_with_a_route_of_the_dead_is_read_as_dead() {
    let mut before = welcomed();
    before.apply(0, NOW, full(1, 0..3)).unwrap();
    let known = Known { dead: vec![(dead(1), NOW)], ..before.known().unwrap() };
    let mut after = Routing::restore(1, known);
    assert!(lives(&after, shard(0)) && !lives(&after, shard(1)));
    let list = RouteChange { upserts: vec![(shard(0), address(0)), (shard(2), address(2))], ..full(1, 0..0) };
    assert_eq!(after.apply(0, NOW, list), Ok(Outcome::Applied));
}

#[test]
fn a_worker_at_a_relays_address_gets_no_route_and_takes_none_away() {
    let mut routing = welcomed();
    let thief = RouteChange { upserts: vec![(shard(1), address(128)), (shard(2), address(2))], ..full(1, 0..0) };
    routing.apply(0, NOW, thief.clone()).unwrap();
    assert!(has(&routing, 1), "no relay is there yet");
    routing.neighbours(0, vec![neighbour(128)]);
    for version in [2, 3] {
        let table = routing.table();
        assert_eq!(table.neighbour_at(address(128)).unwrap().number, relay(128));
        assert_eq!(table.refused(), [shard(1)]);
        assert!(table.route(shard(1).to_u64()).is_none() && table.route(shard(2).to_u64()).is_some());
        // Later than the relay it changes nothing either.
        routing.apply(0, NOW, RouteChange { version, ..thief.clone() }).unwrap();
    }
}

#[test]
fn a_predecessor_is_known_as_such() {
    let mut routing = welcomed();
    routing.apply(0, NOW, full(1, 0..2)).unwrap();
    let table = routing.table();
    let dead = shard(1).to_u64() ^ 1;
    assert!(table.route(dead).is_none() && table.has_other_incarnation(dead));
    assert!(!table.has_other_incarnation(shard(5).to_u64()));
    assert!(Table::empty().is_empty());
}

#[test]
fn mapped_addresses_are_kept_in_their_own_family() {
    let mut routing = welcomed();
    let mapped = "[::ffff:127.0.0.1]:1001".parse().unwrap();
    let change = RouteChange { version: 1, full: true, upserts: vec![(shard(1), mapped)], ..RouteChange::default() };
    routing.apply(0, NOW, change).unwrap();
    assert!(routing.table().source(address(1)).is_some());
}
