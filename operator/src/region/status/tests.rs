use antiphon_proto::v1::{Location, RelayInfo, RelayStatus};
use serde_json::{Value, json};

use super::*;

fn region(name: &str, change: impl FnOnce(&mut Value)) -> Arc<VoiceRegion> {
    let mut region = json!({"apiVersion": "antiphon.dev/v1alpha1", "kind": "VoiceRegion",
        "metadata": {"name": name, "namespace": "ns", "uid": "u", "generation": 3},
        "spec": {"cluster": "c", "cloud": "nimbus", "number": 1, "location": {"latitude": 1, "longitude": 2}}});
    change(&mut region);
    Arc::new(serde_json::from_value(region).unwrap())
}

fn deployment(wanted: i32, ready: i32) -> Option<Arc<Deployment>> {
    let made = json!({"metadata": {"name": "d", "generation": 1}, "spec": {"replicas": wanted, "selector": {}, "template": {}},
        "status": {"observedGeneration": 1, "replicas": wanted, "updatedReplicas": wanted, "readyReplicas": ready, "availableReplicas": ready}});
    Some(Arc::new(serde_json::from_value(made).unwrap()))
}

/// What a router says of its own region and of one other.
fn fleet(silent_ms: u32) -> FleetStatusResponse {
    let worker =
        |active, placeable| WorkerStatus { slots: 10, active, reserved: 1, placeable, ..WorkerStatus::default() };
    let relay = RelayInfo { public_address: "192.0.2.1:4433".into(), ..RelayInfo::default() };
    let own = RegionDigest {
        region: "a".into(),
        wanted_generation: 2,
        minting_generation: 1,
        relays: vec![relay],
        ..RegionDigest::default()
    };
    let location = Some(Location { latitude: 1.0, longitude: 2.0 });
    let other =
        RegionDigest { region: "far".into(), number: 2, cloud: "stratus".into(), location, ..RegionDigest::default() };
    FleetStatusResponse {
        regions: vec![
            RegionStatus {
                digest: Some(own),
                local: true,
                workers: vec![worker(4, true), worker(3, false)],
                relays: vec![RelayStatus::default()],
                ..RegionStatus::default()
            },
            RegionStatus { digest: Some(other), digest_age_ms: silent_ms, ..RegionStatus::default() },
        ],
        rotation_held_up_by: vec!["worker w".into()],
        ..FleetStatusResponse::default()
    }
}

fn observed(silent_ms: u32) -> Observed {
    Observed {
        number: Some(1),
        routers: deployment(2, 2),
        relays: deployment(2, 2),
        view: View { status: Some(Arc::new(fleet(silent_ms))), connected: true, ..View::default() },
        ..Observed::default()
    }
}

fn far(number: u16, cloud: &str) -> Arc<VoiceRegion> {
    region("far", |region| {
        region["spec"]["number"] = number.into();
        region["spec"]["cloud"] = cloud.into();
        region["spec"]["cluster"] = "other".into();
        region["spec"]["router"] = json!({"addresses": ["far.example:7444"]});
    })
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn status(region: &VoiceRegion, observed: &Observed) -> VoiceRegionStatus {
    let regions = [("a".to_owned(), Arc::new(region.clone())), ("far".to_owned(), far(2, "stratus"))].into();
    built(region, &regions, observed, at(100))
}

/// Status and reason of a condition.
fn said<'a>(status: &'a VoiceRegionStatus, type_: &str) -> (&'a str, &'a str) {
    let condition = status.conditions.iter().find(|condition| condition.type_ == type_).unwrap();
    (&condition.status, &condition.reason)
}

#[test]
fn a_region_that_serves_says_how_much() {
    let status = status(&region("a", |_| {}), &observed(0));
    assert_eq!((status.relays, status.routers, status.workers), (2, 2, 1));
    assert_eq!((status.sessions, status.free_slots), (7, 5), "calls of all, slots of those that take new ones");
    assert_eq!(status.relay_addresses, ["192.0.2.1:4433"]);
    assert_eq!(status.observed_generation, Some(3));
    let keys = status.keys.clone().unwrap();
    assert_eq!((keys.wanted, keys.minting, keys.held_up_by), (2, 1, vec!["worker w".to_owned()]));
    for (type_, expected) in
        [("Ready", "True"), ("Progressing", "False"), ("Consistent", "True"), ("Degraded", "False")]
    {
        assert_eq!(said(&status, type_).0, expected, "{type_}");
    }
}

#[test]
fn what_keeps_it_from_serving_is_named() {
    let plain = region("a", |_| {});
    let with = |change: fn(&mut Observed)| {
        let mut observed = observed(0);
        change(&mut observed);
        said(&status(&plain, &observed), "Ready").1.to_owned()
    };
    assert_eq!(with(|observed| observed.problems.push(Problem::grave("AddressUnknown", "x"))), "AddressUnknown");
    assert_eq!(with(|observed| observed.problems.push(Problem::minor("StoreInMemory", "x"))), "Serving");
    assert_eq!(with(|observed| observed.routers = deployment(2, 0)), "RoutersNotReady");
    assert_eq!(with(|observed| observed.relays = None), "RelaysNotReady");
    assert_eq!(with(|observed| observed.view.connected = false), "RoutersUnreachable");
    assert_eq!(with(|observed| observed.workers_left = Some(3)), "Draining");
    let cordoned = region("a", |region| region["spec"]["serving"] = "Cordoned".into());
    let status = status(&cordoned, &observed(0));
    assert_eq!((said(&status, "Ready"), status.phase), (("True", "Cordoned"), Some(RegionPhase::Cordoned)));
}

#[test]
fn a_forbidden_pod_says_what_it_needs() {
    let mut observed = observed(0);
    let mut relays = Deployment::clone(observed.relays.as_ref().unwrap());
    relays.status.as_mut().unwrap().conditions = serde_json::from_value(json!([{"type": "ReplicaFailure", "status": "True",
        "reason": "FailedCreate", "message": "pods \"r\" is forbidden: violates PodSecurity \"restricted:latest\": hostPort"}]))
    .unwrap();
    observed.relays = Some(Arc::new(relays));
    let status = status(&region("a", |_| {}), &observed);
    assert_eq!(said(&status, "Degraded"), ("True", "PodsForbidden"));
    let condition = status.conditions.iter().find(|condition| condition.type_ == "Degraded").unwrap();
    assert!(condition.message.contains("need a namespace where"), "{}", condition.message);
}

#[test]
fn a_silent_peer_is_said_once_and_not_at_every_second() {
    let plain = region("a", |_| {});
    let first = status(&plain, &observed(40_000));
    assert_eq!(first.peers[0].silent_since, Some(Time(at(60))));
    assert_eq!(said(&first, "Degraded"), ("True", "PeersSilent"));
    let again = region("a", |region| region["status"] = serde_json::to_value(&first).unwrap());
    let regions = [("far".to_owned(), far(2, "stratus"))].into();
    assert_eq!(built(&again, &regions, &observed(50_000), at(111)), first);
}

#[test]
fn clusters_that_say_different_things_of_a_region_are_found() {
    let plain = region("a", |_| {});
    let regions = [("far".to_owned(), far(3, "nimbus"))].into();
    let status = built(&plain, &regions, &observed(0), at(100));
    assert_eq!(status.peers[0].contradictions, ["number: 2 there, 3 here", "cloud: stratus there, nimbus here"]);
    assert_eq!(said(&status, "Consistent"), ("False", "Contradiction"));
    let status = built(&plain, &BTreeMap::new(), &observed(0), at(100));
    assert_eq!(status.peers[0].contradictions, ["this cluster has no VoiceRegion of this name"]);
    // What was never heard contradicts nothing.
    let status = built(&plain, &regions, &observed(NEVER), at(100));
    assert!(status.peers[0].contradictions.is_empty() && status.peers[0].silent_since.is_none());
}

#[test]
fn a_peer_is_what_is_heard_of_it() {
    let known = fleet(1_000).regions[1].clone();
    let status = peer(&far(2, "stratus"), Some(&known), true, at(100));
    assert_eq!((status.phase, status.number), (Some(RegionPhase::Peer), Some(2)));
    assert_eq!(said(&status, "Ready"), ("True", "Heard"));
    let silent = RegionStatus { digest_age_ms: 30_000, ..known.clone() };
    let first = peer(&far(2, "stratus"), Some(&silent), true, at(100));
    assert_eq!(said(&first, "Ready"), ("False", "Silent"));
    let mut later = VoiceRegion::clone(&far(2, "stratus"));
    later.status = Some(first.clone());
    let silent = RegionStatus { digest_age_ms: 90_000, ..known.clone() };
    assert_eq!(peer(&later, Some(&silent), true, at(160)), first);
    let never = RegionStatus { digest_age_ms: NEVER, ..known };
    assert_eq!(said(&peer(&far(2, "stratus"), Some(&never), true, at(100)), "Ready"), ("False", "NeverHeard"));
    assert_eq!(said(&peer(&far(2, "stratus"), None, false, at(100)), "Ready"), ("Unknown", "NoRouters"));
}

#[test]
fn counts_are_told_from_the_rest() {
    let a = status(&region("a", |_| {}), &observed(0));
    let more = VoiceRegionStatus { sessions: 99, workers: 5, ..a.clone() };
    assert!(differ_in_counts_only(&a, &more));
    assert!(!differ_in_counts_only(&a, &VoiceRegionStatus { relays: 1, ..more }));
}

#[test]
fn an_operator_that_has_just_begun_says_nothing_before_it_has_asked() {
    let told = status(&region("a", |_| {}), &observed(0));
    let known = region("a", |region| region["status"] = serde_json::to_value(&told).unwrap());
    let fresh = Observed { view: View::default(), ..observed(0) };
    assert!(fresh.is_premature(&known));
    assert!(!fresh.is_premature(&region("a", |_| {})), "there is nothing to contradict");
    let failed = Observed { view: View { problem: "refused".into(), ..View::default() }, ..fresh.clone() };
    assert!(!failed.is_premature(&known));
    assert!(!Observed { routers: deployment(2, 0), ..fresh }.is_premature(&known));
}
