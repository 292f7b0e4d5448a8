//! What a router keeps of its fleet across a restart (invariant I8): the workers, relays and deaths of its region, and
//! what other regions said, each with the time when it was last true.
//!
//! It is what was said, not what is: nobody is placed with, and no rotation goes on, because of it. It leaves as
//! everything does, by evidence. No key is in it; they are derived again.

use std::{sync::Arc, time::Duration};

use antiphon_core::{
    clock::Millis,
    id::{KeyGeneration, RelayNumber, ServerId, ShardNumber, WorkerNumber},
};
use antiphon_proto::v1;
use antiphon_runtime::{
    Tasks,
    pki::{PeerName, Role},
    tls,
};
use bytes::Bytes;
use prost::Message as _;
use tokio::{sync::watch, time::sleep};

use super::{
    Clock, Fleet, State, clock::unix_ms, dead::Death, keys::MemberKeys, measured, peers::Peer, relays::Relay,
    relays::relay_number, workers::Report, workers::Worker,
};
use crate::{field::FieldError, records};

/// All of it. Times are milliseconds since the Unix epoch.
#[derive(Clone, PartialEq, prost::Message)]
struct Known {
    #[prost(uint32, tag = "1")]
    format: u32,
    #[prost(message, repeated, tag = "2")]
    workers: Vec<KnownWorker>,
    #[prost(message, repeated, tag = "3")]
    relays: Vec<KnownRelay>,
    #[prost(message, repeated, tag = "4")]
    gone_relays: Vec<GoneRelay>,
    #[prost(message, repeated, tag = "5")]
    dead: Vec<KnownDead>,
    #[prost(message, repeated, tag = "6")]
    peers: Vec<KnownPeer>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KnownWorker {
    #[prost(message, optional, tag = "1")]
    hello: Option<v1::WorkerHello>,
    #[prost(uint32, tag = "2")]
    number: u32,
    /// Its last report, if there was one; `unix_ms` is when it came.
    #[prost(message, optional, tag = "3")]
    report: Option<v1::WorkerReport>,
    #[prost(message, optional, tag = "4")]
    keys: Option<KnownKeys>,
    /// The name in its certificate; empty, as earlier releases wrote it: its own.
    #[prost(string, tag = "5")]
    server_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KnownKeys {
    #[prost(uint32, repeated, tag = "1")]
    loaded: Vec<u32>,
    #[prost(uint32, optional, tag = "2")]
    oldest: Option<u32>,
    #[prost(uint32, tag = "3")]
    minting: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KnownRelay {
    #[prost(message, optional, tag = "1")]
    hello: Option<v1::RelayHello>,
    #[prost(uint32, tag = "2")]
    number: u32,
    /// `unix_ms` is when it was last heard.
    #[prost(message, optional, tag = "3")]
    report: Option<v1::RelayReport>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GoneRelay {
    #[prost(uint32, tag = "1")]
    number: u32,
    #[prost(uint64, tag = "2")]
    at: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KnownDead {
    #[prost(fixed64, tag = "1")]
    server_id: u64,
    #[prost(uint64, tag = "2")]
    at: u64,
    #[prost(bool, tag = "3")]
    own: bool,
    /// Of its reset keys.
    #[prost(uint32, repeated, tag = "4")]
    generations: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KnownPeer {
    #[prost(string, tag = "1")]
    region: String,
    #[prost(message, repeated, tag = "2")]
    routers: Vec<KnownRouter>,
    #[prost(message, repeated, tag = "3")]
    relays: Vec<NamedRelay>,
}

/// A router of another region.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct KnownRouter {
    #[prost(string, tag = "1")]
    pub(super) address: String,
    #[prost(message, optional, tag = "2")]
    pub(super) digest: Option<v1::RegionDigest>,
    #[prost(uint64, optional, tag = "3")]
    pub(super) heard: Option<u64>,
    #[prost(sint64, tag = "4")]
    pub(super) clock_ahead_ms: i64,
    /// What it said of its keys, all words together.
    #[prost(uint32, tag = "5")]
    pub(super) wanted: u32,
    #[prost(uint32, tag = "6")]
    pub(super) minting: u32,
    #[prost(uint32, tag = "7")]
    pub(super) oldest: u32,
    #[prost(uint32, repeated, tag = "8")]
    pub(super) loaded: Vec<u32>,
    #[prost(message, repeated, tag = "9")]
    pub(super) routes: Vec<v1::Route>,
}

/// A relay of another region, and when it was last named.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct NamedRelay {
    #[prost(message, optional, tag = "1")]
    pub(super) relay: Option<v1::RelayInfo>,
    #[prost(uint64, tag = "2")]
    pub(super) named: u64,
}

/// Why what was kept is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecallError {
    #[error("it is damaged: {0}")]
    Damaged(#[from] prost::DecodeError),
    #[error("it has format {0}, this router knows {FORMAT}")]
    Format(u32),
    #[error("a worker or relay has no name")]
    Nameless,
    #[error("nobody can have number {0}")]
    Number(u32),
    #[error("a route leads to {0:?}")]
    Route(String),
    #[error(transparent)]
    Name(#[from] antiphon_runtime::pki::PkiError),
    #[error(transparent)]
    Hello(#[from] FieldError),
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

/// Turns the process's times into those of the world and back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    now: Millis,
    unix_ms: u64,
}

impl Times {
    fn read(clock: Clock) -> Self {
        Self { now: clock.now(), unix_ms: unix_ms() }
    }

    pub(super) fn unix_of(self, at: Millis) -> u64 {
        let age = u64::try_from(self.now.since(at).as_millis()).unwrap_or(u64::MAX);
        self.unix_ms.saturating_sub(age)
    }

    /// What is said to be in the future happened now: the clock was set back.
    pub(super) fn at(self, unix_ms: u64) -> Millis {
        Millis(self.now.0.saturating_sub(self.unix_ms.saturating_sub(unix_ms)))
    }
}

impl Fleet {
    /// Takes up what was kept. What cannot be read is named and left out.
    pub(super) fn recall(&self) {
        let kept = self.store.remembered();
        if kept.is_empty() {
            return;
        }
        let state = &mut *self.state.lock();
        let recalled = read(&kept).and_then(|known| self.take_up(&known));
        match recalled {
            Ok(State { workers, relays, gone_relays, dead, peers, .. }) => {
                tracing::info!(
                    workers = workers.len(),
                    relays = relays.len(),
                    regions = peers.len(),
                    "going on from what was known"
                );
                (state.workers, state.relays, state.gone_relays) = (workers, relays, gone_relays);
                (state.dead, state.peers) = (dead, peers);
            }
            Err(error) => tracing::warn!("what was known of routes, relays and regions is not used: {error}"),
        }
        self.keep_peers(state);
        self.routes_changed(state);
    }

    fn take_up(&self, known: &Known) -> Result<State, RecallError> {
        let times = Times::read(self.clock);
        let mut state = State::default();
        for worker in &known.workers {
            let worker = self.worker(worker, times)?;
            state.workers.insert(worker.number, worker);
        }
        for relay in &known.relays {
            let number = number(relay.number)?;
            state.relays.insert(number, self.relay(relay, times)?);
        }
        for gone in &known.gone_relays {
            let number = number(gone.number)?;
            state.gone_relays.insert(number, times.at(gone.at));
        }
        for dead in &known.dead {
            let id = ServerId::from_u64(dead.server_id);
            let generations = dead.generations.iter().filter_map(|g| KeyGeneration::new(*g).ok());
            let reset_keys = generations.map(|generation| v1::ResetKey {
                shard: id.shard.value().into(),
                generation: generation.value(),
                key: self.root.reset_key(id, generation).to_vec().into(),
            });
            let server = v1::DeadServer { server_id: dead.server_id, reset_keys: reset_keys.collect() };
            state.dead.insert(server, dead.own, times.at(dead.at));
        }
        for peer in &known.peers {
            let recalled = Peer::recalled(&peer.routers, &peer.relays, times);
            state.peers.insert(peer.region.clone(), recalled?);
        }
        Ok(state)
    }

    fn worker(&self, known: &KnownWorker, times: Times) -> Result<Worker, RecallError> {
        let hello = known.hello.as_ref().ok_or(RecallError::Nameless)?;
        let certified = match known.server_name.as_str() {
            "" => PeerName::new(&hello.name, Role::Worker, &self.region)?,
            name => name.parse()?,
        };
        let hello = super::WorkerHello::check(hello, &certified)?;
        let report = known.report.as_ref().map(|report| Report {
            at: times.at(report.unix_ms),
            phase: records::phase(report.phase),
            slots: report.slots,
            reserved: report.reserved,
            active: report.active,
            clock_ahead_ms: 0,
            measured: measured::taken(&report.measured, measured::MOST_OF_WORKER),
            revisions: report.revisions.clone(),
            ordered_unix_ms: report.ordered_unix_ms,
        });
        let number = u16::try_from(known.number).ok().and_then(|n| WorkerNumber::new(n).ok());
        let KnownKeys { loaded, oldest, minting } = known.keys.clone().unwrap_or_default();
        Ok(Worker {
            channel: tls::channel(&hello.control_address, &self.identity, Role::Worker, &self.region)?,
            hello,
            number: number.ok_or(RecallError::Number(known.number))?,
            stream: None,
            order: watch::Sender::new(None),
            taken: report.as_ref().map_or(0, |r| r.reserved.saturating_add(r.active)),
            report,
            claims: 0,
            keys: MemberKeys { loaded, oldest, minting },
        })
    }

    fn relay(&self, known: &KnownRelay, times: Times) -> Result<Relay, RecallError> {
        let hello = known.hello.as_ref().ok_or(RecallError::Nameless)?;
        let report = known.report.clone().unwrap_or_default();
        Ok(Relay {
            hello: super::RelayHello::check(hello, &PeerName::new(&hello.name, Role::Relay, &self.region)?)?,
            stream: None,
            // Its patience begins now: it was this router that was away.
            lost: Clock::STARTED,
            phase: records::phase(report.phase),
            heard: times.at(report.unix_ms),
            keys: MemberKeys::reported(&report.loaded_generations, 0, 0),
            clock_ahead_ms: 0,
            routes: report.routes,
        })
    }

    /// What to keep.
    pub(super) fn known(&self) -> Bytes {
        let times = Times::read(self.clock);
        let state = self.state.lock();
        let gone =
            |(number, at): (&RelayNumber, &Millis)| GoneRelay { number: number.value().into(), at: times.unix_of(*at) };
        let dead = |(server, at, own): Death<'_>| KnownDead {
            server_id: server.server_id,
            at: times.unix_of(at),
            own,
            generations: server.reset_keys.iter().map(|k| k.generation).collect(),
        };
        let known = Known {
            format: FORMAT,
            workers: state.workers.values().map(|w| self.known_worker(w, times)).collect(),
            relays: state.relays.iter().map(|(n, r)| self.known_relay(n.value(), r, times)).collect(),
            gone_relays: state.gone_relays.iter().map(gone).collect(),
            dead: state.dead.all().map(dead).collect(),
            peers: state
                .peers
                .iter()
                .map(|(region, peer)| {
                    let (routers, relays) = peer.known(times);
                    KnownPeer { region: region.clone(), routers, relays }
                })
                .collect(),
        };
        drop(state);
        known.encode_to_vec().into()
    }

    fn known_worker(&self, worker: &Worker, times: Times) -> KnownWorker {
        let shard = |(shard, address): &(ShardNumber, String)| v1::Shard {
            number: shard.value().into(),
            tunnel_address: address.clone(),
        };
        KnownWorker {
            hello: Some(v1::WorkerHello {
                name: worker.hello.name.clone(),
                region: self.region.clone(),
                agent: worker.hello.agent.clone(),
                gpu_class: worker.hello.gpu_class.clone(),
                slots: worker.hello.slots,
                incarnation: worker.hello.incarnation.value(),
                worker_number: None,
                shards: worker.hello.shards.iter().map(shard).collect(),
                control_address: worker.hello.control_address.clone(),
            }),
            number: worker.number.value().into(),
            server_name: worker.hello.server_name.clone(),
            report: worker.report.as_ref().map(|report| v1::WorkerReport {
                phase: records::proto_phase(report.phase).into(),
                slots: report.slots,
                reserved: report.reserved,
                active: report.active,
                unix_ms: times.unix_of(report.at),
                revisions: report.revisions.clone(),
                ordered_unix_ms: report.ordered_unix_ms,
                measured: report.measured.clone(),
                ..v1::WorkerReport::default()
            }),
            keys: Some(KnownKeys {
                loaded: worker.keys.loaded.clone(),
                oldest: worker.keys.oldest,
                minting: worker.keys.minting,
            }),
        }
    }

    fn known_relay(&self, number: u16, relay: &Relay, times: Times) -> KnownRelay {
        KnownRelay {
            hello: Some(v1::RelayHello {
                name: relay.hello.name.clone(),
                region: self.region.clone(),
                public_address: relay.hello.public_address.clone(),
                more_public_addresses: relay.hello.more_public_addresses.clone(),
                tunnel_address: relay.hello.tunnel_address.clone(),
                relay_number: None,
            }),
            number: number.into(),
            report: Some(v1::RelayReport {
                phase: records::proto_phase(relay.phase).into(),
                unix_ms: times.unix_of(relay.heard),
                routes: relay.routes,
                loaded_generations: relay.keys.loaded.clone(),
                ..v1::RelayReport::default()
            }),
        }
    }
}

fn number(number: u32) -> Result<RelayNumber, RecallError> {
    relay_number(number).ok_or(RecallError::Number(number))
}

fn read(kept: &Bytes) -> Result<Known, RecallError> {
    let known = Known::decode(kept.clone())?;
    if known.format != FORMAT {
        return Err(RecallError::Format(known.format));
    }
    Ok(known)
}

/// Has what is known kept: at once when routes, relays or keys change, at most once an [`INTERVAL`]; times and figures
/// that change all the time every [`REFRESH`].
pub(crate) async fn follow(fleet: Arc<Fleet>, tasks: Tasks) -> anyhow::Result<()> {
    let mut topology = fleet.topology.subscribe();
    let stopping = tasks.stopping();
    loop {
        tokio::select! {
            changed = topology.changed() => changed?,
            () = sleep(REFRESH) => {}
            () = stopping.cancelled() => return Ok(()),
        }
        fleet.store.remember(fleet.known());
        if stopping.run_until_cancelled(sleep(INTERVAL)).await.is_none() {
            return Ok(());
        }
    }
}

/// The only format so far.
const FORMAT: u32 = 1;
const INTERVAL: Duration = Duration::from_secs(1);
const REFRESH: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use antiphon_core::{
        id::{Incarnation, RegionNumber},
        keys::FleetRoot,
    };
    use antiphon_runtime::pki::FleetCa;
    use tokio::time::advance;

    use super::*;
    use crate::{
        Memory, Store,
        fleet::{RelayHello, Standing, WorkerHello},
    };

    /// A router of region 1, "here", that goes on from what was kept; region 2 is "there".
    async fn start(kept: Bytes) -> Arc<Fleet> {
        let root = FleetRoot::from_bytes([7; 32]);
        let peer = PeerName::new("router-1", Role::Router, "here").unwrap();
        let ca = FleetCa::from_seed(&root.ca_seed()).unwrap();
        let identity = ca.issue(&peer, &[], std::time::SystemTime::now()).unwrap();
        let store = Memory::default();
        let region = |(name, number): (&str, u32)| v1::RegionRecord {
            name: name.into(),
            number,
            router_address: ADDRESS.into(),
            ..v1::RegionRecord::default()
        };
        let behaviour = v1::AgentBehaviour { agent: "a/b".into(), engine: "echo".into(), ..Default::default() };
        let change = v1::ApplyRequest {
            regions: [("here", 1), ("there", 2)].map(region).to_vec(),
            agents: vec![v1::AgentRecord { behaviour: Some(behaviour), ..Default::default() }],
            ..Default::default()
        };
        store.apply(&change).await.unwrap();
        store.remember(kept);
        Fleet::new(identity, root, Arc::new(store))
    }

    fn worker(incarnation: u32) -> WorkerHello {
        WorkerHello {
            name: "w-1".into(),
            server_name: "w-1.worker.here.antiphon.internal".into(),
            agent: "a/b".into(),
            gpu_class: "l4".into(),
            slots: 10,
            incarnation: Incarnation::new(incarnation).unwrap(),
            held: None,
            shards: vec![(ShardNumber::new(3).unwrap(), "127.0.0.1:2".into())],
            control_address: "127.0.0.1:3".into(),
        }
    }

    async fn relay(fleet: &Fleet) -> Standing<RelayNumber> {
        let hello = RelayHello {
            name: "r-1".into(),
            public_address: "127.0.0.1:4".into(),
            more_public_addresses: vec!["[::1]:4".into()],
            tunnel_address: "127.0.0.1:5".into(),
            held: Some(0),
        };
        fleet.register_relay(hello).await.unwrap()
    }

    /// One that knows of everything.
    async fn experienced() -> Arc<Fleet> {
        let fleet = start(Bytes::new()).await;
        fleet.register_worker(worker(1)).await.unwrap();
        let standing = fleet.register_worker(worker(2)).await;
        // The first life is over once its stream is.
        assert!(standing.is_err());
        assert!(fleet.worker_gone("w-1", 1).await);
        let standing = fleet.register_worker(worker(2)).await.unwrap();
        let report = v1::WorkerReport {
            slots: 9,
            reserved: 1,
            active: 2,
            loaded_generations: vec![1],
            oldest_generation: 1,
            minting_generation: 1,
            ..Default::default()
        };
        assert!(fleet.worker_reported(standing, &report));
        let standing = relay(&fleet).await;
        let report = v1::RelayReport { routes: 5, loaded_generations: vec![1], ..Default::default() };
        assert!(fleet.relay_reported(standing, &report));
        let id = |worker| ServerId {
            region: RegionNumber::new(2).unwrap(),
            worker: WorkerNumber::new(worker).unwrap(),
            shard: ShardNumber::new(0).unwrap(),
            incarnation: Incarnation::new(9).unwrap(),
        };
        let update = v1::RegionUpdate {
            digest: Some(v1::RegionDigest {
                region: "there".into(),
                number: 2,
                relays: vec![v1::RelayInfo {
                    number: 128,
                    public_address: "127.0.0.1:6".into(),
                    tunnel_address: "127.0.0.1:7".into(),
                    phase: v1::Phase::Active.into(),
                    ..Default::default()
                }],
                loaded_generations: vec![1],
                minting_generation: 1,
                wanted_generation: 1,
                ..Default::default()
            }),
            routes: Some(v1::RouteUpdate {
                version: 1,
                full: true,
                upserts: (0..3)
                    .map(|n| v1::Route { server_id: id(n).to_u64(), tunnel_address: "127.0.0.1:8".into() })
                    .collect(),
                dead: vec![v1::DeadServer { server_id: id(7).to_u64(), reset_keys: vec![] }],
                ..Default::default()
            }),
        };
        fleet.peer_reported("there", ADDRESS, update, 0);
        fleet
    }

    /// Relays in the order to try them; one may have several addresses.
    fn offered(fleet: &Fleet) -> Vec<u32> {
        let mut numbers: Vec<u32> = fleet.relays_for(None, "here").iter().map(|r| r.number).collect();
        numbers.dedup();
        numbers
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_known_is_known_again_and_grows_old() {
        let fleet = experienced().await;
        let after = start(fleet.known()).await;
        assert_eq!((after.all_routes(), after.all_routes().len()), (fleet.all_routes(), 4));
        // With the reset keys, which are nowhere on disk.
        assert_eq!(after.dead_since(0, false).0, fleet.dead_since(0, false).0);
        assert_eq!(after.dead_since(0, true).0.len(), 1);
        // A relay that is silent is named, after those that speak.
        assert_eq!((offered(&fleet), offered(&after)), (vec![64, 128], vec![128, 64]));
        advance(Duration::from_secs(2)).await;
        let told = after.status();
        let before = fleet.status();
        let digest = |status: &v1::FleetStatusResponse| status.regions[1].digest.clone().unwrap();
        assert_eq!(digest(&told), digest(&before));
        assert!((2000..100_000).contains(&told.regions[1].digest_age_ms), "{}", told.regions[1].digest_age_ms);
        let worker = &told.regions[0].workers[0];
        assert_eq!((worker.reserved, worker.active, worker.slots), (1, 2, 9));
        assert!(worker.report_age_ms >= 2000 && !worker.placeable);
        assert_eq!(worker.why_not, "its control stream is broken");
        assert_eq!((worker.oldest_generation, worker.loaded_generations.as_slice()), (1, &[1][..]));
        assert_eq!(told.regions[0].relays[0].routes, 5);
        assert_eq!(after.in_service(), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_only_remembered_is_told_on_and_leaves_by_evidence() {
        let after = start(experienced().await.known()).await;
        let third = start(after.known()).await;
        assert_eq!(third.all_routes().len(), 4);
        assert_eq!(offered(&third), [128, 64]);
        // The peer's router knows less than before: it has just started, too.
        let poor = v1::RouteUpdate { version: 1, full: true, ..Default::default() };
        third.peer_reported("there", ADDRESS, v1::RegionUpdate { routes: Some(poor), digest: None }, 0);
        assert_eq!(third.all_routes().len(), 4);
        let gone = v1::RouteUpdate {
            version: 2,
            removals: third.all_routes().keys().copied().filter(|id| id >> 54 == 2).collect(),
            ..Default::default()
        };
        third.peer_reported("there", ADDRESS, v1::RegionUpdate { routes: Some(gone), digest: None }, 0);
        assert_eq!(third.all_routes().len(), 1);
        assert_eq!(third.register_worker(worker(3)).await.unwrap().number.value(), {
            let id = *after.all_routes().keys().next().unwrap();
            ServerId::from_u64(id).worker.value()
        });
        assert_eq!(third.all_routes().len(), 1, "its next life has its place");
        assert_eq!(third.dead_since(0, true).0.len(), 2);
        assert!(third.relay_gone("r-1").await);
        assert_eq!(offered(&third), [128]);
        let fourth = start(third.known()).await;
        assert_eq!(fourth.digest().unwrap().gone_relays, [64]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_read_is_left_out_whole() {
        let fleet = experienced().await;
        let kept = fleet.known();
        let known = || Known::decode(kept.clone()).unwrap();
        type Damage = fn(&mut Known);
        let table: [(&str, Damage); 5] = [
            ("it has format 2", |k| k.format = 2),
            ("a worker or relay has no name", |k| k.relays[0].hello = None),
            ("nobody can have number 70000", |k| k.workers[0].number = 70_000),
            ("a route leads to \"nowhere\"", |k| k.peers[0].routers[0].routes[0].tunnel_address = "nowhere".into()),
            ("agent: ", |k| k.workers[0].hello.as_mut().unwrap().agent.clear()),
        ];
        for (words, damage) in table {
            let mut bad = known();
            damage(&mut bad);
            let error = read(&bad.encode_to_vec().into()).and_then(|k| fleet.take_up(&k).map(drop)).unwrap_err();
            assert!(error.to_string().starts_with(words), "{error}");
            let after = start(bad.encode_to_vec().into()).await;
            assert!(after.all_routes().is_empty() && after.relays_for(None, "here").is_empty());
        }
        assert!(matches!(read(&kept.slice(..kept.len() - 1)), Err(RecallError::Damaged(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_out_of_touch_for_a_minute_is_offered_no_more_and_keeps_its_keys() {
        let fleet = experienced().await;
        let standing = relay(&fleet).await;
        assert_eq!(offered(&fleet), [64, 128]);
        fleet.relay_disconnected(standing);
        advance(Duration::from_secs(60)).await;
        assert_eq!(offered(&fleet), [128, 64]);
        advance(Duration::from_millis(1)).await;
        assert_eq!(offered(&fleet), [128]);
        let told = fleet.digest().unwrap().relays;
        assert!(told[0].missing, "other regions offer it no more either");
        let number = *fleet.state.lock().workers.keys().next().unwrap();
        let keyed = fleet.worker_keys(number).unwrap().relays;
        assert_eq!(keyed.iter().map(|r| r.number).collect::<Vec<_>>(), [64, 128]);
        // A router that has just started has not missed it for long.
        let after = start(fleet.known()).await;
        assert_eq!(offered(&after), [128, 64]);
        relay(&fleet).await;
        assert_eq!(offered(&fleet), [64, 128]);
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_kept_at_once_and_then_once_a_second() {
        let fleet = start(Bytes::new()).await;
        let tasks = Tasks::new();
        let following = tasks.clone();
        tasks.spawn("memory", follow(Arc::clone(&fleet), following));
        let kept = async || {
            // Lets the other task come to its next wait.
            for _ in 0..8 {
                tokio::task::yield_now().await;
            }
            Known::decode(fleet.store.remembered()).unwrap().workers.len()
        };
        assert_eq!(kept().await, 0);
        fleet.register_worker(worker(1)).await.unwrap();
        assert_eq!(kept().await, 1);
        fleet.worker_gone("w-1", 0).await;
        assert_eq!(kept().await, 1);
        advance(INTERVAL).await;
        assert_eq!(kept().await, 0);
        tasks.stopping().cancel();
    }

    const ADDRESS: &str = "127.0.0.1:1";
}
