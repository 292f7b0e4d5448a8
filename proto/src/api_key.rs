//! API keys: `ak_<id>_<secret>` in Crockford's base32, lower case.
//!
//! The id (12 characters) names the key in records and listings; the secret (32 characters, 160 bits) is shown once, to
//! its owner. Routers store the SHA-256 of the whole text only: with so much entropy a slow hash would protect nothing
//! more.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// A whole API key. Never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

/// The text is no API key. Does not repeat it, as it may be most of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an API key: expected ak_ID_SECRET with 12 and 32 characters of 0-9 and a-z without i, l, o, u")]
pub struct ApiKeyError;

impl ApiKey {
    /// Random bytes that a key is made from.
    pub const RANDOM: usize = 28;

    /// Makes a key from bytes of a secure random source.
    #[must_use]
    pub fn from_random(random: &[u8; Self::RANDOM]) -> Self {
        Self(format!("{PREFIX}{}_{}", base32(&random[..8], ID_CHARS), base32(&random[8..], SECRET_CHARS)))
    }

    /// Checks the form. The text comes from a stranger.
    ///
    /// # Errors
    /// [`ApiKeyError`].
    pub fn parse(text: &str) -> Result<Self, ApiKeyError> {
        let (id, secret) = text.strip_prefix(PREFIX).and_then(|rest| rest.split_once('_')).ok_or(ApiKeyError)?;
        let legal = |part: &str, chars| part.len() == chars && part.bytes().all(|b| BASE32.contains(&b));
        if !legal(id, ID_CHARS) || !legal(secret, SECRET_CHARS) {
            return Err(ApiKeyError);
        }
        Ok(Self(text.to_owned()))
    }

    /// The public part.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0[PREFIX.len()..PREFIX.len() + ID_CHARS]
    }

    /// The whole key, for its owner.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// What routers store.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.0.as_bytes()).into()
    }
}

/// Only the public part.
impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({})", self.id())
    }
}

/// Whether a text is a legal public part.
#[must_use]
pub fn is_id(text: &str) -> bool {
    text.len() == ID_CHARS && text.bytes().all(|b| BASE32.contains(&b))
}

/// The first `chars` digits of the bytes, five bits each.
fn base32(bytes: &[u8], chars: usize) -> String {
    let bit = |i: usize| bytes[i / 8] >> (7 - i % 8) & 1;
    let digit = |at: usize| (0..5).fold(0, |v, i| v << 1 | bit(at * 5 + i));
    (0..chars).map(|at| char::from(BASE32[usize::from(digit(at))])).collect()
}

const PREFIX: &str = "ak_";
const ID_CHARS: usize = 12;
const SECRET_CHARS: usize = 32;
const BASE32: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_has_the_documented_form() {
        let key = ApiKey::from_random(&std::array::from_fn(|i| i as u8 * 9));
        assert_eq!(key.text(), "ak_004h46s45mv3_918nmrvcenz8f44smanv9fe6szce3tqk");
        assert_eq!(key.id(), "004h46s45mv3");
        assert_eq!(format!("{key:?}"), "ApiKey(004h46s45mv3)");
        assert_eq!(ApiKey::parse(key.text()), Ok(key));
    }

    #[test]
    fn other_texts_are_refused() {
        let good = "ak_004h46s45mv3_918nmrvcenz8f44smanv9fe6szce3tqk";
        assert!(ApiKey::parse(good).is_ok());
        for bad in ["", "ak_", "ak__", &good[1..], &good[..47], &good.to_uppercase(), &good.replace('h', "u")] {
            assert_eq!(ApiKey::parse(bad), Err(ApiKeyError), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_random_makes_a_legal_key(random: [u8; ApiKey::RANDOM]) {
            let key = ApiKey::from_random(&random);
            prop_assert!(is_id(key.id()));
            prop_assert_eq!(ApiKey::parse(key.text()), Ok(key));
        }

        #[test]
        fn arbitrary_text_never_panics(text: String) {
            prop_assert!(ApiKey::parse(&text).is_err());
        }
    }
}
