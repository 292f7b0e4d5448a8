//! `antiphon-relay`: see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use antiphon_relay::Args;
use clap::Parser as _;

#[tokio::main]
async fn main() -> ExitCode {
    antiphon_runtime::shutdown::exit_code(&antiphon_relay::run(Args::parse()).await)
}
