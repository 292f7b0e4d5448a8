//! The router's process.
#![forbid(unsafe_code)]

use clap::Parser as _;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    antiphon_router::run(antiphon_router::Args::parse()).await
}
