//! The router's process.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

#[tokio::main]
async fn main() -> ExitCode {
    antiphon_runtime::shutdown::exit_code(&antiphon_router::run(antiphon_router::Args::parse()).await)
}
