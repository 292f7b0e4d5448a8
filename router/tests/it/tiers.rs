//! Regions behind their relays, and workers that are known to be dead.

use antiphon_core::{
    id::{Incarnation, KeyGeneration, RelayNumber, ServerId},
    keys::RelaySecret,
};
use antiphon_proto::v1;

use crate::{
    peering::pair,
    world::{FRANKFURT, Region, Relay, VIRGINIA, World, eventually},
};

fn id(worker: &crate::world::Worker) -> u64 {
    worker.shared.server_id.lock().unwrap().to_u64()
}

async fn gone(world: &World, region: &Region, name: &str, incarnation: u32) -> bool {
    let request = v1::ReportWorkerGoneRequest { name: name.into(), incarnation };
    world.operator(region).report_worker_gone(request).await.unwrap().into_inner().known
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_of_all_regions_hear_of_proven_deaths_and_only_of_those() {
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let worker = world.worker(&frankfurt, "w-1", 10).await;
    let other = world.worker(&frankfurt, "w-2", 10).await;
    let mut near = Relay::register(&world, &frankfurt, "r-1").await;
    let mut far = Relay::register(&world, &virginia, "r-1").await;
    let (first, second) = (id(&worker), id(&other));
    for relay in [&mut near, &mut far] {
        relay.follow("both routes", |r| r.routes.contains_key(&first) && r.routes.contains_key(&second)).await;
    }
    // Silence proves nothing.
    worker.disconnect();
    eventually("it is seen to be gone", async || !world.placeable(&frankfurt, "w-1").await).await;
    // Its successor proves it.
    *worker.incarnation.lock() = Incarnation::new(77).unwrap();
    worker.register(&world, &frankfurt).await.unwrap();
    let successor = id(&worker);
    // So does whoever runs the processes, if it names the right life.
    assert!(!gone(&world, &frankfurt, "w-2", 78).await);
    assert!(!gone(&world, &frankfurt, "w-3", 0).await);
    let life = other.incarnation.lock().value();
    assert!(gone(&world, &frankfurt, "w-2", life).await);
    assert!(!gone(&world, &frankfurt, "w-2", 0).await, "it is gone already");
    for relay in [&mut near, &mut far] {
        relay.follow("both deaths", |r| r.dead.contains_key(&first) && r.dead.contains_key(&second)).await;
        relay.follow("the successor's route", |r| r.routes.contains_key(&successor)).await;
        assert_eq!(relay.routes.len(), 1);
        assert!(!relay.dead.contains_key(&successor));
        let expected = world.root.reset_key(ServerId::from_u64(first), KeyGeneration::new(1).unwrap());
        assert_eq!((relay.dead[&first].len(), relay.dead[&first][0].generation), (1, 1));
        assert_eq!(relay.dead[&first][0].key, expected.as_slice());
    }
    // A goodbye is one as well; a relay that comes later is told all of them.
    worker.deregister().await;
    near.follow("the goodbye", |r| r.dead.contains_key(&successor)).await;
    let mut late = Relay::register(&world, &virginia, "r-2").await;
    late.follow("all deaths", |r| r.dead.len() == 3).await;
    assert!(late.routes.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_behind_its_relays_is_routed_by_its_prefix() {
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let here = world.worker(&frankfurt, "w-1", 10).await;
    let there = world.stand_in(&virginia, "w-1", 10).await;
    let mut far = Relay::register(&world, &virginia, "r-1").await;
    let mut near = Relay::register(&world, &frankfurt, "r-1").await;
    let registered = there.register(&world, &virginia).await.unwrap();
    let (own, foreign) = (id(&here), id(&there));
    near.follow("an exact route", |r| r.routes.contains_key(&foreign)).await;
    assert!(near.regions.is_empty());
    for region in [&frankfurt, &virginia] {
        let mut behind = virginia.record(2, VIRGINIA);
        behind.via_relays = true;
        let change = v1::ApplyRequest { regions: vec![frankfurt.record(1, FRANKFURT), behind], ..Default::default() };
        world.apply(region, change).await.unwrap();
    }
    // Relays elsewhere know the way to its relays instead of its workers.
    let (gate, caller) = (far.welcome.relay_number, near.welcome.relay_number);
    near.follow("a route by region", |r| r.regions.get(&2) == Some(&vec![gate])).await;
    assert_eq!(near.routes.keys().collect::<Vec<_>>(), [&own]);
    assert!(near.neighbours.iter().all(|n| n.keys.is_empty()));
    // Its relays can open what others seal for them.
    far.follow("keys of the neighbour", |r| r.neighbours.iter().any(|n| n.number == caller && !n.keys.is_empty()))
        .await;
    assert!(far.routes.contains_key(&own) && far.routes.contains_key(&foreign) && far.regions.is_empty());
    let secret = RelaySecret::from_bytes(near.keys.secrets[0].secret.as_ref().try_into().unwrap());
    let expected = secret.hop_keys(RelayNumber::new(u16::try_from(gate).unwrap()).unwrap());
    let told = far.neighbours.iter().find(|n| n.number == caller).unwrap();
    assert_eq!(told.tunnel_address, "127.0.0.1:5001");
    assert_eq!(
        (told.keys[0].up.as_ref(), told.keys[0].down.as_ref()),
        (expected.up.as_bytes().as_slice(), expected.down.as_bytes().as_slice())
    );
    // Its workers know its own relays only.
    drop(registered);
    eventually("only its own relay", async || {
        let relays = there.shared.keys.lock().relays.clone();
        relays.len() == 1 && relays[0].number == gate
    })
    .await;
    eventually("its digest says so", async || {
        let status = world.status(&frankfurt).await;
        let mut digests = status.regions.into_iter().filter_map(|r| r.digest);
        digests.any(|d| d.region == "virginia" && d.via_relays)
    })
    .await;
}
