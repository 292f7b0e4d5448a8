//! The workspace and the cargo that builds it.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Where everything is.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// Directory of the root Cargo.toml.
    pub(crate) root: PathBuf,
}

impl Workspace {
    /// The workspace that this program was built from.
    pub(crate) fn find() -> Result<Self> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = here.parent().context("xtask lies in a workspace")?.to_owned();
        Ok(Self { root })
    }

    /// Runs cargo in the root and shows what it says.
    pub(crate) fn cargo(&self, arguments: &[&str]) -> Result<()> {
        self.run(self.command(cargo()).args(arguments))
    }

    /// A command to be run in the root.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root);
        // Set by the cargo that runs this program, for this program alone. Build scripts look at some of them: if they
        // came and went, half of the workspace would be built again each time.
        let own = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];
        for (name, _) in env::vars_os() {
            if own.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
                command.env_remove(name);
            }
        }
        command
    }

    /// Runs a command; its failure is an error.
    pub(crate) fn run(&self, command: &mut Command) -> Result<()> {
        let line = shown(command);
        let status = command.status().with_context(|| format!("{line}: cannot be started"))?;
        if !status.success() {
            bail!("{line}: {status}");
        }
        Ok(())
    }

    /// What `cargo metadata` says: packages, targets and the resolved dependencies.
    pub(crate) fn metadata(&self) -> Result<Value> {
        let mut command = self.command(cargo());
        command.args(["metadata", "--format-version", "1"]).stderr(Stdio::inherit());
        let output = command.output().context("cargo metadata cannot be started")?;
        if !output.status.success() {
            bail!("cargo metadata: {}", output.status);
        }
        serde_json::from_slice(&output.stdout).context("cargo metadata is no JSON")
    }
}

/// The cargo that runs this program, or the one in the path.
pub(crate) fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
