use std::os::unix::fs::{PermissionsExt as _, symlink};

use tempfile::TempDir;

use super::*;
use crate::pki::{FleetCa, LEAF_LIFETIME, Role};

fn ca() -> FleetCa {
    FleetCa::from_seed(&[7; 32]).unwrap()
}

fn peer(name: &str) -> PeerName {
    PeerName::new(name, Role::Worker, "frankfurt").unwrap()
}

fn issue(ca: &FleetCa, name: &str) -> Identity {
    ca.issue(&peer(name), &[], SystemTime::now()).unwrap()
}

/// An identity of `w-3` on disk, and who follows it.
fn followed() -> (TempDir, Identity, Follower) {
    let dir = tempfile::tempdir().unwrap();
    issue(&ca(), "w-3").save(dir.path()).unwrap();
    let identity = Identity::load(dir.path()).unwrap();
    let follower = Follower::new(&identity).unwrap();
    (dir, identity, follower)
}

/// Replaces a file by one that counts as newer, whatever the resolution of the file system's clock.
fn replace(dir: &Path, name: &str, text: &str, age: u64) {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    let modified = SystemTime::now() + Duration::from_secs(age);
    fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
}

#[test]
fn an_identity_survives_the_disk_and_names_its_process() {
    let (dir, identity, _) = followed();
    assert_eq!(identity.peer(), &peer("w-3"));
    assert_eq!(identity.peer().dns(), "w-3.worker.frankfurt.antiphon.internal");
    let mode = fs::metadata(dir.path().join(KEY_FILE)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let left = identity.not_after().duration_since(SystemTime::now()).unwrap();
    assert!(left <= LEAF_LIFETIME && left > LEAF_LIFETIME - Duration::from_secs(60), "{left:?}");
}

#[test]
fn new_files_are_taken_up_by_every_clone() {
    let (dir, identity, mut follower) = followed();
    let clone = identity.clone();
    let before = identity.certificate();
    assert!(matches!(follower.look(SystemTime::now()), Seen::Nothing));
    let next = issue(&ca(), "w-3");
    next.save(dir.path()).unwrap();
    assert!(matches!(follower.look(SystemTime::now()), Seen::Renewed));
    assert!(clone.certificate() == next.certificate() && clone.certificate() != before);
    assert!(matches!(follower.look(SystemTime::now()), Seen::Nothing));
}

#[test]
fn a_half_written_set_waits_and_is_refused_once_if_it_stays() {
    let (dir, identity, mut follower) = followed();
    let (before, next) = (identity.certificate(), issue(&ca(), "w-3"));
    let now = SystemTime::now();
    replace(dir.path(), CERT_FILE, &next.certificate_pem(), 1);
    assert!(matches!(follower.look(now), Seen::Unfinished), "certificate and key are no pair");
    let Seen::Refused(error) = follower.look(now) else { panic!("not refused") };
    assert!(error.to_string().contains("worker w-3 of frankfurt"), "{error}");
    assert!(matches!(follower.look(now), Seen::Nothing), "said once");
    assert_eq!(identity.certificate(), before);
    replace(dir.path(), KEY_FILE, &next.key_pem()[..40], 2);
    assert!(matches!(follower.look(now), Seen::Unfinished), "half a key");
    replace(dir.path(), KEY_FILE, &next.key_pem(), 3);
    assert!(matches!(follower.look(now), Seen::Renewed));
    assert_eq!(identity.certificate(), next.certificate());
    fs::remove_file(dir.path().join(KEY_FILE)).unwrap();
    assert!(matches!(follower.look(now), Seen::Unfinished));
    assert!(matches!(follower.look(now), Seen::Refused(PkiError::File { .. })));
    assert_eq!(identity.certificate(), next.certificate());
}

#[test]
fn what_names_another_process_or_fleet_or_is_over_is_refused() {
    let stranger = FleetCa::from_seed(&[8; 32]).unwrap();
    let old = ca().issue(&peer("w-3"), &[], SystemTime::now() - 2 * LEAF_LIFETIME).unwrap();
    for (next, why) in [
        (issue(&ca(), "w-4"), "names worker w-4 of frankfurt, not worker w-3 of frankfurt"),
        (issue(&stranger, "w-3"), "the trust anchor is another one"),
        (old, "expired"),
    ] {
        let (dir, identity, mut follower) = followed();
        let before = identity.certificate();
        next.save(dir.path()).unwrap();
        assert!(matches!(follower.look(SystemTime::now()), Seen::Unfinished));
        let Seen::Refused(error) = follower.look(SystemTime::now()) else { panic!("{why}: not refused") };
        assert!(error.to_string().contains(why), "{error}");
        assert_eq!(identity.certificate(), before);
    }
}

#[test]
fn a_swapped_link_is_noticed() {
    let (volume, next) = (tempfile::tempdir().unwrap(), issue(&ca(), "w-3"));
    // As the kubelet lays a Secret out: files link to `..data`, which links to the version in force.
    for (version, identity) in [("..1", &issue(&ca(), "w-3")), ("..2", &next)] {
        identity.save(&volume.path().join(version)).unwrap();
    }
    symlink("..1", volume.path().join("..data")).unwrap();
    for file in [CERT_FILE, KEY_FILE, CA_FILE] {
        symlink(Path::new("..data").join(file), volume.path().join(file)).unwrap();
    }
    let identity = Identity::load(volume.path()).unwrap();
    let mut follower = Follower::new(&identity).unwrap();
    assert!(matches!(follower.look(SystemTime::now()), Seen::Nothing));
    symlink("..2", volume.path().join("..data.next")).unwrap();
    fs::rename(volume.path().join("..data.next"), volume.path().join("..data")).unwrap();
    assert!(matches!(follower.look(SystemTime::now()), Seen::Renewed));
    assert_eq!(identity.certificate(), next.certificate());
}

#[test]
fn metrics_say_how_long_it_lasts() {
    let (dir, identity, mut follower) = followed();
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Expiry(identity)));
    issue(&ca(), "w-3").save(dir.path()).unwrap();
    follower.poll(SystemTime::now());
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} in {text}")).parse::<f64>().unwrap()
    };
    let left = value("antiphon_runtime_certificate_expiry_seconds");
    assert!(left > 29.0 * 86_400.0 && left <= 30.0 * 86_400.0, "{left}");
    assert_eq!(value("antiphon_runtime_certificate_renewals_total"), 1.0);
    assert_eq!(value("antiphon_runtime_certificate_refusals_total"), 0.0);
}

#[test]
fn what_is_missing_or_does_not_fit_is_named_when_it_is_read() {
    let missing = Identity::load(Path::new("/nonexistent")).unwrap_err();
    assert!(missing.to_string().starts_with("/nonexistent/cert.pem: "), "{missing}");
    let dir = tempfile::tempdir().unwrap();
    issue(&ca(), "w-3").save(dir.path()).unwrap();
    fs::write(dir.path().join(KEY_FILE), issue(&ca(), "w-3").key_pem()).unwrap();
    let mixed = Identity::load(dir.path()).unwrap_err().to_string();
    assert!(mixed.starts_with(&dir.path().display().to_string()) && mixed.contains("key"), "{mixed}");
}

#[test]
fn a_key_that_others_can_read_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    issue(&ca(), "w-3").save(dir.path()).unwrap();
    fs::set_permissions(dir.path().join(KEY_FILE), fs::Permissions::from_mode(0o644)).unwrap();
    let exposed = Identity::load(dir.path()).unwrap_err().to_string();
    assert!(exposed.contains("key.pem has mode 644: everybody can read it"), "{exposed}");
}
