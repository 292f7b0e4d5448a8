//! Stateless resets (RFC 9000, section 10.3) in the name of workers that are proven dead.
//!
//! Their clients learn within a round trip what they would otherwise learn by silence. Who sent the trigger is unproven,
//! so a reset is always smaller than it, and each thread sends a bounded number of them.

use std::fmt;

use antiphon_core::{cid::SessionCid, clock::Millis};
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::{Rng as _, RngCore as _, rngs::StdRng};
use sha2::Sha256;

/// Key of one dead shard's resets for connection IDs of one generation. Never shown.
#[derive(Clone)]
pub struct ResetKey(Hmac<Sha256>);

impl ResetKey {
    /// Takes what a router handed out.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        Self(Hmac::new_from_slice(key).expect("any length is a key of HMAC"))
    }

    /// The token that the worker gave its client with this connection ID: the first half of HMAC-SHA256 over it.
    #[must_use]
    pub fn token(&self, cid: &[u8; SessionCid::LEN]) -> [u8; TOKEN] {
        let mac = self.0.clone().chain_update(cid).finalize().into_bytes();
        let mut token = [0; TOKEN];
        token.copy_from_slice(&mac[..TOKEN]);
        token
    }
}

impl fmt::Debug for ResetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResetKey(redacted)")
    }
}

/// Makes resets, not too many.
#[derive(Debug)]
pub struct Resets {
    random: StdRng,
    per_second: u32,
    /// Thousandths of resets that may be sent.
    tokens: u64,
    filled: Millis,
}

impl Resets {
    /// At most `per_second` in the long run, and as many at once. `random` has to be seeded unpredictably.
    #[must_use]
    pub fn new(per_second: u32, random: StdRng) -> Self {
        Self { random, per_second, tokens: u64::from(per_second) * 1000, filled: Millis(0) }
    }

    /// Writes the reset that answers a short-header packet of `trigger` bytes to `out`, and gives its length, always
    /// less than `trigger`: 21 to 63 bytes. `None` when the trigger is too short or the rate is used up.
    pub fn answer(
        &mut self,
        now: Millis,
        key: &ResetKey,
        cid: &[u8; SessionCid::LEN],
        trigger: usize,
        out: &mut [u8; MAX_RESET],
    ) -> Option<usize> {
        let longest = trigger.checked_sub(1).filter(|longest| *longest >= MIN_RESET)?.min(MAX_RESET);
        self.take(now)?;
        // Lengths vary, where there is room, above what tells a reset from the shortest packets.
        let len = if longest > USUAL_RESET { self.random.random_range(USUAL_RESET..=longest) } else { longest };
        let (noise, token) = out[..len].split_at_mut(len - TOKEN);
        self.random.fill_bytes(noise);
        // Looks like a short header: 01, then anything.
        noise[0] = FIXED_BIT | noise[0] & 0x3f;
        token.copy_from_slice(&key.token(cid));
        Some(len)
    }

    fn take(&mut self, now: Millis) -> Option<()> {
        let full = u64::from(self.per_second) * 1000;
        let filled = now.0.saturating_sub(self.filled.0).saturating_mul(self.per_second.into());
        self.tokens = self.tokens.saturating_add(filled).min(full);
        self.filled = self.filled.max(now);
        self.tokens = self.tokens.checked_sub(1000)?;
        Some(())
    }
}

/// Bytes of the token.
pub const TOKEN: usize = 16;
/// Shorter ones are no resets (RFC 9000, section 10.3).
pub const MIN_RESET: usize = 21;
/// Longest that is sent.
pub const MAX_RESET: usize = 63;
/// A short header with a connection ID of 20 bytes, a packet number, and the token.
const USUAL_RESET: usize = 41;
const FIXED_BIT: u8 = 0x40;

#[cfg(test)]
mod tests;
