//! Identifiers as types that cannot be mixed up.
//!
//! The numbers that travel in connection IDs have the widths of the design's invariant I1: region 10 bits, worker
//! 16 bits, shard 6 bits and a random incarnation of 32 bits, together one 64-bit server ID.

use std::{fmt, str::FromStr};

/// Why a number or a text is not a valid identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The value does not fit the identifier's width.
    #[error("{what} {value} is out of range 0..={max}")]
    OutOfRange {
        /// Which identifier.
        what: &'static str,
        /// The value given.
        value: u64,
        /// The largest legal value.
        max: u64,
    },
    /// The text is not the identifier's canonical form.
    #[error("{text:?} is not a {what}: expected {expected}")]
    Malformed {
        /// Which identifier.
        what: &'static str,
        /// The text given, cut to 64 characters.
        text: String,
        /// The form that was expected.
        expected: &'static str,
    },
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($repr:ty), max $max:expr, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($repr);

        impl $name {
            /// The largest legal value.
            pub const MAX: $repr = $max;

            /// Checks the range.
            ///
            /// # Errors
            /// [`IdError::OutOfRange`] when `value` exceeds [`Self::MAX`].
            pub fn new(value: $repr) -> Result<Self, IdError> {
                if value > Self::MAX {
                    return Err(IdError::OutOfRange { what: $what, value: value.into(), max: Self::MAX.into() });
                }
                Ok(Self(value))
            }

            /// The plain number.
            #[must_use]
            pub const fn value(self) -> $repr {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($what, " {}"), self.0)
            }
        }
    };
}

number! {
    /// A region of the fleet, 10 bits. Unique in the fleet.
    RegionNumber(u16), max 0x3ff, "region"
}
number! {
    /// A worker within its region, 16 bits. Reused only with a new [`Incarnation`].
    WorkerNumber(u16), max u16::MAX, "worker"
}
number! {
    /// One QUIC endpoint (one UDP port, one core) of a worker, 6 bits.
    ShardNumber(u8), max 0x3f, "shard"
}
number! {
    /// Random number drawn by a worker process when it starts; tells a successor from its predecessor.
    Incarnation(u32), max u32::MAX, "incarnation"
}
number! {
    /// A relay in the fleet, 16 bits: region (10) and index within the region (6).
    ///
    /// It travels in the tunnel header and, at the worker, in the flow-info field of the path's address.
    RelayNumber(u16), max u16::MAX, "relay"
}
number! {
    /// Ownership counter of a session, issued by the session's client in order (invariant I6). The first is 1.
    Epoch(u32), max u32::MAX, "epoch"
}
number! {
    /// Generation of a key: the current one and its neighbours are accepted side by side during a rotation.
    KeyGeneration(u32), max u32::MAX, "key generation"
}

impl Epoch {
    /// The epoch of a new session.
    pub const FIRST: Self = Self(1);

    /// The epoch after this one, or `None` when the counter is exhausted.
    #[must_use]
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl RelayNumber {
    /// Relays that one region can number.
    pub const PER_REGION: u16 = 64;

    /// Builds the fleet-wide number of the region's relay `index` (0..=63).
    ///
    /// # Errors
    /// [`IdError::OutOfRange`] when `index` does not fit 6 bits.
    pub fn of_region(region: RegionNumber, index: u8) -> Result<Self, IdError> {
        if u16::from(index) >= Self::PER_REGION {
            return Err(IdError::OutOfRange { what: "relay index", value: index.into(), max: 63 });
        }
        Ok(Self(region.0 << 6 | u16::from(index)))
    }

    /// The region that numbered this relay.
    #[must_use]
    pub const fn region(self) -> RegionNumber {
        RegionNumber(self.0 >> 6)
    }

    /// The relay's index within its region, 0..=63.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "masked to 6 bits")]
    pub const fn index(self) -> u8 {
        (self.0 & 0x3f) as u8
    }
}

/// Names one incarnation of one shard of one worker; the server ID inside every connection ID (invariant I1).
///
/// As 8 bytes in network order: region (10 bits), worker (16), shard (6), incarnation (32).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServerId {
    /// Region of the worker.
    pub region: RegionNumber,
    /// Worker within the region.
    pub worker: WorkerNumber,
    /// Endpoint within the worker.
    pub shard: ShardNumber,
    /// Which life of the worker process.
    pub incarnation: Incarnation,
}

impl ServerId {
    /// Bytes that a server ID takes in a connection ID.
    pub const LEN: usize = 8;

    /// The 64-bit form, region in the top bits.
    #[must_use]
    pub const fn to_u64(self) -> u64 {
        (self.region.0 as u64) << 54
            | (self.worker.0 as u64) << 38
            | (self.shard.0 as u64) << 32
            | self.incarnation.0 as u64
    }

    /// Every 64-bit value is a syntactically valid server ID; whether it is alive only a route table knows.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "each field is masked to its width")]
    pub const fn from_u64(v: u64) -> Self {
        Self {
            region: RegionNumber((v >> 54) as u16),
            worker: WorkerNumber((v >> 38) as u16),
            shard: ShardNumber((v >> 32) as u8 & 0x3f),
            incarnation: Incarnation(v as u32),
        }
    }

    /// Network byte order, as inside a connection ID.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; Self::LEN] {
        self.to_u64().to_be_bytes()
    }

    /// Reverses [`Self::to_bytes`].
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self::from_u64(u64::from_be_bytes(bytes))
    }
}

/// `region.worker.shard#incarnation`, the incarnation in hex.
impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}#{:08x}", self.region, self.worker, self.shard, self.incarnation.0)
    }
}

/// Alphabet of Crockford's base32, lower case: no `i`, `l`, `o`, `u`.
const BASE32: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const SESSION_ID_CHARS: usize = 26;

/// Names a session for its whole life, whoever owns it. 128 random bits; 26 characters of Crockford base32.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId([u8; 16]);

impl SessionId {
    /// Takes 16 bytes that the caller drew from a secure random source.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = u128::from_be_bytes(self.0);
        for i in (0..SESSION_ID_CHARS).rev() {
            let digit = (v >> (5 * i)) & 31;
            write!(f, "{}", char::from(BASE32[usize::try_from(digit).unwrap_or(0)]))?;
        }
        Ok(())
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SessionId {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, IdError> {
        let malformed = || IdError::Malformed {
            what: "session id",
            text: s.chars().take(64).collect(),
            expected: "26 characters of Crockford base32",
        };
        if s.len() != SESSION_ID_CHARS {
            return Err(malformed());
        }
        let mut v: u128 = 0;
        for (i, c) in s.bytes().enumerate() {
            let digit = BASE32.iter().position(|b| *b == c.to_ascii_lowercase()).ok_or_else(malformed)?;
            // 26 * 5 = 130 bits: the first character carries only three.
            if i == 0 && digit > 7 {
                return Err(malformed());
            }
            v = v << 5 | digit as u128;
        }
        Ok(Self(v.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn server_id_has_the_documented_layout() {
        let id = ServerId {
            region: RegionNumber::new(0x3ff).unwrap(),
            worker: WorkerNumber::new(0x0102).unwrap(),
            shard: ShardNumber::new(0x2a).unwrap(),
            incarnation: Incarnation::new(0xdead_beef).unwrap(),
        };
        assert_eq!(hex::encode(id.to_bytes()), "ffc040aadeadbeef");
        assert_eq!(id.to_string(), "1023.258.42#deadbeef");
    }

    #[test]
    fn numbers_refuse_what_does_not_fit() {
        assert_eq!(RegionNumber::new(1024).unwrap_err().to_string(), "region 1024 is out of range 0..=1023");
        assert!(ShardNumber::new(64).is_err());
        assert!(RelayNumber::of_region(RegionNumber::new(1).unwrap(), 64).is_err());
    }

    #[test]
    fn relay_number_names_its_region() {
        let r = RelayNumber::of_region(RegionNumber::new(700).unwrap(), 63).unwrap();
        assert_eq!((r.region().value(), r.index()), (700, 63));
    }

    #[test]
    fn session_id_text_is_strict() {
        let id = SessionId::from_bytes([0xff; 16]);
        assert_eq!(id.to_string(), "7zzzzzzzzzzzzzzzzzzzzzzzzz");
        assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        for bad in ["", "8zzzzzzzzzzzzzzzzzzzzzzzzz", "7zzzzzzzzzzzzzzzzzzzzzzzzu", "7zzzz"] {
            assert!(bad.parse::<SessionId>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn ids_round_trip(v: u64, s: [u8; 16]) {
            prop_assert_eq!(ServerId::from_u64(v).to_u64(), v);
            prop_assert_eq!(ServerId::from_bytes(v.to_be_bytes()).to_bytes(), v.to_be_bytes());
            let id = SessionId::from_bytes(s);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }
    }
}
