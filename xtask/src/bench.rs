//! `cargo xtask bench`: what things cost, against the goals.

use std::{os::unix::process::CommandExt, path::PathBuf};

use anyhow::{Context, Result};

use crate::workspace::Workspace;

/// Builds the measuring program in release mode and becomes it.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    workspace.cargo(&["build", "--release", "--package", "antiphon-bench"])?;
    let metadata = workspace.metadata()?;
    let target = metadata["target_directory"].as_str().context("cargo names no target directory")?;
    let binary = PathBuf::from(target).join("release/antiphon-bench");
    let error = workspace.command(&binary).args(arguments).exec();
    Err(error).with_context(|| format!("{} cannot be started", binary.display()))
}
