//! Several routers of one region.

use antiphon_proto::v1;

use crate::world::{Region, Relay, VIRGINIA, World, create, eventually, point, with_key};

async fn digest_of(world: &World, region: &Region, of: &str) -> v1::RegionDigest {
    let status = world.status(region).await;
    let mut digests = status.regions.into_iter().filter_map(|r| r.digest);
    digests.find(|d| d.region == of).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_router_of_a_region_places_and_ends_what_another_one_placed() {
    let world = World::new();
    let [one, two] = world.siblings("frankfurt").await;
    // Numbers agree, as the store hands them out.
    let worker = world.worker(&one, "w-1", 1).await;
    let number = worker.shared.server_id.lock().unwrap();
    worker.register(&world, &two).await.unwrap();
    assert_eq!(worker.shared.server_id.lock().unwrap(), number);
    eventually("both have it in placement", async || world.placeable(&two, "w-1").await).await;
    // Both ask for its only lease at once: it decides.
    let ask = async |region: &Region| region.sessions().create_session(with_key(&world.key, create())).await;
    let (first, second) = tokio::join!(ask(&one), ask(&two));
    assert_eq!((usize::from(first.is_ok()) + usize::from(second.is_ok()), worker.held()), (1, 1));
    let placed_by_one = first.is_ok();
    let session = first.or(second).unwrap().into_inner().session;
    let (placer, other) = if placed_by_one { (&one, &two) } else { (&two, &one) };
    let list = with_key(&world.key, v1::ListSessionsRequest::default());
    let listed = other.sessions().list_sessions(list).await.unwrap().into_inner().sessions;
    assert_eq!(listed.iter().map(|s| s.session.as_str()).collect::<Vec<_>>(), [session.as_str()]);
    let path = with_key(&world.key, v1::ExplainPathRequest { session: session.clone() });
    assert_eq!(other.sessions().explain_path(path).await.unwrap().into_inner().worker, "w-1");
    let explain = || with_key(&world.key, v1::ExplainSessionRequest { session: session.clone() });
    assert!(placer.sessions().explain_session(explain()).await.is_ok());
    let unknown = other.sessions().explain_session(explain()).await.unwrap_err();
    assert!(unknown.message().contains("only the router that placed it knows"), "{unknown:?}");
    let delete = with_key(&world.key, v1::DeleteSessionRequest { session });
    other.sessions().delete_session(delete).await.unwrap();
    assert_eq!(worker.held(), 0);
    // What an operator tells one of them, the other one hears.
    let mut relay = Relay::register(&world, &two, "r-1").await;
    let gone = v1::ReportWorkerGoneRequest { name: "w-1".into(), incarnation: 0 };
    assert!(world.operator(&one).report_worker_gone(gone).await.unwrap().into_inner().known);
    relay.follow("its death", |r| r.dead.contains_key(&number.to_u64())).await;
    assert!(relay.routes.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_reported_gone_leaves_tickets_and_rotations_of_every_router() {
    let world = World::new();
    let [one, two] = world.siblings("frankfurt").await;
    let peer = world.router("virginia").await;
    let mut change = world.agent(&["frankfurt", "virginia"]);
    let mut record = one.record(1, crate::world::FRANKFURT);
    record.router_addresses = vec![one.internal.to_string(), two.internal.to_string()];
    change.regions = vec![record, peer.record(2, VIRGINIA)];
    for region in [&one, &peer] {
        world.apply(region, change.clone()).await.unwrap();
    }
    let worker = world.worker(&one, "w-1", 10).await;
    worker.register(&world, &two).await.unwrap();
    let _there = world.worker(&peer, "w-1", 10).await;
    let dies = (Relay::register(&world, &one, "r-1").await, Relay::register(&world, &two, "r-1").await);
    let lives = (Relay::register(&world, &one, "r-2").await, Relay::register(&world, &two, "r-2").await);
    let (dead, alive) = (dies.0.welcome.relay_number, lives.0.welcome.relay_number);
    assert_eq!((dies.1.welcome.relay_number, lives.1.welcome.relay_number), (dead, alive));
    let offered = async |region: &Region| -> Vec<u32> {
        let request = v1::CreateSessionRequest { location: Some(point(VIRGINIA)), ..create() };
        let session = region.sessions().create_session(with_key(&world.key, request)).await.unwrap().into_inner();
        let mut relays: Vec<u32> = session.relays.iter().map(|r| r.number).collect();
        relays.sort_unstable();
        relays
    };
    let mut both = vec![dead, alive];
    both.sort_unstable();
    for region in [&one, &two, &peer] {
        eventually("both relays are offered", async || offered(region).await == both).await;
    }
    // It dies without a word and keeps a rotation from going on.
    drop(dies);
    for region in [&one, &peer] {
        let change = v1::ApplyRequest { key_generation: 2, ..v1::ApplyRequest::default() };
        world.apply(region, change).await.unwrap();
    }
    let waits_for = async |region: &Region, name: &str| {
        let lines = world.status(region).await.rotation_held_up_by;
        lines.iter().any(|line| line.starts_with(name))
    };
    for region in [&one, &two] {
        eventually("the rotation waits for it", async || waits_for(region, "r-1: ").await).await;
    }
    let report = async |name: &str| {
        let request = v1::ReportRelayGoneRequest { name: name.into() };
        world.operator(&one).report_relay_gone(request).await.unwrap().into_inner().known
    };
    assert!(!report("r-9").await);
    assert!(report("r-1").await);
    assert!(!report("r-1").await);
    for region in [&one, &two] {
        eventually("nobody waits for it", async || !waits_for(region, "r-1: ").await).await;
    }
    for region in [&one, &two, &peer] {
        eventually("it is not offered", async || offered(region).await == [alive]).await;
    }
    // Its workers forget it, the others keep their number, and a namesake is welcome.
    eventually("its keys are gone", async || {
        let relays = worker.shared.keys.lock().relays.iter().map(|r| r.number).collect::<Vec<_>>();
        relays == [alive]
    })
    .await;
    let _again = (Relay::register(&world, &one, "r-1").await, Relay::register(&world, &two, "r-1").await);
    for region in [&one, &two, &peer] {
        eventually("both are offered again", async || offered(region).await.len() == 2).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_is_reached_through_any_of_its_routers() {
    let world = World::new();
    let [one, two] = world.siblings("frankfurt").await;
    let peer = world.router("virginia").await;
    let mut change = world.agent(&["frankfurt", "virginia"]);
    let mut record = one.record(1, crate::world::FRANKFURT);
    record.router_addresses = vec![one.internal.to_string(), two.internal.to_string()];
    change.regions = vec![record, peer.record(2, VIRGINIA)];
    for region in [&one, &peer] {
        world.apply(region, change.clone()).await.unwrap();
    }
    let mut relay = Relay::register(&world, &peer, "r-1").await;
    // Each knows a worker that the other one does not.
    let first = world.worker(&one, "w-1", 5).await;
    let second = world.worker(&two, "w-2", 7).await;
    let id = |worker: &crate::world::Worker| worker.shared.server_id.lock().unwrap().to_u64();
    let (first_id, second_id) = (id(&first), id(&second));
    relay.follow("the routes of both", |r| r.routes.contains_key(&first_id) && r.routes.contains_key(&second_id)).await;
    // The second router fails: its routes stay, and the first one is asked.
    drop(two);
    eventually("the region is placed in through the other router", async || {
        let answer = peer.sessions().create_session(with_key(&world.key, create())).await;
        answer.is_ok_and(|s| s.into_inner().worker == "w-1")
    })
    .await;
    assert_eq!(digest_of(&world, &peer, "frankfurt").await.number, 1);
    let third = world.worker(&one, "w-3", 5).await;
    let third_id = id(&third);
    relay.follow("a new route", |r| r.routes.contains_key(&third_id)).await;
    assert!(relay.routes.contains_key(&second_id));
    // One router's evidence counts for all.
    first.deregister().await;
    relay.follow("one route less", |r| !r.routes.contains_key(&first_id)).await;
    assert!(relay.routes.contains_key(&second_id));
}
