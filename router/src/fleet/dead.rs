//! Workers that are known to be gone: positive evidence for relays, which may then tell their clients so with genuine
//! stateless resets (RFC 9000, section 10.3.1).

use std::{collections::VecDeque, time::Duration};

use antiphon_core::clock::Millis;
use antiphon_proto::v1;

/// The newest dead servers, oldest first. Forgotten after [`MEMORY`]; bounded.
#[derive(Debug, Default)]
pub(super) struct Dead {
    entries: VecDeque<Entry>,
    last: u64,
}

/// Who, when, and whether it was of the own region.
pub(super) type Death<'a> = (&'a v1::DeadServer, Millis, bool);

#[derive(Debug)]
struct Entry {
    serial: u64,
    at: Millis,
    /// Of the own region: told to peers, too.
    own: bool,
    server: v1::DeadServer,
}

impl Dead {
    /// Takes a death; one that is known already is not news.
    pub(super) fn insert(&mut self, server: v1::DeadServer, own: bool, now: Millis) -> bool {
        self.forget(now);
        if self.entries.iter().any(|e| e.server.server_id == server.server_id) {
            return false;
        }
        while self.entries.len() >= MAX_DEAD {
            self.entries.pop_front();
        }
        self.last += 1;
        self.entries.push_back(Entry { serial: self.last, at: now, own, server });
        true
    }

    /// All that are not forgotten, oldest first.
    pub(super) fn all(&self) -> impl Iterator<Item = Death<'_>> {
        self.entries.iter().map(|e| (&e.server, e.at, e.own))
    }

    /// It lives after all: who said otherwise was wrong.
    pub(super) fn revive(&mut self, server_id: u64) {
        self.entries.retain(|e| e.server.server_id != server_id);
    }

    /// Those told after `serial`, and the newest serial.
    pub(super) fn since(&self, serial: u64, own_only: bool, now: Millis) -> (Vec<v1::DeadServer>, u64) {
        let news = self.entries.iter().filter(|e| e.serial > serial && now.since(e.at) <= MEMORY);
        let news = news.filter(|e| e.own || !own_only);
        (news.map(|e| e.server.clone()).collect(), self.last)
    }

    fn forget(&mut self, now: Millis) {
        while self.entries.front().is_some_and(|e| now.since(e.at) > MEMORY) {
            self.entries.pop_front();
        }
    }
}

/// A dead server's clients have given up by then.
const MEMORY: Duration = Duration::from_secs(600);
const MAX_DEAD: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn server(server_id: u64) -> v1::DeadServer {
        v1::DeadServer { server_id, reset_keys: vec![] }
    }

    fn ids((servers, _): (Vec<v1::DeadServer>, u64)) -> Vec<u64> {
        servers.iter().map(|s| s.server_id).collect()
    }

    #[test]
    fn each_is_told_once_and_only_own_ones_to_peers() {
        let mut dead = Dead::default();
        assert!(dead.insert(server(1), true, Millis(0)));
        assert!(dead.insert(server(2), false, Millis(0)));
        assert!(!dead.insert(server(1), false, Millis(5)));
        let (first, told) = dead.since(0, false, Millis(5));
        assert_eq!(first.len(), 2);
        assert!(dead.insert(server(3), true, Millis(6)));
        assert_eq!(ids(dead.since(told, false, Millis(6))), [3]);
        assert_eq!(ids(dead.since(0, true, Millis(6))), [1, 3]);
        dead.revive(3);
        assert_eq!(ids(dead.since(0, true, Millis(6))), [1]);
    }

    #[test]
    fn the_oldest_are_forgotten_by_time_and_by_number() {
        let mut dead = Dead::default();
        for n in 0..MAX_DEAD as u64 + 2 {
            assert!(dead.insert(server(n), true, Millis(0)));
        }
        assert_eq!(ids(dead.since(0, false, Millis(0))).first(), Some(&2));
        let later = Millis::default().after(MEMORY + Duration::from_millis(1));
        assert!(ids(dead.since(0, false, later)).is_empty());
        assert!(dead.insert(server(9), true, later));
        assert_eq!(dead.entries.len(), 1);
    }
}
