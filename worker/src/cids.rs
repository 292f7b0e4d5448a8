//! Connection IDs of live connections, for QUIC's endpoint.

use std::{sync::Arc, time::Duration};

use antiphon_core::cid::{CidMinter, SessionCid};
use parking_lot::Mutex;
use quinn::{ConnectionId, ConnectionIdGenerator};

/// Hands the shard's minter to quinn. Clones mint from the same counter.
#[derive(Debug, Clone)]
pub(crate) struct ShardCids {
    pub(crate) minter: Arc<Mutex<CidMinter>>,
    /// After this long QUIC replaces a live connection's IDs: a new key generation reaches it so.
    pub(crate) lifetime: Duration,
}

impl ConnectionIdGenerator for ShardCids {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(self.minter.lock().mint_connection().as_bytes())
    }

    // Validation is the gate's work: nothing else reaches quinn.
    fn cid_len(&self) -> usize {
        SessionCid::LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        Some(self.lifetime)
    }
}
