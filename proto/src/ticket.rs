//! Tickets: what a router signs and a worker checks before it lets a client in.
//!
//! A ticket is a PASETO `v4.public` token (Ed25519) without a footer. Its message is the JSON of [`TicketClaims`], its
//! implicit assertion is [`IMPLICIT_ASSERTION`], so that a token signed for another purpose never passes as a ticket.
//! A stolen ticket is useless: it names the client's public key, whose possession the client proves to the worker.

use antiphon_core::id::{Epoch, ServerId, SessionId};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

use crate::v1::Codec;

/// What a ticket says. Field names are the JSON names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TicketClaims {
    /// Version of this layout: [`VERSION`].
    pub v: u32,
    /// The session, 26 characters of Crockford base32.
    #[serde(with = "session_text")]
    pub session: SessionId,
    /// Epoch that this ticket admits.
    #[serde(with = "epoch_number")]
    pub epoch: Epoch,
    /// `namespace/name` of the agent.
    pub agent: String,
    /// Region of the worker.
    pub region: String,
    /// The worker's shard that granted the lease, 16 hex digits.
    #[serde(with = "server_id_hex")]
    pub server_id: ServerId,
    /// The client's Ed25519 public key, base64url without padding.
    #[serde(with = "key_base64")]
    pub client_key: [u8; 32],
    /// `opus`, `l16-16k` or `l16-24k`.
    #[serde(with = "codec_text")]
    pub codec: Codec,
    /// Tenant of the API key that asked.
    pub tenant: String,
    /// When it was issued, seconds since the Unix epoch.
    pub iat: u64,
    /// From when on it is void, seconds since the Unix epoch.
    pub exp: u64,
    /// The worker's lease, 16 hex digits (JSON numbers lose the upper bits in many readers).
    #[serde(with = "u64_hex")]
    pub lease: u64,
}

/// Why a ticket is not accepted or cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// It is no ticket of this version at all.
    #[error("malformed ticket: {0}")]
    Malformed(&'static str),
    /// No known key signed it.
    #[error("ticket is not signed by this fleet")]
    Signature,
    /// It was good once, or this clock is ahead.
    #[error("ticket expired {by} s ago: ask for a new one; if it was new, this clock is ahead of the router's")]
    Expired {
        /// Seconds past its end.
        by: u64,
    },
    /// It claims to be issued in the future, by more than [`CLOCK_SKEW_S`].
    #[error("ticket is issued {by} s in the future: this clock is behind the router's, fix time synchronisation")]
    NotYet {
        /// Seconds ahead of `now`.
        by: u64,
    },
}

/// Signs tickets with one generation's key. Making one costs as much as a signature: keep it.
#[derive(Debug)]
pub struct Signer(Ed25519KeyPair);

impl Signer {
    /// From the Ed25519 seed of the fleet's ticket key.
    #[must_use]
    pub fn new(seed: &[u8; 32]) -> Self {
        Self(key_pair(seed))
    }

    /// Signs claims.
    ///
    /// # Errors
    /// [`TicketError::Malformed`] if the claims cannot be written, which means a codec that is not set.
    pub fn sign(&self, claims: &TicketClaims) -> Result<String, TicketError> {
        let mut message = serde_json::to_vec(claims).map_err(|_| TicketError::Malformed("codec is not set"))?;
        let signature = self.0.sign(&authenticated(&message));
        message.extend_from_slice(signature.as_ref());
        let mut token = String::with_capacity(HEADER.len() + message.len().div_ceil(3) * 4);
        token.push_str(HEADER);
        BASE64.encode_string(&message, &mut token);
        Ok(token)
    }
}

/// Signs claims once with the Ed25519 seed of the fleet's ticket key.
///
/// # Errors
/// As [`Signer::sign`].
pub fn sign(claims: &TicketClaims, seed: &[u8; 32]) -> Result<String, TicketError> {
    Signer::new(seed).sign(claims)
}

/// What is signed: pre-authentication encoding (PASETO, section 2.2.1) of header, message, no footer and the implicit
/// assertion.
fn authenticated(message: &[u8]) -> Vec<u8> {
    let pieces = [HEADER.as_bytes(), message, &[], IMPLICIT_ASSERTION];
    let length = |n: usize| (n as u64).to_le_bytes();
    let mut encoded = Vec::with_capacity(8 + pieces.iter().map(|p| 8 + p.len()).sum::<usize>());
    encoded.extend_from_slice(&length(pieces.len()));
    for piece in pieces {
        encoded.extend_from_slice(&length(piece.len()));
        encoded.extend_from_slice(piece);
    }
    encoded
}

/// Checks a ticket against the keys of every accepted generation. Whether the session, lease and server ID are this
/// worker's is the caller's to check.
///
/// # Errors
/// The first of: malformed, signed by no given key, expired, issued in the future.
pub fn verify(token: &str, keys: &[[u8; 32]], now_unix_s: u64) -> Result<TicketClaims, TicketError> {
    if token.len() > MAX_LEN {
        return Err(TicketError::Malformed("longer than any ticket"));
    }
    let no_token = TicketError::Malformed("not a v4.public token");
    // A footer would follow after a dot, which is no base64.
    let body = token.strip_prefix(HEADER).and_then(|body| BASE64.decode(body).ok());
    let body = body.ok_or_else(|| no_token.clone())?;
    let (message, signature) = body.split_last_chunk::<SIGNATURE_LEN>().ok_or(no_token)?;
    // Only what we signed is parsed as JSON; a stranger's bytes stop here.
    let signed = authenticated(message);
    let verifies = |key: &[u8; 32]| UnparsedPublicKey::new(&ED25519, key).verify(&signed, signature).is_ok();
    if !keys.iter().any(verifies) {
        return Err(TicketError::Signature);
    }
    let claims: TicketClaims =
        serde_json::from_slice(message).map_err(|_| TicketError::Malformed("claims of another version"))?;
    if claims.v != VERSION {
        return Err(TicketError::Malformed("claims of another version"));
    }
    if now_unix_s >= claims.exp {
        return Err(TicketError::Expired { by: now_unix_s - claims.exp });
    }
    if claims.iat > now_unix_s.saturating_add(CLOCK_SKEW_S) {
        return Err(TicketError::NotYet { by: claims.iat - now_unix_s });
    }
    Ok(claims)
}

/// The Ed25519 public key of a seed (RFC 8032, section 5.1.5).
#[must_use]
pub fn public_key(seed: &[u8; 32]) -> [u8; 32] {
    key_pair(seed).public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes")
}

fn key_pair(seed: &[u8; 32]) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(seed).expect("every 32 bytes are a seed")
}

/// The name of a codec in JSON, tickets and logs; `None` for the unspecified one.
#[must_use]
pub const fn codec_label(codec: Codec) -> Option<&'static str> {
    match codec {
        Codec::Unspecified => None,
        Codec::Opus => Some("opus"),
        Codec::L1616k => Some("l16-16k"),
        Codec::L1624k => Some("l16-24k"),
    }
}

/// Reverses [`codec_label`].
#[must_use]
pub fn codec_of_label(label: &str) -> Option<Codec> {
    [Codec::Opus, Codec::L1616k, Codec::L1624k].into_iter().find(|codec| codec_label(*codec) == Some(label))
}

/// Version and purpose (PASETO, section 2).
const HEADER: &str = "v4.public.";
/// Of an Ed25519 signature (RFC 8032, section 5.1.6).
const SIGNATURE_LEN: usize = 64;
/// Layout version of [`TicketClaims`].
pub const VERSION: u32 = 1;
/// Bound into every signature, so that tokens of other kinds are not tickets.
pub const IMPLICIT_ASSERTION: &[u8] = b"antiphon/1 ticket";
/// How far a router's clock may run ahead of a worker's.
pub const CLOCK_SKEW_S: u64 = 30;
/// Far above any ticket that [`sign`] makes from names of legal length.
pub const MAX_LEN: usize = 4096;

/// A serde adapter between a type and its text: `$to` writes it, `$from` reads it.
macro_rules! as_text {
    ($module:ident, $type:ty, $to:expr, $from:expr) => {
        mod $module {
            use super::*;
            use serde::{Deserializer, Serializer, de, ser};

            pub(super) fn serialize<S: Serializer>(v: &$type, s: S) -> Result<S::Ok, S::Error> {
                let text: Option<String> = $to(v);
                s.serialize_str(&text.ok_or_else(|| ser::Error::custom("value has no text"))?)
            }

            pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<$type, D::Error> {
                let text = String::deserialize(d)?;
                $from(text.as_str()).ok_or_else(|| de::Error::custom("not the expected text"))
            }
        }
    };
}

as_text!(session_text, SessionId, |v: &SessionId| Some(v.to_string()), |s: &str| s.parse().ok());
as_text!(u64_hex, u64, |v: &u64| Some(format!("{v:016x}")), hex_u64);
as_text!(server_id_hex, ServerId, |v: &ServerId| Some(format!("{:016x}", v.to_u64())), |s: &str| hex_u64(s)
    .map(ServerId::from_u64));
as_text!(codec_text, Codec, |v: &Codec| codec_label(*v).map(str::to_owned), codec_of_label);
as_text!(key_base64, [u8; 32], |v: &[u8; 32]| Some(BASE64.encode(v)), |s: &str| BASE64.decode(s).ok()?.try_into().ok());

mod epoch_number {
    use super::*;
    use serde::{Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(v: &Epoch, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u32(v.value())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Epoch, D::Error> {
        Epoch::new(u32::deserialize(d)?).map_err(de::Error::custom)
    }
}

fn hex_u64(text: &str) -> Option<u64> {
    let plain = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pasetors::{
        Public,
        keys::{AsymmetricPublicKey, AsymmetricSecretKey},
        token::UntrustedToken,
        version4::{PublicToken, V4},
    };
    use proptest::prelude::*;

    const NOW: u64 = 1_800_000_000;

    fn claims() -> TicketClaims {
        TicketClaims {
            v: VERSION,
            session: SessionId::from_bytes([9; 16]),
            epoch: Epoch::FIRST,
            agent: "shop/receptionist".into(),
            region: "frankfurt".into(),
            server_id: ServerId::from_u64(0xfedc_ba98_7654_3210),
            client_key: [3; 32],
            codec: Codec::L1616k,
            tenant: "acme".into(),
            iat: NOW,
            exp: NOW + 30,
            lease: u64::MAX,
        }
    }

    #[test]
    fn a_ticket_carries_its_claims_for_any_accepted_key() {
        let token = sign(&claims(), &[1; 32]).unwrap();
        let keys = [public_key(&[2; 32]), public_key(&[1; 32])];
        assert_eq!(verify(&token, &keys, NOW + 29), Ok(claims()));
    }

    #[test]
    fn the_json_form_is_frozen() {
        let json = serde_json::to_string(&claims()).unwrap();
        assert_eq!(
            json,
            "{\"v\":1,\"session\":\"09144gj289144gj289144gj289\",\"epoch\":1,\
             \"agent\":\"shop/receptionist\",\"region\":\"frankfurt\",\"server_id\":\"fedcba9876543210\",\
             \"client_key\":\"AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM\",\"codec\":\"l16-16k\",\
             \"tenant\":\"acme\",\"iat\":1800000000,\"exp\":1800000030,\"lease\":\"ffffffffffffffff\"}"
        );
    }

    #[test]
    fn each_defect_has_its_error() {
        let keys = [public_key(&[1; 32])];
        let good = sign(&claims(), &[1; 32]).unwrap();
        let forged = sign(&claims(), &[2; 32]).unwrap();
        let newer = sign(&TicketClaims { v: 2, ..claims() }, &[1; 32]).unwrap();
        let version = TicketError::Malformed("claims of another version");
        let no_token = TicketError::Malformed("not a v4.public token");
        let table = [
            (good.as_str(), NOW + 30, TicketError::Expired { by: 0 }),
            (&good, NOW + 90, TicketError::Expired { by: 60 }),
            (&good, NOW - 31, TicketError::NotYet { by: 31 }),
            (&forged, NOW, TicketError::Signature),
            (&newer, NOW, version),
            ("", NOW, no_token.clone()),
            ("v4.local.AAAA", NOW, no_token),
        ];
        for (token, now, expected) in table {
            assert_eq!(verify(token, &keys, now), Err(expected), "{token}");
        }
        assert!(verify(&good, &keys, NOW - 30).is_ok());
        assert_eq!(verify(&good, &[], NOW), Err(TicketError::Signature));
        let long = format!("v4.public.{}", "A".repeat(MAX_LEN));
        assert_eq!(verify(&long, &keys, NOW), Err(TicketError::Malformed("longer than any ticket")));
    }

    fn secret(seed: &[u8; 32]) -> AsymmetricSecretKey<V4> {
        let secret = [*seed, public_key(seed)].concat();
        AsymmetricSecretKey::<V4>::from(&secret).unwrap()
    }

    /// Another implementation of PASETO signs the same bytes and takes ours; signatures of Ed25519 are deterministic.
    #[test]
    fn tickets_are_paseto_v4_public_tokens() {
        let seed = [1; 32];
        let token = sign(&claims(), &seed).unwrap();
        let message = serde_json::to_vec(&claims()).unwrap();
        let theirs = PublicToken::sign(&secret(&seed), &message, None, Some(IMPLICIT_ASSERTION)).unwrap();
        assert_eq!(token, theirs);
        let untrusted = UntrustedToken::<Public, V4>::try_from(token.as_str()).unwrap();
        let key = AsymmetricPublicKey::<V4>::from(&public_key(&seed)).unwrap();
        let trusted = PublicToken::verify(&key, &untrusted, None, Some(IMPLICIT_ASSERTION)).unwrap();
        assert_eq!(trusted.payload().as_bytes(), message);
        let footer = PublicToken::sign(&secret(&seed), &message, Some(b"x"), Some(IMPLICIT_ASSERTION)).unwrap();
        let refused = verify(&footer, &[public_key(&seed)], NOW);
        assert_eq!(refused, Err(TicketError::Malformed("not a v4.public token")));
    }

    #[test]
    fn a_token_signed_for_another_purpose_is_no_ticket() {
        let seed = [1; 32];
        let message = serde_json::to_vec(&claims()).unwrap();
        let token = PublicToken::sign(&secret(&seed), &message, None, Some(b"other")).unwrap();
        assert_eq!(verify(&token, &[public_key(&seed)], NOW), Err(TicketError::Signature));
    }

    #[test]
    fn public_key_matches_rfc_8032() {
        // RFC 8032, section 7.1, test 1.
        let seed: [u8; 32] = [
            0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c, 0xc4, 0x44, 0x49,
            0xc5, 0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae, 0x7f, 0x60,
        ];
        assert_eq!(public_key(&seed)[..4], [0xd7, 0x5a, 0x98, 0x01]);
    }

    proptest! {
        #[test]
        fn any_change_of_a_ticket_is_refused(at in 0_usize..400, flip in 1_u8..128) {
            let keys = [public_key(&[1; 32])];
            let mut token = sign(&claims(), &[1; 32]).unwrap().into_bytes();
            let at = at % token.len();
            token[at] ^= flip;
            if let Ok(text) = String::from_utf8(token) {
                prop_assert!(verify(&text, &keys, NOW).is_err());
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text: String) {
            prop_assert!(verify(&text, &[[7; 32]], NOW).is_err());
        }
    }
}
