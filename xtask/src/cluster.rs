//! `cargo xtask cluster` and `cargo xtask e2e`: Kubernetes on this machine, and the tests that take it.

use std::{env, os::unix::process::CommandExt as _, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::workspace::{Workspace, cargo};

/// Builds the program that keeps clusters and becomes it.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    workspace.cargo(&["build", "--quiet", "--package", "antiphon-e2e", "--bin", "antiphon-e2e"])?;
    let metadata = workspace.metadata()?;
    let target = metadata["target_directory"].as_str().context("cargo names no target directory")?;
    let binary = PathBuf::from(target).join("debug/antiphon-e2e");
    // It may build images, with the same cargo.
    let error = workspace.command(&binary).env("CARGO", cargo()).args(arguments).exec();
    Err(error).with_context(|| format!("{} cannot be started", binary.display()))
}

/// Runs the tests. Clusters that `cargo xtask cluster up --set test` has started are used and stay; else the tests start
/// and stop their own. With configurations of clusters, those are used.
pub(crate) fn test(workspace: &Workspace, kubeconfigs: &[PathBuf], arguments: &[String]) -> Result<()> {
    let mut command = workspace.command(cargo());
    command.args(["test", "--package", "antiphon-e2e", "--features", "clusters", "--test", "it", "--"]);
    if !kubeconfigs.is_empty() {
        let absolute = kubeconfigs.iter().map(std::path::absolute).collect::<std::io::Result<Vec<_>>>()?;
        command.env("ANTIPHON_E2E_KUBECONFIG", env::join_paths(absolute)?);
    }
    workspace.run(command.args(arguments))
}
