//! The relay under load, beside a plain forwarder and nginx.

pub(crate) mod fleet;
mod forwarder;
mod load;
pub(crate) mod plain;

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use anyhow::ensure;

use crate::{
    Served,
    machine::{cpu_of_process, rss_kib, with_cpus},
    measure::median,
    report::{Goal, Row},
};
use fleet::packet;
use forwarder::Forwarder;
pub(crate) use forwarder::start;
use load::{Counts, Load, Pace, Way, Wire, Wires};

/// CPU time per packet of 172 bytes, up and down, in trains and singly; each repetition loads all forwarders in turn.
pub(crate) fn cpu() -> anyhow::Result<Vec<Row>> {
    with_cpus(|cpus| {
        let mut load = Load::new()?;
        let mut forwarders = vec![
            Forwarder::own("relay", Served::Relay, load.sink(), cpus)?,
            Forwarder::own("plain", Served::Plain, load.sink(), cpus)?,
        ];
        match forwarder::nginx(load.sink(), cpus) {
            Ok(nginx) => forwarders.push(nginx),
            Err(error) => eprintln!("  no nginx: {error:#}"),
        }
        for forwarder in &mut forwarders {
            load.greet(forwarder)?;
        }
        let mut rows = Vec::new();
        for case in &CASES {
            rows.extend(case.rows(&mut load, &forwarders)?);
        }
        Ok(rows)
    })
}

struct Case {
    name: &'static str,
    way: Way,
    pace: Pace,
    most_us: Option<f64>,
    /// Greatest ratio to a forwarder of this name.
    most_of: Option<(&'static str, f64)>,
}

impl Case {
    fn rows(&self, load: &mut Load, forwarders: &[Forwarder]) -> anyhow::Result<Vec<Row>> {
        // One list per forwarder, microseconds per packet.
        let mut costs = vec![Vec::new(); forwarders.len()];
        for _ in 0..REPETITIONS {
            for (forwarder, costs) in forwarders.iter().zip(&mut costs) {
                costs.push(self.microseconds(load, forwarder)?);
            }
        }
        let mut rows = Vec::new();
        for (forwarder, costs) in forwarders.iter().zip(&costs) {
            let row = Row::new(format!("{}-{}", forwarder.name, self.name), median(costs.clone()), "µs/packet");
            let most = self.most_us.filter(|_| forwarder.name == "relay");
            rows.push(most.map(Goal::AtMost).into_iter().fold(row, Row::goal));
        }
        for (forwarder, theirs) in forwarders.iter().zip(&costs).skip(1) {
            let ratios = costs[0].iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
            let row = Row::new(format!("relay-{}-to-{}", self.name, forwarder.name), median(ratios), "ratio");
            let most = self.most_of.filter(|(name, _)| *name == forwarder.name);
            rows.push(most.map(|(_, most)| Goal::AtMost(most)).into_iter().fold(row, Row::goal));
        }
        Ok(rows)
    }

    /// One window's CPU time per forwarded packet. Something else on the CPU makes packets get lost: then again.
    fn microseconds(&self, load: &mut Load, forwarder: &Forwarder) -> anyhow::Result<f64> {
        let mut attempt = 1;
        loop {
            let before = cpu_of_process(forwarder.pid())?;
            let Counts { sent, received } = load.run(forwarder, self.way, self.pace, WINDOW)?;
            let spent = cpu_of_process(forwarder.pid())? - before;
            let lost = 1.0 - received as f64 / sent as f64;
            if lost > MOST_LOST && attempt < ATTEMPTS {
                attempt += 1;
                continue;
            }
            if lost > MOST_LOST {
                eprintln!("  {} {}: {:.1} % lost, the machine is too busy", self.name, forwarder.name, lost * 100.0);
            }
            ensure!(received > 0, "{} forwarded nothing", forwarder.name);
            return Ok(spent.as_secs_f64() * 1e6 / received as f64);
        }
    }
}

/// Memory of a relay after a million packets of few clients, and after as many more of a million clients.
pub(crate) fn rss() -> anyhow::Result<Vec<Row>> {
    with_cpus(|cpus| {
        let mut sink = Wires::bind(&[Ipv4Addr::LOCALHOST])?;
        let relay = Forwarder::own("relay", Served::Relay, sink.address(0), cpus)?;
        // The same process: two differ by more than clients could cost.
        let mut after = |clients| -> anyhow::Result<f64> {
            forward(&relay, &mut sink, clients)?;
            Ok(rss_kib(relay.pid())? as f64)
        };
        let (few, many) = (after(100)?, after(MANY_CLIENTS)?);
        Ok(vec![
            Row::new("relay-rss-100-clients", few, "KiB"),
            Row::new("relay-rss-1000000-clients", many, "KiB"),
            Row::new("relay-rss-growth", many / few, "ratio").goal(Goal::AtMost(1.01)),
        ])
    })
}

/// Has [`MANY_CLIENTS`] packets from `clients` addresses in turn forwarded.
fn forward(relay: &Forwarder, sink: &mut Wires, clients: u32) -> anyhow::Result<()> {
    let source = Wire::bind(Ipv4Addr::UNSPECIFIED)?;
    // No connection ID comes more often than a relay lets it.
    let packets: Vec<_> = (0..CONNECTIONS).map(packet).collect();
    let (mut sent, mut received, mut progress) = (0_u32, 0, Instant::now());
    while received < MANY_CLIENTS {
        if sent < MANY_CLIENTS && sent - received < WITHIN_A_SOCKETS_BUFFER {
            // 127.1.0.0 and on: every address of 127.0.0.0/8 is this machine.
            let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 0)) + sent % clients);
            let packet = &packets[sent as usize % packets.len()];
            source.send_from(IpAddr::V4(address), relay.public, packet)?;
            sent += 1;
        }
        let come = sink.receive(0, |_, _| {})?;
        received += come as u32;
        if come > 0 {
            progress = Instant::now();
        }
        ensure!(progress.elapsed() < PATIENCE, "{received} of {sent} packets of {clients} clients came through");
    }
    Ok(())
}

/// A voice packet with its QUIC header.
const PACKET_LEN: usize = 172;
const REPETITIONS: usize = 7;
const WINDOW: Duration = Duration::from_millis(400);
const MOST_LOST: f64 = 0.01;
const ATTEMPTS: u32 = 5;
const MANY_CLIENTS: u32 = 1_000_000;
const CONNECTIONS: u16 = 1024;
const WITHIN_A_SOCKETS_BUFFER: u32 = 64;
const PATIENCE: Duration = Duration::from_secs(2);

/// 16 packets of one client at a time, 100,000 packets a second.
const TRAINS: Pace = Pace { train: 16, per_second: 100_000 };
/// One packet at a time, as 1,000 callers send them.
const SINGLY: Pace = Pace { train: 1, per_second: 50_000 };

const CASES: [Case; 4] = [
    Case { name: "up-trains", way: Way::Up, pace: TRAINS, most_us: Some(1.5), most_of: Some(("nginx", 0.3)) },
    Case { name: "up-singly", way: Way::Up, pace: SINGLY, most_us: None, most_of: Some(("plain", 1.05)) },
    Case { name: "down-trains", way: Way::Down, pace: TRAINS, most_us: None, most_of: Some(("nginx", 0.3)) },
    Case { name: "down-singly", way: Way::Down, pace: SINGLY, most_us: None, most_of: Some(("plain", 1.05)) },
];
