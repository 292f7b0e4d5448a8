//! Two regions and more.

use antiphon_proto::v1;
use tonic::Code;

use crate::world::{FRANKFURT, Region, Relay, VIRGINIA, World, create, eventually, point, with_key};

const SINGAPORE: (f64, f64) = (1.35, 103.82);

/// Both regions know both.
pub(crate) async fn pair(world: &World) -> (Region, Region) {
    let (frankfurt, virginia) = (world.router("frankfurt").await, world.router("virginia").await);
    for region in [&frankfurt, &virginia] {
        let mut change = world.agent(&["frankfurt", "virginia"]);
        change.regions = vec![frankfurt.record(1, FRANKFURT), virginia.record(2, VIRGINIA)];
        world.apply(region, change).await.unwrap();
    }
    (frankfurt, virginia)
}

/// How many leases of another region a router believes to be free.
async fn free_in(world: &World, region: &Region, other: &str) -> u32 {
    let status = world.status(region).await;
    let digests = status.regions.into_iter().filter_map(|r| r.digest);
    let pools = digests.filter(|d| d.region == other).flat_map(|d| d.pools);
    pools.map(|p| p.free).sum()
}

async fn ask(world: &World, region: &Region, at: (f64, f64)) -> Result<v1::Session, tonic::Status> {
    let request = v1::CreateSessionRequest { location: Some(point(at)), ..create() };
    let mut client = region.sessions();
    let answer = client.create_session(with_key(&world.key, request)).await;
    answer.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_is_placed_in_the_nearest_region_whoever_is_asked() {
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let here = world.worker(&frankfurt, "w-1", 10).await;
    let there = world.worker(&virginia, "w-1", 10).await;
    let _relay = Relay::register(&world, &virginia, "r-1").await;
    eventually("frankfurt hears of virginia's leases", async || free_in(&world, &frankfurt, "virginia").await == 10)
        .await;
    let near = ask(&world, &frankfurt, (48.86, 2.35)).await.unwrap();
    assert_eq!(near.region, "frankfurt");
    let far = ask(&world, &frankfurt, (40.71, -74.01)).await.unwrap();
    assert_eq!((far.region.as_str(), there.held(), here.held()), ("virginia", 1, 1));
    assert_eq!(far.server_name, "w-1.worker.virginia.antiphon.internal");
    eventually("frankfurt hears of virginia's relay", async || {
        let session = ask(&world, &frankfurt, (48.86, 2.35)).await.unwrap();
        session.relays.iter().any(|r| r.region == "virginia")
    })
    .await;
    assert_eq!(far.relays.len(), 1);

    let mut client = frankfurt.sessions();
    let explain = v1::ExplainSessionRequest { session: far.session.clone() };
    let explained = client.explain_session(with_key(&world.key, explain)).await;
    let explained = explained.unwrap().into_inner();
    let verdict = |region: &str| {
        let line = explained.candidates.iter().find(|c| c.region == region);
        line.unwrap().verdict.clone()
    };
    assert_eq!(verdict("virginia"), "chosen");
    assert_eq!(verdict("frankfurt"), "eligible");
    // Each region lists and ends the fleet's sessions.
    let list = with_key(&world.key, v1::ListSessionsRequest::default());
    let listed = frankfurt.sessions().list_sessions(list).await.unwrap().into_inner();
    assert!(listed.sessions.iter().any(|s| s.session == far.session && s.region == "virginia"));
    let delete = v1::DeleteSessionRequest { session: near.session.clone() };
    let mut other = virginia.sessions();
    other.delete_session(with_key(&world.key, delete)).await.unwrap();
    let delete = v1::DeleteSessionRequest { session: far.session };
    client.delete_session(with_key(&world.key, delete)).await.unwrap();
    assert_eq!(there.held(), 0);
    let left = here.shared.sessions.lock();
    assert!(left.values().all(|s| s.session != near.session.as_bytes()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_region_takes_what_the_best_one_cannot() {
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let _here = world.worker(&frankfurt, "w-1", 10).await;
    let there = world.worker(&virginia, "w-1", 10).await;
    eventually("frankfurt hears of virginia's leases", async || free_in(&world, &frankfurt, "virginia").await == 10)
        .await;
    // Its digest still says that there is room.
    *there.shared.stubborn.lock() = true;
    let session = ask(&world, &frankfurt, (40.71, -74.01)).await.unwrap();
    assert_eq!(session.region, "frankfurt");
    let explain = v1::ExplainSessionRequest { session: session.session };
    let explained = frankfurt.sessions().explain_session(with_key(&world.key, explain)).await;
    let explained = explained.unwrap().into_inner();
    assert_eq!(explained.attempts, 2);
    let virginia = explained.candidates.iter().find(|c| c.region == "virginia").unwrap();
    assert_eq!(virginia.verdict, "refused");
    assert!(virginia.detail.starts_with("no_capacity: "), "{}", virginia.detail);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_in_another_region_is_final() {
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let here = world.worker(&frankfurt, "w-1", 10).await;
    let there = world.worker(&virginia, "w-1", 10).await;
    eventually("frankfurt hears of virginia's leases", async || free_in(&world, &frankfurt, "virginia").await == 10)
        .await;
    there.hold([7; 16], "rival", 1);
    let request =
        v1::CreateSessionRequest { session: vec![7; 16].into(), location: Some(point((40.71, -74.01))), ..create() };
    let conflict = frankfurt.sessions().create_session(with_key(&world.key, request)).await.unwrap_err();
    assert_eq!(conflict.code(), Code::AlreadyExists, "{conflict:?}");
    assert_eq!((there.asked(), here.asked()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_whose_router_is_gone_is_skipped_and_stays_routed() {
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let _here = world.worker(&frankfurt, "w-1", 10).await;
    let there = world.worker(&virginia, "w-1", 10).await;
    let remote = there.shared.server_id.lock().unwrap().to_u64();
    let mut relay = Relay::register(&world, &frankfurt, "r-1").await;
    relay.follow("both routes", |r| r.routes.len() == 2).await;
    assert!(relay.routes.contains_key(&remote));
    eventually("frankfurt hears of virginia's leases", async || free_in(&world, &frankfurt, "virginia").await == 10)
        .await;
    drop(virginia);
    eventually("virginia is skipped", async || {
        let session = ask(&world, &frankfurt, (40.71, -74.01)).await;
        session.is_ok_and(|s| s.region == "frankfurt")
    })
    .await;
    // A change of the own routes shows the whole table: the remote route is kept.
    let _second = world.worker(&frankfurt, "w-2", 10).await;
    relay.follow("three routes", |r| r.routes.len() == 3).await;
    assert!(relay.routes.contains_key(&remote));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cordoned_region_gets_nothing_new_and_distance_limits_the_rest() {
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let _here = world.worker(&frankfurt, "w-1", 10).await;
    let there = world.worker(&virginia, "w-1", 10).await;
    let mut change = world.agent(&["frankfurt", "virginia"]);
    change.agents[0].rtt_ceiling_ms = 60;
    change.agents[0].rtt_ceiling_max_ms = 120;
    world.apply(&frankfurt, change).await.unwrap();
    let mut record = virginia.record(2, VIRGINIA);
    record.phase = v1::Phase::Cordoned.into();
    let cordon = v1::ApplyRequest { regions: vec![record], ..v1::ApplyRequest::default() };
    world.apply(&virginia, cordon).await.unwrap();
    eventually("frankfurt hears of the cordon", async || {
        let status = world.status(&frankfurt).await;
        let digests = status.regions.into_iter().filter_map(|r| r.digest);
        digests.filter(|d| d.region == "virginia").any(|d| d.phase == i32::from(v1::Phase::Cordoned))
    })
    .await;
    // The nearest that can serve is above the preferred ceiling and within the hard one.
    let session = ask(&world, &frankfurt, (40.71, -74.01)).await.unwrap();
    assert_eq!((session.region.as_str(), there.held()), ("frankfurt", 0));
    let explain = v1::ExplainSessionRequest { session: session.session };
    let explained = frankfurt.sessions().explain_session(with_key(&world.key, explain)).await;
    let explained = explained.unwrap().into_inner();
    assert!(explained.candidates.iter().any(|c| c.region == "virginia" && c.verdict == "cordoned"));
    let never = ask(&world, &frankfurt, SINGAPORE).await.unwrap_err();
    assert_eq!(never.code(), Code::FailedPrecondition, "{never:?}");
    assert_eq!(antiphon_proto::refusal::of_status(&never).unwrap().reason, "too_far");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_path_of_a_session_is_told_wherever_it_is() {
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let there = world.worker(&virginia, "w-1", 10).await;
    eventually("frankfurt hears of virginia's leases", async || free_in(&world, &frankfurt, "virginia").await == 10)
        .await;
    // One that frankfurt placed there, one that it knows nothing of, and another tenant's.
    let placed = ask(&world, &frankfurt, VIRGINIA).await.unwrap().session;
    there.hold([7; 16], "acme", 3);
    there.hold([8; 16], "other", 3);
    let path = async |session: String| {
        let request = with_key(&world.key, v1::ExplainPathRequest { session });
        let answer = frankfurt.sessions().explain_path(request).await;
        answer.map(tonic::Response::into_inner)
    };
    let text = |byte| antiphon_core::id::SessionId::from_bytes([byte; 16]).to_string();
    for session in [placed, text(7)] {
        let told = path(session.clone()).await.unwrap();
        assert_eq!((told.session, told.region.as_str(), told.worker.as_str()), (session, "virginia", "w-1"));
    }
    assert_eq!(path(text(8)).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(path(text(9)).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn round_trips_that_callers_had_outweigh_the_globe() {
    const PARIS: (f64, f64) = (48.86, 2.35);
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let here = world.worker(&frankfurt, "w-1", 10).await;
    let there = world.worker(&virginia, "w-1", 10).await;
    eventually("both hear of each other", async || {
        free_in(&world, &frankfurt, "virginia").await == 10 && free_in(&world, &virginia, "frankfurt").await == 10
    })
    .await;
    assert_eq!(ask(&world, &virginia, PARIS).await.unwrap().region, "frankfurt");
    // Its router says of which neighbourhood a caller is; the workers measure.
    let of_paris = here.shared.sessions.lock().values().next().unwrap().neighbourhood;
    assert_ne!(of_paris, 0);
    let measured = |rtt_ms| vec![v1::MeasuredRtt { neighbourhood: of_paris, rtt_ms }];
    *here.shared.measured.lock() = measured(400);
    *there.shared.measured.lock() = measured(90);
    for router in [&frankfurt, &virginia] {
        eventually("callers of Paris are placed across the sea", async || {
            let session = ask(&world, router, PARIS).await;
            here.shared.sessions.lock().clear();
            there.shared.sessions.lock().clear();
            session.is_ok_and(|session| session.region == "virginia")
        })
        .await;
    }
    let elsewhere = ask(&world, &virginia, (52.5, 13.4)).await.unwrap();
    assert_eq!(elsewhere.region, "frankfurt", "nothing is known of Berlin");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routers_of_other_regions_are_found_by_name() {
    let world = World::new();
    let (frankfurt, virginia) = (world.router("frankfurt").await, world.router("virginia").await);
    for region in [&frankfurt, &virginia] {
        let mut change = world.agent(&["frankfurt", "virginia"]);
        let mut record = virginia.record(2, VIRGINIA);
        record.router_address = format!("localhost:{}", virginia.internal.port());
        change.regions = vec![frankfurt.record(1, FRANKFURT), record];
        world.apply(region, change).await.unwrap();
    }
    let _worker = world.worker(&virginia, "w-1", 10).await;
    eventually("frankfurt hears of virginia", async || free_in(&world, &frankfurt, "virginia").await == 10).await;
    assert_eq!(ask(&world, &frankfurt, VIRGINIA).await.unwrap().region, "virginia");
}
