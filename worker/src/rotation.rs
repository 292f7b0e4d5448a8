//! Which key generations this worker's connections still use.
//!
//! New connection IDs are minted with the minting generation. A live connection gets new ones after a lifetime, and
//! QUIC then asks the client to retire the old ones (RFC 9000, section 5.1.2). QUIC does not tell us when that is
//! done, so a connection counts as using an older generation until two things are true: new IDs have been minted under
//! the newer one for [`LIFETIMES`] lifetimes, and the client's packets carry one of them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use antiphon_core::{cid::ConfigId, id::KeyGeneration};
use arc_swap::ArcSwap;

use crate::keys::KeySet;

/// The generations loaded, and since when each has been minted with.
#[derive(Debug)]
pub(crate) struct Rotation {
    lifetime: Duration,
    state: ArcSwap<State>,
}

#[derive(Debug, Clone)]
struct State {
    by_config: [Option<KeyGeneration>; ConfigId::COUNT],
    /// Oldest first, one at least; the last one is minted with now.
    minted: Vec<(KeyGeneration, Instant)>,
}

impl Rotation {
    /// `lifetime` is that of connection IDs.
    pub(crate) fn new(keys: &KeySet, lifetime: Duration, now: Instant) -> Self {
        let state = State { by_config: keys.by_config(), minted: vec![(keys.minting().number, now)] };
        Self { lifetime, state: ArcSwap::from_pointee(state) }
    }

    /// How long a connection ID may be used.
    pub(crate) const fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// Other keys are loaded.
    pub(crate) fn set(&self, keys: &KeySet, now: Instant) {
        let mut state = State::clone(&self.state.load());
        state.by_config = keys.by_config();
        if state.minting() != keys.minting().number {
            state.minted.push((keys.minting().number, now));
            // Three are loaded at a time: older entries can decide nothing any more.
            let surplus = state.minted.len().saturating_sub(ConfigId::COUNT);
            state.minted.drain(..surplus);
        }
        self.state.store(Arc::new(state));
    }

    /// The generation of new connection IDs.
    pub(crate) fn minting(&self) -> KeyGeneration {
        self.state.load().minting()
    }

    /// The generation that a configuration in a connection ID's first octet stands for.
    pub(crate) fn of_config(&self, config: u8) -> Option<KeyGeneration> {
        self.state.load().by_config.get(usize::from(config)).copied().flatten()
    }

    /// The oldest generation that a connection can still use: it began with `began`, its client now uses `used`.
    pub(crate) fn oldest(&self, began: KeyGeneration, used: Option<KeyGeneration>, now: Instant) -> KeyGeneration {
        let state = self.state.load();
        let settled = |since: Instant| now.saturating_duration_since(since) >= self.lifetime * LIFETIMES;
        let gone_over = |(generation, since): &&(KeyGeneration, Instant)| Some(*generation) <= used && settled(*since);
        let reached = state.minted.iter().rev().find(gone_over).map_or(began, |(generation, _)| *generation);
        reached.max(began)
    }
}

impl State {
    fn minting(&self) -> KeyGeneration {
        self.minted.last().expect("begins with one and loses only what is older").0
    }
}

/// After one lifetime every ID of the older generation has expired; one more passes when QUIC was still waiting for an
/// earlier retirement; the third is for what the network delays.
const LIFETIMES: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::tests::material;

    const LIFETIME: Duration = Duration::from_secs(10);

    fn keys(generations: &[u32], minting: u32) -> KeySet {
        let (configs, resets) = material(generations, minting, 1);
        KeySet::new(&configs, &[[1; 32]], &resets, 1).unwrap()
    }

    fn generation(n: u32) -> KeyGeneration {
        KeyGeneration::new(n).unwrap()
    }

    #[test]
    fn a_connection_leaves_a_generation_after_its_ids_have_expired_and_its_client_has_shown_a_newer_one() {
        let start = Instant::now();
        let rotation = Rotation::new(&keys(&[1, 2], 1), LIFETIME, start);
        assert_eq!(rotation.minting(), generation(1));
        rotation.set(&keys(&[1, 2], 2), start + LIFETIME);
        let oldest = |used, after| rotation.oldest(generation(1), Some(generation(used)), start + LIFETIME + after);
        assert_eq!(oldest(2, 2 * LIFETIME), generation(1), "an old one may not be retired yet");
        assert_eq!(oldest(1, 3 * LIFETIME), generation(1), "the client still uses an old one");
        assert_eq!(oldest(2, 3 * LIFETIME), generation(2));
        let late = rotation.oldest(generation(2), None, start + LIFETIME);
        assert_eq!(late, generation(2), "began after the change");
    }

    #[test]
    fn two_rotations_in_a_row_are_left_one_by_one() {
        let start = Instant::now();
        let rotation = Rotation::new(&keys(&[1, 2, 3], 1), LIFETIME, start);
        rotation.set(&keys(&[1, 2, 3], 2), start);
        rotation.set(&keys(&[1, 2, 3], 3), start + 2 * LIFETIME);
        let oldest = |after| rotation.oldest(generation(1), Some(generation(3)), start + after);
        assert_eq!(oldest(2 * LIFETIME), generation(1));
        assert_eq!(oldest(3 * LIFETIME), generation(2));
        assert_eq!(oldest(5 * LIFETIME), generation(3));
    }

    #[test]
    fn a_configuration_stands_for_what_is_loaded() {
        let rotation = Rotation::new(&keys(&[7, 8], 7), LIFETIME, Instant::now());
        assert_eq!((rotation.of_config(0), rotation.of_config(1)), (Some(generation(7)), Some(generation(8))));
        assert_eq!((rotation.of_config(2), rotation.of_config(9)), (None, None));
    }
}
