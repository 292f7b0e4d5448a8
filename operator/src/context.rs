//! What every controller has at hand.

use std::{fmt, sync::Arc};

use antiphon_crds::{Drain, VoiceAgent, VoiceRegion, WorkerPool};
use antiphon_runtime::Tasks;
use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    core::v1::{Node, Pod, Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use kube::{Api, Client, runtime::watcher};

use crate::{
    apply::{Applier, Owned},
    cache::Cache,
    config::{Certificates, Config},
    credentials::Credentials,
    events::Events,
    identity::Certificate,
    labels,
    links::RouterLinks,
    metrics::Metrics,
    queue::Queue,
    trim,
};

/// Shared by all controllers of the process.
pub struct Context {
    /// To read what no cache has. Its writes pass the fence as well; controllers write through [`Self::applier`].
    pub client: Client,
    /// How this operator was started.
    pub config: Config,
    /// Writes objects.
    pub applier: Applier,
    /// Publishes events.
    pub events: Events,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Connections to routers.
    pub links: RouterLinks,
    /// Who the operator is, and how it makes certificates.
    pub credentials: Arc<Credentials>,
    /// What the API server holds.
    pub caches: Caches,
    /// What is to be reconciled.
    pub queues: Queues,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("caches", &self.caches).field("queues", &self.queues).finish_non_exhaustive()
    }
}

/// One copy per kind; only objects that concern Antiphon.
#[derive(Clone, Debug, Default)]
pub struct Caches {
    /// In Antiphon's namespace.
    pub regions: Cache<VoiceRegion>,
    /// In all namespaces that are watched.
    pub agents: Cache<VoiceAgent>,
    /// In all namespaces that are watched.
    pub pools: Cache<WorkerPool>,
    /// In all namespaces that are watched.
    pub drains: Cache<Drain>,
    /// Without what [`trim::node`] takes. Empty unless nodes are watched.
    pub nodes: Cache<Node>,
    /// The operator's own: routers and relays.
    pub deployments: Cache<Deployment>,
    /// The operator's own: workers.
    pub replica_sets: Cache<ReplicaSet>,
    /// Of routers, relays and workers, without what [`trim::pod`] takes.
    pub pods: Cache<Pod>,
    /// The operator's own.
    pub services: Cache<Service>,
    /// The operator's own.
    pub service_accounts: Cache<ServiceAccount>,
    /// The operator's own identities; of keys their hash only ([`trim::identity`]).
    pub identities: Cache<Secret>,
    /// The operator's own requests to cert-manager. Empty unless that issues certificates.
    pub certificates: Cache<Certificate>,
    /// API keys, in Antiphon's namespace.
    pub api_keys: Cache<Secret>,
    /// The operator's own.
    pub disruption_budgets: Cache<PodDisruptionBudget>,
    /// The operator's own.
    pub network_policies: Cache<NetworkPolicy>,
}

/// Who has to be looked at.
#[derive(Clone, Debug, Default)]
pub struct Queues {
    /// VoiceRegions.
    pub regions: Queue<VoiceRegion>,
    /// VoiceAgents.
    pub agents: Queue<VoiceAgent>,
    /// WorkerPools.
    pub pools: Queue<WorkerPool>,
    /// Drains.
    pub drains: Queue<Drain>,
}

impl Caches {
    /// Begins to follow the API server.
    pub fn start(&self, client: &Client, config: &Config, tasks: &Tasks) {
        let own = watcher::Config::default().labels(&format!("{}={}", labels::MANAGED_BY, labels::FIELD_MANAGER));
        let api_keys = watcher::Config::default().labels(&format!("{}=true", labels::API_KEY));
        let here = vec![config.namespace.clone()];
        let everywhere = config.watched_namespaces();
        let follow = Follow { client, tasks };
        follow.cache("regions", &self.regions, &here, &watcher::Config::default(), |_| {});
        follow.cache("agents", &self.agents, &everywhere, &watcher::Config::default(), |_| {});
        follow.cache("pools", &self.pools, &everywhere, &watcher::Config::default(), |_| {});
        follow.cache("drains", &self.drains, &everywhere, &watcher::Config::default(), |_| {});
        follow.nodes(&self.nodes, config.watch_nodes);
        follow.cache("deployments", &self.deployments, &here, &own, |_| {});
        follow.cache("replica sets", &self.replica_sets, &everywhere, &own, |_| {});
        follow.cache("pods", &self.pods, &everywhere, &own, trim::pod);
        follow.cache("services", &self.services, &here, &own, |_| {});
        follow.cache("service accounts", &self.service_accounts, &everywhere, &own, |_| {});
        follow.cache("identities", &self.identities, &everywhere, &own, trim::identity);
        match &config.certificates {
            Certificates::Own => follow.nothing("certificates", &self.certificates),
            Certificates::CertManager { .. } => {
                follow.cache("certificates", &self.certificates, &everywhere, &own, |_| {});
            }
        }
        follow.cache("API keys", &self.api_keys, &here, &api_keys, |_| {});
        follow.cache("disruption budgets", &self.disruption_budgets, &everywhere, &own, |_| {});
        follow.cache("network policies", &self.network_policies, &everywhere, &own, |_| {});
    }

    /// Waits until all of them are complete.
    pub async fn ready(&self) {
        self.regions.ready().await;
        self.agents.ready().await;
        self.pools.ready().await;
        self.drains.ready().await;
        self.nodes.ready().await;
        self.deployments.ready().await;
        self.replica_sets.ready().await;
        self.pods.ready().await;
        self.services.ready().await;
        self.service_accounts.ready().await;
        self.identities.ready().await;
        self.certificates.ready().await;
        self.api_keys.ready().await;
        self.disruption_budgets.ready().await;
        self.network_policies.ready().await;
    }
}

struct Follow<'a> {
    client: &'a Client,
    tasks: &'a Tasks,
}

impl Follow<'_> {
    fn cache<K: Owned>(
        &self,
        name: &'static str,
        cache: &Cache<K>,
        namespaces: &[String],
        config: &watcher::Config,
        trim: fn(&mut K),
    ) {
        let within = |namespace: &String| (Some(namespace.clone()), Api::namespaced(self.client.clone(), namespace));
        let sources = match namespaces {
            [] => vec![(None, Api::all(self.client.clone()))],
            namespaces => namespaces.iter().map(within).collect(),
        };
        self.tasks.service(name, cache.clone().follow(sources, config.clone(), trim, self.tasks.stopping()));
    }

    /// A cache of what is not there.
    fn nothing<K: Owned>(&self, name: &'static str, cache: &Cache<K>) {
        let follow = cache.clone().follow(Vec::new(), watcher::Config::default(), |_| {}, self.tasks.stopping());
        self.tasks.service(name, follow);
    }

    fn nodes(&self, cache: &Cache<Node>, watch: bool) {
        let sources = watch.then(|| (None, Api::all(self.client.clone()))).into_iter().collect();
        let config = watcher::Config::default();
        self.tasks.service("nodes", cache.clone().follow(sources, config, trim::node, self.tasks.stopping()));
    }
}
