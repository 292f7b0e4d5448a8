//! Connection IDs that name their worker: QUIC-LB (draft-ietf-quic-load-balancers-21) and Antiphon's layout on top.
//!
//! A connection ID is `first octet || server ID || nonce`, the last two encrypted together. The first octet holds the
//! configuration (3 bits) and either the length of the rest or random bits (5 bits). [`Config`] is one configuration of
//! any legal shape, [`ConfigSet`] up to seven side by side during a rotation. [`SessionCid`] is the one shape that
//! Antiphon itself mints: 8 bytes of [`ServerId`](crate::id::ServerId), 8 bytes of [`SessionNonce`], one AES block.
//!
//! The cipher hides which connections share a worker; it does not authenticate. Whoever sees a connection ID can
//! replay it, and any 16 bytes decrypt to *something*: what stops forgery is that the decrypted server ID has to match
//! a live one exactly.

use std::{fmt, ops::Deref};

mod config;
mod feistel;
mod session;
mod set;

pub use config::{Config, Decoded};
pub use session::{
    CidCodec, CidMinter, DecodedSessionCid, EXPIRY_WINDOW_S, Kind, NonceCounter, SessionCid, SessionNonce,
};
pub use set::ConfigSet;

/// Why a configuration, or a connection ID under it, is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CidError {
    /// A configuration ID that does not exist.
    #[error("configuration {0} is out of range 0..=6 (7 marks unroutable connection IDs)")]
    ConfigId(u8),
    /// Server IDs cannot have this length.
    #[error("server ID of {0} octets is out of range 1..=15")]
    ServerIdLength(usize),
    /// Nonces cannot have this length.
    #[error("nonce of {0} octets is out of range 4..=18")]
    NonceLength(usize),
    /// Server ID and nonce do not fit a QUIC version 1 connection ID together.
    #[error("server ID and nonce take {0} octets together: 19 is the most that a connection ID holds")]
    TooLong(usize),
    /// The server ID given has another length than the configuration's.
    #[error("server ID has {actual} octets, the configuration takes {expected}")]
    ServerIdMismatch {
        /// Octets that the configuration takes.
        expected: usize,
        /// Octets given.
        actual: usize,
    },
    /// The nonce given has another length than the configuration's.
    #[error("nonce has {actual} octets, the configuration takes {expected}")]
    NonceMismatch {
        /// Octets that the configuration takes.
        expected: usize,
        /// Octets given.
        actual: usize,
    },
    /// The connection ID says itself that it names no server (draft, section 3.1).
    #[error("connection ID carries the unroutable codepoint 7")]
    Unroutable,
    /// No configuration with this ID is known.
    #[error("no configuration {0} is known")]
    UnknownConfig(ConfigId),
    /// The connection ID was made under another configuration.
    #[error("connection ID is of configuration {actual}, not {expected}")]
    OtherConfig {
        /// The configuration that was asked to decode.
        expected: ConfigId,
        /// The one that the first octet names.
        actual: ConfigId,
    },
    /// Fewer octets than the configuration needs.
    #[error("connection ID has {actual} octets, the configuration needs {needed}")]
    TooShort {
        /// Octets needed, the first one included.
        needed: usize,
        /// Octets given.
        actual: usize,
    },
    /// Not the length that Antiphon mints.
    #[error("connection ID has {0} octets, a session's has 17")]
    SessionLength(usize),
    /// The length in the first octet contradicts the configuration.
    #[error("connection ID encodes {encoded} octets after the first, the configuration needs {needed}")]
    EncodedLength {
        /// Octets that follow, according to the first octet.
        encoded: usize,
        /// Octets that the configuration needs after the first one.
        needed: usize,
    },
}

/// Codepoint of a configuration, 0..=6: the top three bits of the first octet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConfigId(u8);

impl ConfigId {
    /// How many configurations can live side by side.
    pub const COUNT: usize = 7;

    /// The codepoint of connection IDs that name no server (draft, section 3.1).
    pub const UNROUTABLE: u8 = 0b111;

    /// Checks the range.
    ///
    /// # Errors
    /// [`CidError::ConfigId`] unless `value` is 0..=6.
    pub const fn new(value: u8) -> Result<Self, CidError> {
        if value >= Self::UNROUTABLE {
            return Err(CidError::ConfigId(value));
        }
        Ok(Self(value))
    }

    /// Reads the codepoint from a connection ID's first octet.
    ///
    /// # Errors
    /// [`CidError::Unroutable`].
    pub const fn of_first_octet(octet: u8) -> Result<Self, CidError> {
        match octet >> LENGTH_BITS {
            Self::UNROUTABLE => Err(CidError::Unroutable),
            bits => Ok(Self(bits)),
        }
    }

    /// The plain number.
    #[must_use]
    pub const fn value(self) -> u8 {
        self.0
    }
}

impl fmt::Display for ConfigId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for ConfigId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "configuration {}", self.0)
    }
}

/// A connection ID of QUIC version 1: up to 20 octets, held inline.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cid {
    // Octets past `len` are zero, so that the derived comparison is right.
    octets: [u8; MAX_CID_LEN],
    len: u8,
}

impl Cid {
    /// A connection ID that names no server, for one without a configuration (draft, section 3.1).
    ///
    /// `body` follows the first octet and has to look random; its length is self-encoded.
    ///
    /// # Errors
    /// [`CidError::TooLong`] when `body` exceeds 19 octets.
    pub fn unroutable(body: &[u8]) -> Result<Self, CidError> {
        if body.len() > MAX_BODY_LEN {
            return Err(CidError::TooLong(body.len()));
        }
        Ok(Self::assemble(ConfigId::UNROUTABLE, body, body.len() as u8))
    }

    fn assemble(codepoint: u8, body: &[u8], low_bits: u8) -> Self {
        let mut octets = [0; MAX_CID_LEN];
        octets[0] = codepoint << LENGTH_BITS | low_bits & LENGTH_MASK;
        octets[1..=body.len()].copy_from_slice(body);
        Self { octets, len: 1 + body.len() as u8 }
    }
}

impl Deref for Cid {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.octets[..usize::from(self.len)]
    }
}

impl fmt::Display for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, self)
    }
}

impl fmt::Debug for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, self)
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

/// RFC 9000, section 17.2.
const MAX_CID_LEN: usize = 20;
const MAX_BODY_LEN: usize = MAX_CID_LEN - 1;
const LENGTH_BITS: u8 = 5;
const LENGTH_MASK: u8 = 0x1f;
