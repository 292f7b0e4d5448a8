use antiphon_proto::v1::{RegionDigest, RegionStatus};
use antiphon_runtime::pki::FleetCa;
use tempfile::TempDir;

use super::*;
use crate::stand_in::{NOBODY, Told, context, with_router};

fn region(name: &str, wanted: u32, minting: u32) -> RegionKeys {
    let loaded = (minting..=wanted).collect();
    RegionKeys { region: name.into(), wanted, loaded, minting, oldest: minting, held_up_by: Vec::new() }
}

#[test]
fn a_new_generation_waits_until_all_use_the_last_one() {
    for (regions, expected) in [
        (vec![region("a", 0, 0), region("b", 1, 1)], Next::Begin(2)),
        (vec![region("a", 4, 4), region("b", 4, 4)], Next::Begin(5)),
        (vec![region("a", 4, 4), region("b", 4, 3)], Next::Finish(4)),
        (vec![region("a", 4, 3), region("b", 3, 3)], Next::Finish(4)),
    ] {
        assert_eq!(next(&regions), expected, "{regions:?}");
    }
}

#[test]
fn a_region_speaks_for_itself_before_others_do() {
    let status = |name: &str, local: bool, minting: u32| RegionStatus {
        digest: Some(RegionDigest { region: name.into(), minting_generation: minting, ..RegionDigest::default() }),
        local,
        ..RegionStatus::default()
    };
    let answer = |regions: Vec<RegionStatus>, held: &str| FleetStatusResponse {
        regions,
        rotation_held_up_by: vec![held.into()],
        ..FleetStatusResponse::default()
    };
    let answers = [
        ("b".into(), answer(vec![status("a", false, 1), status("b", true, 3), status("c", false, 2)], "b's worker")),
        ("a".into(), answer(vec![status("a", true, 2), status("b", false, 1)], "a's relay")),
    ];
    let found = regions(&answers);
    let found: Vec<_> = found.iter().map(|r| (r.region.as_str(), r.minting, r.held_up_by.join(""))).collect();
    assert_eq!(found, [("a", 2, "a's relay".into()), ("b", 3, "b's worker".into()), ("c", 2, String::new())]);
}

#[test]
fn each_step_is_said_once_and_waiting_says_for_whom() {
    let mut before = vec![region("a", 2, 1)];
    before[0].loaded = vec![1];
    let mut loaded = before.clone();
    loaded[0].loaded = vec![1, 2];
    let mut minting = loaded.clone();
    minting[0].minting = 2;
    let mut unused = minting.clone();
    unused[0].oldest = 0;
    assert_eq!(changes(&before, &loaded, 2), ["a has loaded generation 2"]);
    assert_eq!(changes(&loaded, &loaded, 2), [""; 0]);
    assert_eq!(changes(&loaded, &minting, 2), ["a uses generation 2 for everything new"]);
    assert_eq!(changes(&minting, &unused, 2), ["a uses nothing older than generation 2"]);
    assert_eq!(changes(&[], &before, 2), [""; 0]);
    before[0].held_up_by = vec!["worker w: has not loaded generation 2".into()];
    let text = waiting(&before, &Failed::default(), 2);
    assert_eq!(text, "generation 2: a waits for worker w: has not loaded generation 2");
}

#[test]
fn unknown_figures_are_dashes_and_absent_from_json() {
    let row = region("a", 3, 2).row();
    assert_eq!(row, ["a", "3", "2, 3", "2", "2", "-"]);
    let idle = RegionKeys { region: "b".into(), ..RegionKeys::default() };
    assert_eq!(idle.row(), ["b", "-", "-", "-", "-", "-"]);
    assert_eq!(idle.json()["oldestInUse"], Value::Null);
}

fn saved(dir: &TempDir, ca: &FleetCa, addresses: &[String]) {
    let text = serde_json::to_string(&context(dir, ca, addresses)).unwrap();
    std::fs::write(dir.path().join("fleet.json"), text).unwrap();
}

fn args(no_wait: bool, patience: Duration) -> RotateArgs {
    RotateArgs { no_wait, until: RotateUntil::Unused, patience: Some(patience) }
}

fn waiting_for(patience: Duration) -> GenerationsArgs {
    GenerationsArgs { wait: true, patience }
}

#[test]
fn nothing_is_finished_while_something_waits() {
    let mut there = vec![region("a", 2, 2)];
    assert!(is_finished(&there, 2));
    there[0].held_up_by = vec!["still uses generation 1".into()];
    assert!(!is_finished(&there, 2));
    assert!(!is_finished(&[region("a", 2, 1)], 2));
}

#[test]
fn a_generation_too_many_names_who_uses_the_oldest() {
    let mut regions = vec![region("a", 3, 3), region("b", 3, 3)];
    assert_eq!(users_of_too_old(&regions, 4), None);
    regions[1].oldest = 2;
    assert_eq!(users_of_too_old(&regions, 4), None, "three are there at a time");
    regions[1].oldest = 1;
    assert_eq!(users_of_too_old(&regions, 4).as_deref(), Some("b still uses generation 1"));
}

#[test]
fn who_may_be_gone_is_said_how_to_take_out() {
    let mut held = vec![region("a", 2, 1), region("b", 2, 1)];
    for (cause, expected) in [
        ("b: has not loaded generation 2", false),
        ("w-7: still uses generation 1", false),
        ("w-7: has not loaded generation 2", true),
        ("relay-0: is not heard", true),
    ] {
        held[0].held_up_by = vec![cause.into()];
        assert_eq!(gone_hint(&held).is_some(), expected, "{cause}");
    }
}

#[tokio::test]
async fn routers_without_a_record_have_no_keys_to_rotate() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), FleetCa::from_seed(&[3; 32]).unwrap());
    with_router(&ca, Told::without_record(), async |address| {
        saved(&dir, &ca, &[address]);
        let rotated = rotate(&args(false, Duration::ZERO), dir.path(), true).await;
        let shown = generations(&waiting_for(Duration::ZERO), dir.path(), true).await;
        for error in [rotated, shown].map(|ended| ended.unwrap_err().to_string()) {
            assert!(error.contains("(region-0: waits for its region record)"), "{error}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_rotation_ends_when_the_region_is_there_and_the_next_one_goes_further() {
    let (dir, ca, told) = (tempfile::tempdir().unwrap(), FleetCa::from_seed(&[3; 32]).unwrap(), Told::default());
    with_router(&ca, told.clone(), async |address| {
        saved(&dir, &ca, &[address]);
        for expected in [2, 3] {
            let ended = rotate(&args(false, Duration::from_secs(60)), dir.path(), true).await.unwrap();
            assert_eq!((ended, told.wanted()), (ExitCode::SUCCESS, expected));
        }
        assert_eq!(
            generations(&waiting_for(Duration::from_secs(60)), dir.path(), false).await.unwrap(),
            ExitCode::SUCCESS
        );
    })
    .await;
}

#[tokio::test]
async fn one_that_is_held_up_fails_after_patience_and_is_gone_on_with() {
    let (dir, ca, told) = (tempfile::tempdir().unwrap(), FleetCa::from_seed(&[3; 32]).unwrap(), Told::stuck());
    with_router(&ca, told.clone(), async |address| {
        saved(&dir, &ca, &[address]);
        for _ in 0..2 {
            let ended = rotate(&args(false, Duration::ZERO), dir.path(), false).await.unwrap();
            assert_eq!((ended, told.wanted()), (ExitCode::FAILURE, 2));
        }
        assert_eq!(rotate(&args(true, Duration::ZERO), dir.path(), false).await.unwrap(), ExitCode::SUCCESS);
    })
    .await;
}

#[tokio::test]
async fn nothing_is_begun_while_a_router_is_away() {
    let (dir, ca, told) = (tempfile::tempdir().unwrap(), FleetCa::from_seed(&[3; 32]).unwrap(), Told::default());
    with_router(&ca, told.clone(), async |address| {
        saved(&dir, &ca, &[address, NOBODY.into()]);
        let error = rotate(&args(false, Duration::ZERO), dir.path(), false).await.unwrap_err().to_string();
        assert!(error.starts_with("nothing was changed") && error.contains("region-1"), "{error}");
        assert_eq!(told.wanted(), 0);
        assert_eq!(
            generations(&GenerationsArgs { wait: false, patience: Duration::ZERO }, dir.path(), true).await.unwrap(),
            ExitCode::FAILURE
        );
    })
    .await;
}
