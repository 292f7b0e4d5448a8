//! `antiphon-relay`: see the library.
#![forbid(unsafe_code)]

use antiphon_relay::Args;
use clap::Parser as _;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    antiphon_relay::run(Args::parse()).await
}
