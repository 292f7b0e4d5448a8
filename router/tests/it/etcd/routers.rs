//! Router processes on one etcd.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use antiphon_proto::{api_key::ApiKey, v1};
use antiphon_runtime::pki::{Role, write_secret};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStderr, Command},
};

use super::server::{Cable, Server, Way};
use crate::world::{AGENT, FRANKFURT, Region, Relay, World, create, eventually, key_record, soon, with_key};

/// A router's process, and how to talk to it.
struct Process {
    region: Region,
    child: Child,
    /// Read no further: what it says fits into the pipe.
    _lines: Lines<BufReader<ChildStderr>>,
}

/// What one router is started with, again and again.
struct Place {
    dir: tempfile::TempDir,
    etcd: SocketAddr,
}

impl Place {
    fn new(world: &World, name: &str, etcd: SocketAddr) -> Self {
        let dir = tempfile::tempdir().unwrap();
        world.identity(name, Role::Router, "frankfurt").save(dir.path()).unwrap();
        write_secret(&dir.path().join("root.hex"), "07".repeat(32).as_bytes()).unwrap();
        Self { dir, etcd }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn start(&self, world: &World) -> Process {
        let mut child = Command::new(env!("CARGO_BIN_EXE_antiphon-router"))
            .env_clear()
            .args(["--region", "frankfurt", "--public", "127.0.0.1:0", "--internal", "127.0.0.1:0"])
            .args(["--admin", "127.0.0.1:0", "--log-json", "--newcomers-wait", "0"])
            .args(["--etcd", &format!("http://{}", self.etcd)])
            .args([Path::new("--state"), &self.file("state"), Path::new("--identity"), self.dir.path()])
            .args([Path::new("--root"), &self.file("root.hex")])
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let addresses = soon("the router's addresses", async {
            loop {
                let line = lines.next_line().await.unwrap().expect("the router ended");
                let line: Value = serde_json::from_str(&line).unwrap();
                let fields = &line["fields"];
                if fields["message"] == "router starts" {
                    return ["public", "internal", "admin"].map(|port| fields[port].as_str().unwrap().parse().unwrap());
                }
            }
        })
        .await;
        Process { region: Region::elsewhere(world, "frankfurt", addresses), child, _lines: lines }
    }
}

impl Process {
    async fn ready(&self) -> bool {
        self.region.admin_get("/readyz").await == (200, "ok\n".to_owned())
    }

    async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

async fn number(world: &World, region: &Region) -> u32 {
    let status = world.status(region).await;
    let worker = status.regions.into_iter().flat_map(|r| r.workers).find(|w| w.name == "w-1");
    worker.unwrap().number
}

async fn places(region: &Region, key: &ApiKey) -> bool {
    let placed = region.sessions().create_session(with_key(key, create())).await;
    if let Ok(session) = &placed {
        let session = session.get_ref().session.clone();
        let delete = with_key(key, v1::DeleteSessionRequest { session });
        region.sessions().delete_session(delete).await.unwrap();
    }
    placed.is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_routers_of_a_region_are_one_and_outlive_their_etcd() {
    let world = World::new();
    let mut server = Server::start().await;
    let places_of = ["router-1", "router-2"].map(|name| Place::new(&world, name, server.address));
    let one = places_of[0].start(&world).await;
    let mut change = world.agent(&["frankfurt"]);
    change.regions = vec![one.region.record(1, FRANKFURT)];
    world.apply(&one.region, change).await.unwrap();
    let two = places_of[1].start(&world).await;
    eventually("both are ready", async || one.ready().await && two.ready().await).await;

    // A key that was made at one is good at the other.
    let key = ApiKey::from_random(&[3; ApiKey::RANDOM]);
    let made = v1::ApplyRequest { keys: vec![key_record(&key, &[])], ..v1::ApplyRequest::default() };
    world.apply(&two.region, made).await.unwrap();
    let worker = world.worker(&one.region, "w-1", 4).await;
    let given = number(&world, &one.region).await;
    worker.register(&world, &two.region).await.unwrap();
    eventually("both place it", async || world.placeable(&two.region, "w-1").await).await;
    assert_eq!(number(&world, &two.region).await, given);
    for router in [&one, &two] {
        eventually("it is placed with the new key", async || places(&router.region, &key).await).await;
    }

    // Requests go on while etcd is killed, and the routers say what is the matter.
    let requests = async {
        for _ in 0..20 {
            assert!(places(&one.region, &key).await && places(&two.region, &world.key).await);
        }
    };
    tokio::join!(requests, async { server.kill() });
    for router in [&one, &two] {
        eventually("it says so", async || {
            let (status, text) = router.region.admin_get("/readyz").await;
            status == 200 && text.starts_with("ok\nstore unavailable since ")
        })
        .await;
        assert!(!router.region.counts("antiphon_router_store_age_seconds 0.0").await);
        assert!(world.status(&router.region).await.store_age_ms > 0);
    }
    let refused = world.apply(&one.region, world.agent(&["frankfurt"])).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable);

    // One is killed and comes back without etcd: it knows the key, the agent and the worker's number.
    one.kill().await;
    let one = places_of[0].start(&world).await;
    eventually("it is ready", async || one.region.admin_get("/readyz").await.0 == 200).await;
    let mut hello = worker.hello();
    hello.worker_number = Some(given);
    worker.register_with(&world, &one.region, hello).await.unwrap();
    eventually("it places again", async || places(&one.region, &key).await).await;
    assert_eq!(number(&world, &one.region).await, given);
    let ask = json!({"agent": AGENT, "clientKey": "x"});
    assert_eq!(one.region.ask(&key, "POST", "/v1/sessions", Some(ask)).await.status, 400);

    server.restart().await;
    eventually("both are connected again", async || one.ready().await && two.ready().await).await;
    for router in [&one, &two] {
        assert_eq!(number(&world, &router.region).await, given);
        assert!(places(&router.region, &key).await);
    }
    world
        .apply(&two.region, v1::ApplyRequest { removed_keys: vec![key.id().into()], ..v1::ApplyRequest::default() })
        .await
        .unwrap();
    eventually("the key is gone everywhere", async || !places(&one.region, &key).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_killed_between_claim_and_answer_gives_the_same_number_again() {
    let world = World::new();
    let server = Server::start().await;
    let cable = Cable::to(server.address).await;
    let place = Place::new(&world, "router-1", cable.address);
    let router = place.start(&world).await;
    let mut change = world.agent(&["frankfurt"]);
    change.regions = vec![router.region.record(1, FRANKFURT)];
    world.apply(&router.region, change).await.unwrap();
    let mut etcd = server.client().await;
    let other = world.stand_in(&router.region, "w-0", 1).await;
    eventually("newcomers are numbered", async || other.register(&world, &router.region).await.is_ok()).await;
    let worker = world.stand_in(&router.region, "w-1", 1).await;
    cable.is(Way::NoAnswers);
    let written = async {
        let mut claim = None;
        eventually("the claim is in etcd", async || {
            let found = etcd.get("/antiphon/frankfurt/names/workers/w-1", None).await.unwrap();
            claim = found.kvs().first().map(|kv| kv.value_str().unwrap().to_owned());
            claim.is_some()
        })
        .await;
        claim.unwrap()
    };
    let claim = tokio::select! {
        registered = worker.register(&world, &router.region) => {
            panic!("registered without an answer of etcd: {:?}", registered.map(|r| r.welcome));
        }
        claim = written => claim,
    };
    router.kill().await;
    cable.is(Way::Open);
    let router = place.start(&world).await;
    let welcome = soon("its number", async {
        let mut tick = tokio::time::interval(Duration::from_millis(50));
        loop {
            tick.tick().await;
            if let Ok(registered) = worker.register(&world, &router.region).await {
                return registered.welcome;
            }
        }
    })
    .await;
    assert_eq!(welcome.worker_number.to_string(), claim);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_starts_with_nothing_does_not_rotate_past_a_relay_that_it_never_saw() {
    let world = World::new();
    let server = Server::start().await;
    let [first, fresh] = ["router-1", "router-2"].map(|name| Place::new(&world, name, server.address));
    let one = first.start(&world).await;
    let mut change = world.agent(&["frankfurt"]);
    change.regions = vec![one.region.record(1, FRANKFURT)];
    world.apply(&one.region, change).await.unwrap();
    let known = world.stand_in(&one.region, "w-1", 4).await;
    eventually("newcomers are numbered", async || known.register(&world, &one.region).await.is_ok()).await;
    let away = Relay::register(&world, &one.region, "relay-1").await;
    assert_eq!(away.keys.secrets.len(), 1);

    // Another router, whose state is empty, is all that is left.
    one.kill().await;
    let two = fresh.start(&world).await;
    eventually("it is ready", async || two.ready().await).await;
    known.register(&world, &two.region).await.unwrap();
    let rotate = v1::ApplyRequest { key_generation: 2, ..v1::ApplyRequest::default() };
    world.apply(&two.region, rotate).await.unwrap();
    // Long enough for all who reach it to register; the worker has loaded the generation.
    eventually("only the relay is waited for", async || {
        let held_up_by = world.status(&two.region).await.rotation_held_up_by;
        known.shared.loaded() == [1, 2]
            && held_up_by == ["relay-1: holds a number and has not registered with this router"]
    })
    .await;
    assert_eq!(known.shared.minting(), 1);
    let missed = world.status(&two.region).await.regions.into_iter().flat_map(|region| region.relays);
    assert_eq!(missed.map(|relay| (relay.name, relay.connected)).collect::<Vec<_>>(), [("relay-1".to_owned(), false)]);

    let gone = v1::ReportRelayGoneRequest { name: "relay-1".into() };
    assert!(world.operator(&two.region).report_relay_gone(gone).await.unwrap().into_inner().known);
    eventually("the rotation goes on", async || known.shared.minting() == 2).await;
    let mut etcd = server.client().await;
    let left = etcd.get("/antiphon/frankfurt/names/relays/relay-1", None).await.unwrap();
    assert!(left.kvs().is_empty(), "its number is free");
}
