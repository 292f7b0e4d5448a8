//! Relays of other regions: their keys, and whether they can be heard.
//!
//! Per neighbour relay, never per client, it is known since when it owes an answer. All threads share that, and it
//! survives a change of the table.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use antiphon_core::{
    clock::Millis,
    id::{KeyGeneration, RelayNumber},
    keys::{TunnelKey, TunnelKeys},
    tunnel::KeySlot,
};

/// A relay of another region, as the data path needs it.
#[derive(Clone, Debug)]
pub struct Neighbour {
    /// Its number in the fleet.
    pub number: RelayNumber,
    /// Its tunnel address, in its own family.
    pub address: SocketAddr,
    /// Generation of `key`.
    pub slot: KeySlot,
    /// For frames of this relay's clients to it.
    pub key: TunnelKey,
    /// For frames from it to this relay's clients, every generation.
    pub(crate) returning: Vec<(KeySlot, TunnelKey)>,
    /// For frames of its clients, either way, oldest generation first; empty unless this region is behind its relays.
    pub(crate) theirs: Vec<(KeyGeneration, TunnelKeys)>,
    /// How it is heard.
    pub contact: Arc<Contact>,
}

impl Neighbour {
    /// What to seal frames to its clients with: the newest generation under which it has sent a genuine frame, which it
    /// therefore has, else the oldest.
    #[must_use]
    pub fn sealing_for_its_clients(&self) -> Option<(KeySlot, &TunnelKey)> {
        let proven = self.contact.proven.load(Relaxed);
        let held = self.theirs.iter().find(|(g, _)| u64::from(g.value()) + 1 == proven);
        let (generation, keys) = held.or_else(|| self.theirs.first())?;
        Some((KeySlot::of(*generation), &keys.down))
    }
}

/// What is known of a neighbour from its frames, and from their absence.
#[derive(Debug, Default)]
pub struct Contact {
    /// Milliseconds, plus one, of the first frame to it since it was last heard; zero when it owes nothing.
    owing: AtomicU64,
    /// Milliseconds, plus one, when it was last found silent; zero since it was heard.
    silent: AtomicU64,
    /// Newest generation of its genuine frames, plus one; zero for none.
    proven: AtomicU64,
    /// Milliseconds, plus one, when it last had something told to all workers; zero for never.
    told: AtomicU64,
}

impl Contact {
    /// A frame goes to it.
    pub fn sent(&self, now: Millis) {
        if self.owing.load(Relaxed) == 0 {
            self.owing.store(now.0 + 1, Relaxed);
        }
    }

    /// A genuine frame of it came.
    pub fn heard(&self) {
        for since in [&self.owing, &self.silent] {
            if since.load(Relaxed) != 0 {
                since.store(0, Relaxed);
            }
        }
    }

    /// A genuine frame for its clients' workers came, under its own generation.
    pub fn proved(&self, generation: KeyGeneration) {
        let generation = u64::from(generation.value()) + 1;
        if self.proven.load(Relaxed) < generation {
            self.proven.fetch_max(generation, Relaxed);
        }
    }

    /// It is gone for certain: its port is closed, or it says so.
    pub fn lost(&self, now: Millis) {
        self.silent.store(now.0 + 1, Relaxed);
    }

    /// Whether it may have something told to all workers of the region now: one frame becomes many, so not often.
    pub fn may_tell_all(&self, now: Millis) -> bool {
        let told = self.told.load(Relaxed);
        let may = told == 0 || now.0 + 1 >= told + TELL_INTERVAL_MS;
        may && self.told.compare_exchange(told, now.0 + 1, Relaxed, Relaxed).is_ok()
    }

    /// Whether frames to it stay unanswered, or it is gone.
    #[must_use]
    pub fn is_silent(&self, now: Millis) -> bool {
        let owing = self.owing.load(Relaxed);
        self.silent.load(Relaxed) != 0 || owing != 0 && now.0 + 1 >= owing + SILENCE_MS
    }

    /// Tried anew from now on, whatever was before.
    fn retry(&self) {
        self.owing.store(0, Relaxed);
        self.silent.store(0, Relaxed);
    }
}

/// The ways to a region: any of its relays, one of which is in use until it falls silent.
#[derive(Clone, Debug)]
pub struct Ways {
    /// Positions in the table's list.
    pub(crate) relays: Vec<usize>,
    pub(crate) choice: Arc<Choice>,
}

/// Which relay of a region is in use; shared by all threads and kept when the table changes.
#[derive(Debug, Default)]
pub struct Choice {
    /// Number, plus one; zero for none yet.
    current: AtomicU32,
    /// How often it fell silent and another one was taken.
    switches: AtomicU64,
}

impl Choice {
    /// How often the relay in use fell silent and another one was taken.
    #[must_use]
    pub fn switches(&self) -> u64 {
        self.switches.load(Relaxed)
    }
}

impl Ways {
    /// The relay to send through at `now`; `None` without any.
    ///
    /// The one in use stays so while it is heard. One that falls silent gives way to the next that is not known to be,
    /// else to the one that has been silent for longest: with all of them gone each is tried in turn.
    #[must_use]
    pub fn choose<'t>(&self, neighbours: &'t [Neighbour], now: Millis) -> Option<&'t Neighbour> {
        let relays = || self.relays.iter().map(|at| &neighbours[*at]);
        let chosen = self.choice.current.load(Relaxed);
        let at = relays().position(|n| u32::from(n.number.value()) + 1 == chosen);
        let current = at.and_then(|at| relays().nth(at));
        if let Some(current) = current
            && !current.contact.is_silent(now)
        {
            return Some(current);
        }
        if let Some(current) = current {
            current.contact.lost(now);
        }
        let after = at.map_or(0, |at| at + 1);
        let ring = relays().cycle().skip(after).take(self.relays.len());
        let next = ring.min_by_key(|n| n.contact.silent.load(Relaxed))?;
        if current.is_some_and(|c| c.number != next.number) {
            self.choice.switches.fetch_add(1, Relaxed);
        }
        next.contact.retry();
        self.choice.current.store(u32::from(next.number.value()) + 1, Relaxed);
        Some(next)
    }
}

/// How long a neighbour may owe an answer before another one is tried.
pub const SILENCE: Duration = Duration::from_millis(SILENCE_MS);
const SILENCE_MS: u64 = 250;
/// Less than the time between a relay's notices.
const TELL_INTERVAL_MS: u64 = 100;

#[cfg(test)]
mod tests {
    use super::*;

    fn neighbour(number: u16) -> Neighbour {
        Neighbour {
            number: RelayNumber::new(number).unwrap(),
            address: SocketAddr::from(([127, 0, 0, 1], number)),
            slot: KeySlot::of(KeyGeneration::new(1).unwrap()),
            key: TunnelKey::from_bytes([1; 16]),
            returning: Vec::new(),
            theirs: Vec::new(),
            contact: Arc::default(),
        }
    }

    struct Region {
        neighbours: Vec<Neighbour>,
        ways: Ways,
    }

    impl Region {
        fn of(numbers: &[u16]) -> Self {
            let neighbours: Vec<_> = numbers.iter().map(|n| neighbour(*n)).collect();
            let relays = (0..neighbours.len()).collect();
            Self { neighbours, ways: Ways { relays, choice: Arc::default() } }
        }

        /// Sends one frame and says through whom.
        fn send(&self, ms: u64) -> u16 {
            let chosen = self.ways.choose(&self.neighbours, Millis(ms)).unwrap();
            chosen.contact.sent(Millis(ms));
            chosen.number.value()
        }
    }

    #[test]
    fn the_relay_in_use_stays_while_it_answers() {
        let region = Region::of(&[5, 6, 7]);
        for ms in (0..10_000).step_by(20) {
            assert_eq!(region.send(ms), 5);
            region.neighbours[0].contact.heard();
        }
        assert_eq!(region.ways.choice.switches(), 0);
    }

    #[test]
    fn silence_moves_on_and_all_silent_are_tried_in_turn() {
        let region = Region::of(&[5, 6, 7]);
        let mut through: Vec<u16> = (0..1500).step_by(10).map(|ms| region.send(ms)).collect();
        assert!(through.iter().take_while(|n| **n == 5).count() == 25, "250 ms");
        through.dedup();
        assert_eq!(through, [5, 6, 7, 5, 6, 7]);
        assert_eq!(region.ways.choice.switches(), 5);
        // The one that answers is kept, however the others did.
        region.neighbours[2].contact.heard();
        for ms in (1500..5000).step_by(10) {
            assert_eq!(region.send(ms), 7);
            region.neighbours[2].contact.heard();
        }
    }

    #[test]
    fn nothing_is_owed_for_nothing() {
        let region = Region::of(&[5, 6]);
        assert_eq!(region.send(0), 5);
        region.neighbours[0].contact.heard();
        assert_eq!(region.send(60_000), 5, "nothing was sent meanwhile");
    }

    #[test]
    fn a_closed_port_moves_on_at_once_and_hearing_brings_it_back() {
        let region = Region::of(&[5, 6]);
        assert_eq!(region.send(0), 5);
        region.neighbours[0].contact.lost(Millis(1));
        assert_eq!(region.send(1), 6);
        region.neighbours[0].contact.heard();
        region.neighbours[1].contact.lost(Millis(2));
        assert_eq!(region.send(2), 5);
    }

    #[test]
    fn one_alone_is_used_whatever_happens_and_none_is_no_way() {
        let region = Region::of(&[5]);
        for ms in (0..2000).step_by(50) {
            assert_eq!(region.send(ms), 5);
        }
        assert_eq!(region.ways.choice.switches(), 0);
        let nobody = Region::of(&[]);
        assert!(nobody.ways.choose(&nobody.neighbours, Millis(0)).is_none());
    }

    #[test]
    fn frames_down_are_sealed_with_what_the_neighbour_has_shown_to_have() {
        let mut b = neighbour(5);
        assert!(b.sealing_for_its_clients().is_none());
        let generation = |n| KeyGeneration::new(n).unwrap();
        let keys = |n| TunnelKeys { up: TunnelKey::from_bytes([n; 16]), down: TunnelKey::from_bytes([n + 100; 16]) };
        b.theirs = vec![(generation(1), keys(1)), (generation(2), keys(2))];
        let sealing = |b: &Neighbour| b.sealing_for_its_clients().unwrap().0;
        assert_eq!(sealing(&b), KeySlot::of(generation(1)));
        b.contact.proved(generation(2));
        b.contact.proved(generation(1));
        assert_eq!(sealing(&b), KeySlot::of(generation(2)));
        b.theirs = vec![(generation(3), keys(3))];
        assert_eq!(sealing(&b), KeySlot::of(generation(3)), "what it had shown is gone");
    }
}
