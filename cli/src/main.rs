//! The `antiphon` command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    antiphon_cli::main(antiphon_cli::Cli::parse())
}
