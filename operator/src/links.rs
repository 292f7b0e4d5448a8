//! Connections to the routers of the regions that this cluster builds.
//!
//! One per region, to any of its routers: what one of them knows all of them know. It carries the fleet's status here as
//! it changes, and records, orders to workers and reports of deaths there. A router that cannot be reached is followed by
//! the next one.

mod link;

use std::{collections::BTreeMap, fmt, sync::Arc};

use antiphon_proto::v1::{
    FleetStatusResponse, RegionStatus, ReportRelayGoneRequest, ReportWorkerGoneRequest, SetWorkerPhaseRequest,
    SetWorkerPhaseResponse, admin_client::AdminClient,
};
use antiphon_runtime::Tasks;
use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{Error, credentials::Credentials, fence::Fence, metrics::Metrics, records::Records};

/// All connections. Clones are the same ones.
#[derive(Clone)]
pub struct RouterLinks {
    shared: Arc<Shared>,
}

struct Shared {
    regions: Mutex<BTreeMap<String, Arc<Region>>>,
    listeners: RwLock<Vec<Listener>>,
    credentials: Arc<Credentials>,
    fence: Fence,
    metrics: Arc<Metrics>,
    tasks: Tasks,
}

type Listener = Box<dyn Fn(&str, &View) + Send + Sync>;

/// One region's connection.
struct Region {
    name: String,
    wanted: watch::Sender<Wanted>,
    view: Mutex<View>,
    client: Mutex<Option<AdminClient<Channel>>>,
    stop: CancellationToken,
}

/// What the connection is to be and to carry.
#[derive(Clone, Default)]
struct Wanted {
    /// "ip:port" of the routers' internal ports.
    routers: Vec<String>,
    records: Option<Arc<Records>>,
}

/// What is known through a connection.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// What a router said last; stays when the connection is lost.
    pub status: Option<Arc<FleetStatusResponse>>,
    /// When it said so.
    pub heard: Option<Instant>,
    /// Whether there is a connection now.
    pub connected: bool,
    /// The records that the region's store has.
    pub applied: Option<Arc<Records>>,
    /// Why there is no connection, or why records were refused; empty if nothing is wrong.
    pub problem: String,
}

impl View {
    /// What its own routers say of the region.
    #[must_use]
    pub fn local(&self) -> Option<&RegionStatus> {
        self.status.as_ref()?.regions.iter().find(|region| region.local)
    }

    /// What they know of a region.
    #[must_use]
    pub fn region(&self, name: &str) -> Option<&RegionStatus> {
        let named = |region: &&RegionStatus| region.digest.as_ref().is_some_and(|digest| digest.region == name);
        self.status.as_ref()?.regions.iter().find(named)
    }
}

impl fmt::Debug for RouterLinks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let regions: Vec<_> = self.shared.regions.lock().keys().cloned().collect();
        f.debug_struct("RouterLinks").field("regions", &regions).finish()
    }
}

impl RouterLinks {
    /// No connections yet.
    #[must_use]
    pub fn new(credentials: Arc<Credentials>, fence: Fence, metrics: Arc<Metrics>, tasks: Tasks) -> Self {
        let regions = Mutex::default();
        let shared = Shared { regions, listeners: RwLock::default(), credentials, fence, metrics, tasks };
        Self { shared: Arc::new(shared) }
    }

    /// Has `listener` called with a region's name and view whenever something of it changed: at most about once a
    /// second and region. It should only note what is to be done.
    pub fn on_change(&self, listener: impl Fn(&str, &View) + Send + Sync + 'static) {
        self.shared.listeners.write().push(Box::new(listener));
    }

    /// Says where a region's routers are now ("ip:port"); begins to connect if the region is new.
    pub fn set_routers(&self, region: &str, routers: Vec<String>) {
        self.region(region).wanted.send_if_modified(|wanted| {
            let changed = wanted.routers != routers;
            wanted.routers = routers;
            changed
        });
    }

    /// Says what a region's store is to hold.
    pub fn set_records(&self, region: &str, records: Arc<Records>) {
        self.region(region).wanted.send_if_modified(|wanted| {
            let changed = wanted.records.as_ref() != Some(&records);
            wanted.records = Some(records);
            changed
        });
    }

    /// Forgets a region.
    pub fn remove(&self, region: &str) {
        if let Some(region) = self.shared.regions.lock().remove(region) {
            region.stop.cancel();
        }
        self.shared.count();
    }

    /// Regions that have a connection or are to have one.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.shared.regions.lock().keys().cloned().collect()
    }

    /// What is known of a region; nothing if it is built elsewhere.
    #[must_use]
    pub fn view(&self, region: &str) -> Option<View> {
        let region = self.shared.regions.lock().get(region).cloned()?;
        let view = region.view.lock().clone();
        Some(view)
    }

    /// What any of this cluster's regions knows of a region of another one: the latest.
    #[must_use]
    pub fn peer(&self, region: &str) -> Option<RegionStatus> {
        let regions: Vec<_> = self.shared.regions.lock().values().cloned().collect();
        let views = regions.iter().map(|region| region.view.lock().clone()).filter(|view| view.connected);
        let known = views.filter_map(|view| view.region(region).filter(|status| !status.local).cloned());
        known.min_by_key(|status| status.digest_age_ms)
    }

    /// Takes a worker out of service, or puts it back.
    ///
    /// # Errors
    /// No router of the region can be reached, or it refuses.
    pub async fn set_worker_phase(
        &self,
        region: &str,
        request: SetWorkerPhaseRequest,
    ) -> Result<SetWorkerPhaseResponse, Error> {
        let mut admin = self.admin(region)?;
        answer(region, admin.set_worker_phase(request)).await
    }

    /// Says that a worker is gone for good: whether it was known.
    ///
    /// # Errors
    /// No router of the region can be reached, or it refuses.
    pub async fn report_worker_gone(&self, region: &str, name: &str, incarnation: u32) -> Result<bool, Error> {
        let mut admin = self.admin(region)?;
        let request = ReportWorkerGoneRequest { name: name.to_owned(), incarnation };
        Ok(answer(region, admin.report_worker_gone(request)).await?.known)
    }

    /// Says that nothing runs under a relay's name any more: whether it was known.
    ///
    /// # Errors
    /// No router of the region can be reached, or it refuses.
    pub async fn report_relay_gone(&self, region: &str, name: &str) -> Result<bool, Error> {
        let mut admin = self.admin(region)?;
        let request = ReportRelayGoneRequest { name: name.to_owned() };
        Ok(answer(region, admin.report_relay_gone(request)).await?.known)
    }

    /// A connected router; orders are given only while the lease is held.
    fn admin(&self, region: &str) -> Result<AdminClient<Channel>, Error> {
        self.shared.fence.check()?;
        let found = self.shared.regions.lock().get(region).cloned();
        let client = found.and_then(|region| region.client.lock().clone());
        client.ok_or_else(|| Error::NoRouter(region.to_owned()))
    }

    fn region(&self, name: &str) -> Arc<Region> {
        let mut regions = self.shared.regions.lock();
        let region = regions.entry(name.to_owned()).or_insert_with(|| {
            let region = Arc::new(Region {
                name: name.to_owned(),
                wanted: watch::Sender::new(Wanted::default()),
                view: Mutex::default(),
                client: Mutex::default(),
                stop: self.shared.tasks.stopping().child_token(),
            });
            self.shared.tasks.spawn("router link", link::run(self.shared.clone(), region.clone()));
            region
        });
        region.clone()
    }
}

impl Shared {
    /// Changes a region's view and tells who wants to know.
    fn change(&self, region: &Region, change: impl FnOnce(&mut View)) {
        let view = {
            let mut view = region.view.lock();
            change(&mut view);
            view.clone()
        };
        self.count();
        self.listeners.read().iter().for_each(|listener| listener(&region.name, &view));
    }

    fn count(&self) {
        let regions: Vec<_> = self.regions.lock().values().cloned().collect();
        self.metrics.connected(regions.iter().filter(|region| region.view.lock().connected).count());
    }
}

async fn answer<T>(
    region: &str,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Error> {
    let outcome = timeout(ANSWER, call).await.unwrap_or_else(|_elapsed| {
        Err(tonic::Status::deadline_exceeded(format!("no answer in {} s", ANSWER.as_secs())))
    });
    outcome
        .map(tonic::Response::into_inner)
        .map_err(|source| Error::Router { region: region.to_owned(), source: source.into() })
}

/// How long a router may take to answer.
const ANSWER: std::time::Duration = std::time::Duration::from_secs(5);

#[cfg(test)]
mod tests;
