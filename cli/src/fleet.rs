//! A whole fleet on this machine: real routers, relays and workers as processes, no Kubernetes.
//!
//! What is to run is the plan that resources compile to; this module is its *apply* for one machine. Every process
//! gets a loopback address of its own (127.77.N.x), so the usual ports are free and fleets do not meet.

mod address;
mod context;
mod identities;
mod process;
mod records;
mod root;

use std::{
    collections::BTreeSet,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use antiphon_core::keys::FleetRoot;
use antiphon_crds::compile::FleetPlan;
use antiphon_proto::v1::{ReportRelayGoneRequest, ReportWorkerGoneRequest, admin_client::AdminClient};
use antiphon_runtime::{
    pki::{FleetCa, Role, shared_dns},
    tls,
};
use anyhow::{Context as _, bail};
use tokio::time::timeout;
use tonic::transport::Channel;

pub use address::Subnet;
pub(crate) use antiphon_records::key as key_record;
pub use context::{Context, RouterContext};
pub(crate) use context::{ca_path, key_path, new_key, no_fleet};
pub(crate) use process::ADMIN;
pub use process::{Kind, Process, ProcessSpec};

use identities::Identities;
use process::find_binaries;

/// How a fleet is to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Keys, identities and logs live here; made if absent, kept afterwards.
    pub dir: PathBuf,
    /// How long a process may take to stop before it is killed.
    pub stop_deadline: Duration,
    /// Tenant of the fleet's own API key.
    pub tenant: String,
}

/// A running fleet. Its processes end with it.
#[derive(Debug)]
pub struct Fleet {
    plan: FleetPlan,
    context: Context,
    processes: Vec<Process>,
    options: Options,
    identities: Identities,
    /// Regions whose router came back and has no records yet.
    unrecorded: BTreeSet<String>,
    /// Workers that are gone and of which no router has been told: region and name.
    untold: BTreeSet<(String, String)>,
    /// Relays that do not come back, of which routers have been told: region and name.
    given_up: BTreeSet<(String, String)>,
    // Held for as long as the fleet lives: two fleets in one directory would overwrite each other.
    _lock: std::fs::File,
    // Held for as long as the fleet lives: it is what keeps the subnet ours.
    _subnet: Subnet,
}

impl Fleet {
    /// Starts everything and waits until the fleet takes calls; `progress` is told what is waited for.
    ///
    /// # Errors
    /// A binary is missing, a process ends early, or something is not ready in time; says which and where its log is.
    pub async fn start(plan: FleetPlan, options: Options, progress: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let binaries = find_binaries()?;
        let lock = lock(&options.dir)?;
        let mut subnet = Subnet::claim().context("no free loopback subnet")?;
        let root = root::load_or_make(&options.dir)?;
        let ca = FleetCa::from_seed(&root.ca_seed())?;
        progress("keys and identities");
        let mut identities = Identities::new(ca, options.dir.clone());
        let (mut specs, context) = layout(&plan, &options, &mut subnet, &mut identities)?;
        let mut processes = Vec::new();
        specs.sort_by_key(|spec| spec.kind);
        for spec in specs {
            processes.push(Process::start(spec, &binaries, &options.dir)?);
        }
        let mut fleet = Self {
            plan,
            context,
            processes,
            options,
            identities,
            unrecorded: BTreeSet::new(),
            untold: BTreeSet::new(),
            given_up: BTreeSet::new(),
            _lock: lock,
            _subnet: subnet,
        };
        fleet.wait_for_records(progress).await?;
        fleet.wait_for(Kind::Relay, progress).await?;
        fleet.wait_for(Kind::Worker, progress).await?;
        fleet.wait_until_placeable(progress).await?;
        fleet.context.save(&fleet.options.dir)?;
        Ok(fleet)
    }

    /// What runs.
    #[must_use]
    pub const fn plan(&self) -> &FleetPlan {
        &self.plan
    }

    /// Where it can be reached.
    #[must_use]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// Its processes.
    #[must_use]
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// One process by kind, region and index.
    pub fn process(&mut self, kind: Kind, region: &str, index: usize) -> Option<&mut Process> {
        let mut of_kind = self.processes.iter_mut().filter(|p| p.spec().kind == kind && p.spec().region == region);
        of_kind.nth(index)
    }

    /// Writes the plan's records and the directory's API keys to every router.
    ///
    /// # Errors
    /// A router refuses or cannot be reached.
    pub async fn apply(&self) -> anyhow::Result<()> {
        for router in &self.context.routers {
            let applied = timeout(READY, self.apply_to(router)).await;
            applied.with_context(|| format!("router of {} does not take the records", router.region))??;
        }
        Ok(())
    }

    async fn apply_to(&self, router: &RouterContext) -> anyhow::Result<()> {
        let own = context::load_or_make_key(&self.options.dir)?;
        let mut keys = crate::keys::stored(&self.options.dir)?;
        keys.push(key_record(&own, &self.options.tenant, Vec::new()));
        let request = records::of(&self.plan, &self.context, keys);
        let applied = self.admin(router)?.apply(request).await;
        applied.with_context(|| format!("router of {} refused the records", router.region))?;
        Ok(())
    }

    /// An operator's channel to a router.
    ///
    /// # Errors
    /// The identity or address is unusable.
    pub fn admin(&self, router: &RouterContext) -> anyhow::Result<AdminClient<Channel>> {
        self.context.admin(router)
    }

    /// Gives the routers their records and waits until they are ready.
    async fn wait_for_records(&mut self, progress: &dyn Fn(&str)) -> anyhow::Result<()> {
        for process in self.processes.iter_mut().filter(|process| process.spec().kind == Kind::Router) {
            progress(&process.spec().title());
            process.wait_live(READY).await?;
        }
        self.apply().await?;
        self.wait_for(Kind::Router, progress).await
    }

    /// Waits until every process of a kind says that it is ready.
    async fn wait_for(&mut self, kind: Kind, progress: &dyn Fn(&str)) -> anyhow::Result<()> {
        for index in 0..self.processes.len() {
            if self.processes[index].spec().kind == kind {
                progress(&self.processes[index].spec().title());
                self.processes[index].wait_ready(READY).await?;
            }
        }
        Ok(())
    }

    /// Waits until every router sees every region's free slots: only then are calls placed as planned.
    async fn wait_until_placeable(&self, progress: &dyn Fn(&str)) -> anyhow::Result<()> {
        progress("regions seeing each other");
        let deadline = tokio::time::Instant::now() + READY;
        loop {
            match self.unseen().await? {
                None => return Ok(()),
                Some(missing) if tokio::time::Instant::now() > deadline => bail!("{missing}"),
                Some(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// What some router does not see yet.
    async fn unseen(&self) -> anyhow::Result<Option<String>> {
        for router in &self.context.routers {
            let status =
                self.admin(router)?.fleet_status(antiphon_proto::v1::FleetStatusRequest {}).await?.into_inner();
            for pool in self.plan.pools.iter().filter(|pool| pool.replicas > 0) {
                let digests = status.regions.iter().filter_map(|region| region.digest.as_ref());
                let mut pools = digests.filter(|d| d.region == pool.region).flat_map(|d| &d.pools);
                if !pools.any(|seen| seen.agent == pool.agent && seen.workers == pool.replicas) {
                    let (region, agent) = (&pool.region, &pool.agent);
                    let from = &router.region;
                    return Ok(Some(format!("the router of {from} does not see the workers of {agent} in {region}")));
                }
            }
            for region in &self.plan.regions {
                let digests = status.regions.iter().filter_map(|region| region.digest.as_ref());
                let seen = digests.filter(|d| d.region == region.name).map(|d| d.relays.len()).sum::<usize>();
                if seen < usize::from(region.relays) {
                    let from = &router.region;
                    return Ok(Some(format!("the router of {from} does not see the relays of {}", region.name)));
                }
            }
        }
        Ok(None)
    }

    /// Completes when a process ends: [`Self::heal`] is due.
    pub async fn ended(&mut self) {
        let lives: Vec<_> = self.processes.iter_mut().map(|process| Box::pin(process.life())).collect();
        if lives.is_empty() {
            std::future::pending::<()>().await;
        }
        futures::future::select_all(lives).await;
    }

    /// Starts again what has ended by itself, tells routers of workers that are gone, gives routers that came back
    /// their records, and renews certificates; returns what happened.
    ///
    /// Never fails and never takes long: what does not work now is tried again at the next call, and trouble with one
    /// process is no reason to end the calls of the others.
    pub async fn heal(&mut self) -> Vec<String> {
        let mut happened = Vec::new();
        for process in &mut self.processes {
            let spec = process.spec();
            let (kind, whose, title) = (spec.kind, (spec.region.clone(), spec.name.clone()), spec.title());
            match process.notice_end() {
                Ok(Some(_)) if kind == Kind::Worker => drop(self.untold.insert(whose)),
                Ok(_) => {}
                Err(error) => happened.push(format!("{title}: {error:#}")),
            }
        }
        // First: once it is started again the report would be taken for one of its next life.
        happened.extend(self.tell_of_the_gone().await);
        for process in &mut self.processes {
            match process.restart_if_ended() {
                Ok(None) => {}
                Ok(Some(how)) => {
                    let spec = process.spec();
                    if spec.kind == Kind::Router {
                        self.unrecorded.insert(spec.region.clone());
                    }
                    self.untold.remove(&(spec.region.clone(), spec.name.clone()));
                    self.given_up.remove(&(spec.region.clone(), spec.name.clone()));
                    happened.push(format!("{} {how}; started again", spec.title()));
                }
                Err(error) => happened.push(format!("{}: {error:#}", process.spec().title())),
            }
        }
        happened.extend(self.give_relays_up().await);
        // A router in memory mode comes back empty; the records come from here.
        for region in self.unrecorded.clone() {
            let Some(router) = self.context.routers.iter().find(|router| router.region == region).cloned() else {
                continue;
            };
            if let Ok(Ok(())) = timeout(HEAL, self.apply_to(&router)).await {
                self.unrecorded.remove(&region);
                happened.push(format!("router of {region} has its records again"));
            }
        }
        happened.extend(self.renew_certificates(SystemTime::now()));
        happened
    }

    /// Says to the routers of its region that a worker is gone, which is proof: its callers hear it from the relays.
    async fn tell_of_the_gone(&mut self) -> Vec<String> {
        let gone: Vec<_> = self.untold.iter().cloned().collect();
        let told = futures::future::join_all(gone.iter().map(|(region, name)| self.tell_of(region, name))).await;
        let mut happened = Vec::new();
        for (worker, _) in gone.into_iter().zip(told).filter(|(_, told)| told.is_ok()) {
            happened.push(format!("worker {}/{} is gone: its router knows", worker.0, worker.1));
            self.untold.remove(&worker);
        }
        happened
    }

    /// Says to the routers of its region that a relay is gone that does not come back: its number is free, and callers
    /// are no longer sent there. One that is started again at once keeps its number and its callers.
    async fn give_relays_up(&mut self) -> Vec<String> {
        let missing = self.processes.iter().filter(|p| p.spec().kind == Kind::Relay && p.is_missing_for(GIVEN_UP));
        let missing: Vec<_> = missing.map(|p| (p.spec().region.clone(), p.spec().name.clone())).collect();
        let mut happened = Vec::new();
        for relay in missing.into_iter().filter(|relay| !self.given_up.contains(relay)).collect::<Vec<_>>() {
            if self.tell_of_relay(&relay.0, &relay.1).await.is_ok() {
                happened.push(format!("relay {}/{} does not come back: its router knows", relay.0, relay.1));
                self.given_up.insert(relay);
            }
        }
        happened
    }

    async fn tell_of_relay(&self, region: &str, name: &str) -> anyhow::Result<()> {
        for router in self.context.routers.iter().filter(|router| router.region == region) {
            let request = ReportRelayGoneRequest { name: name.to_owned() };
            timeout(HEAL, self.admin(router)?.report_relay_gone(request)).await??;
        }
        Ok(())
    }

    async fn tell_of(&self, region: &str, name: &str) -> anyhow::Result<()> {
        for router in self.context.routers.iter().filter(|router| router.region == region) {
            let request = ReportWorkerGoneRequest { name: name.to_owned(), incarnation: 0 };
            timeout(HEAL, self.admin(router)?.report_worker_gone(request)).await??;
        }
        Ok(())
    }

    /// Issues anew what has a third of its life left at `now`, or less. Processes take it up within seconds; live
    /// connections go on. Returns what could not be written, and how many there were.
    pub fn renew_certificates(&mut self, now: SystemTime) -> Vec<String> {
        let (renewed, failed): (Vec<_>, Vec<_>) = self.identities.renew(now).into_iter().partition(Result::is_ok);
        let mut happened: Vec<_> = failed.into_iter().filter_map(Result::err).collect();
        if !renewed.is_empty() {
            happened.push(format!("{} certificates renewed", renewed.len()));
        }
        happened
    }

    /// Stops everything: workers end their calls, then relays, then routers.
    pub async fn stop(mut self) {
        for kind in [Kind::Worker, Kind::Relay, Kind::Router] {
            let of_kind = self.processes.iter_mut().filter(|process| process.spec().kind == kind);
            let deadline = self.options.stop_deadline;
            futures::future::join_all(of_kind.map(|process| process.stop(deadline))).await;
        }
    }
}

/// Makes the directory, for its owner only, and takes its lock.
fn lock(dir: &Path) -> anyhow::Result<std::fs::File> {
    let named = || dir.display().to_string();
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(named)?;
    let file = std::fs::File::create(dir.join("lock")).with_context(named)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!("another fleet runs in {}: stop it, or give this one a directory with --dir", dir.display())
        }
        Err(std::fs::TryLockError::Error(error)) => Err(error).with_context(named),
    }
}

/// Where everything runs, with an identity for each process.
fn layout(
    plan: &FleetPlan,
    options: &Options,
    subnet: &mut Subnet,
    identities: &mut Identities,
) -> anyhow::Result<(Vec<ProcessSpec>, Context)> {
    let (mut specs, mut routers) = (Vec::new(), Vec::new());
    for region in &plan.regions {
        let ip = subnet.take()?;
        let dir = identities.issue("router-0", Role::Router, &region.name, Some(ip))?;
        let spec = ProcessSpec::router(&region.name, ip, dir, root::path(&options.dir));
        routers.push(RouterContext {
            region: region.name.clone(),
            public: format!("{ip}:{}", process::ROUTER_PUBLIC),
            internal: format!("{ip}:{}", process::ROUTER_INTERNAL),
            server_name: shared_dns(Role::Router, &region.name),
            latitude: region.latitude,
            longitude: region.longitude,
        });
        let internal = [format!("{ip}:{}", process::ROUTER_INTERNAL)];
        specs.push(spec);
        for index in 0..region.relays {
            let (name, ip) = (format!("relay-{index}"), subnet.take()?);
            let dir = identities.issue(&name, Role::Relay, &region.name, Some(ip))?;
            specs.push(ProcessSpec::relay(&name, &region.name, ip, dir, &internal, options.stop_deadline));
        }
        for pool in plan.pools.iter().filter(|pool| pool.region == region.name) {
            for index in 0..pool.replicas {
                let name = format!("{}-{index}", pool.agent.replace('/', "-"));
                let ip = subnet.take()?;
                let dir = identities.issue_worker(&name, &region.name, &pool.agent, ip)?;
                specs.push(ProcessSpec::worker(&name, pool, ip, dir, &internal, options.stop_deadline));
            }
        }
    }
    let operator_identity = identities.issue("operator", Role::Operator, "local", None)?;
    let context = Context {
        routers,
        ca_pem: identities.ca_pem().to_owned(),
        operator_identity,
        api_key_file: key_path(&options.dir),
    };
    Ok((specs, context))
}

/// The root of a fleet's directory, for commands that only read.
///
/// # Errors
/// It is not there or not readable.
pub fn read_root(dir: &Path) -> anyhow::Result<FleetRoot> {
    root::load(dir)
}

/// How long one process may take to become ready.
const READY: Duration = Duration::from_secs(20);
/// How long one attempt to give a router its records may take while the fleet runs.
const HEAL: Duration = Duration::from_millis(700);
/// A relay that has not run for this long does not come back by itself.
const GIVEN_UP: Duration = Duration::from_secs(10);

/// Connects as the operator; used by commands against a running fleet.
pub(crate) fn admin_channel(address: &str, identity: &Path, region: &str) -> anyhow::Result<AdminClient<Channel>> {
    let identity = antiphon_runtime::pki::Identity::load(identity)?;
    Ok(AdminClient::new(tls::channel(address, &identity, Role::Router, region)?))
}
