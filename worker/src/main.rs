//! The worker process.
#![forbid(unsafe_code)]

use clap::Parser as _;

fn main() -> anyhow::Result<()> {
    let args = antiphon_worker::Args::parse();
    antiphon_runtime::telemetry::init(args.log_json);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(antiphon_worker::run(args))
}
