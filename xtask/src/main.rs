//! The project's own tasks: `cargo xtask demo | test | e2e | cluster | bench | fuzz | tidy | crds`.
#![forbid(unsafe_code)]

mod bench;
mod cluster;
mod demo;
mod fuzz;
mod gate;
mod tidy;
mod workspace;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;

use workspace::Workspace;

/// Antiphon's own tasks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Builds everything and runs the demonstration: three regions, a hundred calls, failures in the middle of them.
    Demo {
        /// Arguments of `antiphon demo`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Runs every check and every test, in the order of `--list`; stops at the first failure.
    Test {
        /// Only these steps.
        steps: Vec<String>,
        /// Lists the steps and runs none.
        #[arg(long)]
        list: bool,
    },
    /// Runs the tests that take Kubernetes clusters, on this machine, as root.
    E2e {
        /// Clusters that others run, instead of own ones; Antiphon's images have to be where they find them.
        #[arg(long, value_name = "FILE")]
        kubeconfig: Vec<PathBuf>,
        /// Arguments of the test program: names of tests, --nocapture.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Runs real Kubernetes clusters on this machine: up, down, status, kubectl, helm, load-images, images.
    Cluster {
        /// What to do; --help tells more.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Measures what packets, placements, tickets and conversations cost, in release mode, against the goals.
    Bench {
        /// Arguments of the measuring program: NAME ..., --json.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Looks for bytes that break a parser, guided by the code they reach. What breaks one is saved.
    Fuzz {
        /// Only these targets.
        targets: Vec<String>,
        /// How long to search all of them together, in seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Keeps inputs that reach new code in fuzz/corpus, for the tests.
        #[arg(long)]
        keep: bool,
    },
    /// Checks the conventions that the compiler does not know.
    Tidy,
    /// Writes the CustomResourceDefinitions to crds/yaml.
    Crds,
}

fn main() -> ExitCode {
    match run(Task::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let workspace = Workspace::find()?;
    match task {
        Task::Demo { arguments } => demo::run(&workspace, &arguments),
        Task::Test { list: true, .. } => {
            gate::list();
            Ok(())
        }
        Task::Test { steps, list: false } => gate::run(&workspace, &steps),
        Task::E2e { kubeconfig, arguments } => cluster::test(&workspace, &kubeconfig, &arguments),
        Task::Cluster { arguments } => cluster::run(&workspace, &arguments),
        Task::Bench { arguments } => bench::run(&workspace, &arguments),
        Task::Fuzz { targets, seconds, keep } => fuzz::run(&workspace, &fuzz::Search { targets, seconds, keep }),
        Task::Tidy => tidy::run(&workspace),
        Task::Crds => workspace.cargo(&["run", "--package", "antiphon-crds", "--example", "crdgen", "--", "crds/yaml"]),
    }
}
