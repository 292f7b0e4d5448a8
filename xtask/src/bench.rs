//! `cargo xtask bench`: what things cost, against the goals.

use std::{os::unix::process::CommandExt, path::PathBuf};

use anyhow::{Context, Result};

use crate::workspace::Workspace;

/// Builds the measuring program in release mode and becomes it.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    // All programs: some measurements run a whole fleet.
    workspace.cargo(&["build", "--release", "--workspace", "--bins"])?;
    let metadata = workspace.metadata()?;
    let target = metadata["target_directory"].as_str().context("cargo names no target directory")?;
    let binary = PathBuf::from(target).join("release/antiphon-bench");
    let error = workspace.command(&binary).args(arguments).exec();
    Err(error).with_context(|| format!("{} cannot be started", binary.display()))
}
