//! The operator: watches Antiphon's resources, plans, applies and says in their status what became of them.
//!
//! Per kind there is one straight line: observe (the [`cache`]s) → plan (pure) → apply ([`apply`], which makes no request
//! where nothing would change) → status. Every write passes the [`fence`], which stands open only while this process
//! holds the lease ([`election`]). Nothing is on the way of any call: while the operator is away, calls go on, new ones
//! are placed, and nothing is scaled, healed or drained.
#![forbid(unsafe_code)]

pub mod api_keys;
pub mod apply;
pub mod apply_crds;
pub mod args;
pub mod bootstrap;
pub mod cache;
pub mod conditions;
pub mod config;
mod context;
pub mod controller;
pub mod credentials;
pub mod drain;
pub mod election;
mod error;
pub mod etcd_member;
pub mod events;
pub mod fence;
pub mod identity;
pub mod labels;
pub mod links;
pub mod metrics;
pub mod owned;
pub mod pod_template;
pub mod queue;
pub mod rbac;
pub mod records;
pub mod region;
mod run;
pub mod teardown;
pub mod trim;
pub mod voice_agent;
pub mod worker_pool;

pub use context::{Caches, Context, Queues};
pub use error::{Error, Reason};

use antiphon_runtime::telemetry;
use anyhow::Context as _;
use args::{Cli, Command};

/// Does what the command line says.
///
/// # Errors
/// Why it could not be done.
pub async fn execute(cli: Cli) -> anyhow::Result<()> {
    telemetry::init(cli.log_json);
    match cli.command {
        Command::Run(args) => run::run(*args).await,
        Command::Bootstrap(args) => bootstrap::run(client().await?, &args).await,
        Command::ApplyCrds(args) => apply_crds::run(client().await?, &args).await,
        Command::EtcdMember(args) => etcd_member::run(&args).await,
        Command::Teardown(args) => teardown::run(client().await?, &args).await,
    }
}

/// For commands that run once and need no lease.
async fn client() -> anyhow::Result<kube::Client> {
    kube::Client::try_default().await.context("no access to a Kubernetes cluster")
}
