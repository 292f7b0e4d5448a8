//! Transport settings for one voice per connection.

use std::{sync::Arc, time::Duration};

use quinn::{
    AckFrequencyConfig, TransportConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::{RootCertStore, crypto::CryptoProvider, pki_types::CertificateDer, server::ResolvesServerCert};

use crate::congestion::AudioFloorConfig;

/// What the agreed audio takes on the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AudioBudget {
    /// Largest QUIC datagram payload of one 20 ms frame: flow identifier, RTP header, audio.
    pub frame_bytes: usize,
}

impl AudioBudget {
    /// What the congestion window never falls below.
    pub const FLOOR: Duration = Duration::from_millis(300);
    /// Frames that wait unsent at most; the oldest goes first when a new one comes (invariant I12).
    pub const SEND_FRAMES: usize = 3;
    /// QUIC short header, packet number, DATAGRAM frame header and AEAD tag around one frame.
    const PACKET_OVERHEAD: usize = 1 + 17 + 4 + 3 + 16;

    fn window(self, span: Duration) -> u64 {
        let frames = u64::try_from(span.as_millis() / 20).unwrap_or(u64::MAX);
        frames.saturating_mul((self.frame_bytes + Self::PACKET_OVERHEAD) as u64)
    }
}

/// Which end of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Opens the control stream.
    Client,
    /// Accepts exactly one stream.
    Worker,
}

/// Transport parameters for a call.
///
/// Packets stay at QUIC's minimum of 1,200 bytes (RFC 9000, section 14): with tunnel header, UDP and IPv6 that is
/// 1,280, so the first flight passes every IPv6 path, and no audio frame needs more.
#[must_use]
pub fn transport(side: Side, budget: AudioBudget) -> TransportConfig {
    let mut config = TransportConfig::default();
    let streams = match side {
        Side::Client => 0_u32,
        Side::Worker => 1,
    };
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(streams))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(CONTROL_WINDOW))
        .receive_window(VarInt::from_u32(CONTROL_WINDOW))
        .send_window(u64::from(CONTROL_WINDOW))
        .crypto_buffer_size(16 * 1024)
        .initial_rtt(Duration::from_millis(100))
        .initial_mtu(1200)
        .min_mtu(1200)
        .mtu_discovery_config(None)
        .ack_frequency_config(Some(ack_frequency()))
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_TIMEOUT_MS).into()))
        .datagram_receive_buffer_size(Some(64 * 1200))
        .datagram_send_buffer_size(AudioBudget::SEND_FRAMES * budget.frame_bytes)
        .congestion_controller_factory(Arc::new(AudioFloorConfig::new(
            budget.window(AudioBudget::FLOOR),
            budget.window(Duration::from_secs(1)).max(14_720),
        )));
    config
}

/// Asks the other end for fewer acknowledgements (draft-ietf-quic-ack-frequency): audio is never sent again, and at
/// fifty packets a second the default would answer every other one.
fn ack_frequency() -> AckFrequencyConfig {
    let mut config = AckFrequencyConfig::default();
    config.ack_eliciting_threshold(VarInt::from_u32(5)).max_ack_delay(Some(MAX_ACK_DELAY));
    config
}

/// TLS 1.3 for the worker's end. `certificates` is asked at each handshake, so that renewed ones need no new endpoint.
///
/// # Errors
/// The provider lacks what QUIC needs.
pub fn server_crypto(
    provider: Arc<CryptoProvider>,
    certificates: Arc<dyn ResolvesServerCert>,
) -> Result<QuicServerConfig, rustls::Error> {
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // A resumed session would skip the certificate but not the lease; tickets only cost bytes here.
    tls.send_tls13_tickets = 0;
    QuicServerConfig::try_from(tls).map_err(|e| rustls::Error::General(e.to_string()))
}

/// TLS 1.3 for the client's end; the ticket brings the trust anchor.
///
/// # Errors
/// The trust anchor is no usable certificate.
pub fn client_crypto(
    provider: Arc<CryptoProvider>,
    trust_anchor: CertificateDer<'static>,
) -> Result<QuicClientConfig, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(trust_anchor)?;
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    QuicClientConfig::try_from(tls).map_err(|e| rustls::Error::General(e.to_string()))
}

/// Application protocol of a session.
pub const ALPN: &[u8] = b"antiphon/1";
/// Longest that an end delays an acknowledgement.
pub const MAX_ACK_DELAY: Duration = Duration::from_millis(80);
/// After this long without a packet the connection is gone.
pub const IDLE_TIMEOUT_MS: u32 = 30_000;
/// The control stream carries small messages only.
const CONTROL_WINDOW: u32 = 64 * 1024;
