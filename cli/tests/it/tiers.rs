//! A caller in one region, a worker in another that only its own relays reach.

use antiphon_cli::fleet::Kind;
use antiphon_client::{ClientKey, SessionRequest};
use antiphon_proto::v1::Codec;

use crate::support::{Caller, PATIENCE, RECEIPT_FRAMES, TestFleet, connect, request, start_from, until};

/// The agent runs in the south only, whose workers are behind its relays.
const MANIFEST: &str = "
apiVersion: antiphon.dev/v1alpha1
kind: VoiceRegion
metadata: {name: north, namespace: antiphon-system}
spec:
  number: 7
  cluster: here
  cloud: nimbus
  location: {latitude: 52.5, longitude: 13.4}
  relay: {replicas: 2}
---
apiVersion: antiphon.dev/v1alpha1
kind: VoiceRegion
metadata: {name: south, namespace: antiphon-system}
spec:
  number: 8
  cluster: there
  cloud: cirrus
  location: {latitude: 41.9, longitude: 12.5}
  relay: {replicas: 2}
  tunnel: ViaRelays
---
apiVersion: antiphon.dev/v1alpha1
kind: VoiceAgent
metadata: {name: echo, namespace: default}
spec:
  engine: {type: Echo}
  regions:
    - {name: south, minReplicas: 1, maxReplicas: 1}
  sessions: {slotsPerWorker: 4}
";

#[tokio::test(flavor = "multi_thread")]
async fn a_call_through_two_tiers_outlives_both_relays_that_carry_it() {
    let mut fleet = start_from(MANIFEST).await;
    let key = ClientKey::generate().unwrap();
    let asked = SessionRequest { location: Some((52.5, 13.4)), ..request(&key, Codec::Opus) };
    let mut session = fleet.router().create(&asked).await.unwrap();
    assert_eq!(session.region, "south");
    // The caller uses relays of its own region only.
    session.relays.retain(|relay| relay.region == "north");
    assert_eq!(session.relays.len(), 2, "{session:?}");
    let call = connect(&session, &key).await.unwrap();
    let (caller, mut seen) = Caller::new(17, call.sample_rate(), 4);
    let running = tokio::spawn(caller.run(call));

    // The far one that carries it, then the near one, in the middle of an answer's words; each is replaced before the
    // next one goes.
    for (answer, region) in [(1, "south"), (2, "north"), (3, "south")] {
        until(&mut seen, |seen| (seen.answers_begun, seen.frames) >= (answer, RECEIPT_FRAMES)).await;
        let index = busiest(&mut fleet, region).await;
        let relay = fleet.fleet.process(Kind::Relay, region, index).unwrap();
        relay.kill().unwrap();
        relay.ended(PATIENCE).await.unwrap();
        until(&mut seen, |seen| seen.answers_begun > answer).await;
        fleet.fleet.process(Kind::Relay, region, index).unwrap().restart().await.unwrap();
    }
    let finished = tokio::time::timeout(2 * PATIENCE, running).await.expect("in time").unwrap();
    finished.assert_complete();
    let all_back = async {
        for (region, index) in [("north", 0), ("north", 1), ("south", 0), ("south", 1)] {
            while fleet.metric_in(region, Kind::Relay, index, "antiphon_relay_router_connected").await < 1.0 {}
        }
    };
    tokio::time::timeout(PATIENCE, all_back).await.expect("both regions have both relays again");
    fleet.fleet.stop().await;
}

/// The relay of a region that has carried most of what callers sent.
async fn busiest(fleet: &mut TestFleet, region: &str) -> usize {
    let forwarded = "antiphon_relay_forwarded_packets_total{direction=\"up\"}";
    let (first, second) = (
        fleet.metric_in(region, Kind::Relay, 0, forwarded).await,
        fleet.metric_in(region, Kind::Relay, 1, forwarded).await,
    );
    assert!(first + second > 0.0, "the call goes through {region}");
    usize::from(second > first)
}
