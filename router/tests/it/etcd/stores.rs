//! What every store does, as one table, for the one in memory and for etcd.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use antiphon_core::id::{Incarnation, WorkerNumber};
use antiphon_proto::v1;
use antiphon_router::{Etcd, EtcdConfig, Memory, Owner, SnapshotDir, Store, StoreArgs, StoreError, WorkerClaim};
use antiphon_runtime::Tasks;
use futures::future::{BoxFuture, join_all};

use super::server::Server;
use crate::world::eventually;

pub(crate) const REGION: &str = "north";

pub(crate) fn owner() -> Owner {
    Owner { fleet: [7; 32], region: REGION.into() }
}

/// A store on etcd, and what it lives in.
pub(crate) struct Open {
    pub(crate) store: Arc<Etcd>,
    pub(crate) tasks: Tasks,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.tasks.stopping().cancel();
    }
}

impl Open {
    pub(crate) fn new(args: &StoreArgs, dir: Option<SnapshotDir>) -> Self {
        let config = EtcdConfig::new(args, REGION).unwrap().unwrap();
        let tasks = Tasks::new();
        Self { store: Etcd::start(config, owner(), dir, args.newcomers_wait, &tasks), tasks }
    }

    /// Connected, and newcomers are numbered.
    pub(crate) async fn ready(args: &StoreArgs) -> Self {
        let open = Self::new(args, None);
        open.settled().await;
        open
    }

    pub(crate) async fn settled(&self) {
        eventually("newcomers are numbered", async || {
            let number = self.store.claim_worker(&worker("settled", 1, None)).await;
            number.is_ok()
        })
        .await;
        let number = self.store.claim_worker(&worker("settled", 1, None)).await.unwrap();
        self.store.release_worker(number, Incarnation::new(1).unwrap()).await;
    }

    pub(crate) async fn reached(&self) {
        eventually("etcd is in reach", async || self.store.age() == Duration::ZERO).await;
    }

    pub(crate) async fn lost(&self) {
        eventually("etcd is out of reach", async || self.store.age() > Duration::ZERO).await;
    }

    /// Ends it as a router ends, with its last snapshot on disk.
    pub(crate) async fn stop(self) {
        self.tasks.wait(std::future::ready(())).await.unwrap();
    }
}

pub(crate) fn worker(name: &str, incarnation: u32, held: Option<u16>) -> WorkerClaim {
    WorkerClaim {
        name: name.into(),
        agent: "shop/desk".into(),
        incarnation: Incarnation::new(incarnation).unwrap(),
        held: held.map(|n| WorkerNumber::new(n).unwrap()),
    }
}

pub(crate) fn agents(names: impl IntoIterator<Item = String>) -> v1::ApplyRequest {
    let agent = |name: String| v1::AgentRecord {
        behaviour: Some(v1::AgentBehaviour {
            agent: format!("shop/{name}"),
            engine: "echo".into(),
            ..v1::AgentBehaviour::default()
        }),
        ..v1::AgentRecord::default()
    };
    v1::ApplyRequest { agents: names.into_iter().map(agent).collect(), ..v1::ApplyRequest::default() }
}

pub(crate) fn agent(name: &str) -> v1::ApplyRequest {
    agents([name.to_owned()])
}

pub(crate) fn knows(store: &dyn Store, agent: &str) -> bool {
    store.watch().borrow().agents.contains_key(&format!("shop/{agent}"))
}

type Behaviour = (&'static str, fn(Arc<dyn Store>) -> BoxFuture<'static, ()>);

const BEHAVIOURS: [Behaviour; 7] = [
    ("a name keeps its number until it gives it back", |store| Box::pin(keeps_its_number(store))),
    ("a number that is held is kept", |store| Box::pin(keeps_what_it_holds(store))),
    ("a region numbers 64 relays and no more", |store| Box::pin(numbers_64_relays(store))),
    ("claims at the same time get different numbers", |store| Box::pin(numbers_are_different(store))),
    ("a change is taken whole or not at all", |store| Box::pin(changes_are_whole(store))),
    ("a change may be larger than a transaction", |store| Box::pin(changes_may_be_large(store))),
    ("changes at the same time are all made", |store| Box::pin(changes_are_all_made(store))),
];

#[tokio::test]
async fn the_store_in_memory_behaves_as_stores_do() {
    for (claim, check) in BEHAVIOURS {
        println!("{claim}");
        check(Arc::new(Memory::default())).await;
    }
}

#[tokio::test]
async fn etcd_behaves_as_stores_do() {
    let server = Server::start().await;
    for (index, (claim, check)) in BEHAVIOURS.into_iter().enumerate() {
        println!("{claim}");
        let args = StoreArgs { etcd_prefix: Some(format!("/test/{index}")), ..server.args(server.address) };
        let open = Open::ready(&args).await;
        check(Arc::clone(&open.store) as Arc<dyn Store>).await;
        // Another router sees the same, now and when it starts.
        let other = Open::ready(&args).await;
        let ours = open.store.watch().borrow().clone();
        eventually("the records agree", async || *other.store.watch().borrow() == ours).await;
    }
}

async fn keeps_its_number(store: Arc<dyn Store>) {
    let first = store.claim_worker(&worker("w-1", 1, None)).await.unwrap();
    assert_eq!(store.claim_worker(&worker("w-1", 1, None)).await, Ok(first));
    assert_eq!(store.claim_worker(&worker("w-1", 2, None)).await, Ok(first));
    // The former incarnation cannot give back what its successor holds.
    store.release_worker(first, Incarnation::new(1).unwrap()).await;
    let other = store.claim_worker(&worker("w-2", 3, Some(first.value()))).await.unwrap();
    assert_ne!(other, first);
    store.release_worker(first, Incarnation::new(2).unwrap()).await;
    assert_eq!(store.claim_worker(&worker("w-3", 4, Some(first.value()))).await, Ok(first));
}

async fn keeps_what_it_holds(store: Arc<dyn Store>) {
    let number = store.claim_worker(&worker("w-9", 7, Some(4711))).await.unwrap();
    assert_eq!(number.value(), 4711);
    assert_eq!(store.claim_relay("r-9", Some(63)).await, Ok(63));
    assert_ne!(store.claim_relay("r-8", Some(63)).await, Ok(63));
}

async fn numbers_64_relays(store: Arc<dyn Store>) {
    let mut seen = BTreeSet::new();
    for i in 0..64 {
        seen.insert(store.claim_relay(&format!("r-{i}"), None).await.unwrap());
    }
    assert_eq!(seen.len(), 64);
    assert_eq!(store.claim_relay("r-64", None).await, Err(StoreError::Exhausted(64)));
    let third = store.claim_relay("r-3", None).await.unwrap();
    store.release_relay("r-3").await;
    assert_eq!(store.claim_relay("r-64", Some(200)).await, Ok(third));
}

async fn numbers_are_different(store: Arc<dyn Store>) {
    let claim = async |i: u32| store.claim_worker(&worker(&format!("w-{i}"), i, None)).await.unwrap();
    let numbers: BTreeSet<_> = join_all((0..200).map(claim)).await.into_iter().collect();
    assert_eq!(numbers.len(), 200);
}

async fn changes_are_whole(store: Arc<dyn Store>) {
    let watch = store.watch();
    store.apply(&agent("a")).await.unwrap();
    let revision = watch.borrow().revision;
    let mut bad = agent("b");
    bad.regions = vec![v1::RegionRecord::default()];
    assert!(matches!(store.apply(&bad).await, Err(StoreError::Invalid(_))));
    assert!(!knows(&*store, "b"));
    assert_eq!(watch.borrow().revision, revision);
    let gone =
        v1::ApplyRequest { removed_agents: vec!["shop/a".into()], key_generation: 1, ..v1::ApplyRequest::default() };
    store.apply(&gone).await.unwrap();
    let records = watch.borrow().clone();
    assert!(records.agents.is_empty() && records.revision > revision && records.key_generation == 1);
    store
        .apply(&v1::ApplyRequest { key_generation: 2, minting_generation: 1, ..v1::ApplyRequest::default() })
        .await
        .unwrap();
    assert_eq!((watch.borrow().key_generation, watch.borrow().minting_generation), (2, 1));
}

async fn changes_may_be_large(store: Arc<dyn Store>) {
    store.apply(&agent("old")).await.unwrap();
    let mut large = agents((0..350).map(|i| format!("a-{i}")));
    large.removed_agents = vec!["shop/old".into()];
    let mut watch = store.watch();
    watch.mark_unchanged();
    store.apply(&large).await.unwrap();
    assert!(watch.has_changed().unwrap());
    assert_eq!(watch.borrow_and_update().agents.len(), 350);
    // And the next one comes after it.
    store.apply(&agent("new")).await.unwrap();
    assert_eq!(watch.borrow_and_update().agents.len(), 351);
}

async fn changes_are_all_made(store: Arc<dyn Store>) {
    let change = async |i: u32| store.apply(&agent(&format!("a-{i}"))).await.unwrap();
    let before = store.watch().borrow().revision;
    join_all((0..20).map(change)).await;
    let records = store.watch().borrow().clone();
    assert_eq!((records.agents.len(), records.revision), (20, before + 20));
}
