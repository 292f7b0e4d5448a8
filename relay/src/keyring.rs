//! The relay's keys of all generations in use: what several routers give, as one.
//!
//! Routers of a region may know of a new generation one after the other. A key is used from the first router that gives
//! it on, and let go when every connected router has moved past it: never because one of them is behind.

use std::fmt;

use antiphon_core::{
    cid::{CidCodec, ConfigId},
    id::KeyGeneration,
    keys::RelaySecret,
};

/// Key of the connection IDs of one generation.
#[derive(Clone, PartialEq, Eq)]
pub struct CidKey {
    /// Names it in connection IDs.
    pub config: ConfigId,
    /// Which one.
    pub generation: KeyGeneration,
    /// AES-128.
    pub key: [u8; 16],
}

/// Never shows the key.
impl fmt::Debug for CidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CidKey")
            .field("config", &self.config)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// All keys of a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyring {
    /// For connection IDs, one per configuration.
    pub cid: Vec<CidKey>,
    /// The relay's secrets, one per generation.
    pub secrets: Vec<(KeyGeneration, RelaySecret)>,
    /// Generation to seal frames with; one of `secrets`.
    pub sealing: KeyGeneration,
}

/// Two routers gave different keys under one name: they are of different fleets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another router gave other keys of generation {0}: routers of one region need one fleet root")]
pub struct OtherKeys(pub KeyGeneration);

impl Keyring {
    /// Generations under which both connection IDs and frames can be read, in order.
    #[must_use]
    pub fn loaded(&self) -> Vec<KeyGeneration> {
        let readable = |g: &KeyGeneration| self.cid.iter().any(|c| c.generation == *g);
        let mut loaded: Vec<_> = self.secrets.iter().map(|(g, _)| *g).filter(readable).collect();
        loaded.sort_unstable();
        loaded
    }

    /// The generation that a configuration stands for.
    #[must_use]
    pub fn generation_of(&self, config: ConfigId) -> Option<KeyGeneration> {
        self.cid.iter().find(|c| c.config == config).map(|c| c.generation)
    }

    /// Reads connection IDs of all generations.
    #[must_use]
    pub fn codec(&self) -> CidCodec {
        let mut codec = CidCodec::new();
        for CidKey { config, key, .. } in &self.cid {
            codec.insert(*config, *key);
        }
        codec
    }

    /// Checks that both say the same of what both know.
    ///
    /// # Errors
    /// [`OtherKeys`] with the first generation that differs.
    pub fn agrees_with(&self, other: &Self) -> Result<(), OtherKeys> {
        let differs = |generation| {
            let secret = |ring: &Self| ring.secrets.iter().find(|(g, _)| *g == generation).map(|(_, s)| s.clone());
            let cid = |ring: &Self| ring.cid.iter().find(|c| c.generation == generation).cloned();
            let both = |a: Option<_>, b: Option<_>| a.zip(b).is_some_and(|(a, b)| a != b);
            both(secret(self), secret(other))
                || cid(self).zip(cid(other)).is_some_and(|(a, b): (CidKey, CidKey)| a != b)
        };
        match self.secrets.iter().map(|(g, _)| *g).find(|g| differs(*g)) {
            Some(generation) => Err(OtherKeys(generation)),
            None => Ok(()),
        }
    }

    /// What is to be in force after `self`, when the connected routers' last words are `offered`, the latest first.
    ///
    /// What is newer than the oldest that any of them gives stays, given or not. The generation to seal with never goes
    /// back.
    #[must_use]
    pub fn after(self, offered: &[&Self]) -> Self {
        let Some(oldest) = offered.iter().filter_map(|ring| ring.oldest()).min() else {
            return self;
        };
        let sealing = offered.iter().map(|ring| ring.sealing).max().unwrap_or(self.sealing);
        let rings = offered.iter().copied().chain([&self]);
        let (mut cid, mut secrets) = (Vec::<CidKey>::new(), Vec::<(KeyGeneration, RelaySecret)>::new());
        for ring in rings {
            for key in ring.cid.iter().filter(|c| c.generation >= oldest) {
                match cid.iter_mut().find(|c| c.config == key.config) {
                    Some(held) if held.generation < key.generation => *held = key.clone(),
                    Some(_) => {}
                    None => cid.push(key.clone()),
                }
            }
            for (generation, secret) in ring.secrets.iter().filter(|(g, _)| *g >= oldest) {
                if secrets.iter().all(|(g, _)| g != generation) {
                    secrets.push((*generation, secret.clone()));
                }
            }
        }
        cid.sort_unstable_by_key(|c| c.generation);
        secrets.sort_unstable_by_key(|(g, _)| *g);
        let sealing = if secrets.iter().any(|(g, _)| *g == self.sealing) { sealing.max(self.sealing) } else { sealing };
        Self { cid, secrets, sealing }
    }

    fn oldest(&self) -> Option<KeyGeneration> {
        self.secrets.iter().map(|(g, _)| *g).min()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn generation(n: u32) -> KeyGeneration {
        KeyGeneration::new(n).unwrap()
    }

    /// Keys of these generations as every router of one fleet derives them.
    pub(crate) fn ring(generations: &[u32], sealing: u32) -> Keyring {
        let cid = |n: &u32| CidKey {
            config: ConfigId::new((n % 7) as u8).unwrap(),
            generation: generation(*n),
            key: [*n as u8; 16],
        };
        let secret = |n: &u32| (generation(*n), RelaySecret::from_bytes([*n as u8; 32]));
        Keyring {
            cid: generations.iter().map(cid).collect(),
            secrets: generations.iter().map(secret).collect(),
            sealing: generation(sealing),
        }
    }

    fn after(held: Keyring, offered: &[Keyring]) -> (Vec<u32>, u32) {
        let offered: Vec<_> = offered.iter().collect();
        let ring = held.after(&offered);
        assert!(ring.secrets.iter().any(|(g, _)| *g == ring.sealing));
        (ring.loaded().iter().map(|g| g.value()).collect(), ring.sealing.value())
    }

    #[test]
    fn a_rotation_loads_then_seals_then_lets_go() {
        assert_eq!(after(ring(&[1], 1), &[ring(&[1, 2], 1)]), (vec![1, 2], 1));
        assert_eq!(after(ring(&[1, 2], 1), &[ring(&[1, 2], 2)]), (vec![1, 2], 2));
        assert_eq!(after(ring(&[1, 2], 2), &[ring(&[2], 2)]), (vec![2], 2));
    }

    #[test]
    fn a_router_that_is_behind_takes_nothing_back() {
        assert_eq!(after(ring(&[1, 2], 2), &[ring(&[1], 1)]), (vec![1, 2], 2));
        assert_eq!(after(ring(&[1, 2], 2), &[ring(&[1], 1), ring(&[2, 3], 2)]), (vec![1, 2, 3], 2));
        assert_eq!(after(ring(&[1, 2, 3], 3), &[ring(&[2, 3], 3), ring(&[3], 3)]), (vec![2, 3], 3));
        assert_eq!(after(ring(&[1, 2], 1), &[]), (vec![1, 2], 1));
    }

    #[test]
    fn a_configuration_is_its_newest_generations() {
        assert_eq!(after(ring(&[1], 1), &[ring(&[1, 8], 8)]), (vec![8], 8));
        assert_eq!(ring(&[8], 8).generation_of(ConfigId::new(1).unwrap()), Some(generation(8)));
    }

    #[test]
    fn only_what_can_be_read_counts_as_loaded() {
        let mut ring = ring(&[1, 2, 3], 1);
        ring.cid.remove(1);
        ring.secrets.remove(2);
        assert_eq!(ring.loaded(), [generation(1)]);
        assert!(!format!("{ring:?}").contains("[1, 1, 1"));
    }

    #[test]
    fn routers_of_different_fleets_are_told_apart() {
        assert_eq!(ring(&[1, 2], 1).agrees_with(&ring(&[2, 3], 2)), Ok(()));
        let mut other = ring(&[2, 3], 2);
        other.cid[0].key = [9; 16];
        assert_eq!(ring(&[1, 2], 1).agrees_with(&other), Err(OtherKeys(generation(2))));
        let mut other = ring(&[2], 2);
        other.secrets[0].1 = RelaySecret::from_bytes([9; 32]);
        assert_eq!(ring(&[1, 2], 1).agrees_with(&other), Err(OtherKeys(generation(2))));
    }
}
