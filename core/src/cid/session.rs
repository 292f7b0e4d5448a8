//! The one shape that Antiphon mints: 17 octets, a server ID of 8 and a nonce of 8 in one AES block.
//!
//! The nonce, from the top bit: kind (2 bits), expiry (22 bits), counter (40 bits).
//!
//! Limits: a shard's incarnation mints 2^40 connection IDs before its counter repeats (a thousand a second for 34
//! years). Expiry is coarse and wraps after 48.5 days, which only says that a stale first connection ID reaches its
//! worker again; the worker knows which ones are unspent.

use std::fmt;

use super::{CidError, Config, ConfigId, ConfigSet, Decoded, LENGTH_MASK, write_hex};
use crate::id::ServerId;

/// A connection ID of Antiphon's own layout.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionCid([u8; Self::LEN]);

impl SessionCid {
    /// Octets of a connection ID.
    pub const LEN: usize = 1 + ServerId::LEN + SessionNonce::LEN;

    /// Any octets can be taken; whether they name somebody shows when they are decoded.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The octets as they travel.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl TryFrom<&[u8]> for SessionCid {
    type Error = CidError;

    fn try_from(bytes: &[u8]) -> Result<Self, CidError> {
        let wrong_length = |_| CidError::SessionLength(bytes.len());
        bytes.try_into().map(Self).map_err(wrong_length)
    }
}

impl fmt::Display for SessionCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for SessionCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

/// What a connection ID is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// Of a live connection, issued by the worker's QUIC endpoint.
    Connection,
    /// A client's first destination ID: single use, given out with a lease, expires.
    Initial,
}

/// The worker's part of a connection ID; unique for the incarnation that minted it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionNonce(u64);

impl SessionNonce {
    /// Octets of a nonce.
    pub const LEN: usize = 8;

    /// For a live connection. The counter is cut to 40 bits.
    #[must_use]
    pub const fn connection(counter: u64) -> Self {
        Self(KIND_CONNECTION << KIND_SHIFT | counter & COUNTER_MASK)
    }

    /// For a client's first packet, good until `expires_at`, in Unix seconds. The counter is cut to 40 bits.
    #[must_use]
    pub const fn initial(expires_at: u64, counter: u64) -> Self {
        let expiry = (expires_at & EXPIRY_MASK) << EXPIRY_SHIFT;
        Self(KIND_INITIAL << KIND_SHIFT | expiry | counter & COUNTER_MASK)
    }

    /// Takes a decrypted nonce, forged ones included.
    #[must_use]
    pub const fn from_u64(value: u64) -> Self {
        Self(value)
    }

    /// All 64 bits; for an initial one they name the attempt at its worker.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }

    /// What the connection ID is for; `None` for the two kinds that nobody mints.
    #[must_use]
    pub const fn kind(self) -> Option<Kind> {
        match self.0 >> KIND_SHIFT {
            KIND_CONNECTION => Some(Kind::Connection),
            KIND_INITIAL => Some(Kind::Initial),
            _ => None,
        }
    }

    /// Whether an initial one is past its time at `now`, in Unix seconds.
    ///
    /// Expiry travels modulo 2^22 seconds, so "valid" means: it ends within the next [`EXPIRY_WINDOW_S`] seconds.
    /// Anything else, also an end further ahead, is expired.
    #[must_use]
    pub const fn is_expired(self, now: u64) -> bool {
        let expiry = self.0 >> EXPIRY_SHIFT & EXPIRY_MASK;
        expiry.wrapping_sub(now) & EXPIRY_MASK > EXPIRY_WINDOW_S
    }
}

impl fmt::Debug for SessionNonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What a [`SessionCid`] says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DecodedSessionCid {
    /// The configuration that it was made under.
    pub config: ConfigId,
    /// Which shard's which life.
    pub server_id: ServerId,
    /// The worker's part.
    pub nonce: SessionNonce,
}

/// Decodes Antiphon's own layout under every configuration that the fleet uses at a time.
#[derive(Clone, Debug, Default)]
pub struct CidCodec {
    configs: ConfigSet,
}

impl CidCodec {
    /// A codec that decodes nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a configuration, or replaces the one with the same codepoint.
    pub fn insert(&mut self, id: ConfigId, key: [u8; 16]) {
        self.configs.insert(session_config(id, key));
    }

    /// Takes a configuration out; says whether it was there.
    pub fn remove(&mut self, id: ConfigId) -> bool {
        self.configs.remove(id).is_some()
    }

    /// Whether no configuration is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.configs.iter().next().is_none()
    }

    /// Takes a connection ID apart and says what is wrong with it.
    ///
    /// # Errors
    /// Those of [`ConfigSet::decode`].
    pub fn decode(&self, cid: &SessionCid) -> Result<DecodedSessionCid, CidError> {
        let decoded = self.decode_whole(&cid.0)?;
        let (server_id, nonce) = split(&decoded);
        Ok(DecodedSessionCid {
            config: decoded.config(),
            server_id: ServerId::from_u64(server_id),
            nonce: SessionNonce(nonce),
        })
    }

    /// The same for a packet's path: `(server ID, nonce)` of the 17 octets, or nothing.
    #[must_use]
    pub fn decode_u64(&self, cid: &[u8; SessionCid::LEN]) -> Option<(u64, u64)> {
        self.decode_whole(cid).ok().as_ref().map(split)
    }

    /// No octets of the server's own follow: the encoded length is exact.
    fn decode_whole(&self, cid: &[u8; SessionCid::LEN]) -> Result<Decoded, CidError> {
        let decoded = self.configs.decode(cid)?;
        let (encoded, needed) = (usize::from(cid[0] & LENGTH_MASK), SessionCid::LEN - 1);
        if encoded != needed {
            return Err(CidError::EncodedLength { encoded, needed });
        }
        Ok(decoded)
    }
}

/// Mints the connection IDs of one shard's one life.
#[derive(Clone, Debug)]
pub struct CidMinter {
    server_id: ServerId,
    config: Config,
    counter: NonceCounter,
}

impl CidMinter {
    /// Mints for `server_id` under the configuration `id` with this key. Nobody else may mint for that server ID.
    #[must_use]
    pub fn new(server_id: ServerId, id: ConfigId, key: [u8; 16], counter: NonceCounter) -> Self {
        Self { server_id, config: session_config(id, key), counter }
    }

    /// Whom the connection IDs name.
    #[must_use]
    pub const fn server_id(&self) -> ServerId {
        self.server_id
    }

    /// Goes on under another configuration; the counter continues.
    pub fn rotate(&mut self, id: ConfigId, key: [u8; 16]) {
        self.config = session_config(id, key);
    }

    /// A connection ID for a live connection.
    pub fn mint_connection(&mut self) -> SessionCid {
        let nonce = SessionNonce::connection(self.counter.step());
        self.encode(nonce)
    }

    /// A client's first destination ID, with its nonce: the name of the attempt.
    ///
    /// `expires_at` is in Unix seconds and has to stay below `now` + [`EXPIRY_WINDOW_S`] by more than the fleet's
    /// clocks differ, or relays take it for expired.
    pub fn mint_initial(&mut self, expires_at: u64) -> (SessionCid, SessionNonce) {
        let nonce = SessionNonce::initial(expires_at, self.counter.step());
        (self.encode(nonce), nonce)
    }

    fn encode(&self, nonce: SessionNonce) -> SessionCid {
        let cid = self
            .config
            .encode(&self.server_id.to_bytes(), &nonce.value().to_be_bytes(), 0)
            .expect("the session configuration takes 8 and 8 octets");
        let mut bytes = [0; SessionCid::LEN];
        bytes.copy_from_slice(&cid);
        SessionCid(bytes)
    }
}

/// Counts 40 bits from a random start, so that nonces of successive incarnations do not look alike.
#[derive(Clone, Debug)]
pub struct NonceCounter(u64);

impl NonceCounter {
    /// Starts at the low 40 bits of `start`, drawn at random by the caller.
    #[must_use]
    pub const fn starting_at(start: u64) -> Self {
        Self(start & COUNTER_MASK)
    }

    const fn step(&mut self) -> u64 {
        let current = self.0;
        self.0 = (self.0 + 1) & COUNTER_MASK;
        current
    }
}

fn session_config(id: ConfigId, key: [u8; 16]) -> Config {
    Config::new(id, ServerId::LEN, SessionNonce::LEN, Some(key), true).expect("8 and 8 octets are legal lengths")
}

fn split(decoded: &Decoded) -> (u64, u64) {
    let word = |octets: &[u8]| octets.iter().fold(0, |v, b| v << 8 | u64::from(*b));
    (word(decoded.server_id()), word(decoded.nonce()))
}

/// How far ahead an initial connection ID's expiry may lie, in seconds.
pub const EXPIRY_WINDOW_S: u64 = 600;

const COUNTER_MASK: u64 = (1 << 40) - 1;
const EXPIRY_SHIFT: u32 = 40;
const EXPIRY_MASK: u64 = (1 << 22) - 1;
const KIND_SHIFT: u32 = 62;
const KIND_CONNECTION: u64 = 0;
const KIND_INITIAL: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Incarnation, RegionNumber, ShardNumber, WorkerNumber};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn server_id() -> ServerId {
        ServerId {
            region: RegionNumber::new(3).unwrap(),
            worker: WorkerNumber::new(7).unwrap(),
            shard: ShardNumber::new(1).unwrap(),
            incarnation: Incarnation::new(0xdead_beef).unwrap(),
        }
    }

    fn config(value: u8) -> ConfigId {
        ConfigId::new(value).unwrap()
    }

    fn minter(start: u64) -> CidMinter {
        CidMinter::new(server_id(), config(2), [0x11; 16], NonceCounter::starting_at(start))
    }

    /// Frozen: the layout is on the wire. The blocks were computed with an independent AES.
    #[test]
    fn layout_is_frozen() {
        let mut minter = minter(0x12_3456_789a);
        let (initial, nonce) = minter.mint_initial(1_800_000_000);
        assert_eq!(format!("{nonce:?}"), FROZEN_INITIAL.0);
        assert_eq!(initial.to_string(), FROZEN_INITIAL.1);
        assert_eq!(minter.mint_connection().to_string(), FROZEN_CONNECTION);
    }
    const FROZEN_INITIAL: (&str, &str) = ("49d200123456789a", "50e37afbbb303e8e4beed1ce6b41856885");
    const FROZEN_CONNECTION: &str = "50321e808ee40bb87d8406cce0828668e7";

    #[test]
    fn minted_ids_decode_and_never_repeat() {
        let mut codec = CidCodec::new();
        codec.insert(config(2), [0x11; 16]);
        let mut minter = minter(COUNTER_MASK - 5);
        let mut seen = BTreeSet::new();
        for _ in 0..1000 {
            let (initial, nonce) = minter.mint_initial(1_800_000_000);
            let connection = minter.mint_connection();
            assert!(seen.insert(initial) && seen.insert(connection));
            let decoded = codec.decode(&initial).unwrap();
            assert_eq!((decoded.server_id, decoded.nonce), (server_id(), nonce));
            assert_eq!(nonce.kind(), Some(Kind::Initial));
            let (server, nonce) = codec.decode_u64(connection.as_bytes()).unwrap();
            assert_eq!(server, server_id().to_u64());
            assert_eq!(SessionNonce::from_u64(nonce).kind(), Some(Kind::Connection));
        }
    }

    #[test]
    fn expiry_holds_across_the_wrap() {
        let wrap = 1 << 22;
        for end in [1_800_000_000, 5 * wrap, 5 * wrap + 3] {
            let nonce = SessionNonce::initial(end, 1);
            assert!(!nonce.is_expired(end - EXPIRY_WINDOW_S));
            assert!(!nonce.is_expired(end));
            assert!(nonce.is_expired(end + 1));
            assert!(nonce.is_expired(end - EXPIRY_WINDOW_S - 1));
            assert!(nonce.is_expired(end + wrap / 2));
        }
    }

    #[test]
    fn rotation_keeps_old_ids_until_their_configuration_goes() {
        let mut codec = CidCodec::new();
        codec.insert(config(2), [0x11; 16]);
        let mut minter = minter(1);
        let old = minter.mint_connection();
        minter.rotate(config(3), [0x22; 16]);
        let new = minter.mint_connection();
        assert_eq!(codec.decode(&new), Err(CidError::UnknownConfig(config(3))));
        codec.insert(config(3), [0x22; 16]);
        assert!(codec.decode(&old).is_ok() && codec.decode(&new).is_ok());
        assert!(codec.remove(config(2)));
        assert_eq!(codec.decode_u64(old.as_bytes()), None);
    }

    #[test]
    fn other_lengths_are_no_session_cid() {
        assert!(SessionCid::try_from(&[0; 16][..]).is_err());
        assert!(SessionCid::try_from(&[0; 18][..]).is_err());
        assert!(SessionCid::try_from(&[0; 17][..]).is_ok());
        assert_eq!(SessionNonce::from_u64(u64::MAX).kind(), None);
    }

    proptest! {
        #[test]
        fn arbitrary_octets_decode_alike_on_both_paths(bytes: [u8; 17], key: [u8; 16]) {
            let mut codec = CidCodec::new();
            codec.insert(config(0), key);
            let quick = codec.decode_u64(&bytes);
            let full = codec.decode(&SessionCid::from_bytes(bytes)).ok();
            prop_assert_eq!(quick, full.map(|d| (d.server_id.to_u64(), d.nonce.value())));
        }
    }
}
