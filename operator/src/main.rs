//! `antiphon-operator`: see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use antiphon_operator::args::Cli;
use clap::Parser as _;

#[tokio::main]
async fn main() -> ExitCode {
    antiphon_runtime::shutdown::exit_code(&antiphon_operator::execute(Cli::parse()).await)
}
