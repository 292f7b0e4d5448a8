//! What QUIC did on each connection, as qlog (draft-ietf-quic-qlog-main-schema), for whoever asked for it.
//!
//! One file per connection, named after its session, of bounded size. Written on the shard's own thread: meant for
//! looking at a problem, not for every day.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use antiphon_core::id::{Epoch, SessionId};
use quinn::{QlogConfig, QlogStream};

/// Where qlog files go.
#[derive(Debug)]
pub(crate) struct QlogDir(PathBuf);

impl QlogDir {
    /// Makes the directory if it is absent, for this user alone: the files name clients' addresses.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        Ok(Self(path.to_owned()))
    }

    /// A file for one more connection of this session. `None`, with a line in the log, when there can be none: a call
    /// goes on without.
    pub(crate) fn stream(&self, session: SessionId, epoch: Epoch) -> Option<QlogStream> {
        let file = (0..CONNECTIONS).find_map(|n| self.create(session, n).transpose());
        let file = match file {
            Some(Ok(file)) => file,
            Some(Err(error)) => {
                tracing::warn!(%session, %error, dir = %self.0.display(), "no qlog");
                return None;
            }
            None => return None,
        };
        let mut config = QlogConfig::default();
        config
            .writer(Box::new(Bounded { inner: BufWriter::new(file), left: LARGEST }))
            .title(Some(format!("session {session} epoch {epoch}")));
        config.into_stream()
    }

    /// The file of the session's connection number `n`, unless it is there already.
    fn create(&self, session: SessionId, n: u32) -> io::Result<Option<File>> {
        let name = if n == 0 { format!("{session}.sqlog") } else { format!("{session}-{n}.sqlog") };
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.0.join(name)) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Takes whole records for as long as there is room, and swallows what comes after.
struct Bounded<W> {
    inner: W,
    left: usize,
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.left {
            self.left = 0;
            return Ok(bytes.len());
        }
        let written = self.inner.write(bytes)?;
        self.left -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Bytes of one file: about ten minutes of a call.
const LARGEST: usize = 16 << 20;
/// Files of one session: it has as many attempts to connect.
const CONNECTIONS: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_ends_with_a_whole_record() {
        let mut bounded = Bounded { inner: Vec::new(), left: 10 };
        for record in ["four", "more", "four", "x"] {
            bounded.write_all(record.as_bytes()).unwrap();
        }
        assert_eq!(bounded.inner, b"fourmore");
    }

    #[test]
    fn each_connection_has_a_file_of_its_own_up_to_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let qlog = QlogDir::open(&dir.path().join("qlog")).unwrap();
        let session = SessionId::from_bytes([1; 16]);
        let made = (0..9).filter(|_| qlog.stream(session, Epoch::FIRST).is_some()).count();
        assert_eq!(made, 4);
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path().join("qlog")).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names[0].to_str(), Some(&*format!("{session}-1.sqlog")));
        assert_eq!(names.len(), 4);
    }
}
