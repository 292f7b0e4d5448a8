//! The fleet's keys as a router hands them to a worker: what is loaded, and what is minted with.
//!
//! All of a list is taken or nothing of it, so that connection IDs, their keys and their reset tokens never come from
//! different answers.

use std::sync::Arc;

use antiphon_core::{
    cid::{CidCodec, ConfigId},
    id::KeyGeneration,
};
use antiphon_proto::v1;
use arc_swap::ArcSwap;
use quinn_proto::crypto::{CryptoError, HmacKey};
use ring::hmac;
use subtle::ConstantTimeEq as _;

/// Why a router's keys cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KeysError {
    /// A configuration of connection IDs is out of range or has a key of another length than 16 bytes.
    #[error("connection-ID configuration {0}: 0 to 6 with a key of 16 bytes expected")]
    Config(u32),
    /// Two configurations have the same codepoint, so that IDs of one would be read as the other's.
    #[error("connection-ID configuration {0} is there twice")]
    ConfigTwice(u32),
    /// Not exactly one configuration is for minting.
    #[error("{0} connection-ID configurations are for minting: exactly one expected")]
    Minting(usize),
    /// A ticket key has another length than 32 bytes.
    #[error("ticket keys need 32 bytes")]
    Ticket,
    /// A reset key has another length than 32 bytes.
    #[error("reset keys need 32 bytes")]
    Reset,
    /// Connection IDs of this generation could not be given a reset token.
    #[error("shard {shard} has no reset key of generation {generation}")]
    ResetMissing {
        /// Which shard.
        shard: u32,
        /// Which generation.
        generation: u32,
    },
}

/// One generation's configuration of connection IDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generation {
    pub(crate) number: KeyGeneration,
    pub(crate) config: ConfigId,
    pub(crate) key: [u8; 16],
}

/// Everything but the tunnels' keys, checked.
#[derive(Debug, Clone)]
pub(crate) struct KeySet {
    /// Oldest first, one at least.
    loaded: Vec<Generation>,
    minting: Generation,
    ticket_keys: Vec<[u8; 32]>,
    resets: Vec<v1::ResetKey>,
}

impl KeySet {
    /// Checks what a router said.
    ///
    /// # Errors
    /// [`KeysError`]: then nothing of it is to be used.
    pub(crate) fn new(
        configs: &[v1::CidConfig],
        ticket_keys: &[impl AsRef<[u8]>],
        resets: &[v1::ResetKey],
        shards: u32,
    ) -> Result<Self, KeysError> {
        let (mut loaded, mut minting) = (Vec::<Generation>::new(), Vec::new());
        for config in configs {
            let generation = generation(config).ok_or(KeysError::Config(config.config_id))?;
            if loaded.iter().any(|other| other.config == generation.config) {
                return Err(KeysError::ConfigTwice(config.config_id));
            }
            loaded.push(generation);
            minting.extend(config.minting.then_some(generation));
        }
        let &[minting] = &minting[..] else { return Err(KeysError::Minting(minting.len())) };
        loaded.sort_by_key(|generation| generation.number);
        let ticket_keys: Result<_, _> = ticket_keys.iter().map(|key| key.as_ref().try_into()).collect();
        if resets.iter().any(|reset| reset.key.len() != RESET_KEY) {
            return Err(KeysError::Reset);
        }
        for shard in 0..shards {
            let has = |g: &&Generation| resets.iter().any(|r| (r.shard, r.generation) == (shard, g.number.value()));
            if let Some(without) = loaded.iter().find(|generation| !has(generation)) {
                return Err(KeysError::ResetMissing { shard, generation: without.number.value() });
            }
        }
        Ok(Self { loaded, minting, ticket_keys: ticket_keys.map_err(|_| KeysError::Ticket)?, resets: resets.to_vec() })
    }

    /// Reads connection IDs of every loaded generation.
    pub(crate) fn codec(&self) -> CidCodec {
        let mut codec = CidCodec::new();
        for generation in &self.loaded {
            codec.insert(generation.config, generation.key);
        }
        codec
    }

    /// The generation that new connection IDs are minted with.
    pub(crate) const fn minting(&self) -> Generation {
        self.minting
    }

    /// Oldest first.
    pub(crate) fn generations(&self) -> impl Iterator<Item = KeyGeneration> + '_ {
        self.loaded.iter().map(|generation| generation.number)
    }

    /// How far a rotation has come: minting, newest and oldest generation. It never goes back.
    pub(crate) fn rank(&self) -> impl Ord + use<> {
        let ends = (self.loaded.last().map(|g| g.number), self.loaded.first().map(|g| g.number));
        (self.minting.number, ends)
    }

    /// A generation for which the other one has other keys: no fleet has two. Compared in constant time.
    pub(crate) fn contradiction(&self, other: &Self) -> Option<KeyGeneration> {
        let differs = |ours: &[u8], theirs: &[u8]| !bool::from(ours.ct_eq(theirs));
        let of_loaded = |ours: &Generation| {
            let config = other.loaded.iter().any(|g| g.number == ours.number && differs(&g.key, &ours.key));
            let reset = self.resets.iter().filter(|reset| reset.generation == ours.number.value()).any(|reset| {
                let same = |r: &&v1::ResetKey| (r.shard, r.generation) == (reset.shard, reset.generation);
                other.resets.iter().find(same).is_some_and(|theirs| differs(&theirs.key, &reset.key))
            });
            config || reset
        };
        self.loaded.iter().find(|generation| of_loaded(generation)).map(|generation| generation.number)
    }

    /// The generation of each configuration.
    pub(crate) fn by_config(&self) -> [Option<KeyGeneration>; ConfigId::COUNT] {
        let mut table = [None; ConfigId::COUNT];
        for generation in &self.loaded {
            table[usize::from(generation.config.value())] = Some(generation.number);
        }
        table
    }

    /// Public keys that tickets may be signed with.
    pub(crate) fn ticket_keys(&self) -> Vec<[u8; 32]> {
        self.ticket_keys.clone()
    }

    /// The reset keys of one shard, by configuration.
    pub(crate) fn resets(&self, shard: u32) -> ResetTable {
        let mut table = ResetTable::default();
        for generation in &self.loaded {
            let of = |reset: &&v1::ResetKey| (reset.shard, reset.generation) == (shard, generation.number.value());
            let key = self.resets.iter().find(of).map(|reset| hmac::Key::new(hmac::HMAC_SHA256, &reset.key));
            table.0[usize::from(generation.config.value())] = key;
        }
        table
    }
}

fn generation(config: &v1::CidConfig) -> Option<Generation> {
    Some(Generation {
        number: KeyGeneration::new(config.generation).ok()?,
        config: ConfigId::new(u8::try_from(config.config_id).ok()?).ok()?,
        key: config.key.as_ref().try_into().ok()?,
    })
}

/// Reset keys by the configuration in a connection ID's first octet.
#[derive(Debug, Clone, Default)]
pub(crate) struct ResetTable([Option<hmac::Key>; ConfigId::COUNT]);

/// Makes stateless reset tokens (RFC 9000, section 10.3.2) under the key of the connection ID's own generation, so that
/// a token stays the same whatever is loaded besides.
#[derive(Debug)]
pub(crate) struct ResetKeys {
    table: Arc<ArcSwap<ResetTable>>,
    /// For IDs of no loaded generation: nobody can make that token, and nobody could before.
    stranger: hmac::Key,
}

impl ResetKeys {
    pub(crate) fn new(table: Arc<ArcSwap<ResetTable>>) -> Self {
        let drawn: [u8; RESET_KEY] = rand::random();
        Self { table, stranger: hmac::Key::new(hmac::HMAC_SHA256, &drawn) }
    }

    fn tag(&self, cid: &[u8]) -> hmac::Tag {
        let table = self.table.load();
        let config = cid.first().and_then(|octet| ConfigId::of_first_octet(*octet).ok());
        let key = config.and_then(|config| table.0[usize::from(config.value())].as_ref());
        hmac::sign(key.unwrap_or(&self.stranger), cid)
    }
}

impl HmacKey for ResetKeys {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(self.tag(data).as_ref());
    }

    fn signature_len(&self) -> usize {
        hmac::HMAC_SHA256.digest_algorithm().output_len()
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        if bool::from(self.tag(data).as_ref().ct_eq(signature)) { Ok(()) } else { Err(CryptoError) }
    }
}

const RESET_KEY: usize = 32;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What a router sends for these generations, minting with the one named.
    pub(crate) fn material(generations: &[u32], minting: u32, shards: u32) -> (Vec<v1::CidConfig>, Vec<v1::ResetKey>) {
        let byte = |n: u32| u8::try_from(n).unwrap();
        let config = |n: &u32| v1::CidConfig {
            config_id: n % 7,
            generation: *n,
            key: vec![byte(*n); 16].into(),
            minting: *n == minting,
        };
        let reset = |shard: u32, n: u32| v1::ResetKey {
            shard,
            generation: n,
            key: vec![byte(n) ^ byte(shard) << 4; 32].into(),
        };
        let resets = (0..shards).flat_map(|shard| generations.iter().map(move |n| reset(shard, *n)));
        (generations.iter().map(config).collect(), resets.collect())
    }

    fn set(generations: &[u32], minting: u32) -> KeySet {
        let (configs, resets) = material(generations, minting, 1);
        KeySet::new(&configs, &[[1; 32]], &resets, 1).unwrap()
    }

    fn token(keys: &KeySet, config: u8) -> Vec<u8> {
        let resets = ResetKeys::new(Arc::new(ArcSwap::from_pointee(keys.resets(0))));
        let mut token = vec![0; resets.signature_len()];
        resets.sign(&[config << 5 | 16, 1, 2, 3], &mut token);
        assert!(resets.verify(&[config << 5 | 16, 1, 2, 3], &token).is_ok());
        token
    }

    #[test]
    fn keys_of_another_root_contradict_and_those_of_other_generations_do_not() {
        let present = set(&[7, 8], 7);
        assert_eq!(present.contradiction(&set(&[8, 9], 8)), None);
        assert_eq!(present.contradiction(&set(&[9], 9)), None);
        let number = |n| KeyGeneration::new(n).ok();
        let other = |change: &dyn Fn(&mut Vec<v1::CidConfig>, &mut Vec<v1::ResetKey>)| {
            let (mut configs, mut resets) = material(&[8, 9], 9, 1);
            change(&mut configs, &mut resets);
            present.contradiction(&KeySet::new(&configs, &[[1; 32]], &resets, 1).unwrap())
        };
        assert_eq!(other(&|configs, _| configs[0].key = vec![0; 16].into()), number(8));
        assert_eq!(other(&|configs, _| configs[1].key = vec![0; 16].into()), None, "not one of ours");
        assert_eq!(other(&|_, resets| resets[0].key = vec![0; 32].into()), number(8));
    }

    #[test]
    fn a_token_stays_the_same_whichever_generations_are_loaded() {
        let before = token(&set(&[7, 8], 7), 1);
        assert_eq!(before, token(&set(&[8], 8), 1), "alone");
        assert_eq!(before, token(&set(&[8, 9, 10], 10), 1), "with newer ones");
        assert_ne!(before, token(&set(&[7, 8], 7), 0), "another generation's");
        assert_ne!(token(&set(&[7], 7), 1), before, "not to be had without its key");
    }

    #[test]
    fn a_rotation_goes_one_way() {
        let steps = [set(&[1], 1), set(&[1, 2], 1), set(&[1, 2], 2), set(&[2], 2), set(&[2, 3], 2)];
        assert!(steps.is_sorted_by(|before, after| before.rank() < after.rank()));
    }

    #[test]
    fn what_does_not_fit_together_is_refused_as_a_whole() {
        let refused = |change: &dyn Fn(&mut Vec<v1::CidConfig>, &mut Vec<v1::ResetKey>)| {
            let (mut configs, mut resets) = material(&[1, 2], 1, 2);
            change(&mut configs, &mut resets);
            KeySet::new(&configs, &[[1; 32]], &resets, 2).unwrap_err().to_string()
        };
        assert_eq!(
            refused(&|c, _| c[1].minting = true),
            "2 connection-ID configurations are for minting: exactly one expected"
        );
        assert_eq!(refused(&|c, _| c[1].config_id = 1), "connection-ID configuration 1 is there twice");
        assert_eq!(
            refused(&|c, _| c[0].config_id = 7),
            "connection-ID configuration 7: 0 to 6 with a key of 16 bytes expected"
        );
        assert_eq!(refused(&|_, r| r.truncate(3)), "shard 1 has no reset key of generation 2");
        assert_eq!(refused(&|_, r| r[0].key = vec![0; 31].into()), "reset keys need 32 bytes");
        let (configs, resets) = material(&[1], 1, 1);
        assert_eq!(KeySet::new(&configs, &[[1; 31]], &resets, 1).unwrap_err(), KeysError::Ticket);
    }
}
