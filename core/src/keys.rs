//! The derivation tree of every key in the fleet.
//!
//! All keys derive from one root of 32 random bytes that the platform puts into every cluster (invariant I11), so that
//! regions agree on keys without talking to each other. Each key is HKDF-SHA256 (RFC 5869) without a salt; `info` is
//! `label || 0x00 || context`. Numbers are in network byte order; texts are preceded by their length in 8 bytes.
//!
//! ```text
//! fleet root (32)
//! ├─ antiphon/1 cid         generation (4)                                -> AES-128 key of connection IDs (16)
//! ├─ antiphon/1 relay       relay number (2), generation (4)              -> relay secret (32)
//! │  ├─ antiphon/1 tunnel   server ID (8)                                 -> up (16) || down (16)
//! │  └─ antiphon/1 hop      number of the next relay (2)                  -> up (16) || down (16)
//! ├─ antiphon/1 reset       server ID (8), generation (4)                 -> stateless reset key (32)
//! ├─ antiphon/1 checkpoint  namespace (text), zone (text), generation (4) -> checkpoint key (32)
//! ├─ antiphon/1 ticket      generation (4)                                -> Ed25519 seed of tickets (32)
//! └─ antiphon/1 ca          -                                             -> Ed25519 seed of the issuer (32)
//! ```
//!
//! A relay holds its own secret and nothing above it: one that is taken over reveals the tunnels that it was an end of,
//! no other relay's. The relay of the worker's region is given the hop keys that it shares, not what they derive from. A worker holds the tunnel keys of its own shards.

use std::fmt;

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize as _, ZeroizeOnDrop};

use crate::id::{KeyGeneration, RelayNumber, ServerId};

/// Why a fleet root cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not 64 digits.
    #[error("fleet root has {0} characters: expected 64 hex digits (32 bytes)")]
    Length(usize),
    /// A character that is no hex digit; never shown, as it may be part of a secret.
    #[error("fleet root is not hex: expected 64 digits of 0-9 and a-f")]
    NotHex,
    /// All bytes are zero: a placeholder, not a key.
    #[error("fleet root is all zeros: draw 32 random bytes")]
    Zero,
}

/// The secret that every other key derives from. Wiped when dropped, never shown.
#[derive(Clone, ZeroizeOnDrop)]
pub struct FleetRoot([u8; 32]);

impl FleetRoot {
    /// Takes 32 bytes from a secure random source.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads 64 hex digits; white space around them (a file's last newline) is ignored.
    ///
    /// # Errors
    /// [`KeyError`]; never repeats what was given.
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        let text = text.trim();
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|error| match error {
            hex::FromHexError::InvalidHexCharacter { .. } => KeyError::NotHex,
            hex::FromHexError::OddLength | hex::FromHexError::InvalidStringLength => {
                KeyError::Length(text.chars().count())
            }
        })?;
        if bytes == [0; 32] {
            return Err(KeyError::Zero);
        }
        Ok(Self(bytes))
    }

    /// Key of connection IDs.
    #[must_use]
    pub fn cid_key(&self, generation: KeyGeneration) -> [u8; 16] {
        derive(&self.0, CID, &[&be(generation)])
    }

    /// What one relay gets; it derives its tunnel keys from it.
    #[must_use]
    pub fn relay_secret(&self, relay: RelayNumber, generation: KeyGeneration) -> RelaySecret {
        let relay = relay.value().to_be_bytes();
        RelaySecret(derive(&self.0, RELAY, &[&relay, &be(generation)]))
    }

    /// Key of a shard's stateless resets (RFC 9000, section 10.3).
    #[must_use]
    pub fn reset_key(&self, server_id: ServerId, generation: KeyGeneration) -> [u8; 32] {
        derive(&self.0, RESET, &[&server_id.to_bytes(), &be(generation)])
    }

    /// Key of checkpoints of one namespace in one residency zone.
    #[must_use]
    pub fn checkpoint_key(&self, namespace: &str, zone: &str, generation: KeyGeneration) -> [u8; 32] {
        let context: [&[u8]; 5] =
            [&length(namespace), namespace.as_bytes(), &length(zone), zone.as_bytes(), &be(generation)];
        derive(&self.0, CHECKPOINT, &context)
    }

    /// Ed25519 seed of the key that signs tickets.
    #[must_use]
    pub fn ticket_seed(&self, generation: KeyGeneration) -> [u8; 32] {
        derive(&self.0, TICKET, &[&be(generation)])
    }

    /// Ed25519 seed of the fleet's certificate issuer.
    #[must_use]
    pub fn ca_seed(&self) -> [u8; 32] {
        derive(&self.0, CA, &[])
    }
}

impl fmt::Debug for FleetRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FleetRoot(redacted)")
    }
}

/// One relay's secret of one generation. Wiped when dropped, never shown.
#[derive(Clone, PartialEq, Eq, ZeroizeOnDrop)]
pub struct RelaySecret([u8; 32]);

impl RelaySecret {
    /// Takes what a router handed out.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// For handing it to its relay.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The keys that this relay and that shard share.
    #[must_use]
    pub fn tunnel_keys(&self, server_id: ServerId) -> TunnelKeys {
        self.both_ways(TUNNEL, &server_id.to_bytes())
    }

    /// The keys that this relay, on the client's side, and the relay `next`, in the worker's region, share. Those of
    /// the opposite roles derive from the other relay's secret.
    #[must_use]
    pub fn hop_keys(&self, next: RelayNumber) -> TunnelKeys {
        self.both_ways(HOP, &next.value().to_be_bytes())
    }

    fn both_ways(&self, label: &str, far_end: &[u8]) -> TunnelKeys {
        let mut both: [u8; 32] = derive(&self.0, label, &[far_end]);
        let (mut up, mut down) = ([0; 16], [0; 16]);
        up.copy_from_slice(&both[..16]);
        down.copy_from_slice(&both[16..]);
        both.zeroize();
        TunnelKeys { up: TunnelKey(up), down: TunnelKey(down) }
    }
}

impl fmt::Debug for RelaySecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RelaySecret(redacted)")
    }
}

/// The two keys of one tunnel: one per direction, so that no frame can be sent back to its sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelKeys {
    /// Frames from the client's relay, towards the worker.
    pub up: TunnelKey,
    /// Frames to the client's relay, from the worker's side.
    pub down: TunnelKey,
}

/// SipHash key of one direction of a tunnel. Wiped when dropped, never shown.
#[derive(Clone, PartialEq, Eq, ZeroizeOnDrop)]
pub struct TunnelKey([u8; 16]);

impl TunnelKey {
    /// Takes what a router handed out.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// For handing it to the end that it belongs to.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for TunnelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TunnelKey(redacted)")
    }
}

fn derive<const N: usize>(parent: &[u8; 32], label: &str, context: &[&[u8]]) -> [u8; N] {
    const { assert!(N <= 32) }
    let mut info: Vec<&[u8]> = vec![label.as_bytes(), &[0]];
    info.extend(context);
    let mut key = [0; N];
    Hkdf::<Sha256>::new(None, parent).expand_multi_info(&info, &mut key).expect("32 bytes are less than 255 blocks");
    key
}

fn be(generation: KeyGeneration) -> [u8; 4] {
    generation.value().to_be_bytes()
}

fn length(text: &str) -> [u8; 8] {
    (text.len() as u64).to_be_bytes()
}

const CID: &str = "antiphon/1 cid";
const RELAY: &str = "antiphon/1 relay";
const TUNNEL: &str = "antiphon/1 tunnel";
const HOP: &str = "antiphon/1 hop";
const RESET: &str = "antiphon/1 reset";
const CHECKPOINT: &str = "antiphon/1 checkpoint";
const TICKET: &str = "antiphon/1 ticket";
const CA: &str = "antiphon/1 ca";

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> FleetRoot {
        FleetRoot::from_bytes(std::array::from_fn(|i| i as u8))
    }

    fn generation(value: u32) -> KeyGeneration {
        KeyGeneration::new(value).unwrap()
    }

    /// Frozen: every region and every process has to derive the same. Computed with an independent HKDF.
    #[test]
    fn every_label_is_frozen() {
        let root = root();
        let server_id = ServerId::from_u64(0x00c0_01c1_dead_beef);
        let relay = RelayNumber::new(0x00c5).unwrap();
        let secret = root.relay_secret(relay, generation(1));
        let tunnel = secret.tunnel_keys(server_id);
        let hop = secret.hop_keys(RelayNumber::new(0x0180).unwrap());
        let derived = [
            hex::encode(root.cid_key(generation(1))),
            hex::encode(secret.as_bytes()),
            hex::encode(tunnel.up.as_bytes()),
            hex::encode(tunnel.down.as_bytes()),
            hex::encode(hop.up.as_bytes()),
            hex::encode(hop.down.as_bytes()),
            hex::encode(root.reset_key(server_id, generation(1))),
            hex::encode(root.checkpoint_key("support", "eu", generation(1))),
            hex::encode(root.ticket_seed(generation(1))),
            hex::encode(root.ca_seed()),
        ];
        assert_eq!(derived, FROZEN);
    }
    const FROZEN: [&str; 10] = [
        "c3a1e8740f2fc6b709a9904bb0e221d2",
        "b79ff81776dc03dbc081cbc4dd1aa6e1d305c048f405f8df42a5b03759d56b7b",
        "54c61aae04166561131d15efe10b4a56",
        "618d0ddd02fe8e19ba872ef198532713",
        "1c4a927cc4b746eabda7a118019a8158",
        "286faf25bcdf3e7a7c4ac38c8d07f49e",
        "4bbd6324d3853d723f581dd59a78dc0dcadfe89ccb27d14b57439c208a4fd946",
        "8c852c7f26f5070b4c8e0f20930d143c047203ffcf14b0c049a86d6688a1c55a",
        "cad65e724fbcf04e83d71e2c08d05d60c9364c6060a35ef894f3243b5e78ce7d",
        "9ea50cfb8292c5dddbec66693d10d5a02edc823e4decd3256bb5fb449b2d223d",
    ];

    #[test]
    fn contexts_do_not_run_into_each_other() {
        let root = root();
        let key = |namespace, zone| root.checkpoint_key(namespace, zone, generation(1));
        assert_ne!(key("ab", "c"), key("a", "bc"));
        assert_ne!(root.cid_key(generation(1)), root.cid_key(generation(2)));
        let keys = |relay| {
            let secret = root.relay_secret(RelayNumber::new(relay).unwrap(), generation(1));
            secret.tunnel_keys(ServerId::from_u64(1))
        };
        assert_ne!(keys(1), keys(2));
        assert_ne!(keys(1).up, keys(1).down);
        let number = |n| RelayNumber::new(n).unwrap();
        let hop = |from, to| root.relay_secret(number(from), generation(1)).hop_keys(number(to));
        assert_ne!(hop(1, 2), hop(2, 1), "each role has its own");
        assert_ne!(hop(1, 2), hop(1, 3));
    }

    #[test]
    fn a_bad_root_is_refused_without_repeating_it() {
        let text = "0123456789abcdef".repeat(4);
        assert!(FleetRoot::from_hex(&format!("{text}\n")).is_ok());
        assert_eq!(FleetRoot::from_hex(&text[1..]).unwrap_err(), KeyError::Length(63));
        assert_eq!(FleetRoot::from_hex(&text[2..]).unwrap_err(), KeyError::Length(62));
        assert_eq!(FleetRoot::from_hex(&"0".repeat(64)).unwrap_err(), KeyError::Zero);
        let error = FleetRoot::from_hex(&text.replace('f', "g")).unwrap_err();
        assert_eq!(error, KeyError::NotHex);
        assert!(!error.to_string().contains("0123"));
    }

    #[test]
    fn secrets_are_not_shown() {
        let secret = root().relay_secret(RelayNumber::new(1).unwrap(), generation(1));
        let shown = format!("{:?} {secret:?} {:?}", root(), secret.tunnel_keys(ServerId::from_u64(1)));
        assert_eq!(
            shown,
            "FleetRoot(redacted) RelaySecret(redacted) TunnelKeys { up: TunnelKey(redacted), down: TunnelKey(redacted) }"
        );
    }
}
