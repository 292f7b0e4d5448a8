//! `cargo xtask cluster`: Kubernetes clusters on this machine.
#![forbid(unsafe_code)]

use std::{
    ffi::OsString, io::Read as _, net::Ipv4Addr, os::unix::process::CommandExt as _, path::PathBuf, process::ExitCode,
};

use antiphon_e2e::{
    Clusters, Part, Shape,
    images::{self, Programs},
    load_balancers, stop,
};
use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

/// Kubernetes clusters on this machine: real ones, in network namespaces, side by side.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask cluster", bin_name = "cargo xtask cluster")]
struct Arguments {
    /// Which set of clusters.
    #[arg(long, global = true, default_value = "dev", value_name = "NAME")]
    set: String,
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Starts clusters. The first time, Kubernetes is built.
    Up {
        /// How many, side by side.
        #[arg(long, default_value_t = 1)]
        clusters: u8,
        /// How many nodes each has.
        #[arg(long, default_value_t = 1)]
        nodes: u8,
    },
    /// Stops them, and removes everything that they have left.
    Down,
    /// Shows what runs and how to reach it.
    Status,
    /// Runs kubectl on a cluster.
    Kubectl {
        /// Which one, from 1.
        cluster: u8,
        /// kubectl's own arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Runs helm on a cluster.
    Helm {
        /// Which one, from 1.
        cluster: u8,
        /// helm's own arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Builds Antiphon's images and puts them on all nodes.
    LoadImages,
    /// Builds Antiphon's images as files that Docker, podman and containerd read.
    Images,
    /// Takes the link away that connects a cluster with everything else.
    Cut {
        /// Which one, from 1.
        cluster: u8,
    },
    /// Gives the link back.
    Join {
        /// Which one, from 1.
        cluster: u8,
    },
    /// Runs a program outside of all clusters, with an address of its own.
    Outside {
        /// Which caller, 0 to 199.
        caller: u8,
        /// The program and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        program: Vec<OsString>,
    },
    /// Gives addresses to Services of type LoadBalancer. Each cluster runs one.
    #[command(hide = true)]
    LoadBalancers {
        #[arg(long)]
        kubeconfig: PathBuf,
        #[arg(long, value_delimiter = ',')]
        addresses: Vec<Ipv4Addr>,
    },
    /// Stops clusters when its standard input ends. Tests run one.
    #[command(hide = true)]
    Keep { name: String },
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(Arguments { set, task }: Arguments) -> Result<()> {
    match task {
        Task::Up { clusters, nodes } => {
            let clusters = Clusters::start(&set, Shape { clusters, nodes }, &std::env::current_exe()?).await?;
            status(&clusters).await
        }
        Task::Down => stop(&set).await,
        Task::Status => status(&Clusters::find(&set)?).await,
        Task::Kubectl { cluster, arguments } => {
            let mut command = Clusters::find(&set)?.cluster(cluster)?.kubectl_command(arguments);
            Err(command.as_std_mut().exec()).context("kubectl cannot be started")
        }
        Task::Helm { cluster, arguments } => {
            let clusters = Clusters::find(&set)?;
            let mut command = std::process::Command::new(clusters.tools().helm().await?);
            command.env("KUBECONFIG", clusters.cluster(cluster)?.kubeconfig()).args(arguments);
            Err(command.exec()).context("helm cannot be started")
        }
        Task::LoadImages => {
            let clusters = Clusters::find(&set)?;
            let images = images::antiphon(clusters.tools(), &Programs::build().await?).await?;
            clusters.load(&images).await
        }
        Task::Images => {
            let tools = antiphon_e2e::Tools::provide().await?;
            for image in images::antiphon(&tools, &Programs::build().await?).await? {
                println!("{} {}", image.reference, image.file.display());
            }
            Ok(())
        }
        Task::Cut { cluster } => Clusters::find(&set)?.cluster(cluster)?.cut().await,
        Task::Join { cluster } => Clusters::find(&set)?.cluster(cluster)?.join().await,
        Task::Outside { caller, program } => {
            let (program, arguments) = program.split_first().context("there is no program")?;
            let caller = Clusters::find(&set)?.caller(caller).await?;
            let status = caller.command(program).args(arguments).status().await;
            caller.remove().await?;
            match status.context("nsenter cannot be started")?.code() {
                Some(0) => Ok(()),
                code => std::process::exit(code.unwrap_or(1)),
            }
        }
        Task::LoadBalancers { kubeconfig, addresses } => load_balancers::serve(&kubeconfig, &addresses).await,
        Task::Keep { name } => {
            // Until whoever started this has ended, however that was.
            let read = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
            let _ = read.await?;
            stop(&name).await
        }
    }
}

async fn status(clusters: &Clusters) -> Result<()> {
    for cluster in clusters.all() {
        println!(
            "cluster {}: {}, export KUBECONFIG={}",
            cluster.number(),
            cluster.server(),
            cluster.kubeconfig().display()
        );
        let stopped: Vec<_> = Part::ALL.into_iter().filter(|part| !cluster.runs(*part)).map(Part::name).collect();
        if !stopped.is_empty() {
            println!("not running: {}", stopped.join(", "));
        }
        match cluster.kubectl(["get", "nodes", "--output=wide", "--request-timeout=5s"]).await {
            Ok(nodes) => print!("{nodes}"),
            Err(error) => println!("{error:#}"),
        }
    }
    println!("this machine is {}; callers are in {}", clusters.host(), clusters.network().range());
    Ok(())
}
