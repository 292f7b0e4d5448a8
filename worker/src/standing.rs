//! Where the worker stands with its region: its number, keys, relays and behaviour, as the routers have said.
//!
//! Several routers say it, each on a stream of its own; what any of them says is acted on. They share one store and so
//! agree, but not at every moment: what is behind is not gone back to.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use antiphon_core::id::{Incarnation, KeyGeneration, RegionNumber, WorkerNumber};
use antiphon_proto::v1::{
    AgentBehaviour, CidConfig, ResetKey, WorkerDirective, WorkerHello, WorkerRelay, WorkerReport, WorkerWelcome,
    worker_directive::Directive,
};
use antiphon_runtime::{Tasks, admin::Readiness, pki::Identity};
use anyhow::Context as _;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::{
    capacity::Capacity,
    keys::{KeySet, KeysError},
    metrics::Metrics,
    qlog::QlogDir,
    shard::{Shards, ShardsConfig},
    state::{self, State, StateDir},
};

/// Why a router's word is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StandingError {
    #[error("router's numbers are out of range: region {0}, worker {1}")]
    Range(u32, u32),
    /// Connection IDs of live sessions name the old number.
    #[error("the router numbers this worker {theirs} of region {theirs_region}, but it is {ours} of {ours_region}")]
    OtherNumber { ours: WorkerNumber, ours_region: RegionNumber, theirs: WorkerNumber, theirs_region: RegionNumber },
    /// The same, when nobody would miss this life of the worker: the next one takes the router's number.
    #[error("the router numbers this worker anew, and nothing runs here: starting again")]
    Renumbered,
    #[error("router's keys: {0}")]
    Keys(#[from] KeysError),
    /// Taking them would end every live call of the other routers' fleet.
    #[error("another router gave other keys of generation {0}: routers of one region need one fleet root")]
    OtherKeys(KeyGeneration),
    #[error("router's relays: {0:#}")]
    Relays(anyhow::Error),
    #[error("opening the shards: {0:#}")]
    Shards(anyhow::Error),
    #[error("directive before the welcome")]
    Early,
}

impl StandingError {
    /// Nothing that another try would mend.
    pub(crate) const fn is_fatal(&self) -> bool {
        matches!(self, Self::Shards(_) | Self::Renumbered)
    }
}

/// What does not change while the worker runs.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) identity: Identity,
    pub(crate) pin: bool,
    pub(crate) cid_lifetime: Duration,
    pub(crate) qlog: Option<Arc<QlogDir>>,
    pub(crate) capacity: Arc<Capacity>,
    pub(crate) metrics: Metrics,
    pub(crate) readiness: Readiness,
    pub(crate) tasks: Tasks,
}

/// Shared by the links to all routers.
#[derive(Debug)]
pub(crate) struct Standing {
    settings: Settings,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    hello: WorkerHello,
    /// Until the shards are opened.
    sockets: Option<Vec<(std::net::UdpSocket, SocketAddr)>>,
    shards: Option<Shards>,
    keys: Option<KeySet>,
    state: State,
    kept: Option<StateDir>,
}

impl Standing {
    /// `hello` lacks number and incarnation; those come from the state on disk, if there is one.
    pub(crate) fn new(
        settings: Settings,
        mut hello: WorkerHello,
        sockets: Vec<(std::net::UdpSocket, SocketAddr)>,
        kept: Option<StateDir>,
    ) -> anyhow::Result<Self> {
        let mut state = kept.as_ref().map(StateDir::load).unwrap_or_default();
        hello.incarnation = state.begin_life(rand::random).value();
        hello.worker_number = state.numbers.map(|(_, worker)| worker.value().into());
        if let Some(behaviour) = &state.behaviour {
            settings.capacity.set_behaviour(behaviour.clone());
        }
        // A life is written down before anybody hears of it.
        if let Some(dir) = &kept {
            dir.store(&state).context("--state")?;
        }
        if let Some((region, worker)) = state.numbers {
            tracing::info!(%region, number = %worker, "number held from an earlier life");
            settings.readiness.set(READY, true);
        }
        let inner = Inner { hello, sockets: Some(sockets), shards: None, keys: None, state, kept };
        Ok(Self { settings, inner: Mutex::new(inner) })
    }

    /// How it introduces itself.
    pub(crate) fn hello(&self) -> WorkerHello {
        self.inner.lock().hello.clone()
    }

    /// Takes a router's first answer: opens the shards if this is the first of all.
    pub(crate) fn welcome(&self, welcome: &WorkerWelcome) -> Result<(), StandingError> {
        let inner = &mut *self.inner.lock();
        let (region, worker) = (welcome.region_number, welcome.worker_number);
        let numbers = state::numbers(region, worker).ok_or(StandingError::Range(region, worker))?;
        let keys = inner.key_set(&welcome.cid_configs, &welcome.ticket_keys, &welcome.reset_keys)?;
        if inner.shards.is_some()
            && let Some((ours_region, ours)) = inner.state.numbers.filter(|ours| *ours != numbers)
        {
            let counts = self.settings.capacity.counts();
            if counts.active + counts.reserved == 0 && self.settings.metrics.routers.get() == 0 {
                inner.state.numbers = None;
                inner.keep();
                return Err(StandingError::Renumbered);
            }
            let (theirs_region, theirs) = numbers;
            return Err(StandingError::OtherNumber { ours, ours_region, theirs, theirs_region });
        }
        if inner.shards.is_none() {
            self.open(inner, numbers, &keys, &welcome.relays)?;
            inner.hello.worker_number = Some(worker);
            inner.state.numbers = Some(numbers);
            inner.keys = Some(keys);
            inner.keep();
        } else {
            inner.set_keys(keys, &welcome.relays)?;
        }
        if let Some(behaviour) = welcome.behaviour.clone() {
            self.set_behaviour(inner, behaviour);
        }
        self.settings.readiness.set(READY, true);
        Ok(())
    }

    fn open(
        &self,
        inner: &mut Inner,
        numbers: (RegionNumber, WorkerNumber),
        keys: &KeySet,
        relays: &[WorkerRelay],
    ) -> Result<(), StandingError> {
        let fatal = |what: &'static str| StandingError::Shards(anyhow::Error::msg(what));
        let incarnation = Incarnation::new(inner.hello.incarnation).map_err(|_| fatal("incarnation"))?;
        let sockets = inner.sockets.take().ok_or_else(|| fatal("the first registration failed half way"))?;
        let config = ShardsConfig {
            numbers,
            incarnation,
            identity: &self.settings.identity,
            region: &inner.hello.region,
            slots: inner.hello.slots,
            pin: self.settings.pin,
            cid_lifetime: self.settings.cid_lifetime,
            qlog: self.settings.qlog.clone(),
            capacity: self.settings.capacity.clone(),
            metrics: self.settings.metrics.clone(),
        };
        let shards = Shards::open(config, sockets, keys, relays, &self.settings.tasks);
        inner.shards = Some(shards.map_err(StandingError::Shards)?);
        Ok(())
    }

    /// Does what a router says after its welcome.
    pub(crate) fn carry_out(&self, directive: WorkerDirective) -> Result<(), StandingError> {
        match directive.directive {
            Some(Directive::Welcome(welcome)) => return self.welcome(&welcome),
            Some(Directive::Behaviour(behaviour)) => self.set_behaviour(&mut self.inner.lock(), behaviour),
            Some(Directive::Relays(relays)) => {
                let inner = &*self.inner.lock();
                let shards = inner.shards.as_ref().ok_or(StandingError::Early)?;
                shards.set_relays(&relays.relays).map_err(StandingError::Relays)?;
            }
            Some(Directive::Keys(new)) => {
                let inner = &mut *self.inner.lock();
                let keys = inner.key_set(&new.cid_configs, &new.ticket_keys, &new.reset_keys)?;
                inner.set_keys(keys, &new.relays)?;
            }
            Some(Directive::Phase(order)) => self.settings.capacity.order(&order),
            // A newer router may know more: what is not understood is not acted on.
            None => {}
        }
        Ok(())
    }

    /// All routers say the same of an agent in the end; the last word of any of them holds.
    fn set_behaviour(&self, inner: &mut Inner, behaviour: AgentBehaviour) {
        if inner.state.behaviour.as_ref() != Some(&behaviour) {
            tracing::info!(revision = behaviour.revision, "agent revision");
            inner.state.behaviour = Some(behaviour.clone());
            inner.keep();
        }
        self.settings.capacity.set_behaviour(behaviour);
    }

    /// What every router is told regularly.
    pub(crate) fn report(&self) -> WorkerReport {
        let capacity = &self.settings.capacity;
        let counts = capacity.counts();
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        let inner = self.inner.lock();
        let tunnels = inner.shards.as_ref().and_then(Shards::oldest_tunnel_generation);
        let oldest = capacity.oldest_generation().into_iter().chain(tunnels).min();
        let loaded = inner.keys.iter().flat_map(KeySet::generations);
        WorkerReport {
            phase: counts.phase.into(),
            slots: counts.slots,
            reserved: counts.reserved,
            active: counts.active,
            unix_ms: u64::try_from(unix_ms).unwrap_or(u64::MAX),
            loaded_generations: loaded.map(KeyGeneration::value).collect(),
            oldest_generation: oldest.map_or(0, KeyGeneration::value),
            minting_generation: inner.keys.as_ref().map_or(0, |keys| keys.minting().number.value()),
            revisions: capacity.revisions(),
            measured: capacity.measured(),
            ordered_unix_ms: counts.ordered_unix_ms,
        }
    }
}

impl Inner {
    fn key_set(&self, configs: &[CidConfig], tickets: &[Bytes], resets: &[ResetKey]) -> Result<KeySet, KeysError> {
        let shards = u32::try_from(self.hello.shards.len()).unwrap_or(u32::MAX);
        KeySet::new(configs, tickets, resets, shards)
    }

    /// Keys of a router that is behind are left alone; the relays it knows of are not.
    fn set_keys(&mut self, keys: KeySet, relays: &[WorkerRelay]) -> Result<(), StandingError> {
        let shards = self.shards.as_mut().ok_or(StandingError::Early)?;
        if let Some(generation) = self.keys.as_ref().and_then(|present| present.contradiction(&keys)) {
            return Err(StandingError::OtherKeys(generation));
        }
        if self.keys.as_ref().is_none_or(|present| keys.rank() >= present.rank()) {
            shards.set_keys(&keys, Instant::now());
            self.keys = Some(keys);
        }
        shards.set_relays(relays).map_err(StandingError::Relays)
    }

    /// Rare, and no session runs on this thread. What cannot be kept is missed only after a restart.
    fn keep(&self) {
        if let Some(dir) = &self.kept
            && let Err(error) = dir.store(&self.state)
        {
            tracing::warn!(%error, "the state cannot be kept");
        }
    }
}

/// The condition of readiness: the worker has its number.
pub(crate) const READY: &str = "number";
