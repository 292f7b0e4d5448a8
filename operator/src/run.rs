//! The process: everything put together.

use std::sync::Arc;

use antiphon_runtime::{
    Tasks,
    admin::{self, Readiness},
    shutdown,
};
use anyhow::{Context as _, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client, client::ClientBuilder};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::{
    Caches, Context, Queues,
    apply::Applier,
    args::{CertificateArgs, RunArgs},
    config::Config,
    credentials::Credentials,
    drain,
    election::{Elector, Timing},
    events::Events,
    fence::{Fence, FenceLayer},
    labels::CONTROLLER,
    links::RouterLinks,
    metrics::Metrics,
    records, region, voice_agent, worker_pool,
};

/// Runs the operator until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, the loss of the lease, or the first of its tasks that fails.
pub(crate) async fn run(args: RunArgs) -> anyhow::Result<()> {
    let stop = shutdown::signal().context("signal handlers")?;
    let config = Config::of(&args)?;
    let tasks = Tasks::new();
    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::register(&mut registry));
    let credentials = Arc::new(credentials(&args.certificates, &config.cluster, &tasks, &mut registry)?);
    let readiness = Readiness::new(&[]);
    let listener = TcpListener::bind(args.admin).await.with_context(|| format!("binding {}", args.admin))?;
    tasks.service("admin", admin::serve(listener, registry, readiness.clone(), tasks.stopping()));
    let kube = kube::Config::infer().await.context("no access to a Kubernetes cluster")?;
    tracing::info!(cluster = config.cluster, namespace = config.namespace, server = %kube.cluster_url, "operator starts");
    let operator = Operator { config, kube, metrics, credentials, readiness, tasks: tasks.clone() };
    tasks.spawn("operator", operator.lead());
    tasks.wait(stop).await
}

/// One that does not lead yet.
struct Operator {
    config: Config,
    kube: kube::Config,
    metrics: Arc<Metrics>,
    credentials: Arc<Credentials>,
    readiness: Readiness,
    tasks: Tasks,
}

impl Operator {
    /// Waits for the lease and works from then on.
    async fn lead(self) -> anyhow::Result<()> {
        let fence = Fence::closed();
        let token = {
            // The lease's own writes cannot wait for the lease.
            let client = Client::try_from(self.kube.clone()).context("client")?;
            let leases: Api<Lease> = Api::namespaced(client, &self.config.namespace);
            let identity = self.config.identity.clone();
            let mut elector = Elector::new(leases, CONTROLLER.to_owned(), identity, Timing::default());
            // One that waits for its turn is as ready as it can be.
            self.readiness.note(Some("another operator leads".to_owned()));
            let token = tokio::select! {
                token = elector.acquire(&fence) => token,
                () = self.tasks.stopping().cancelled_owned() => return Ok(()),
            };
            self.tasks.service("lease", elector.hold(fence.clone(), self.tasks.stopping()));
            token
        };
        tracing::info!(identity = self.config.identity, token, "holds the lease");
        self.metrics.leads(true);
        self.readiness.note(Some("leads".to_owned()));
        self.readiness.set("what the API server holds is known", false);
        let layer = FenceLayer { fence: fence.clone(), metrics: self.metrics.clone() };
        let client = ClientBuilder::try_from(self.kube).context("client")?.with_layer(&layer).build();
        let context = Arc::new(Context {
            applier: Applier::new(client.clone(), self.metrics.clone()),
            events: Events::new(client.clone(), self.config.identity.clone()),
            links: RouterLinks::new(self.credentials.clone(), fence, self.metrics.clone(), self.tasks.clone()),
            client,
            config: self.config,
            metrics: self.metrics,
            credentials: self.credentials,
            caches: Caches::default(),
            queues: Queues::default(),
        });
        // Before the first event, so that none is missed.
        region::listen(&context);
        voice_agent::listen(&context);
        worker_pool::listen(&context);
        drain::listen(&context);
        let records_changed = records::keep::listen(&context);
        context.caches.start(&context.client, &context.config, &self.tasks);
        tokio::select! {
            () = context.caches.ready() => {}
            () = self.tasks.stopping().cancelled_owned() => return Ok(()),
        }
        self.readiness.set("what the API server holds is known", true);
        self.tasks.service("records", records::keep::keep(context.clone(), records_changed, self.tasks.stopping()));
        region::start(&context, &self.tasks);
        voice_agent::start(&context, &self.tasks);
        worker_pool::start(&context, &self.tasks);
        drain::start(&context, &self.tasks);
        Ok(())
    }
}

fn credentials(
    args: &CertificateArgs,
    cluster: &str,
    tasks: &Tasks,
    registry: &mut Registry,
) -> anyhow::Result<Credentials> {
    match (&args.operator_identity, &args.issuer) {
        (Some(dir), _) => Credentials::of_identity(dir, tasks, registry).context("the operator's identity"),
        (None, Some(dir)) => Credentials::of_issuer(dir, cluster).context("issuer of certificates"),
        (None, None) => anyhow::bail!("neither --issuer nor --operator-identity is given"),
    }
}

impl Config {
    /// What the command line says.
    ///
    /// # Errors
    /// A value that is none.
    pub fn of(args: &RunArgs) -> anyhow::Result<Self> {
        let RunArgs { place, cluster, watch_namespace, watch_nodes, identity, admin: _, images, etcd, certificates } =
            args;
        let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let legal = !cluster.is_empty() && cluster.len() <= 63 && cluster.chars().all(label);
        ensure!(
            legal && !cluster.starts_with('-') && !cluster.ends_with('-'),
            "--cluster {cluster:?} is no DNS label: use 1 to 63 of a-z, 0-9 and '-', not '-' at the ends"
        );
        let resources = |flag: &str, text: &str| {
            serde_json::from_str(text).with_context(|| format!("{flag} is not the `resources` of a container: {text}"))
        };
        Ok(Self {
            cluster: cluster.clone(),
            namespace: place.namespace.clone(),
            watch_namespaces: watch_namespace.clone(),
            watch_nodes: *watch_nodes,
            instance: place.instance.clone(),
            identity: identity.clone().unwrap_or_else(|| format!("{CONTROLLER}-{:08x}", rand::random::<u32>())),
            images: crate::config::Images {
                router: images.router_image.clone(),
                relay: images.relay_image.clone(),
                worker: images.worker_image.clone(),
                pull_policy: images.image_pull_policy.clone(),
                pull_secrets: images.image_pull_secret.clone(),
            },
            router_resources: resources("--router-resources", &images.router_resources)?,
            relay_resources: resources("--relay-resources", &images.relay_resources)?,
            etcd: crate::config::Etcd::of(etcd)?,
            root_secret: certificates.root_secret.clone(),
            certificates: crate::config::Certificates::of(certificates)?,
        })
    }
}
