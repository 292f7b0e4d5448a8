//! `cargo xtask demo`: the demonstration, from a fresh clone in one command.

use std::{os::unix::process::CommandExt, path::PathBuf};

use anyhow::{Context, Result};

use crate::workspace::Workspace;

/// Builds the release binaries and becomes `antiphon demo`. Its exit code is the verdict.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    workspace.cargo(&["build", "--release", "--workspace", "--exclude", "xtask", "--bins"])?;
    let metadata = workspace.metadata()?;
    let target = metadata["target_directory"].as_str().context("cargo names no target directory")?;
    let binary = PathBuf::from(target).join("release/antiphon");
    let error = workspace.command(&binary).arg("demo").args(arguments).exec();
    Err(error).with_context(|| format!("{} cannot be started", binary.display()))
}
