//! etcd away, gone, emptied, brought back from a backup: what stores on it do then.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use antiphon_core::id::Incarnation;
use antiphon_proto::v1;
use antiphon_router::{Found, SnapshotDir, Store as _, StoreArgs, StoreError};
use bytes::Bytes;
use etcd_client::{CompactionOptions, DeleteOptions, GetOptions};
use futures::future::join_all;
use tokio::time::interval;

use super::{
    server::{Cable, Server, Way},
    stores::{Open, agent, knows, owner, worker},
};
use crate::world::eventually;

fn dir(path: &Path) -> SnapshotDir {
    SnapshotDir::open(path, owner()).unwrap()
}

/// The snapshot made to look as if etcd had been away for longer.
fn age(path: &Path, by: Duration) {
    let dir = dir(path);
    let Found::Snapshot(mut snapshot) = dir.load() else {
        panic!("there is no snapshot");
    };
    snapshot.contact -= by;
    dir.store(&snapshot).unwrap();
}

fn is_unavailable<T: std::fmt::Debug>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Unavailable { .. }))
}

/// What etcd says of who holds which number.
async fn numbers(server: &Server) -> BTreeMap<String, String> {
    let options = GetOptions::new().with_prefix();
    let found = server.client().await.get("/antiphon/north/numbers/", Some(options)).await.unwrap();
    let text = |kv: &etcd_client::KeyValue| (kv.key_str().unwrap().to_owned(), kv.value_str().unwrap().to_owned());
    found.kvs().iter().map(text).collect()
}

fn revision(open: &Open) -> u64 {
    open.store.watch().borrow().revision
}

#[tokio::test]
async fn routers_that_share_a_store_agree() {
    let server = Server::start().await;
    let args = server.args(server.address);
    let (a, b) = (Open::ready(&args).await, Open::ready(&args).await);
    let number = a.store.claim_worker(&worker("w", 1, None)).await.unwrap();
    assert_eq!(b.store.claim_worker(&worker("w", 1, None)).await, Ok(number));
    let relay = b.store.claim_relay("r", None).await.unwrap();
    assert_eq!(a.store.claim_relay("r", Some(relay + 1)).await, Ok(relay));
    a.store.apply(&agent("here")).await.unwrap();
    eventually("the change is seen", async || knows(&*b.store, "here")).await;

    let claim = async |i: u32| {
        let store = if i.is_multiple_of(2) { &a.store } else { &b.store };
        store.claim_worker(&worker(&format!("w-{i}"), i, None)).await.unwrap()
    };
    let mut numbers = join_all((0..200).map(claim)).await;
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), 200);
    let change = async |i: u32| {
        let store = if i.is_multiple_of(2) { &a.store } else { &b.store };
        store.apply(&agent(&format!("a-{i}"))).await.unwrap();
    };
    join_all((0..30).map(change)).await;
    let all = || (0..30).all(|i| knows(&*a.store, &format!("a-{i}")) && knows(&*b.store, &format!("a-{i}")));
    eventually("all changes are seen", async || all()).await;
    assert_eq!(revision(&a), revision(&b));
}

#[tokio::test]
async fn what_is_done_while_etcd_is_away_is_told_to_it_later() {
    let mut server = Server::start().await;
    let args = server.args(server.address);
    let (a, b) = (Open::ready(&args).await, Open::ready(&args).await);
    a.store.apply(&agent("before")).await.unwrap();
    let known = a.store.claim_worker(&worker("known", 1, None)).await.unwrap();
    let leaving = a.store.claim_worker(&worker("leaving", 1, None)).await.unwrap();

    // Claims are under way while it dies: each is answered with a number or with an error, and no number twice.
    let claims = (0..200).map(async |i: u32| a.store.claim_worker(&worker(&format!("w-{i}"), i, None)).await);
    let under_way = tokio::join!(join_all(claims), async { server.kill() }).0;
    let mut given: Vec<_> = under_way.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
    let count = given.len();
    given.sort();
    given.dedup();
    assert_eq!(given.len(), count);
    a.lost().await;

    assert_eq!(a.store.claim_worker(&worker("known", 2, None)).await, Ok(known));
    let holder = a.store.claim_worker(&worker("holder", 1, Some(4711))).await.unwrap();
    assert_eq!(holder.value(), 4711);
    a.store.release_worker(leaving, Incarnation::new(1).unwrap()).await;
    let newcomer = a.store.claim_worker(&worker("newcomer", 1, None)).await;
    let error = newcomer.unwrap_err().to_string();
    assert!(error.starts_with("store unavailable since"), "{error}");
    assert!(is_unavailable(&a.store.apply(&agent("during")).await));
    assert!(knows(&*a.store, "before"));

    server.restart().await;
    a.reached().await;
    b.reached().await;
    let numbers = numbers(&server).await;
    let of = |number: u16| numbers.get(&format!("/antiphon/north/numbers/workers/{number:05}")).cloned();
    assert_eq!(of(known.value()).as_deref(), Some(r#"{"name":"known","agent":"shop/desk","incarnation":2}"#));
    assert_eq!(of(4711).as_deref(), Some(r#"{"name":"holder","agent":"shop/desk","incarnation":1}"#));
    assert_eq!(of(leaving.value()), None);
    for (i, outcome) in under_way.iter().enumerate() {
        if let Ok(number) = outcome {
            let i = u32::try_from(i).unwrap();
            assert_eq!(b.store.claim_worker(&worker(&format!("w-{i}"), i, None)).await, Ok(*number));
        }
    }
    a.store.apply(&agent("after")).await.unwrap();
}

#[tokio::test]
async fn a_restart_without_etcd_goes_on_from_the_snapshot_and_nothing_is_reshuffled() {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().join("state");
    let mut server = Server::start().await;
    let args = server.args(server.address);
    let before = Open::new(&args, Some(dir(&path)));
    before.settled().await;
    before.store.apply(&agent("known")).await.unwrap();
    let number = before.store.claim_worker(&worker("w", 1, None)).await.unwrap();
    let relay = before.store.claim_relay("r", None).await.unwrap();
    before.store.remember(Bytes::from_static(b"routes"));
    let seen = revision(&before);
    before.stop().await;
    server.kill();
    age(&path, Duration::from_secs(600));

    let during = Open::new(&args, Some(dir(&path)));
    assert!(!during.store.connected_within(Duration::from_millis(500)).await);
    assert!(during.store.age() >= Duration::from_secs(600));
    assert!(knows(&*during.store, "known") && during.store.remembered() == "routes");
    assert_eq!(during.store.claim_worker(&worker("w", 1, Some(number.value()))).await, Ok(number));
    assert_eq!(during.store.claim_relay("r", Some(relay)).await, Ok(relay));
    // A relay that does not say so itself might have lost it to another one since.
    assert!(is_unavailable(&during.store.claim_relay("r", None).await));
    let error = during.store.claim_worker(&worker("new", 1, None)).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { since, .. } if since >= Duration::from_secs(600)), "{error}");
    // Once more, and what was kept is kept.
    during.stop().await;
    let again = Open::new(&args, Some(dir(&path)));
    assert!(again.store.age() >= Duration::from_secs(600));

    server.restart().await;
    again.reached().await;
    assert_eq!(again.store.claim_worker(&worker("w", 2, None)).await, Ok(number));
    assert_eq!(again.store.claim_relay("r", None).await, Ok(relay));
    assert!(again.store.claim_worker(&worker("new", 1, None)).await.is_ok());
    assert_eq!(revision(&again), seen);
}

#[tokio::test]
async fn an_emptied_store_gets_back_what_routers_know() {
    let server = Server::start().await;
    let args = server.args(server.address);
    let (a, b) = (Open::ready(&args).await, Open::ready(&args).await);
    a.store.apply(&agent("known")).await.unwrap();
    let number = a.store.claim_worker(&worker("w", 1, None)).await.unwrap();
    let relay = a.store.claim_relay("r", None).await.unwrap();
    eventually("the other knows it", async || knows(&*b.store, "known")).await;
    let seen = revision(&a).max(revision(&b));
    let (mut watch_a, mut watch_b) = (a.store.watch(), b.store.watch());

    let mut client = server.client().await;
    client.delete("/antiphon/", Some(DeleteOptions::new().with_prefix())).await.unwrap();
    // Who changes something meanwhile changes it on top of what is known.
    eventually("a change is made", async || a.store.apply(&agent("new")).await.is_ok()).await;
    eventually("it is seen", async || knows(&*b.store, "new") && knows(&*a.store, "new")).await;
    assert!(knows(&*a.store, "known") && knows(&*b.store, "known"));
    assert!(revision(&a) > seen && revision(&b) > seen);
    for watch in [&mut watch_a, &mut watch_b] {
        assert!(watch.borrow_and_update().revision > seen);
    }
    assert_eq!(b.store.claim_worker(&worker("w", 2, None)).await, Ok(number));
    assert_eq!(b.store.claim_relay("r", None).await, Ok(relay));
    // And one that starts now finds it all in etcd.
    let c = Open::ready(&args).await;
    assert!(knows(&*c.store, "known") && knows(&*c.store, "new"));
    assert_eq!(c.store.claim_worker(&worker("w", 3, None)).await, Ok(number));
}

#[tokio::test]
async fn after_a_loss_newcomers_wait_for_those_who_hold_a_number() {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().join("state");
    let mut server = Server::start().await;
    let args = StoreArgs { newcomers_wait: Duration::from_secs(3600), ..server.args(server.address) };
    let before = Open::ready(&StoreArgs { newcomers_wait: Duration::ZERO, ..args.clone() }).await;
    let late = before.store.claim_worker(&worker("late", 1, None)).await.unwrap();
    before.stop().await;
    let before = Open::new(&args, Some(dir(&path)));
    before.reached().await;
    let number = before.store.claim_worker(&worker("w", 1, None)).await.unwrap();
    before.store.apply(&agent("known")).await.unwrap();
    before.stop().await;
    server.kill();
    std::fs::remove_dir_all(server.data()).unwrap();
    server.restart().await;

    // One router knows nothing and one has a snapshot; the workers know their numbers.
    let blank = Open::new(&args, None);
    blank.reached().await;
    assert_eq!(blank.store.claim_worker(&worker("new", 1, None)).await, Err(StoreError::Settling));
    let held = blank.store.claim_worker(&worker("late", 1, Some(late.value()))).await;
    assert_eq!(held, Ok(late));
    let knowing = Open::new(&args, Some(dir(&path)));
    knowing.reached().await;
    assert_eq!(knowing.store.claim_worker(&worker("w", 1, None)).await, Ok(number));
    assert_eq!(knowing.store.claim_worker(&worker("new", 1, None)).await, Err(StoreError::Settling));
    // The store was not empty any more: what the blank router had made of it stands.
    assert!(!knows(&*knowing.store, "known"));
}

#[tokio::test]
async fn records_of_a_snapshot_come_back_into_an_empty_store_only_of_its_own_fleet() {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().join("state");
    let mut server = Server::start().await;
    let args = server.args(server.address);
    let before = Open::new(&args, Some(dir(&path)));
    before.settled().await;
    before.store.apply(&agent("known")).await.unwrap();
    let seen = revision(&before);
    before.stop().await;
    server.kill();
    std::fs::remove_dir_all(server.data()).unwrap();
    server.restart().await;
    let mut client = server.client().await;
    let foreign = r#"{"format":1,"fleet":"00","region":"north","id":"1","settling":false}"#;
    client.put("/antiphon/north/store", foreign, None).await.unwrap();

    let after = Open::new(&args, Some(dir(&path)));
    eventually("it is refused", async || {
        let refused = after.store.apply(&agent("new")).await.unwrap_err().to_string();
        refused.contains("of a fleet with another trust anchor")
    })
    .await;
    assert!(knows(&*after.store, "known"));
    client.delete("/antiphon/north/store", None).await.unwrap();
    after.reached().await;
    assert!(knows(&*after.store, "known") && revision(&after) > seen);
    let other = Open::ready(&args).await;
    assert!(knows(&*other.store, "known"));
}

#[tokio::test]
async fn a_store_from_a_backup_gets_back_the_numbers_given_since() {
    let mut server = Server::start().await;
    let args = server.args(server.address);
    let a = Open::ready(&args).await;
    a.store.apply(&agent("early")).await.unwrap();
    let early = a.store.claim_worker(&worker("early", 1, None)).await.unwrap();
    server.kill();
    let backup = tempfile::tempdir().unwrap();
    let copy = backup.path().join("etcd");
    copy_all(&server.data(), &copy);
    server.restart().await;
    a.reached().await;
    a.store.apply(&agent("late")).await.unwrap();
    // The early one goes, and its number is another's.
    a.store.release_worker(early, Incarnation::new(1).unwrap()).await;
    let taken = a.store.claim_worker(&worker("heir", 1, Some(early.value()))).await;
    assert_eq!(taken, Ok(early));
    let late = a.store.claim_worker(&worker("late", 1, None)).await.unwrap();
    let seen = revision(&a);

    server.kill();
    std::fs::remove_dir_all(server.data()).unwrap();
    copy_all(&copy, &server.data());
    server.restart().await;
    a.lost().await;
    a.reached().await;
    // Records are what the backup says, as a newer revision; numbers are who holds them.
    eventually("the revision is above", async || revision(&a) > seen).await;
    assert!(knows(&*a.store, "early") && !knows(&*a.store, "late"));
    let b = Open::ready(&args).await;
    assert_eq!(b.store.claim_worker(&worker("late", 1, None)).await, Ok(late));
    assert_eq!(b.store.claim_worker(&worker("heir", 1, None)).await, Ok(early));
    assert_ne!(b.store.claim_worker(&worker("early", 2, None)).await, Ok(early));
}

fn copy_all(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    std::fs::set_permissions(to, std::fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (entry, to) = (entry.as_ref().unwrap(), to.join(entry.as_ref().unwrap().file_name()));
        if entry.file_type().unwrap().is_dir() {
            copy_all(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[tokio::test]
async fn changes_while_cut_off_are_seen_afterwards_also_if_they_were_compacted() {
    let server = Server::start().await;
    let cable = Cable::to(server.address).await;
    let far = Open::ready(&server.args(cable.address)).await;
    let near = Open::ready(&server.args(server.address)).await;
    near.store.apply(&agent("gone")).await.unwrap();
    eventually("it is seen", async || knows(&*far.store, "gone")).await;
    for compacted in [false, true] {
        cable.is(Way::Cut);
        far.lost().await;
        let name = format!("new-{compacted}");
        near.store.apply(&agent(&name)).await.unwrap();
        let gone = v1::ApplyRequest { removed_agents: vec!["shop/gone".into()], ..v1::ApplyRequest::default() };
        near.store.apply(&gone).await.unwrap();
        let number = near.store.claim_worker(&worker(&name, 1, None)).await.unwrap();
        if compacted {
            let mut client = server.client().await;
            let now = client.get("x", None).await.unwrap().header().unwrap().revision();
            client.compact(now, Some(CompactionOptions::new().with_physical())).await.unwrap();
        }
        cable.is(Way::Open);
        eventually("it is seen", async || knows(&*far.store, &name) && !knows(&*far.store, "gone")).await;
        assert_eq!(far.store.claim_worker(&worker(&name, 1, None)).await, Ok(number));
        assert_eq!(revision(&far), revision(&near));
        near.store.apply(&agent("gone")).await.unwrap();
        eventually("it is seen", async || knows(&*far.store, "gone")).await;
    }
}

#[tokio::test]
async fn a_half_open_connection_is_noticed() {
    let server = Server::start().await;
    let cable = Cable::to(server.address).await;
    let far = Open::ready(&server.args(cable.address)).await;
    let held = far.store.claim_worker(&worker("w", 1, None)).await.unwrap();
    let near = Open::ready(&server.args(server.address)).await;
    for (way, name) in [(Way::Silent, "silent"), (Way::NoAnswers, "no-answers")] {
        cable.is(way);
        // Without anybody asking for anything.
        far.lost().await;
        near.store.apply(&agent(name)).await.unwrap();
        assert_eq!(far.store.claim_worker(&worker("w", 1, None)).await, Ok(held));
        cable.is(Way::Open);
        eventually("the change is seen", async || knows(&*far.store, name)).await;
    }
}

#[tokio::test]
async fn the_age_of_a_store_that_never_answered_counts_from_the_start() {
    let mut server = Server::start().await;
    server.kill();
    let open = Open::new(&server.args(server.address), None);
    let begin = SystemTime::now();
    let mut tick = interval(Duration::from_millis(20));
    let mut before = Duration::ZERO;
    for _ in 0..5 {
        tick.tick().await;
        let age = open.store.age();
        assert!(age > before && age <= begin.elapsed().unwrap() + Duration::from_secs(1));
        before = age;
    }
    assert!(is_unavailable(&open.store.claim_worker(&worker("w", 1, None)).await));
    assert_eq!(open.store.claim_worker(&worker("w", 1, Some(9))).await.unwrap().value(), 9);
    // Nobody else heard of it; when etcd comes, it is told.
    server.restart().await;
    open.reached().await;
    assert_eq!(numbers(&server).await.len(), 1);
    let store = Arc::clone(&open.store);
    assert_eq!(store.claim_worker(&worker("w", 1, None)).await.unwrap().value(), 9);
}
