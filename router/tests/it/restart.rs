//! A router that starts again while nobody else is there: it goes on from its state on disk.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Stdio,
};

use antiphon_core::id::ServerId;
use antiphon_proto::v1;
use antiphon_router::{Found, Owner, SnapshotDir};
use antiphon_runtime::pki::{Role, write_secret};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStderr, Command},
};

use crate::world::{FRANKFURT, Region, Relay, VIRGINIA, Worker, World, create, eventually, point, soon, with_key};

/// What one router is started with, again and again.
struct Place {
    name: &'static str,
    dir: TempDir,
    /// Once it has run, its ports.
    ports: [SocketAddr; 3],
}

/// A router's process. Ends with the value.
struct Process {
    region: Region,
    child: Child,
    lines: Lines<BufReader<ChildStderr>>,
}

impl Place {
    fn new(world: &World, name: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        world.identity("router-1", Role::Router, name).save(dir.path()).unwrap();
        write_secret(&dir.path().join("root.hex"), "07".repeat(32).as_bytes()).unwrap();
        Self { name, dir, ports: [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); 3] }
    }

    async fn start(&mut self, world: &World) -> Process {
        self.start_with(world, &[]).await
    }

    async fn start_with(&mut self, world: &World, more: &[&str]) -> Process {
        let [public, internal, admin] = self.ports.map(|port| port.to_string());
        let mut child = Command::new(env!("CARGO_BIN_EXE_antiphon-router"))
            .env_clear()
            .args(["--region", self.name, "--public", &public, "--internal", &internal, "--admin", &admin])
            .args(["--log-json", "--newcomers-wait", "0"])
            .args(more)
            .args([Path::new("--state"), &self.dir.path().join("state"), Path::new("--identity"), self.dir.path()])
            .args([Path::new("--root"), &self.dir.path().join("root.hex")])
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let any = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); 3];
        let mut process = Process { region: Region::elsewhere(world, self.name, any), child, lines };
        let starts = process.says("router starts").await;
        let ports = ["public", "internal", "admin"];
        self.ports = ports.map(|port| starts[port].as_str().unwrap().parse().unwrap());
        process.region = Region::elsewhere(world, self.name, self.ports);
        process
    }

    /// What the router has kept of its fleet; looked at in a copy, as the directory is the router's alone.
    fn kept(&self, owner: &Owner) -> Option<bytes::Bytes> {
        let copy = tempfile::tempdir().unwrap();
        std::fs::set_permissions(copy.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::copy(self.dir.path().join("state/router.snapshot"), copy.path().join("router.snapshot")).ok()?;
        match SnapshotDir::open(copy.path(), owner.clone()).unwrap().load() {
            Found::Snapshot(snapshot) => Some(snapshot.known),
            Found::Nothing | Found::Unusable => None,
        }
    }

    /// Waits until all of this is on disk.
    async fn keeps(&self, world: &World, pieces: &[&[u8]]) {
        let owner = Owner::of(&world.identity("router-1", Role::Router, self.name));
        eventually("it is on disk", async || {
            let kept = self.kept(&owner).unwrap_or_default();
            pieces.iter().all(|piece| kept.windows(piece.len()).any(|bytes| bytes == *piece))
        })
        .await;
    }
}

impl Process {
    /// The fields of the next line with this message.
    async fn says(&mut self, message: &str) -> Value {
        soon(message, async {
            loop {
                let line = self.lines.next_line().await.unwrap().expect("the router ended");
                let line: Value = serde_json::from_str(&line).unwrap();
                if line["fields"]["message"].as_str().is_some_and(|said| said.starts_with(message)) {
                    return line["fields"].clone();
                }
            }
        })
        .await
    }

    async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

fn id(worker: &Worker) -> u64 {
    worker.shared.server_id.lock().unwrap().to_u64()
}

async fn ask(world: &World, region: &Region, place: (f64, f64)) -> Result<v1::Session, tonic::Status> {
    let request = v1::CreateSessionRequest { location: Some(point(place)), ..create() };
    let answer = region.sessions().create_session(with_key(&world.key, request)).await;
    answer.map(tonic::Response::into_inner)
}

fn relays(session: &v1::Session) -> Vec<u32> {
    let mut numbers: Vec<u32> = session.relays.iter().map(|r| r.number).collect();
    numbers.sort_unstable();
    numbers
}

/// Both regions know both.
async fn apply(world: &World, frankfurt: &Region, virginia: &Region) {
    for region in [frankfurt, virginia] {
        let mut change = world.agent(&["frankfurt", "virginia"]);
        change.regions = vec![frankfurt.record(1, FRANKFURT), virginia.record(2, VIRGINIA)];
        world.apply(region, change).await.unwrap();
    }
}

/// Registers a worker again that has never stopped.
async fn back(world: &World, worker: &Worker, region: &Region) {
    let mut hello = worker.hello();
    hello.worker_number = Some(ServerId::from_u64(id(worker)).worker.value().into());
    worker.register_with(world, region, hello).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_starts_with_everybody_gone_still_knows_them_and_changes_nothing_when_they_are_back() {
    let world = World::new();
    let (mut here, mut there) = (Place::new(&world, "frankfurt"), Place::new(&world, "virginia"));
    let (frankfurt, virginia) = (here.start(&world).await, there.start(&world).await);
    apply(&world, &frankfurt.region, &virginia.region).await;
    let ours = world.worker(&frankfurt.region, "w-1", 10).await;
    let theirs = world.worker(&virginia.region, "w-1", 10).await;
    let (our_id, their_id) = (id(&ours), id(&theirs));
    let their_relay = Relay::register(&world, &virginia.region, "r-1").await;
    let mut relay = Relay::register(&world, &frankfurt.region, "r-1").await;
    relay.follow("both routes", |r| r.routes.len() == 2 && !r.neighbours.is_empty()).await;
    let (table, number) = (relay.routes.clone(), relay.welcome.relay_number);
    eventually("both regions' relays are offered", async || {
        ask(&world, &frankfurt.region, FRANKFURT).await.is_ok_and(|s| s.relays.len() == 2)
    })
    .await;
    let offered = relays(&ask(&world, &frankfurt.region, FRANKFURT).await.unwrap());
    here.keeps(&world, &[&their_id.to_le_bytes(), b"w-1", b"r-1"]).await;

    // Everybody goes at once, without a word.
    let (asked_here, asked_there) = (ours.asked(), theirs.asked());
    frankfurt.kill().await;
    virginia.kill().await;
    drop((relay, their_relay));
    ours.disconnect();
    theirs.disconnect();
    let mut frankfurt = here.start(&world).await;
    let recalled = frankfurt.says("going on from what was known").await;
    assert_eq!((&recalled["workers"], &recalled["relays"], &recalled["regions"]), (&1.into(), &1.into(), &1.into()));

    let status = world.status(&frankfurt.region).await;
    let [own, other] = [true, false].map(|local| status.regions.iter().find(|r| r.local == local).unwrap());
    assert!(other.digest_age_ms > 0 && other.digest_age_ms < 600_000, "{}", other.digest_age_ms);
    assert_eq!(other.digest.as_ref().unwrap().relays.len(), 1);
    assert_eq!((own.workers.len(), own.workers[0].placeable), (1, false));
    assert!(own.workers[0].report_age_ms < 600_000);
    // The first table that a relay gets is the whole one.
    let mut relay = Relay::register(&world, &frankfurt.region, "r-1").await;
    assert_eq!((relay.version, &relay.routes, relay.welcome.relay_number), (1, &table, number));
    assert!(relay.dead.is_empty());
    relay.follow("the other region's relay", |r| !r.neighbours.is_empty()).await;

    // Nobody is placed with by memory, here or there.
    let refused = ask(&world, &frankfurt.region, VIRGINIA).await.unwrap_err();
    let refusal = antiphon_proto::refusal::of_status(&refused).unwrap();
    let verdict = |region: &str, worker: &str| {
        let line = refusal.candidates.iter().find(|c| c.region == region && c.worker == worker);
        line.map(|c| c.verdict.clone())
    };
    assert_eq!(verdict("frankfurt", "w-1").as_deref(), Some("disconnected"));
    assert_eq!(verdict("virginia", "").as_deref(), Some("disconnected"));
    assert_eq!((ours.asked(), theirs.asked()), (asked_here, asked_there));
    back(&world, &ours, &frankfurt.region).await;
    eventually("it is placed again", async || world.placeable(&frankfurt.region, "w-1").await).await;
    let session = ask(&world, &frankfurt.region, VIRGINIA).await.unwrap();
    assert_eq!((session.region.as_str(), relays(&session)), ("frankfurt", offered.clone()));

    // The others are back: who was there has its number, and no route was ever taken away.
    let virginia = there.start(&world).await;
    back(&world, &theirs, &virginia.region).await;
    let _their_relay = Relay::register(&world, &virginia.region, "r-1").await;
    eventually("virginia is placed in", async || {
        ask(&world, &frankfurt.region, VIRGINIA).await.is_ok_and(|s| s.region == "virginia")
    })
    .await;
    assert_eq!((id(&ours), id(&theirs)), (our_id, their_id));
    let session = ask(&world, &frankfurt.region, VIRGINIA).await.unwrap();
    assert_eq!(relays(&session), offered);
    // A new route shows that the relay has had all that came before it.
    let newcomer = world.worker(&frankfurt.region, "w-2", 10).await;
    let new_id = id(&newcomer);
    relay.follow("a new route", |r| r.routes.contains_key(&new_id)).await;
    relay.routes.remove(&new_id);
    assert_eq!(relay.routes, table);
    assert!(relay.dead.is_empty() && !relay.removals_intended);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_starts_without_its_etcd_goes_on_from_what_it_knew() {
    let world = World::new();
    let mut here = Place::new(&world, "frankfurt");
    let (frankfurt, virginia) = (here.start(&world).await, world.router("virginia").await);
    apply(&world, &frankfurt.region, &virginia).await;
    let ours = world.worker(&frankfurt.region, "w-1", 10).await;
    let theirs = world.worker(&virginia, "w-1", 10).await;
    let their_id = id(&theirs);
    let mut relay = Relay::register(&world, &frankfurt.region, "r-1").await;
    relay.follow("both routes", |r| r.routes.len() == 2).await;
    let (table, number) = (relay.routes.clone(), relay.welcome.relay_number);
    here.keeps(&world, &[&their_id.to_le_bytes(), b"w-1", b"r-1"]).await;
    frankfurt.kill().await;
    drop((relay, virginia));
    ours.disconnect();

    // Nothing listens there.
    let frankfurt = here.start_with(&world, &["--etcd", "http://127.0.0.1:1"]).await;
    let relay = Relay::register_as(&world, &frankfurt.region, "r-1", Some(number)).await;
    assert_eq!((relay.version, relay.routes, relay.welcome.relay_number), (1, table, number));
    let status = world.status(&frankfurt.region).await;
    assert!(status.store_age_ms > 0);
    let other = status.regions.iter().find(|r| !r.local).unwrap();
    assert!(other.digest_age_ms < 600_000, "{}", other.digest_age_ms);
    back(&world, &ours, &frankfurt.region).await;
    eventually("it is placed again", async || {
        ask(&world, &frankfurt.region, VIRGINIA).await.is_ok_and(|s| s.worker == "w-1" && s.region == "frankfurt")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_that_cannot_be_read_is_named_and_the_rest_of_the_snapshot_used() {
    let world = World::new();
    let mut here = Place::new(&world, "frankfurt");
    let frankfurt = here.start(&world).await;
    let mut change = world.agent(&["frankfurt"]);
    change.regions = vec![frankfurt.region.record(1, FRANKFURT)];
    world.apply(&frankfurt.region, change).await.unwrap();
    let _worker = world.worker(&frankfurt.region, "w-1", 10).await;
    here.keeps(&world, &[b"w-1"]).await;
    frankfurt.kill().await;
    let owner = Owner::of(&world.identity("router-1", Role::Router, "frankfurt"));
    let dir = SnapshotDir::open(&here.dir.path().join("state"), owner).unwrap();
    let Found::Snapshot(mut snapshot) = dir.load() else {
        panic!("no snapshot");
    };
    snapshot.known.truncate(snapshot.known.len() - 1);
    dir.store(&snapshot).unwrap();
    drop(dir);
    let mut frankfurt = here.start(&world).await;
    frankfurt.says("what was known of routes, relays and regions is not used: it is damaged").await;
    let status = world.status(&frankfurt.region).await;
    // All that is left of the worker is that it holds a number.
    let left: Vec<_> = status.regions.iter().flat_map(|region| &region.workers).collect();
    assert_eq!((status.regions.len(), left.len()), (1, 1));
    assert_eq!((left[0].slots, left[0].why_not.as_str()), (0, "it has not registered with this router"));
}
