//! Registration of workers and relays, roles, routes, records.

use std::sync::atomic::Ordering;

use antiphon_core::{
    id::{Incarnation, KeyGeneration, RelayNumber, ServerId},
    keys::RelaySecret,
};
use antiphon_proto::{
    api_key::ApiKey,
    v1::{
        self, admin_client::AdminClient, fleet_client::FleetClient, peer_client::PeerClient,
        worker_directive::Directive,
    },
};
use antiphon_runtime::pki::Role;
use tonic::Code;

use crate::world::{AGENT, Relay, World, create, eventually, soon, with_key};

fn id(worker: &crate::world::Worker) -> u64 {
    worker.shared.server_id.lock().unwrap().to_u64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stops_reporting_leaves_placement_and_stays_routed() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let worker = world.worker(&region, "w-1", 10).await;
    let mut relay = Relay::register(&world, &region, "r-1").await;
    let route = id(&worker);
    relay.follow("the route", |r| r.routes.contains_key(&route)).await;
    worker.disconnect();
    eventually("it leaves placement", async || !world.placeable(&region, "w-1").await).await;
    let refused = region.sessions().create_session(with_key(&world.key, create())).await;
    let refusal = antiphon_proto::refusal::of_status(&refused.unwrap_err()).unwrap();
    assert!(refusal.candidates.iter().any(|c| c.verdict == "disconnected"));
    // A second worker's route arrives; the first one's is still there.
    let other = world.worker(&region, "w-2", 10).await;
    let second = id(&other);
    relay.follow("the second route", |r| r.routes.contains_key(&second)).await;
    assert_eq!(relay.routes.get(&route).map(String::as_str), Some("127.0.0.1:4000"));
    // Back with the same incarnation: the same number, placed again.
    let mut hello = worker.hello();
    hello.worker_number = Some(u32::from(ServerId::from_u64(route).worker.value()));
    worker.register_with(&world, &region, hello).await.unwrap();
    assert_eq!(id(&worker), route);
    eventually("it is placed again", async || world.placeable(&region, "w-1").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_certificate_serves_a_pool_and_no_other_agent() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let mut change = world.agent(&["frankfurt"]);
    change.agents[0].behaviour.as_mut().unwrap().agent = "bank/desk".into();
    world.apply(&region, change).await.unwrap();
    // All of them show the certificate of "pool".
    let pool = world.stand_in(&region, "pool", 10).await;
    let as_named = |name: &str| v1::WorkerHello { name: name.into(), ..pool.hello() };
    for name in ["pool-55d9f-aaaaa", "pool-55d9f-bbbbb"] {
        let incarnation = pool.hello().incarnation ^ name.bytes().map(u32::from).sum::<u32>();
        let hello = v1::WorkerHello { incarnation, ..as_named(name) };
        let registered = pool.register_with(&world, &region, hello).await.unwrap();
        assert_eq!(registered.welcome.server_name, "pool.worker.frankfurt.antiphon.internal");
    }
    for name in ["pool-55d9f-aaaaa", "pool-55d9f-bbbbb"] {
        eventually("each is placed by its name", async || world.placeable(&region, name).await).await;
    }
    let refused = |refused: Result<crate::world::Registered, tonic::Status>| match refused {
        Ok(_) => panic!("registered"),
        Err(status) => (status.code(), status.message().to_owned()),
    };
    let foreign = pool.register_with(&world, &region, as_named("poolside")).await;
    let problem = r#"name: "poolside", but the certificate says "pool""#;
    assert_eq!(refused(foreign), (Code::InvalidArgument, problem.to_owned()));
    let of_another = v1::WorkerHello { agent: "bank/desk".into(), ..pool.hello() };
    let of_another = pool.register_with(&world, &region, of_another).await;
    let problem = r#"agent: "bank/desk", but the worker's certificate is for shop/desk"#;
    assert_eq!(refused(of_another), (Code::InvalidArgument, problem.to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_connected_but_silent_is_stale_after_its_lease() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let worker = world.worker(&region, "w-1", 10).await;
    worker.shared.mute.store(true, Ordering::SeqCst);
    eventually("its last report grows old", async || !world.placeable(&region, "w-1").await).await;
    let mut client = region.sessions();
    let refused = client.create_session(with_key(&world.key, create())).await;
    let refusal = antiphon_proto::refusal::of_status(&refused.unwrap_err()).unwrap();
    let line = refusal.candidates.iter().find(|c| c.worker == "w-1");
    assert_eq!(line.map(|c| c.verdict.as_str()), Some("stale"), "{refusal:?}");
    worker.shared.mute.store(false, Ordering::SeqCst);
    eventually("it is placed again", async || world.placeable(&region, "w-1").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_goes_when_its_worker_deregisters_or_is_replaced() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let worker = world.worker(&region, "w-1", 10).await;
    let mut relay = Relay::register(&world, &region, "r-1").await;
    let first = id(&worker);
    relay.follow("the route", |r| r.routes.contains_key(&first)).await;
    // A new life under the same name takes the number and the old route's place.
    worker.disconnect();
    eventually("it is seen to be gone", async || !world.placeable(&region, "w-1").await).await;
    *worker.incarnation.lock() = Incarnation::new(77).unwrap();
    worker.register(&world, &region).await.unwrap();
    let second = id(&worker);
    assert_eq!(ServerId::from_u64(first).worker, ServerId::from_u64(second).worker);
    assert_ne!(first, second);
    relay.follow("the new route", |r| r.routes.contains_key(&second)).await;
    assert!(!relay.routes.contains_key(&first));
    worker.deregister().await;
    relay.follow("no route", |r| r.routes.is_empty()).await;
    assert!(relay.removals_intended);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_living_incarnations_never_share_a_name_or_a_number() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let one = world.worker(&region, "w-1", 10).await;
    let namesake = world.stand_in(&region, "w-1", 10).await;
    let Err(refused) = namesake.register(&world, &region).await else {
        panic!("a namesake of a living worker was taken");
    };
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused:?}");
    let greedy = world.stand_in(&region, "w-2", 10).await;
    let mut hello = greedy.hello();
    let number = ServerId::from_u64(id(&one)).worker.value();
    hello.worker_number = Some(number.into());
    greedy.register_with(&world, &region, hello).await.unwrap();
    assert_ne!(ServerId::from_u64(id(&greedy)).worker.value(), number);
    assert!(world.placeable(&region, "w-1").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_and_relays_get_keys_that_fit_each_other() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let worker = world.stand_in(&region, "w-1", 10).await;
    let mut registered = worker.register(&world, &region).await.unwrap();
    assert_eq!(registered.welcome.cid_configs.len(), 1);
    assert!(registered.welcome.relays.is_empty());
    assert_eq!(registered.welcome.server_name, "w-1.worker.frankfurt.antiphon.internal");
    assert_eq!(registered.welcome.reset_keys[0].key.len(), 32);
    let relay = Relay::register(&world, &region, "r-1").await;
    assert_eq!(relay.welcome.cid_configs, registered.welcome.cid_configs);
    let relays = loop {
        let directive = soon("relays", registered.directives.recv()).await;
        if let Some(Directive::Relays(relays)) = directive.unwrap().directive {
            break relays.relays;
        }
    };
    assert_eq!(relays[0].number, relay.welcome.relay_number);
    let number = RelayNumber::new(u16::try_from(relays[0].number).unwrap()).unwrap();
    assert_eq!(number.region().value(), 1);
    let secret = relay.welcome.secrets[0].secret.as_ref().try_into().unwrap();
    let keys = RelaySecret::from_bytes(secret).tunnel_keys(ServerId::from_u64(id(&worker)));
    assert_eq!(relays[0].keys[0].up, keys.up.as_bytes().as_slice());
    assert_eq!(relays[0].keys[0].down, keys.down.as_bytes().as_slice());
    let generation = KeyGeneration::new(1).unwrap();
    assert_eq!(relay.welcome.cid_configs[0].key, world.root.cid_key(generation).as_slice());
    // The agent's behaviour is pushed when it changes.
    let mut change = world.agent(&["frankfurt"]);
    change.agents[0].behaviour.as_mut().unwrap().revision = "r2".into();
    world.apply(&region, change).await.unwrap();
    let directive = soon("behaviour", registered.directives.recv()).await;
    let Some(Directive::Behaviour(behaviour)) = directive.unwrap().directive else {
        panic!("no behaviour");
    };
    assert_eq!((behaviour.agent.as_str(), behaviour.revision.as_str()), (AGENT, "r2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_service_is_for_its_role_only() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let apply = async |role, of: &str| {
        let channel = world.channel(&region, "x-1", role, of);
        AdminClient::new(channel).apply(v1::ApplyRequest::default()).await.map(drop)
    };
    let watch = async |role, of: &str| {
        let channel = world.channel(&region, "x-1", role, of);
        let request = v1::WatchRegionRequest { region: "frankfurt".into() };
        PeerClient::new(channel).watch_region(request).await.map(drop)
    };
    let worker = async |role, of: &str| {
        let channel = world.channel(&region, "x-1", role, of);
        let hello = tokio_stream::empty();
        FleetClient::new(channel).run_worker(hello).await.map(drop)
    };
    let relay = async |role, of: &str| {
        let channel = world.channel(&region, "x-1", role, of);
        FleetClient::new(channel).run_relay(tokio_stream::empty()).await.map(drop)
    };
    for role in Role::ALL {
        let outcomes = [
            (apply(role, "frankfurt").await, Role::Operator),
            (watch(role, "frankfurt").await, Role::Router),
            (worker(role, "frankfurt").await, Role::Worker),
            (relay(role, "frankfurt").await, Role::Relay),
        ];
        for (outcome, expected) in outcomes {
            let code = outcome.as_ref().err().map(tonic::Status::code);
            if role == expected {
                assert_ne!(code, Some(Code::PermissionDenied), "{role}");
            } else {
                let status = outcome.unwrap_err();
                assert_eq!(status.code(), Code::PermissionDenied, "{role} as {expected}");
                assert!(status.message().contains(&format!("expected a {expected}")), "{status:?}");
            }
        }
    }
    let foreign = worker(Role::Worker, "virginia").await.unwrap_err();
    assert_eq!(foreign.code(), Code::PermissionDenied);
    // Without a certificate nobody gets in at all.
    let mut nobody = AdminClient::new(
        antiphon_runtime::tls::public_channel(
            &region.internal.to_string(),
            world.identity("x-1", Role::Operator, "frankfurt").ca_pem(),
            "router.frankfurt.antiphon.internal",
        )
        .unwrap(),
    );
    assert!(nobody.apply(v1::ApplyRequest::default()).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registration_says_what_is_missing() {
    let world = World::new();
    let region = world.router("frankfurt").await;
    let worker = world.stand_in(&region, "w-1", 10).await;
    let code = async || worker.register(&world, &region).await.map(drop).unwrap_err().code();
    assert_eq!(code().await, Code::Unavailable);
    let only_region =
        v1::ApplyRequest { regions: vec![region.record(1, crate::world::FRANKFURT)], ..v1::ApplyRequest::default() };
    world.apply(&region, only_region).await.unwrap();
    assert_eq!(code().await, Code::FailedPrecondition);
    world.apply(&region, world.agent(&["frankfurt"])).await.unwrap();
    let mut hello = worker.hello();
    hello.name = "w-2".into();
    let refused = worker.register_with(&world, &region, hello).await.map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().starts_with("name: "), "{refused:?}");
    assert!(worker.register(&world, &region).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_are_applied_whole_and_keys_are_revoked_at_once() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let mut bad = world.agent(&["frankfurt"]);
    bad.agents[0].rtt_ceiling_ms = 100;
    bad.agents[0].rtt_ceiling_max_ms = 50;
    let refused = world.apply(&region, bad).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().starts_with("agents[0].rtt_ceiling_max_ms: "), "{refused:?}");
    let list = async || {
        let list = v1::ListSessionsRequest::default();
        let listed = region.sessions().list_sessions(with_key(&world.key, list)).await;
        listed.map(drop).map_err(|s| s.code())
    };
    assert_eq!(list().await, Ok(()));
    let keys = world.operator(&region).list_keys(v1::ListKeysRequest {}).await;
    let keys = keys.unwrap().into_inner().keys;
    assert_eq!((keys.len(), keys[0].id.as_str()), (1, world.key.id()));
    let revoke = v1::ApplyRequest { removed_keys: vec![world.key.id().to_owned()], ..v1::ApplyRequest::default() };
    world.apply(&region, revoke).await.unwrap();
    assert_eq!(list().await, Err(Code::Unauthenticated));
    let limited = v1::ApplyRequest {
        keys: vec![crate::world::key_record(&world.key, &["other/*"])],
        ..v1::ApplyRequest::default()
    };
    world.apply(&region, limited).await.unwrap();
    let refused = region.sessions().create_session(with_key(&world.key, create())).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
    let stranger = ApiKey::from_random(&[1; ApiKey::RANDOM]);
    let refused = region.sessions().create_session(with_key(&stranger, create())).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_admin_port_tells_readiness_and_counts() {
    let world = World::new();
    let region = world.router("frankfurt").await;
    let get = async |path: &str| region.admin_get(path).await;
    assert_eq!(get("/livez").await.0, 200);
    assert_eq!(get("/readyz").await, (503, "waiting for: region record\n".to_owned()));
    let mut change = world.agent(&["frankfurt"]);
    change.regions = vec![region.record(1, crate::world::FRANKFURT)];
    world.apply(&region, change).await.unwrap();
    eventually("ready", async || get("/readyz").await.0 == 200).await;
    let _worker = world.worker(&region, "w-1", 1).await;
    for _ in 0..2 {
        let _ = region.sessions().create_session(with_key(&world.key, create())).await;
    }
    let unsigned = region.sessions().create_session(create()).await;
    assert!(unsigned.is_err());
    let (_, metrics) = get("/metrics").await;
    let expected = [
        "antiphon_router_tickets_total{outcome=\"local\"} 1",
        "antiphon_router_tickets_total{outcome=\"refused\"} 1",
        "antiphon_router_refusals_total{reason=\"no_capacity\"} 1",
        "antiphon_router_attempts_total{outcome=\"granted\"} 1",
        "antiphon_router_placement_seconds_count 2",
    ];
    for line in expected {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    eventually("the worker is counted", async || get("/metrics").await.1.contains("antiphon_router_workers 1")).await;
}
