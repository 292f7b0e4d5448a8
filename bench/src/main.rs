//! What packets, placements, tickets and conversations cost on this machine, against the project's goals.
//!
//! Each measurement gives rows of one table. What is compared is measured in one run, in turns; values are medians of
//! repetitions. What could not be measured has no row, and standard error says why.
#![forbid(unsafe_code)]

mod density;
mod fleet;
mod flood;
mod machine;
mod measure;
mod packet;
mod placement;
mod relay;
mod report;
mod sessions;
mod setup;
mod tickets;

use std::{net::SocketAddr, process::ExitCode};

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};

use report::Row;

/// Measures what Antiphon costs and prints a table of values and goals.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Args {
    /// Only these measurements; all without a name.
    #[arg(value_name = "NAME")]
    measurements: Vec<Measurement>,
    /// Prints an array of objects instead of a table.
    #[arg(long)]
    json: bool,
    /// Is what another process of this program measures.
    #[arg(long, hide = true, requires = "sink")]
    serve: Option<Served>,
    /// Where the served forwarder's worker is.
    #[arg(long, hide = true)]
    sink: Option<SocketAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Measurement {
    /// Decoding of connection IDs.
    Cid,
    /// Sealing and opening of tunnel frames.
    Tunnel,
    /// CPU time per forwarded packet: relay, plain forwarder, nginx.
    Relay,
    /// Memory of the relay at 100 and at 1,000,000 clients.
    Rss,
    /// Placement decisions.
    Placement,
    /// Tickets over gRPC.
    Tickets,
    /// Session set-up on a path with delay.
    Setup,
    /// Audio work of conversations.
    Sessions,
    /// Sessions per worker core.
    Density,
    /// A live call and new ones during a flood of forged handshakes.
    Flood,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Served {
    Relay,
    Plain,
    Router,
    RouterOnEtcd,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    if let (Some(served), Some(sink)) = (args.serve, args.sink) {
        return match served {
            Served::Relay => relay::fleet::serve(sink),
            Served::Plain => relay::plain::serve(sink),
            Served::Router => tickets::region::serve(None),
            Served::RouterOnEtcd => tickets::region::serve(Some(sink)),
        };
    }
    if cfg!(debug_assertions) {
        bail!("this is a debug build: measure with `cargo xtask bench`, which builds in release mode");
    }
    eprintln!("{}", machine::describe());
    let mut rows: Vec<Row> = Vec::new();
    for measurement in Measurement::value_variants() {
        if args.measurements.is_empty() || args.measurements.contains(measurement) {
            let name = measurement.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
            eprintln!("measuring {name} ...");
            rows.extend(measurement.run().with_context(|| format!("measuring {name}"))?);
        }
    }
    report::print(&rows, args.json)
}

impl Measurement {
    fn run(self) -> anyhow::Result<Vec<Row>> {
        match self {
            Self::Cid => packet::cid(),
            Self::Tunnel => packet::tunnel(),
            Self::Relay => relay::cpu(),
            Self::Rss => relay::rss(),
            Self::Placement => placement::decisions(),
            Self::Tickets => tickets::rate(),
            Self::Setup => setup::round_trips(),
            Self::Sessions => sessions::steps(),
            Self::Density => density::sessions(),
            Self::Flood => flood::initials(),
        }
    }
}
