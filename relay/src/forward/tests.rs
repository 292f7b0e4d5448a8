use super::*;
use antiphon_core::{
    cid::{CidMinter, ConfigId, NonceCounter},
    id::{KeyGeneration, RelayNumber, ServerId},
    keys::{RelaySecret, TunnelKeys},
    tunnel::{self, MAX_SKEW},
};
use proptest::prelude::*;

use crate::{
    keyring::{CidKey, Keyring},
    routing::{DeadServer, NeighbourRecord, RouteChange, Routing, Welcome},
};

const NOW: u64 = 1_800_000_000;
const KEY: [u8; 16] = [3; 16];
const WORKER: &str = "127.0.0.1:7000";
const CLIENT: &str = "192.0.2.7:5000";

fn server_id() -> ServerId {
    ServerId::from_u64(0x0040_0001_dead_beef)
}

fn generation(n: u32) -> KeyGeneration {
    KeyGeneration::new(n).unwrap()
}

fn secret() -> RelaySecret {
    RelaySecret::from_bytes([9; 32])
}

fn tunnel_keys() -> TunnelKeys {
    secret().tunnel_keys(server_id())
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn keyring() -> Keyring {
    let cid = CidKey { config: ConfigId::new(1).unwrap(), generation: generation(4), key: KEY };
    Keyring { cid: vec![cid], secrets: vec![(generation(4), secret())], sealing: generation(4) }
}

fn now() -> Now {
    Now { unix_s: NOW, ms: Millis(0) }
}

fn routing() -> Routing {
    let mut routing = Routing::new(1);
    routing.welcome(0, Welcome { relay: RelayNumber::new(65).unwrap(), keys: keyring() }).unwrap();
    let change =
        RouteChange { version: 1, full: true, upserts: vec![(server_id(), address(WORKER))], ..RouteChange::default() };
    routing.apply(0, NOW, change).unwrap();
    routing
}

fn table() -> Table {
    routing().table()
}

fn minter(server_id: ServerId) -> CidMinter {
    CidMinter::new(server_id, ConfigId::new(1).unwrap(), KEY, NonceCounter::starting_at(5))
}

fn live_cid() -> SessionCid {
    minter(server_id()).mint_connection()
}

fn first_cid(expires_at: u64) -> SessionCid {
    minter(server_id()).mint_initial(expires_at).0
}

fn long(first: u8, version: u32, cid: &[u8], len: usize) -> Vec<u8> {
    let mut packet = vec![first];
    packet.extend(version.to_be_bytes());
    packet.push(cid.len() as u8);
    packet.extend_from_slice(cid);
    packet.resize(len, 0x5a);
    packet
}

fn initial(cid: &SessionCid) -> Vec<u8> {
    long(0xc0, 1, cid.as_bytes(), 1200)
}

fn short(cid: &SessionCid) -> Vec<u8> {
    let mut packet = vec![0x40];
    packet.extend_from_slice(cid.as_bytes());
    packet.resize(100, 0x5a);
    packet
}

fn judged(datagram: &[u8]) -> Result<(SocketAddr, Header), DropReason> {
    judged_from(datagram, address(CLIENT))
}

fn judged_from(datagram: &[u8], from: SocketAddr) -> Result<(SocketAddr, Header), DropReason> {
    match classify_up(&table(), now(), datagram, from, Ecn::Ect0, &mut Memo::default())? {
        FromClient::Onward(to) => Ok((to.address, to.header)),
        FromClient::Reset { .. } => panic!("nobody is dead"),
    }
}

#[test]
fn genuine_packets_go_to_the_worker_that_they_name() {
    for packet in [
        initial(&first_cid(NOW + 60)),
        initial(&live_cid()),
        long(0xe0, 1, live_cid().as_bytes(), 60),
        short(&live_cid()),
    ] {
        let (worker, header) = judged(&packet).unwrap();
        assert_eq!(worker, address(WORKER));
        assert_eq!(header.client.to_socket_addr(), address(CLIENT));
        assert_eq!((header.relay.value(), header.ecn), (65, Ecn::Ect0));
        assert_eq!(header.key_slot, KeySlot::of(generation(4)));
    }
    let mapped = address("[::ffff:192.0.2.7]:5000");
    let (_, header) = judged_from(&short(&live_cid()), mapped).unwrap();
    assert_eq!(header.client.to_socket_addr(), address(CLIENT));
}

#[test]
fn what_is_no_packet_of_ours_is_dropped_with_its_reason() {
    let predecessor = ServerId::from_u64(server_id().to_u64() ^ 1);
    let stranger = ServerId::from_u64(0x1234_0000_0000_0000);
    let cid = live_cid();
    let mut odd_kind = [0x30; 17];
    let config = antiphon_core::cid::Config::new(ConfigId::new(1).unwrap(), 8, 8, Some(KEY), true).unwrap();
    odd_kind.copy_from_slice(&config.encode(&server_id().to_bytes(), &[0xff; 8], 0).unwrap());
    for (packet, reason) in [
        (vec![], DropReason::TooShort),
        (vec![0x40; 17], DropReason::TooShort),
        (short(&cid)[..37].to_vec(), DropReason::TooShort),
        (vec![0xc0; 5], DropReason::TooShort),
        (long(0xe0, 1, cid.as_bytes(), 23), DropReason::TooShort),
        (long(0xe0, 1, cid.as_bytes(), 12), DropReason::TooShort),
        (vec![0x40; MAX_DATAGRAM + 1], DropReason::TooLong),
        (long(0xc0, 0, cid.as_bytes(), 1200), DropReason::QuicVersion),
        (long(0xc0, 0x6b33_43cf, cid.as_bytes(), 1200), DropReason::QuicVersion),
        (long(0xc0, 1, &[7; 8], 1200), DropReason::CidLength),
        (long(0xc0, 1, &[7; 20], 1200), DropReason::CidLength),
        (long(0xc0, 1, cid.as_bytes(), 1199), DropReason::InitialSize),
        (short(&SessionCid::from_bytes([0xff; 17])), DropReason::CidConfig),
        (short(&SessionCid::from_bytes([0x50; 17])), DropReason::CidConfig),
        (short(&SessionCid::from_bytes([0x30; 17])), DropReason::UnknownServer),
        (short(&minter(stranger).mint_connection()), DropReason::UnknownServer),
        (short(&minter(predecessor).mint_connection()), DropReason::DeadIncarnation),
        (short(&SessionCid::from_bytes(odd_kind)), DropReason::CidKind),
        (short(&first_cid(NOW + 60)), DropReason::InitialMisused),
        (long(0xe0, 1, first_cid(NOW + 60).as_bytes(), 1200), DropReason::InitialMisused),
        (initial(&first_cid(NOW - 1)), DropReason::InitialExpired),
        (initial(&first_cid(NOW + 601)), DropReason::InitialExpired),
    ] {
        assert_eq!(judged(&packet), Err(reason), "{packet:02x?}");
    }
    for from in ["192.0.2.7:0", "[fe80::1]:5000", "[::]:5000", "224.0.0.1:5000"] {
        assert_eq!(judged_from(&short(&live_cid()), address(from)), Err(DropReason::ClientAddress), "{from}");
    }
}

#[test]
fn a_table_without_keys_forwards_nothing() {
    let (table, packet) = (Table::empty(), short(&live_cid()));
    let verdict = classify_up(&table, now(), &packet, address(CLIENT), Ecn::NotEct, &mut Memo::default());
    assert!(matches!(verdict, Err(DropReason::CidConfig)));
}

fn down_header() -> Header {
    Header {
        direction: Direction::Down,
        key_slot: KeySlot::of(generation(4)),
        hop_limit: 1,
        ecn: Ecn::Ect0,
        client: address(CLIENT).into(),
        relay: RelayNumber::new(65).unwrap(),
        time: coarse_time(NOW),
    }
}

fn sealed(header: &Header) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend_from_slice(b"datagram");
    header.seal_frame(&tunnel_keys().down, &mut frame).unwrap();
    frame
}

fn judged_down(frame: &[u8], from: &str) -> Result<(SocketAddr, Ecn, Vec<u8>), DropReason> {
    match classify_frame(&table(), now(), frame, address(from), Ecn::Ce, &mut Memo::default()).map_err(|r| r.reason)? {
        FromTunnel::ToClient(to) => Ok((to.client, to.ecn, to.datagram.to_vec())),
        other => panic!("not for a client: {other:?}"),
    }
}

#[test]
fn genuine_frames_go_to_their_client_with_congestion_marked() {
    let expected = Ok((address(CLIENT), Ecn::Ce, b"datagram".to_vec()));
    assert_eq!(judged_down(&sealed(&down_header()), WORKER), expected);
    let deaf = Header { ecn: Ecn::NotEct, ..down_header() };
    assert_eq!(judged_down(&sealed(&deaf), WORKER).unwrap().1, Ecn::NotEct);
}

#[test]
fn frames_that_do_not_verify_are_dropped_with_their_reason() {
    let with = |change: fn(&mut Header)| {
        let mut header = down_header();
        change(&mut header);
        sealed(&header)
    };
    let good = sealed(&down_header());
    let mut tampered = good.clone();
    *tampered.last_mut().unwrap() ^= 1;
    for (frame, from, reason) in [
        (good.clone(), CLIENT, DropReason::ForeignSource),
        (good.clone(), "127.0.0.1:7001", DropReason::ForeignSource),
        (good[..HEADER_LEN].to_vec(), WORKER, DropReason::FrameMalformed),
        (vec![], WORKER, DropReason::FrameMalformed),
        (with(|h| h.direction = Direction::Up), WORKER, DropReason::FrameMalformed),
        (with(|h| h.key_slot = KeySlot::of(generation(5))), WORKER, DropReason::FrameKey),
        (tampered, WORKER, DropReason::FrameTag),
        (with(|h| h.hop_limit = 0), WORKER, DropReason::FrameHopLimit),
        (with(|h| h.time = coarse_time(NOW - 31)), WORKER, DropReason::FrameStale),
        (with(|h| h.relay = RelayNumber::new(66).unwrap()), WORKER, DropReason::FrameRelay),
        (with(|h| h.client = ClientAddr::RELAY), WORKER, DropReason::ClientAddress),
    ] {
        assert_eq!(judged_down(&frame, from), Err(reason));
    }
}

#[test]
fn a_client_cannot_send_the_workers_frames_back() {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend_from_slice(b"datagram");
    down_header().seal_frame(&tunnel_keys().up, &mut frame).unwrap();
    assert_eq!(judged_down(&frame, WORKER), Err(DropReason::FrameTag));
}

#[test]
fn labels_are_distinct() {
    let labels: std::collections::BTreeSet<_> = DropReason::ALL.iter().map(|r| r.label()).collect();
    assert_eq!(labels.len(), DropReason::ALL.len());
}

/// A memo changes nothing but the time that it takes, whatever came before.
#[test]
fn a_memo_never_answers_for_another_connection_id() {
    let table = table();
    let mut memo = Memo::default();
    let stranger = minter(ServerId::from_u64(0x1234_0000_0000_0000)).mint_connection();
    let packets =
        [short(&live_cid()), short(&stranger), short(&live_cid()), short(&live_cid()), initial(&first_cid(NOW))];
    for packet in &packets {
        let again = classify_up(&table, now(), packet, address(CLIENT), Ecn::Ect0, &mut memo);
        let alone = classify_up(&table, now(), packet, address(CLIENT), Ecn::Ect0, &mut Memo::default());
        assert_eq!(format!("{again:?}"), format!("{alone:?}"));
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_go_nowhere(bytes in proptest::collection::vec(any::<u8>(), 0..1500)) {
        prop_assert!(judged(&bytes).is_err());
        prop_assert!(judged_down(&bytes, WORKER).is_err());
    }

    #[test]
    fn damaged_connection_ids_go_nowhere(bit in 8usize..18 * 8) {
        let mut packet = short(&live_cid());
        packet[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(judged(&packet).is_err());
    }
}

#[path = "tests/tiers.rs"]
mod tiers;
