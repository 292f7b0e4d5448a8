//! The keys' generations: what relays and workers are given, and how a rotation goes on.
//!
//! [`generation::plan`] decides; this brings it what members and other regions say, keeps what it decides, and writes
//! to the store what the region mints with, so that no restart and no other router of the region goes back.

use std::{sync::Arc, time::Duration};

use antiphon_core::{
    clock::Millis,
    generation::{self, HeldUp, Member, Other, Plan, RegionKeys, Snapshot},
    id::KeyGeneration,
};
use antiphon_proto::{ticket::Signer, v1};
use antiphon_runtime::Tasks;
use tokio::time::{MissedTickBehavior, interval};

use super::{
    Clock, Fleet, State,
    peers::{DIGEST_LEASE, Peer},
    strangers::Stranger,
};

/// The generations in force.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    pub(super) oldest: u32,
    pub(super) newest: u32,
    /// What is new is made with this one.
    pub(super) minting: u32,
    /// What the region says of itself.
    pub(super) said: RegionKeys,
    pub(super) held_up_by: Vec<HeldUp>,
    /// Generation that something may be under way with, and since when nothing new is made with it.
    under_way: Option<(u32, Millis)>,
    /// Made when it is first needed.
    signer: Option<(KeyGeneration, Arc<Signer>)>,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            oldest: 1,
            newest: 1,
            minting: 1,
            said: RegionKeys::default(),
            held_up_by: vec![],
            under_way: None,
            signer: None,
        }
    }
}

impl Keys {
    /// All that are handed out.
    pub(super) fn generations(&self) -> impl Iterator<Item = KeyGeneration> {
        (self.oldest..=self.newest).map(generation)
    }

    /// The one that is minted with.
    pub(super) fn minting(&self) -> KeyGeneration {
        generation(self.minting)
    }
}

/// What a member of the region reported of its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MemberKeys {
    pub(super) loaded: Vec<u32>,
    /// Of what is there; 0: nothing is. `None`: it may use any.
    pub(super) oldest: Option<u32>,
    /// What it uses for what is new; 0: it does not say.
    pub(super) minting: u32,
}

impl MemberKeys {
    /// Of one that registers: it says itself what it has loaded.
    pub(super) const fn unreported(oldest: Option<u32>) -> Self {
        Self { loaded: Vec::new(), oldest, minting: 0 }
    }

    pub(super) fn reported(loaded: &[u32], oldest: u32, minting: u32) -> Self {
        // Nobody holds more at a time; a longer list is nonsense and proves nothing.
        let sane = loaded.len() <= MAX_REPORTED;
        Self { loaded: if sane { loaded.to_vec() } else { Vec::new() }, oldest: Some(oldest), minting }
    }

    /// The oldest that it uses or may yet use.
    fn in_use(&self) -> Option<u32> {
        match (self.oldest, self.minting) {
            (oldest, 0) => oldest,
            (Some(0) | None, minting) => self.oldest.map(|_| minting),
            (Some(oldest), minting) => Some(oldest.min(minting)),
        }
    }
}

impl Fleet {
    /// Plans anew. What the store has yet to hear is returned: the generation that the region may mint with.
    pub(crate) fn replan_keys(&self) -> Option<u32> {
        let mut state = self.state.lock();
        let (plan, minting) = self.plan_keys(&mut state)?;
        let changed = (plan.oldest, plan.newest, minting) != (state.keys.oldest, state.keys.newest, state.keys.minting);
        let news = changed || state.keys.said != plan.keys;
        if changed {
            tracing::info!(oldest = plan.oldest, newest = plan.newest, minting, "key generations");
        }
        let written = state.records.minting_generation;
        let keys = &mut state.keys;
        (keys.oldest, keys.newest, keys.minting) = (plan.oldest, plan.newest, minting);
        (keys.said, keys.held_up_by) = (plan.keys, plan.held_up_by);
        drop(state);
        if news {
            self.topology.send_modify(|n| *n += 1);
        }
        (plan.minting != written).then_some(plan.minting)
    }

    /// The plan, and what the region mints with now; `None` before the region has its record.
    fn plan_keys(&self, state: &mut State) -> Option<(Plan, u32)> {
        self.own_number(state)?;
        let now = self.clock.now();
        let wanted = state.records.key_generation.max(1);
        let minting = match state.records.minting_generation {
            0 => generation::presumed_minting(wanted),
            minting => minting.min(wanted),
        };
        let before = state.keys.minting;
        let planned_before = state.keys.said.wanted > 0;
        if planned_before && minting > before {
            // Tickets are out that were signed with the former key, and not every worker has heard of the new one.
            state.keys.under_way = Some((before, now));
        }
        // Who says what it mints with is waited for by that.
        let said = state.workers.values().all(|w| w.keys.minting > 0);
        let longest = if said { TICKET_LIFE } else { UNDER_WAY };
        state.keys.under_way = state.keys.under_way.filter(|(_, since)| now.since(*since) < longest);
        let strangers = self.strangers(state);
        let snapshot = self.keys_snapshot(state, &strangers, wanted, minting, now);
        Some((generation::plan(&snapshot), minting))
    }

    /// Who holds a number and is not registered here is a member as well: of it nothing is known.
    fn keys_snapshot<'a>(
        &self,
        state: &'a State,
        strangers: &'a [Stranger],
        wanted: u32,
        minting: u32,
        now: Millis,
    ) -> Snapshot<'a> {
        let workers = state.workers.values().map(|w| (w.hello.name.as_str(), &w.keys));
        let relays = state.relays.values().map(|r| (r.hello.name.as_str(), &r.keys));
        let member = |(name, keys): (&'a str, &'a MemberKeys)| Member {
            name,
            loaded: &keys.loaded,
            oldest: keys.in_use(),
            registered: true,
        };
        let strangers = strangers.iter().map(|stranger| Member::unregistered(&stranger.name));
        let others = state.records.regions.values().filter(|r| r.name != self.region);
        let others = others.map(|record| {
            let peer = state.peers.get(&record.name);
            Other {
                name: &record.name,
                keys: peer.map(|p| p.keys(now)).unwrap_or_default(),
                heard: peer.and_then(Peer::speaking).is_some_and(|at| now.since(at) <= DIGEST_LEASE),
            }
        });
        // They share a store and so agree, unless one has lost it: that one goes on signing with what it knows, and
        // nothing of it is unloaded while it speaks. Who is silent signs for nobody.
        let speaking = state.siblings_keys.values().filter(|s| now.since(s.heard) <= DIGEST_LEASE);
        let siblings = speaking.map(|s| Other { name: &s.name, keys: s.keys.clone(), heard: true });
        Snapshot {
            wanted,
            minting,
            under_way: state.keys.under_way.map_or(minting, |(generation, _)| generation),
            settled: now.since(Clock::STARTED) >= SETTLING,
            members: workers.chain(relays).map(member).chain(strangers).collect(),
            others: others.chain(siblings).collect(),
        }
    }

    /// Why the region cannot be told yet to move to a generation; empty: it can.
    pub(crate) fn too_early_for(&self, asked: u32) -> Vec<String> {
        let state = self.state.lock();
        let wanted = state.records.key_generation.max(1);
        if asked <= wanted || self.own_number(&state).is_none() {
            return Vec::new();
        }
        let strangers = self.strangers(&state);
        let snapshot = self.keys_snapshot(&state, &strangers, wanted, state.keys.minting, self.clock.now());
        generation::too_early(&snapshot, asked).iter().map(HeldUp::to_string).collect()
    }

    /// What signs tickets now.
    pub(crate) fn ticket_signer(&self) -> Arc<Signer> {
        let keys = &mut self.state.lock().keys;
        let minting = keys.minting();
        match &keys.signer {
            Some((generation, signer)) if *generation == minting => Arc::clone(signer),
            _ => {
                let signer = Arc::new(Signer::new(&self.root.ticket_seed(minting)));
                keys.signer = Some((minting, Arc::clone(&signer)));
                signer
            }
        }
    }
}

/// What another router of the region said of its keys.
#[derive(Debug)]
pub(super) struct SiblingKeys {
    /// For people.
    name: String,
    keys: RegionKeys,
    heard: Millis,
}

impl State {
    /// Another router of the region speaks; without a digest it says what it said before.
    pub(super) fn sibling_said(&mut self, address: &str, digest: Option<&v1::RegionDigest>, now: Millis) {
        self.siblings_keys.retain(|_, sibling| now.since(sibling.heard) <= DIGEST_LEASE);
        if let Some(digest) = digest {
            let sibling = self.siblings_keys.entry(address.to_owned()).or_insert_with(|| SiblingKeys {
                name: format!("router {address}"),
                keys: RegionKeys::default(),
                heard: now,
            });
            sibling.keys.heard(said(digest));
        }
        if let Some(sibling) = self.siblings_keys.get_mut(address) {
            sibling.heard = now;
        }
    }
}

/// What a region said of its keys.
pub(super) fn said(digest: &v1::RegionDigest) -> RegionKeys {
    let sane = digest.loaded_generations.len() <= MAX_REPORTED;
    RegionKeys {
        wanted: digest.wanted_generation,
        minting: digest.minting_generation,
        loaded: if sane { digest.loaded_generations.clone() } else { Vec::new() },
        oldest: digest.oldest_generation,
    }
}

/// Keeps the keys planned: at least every [`TICK`], as silence and time count too.
pub(crate) async fn follow(fleet: Arc<Fleet>, tasks: Tasks) -> anyhow::Result<()> {
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stopping = tasks.stopping();
    let mut failing = false;
    while stopping.run_until_cancelled(tick.tick()).await.is_some() {
        let Some(minting) = fleet.replan_keys() else {
            continue;
        };
        let begun = v1::ApplyRequest { minting_generation: minting, ..v1::ApplyRequest::default() };
        match fleet.store.apply(&begun).await {
            Ok(()) => failing = false,
            // Until the store has it, the region goes on as before.
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, minting, "cannot write down which key generation to mint with");
                }
            }
        }
    }
    Ok(())
}

fn generation(value: u32) -> KeyGeneration {
    KeyGeneration::new(value).expect("every u32 is a generation")
}

const TICK: Duration = Duration::from_millis(500);
/// Longer than relays and workers wait between two tries to register.
pub(super) const SETTLING: Duration = Duration::from_secs(10);
/// Tickets that were signed with the former key are good for so long.
pub(super) const TICKET_LIFE: Duration = Duration::from_secs(30);
/// A ticket's life, and as long again as a directive may take to a worker that does not say that it has it.
pub(super) const UNDER_WAY: Duration = Duration::from_secs(40);
/// Generations that anybody may say to have loaded.
const MAX_REPORTED: usize = 16;

#[cfg(test)]
mod tests {
    use antiphon_core::{
        id::{Incarnation, ServerId, ShardNumber, WorkerNumber},
        keys::FleetRoot,
    };
    use antiphon_runtime::pki::{FleetCa, PeerName, Role};
    use tokio::time::advance;

    use super::*;
    use crate::{
        Memory, WorkerClaim,
        fleet::{Standing, WorkerHello},
    };

    /// A region's router and one worker of it.
    struct Region {
        name: &'static str,
        fleet: Arc<Fleet>,
        worker: Standing<WorkerNumber>,
        /// Of the worker's live sessions; 0: none.
        oldest: u32,
        /// What the worker says it mints with; 0: nothing.
        says: u32,
    }

    impl Region {
        async fn new(name: &'static str) -> Self {
            let root = FleetRoot::from_bytes([7; 32]);
            let peer = PeerName::new("router-1", Role::Router, name).unwrap();
            let ca = FleetCa::from_seed(&root.ca_seed()).unwrap();
            let identity = ca.issue(&peer, &[], std::time::SystemTime::now()).unwrap();
            let fleet = Fleet::new(identity, root, Arc::new(Memory::default()));
            let region = |(name, number): (&str, u32)| v1::RegionRecord {
                name: name.into(),
                number,
                router_address: "127.0.0.1:1".into(),
                ..v1::RegionRecord::default()
            };
            let behaviour = v1::AgentBehaviour { agent: "a/b".into(), engine: "echo".into(), ..Default::default() };
            let change = v1::ApplyRequest {
                regions: [("here", 1), ("there", 2)].map(region).to_vec(),
                agents: vec![v1::AgentRecord { behaviour: Some(behaviour), ..Default::default() }],
                ..Default::default()
            };
            let this = Self {
                name,
                fleet,
                worker: Standing { number: WorkerNumber::new(0).unwrap(), stream: 0 },
                oldest: 1,
                says: 0,
            };
            this.apply(change).await;
            let hello = WorkerHello {
                name: "w-1".into(),
                server_name: "w-1.worker".into(),
                agent: "a/b".into(),
                gpu_class: String::new(),
                slots: 1,
                incarnation: Incarnation::new(1).unwrap(),
                held: None,
                shards: vec![(ShardNumber::new(0).unwrap(), "127.0.0.1:2".into())],
                control_address: "127.0.0.1:3".into(),
            };
            let worker = this.fleet.register_worker(hello).await.unwrap();
            Self { worker, ..this }
        }

        async fn apply(&self, change: v1::ApplyRequest) {
            self.fleet.store.apply(&change).await.unwrap();
            let records = Arc::clone(&self.fleet.store.watch().borrow());
            self.fleet.records_changed(records);
        }

        async fn wants(&self, key_generation: u32) {
            self.apply(v1::ApplyRequest { key_generation, ..Default::default() }).await;
        }

        /// The generations that the worker is given, and the one that it mints with.
        fn given(&self) -> (Vec<u32>, u32) {
            let keys = self.fleet.worker_keys(self.worker.number).unwrap();
            let minting = keys.cid_configs.iter().filter(|c| c.minting).map(|c| c.generation);
            assert_eq!(keys.ticket_keys.len(), keys.cid_configs.len());
            assert_eq!(keys.reset_keys.len(), keys.cid_configs.len());
            (keys.cid_configs.iter().map(|c| c.generation).collect(), minting.sum())
        }

        /// The worker loads what it is given and says so.
        fn report(&self) {
            let report = v1::WorkerReport {
                slots: 1,
                loaded_generations: self.given().0,
                oldest_generation: self.oldest,
                minting_generation: self.says,
                ..Default::default()
            };
            assert!(self.fleet.worker_reported(self.worker, &report));
        }

        async fn plan(&self) {
            if let Some(minting_generation) = self.fleet.replan_keys() {
                self.apply(v1::ApplyRequest { minting_generation, ..Default::default() }).await;
            }
            let _ = self.fleet.replan_keys();
        }

        fn tell(&self, other: &Self) {
            let update = v1::RegionUpdate { digest: self.fleet.digest(), routes: None };
            other.fleet.peer_reported(self.name, "127.0.0.1:1", update, 0);
        }

        fn held_up_by(&self) -> Vec<String> {
            self.fleet.status().rotation_held_up_by
        }
    }

    async fn round(regions: &[Region; 2]) {
        for region in regions {
            region.plan().await;
            region.report();
            region.plan().await;
        }
        let [here, there] = regions;
        here.tell(there);
        there.tell(here);
    }

    #[tokio::test(start_paused = true)]
    async fn two_regions_move_on_together_and_unload_when_nothing_old_is_left() {
        let mut regions = [Region::new("here").await, Region::new("there").await];
        advance(SETTLING).await;
        round(&regions).await;
        assert_eq!(regions[0].given(), (vec![1], 1));
        regions[0].wants(2).await;
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions[0].given(), (vec![1, 2], 1), "there has not been told");
        assert_eq!(regions[0].held_up_by(), ["there: was told to move to generation 1 only"]);
        regions[1].wants(2).await;
        round(&regions).await;
        round(&regions).await;
        for region in &regions {
            assert_eq!(region.given(), (vec![1, 2], 2));
            assert_eq!(region.fleet.state.lock().keys.minting(), generation(2));
        }
        // A long call here still uses the first one; there nothing does, and tickets have expired.
        regions[1].oldest = 0;
        advance(UNDER_WAY).await;
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions.each_ref().map(|r| r.given().0), [vec![1, 2], vec![1, 2]]);
        assert_eq!(regions[1].held_up_by(), ["here: still uses generation 1"]);
        regions[0].oldest = 2;
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions.each_ref().map(|r| r.given()), [(vec![2], 2), (vec![2], 2)]);
        assert!(regions[0].held_up_by().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_says_what_it_mints_with_is_waited_for_by_its_word_and_not_by_the_clock() {
        let mut regions = [Region::new("here").await, Region::new("there").await];
        advance(SETTLING).await;
        for region in &mut regions {
            (region.oldest, region.says) = (0, 1);
            region.wants(2).await;
        }
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions.each_ref().map(Region::given), [(vec![1, 2], 2), (vec![1, 2], 2)]);
        // Told long ago, and not heard by one of them.
        regions[0].says = 2;
        advance(2 * UNDER_WAY).await;
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions.each_ref().map(Region::given), [(vec![1, 2], 2), (vec![1, 2], 2)]);
        assert_eq!(regions[1].held_up_by(), ["w-1: still uses generation 1"]);
        assert_eq!(regions[0].held_up_by(), ["there: still uses generation 1"]);
        regions[1].says = 2;
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions.each_ref().map(Region::given), [(vec![2], 2), (vec![2], 2)]);
    }

    #[tokio::test(start_paused = true)]
    async fn tickets_of_the_former_key_are_waited_for_as_long_as_they_live() {
        let mut regions = [Region::new("here").await, Region::new("there").await];
        advance(SETTLING).await;
        for region in &mut regions {
            (region.oldest, region.says) = (0, 2);
            region.wants(2).await;
        }
        round(&regions).await;
        round(&regions).await;
        advance(TICKET_LIFE - Duration::from_millis(1)).await;
        round(&regions).await;
        assert_eq!(regions.each_ref().map(Region::given), [(vec![1, 2], 2), (vec![1, 2], 2)]);
        advance(Duration::from_millis(1)).await;
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions.each_ref().map(Region::given), [(vec![2], 2), (vec![2], 2)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_router_that_has_lost_the_store_holds_its_region_up_for_as_long_as_it_signs() {
        let regions = [Region::new("here").await, Region::new("there").await];
        advance(SETTLING).await;
        let behind = |wanted_generation| {
            let digest = v1::RegionDigest {
                wanted_generation,
                minting_generation: 1,
                loaded_generations: (1..=wanted_generation).collect(),
                oldest_generation: 1,
                ..Default::default()
            };
            let update = v1::RegionUpdate { digest: Some(digest), routes: None };
            regions[0].fleet.peer_reported("here", "127.0.0.1:9", update, 0);
        };
        behind(1);
        for region in &regions {
            region.wants(2).await;
        }
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions[0].given(), (vec![1, 2], 1));
        assert_eq!(regions[0].held_up_by(), ["router 127.0.0.1:9: was told to move to generation 1 only"]);
        // It is back with the store, but has yet to sign with the new one.
        behind(2);
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions[0].given(), (vec![1, 2], 2));
        assert!(regions[0].held_up_by().contains(&"router 127.0.0.1:9: still mints with generation 1".to_owned()));
        // Gone for good: whoever is silent signs nothing.
        advance(2 * DIGEST_LEASE).await;
        round(&regions).await;
        assert!(!regions[0].held_up_by().iter().any(|held| held.contains("router")), "{:?}", regions[0].held_up_by());
    }

    #[tokio::test(start_paused = true)]
    async fn who_holds_a_number_and_never_registered_here_is_waited_for_until_it_does_or_is_gone() {
        let regions = [Region::new("here").await, Region::new("there").await];
        let here = &regions[0].fleet;
        let incarnation = Incarnation::new(7).unwrap();
        let claim = WorkerClaim { name: "w-2".into(), agent: "a/b".into(), incarnation, held: None };
        let number = here.store.claim_worker(&claim).await.unwrap();
        here.store.claim_relay("r-1", None).await.unwrap();
        advance(SETTLING).await;
        for region in &regions {
            region.wants(2).await;
        }
        for _ in 0..3 {
            round(&regions).await;
        }
        assert_eq!(regions.each_ref().map(Region::given), [(vec![1, 2], 1), (vec![1, 2], 1)]);
        let why = "holds a number and has not registered with this router";
        assert_eq!(regions[0].held_up_by(), [format!("w-2: {why}"), format!("r-1: {why}")]);
        assert_eq!(regions[1].held_up_by(), ["here: has not loaded generation 2"]);
        assert!(!here.too_early_for(4).is_empty());
        // Whoever looks for it finds it in the status.
        let status = here.status().regions.into_iter().find(|region| region.local).unwrap();
        let missed: Vec<_> = status.workers.iter().filter(|w| !w.connected).map(|w| (&*w.name, &*w.agent)).collect();
        assert_eq!(missed, [("w-2", "a/b")]);
        assert_eq!(status.relays.iter().map(|r| (&*r.name, r.connected)).collect::<Vec<_>>(), [("r-1", false)]);
        // Another life of it is not meant, nor is a namesake of another kind.
        assert!(!here.worker_reported_gone("w-2", 8).await && !here.worker_reported_gone("r-1", 0).await);
        assert!(here.worker_reported_gone("w-2", 7).await && here.relay_reported_gone("r-1").await);
        assert!(!here.worker_reported_gone("w-2", 7).await && !here.relay_reported_gone("r-1").await);
        // Other routers of the region, which may know it, hear of it.
        let (dead, _) = here.dead_since(0, true);
        let dead: Vec<_> = dead.iter().map(|server| ServerId::from_u64(server.server_id)).collect();
        assert_eq!(dead.iter().map(|id| (id.worker, id.incarnation)).collect::<Vec<_>>(), [(number, incarnation)]);
        assert_eq!(here.digest().unwrap().gone_relays.len(), 1);
        for _ in 0..3 {
            round(&regions).await;
        }
        assert_eq!(regions.each_ref().map(|r| r.given().1), [2, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_and_a_fresh_start_hold_a_rotation_up() {
        let regions = [Region::new("here").await, Region::new("there").await];
        for region in &regions {
            region.wants(2).await;
        }
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions[0].given(), (vec![1, 2], 1));
        assert!(regions[0].held_up_by()[0].contains("may not have registered yet"));
        advance(SETTLING).await;
        round(&regions).await;
        advance(2 * DIGEST_LEASE).await;
        regions[0].plan().await;
        assert_eq!(regions[0].given(), (vec![1, 2], 1));
        assert_eq!(regions[0].held_up_by(), ["there: is not heard"]);
        assert!(regions[0].fleet.too_early_for(3).is_empty());
        assert_eq!(regions[0].fleet.too_early_for(4).len(), 3);
        round(&regions).await;
        round(&regions).await;
        assert_eq!(regions[0].given(), (vec![1, 2], 2));
    }
}
