//! The core's formats.

use antiphon_core::{
    cid::{Cid, CidCodec, CidMinter, Config, ConfigId, ConfigSet, NonceCounter, SessionCid},
    id::{KeyGeneration, RelayNumber, ServerId},
    keys::TunnelKey,
    tunnel::{
        self, ClientAddr, Direction, Ecn, HEADER_LEN, Header, INITIAL_HOP_LIMIT, KeySlot, MAX_SKEW, Notice, coarse_time,
    },
    varint,
};

use crate::input::Input;

pub(super) const NOW: u64 = 1_800_000_000;
pub(super) const CID_KEY: [u8; 16] = [3; 16];
const TUNNEL_KEY: TunnelKey = TunnelKey::from_bytes([5; 16]);

pub(super) fn config_id(n: u8) -> ConfigId {
    ConfigId::new(n).expect("0 to 6")
}

pub(super) fn generation(n: u32) -> KeyGeneration {
    KeyGeneration::new(n).expect("not 0")
}

pub(super) fn server_id() -> ServerId {
    ServerId::from_u64(0x0040_0001_dead_beef)
}

pub(super) fn minter() -> CidMinter {
    CidMinter::new(server_id(), config_id(1), CID_KEY, NonceCounter::starting_at(5))
}

/// Both codecs: ours of fixed layout, and the draft's of any layout.
pub(super) fn connection_id(data: &[u8]) -> bool {
    let mut codec = CidCodec::new();
    codec.insert(config_id(1), CID_KEY);
    codec.insert(config_id(4), [4; 16]);
    let mut set = ConfigSet::new();
    for (id, server_id_len, nonce_len, key) in
        [(1, 8, 8, Some(CID_KEY)), (2, 3, 4, None), (3, 3, 4, Some([7; 16])), (5, 4, 14, Some([8; 16]))]
    {
        if let Ok(config) = Config::new(config_id(id), server_id_len, nonce_len, key, true) {
            set.insert(config);
        }
    }
    if let Ok(decoded) = set.decode(data) {
        let config = set.config(decoded.config()).expect("it has just decoded with it");
        let again = config.encode(decoded.server_id(), decoded.nonce(), data[0]).expect("lengths are right");
        assert_eq!(config.decode(&again).map(|d| d.server_id().to_vec()), Ok(decoded.server_id().to_vec()));
    }
    // Both sides of a refusal: errors are shown to people.
    let _ = Cid::unroutable(data).map_err(|error| error.to_string());
    let _ = varint::read(data);
    let Ok(bytes) = data.try_into() else { return false };
    match codec.decode(&SessionCid::from_bytes(bytes)) {
        Ok(decoded) => {
            let words = codec.decode_u64(&bytes).expect("the two agree");
            assert_eq!((decoded.server_id.to_u64(), decoded.nonce.value()), words);
            let _ = (decoded.nonce.kind(), decoded.nonce.is_expired(NOW));
            assert_eq!(ServerId::from_bytes(decoded.server_id.to_bytes()), decoded.server_id);
            true
        }
        Err(error) => {
            assert!(codec.decode_u64(&bytes).is_none() && !error.to_string().is_empty());
            false
        }
    }
}

pub(super) fn connection_id_seeds() -> Vec<Vec<u8>> {
    let mut minter = minter();
    vec![minter.mint_connection().as_bytes().to_vec(), minter.mint_initial(NOW + 20).0.as_bytes().to_vec()]
}

/// A frame as it is, or, behind an odd first byte, one with a genuine tag.
pub(super) fn tunnel(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let choices = input.byte();
    let mut frame = input.rest().to_vec();
    if choices & 1 == 1
        && let Ok(header) = Header::parse(&frame)
    {
        let header = Header { time: coarse_time(NOW), ..header };
        assert!(header.seal_frame(&TUNNEL_KEY, &mut frame).is_ok(), "it holds a header");
    }
    let direction = if choices & 2 == 0 { Direction::Up } else { Direction::Down };
    match tunnel::open(&frame, &TUNNEL_KEY, direction, NOW, MAX_SKEW) {
        Ok((header, datagram)) => {
            assert_eq!(datagram, &frame[HEADER_LEN..]);
            assert_eq!(header.direction, direction);
            let client = header.client.to_socket_addr();
            assert_eq!(ClientAddr::from(client).to_socket_addr(), client, "an address survives");
            if let Ok(next) = header.next_hop(KeySlot::of(generation(2))) {
                assert!(next.hop_limit < header.hop_limit, "hops run out");
            }
            if let Some(notice) = Notice::from_bytes(datagram) {
                assert_eq!(notice.to_bytes(), datagram[..Notice::LEN]);
            }
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

pub(super) fn tunnel_seeds() -> Vec<Vec<u8>> {
    let sealed = |direction, client: &str, payload: &[u8]| {
        let header = Header {
            direction,
            key_slot: KeySlot::of(generation(1)),
            hop_limit: INITIAL_HOP_LIMIT,
            ecn: Ecn::Ect0,
            client: ClientAddr::from(client.parse::<std::net::SocketAddr>().expect("an address")),
            relay: RelayNumber::new(65).expect("a number"),
            time: coarse_time(NOW),
        };
        let mut frame = [&[0; HEADER_LEN][..], payload].concat();
        header.seal_frame(&TUNNEL_KEY, &mut frame).expect("it holds a header");
        frame
    };
    let seed = |choices, frame: Vec<u8>| [&[choices][..], &frame].concat();
    let notice = Notice::Draining { deadline_ms: 500 }.to_bytes();
    vec![
        seed(0, sealed(Direction::Up, "192.0.2.7:5000", b"datagram")),
        seed(3, sealed(Direction::Down, "[2001:db8::7]:5000", b"datagram")),
        seed(1, sealed(Direction::Up, "0.0.0.0:0", &notice)),
    ]
}
