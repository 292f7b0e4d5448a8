//! A directory that one process keeps its state in, and nobody else looks into.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// A directory that this process alone writes to: two writers could take turns in rolling each other back.
#[derive(Debug)]
pub struct PrivateDir {
    path: PathBuf,
    /// Locked for as long as it is open, so until the process ends at the latest.
    _lock: File,
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The system refuses.
    #[error("{}: {source}", path.display())]
    File {
        /// What was opened.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others could read what is kept there, or put something of their own in its place.
    #[error("{} has mode {mode:o} and belongs to user {uid}: it has to be this user's, mode 700, or absent to be made so", path.display())]
    NotPrivate {
        /// Which directory.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// Who owns it.
        uid: u32,
    },
    /// Another process holds the lock.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// Which directory.
        path: PathBuf,
    },
}

impl PrivateDir {
    /// Makes the directory if it is absent (mode 700) and takes its lock.
    ///
    /// The root of a volume that is mounted for this process (an `emptyDir` of Kubernetes) belongs to root and is open
    /// to all who are in the pod: then it is a directory in it, which is the process's own.
    ///
    /// # Errors
    /// It cannot be made or opened, is not this user's alone, or another process has it.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let file_error = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::File { path, source }
        };
        let make = |path: &Path| {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(file_error(path))?;
            let found = fs::metadata(path).map_err(file_error(path))?;
            Ok((found.mode(), found.uid()))
        };
        let us = rustix::process::geteuid().as_raw();
        let (mode, uid) = make(path)?;
        let inside = path.join(INSIDE);
        let (path, mode, uid) = if is_volume(mode, uid, us) {
            let (mode, uid) = make(&inside)?;
            (inside.as_path(), mode, uid)
        } else {
            (path, mode, uid)
        };
        let mode = mode & 0o777;
        if mode & 0o077 != 0 || uid != us {
            return Err(OpenError::NotPrivate { path: path.to_owned(), mode, uid });
        }
        let lock_path = path.join(LOCK_FILE);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(&lock_path).map_err(file_error(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => Err(OpenError::File { path: lock_path, source }),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole of a file; `None` if there is none.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        }
    }

    /// Replaces a file (mode 600) in one step: a crash leaves the one or the other, whole.
    ///
    /// # Errors
    /// The system's; the earlier file is still there.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (path, new) = (self.path.join(name), self.path.join(format!("{name}.new")));
        // A leftover would keep its content or mode.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(&self.path)?.sync_all()
    }
}

/// Whether this is a volume's root that was opened for us: root's, and ours to write to. Where names of others are
/// protected from each other (the sticky bit, `/tmp`), it is a place for everybody instead.
const fn is_volume(mode: u32, owner: u32, us: u32) -> bool {
    owner == 0 && us != 0 && mode & 0o022 != 0 && mode & 0o1000 == 0
}

const LOCK_FILE: &str = "lock";
/// Of a volume.
const INSIDE: &str = "state";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_open_directory_of_root_is_a_volume() {
        const USER: u32 = 65_532;
        for (mode, owner, us, volume) in [
            (0o40777, 0, USER, true),
            // With `fsGroup`.
            (0o42777, 0, USER, true),
            (0o42775, 0, USER, true),
            (0o40755, 0, USER, false),
            (0o41777, 0, USER, false),
            (0o40777, USER, USER, false),
            (0o40777, 1000, USER, false),
            (0o40777, 0, 0, false),
        ] {
            assert_eq!(is_volume(mode, owner, us), volume, "{mode:o} of {owner} for {us}");
        }
    }
}
