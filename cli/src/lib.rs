//! The command line of Antiphon, and the fleet that it runs on one machine.
#![forbid(unsafe_code)]

mod args;
mod call;
mod caller;
mod cid;
mod demo;
mod explain;
pub mod fleet;
mod gone;
mod keys;
mod present;
mod rotation;
mod sessions;
#[cfg(test)]
mod stand_in;
mod status;
mod up;
mod words;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, ensure};

pub use args::Cli;
use args::Command;

/// Runs one command. Errors go to standard error, one line per cause; the exit code says whether it went well.
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    antiphon_runtime::telemetry::init_for_people();
    if let Command::Demo(_) = cli.command {
        demo::go_first();
    }
    let json = cli.json;
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting")
        .and_then(|runtime| runtime.block_on(run(cli)));
    match outcome {
        Ok(code) => code,
        Err(error) => {
            if json {
                // Nobody may be there to read it; the exit code says the same.
                let _ = present::try_line(&serde_json::json!({ "error": present::text(&error) }).to_string());
            }
            present::error(&error);
            if error.is::<Interrupted>() { ExitCode::from(Interrupted::CODE) } else { ExitCode::FAILURE }
        }
    }
}

/// A signal ended the command before it was done.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

impl Interrupted {
    /// As shells report a command that Ctrl-C ended.
    pub(crate) const CODE: u8 = 130;
}

async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    if let Command::Demo(_) = cli.command {
        ensure!(
            cli.dir.is_none(),
            "demo makes a fleet of its own: name a directory to keep it in with --keep, not --dir"
        );
    }
    let given = cli.dir.clone();
    let dir = cli.dir.or_else(|| present::from_environment("ANTIPHON_DIR").map(PathBuf::from));
    let dir = dir.map_or_else(default_dir, Ok)?;
    ensure!(!dir.exists() || dir.is_dir(), "{} is no directory: name that of the fleet with --dir", dir.display());
    let json = cli.json;
    match cli.command {
        Command::Up(args) => up::run(&args, dir, given.as_deref(), json).await,
        Command::Call(args) => call::run(&args, &dir, json).await,
        Command::Status => status::run(&dir, json).await,
        Command::Sessions(args) => sessions::run(&args, &dir, json).await,
        Command::Explain(args) => explain::run(&args, &dir, json).await,
        Command::Keys(args) => keys::run(&args, &dir, json).await,
        Command::Workers(args) => gone::worker(&args.command, &dir, json).await,
        Command::Relays(args) => gone::relay(&args.command, &dir, json).await,
        Command::Demo(args) => demo::run(&args, json).await,
        Command::Cid(args) => cid::run(&args, &dir, json).await,
    }
}

fn default_dir() -> anyhow::Result<PathBuf> {
    let home = std::env::home_dir().context("no home directory: name the fleet's directory with --dir")?;
    Ok(home.join(".antiphon"))
}
