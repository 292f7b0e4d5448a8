//! The directory that the relay's state is kept in, and the task that keeps it.

use std::{io, path::Path, sync::Arc, time::Duration};

use antiphon_runtime::private_dir::{OpenError, PrivateDir};
use anyhow::Context as _;
use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use zeroize::Zeroizing;

use super::{Owner, State, decode, encode};
use crate::metrics::Metrics;

/// A relay's private directory, and whose state it holds.
#[derive(Debug)]
pub struct StateDir {
    dir: PrivateDir,
    owner: Owner,
}

impl StateDir {
    /// Makes the directory if it is absent and takes its lock.
    ///
    /// # Errors
    /// It cannot be made or opened, is not this user's alone, or another process has it.
    pub fn open(path: &Path, owner: Owner) -> Result<Self, OpenError> {
        Ok(Self { dir: PrivateDir::open(path)?, owner })
    }

    /// The state that was kept last. What cannot be used is logged and left alone until there is something to replace
    /// it with.
    #[must_use]
    pub fn load(&self) -> Option<State> {
        let refusal = match self.dir.read(STATE_FILE).map(|bytes| bytes.map(Zeroizing::new)) {
            Ok(None) => return None,
            Ok(Some(bytes)) => match decode(&self.owner, &bytes) {
                Ok(state) => return Some(state),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        let path = self.dir.path().join(STATE_FILE);
        tracing::warn!(path = %path.display(), "the state on disk is not used, a router has to answer first: {refusal}");
        None
    }

    /// Replaces the state in one step.
    ///
    /// # Errors
    /// The system's; the earlier state is still there.
    pub fn store(&self, state: &State) -> io::Result<()> {
        self.dir.replace(STATE_FILE, &encode(&self.owner, state))
    }
}

/// Writes the latest state whenever there is a new one, at most once a [`WRITE_INTERVAL`], until nobody has any more to
/// say; the last one is written for sure. A failed write is tried again.
///
/// # Errors
/// The writing thread panicked.
pub async fn keep(
    dir: StateDir,
    mut latest: watch::Receiver<Option<Arc<State>>>,
    metrics: Metrics,
) -> anyhow::Result<()> {
    let dir = Arc::new(dir);
    let mut failing = false;
    while latest.changed().await.is_ok() {
        let Some(state) = latest.borrow_and_update().clone() else { continue };
        let (writer, version) = (dir.clone(), state.known.version);
        match spawn_blocking(move || writer.store(&state)).await.context("writing the state")? {
            Ok(()) => {
                failing = false;
                metrics.state_version.set(version as i64);
            }
            Err(error) => {
                metrics.state_write_errors.inc();
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(path = %dir.dir.path().display(), %error, "the state cannot be kept; trying again");
                }
            }
        }
        let mut others = latest.clone();
        let closed = async { while others.changed().await.is_ok() {} };
        tokio::select! {
            () = sleep(WRITE_INTERVAL) => if failing {
                latest.mark_changed();
            },
            () = closed => {}
        }
    }
    Ok(())
}

/// Shortest time between two writes.
pub const WRITE_INTERVAL: Duration = Duration::from_secs(1);
/// The state's name in its directory.
pub const STATE_FILE: &str = "relay.state";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::{owner, state};
    use prometheus_client::registry::Registry;
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _},
        path::PathBuf,
    };

    /// A directory that is to be made.
    fn absent() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("north/relay-0");
        (parent, path)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_state_is_kept_privately_and_replaced_whole() {
        let (_parent, path) = absent();
        let dir = StateDir::open(&path, owner()).unwrap();
        assert!(dir.load().is_none());
        dir.store(&state(1)).unwrap();
        // What a crash in the middle of a write leaves behind.
        fs::write(path.join(NEW_FILE), "half").unwrap();
        assert_eq!(dir.load().unwrap().known.version, 1);
        dir.store(&state(2)).unwrap();
        assert_eq!(dir.load().unwrap().known.version, 2);
        assert_eq!((mode(&path), mode(&path.join(STATE_FILE))), (0o700, 0o600));
        assert!(!path.join(NEW_FILE).exists());
    }

    #[test]
    fn a_damaged_state_is_left_out_and_replaced_later() {
        let (_parent, path) = absent();
        let dir = StateDir::open(&path, owner()).unwrap();
        fs::write(path.join(STATE_FILE), "antiphon-relay").unwrap();
        assert!(dir.load().is_none());
        dir.store(&state(3)).unwrap();
        assert_eq!(dir.load().unwrap().known.version, 3);
    }

    #[test]
    fn a_directory_has_one_relay_and_nobody_else_looks_in() {
        let (_parent, path) = absent();
        let first = StateDir::open(&path, owner()).unwrap();
        assert!(matches!(StateDir::open(&path, owner()), Err(OpenError::InUse { .. })));
        drop(first);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
        let refused = StateDir::open(&path, owner()).unwrap_err();
        assert!(refused.to_string().contains("has mode 750"), "{refused}");
    }

    #[tokio::test(start_paused = true)]
    async fn bursts_become_one_write_and_the_last_state_is_written_for_sure() {
        let (_parent, path) = absent();
        let dir = StateDir::open(&path, owner()).unwrap();
        let metrics = Metrics::register(&mut Registry::default());
        let (send, latest) = watch::channel(None);
        for version in 1..=50 {
            send.send_replace(Some(Arc::new(state(version))));
        }
        drop(send);
        keep(dir, latest, metrics.clone()).await.unwrap();
        assert_eq!(metrics.state_version.get(), 50);
        let dir = StateDir::open(&path, owner()).unwrap();
        assert_eq!(dir.load().unwrap().known.version, 50);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_write_is_tried_again_and_counted() {
        let (_parent, path) = absent();
        let dir = StateDir::open(&path, owner()).unwrap();
        let obstacle = path.join(NEW_FILE);
        fs::create_dir(&obstacle).unwrap();
        let metrics = Metrics::register(&mut Registry::default());
        let (send, latest) = watch::channel(None);
        send.send_replace(Some(Arc::new(state(4))));
        let counted = metrics.clone();
        let relent = async move {
            while counted.state_write_errors.get() < 2 {
                sleep(WRITE_INTERVAL / 2).await;
            }
            fs::remove_dir(&obstacle).unwrap();
            while counted.state_version.get() != 4 {
                sleep(WRITE_INTERVAL / 2).await;
            }
            drop(send);
        };
        let (kept, ()) = tokio::join!(keep(dir, latest, metrics), relent);
        kept.unwrap();
    }

    /// What a write that was cut off leaves.
    const NEW_FILE: &str = "relay.state.new";
}
