//! What may reach QUIC at all.
//!
//! An attacker controls every byte of a client's datagram and can send any number of them through any relay. Before
//! QUIC sees one, its destination connection ID has to name this very shard and incarnation; an Initial also has to
//! name an attempt of a lease that is not over, or a handshake that is going on. So a flood of handshakes is bounded
//! by leases (invariant I1) and costs one AES block per packet here.

use std::collections::{HashMap, VecDeque};

use antiphon_core::{
    cid::{CidCodec, ConfigId, Kind, SessionCid, SessionNonce},
    id::{Epoch, ServerId, SessionId},
};

/// Why a datagram stops at the gate. A closed set: the metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum GateDrop {
    /// Too short for its header, or with a connection ID of another length.
    Malformed,
    /// A QUIC version other than 1.
    Version,
    /// 0-RTT, Retry: packets that no client of ours sends.
    PacketType,
    /// The connection ID names somebody else, or nobody.
    ForeignServer,
    /// An Initial whose connection ID is no attempt of a current lease and no handshake going on.
    UnknownInitial,
    /// A first connection ID in a packet that is no Initial.
    InitialIdMisused,
    /// More than a client sends before its path is a session's own.
    Unproven,
}

/// What the gate has seen of a datagram that may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Admitted {
    /// The connection's name: nonce of the connection ID.
    pub(crate) nonce: u64,
    /// Configuration of the connection ID.
    pub(crate) config: u8,
    /// An Initial: QUIC derives keys for it, and may begin a handshake.
    pub(crate) initial: bool,
}

impl GateDrop {
    /// The metric's label.
    #[must_use]
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Version => "version",
            Self::PacketType => "packet_type",
            Self::ForeignServer => "foreign_server",
            Self::UnknownInitial => "unknown_initial",
            Self::InitialIdMisused => "initial_id_misused",
            Self::Unproven => "unproven",
        }
    }
}

/// Which lease a first connection ID belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attempt {
    /// The session.
    pub session: SessionId,
    /// Its epoch.
    pub epoch: Epoch,
}

/// The gate of one shard.
#[derive(Debug)]
pub(crate) struct Gate {
    server_id: u64,
    codec: CidCodec,
    attempts: HashMap<u64, Attempt>,
    /// Connection IDs that this end chose in handshakes going on, with the second in which they are forgotten.
    handshakes: HashMap<u64, u64>,
    order: VecDeque<(u64, u64)>,
    most_handshakes: usize,
}

impl Gate {
    /// A gate that lets nobody in yet; `slots` bounds what it remembers.
    #[must_use]
    pub(crate) fn new(server_id: ServerId, codec: CidCodec, slots: u32) -> Self {
        Self {
            server_id: server_id.to_u64(),
            codec,
            attempts: HashMap::new(),
            handshakes: HashMap::new(),
            order: VecDeque::new(),
            most_handshakes: 64 + 4 * usize::try_from(slots).unwrap_or(usize::MAX / 8),
        }
    }

    /// Takes the connection-ID keys of a new generation beside the ones in use.
    pub(crate) fn set_codec(&mut self, codec: CidCodec) {
        self.codec = codec;
    }

    /// A lease was granted: its first connection IDs may come.
    pub(crate) fn expect(&mut self, nonces: impl IntoIterator<Item = SessionNonce>, attempt: Attempt) {
        self.attempts.extend(nonces.into_iter().map(|nonce| (nonce.value(), attempt)));
    }

    /// The lease or the connection is over: these first connection IDs are worth nothing any more.
    pub(crate) fn forget(&mut self, nonces: impl IntoIterator<Item = SessionNonce>) {
        for nonce in nonces {
            self.attempts.remove(&nonce.value());
        }
    }

    /// How many first connection IDs may come.
    #[cfg(test)]
    pub(crate) fn attempts(&self) -> usize {
        self.attempts.len()
    }

    /// The lease behind a connection's first destination ID.
    #[must_use]
    pub(crate) fn attempt(&self, cid: &[u8]) -> Option<(SessionNonce, Attempt)> {
        let (server_id, nonce) = self.decode(cid)?;
        let attempt = self.attempts.get(&nonce.value()).filter(|_| server_id == self.server_id)?;
        Some((nonce, *attempt))
    }

    /// Whether QUIC may see a client's datagram. `now_s` is any clock that counts seconds.
    ///
    /// # Errors
    /// Why not; the datagram is dropped then.
    pub(crate) fn admit(&self, now_s: u64, datagram: &[u8]) -> Result<Admitted, GateDrop> {
        let first = *datagram.first().ok_or(GateDrop::Malformed)?;
        if first & LONG_HEADER == 0 {
            let cid = datagram.get(1..1 + SessionCid::LEN).ok_or(GateDrop::Malformed)?;
            let nonce = self.ours(cid)?;
            return match nonce.kind() {
                Some(Kind::Connection) => Ok(Admitted { nonce: nonce.value(), config: config(cid), initial: false }),
                _ => Err(GateDrop::InitialIdMisused),
            };
        }
        // RFC 8999, section 5.1: version, then the destination connection ID with its length.
        let version = datagram.get(1..5).ok_or(GateDrop::Malformed)?;
        if version != QUIC_V1 {
            return Err(GateDrop::Version);
        }
        if datagram.get(5).copied().map(usize::from) != Some(SessionCid::LEN) {
            return Err(GateDrop::Malformed);
        }
        let cid = datagram.get(6..6 + SessionCid::LEN).ok_or(GateDrop::Malformed)?;
        let nonce = self.ours(cid)?;
        // RFC 9000, section 17.2: the packet type is in bits 4 and 5.
        let admitted = |initial| Ok(Admitted { nonce: nonce.value(), config: config(cid), initial });
        match (first >> 4 & 0b11, nonce.kind()) {
            (INITIAL, Some(Kind::Initial)) if self.attempts.contains_key(&nonce.value()) => admitted(true),
            (INITIAL, Some(Kind::Connection)) if self.in_handshake(now_s, nonce) => admitted(true),
            (INITIAL, _) => Err(GateDrop::UnknownInitial),
            (HANDSHAKE, Some(Kind::Connection)) => admitted(false),
            (HANDSHAKE, _) => Err(GateDrop::InitialIdMisused),
            _ => Err(GateDrop::PacketType),
        }
    }

    /// Looks at what QUIC sends: the source connection ID of a long header is what the client will answer to.
    pub(crate) fn on_sent(&mut self, now_s: u64, datagram: &[u8]) {
        if let Some(nonce) = self.own_source_id(datagram) {
            let until = now_s + HANDSHAKE_S;
            if self.handshakes.insert(nonce, until).is_none() {
                self.order.push_back((until, nonce));
            }
        }
        while self.order.front().is_some_and(|(until, _)| *until < now_s) || self.order.len() > self.most_handshakes {
            if let Some((_, nonce)) = self.order.pop_front() {
                self.handshakes.remove(&nonce);
            }
        }
    }

    fn own_source_id(&self, datagram: &[u8]) -> Option<u64> {
        if datagram.first()? & LONG_HEADER == 0 {
            return None;
        }
        let destination = usize::from(*datagram.get(5)?);
        let length = usize::from(*datagram.get(6 + destination)?);
        let cid = datagram.get(7 + destination..7 + destination + length)?;
        let (server_id, nonce) = self.decode(cid)?;
        (server_id == self.server_id).then_some(nonce.value())
    }

    fn in_handshake(&self, now_s: u64, nonce: SessionNonce) -> bool {
        self.handshakes.get(&nonce.value()).is_some_and(|until| *until >= now_s)
    }

    fn ours(&self, cid: &[u8]) -> Result<SessionNonce, GateDrop> {
        let (server_id, nonce) = self.decode(cid).ok_or(GateDrop::ForeignServer)?;
        if server_id == self.server_id { Ok(nonce) } else { Err(GateDrop::ForeignServer) }
    }

    fn decode(&self, cid: &[u8]) -> Option<(u64, SessionNonce)> {
        let (server_id, nonce) = self.codec.decode_u64(cid.try_into().ok()?)?;
        Some((server_id, SessionNonce::from_u64(nonce)))
    }
}

/// The configuration in a connection ID's first octet.
fn config(cid: &[u8]) -> u8 {
    cid.first().map_or(ConfigId::UNROUTABLE, |octet| octet >> 5)
}

const LONG_HEADER: u8 = 0x80;
const QUIC_V1: [u8; 4] = [0, 0, 0, 1];
const INITIAL: u8 = 0;
const HANDSHAKE: u8 = 2;
/// Longest time that a handshake may take.
const HANDSHAKE_S: u64 = 10;

#[cfg(test)]
mod tests {
    use super::*;
    use antiphon_core::{
        cid::{CidMinter, NonceCounter},
        id::{Incarnation, RegionNumber, ShardNumber, WorkerNumber},
    };
    use proptest::prelude::*;

    const KEY: [u8; 16] = [7; 16];

    fn server(incarnation: u32) -> ServerId {
        ServerId {
            region: RegionNumber::new(1).unwrap(),
            worker: WorkerNumber::new(2).unwrap(),
            shard: ShardNumber::new(0).unwrap(),
            incarnation: Incarnation::new(incarnation).unwrap(),
        }
    }

    fn minter(incarnation: u32) -> CidMinter {
        let config = ConfigId::new(0).unwrap();
        CidMinter::new(server(incarnation), config, KEY, NonceCounter::starting_at(5))
    }

    fn gate() -> Gate {
        let mut codec = CidCodec::new();
        codec.insert(ConfigId::new(0).unwrap(), KEY);
        Gate::new(server(9), codec, 1)
    }

    fn attempt() -> Attempt {
        Attempt { session: SessionId::from_bytes([1; 16]), epoch: Epoch::FIRST }
    }

    fn long(kind: u8, destination: &SessionCid, source: &[u8]) -> Vec<u8> {
        let mut packet = vec![0xc0 | kind << 4, 0, 0, 0, 1, 17];
        packet.extend_from_slice(destination.as_bytes());
        packet.push(source.len() as u8);
        packet.extend_from_slice(source);
        packet
    }

    fn short(destination: &SessionCid) -> Vec<u8> {
        [&[0x40][..], destination.as_bytes(), &[0; 20]].concat()
    }

    #[test]
    fn an_initial_enters_only_while_its_lease_lasts() {
        let (mut gate, mut minter) = (gate(), minter(9));
        let (cid, nonce) = minter.mint_initial(100);
        let packet = long(INITIAL, &cid, &[]);
        assert_eq!(gate.admit(0, &packet), Err(GateDrop::UnknownInitial));
        gate.expect([nonce], attempt());
        assert!(gate.admit(0, &packet).is_ok());
        assert_eq!(gate.attempt(cid.as_bytes()), Some((nonce, attempt())));
        gate.forget([nonce]);
        assert_eq!(gate.admit(0, &packet), Err(GateDrop::UnknownInitial), "a replay after the end");
    }

    #[test]
    fn an_initial_to_a_chosen_id_enters_only_during_that_handshake() {
        let (mut gate, mut minter) = (gate(), minter(9));
        let own = minter.mint_connection();
        let answer = long(INITIAL, &own, &[]);
        assert_eq!(gate.admit(0, &answer), Err(GateDrop::UnknownInitial));
        let sent = long(INITIAL, &SessionCid::from_bytes([3; 17]), own.as_bytes());
        gate.on_sent(0, &sent);
        assert!(gate.admit(HANDSHAKE_S, &answer).is_ok());
        assert_eq!(gate.admit(HANDSHAKE_S + 1, &answer), Err(GateDrop::UnknownInitial));
    }

    #[test]
    fn what_is_not_for_this_incarnation_stops_here() {
        let (gate, mut other, mut own) = (gate(), minter(8), minter(9));
        assert_eq!(gate.admit(0, &short(&other.mint_connection())), Err(GateDrop::ForeignServer));
        assert!(gate.admit(0, &short(&own.mint_connection())).is_ok());
        let (initial, _) = own.mint_initial(100);
        assert_eq!(gate.admit(0, &short(&initial)), Err(GateDrop::InitialIdMisused));
        assert_eq!(gate.admit(0, &long(HANDSHAKE, &initial, &[])), Err(GateDrop::InitialIdMisused));
        let connection = own.mint_connection();
        assert_eq!(gate.admit(0, &long(1, &connection, &[])), Err(GateDrop::PacketType));
        let mut version = long(INITIAL, &connection, &[]);
        version[4] = 2;
        assert_eq!(gate.admit(0, &version), Err(GateDrop::Version));
        assert_eq!(gate.admit(0, &[]), Err(GateDrop::Malformed));
    }

    #[test]
    fn memory_is_bounded_by_slots_whatever_is_sent() {
        let (mut gate, mut minter) = (gate(), minter(9));
        for _ in 0..10_000 {
            let own = minter.mint_connection();
            gate.on_sent(0, &long(INITIAL, &SessionCid::from_bytes([3; 17]), own.as_bytes()));
        }
        assert!(gate.handshakes.len() <= 68 && gate.order.len() <= 68);
    }

    proptest! {
        #[test]
        fn arbitrary_datagrams_never_enter_or_panic(bytes: Vec<u8>) {
            let mut gate = gate();
            prop_assert!(gate.admit(0, &bytes).is_err());
            gate.on_sent(0, &bytes);
        }
    }
}
