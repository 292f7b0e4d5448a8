//! What relays decide, and what they keep.

use std::net::SocketAddr;

use antiphon_core::{
    clock::Millis,
    id::RelayNumber,
    keys::RelaySecret,
    tunnel::{ClientAddr, Direction, Ecn, HEADER_LEN, Header, INITIAL_HOP_LIMIT, KeySlot, Notice, coarse_time},
};
use antiphon_relay::{
    forward::{FromClient, FromTunnel, Memo, Now, Onward, classify_frame, classify_up},
    keyring::{CidKey, Keyring},
    routing::{DeadServer, NeighbourRecord, RouteChange, Routing, Welcome},
    state::{self, Owner, State},
    table::Table,
};
use sha2::{Digest as _, Sha256};

use super::packets::{CID_KEY, NOW, config_id, generation, minter, server_id};
use crate::input::Input;

const WORKER: &str = "127.0.0.1:7000";
const OTHER_RELAY: &str = "127.0.0.1:8002";
const CLIENT: &str = "192.0.2.7:5000";

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn relay(n: u16) -> RelayNumber {
    RelayNumber::new(n).expect("a relay number")
}

fn secret() -> RelaySecret {
    RelaySecret::from_bytes([9; 32])
}

fn other_secret() -> RelaySecret {
    RelaySecret::from_bytes([11; 32])
}

/// Relay 65 of region 1: a worker of its own, a region behind relay 128, a dead server.
fn routing() -> Routing {
    let mut routing = Routing::new(1);
    let cid = CidKey { config: config_id(1), generation: generation(4), key: CID_KEY };
    let keys = Keyring { cid: vec![cid], secrets: vec![(generation(4), secret())], sealing: generation(4) };
    routing.welcome(0, Welcome { relay: relay(65), keys }).expect("the first one");
    let hop = vec![(generation(4), other_secret().hop_keys(relay(65)))];
    routing.neighbours(0, vec![NeighbourRecord { number: relay(128), address: address(OTHER_RELAY), keys: hop }]);
    let dead = antiphon_core::id::ServerId::from_u64(server_id().to_u64() ^ 1);
    let change = RouteChange {
        version: 1,
        full: true,
        upserts: vec![(server_id(), address(WORKER))],
        region_upserts: vec![(relay(128).region(), vec![relay(128)])],
        dead: vec![DeadServer { server_id: dead, keys: vec![(generation(4), [7; 32])] }],
        ..RouteChange::default()
    };
    routing.apply(0, NOW, change).expect("a full table");
    routing
}

const fn now() -> Now {
    Now { unix_s: NOW, ms: Millis(0) }
}

/// What goes on is sealed, as the relay would.
fn sealed(onward: &Onward<'_>, datagram: &[u8]) -> Vec<u8> {
    let mut frame = [&[0; HEADER_LEN][..], datagram].concat();
    onward.header.seal_frame(onward.key, &mut frame).expect("it holds a header");
    frame
}

/// Bits of the first byte: 1 a genuine connection ID in a short header, 2 in a long one; 4 a client over IPv6; 8 an
/// address out of the input.
pub(super) fn up(data: &[u8]) -> bool {
    let table = routing().table();
    let mut input = Input::new(data);
    let choices = input.byte();
    let from = match choices >> 2 & 3 {
        0 => address(CLIENT),
        1 => address("[2001:db8::7]:5000"),
        2 => SocketAddr::from((input.array::<4>(), input.u16())),
        _ => SocketAddr::from((input.array::<16>(), input.u16())),
    };
    let mut datagram = input.rest().to_vec();
    let (live, first) = (minter().mint_connection(), minter().mint_initial(NOW + 20).0);
    match choices & 3 {
        1 if datagram.len() > 17 => datagram[1..18].copy_from_slice(live.as_bytes()),
        2 if datagram.len() > 22 => {
            datagram[1..6].copy_from_slice(&[0, 0, 0, 1, 17]);
            datagram[6..23].copy_from_slice(first.as_bytes());
        }
        _ => {}
    }
    let (ecn, mut memo) = (Ecn::from_bits(choices >> 4), Memo::default());
    let first = classify_up(&table, now(), &datagram, from, ecn, &mut memo).is_ok();
    let judged = classify_up(&table, now(), &datagram, from, ecn, &mut memo);
    assert_eq!(judged.is_ok(), first, "what was found out before says the same");
    match judged {
        Ok(FromClient::Onward(onward)) => {
            let frame = sealed(&onward, &datagram);
            assert_eq!(frame.len(), HEADER_LEN + datagram.len());
            assert_eq!(onward.header.client, ClientAddr::from(from));
            true
        }
        Ok(FromClient::Reset { .. }) => true,
        Err(_) => false,
    }
}

pub(super) fn up_seeds() -> Vec<Vec<u8>> {
    let short = |choices: u8| [&[choices, 0x40][..], &[0x5a; 60]].concat();
    let mut initial = vec![2, 0xc3, 0, 0, 0, 1, 17];
    initial.resize(1 + 1_200, 0);
    vec![short(1), short(5), initial]
}

/// Bits of the first byte: 1 as the worker seals, 2 as the other relay does; 4 from that one's address.
pub(super) fn frame(data: &[u8]) -> bool {
    let table: Table = routing().table();
    let mut input = Input::new(data);
    let choices = input.byte();
    let mut frame = input.rest().to_vec();
    let key = match choices & 3 {
        1 => Some(secret().tunnel_keys(server_id()).down),
        2 => Some(other_secret().hop_keys(relay(65)).up),
        3 => Some(secret().hop_keys(relay(128)).down),
        _ => None,
    };
    if let (Some(key), Ok(header)) = (key, Header::parse(&frame)) {
        let header = Header { time: coarse_time(NOW), ..header };
        header.seal_frame(&key, &mut frame).expect("it holds a header");
    }
    let from = match choices >> 2 & 3 {
        0 => address(WORKER),
        1 => address(OTHER_RELAY),
        _ => address(CLIENT),
    };
    let (outer, mut memo) = (Ecn::from_bits(choices >> 4), Memo::default());
    let first = classify_frame(&table, now(), &frame, from, outer, &mut memo).is_ok();
    let judged = classify_frame(&table, now(), &frame, from, outer, &mut memo);
    assert_eq!(judged.is_ok(), first, "what was found out before says the same");
    match judged {
        Ok(FromTunnel::ToClient(to)) => {
            assert_eq!(to.datagram, &frame[HEADER_LEN..]);
            assert!(to.client.port() != 0, "nobody has port 0");
            true
        }
        Ok(FromTunnel::Onward(onward, datagram)) => {
            assert_eq!(datagram, &frame[HEADER_LEN..]);
            assert!(onward.header.hop_limit < INITIAL_HOP_LIMIT.max(Header::parse(&frame).map_or(0, |h| h.hop_limit)));
            sealed(&onward, datagram);
            true
        }
        Ok(FromTunnel::Notice { .. }) => true,
        Err(_) => false,
    }
}

pub(super) fn frame_seeds() -> Vec<Vec<u8>> {
    let frame = |choices, direction, number, client, datagram: &[u8]| {
        let header = Header {
            direction,
            key_slot: KeySlot::of(generation(4)),
            hop_limit: INITIAL_HOP_LIMIT,
            ecn: Ecn::NotEct,
            client,
            relay: relay(number),
            time: coarse_time(NOW),
        };
        let mut frame = [&[0; HEADER_LEN][..], datagram].concat();
        header.seal_frame(&secret().tunnel_keys(server_id()).down, &mut frame).expect("it holds a header");
        [&[choices][..], &frame].concat()
    };
    let mut short = vec![0x40];
    short.extend_from_slice(minter().mint_connection().as_bytes());
    short.resize(60, 0x5a);
    let notice = Notice::Draining { deadline_ms: 500 }.to_bytes();
    let client = ClientAddr::from(address(CLIENT));
    vec![
        frame(0, Direction::Down, 65, client, &[0x40; 60]),
        frame(2 | 4, Direction::Up, 128, client, &short),
        frame(3 | 4, Direction::Down, 65, client, &[0x40; 60]),
        frame(3 | 4, Direction::Down, 128, ClientAddr::RELAY, &notice),
    ]
}

fn owner() -> Owner {
    Owner { fleet: [1; 32], region: "north".into(), name: "relay-0".into() }
}

/// The body behind a genuine checksum; behind an odd first byte, the bytes as they are.
pub(super) fn state(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let choices = input.byte();
    let file = if choices & 1 == 1 {
        input.rest().to_vec()
    } else {
        let (format, body) = (u16::from(choices >> 1), input.rest());
        let digest = Sha256::new().chain_update(format.to_be_bytes()).chain_update(body).finalize();
        [&state::MAGIC[..], &format.to_be_bytes(), &digest, body].concat()
    };
    match state::decode(&owner(), &file) {
        Ok(decoded) => {
            let routing = Routing::restore(2, decoded.known);
            let table = routing.table();
            assert!(table.routes().all(|(id, _)| table.route(id.to_u64()).is_some()));
            if let Some(known) = routing.known() {
                let again = state::encode(&owner(), &State { confirmed: decoded.confirmed, known });
                assert!(state::decode(&owner(), &again).is_ok(), "what is written can be read");
            }
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

pub(super) fn state_seeds() -> Vec<Vec<u8>> {
    let known = routing().known().expect("it has keys and routes");
    let confirmed = std::time::UNIX_EPOCH + std::time::Duration::from_secs(NOW);
    let file = state::encode(&owner(), &State { confirmed, known });
    let body = &file[state::MAGIC.len() + 2 + 32..];
    let choices = u8::try_from(state::FORMAT << 1).expect("a small number");
    vec![[&[choices][..], body].concat(), [&[1][..], &file].concat()]
}
