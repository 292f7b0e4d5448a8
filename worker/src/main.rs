//! The worker process.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let args = antiphon_worker::Args::parse();
    antiphon_runtime::telemetry::init(args.log_json);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let outcome = runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(antiphon_worker::run(args)));
    antiphon_runtime::shutdown::exit_code(&outcome)
}
