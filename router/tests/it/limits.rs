//! What is bounded for those who have a key or a certificate, and clocks that are wrong.

use std::sync::atomic::Ordering;

use antiphon_proto::{api_key::ApiKey, refusal, v1};
use tonic::Code;

use crate::{
    http::body,
    world::{Relay, World, create, eventually, key_record, with_key},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tickets_are_limited_per_key_and_per_tenant_and_agent() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let _worker = world.worker(&region, "w-1", 100).await;
    let slow = ApiKey::from_random(&[31; ApiKey::RANDOM]);
    let mut change = world.agent(&["frankfurt"]);
    change.keys.push(v1::KeyRecord { tickets_per_minute: 2, ..key_record(&slow, &[]) });
    world.apply(&region, change).await.unwrap();
    let ask = async |key: &ApiKey| region.ask(key, "POST", "/v1/sessions", Some(body())).await;
    assert_eq!(ask(&slow).await.status, 201);
    let refused = ask(&slow).await;
    assert_eq!((refused.status, refused.body["reason"].as_str()), (429, Some("key_limit")), "{refused:?}");
    let retry: u32 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=30).contains(&retry), "{retry}");
    let over_grpc = region.sessions().create_session(with_key(&slow, create())).await.unwrap_err();
    assert_eq!(over_grpc.code(), Code::ResourceExhausted);
    let refusal = refusal::of_status(&over_grpc).unwrap();
    assert_eq!(refusal.reason, "key_limit");
    assert!((1..=30_000).contains(&refusal.retry_after_ms));
    assert!(region.counts("antiphon_router_refusals_total{reason=\"key_limit\"} 2").await);
    // Another key of the tenant has its own bucket, until the agent bounds the tenant.
    assert_eq!(ask(&world.key).await.status, 201);
    let mut change = world.agent(&["frankfurt"]);
    change.agents[0].tickets_per_minute_per_tenant = 1;
    world.apply(&region, change).await.unwrap();
    assert_eq!(ask(&world.key).await.status, 201);
    let refused = ask(&world.key).await;
    assert_eq!((refused.status, refused.body["reason"].as_str()), (429, Some("tenant_limit")), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_all_workers_again_and_again_is_told_to_wait() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let ask = async |key: &ApiKey| region.ask(key, "GET", "/v1/sessions", None).await;
    let mut refused = None;
    for _ in 0..200 {
        let answer = ask(&world.key).await;
        if answer.status != 200 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("not without end");
    assert_eq!((refused.status, refused.body["reason"].as_str()), (429, Some("key_limit")), "{refused:?}");
    let other = ApiKey::from_random(&[32; ApiKey::RANDOM]);
    let mut change = world.agent(&["frankfurt"]);
    change.keys.push(key_record(&other, &[]));
    world.apply(&region, change).await.unwrap();
    assert_eq!(ask(&other).await.status, 200, "another key has its own rate");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_have_a_bound_on_every_port() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let long = v1::CreateSessionRequest { agent: "x".repeat(70_000), ..create() };
    let refused = region.sessions().create_session(with_key(&world.key, long)).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let worker = world.stand_in(&region, "w-1", 1).await;
    let mut hello = worker.hello();
    hello.gpu_class = "x".repeat(20_000);
    let refused = worker.register_with(&world, &region, hello).await.map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let mut hello = worker.hello();
    hello.shards = vec![hello.shards[0].clone(); 65];
    let refused = worker.register_with(&world, &region, hello).await.map(drop).unwrap_err();
    assert_eq!(refused.message(), "shards: has 65 shards, at most 64");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_clock_is_behind_is_named_and_not_placed_on() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let worker = world.worker(&region, "w-1", 5).await;
    let ahead = world.worker(&region, "w-2", 5).await;
    worker.shared.clock_ahead_s.store(-121, Ordering::SeqCst);
    ahead.shared.clock_ahead_s.store(100, Ordering::SeqCst);
    eventually("it leaves placement", async || !world.placeable(&region, "w-1").await).await;
    let status = world.status(&region).await.regions.remove(0);
    let of = |name: &str| status.workers.iter().find(|w| w.name == name).unwrap();
    let why_not = &of("w-1").why_not;
    let clock = why_not.strip_prefix("clock is 12").unwrap();
    assert!(clock.ends_with(" s behind this router's: fix time synchronisation"), "{why_not}");
    assert!((-123_000..=-120_000).contains(&of("w-1").clock_ahead_ms));
    assert!(of("w-2").placeable, "its tickets are good");
    let session = region.sessions().create_session(with_key(&world.key, create())).await.unwrap().into_inner();
    assert_eq!(session.worker, "w-2");
    let explain = v1::ExplainSessionRequest { session: session.session };
    let explained = region.sessions().explain_session(with_key(&world.key, explain)).await.unwrap().into_inner();
    let line = explained.candidates.iter().find(|c| c.worker == "w-1").unwrap();
    assert_eq!(line.verdict, "clock_behind");
    assert_eq!(line.detail, *why_not);
    let relay = Relay::register(&world, &region, "r-1").await;
    let unix_ms = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
    relay.report(v1::RelayReport { unix_ms: u64::try_from(unix_ms).unwrap() - 300_000, ..Default::default() }).await;
    eventually("clocks are measured", async || {
        let (_, metrics) = region.admin_get("/metrics").await;
        let starts = |text: &str| metrics.lines().any(|l| l.starts_with(text));
        starts("antiphon_router_clock_ahead_seconds{of=\"workers\"} -12")
            && starts("antiphon_router_clock_ahead_seconds{of=\"relays\"} -30")
    })
    .await;
    // Right again.
    worker.shared.clock_ahead_s.store(0, Ordering::SeqCst);
    eventually("it is placed again", async || world.placeable(&region, "w-1").await).await;
}
