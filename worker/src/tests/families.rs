//! Workers where both IP versions are.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use clap::Parser as _;

use super::rig::{Rig, TestRelay, talk};
use crate::Args;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_bound_to_all_addresses_talks_to_relays_of_ipv4() {
    let rig = Rig::start_on(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 1).await;
    let relay = TestRelay::start(&rig, 65).await;
    rig.set_relays(&[&relay], &[1]);
    let (terms, call) = rig.call(&[&relay], 1).await;
    let (report, outcome) = talk(call, 1).await;
    assert_eq!(outcome.answers, 1);
    rig.assert_no_frame_lost(&terms, &report);
    let [measured] = rig.capacity.measured()[..] else { panic!("{:?}", rig.capacity.measured()) };
    assert_eq!(measured.neighbourhood, 7, "where the router said that the caller is");
    assert!((1..2_000).contains(&measured.rtt_ms), "{measured:?}");
    rig.stop().await;
}

fn args(more: &[&str]) -> Args {
    let line = "antiphon-worker --name w --region r --agent a/b --slots 1 --router r:1 --identity /i";
    Args::parse_from(line.split(' ').chain(more.iter().copied()))
}

#[test]
fn what_is_advertised_can_be_reached() {
    let bound: SocketAddr = "0.0.0.0:4501".parse().unwrap();
    let said = |more: &[&str]| crate::control_address(&args(more), bound).map_err(|e| e.to_string());
    assert_eq!(said(&["--tunnel-ip", "10.1.2.3"]).unwrap(), "10.1.2.3:4501");
    assert_eq!(said(&["--tunnel-ip", "fd00::1"]).unwrap(), "[fd00::1]:4501");
    assert_eq!(said(&["--control-address", "10.9.9.9:1", "--tunnel-ip", "10.1.2.3"]).unwrap(), "10.9.9.9:1");
    assert!(said(&[]).unwrap_err().contains("give --control-address"));
    let bound = "10.1.1.1:4501".parse().unwrap();
    assert_eq!(crate::control_address(&args(&["--tunnel-ip", "10.1.2.3"]), bound).unwrap(), "10.1.1.1:4501");
    let shards = crate::bind_shards(&args(&["--tunnel", "[::]:0"])).unwrap_err().to_string();
    assert!(shards.contains("give --tunnel-ip"), "{shards}");
}
