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
    /// # Errors
    /// It cannot be made or opened, is not this user's alone, or another process has it.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let file_error = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::File { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(file_error(path))?;
        let found = fs::metadata(path).map_err(file_error(path))?;
        let (mode, uid) = (found.mode() & 0o777, found.uid());
        if mode & 0o077 != 0 || uid != rustix::process::geteuid().as_raw() {
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

const LOCK_FILE: &str = "lock";
