//! Proof that the one who activates a session holds the key that its ticket is bound to (invariant I6).
//!
//! The client signs a message that contains keying material exported from the very TLS connection (RFC 8446,
//! section 7.5), so a signature seen elsewhere is worth nothing here.

use antiphon_core::id::{Epoch, SessionId};
use quinn::Connection;
use ring::{
    rand::SystemRandom,
    signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey},
};

/// Why there is nothing to sign or the signature does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ActivationError {
    /// The connection's handshake is not complete.
    #[error("the TLS connection exports no keying material yet")]
    NoExporter,
    /// The signature is not by the ticket's key over this connection.
    #[error("signature does not match the ticket's client key on this connection")]
    Signature,
    /// The system's random source failed.
    #[error("no randomness for a client key")]
    NoRandomness,
}

/// A client's Ed25519 key (RFC 8032); its public half is what tickets are bound to.
#[derive(Debug)]
pub struct ClientKey(Ed25519KeyPair);

impl ClientKey {
    /// Draws a fresh key.
    ///
    /// # Errors
    /// [`ActivationError::NoRandomness`].
    pub fn generate() -> Result<Self, ActivationError> {
        let document =
            Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| ActivationError::NoRandomness)?;
        let pair = Ed25519KeyPair::from_pkcs8(document.as_ref()).map_err(|_| ActivationError::NoRandomness)?;
        Ok(Self(pair))
    }

    /// The public key, 32 bytes.
    #[must_use]
    pub fn public(&self) -> [u8; 32] {
        self.0.public_key().as_ref().try_into().expect("Ed25519 public keys have 32 bytes")
    }

    /// Signs an activation message.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(message).as_ref().to_vec()
    }
}

/// What a client signs to activate `epoch` of `session` on this connection.
///
/// # Errors
/// [`ActivationError::NoExporter`] before the handshake is complete.
pub fn activation_message(
    connection: &Connection,
    session: SessionId,
    epoch: Epoch,
) -> Result<Vec<u8>, ActivationError> {
    let mut exported = [0_u8; 32];
    connection.export_keying_material(&mut exported, EXPORTER_LABEL, b"").map_err(|_| ActivationError::NoExporter)?;
    let mut message = DOMAIN.to_vec();
    message.extend_from_slice(&exported);
    message.extend_from_slice(session.as_bytes());
    message.extend_from_slice(&epoch.value().to_be_bytes());
    Ok(message)
}

/// Checks a signature over [`activation_message`].
///
/// # Errors
/// [`ActivationError::Signature`].
pub fn verify_activation(client_key: &[u8; 32], message: &[u8], signature: &[u8]) -> Result<(), ActivationError> {
    UnparsedPublicKey::new(&ED25519, client_key).verify(message, signature).map_err(|_| ActivationError::Signature)
}

const EXPORTER_LABEL: &[u8] = b"EXPORTER-antiphon-1-activate";
const DOMAIN: &[u8] = b"antiphon/1 activate";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_holder_of_the_key_signs() {
        let (key, other) = (ClientKey::generate().unwrap(), ClientKey::generate().unwrap());
        let signature = key.sign(b"m");
        assert_eq!(verify_activation(&key.public(), b"m", &signature), Ok(()));
        assert_eq!(verify_activation(&other.public(), b"m", &signature), Err(ActivationError::Signature));
        assert_eq!(verify_activation(&key.public(), b"n", &signature), Err(ActivationError::Signature));
        assert_eq!(verify_activation(&key.public(), b"m", &signature[..63]), Err(ActivationError::Signature));
    }
}
