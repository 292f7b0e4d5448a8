//! The directory that the snapshot is kept in, and the task that keeps it.

use std::{io, path::Path, sync::Arc, time::Duration};

pub use antiphon_runtime::private_dir::OpenError;
use antiphon_runtime::{Tasks, private_dir::PrivateDir};
use anyhow::Context as _;
use prometheus_client::metrics::counter::Counter;
use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{Owner, Snapshot, decode, encode};

/// A router's private directory, and whose snapshot it holds.
#[derive(Debug)]
pub struct SnapshotDir {
    dir: PrivateDir,
    owner: Owner,
}

/// What was found on disk.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// Nothing has ever been kept here.
    Nothing,
    /// Something that cannot be used; it was logged.
    Unusable,
    /// The snapshot that was kept last.
    Snapshot(Box<Snapshot>),
}

impl SnapshotDir {
    /// Makes the directory if it is absent and takes its lock.
    ///
    /// # Errors
    /// It cannot be made or opened, is not this user's alone, or another process has it.
    pub fn open(path: &Path, owner: Owner) -> Result<Self, OpenError> {
        Ok(Self { dir: PrivateDir::open(path)?, owner })
    }

    /// The snapshot that was kept last. What cannot be used is logged and left alone until there is something to
    /// replace it with.
    #[must_use]
    pub fn load(&self) -> Found {
        let refusal = match self.dir.read(SNAPSHOT_FILE) {
            Ok(None) => return Found::Nothing,
            Ok(Some(bytes)) => match decode(&self.owner, &bytes) {
                Ok(snapshot) => return Found::Snapshot(Box::new(snapshot)),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        let path = self.dir.path().join(SNAPSHOT_FILE);
        tracing::warn!(path = %path.display(), "the snapshot on disk is not used: {refusal}");
        Found::Unusable
    }

    /// Replaces the snapshot in one step.
    ///
    /// # Errors
    /// The system's; the earlier snapshot is still there.
    pub fn store(&self, snapshot: &Snapshot) -> io::Result<()> {
        self.dir.replace(SNAPSHOT_FILE, &encode(&self.owner, snapshot))
    }

    /// Starts to keep what is latest.
    pub(in crate::store) fn keep<T: Send + Sync + 'static>(
        self,
        changes: watch::Receiver<T>,
        latest: impl Fn() -> Option<Snapshot> + Send + 'static,
        errors: Counter,
        tasks: &Tasks,
    ) {
        tasks.spawn("snapshot", keep(self, changes, latest, errors, tasks.stopping()));
    }
}

/// Writes the latest snapshot whenever something has changed, at most once a [`WRITE_INTERVAL`]; what changed before the
/// stop is written for sure. A failed write is tried again.
async fn keep<T>(
    dir: SnapshotDir,
    mut changes: watch::Receiver<T>,
    latest: impl Fn() -> Option<Snapshot>,
    errors: Counter,
    stopping: CancellationToken,
) -> anyhow::Result<()> {
    let dir = Arc::new(dir);
    let mut failing = false;
    loop {
        let last = tokio::select! {
            changed = changes.changed() => changed.is_err(),
            () = stopping.cancelled() => !changes.has_changed().unwrap_or(false),
        };
        changes.mark_unchanged();
        let Some(snapshot) = latest().filter(|_| !last) else {
            return Ok(());
        };
        let writer = Arc::clone(&dir);
        match spawn_blocking(move || writer.store(&snapshot)).await.context("writing the snapshot")? {
            Ok(()) => failing = false,
            Err(error) => {
                errors.inc();
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(path = %dir.dir.path().display(), %error, "the snapshot cannot be kept; trying again");
                }
            }
        }
        if stopping.is_cancelled() && failing {
            return Ok(());
        }
        tokio::select! {
            () = sleep(WRITE_INTERVAL) => if failing {
                changes.mark_changed();
            },
            () = stopping.cancelled() => {}
        }
    }
}

/// Shortest time between two writes.
pub(crate) const WRITE_INTERVAL: Duration = Duration::from_secs(1);
/// The snapshot's name in its directory.
pub(crate) const SNAPSHOT_FILE: &str = "router.snapshot";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::snapshot::tests::{owner, snapshot};
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _},
        path::PathBuf,
    };

    /// A directory that is to be made.
    fn absent() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("north/router-1");
        (parent, path)
    }

    fn revision(dir: &SnapshotDir) -> Option<u64> {
        match dir.load() {
            Found::Snapshot(snapshot) => Some(snapshot.records.revision),
            Found::Nothing | Found::Unusable => None,
        }
    }

    #[test]
    fn a_snapshot_is_kept_privately_and_replaced_whole() {
        let (_parent, path) = absent();
        let dir = SnapshotDir::open(&path, owner()).unwrap();
        assert_eq!(dir.load(), Found::Nothing);
        dir.store(&snapshot(1)).unwrap();
        // What a crash in the middle of a write leaves behind.
        fs::write(path.join(NEW_FILE), "half").unwrap();
        assert_eq!(revision(&dir), Some(1));
        dir.store(&snapshot(2)).unwrap();
        assert_eq!(revision(&dir), Some(2));
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join(SNAPSHOT_FILE))), (0o700, 0o600));
        assert!(!path.join(NEW_FILE).exists());
    }

    #[test]
    fn a_damaged_snapshot_is_left_out_and_replaced_later() {
        let (_parent, path) = absent();
        let dir = SnapshotDir::open(&path, owner()).unwrap();
        fs::write(path.join(SNAPSHOT_FILE), "antiphon-router").unwrap();
        assert_eq!(dir.load(), Found::Unusable);
        dir.store(&snapshot(3)).unwrap();
        assert_eq!(revision(&dir), Some(3));
    }

    #[test]
    fn a_directory_has_one_router_and_nobody_else_looks_in() {
        let (_parent, path) = absent();
        let first = SnapshotDir::open(&path, owner()).unwrap();
        assert!(matches!(SnapshotDir::open(&path, owner()), Err(OpenError::InUse { .. })));
        drop(first);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
        let refused = SnapshotDir::open(&path, owner()).unwrap_err();
        assert!(refused.to_string().contains("has mode 750"), "{refused}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_write_is_tried_again_and_the_last_snapshot_before_the_stop_is_written() {
        let (_parent, path) = absent();
        let dir = SnapshotDir::open(&path, owner()).unwrap();
        let obstacle = path.join(NEW_FILE);
        fs::create_dir(&obstacle).unwrap();
        let (send, changes) = watch::channel(Snapshot::default());
        let read = changes.clone();
        let latest = move || Some(read.borrow().clone());
        let (errors, stop) = (Counter::default(), CancellationToken::new());
        let (counted, stopping) = (errors.clone(), stop.clone());
        send.send_replace(snapshot(4));
        let script = async move {
            while counted.get() < 2 {
                sleep(WRITE_INTERVAL / 2).await;
            }
            fs::remove_dir(&obstacle).unwrap();
            while !path.join(SNAPSHOT_FILE).exists() {
                sleep(WRITE_INTERVAL / 2).await;
            }
            send.send_replace(snapshot(5));
            stop.cancel();
            (path, send)
        };
        let (kept, (path, _send)) = tokio::join!(keep(dir, changes, latest, errors, stopping), script);
        kept.unwrap();
        assert_eq!(revision(&SnapshotDir::open(&path, owner()).unwrap()), Some(5));
    }

    /// What a write that was cut off leaves.
    const NEW_FILE: &str = "router.snapshot.new";
}
