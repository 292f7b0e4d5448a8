//! The paths that live sessions use, and what each carried.
//!
//! A path is in here while QUIC takes it for a session's own: it has been validated, or the handshake came by it. Who
//! spoofs a client's address through another relay is on no such path.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;

/// Counts of one path; read by its session.
#[derive(Debug, Default)]
pub(crate) struct PathCount {
    received: AtomicU64,
    sent: AtomicU64,
    /// Configuration of the last connection ID that the client used, plus one.
    config: AtomicU8,
}

impl PathCount {
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Configuration of the connection ID in the last packet.
    pub(crate) fn config(&self) -> Option<u8> {
        self.config.load(Relaxed).checked_sub(1)
    }
}

/// One shard's paths.
#[derive(Debug, Default)]
pub(crate) struct Paths {
    known: Mutex<HashMap<SocketAddr, Known>>,
}

#[derive(Debug, Default)]
struct Known {
    count: Arc<PathCount>,
    /// Connections on it; two of them during a take-over.
    users: u32,
}

impl Paths {
    /// A session uses this path from now on.
    pub(crate) fn enter(&self, path: SocketAddr) -> Arc<PathCount> {
        let mut known = self.known.lock();
        let entry = known.entry(path).or_default();
        entry.users += 1;
        entry.count.clone()
    }

    /// It does so no longer.
    pub(crate) fn leave(&self, path: SocketAddr) {
        let mut known = self.known.lock();
        if let Some(entry) = known.get_mut(&path) {
            entry.users -= 1;
            if entry.users == 0 {
                known.remove(&path);
            }
        }
    }

    /// Counts a datagram of a session's own path; says whether it is one. `config`: of its connection ID.
    pub(crate) fn note_received(&self, path: SocketAddr, config: u8) -> bool {
        let known = self.known.lock();
        let Some(Known { count, .. }) = known.get(&path) else { return false };
        count.received.fetch_add(1, Relaxed);
        count.config.store(config + 1, Relaxed);
        true
    }

    /// Counts what is sent on a session's own path.
    pub(crate) fn note_sent(&self, path: SocketAddr, datagrams: u64) {
        if let Some(Known { count, .. }) = self.known.lock().get(&path) {
            count.sent.fetch_add(datagrams, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_known_for_as_long_as_a_session_uses_it() {
        let (paths, path) = (Paths::default(), "[::1]:5".parse().unwrap());
        assert!(!paths.note_received(path, 1));
        let (first, second) = (paths.enter(path), paths.enter(path));
        assert!(paths.note_received(path, 1));
        paths.note_sent(path, 3);
        paths.leave(path);
        assert!(paths.note_received(path, 2), "the other session is still there");
        paths.leave(path);
        assert!(!paths.note_received(path, 2));
        paths.leave(path);
        assert_eq!((first.received(), second.sent(), first.config()), (2, 3, Some(2)));
    }
}
