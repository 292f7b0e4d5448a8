//! Two tiers: relay A (65, region 1) at the client's side, relay B (128, region 2) in the worker's region.

use super::*;

const A: &str = "127.0.0.1:8001";
const B: &str = "127.0.0.1:8002";

fn a() -> RelayNumber {
    RelayNumber::new(65).unwrap()
}

fn b() -> RelayNumber {
    RelayNumber::new(128).unwrap()
}

/// A worker of region 2.
fn far() -> ServerId {
    ServerId::from_u64(2 << 54 | 0xbeef)
}

fn secret_of_b() -> RelaySecret {
    RelaySecret::from_bytes([11; 32])
}

fn table_of_a() -> Table {
    let mut routing = routing();
    routing.neighbours(0, vec![NeighbourRecord { number: b(), address: address(B), keys: Vec::new() }]);
    let region = (b().region(), vec![b()]);
    let change = RouteChange { version: 2, region_upserts: vec![region], ..RouteChange::default() };
    routing.apply(0, NOW, change).unwrap();
    routing.table()
}

fn routing_of_b() -> Routing {
    let mut routing = Routing::new(1);
    let keys = Keyring { secrets: vec![(generation(4), secret_of_b())], ..keyring() };
    routing.welcome(0, Welcome { relay: b(), keys }).unwrap();
    let hop = vec![(generation(4), secret().hop_keys(b()))];
    routing.neighbours(0, vec![NeighbourRecord { number: a(), address: address(A), keys: hop }]);
    // A misled router says that region 1 is behind relay A, and names a worker there.
    let change = RouteChange {
        version: 1,
        full: true,
        upserts: vec![(far(), address(WORKER)), (server_id(), address("127.0.0.1:7009"))],
        region_upserts: vec![(a().region(), vec![a()])],
        ..RouteChange::default()
    };
    routing.apply(0, NOW, change).unwrap();
    routing
}

fn table_of_b() -> Table {
    routing_of_b().table()
}

fn frame_of(onward: &Onward<'_>, datagram: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend_from_slice(datagram);
    onward.header.seal_frame(onward.key, &mut frame).unwrap();
    frame
}

/// What A makes of a client's packet: the frame for B.
fn up_frame(packet: &[u8]) -> Vec<u8> {
    let table = table_of_a();
    match classify_up(&table, now(), packet, address(CLIENT), Ecn::Ect0, &mut Memo::default()).unwrap() {
        FromClient::Onward(to) => {
            assert_eq!((to.address, to.through.unwrap().number), (address(B), b()));
            frame_of(&to, packet)
        }
        FromClient::Reset { .. } => panic!("nobody is dead"),
    }
}

fn refused_by(table: &Table, frame: &[u8], from: &str) -> DropReason {
    classify_frame(table, now(), frame, address(from), Ecn::NotEct, &mut Memo::default()).unwrap_err().reason
}

#[test]
fn a_packet_passes_both_relays_and_its_answer_comes_back() {
    let packet = short(&minter(far()).mint_connection());
    let frame = up_frame(&packet);
    let table_of_b = table_of_b();
    let judged = classify_frame(&table_of_b, now(), &frame, address(A), Ecn::Ce, &mut Memo::default()).unwrap();
    let FromTunnel::Onward(onward, datagram) = judged else { panic!("{judged:?}") };
    assert_eq!((onward.address, datagram), (address(WORKER), &packet[..]));
    let header = onward.header;
    assert_eq!((header.relay, header.client.to_socket_addr()), (a(), address(CLIENT)), "A stays the ingress relay");
    assert_eq!((header.hop_limit, header.ecn), (INITIAL_HOP_LIMIT - 1, Ecn::Ce));
    let to_worker = frame_of(&onward, datagram);
    let key = secret_of_b().tunnel_keys(far()).up;
    assert!(tunnel::open(&to_worker, &key, Direction::Up, NOW, MAX_SKEW).is_ok(), "B's own key with the worker");

    // The worker answers through B, which has shown that A has the key.
    let answer = Header { direction: Direction::Down, ..header };
    let mut from_worker = [&[0; HEADER_LEN][..], b"answer"].concat();
    answer.seal_frame(&secret_of_b().tunnel_keys(far()).down, &mut from_worker).unwrap();
    let judged =
        classify_frame(&table_of_b, now(), &from_worker, address(WORKER), Ecn::NotEct, &mut Memo::default()).unwrap();
    let FromTunnel::Onward(onward, datagram) = judged else { panic!("{judged:?}") };
    assert_eq!((onward.address, onward.header.hop_limit), (address(A), INITIAL_HOP_LIMIT - 2));
    let to_a = frame_of(&onward, datagram);
    let table_of_a = table_of_a();
    table_of_a.neighbour(b()).unwrap().contact.sent(Millis(0));
    let judged = classify_frame(&table_of_a, now(), &to_a, address(B), Ecn::NotEct, &mut Memo::default()).unwrap();
    let FromTunnel::ToClient(to) = judged else { panic!("{judged:?}") };
    assert_eq!((to.client, to.datagram, to.ecn), (address(CLIENT), &b"answer"[..], Ecn::Ce));
    assert!(!table_of_a.neighbour(b()).unwrap().contact.is_silent(Millis(10_000)), "B was heard");
}

#[test]
fn forged_frames_with_a_neighbours_number_go_nowhere() {
    let packet = short(&minter(far()).mint_connection());
    let good = up_frame(&packet);
    let table = table_of_b();
    assert_eq!(refused_by(&table, &good, CLIENT), DropReason::ForeignSource);
    assert_eq!(refused_by(&table, &good, WORKER), DropReason::FrameMalformed, "a worker sends nothing up");
    let mut tampered = good.clone();
    *tampered.last_mut().unwrap() ^= 1;
    assert_eq!(refused_by(&table, &tampered, A), DropReason::FrameTag);
    let header = Header { time: coarse_time(NOW), ..Header::parse(&good).unwrap() };
    let with = |header: Header, key: &TunnelKey| {
        let mut frame = good.clone();
        header.seal_frame(key, &mut frame).unwrap();
        frame
    };
    let hop = secret().hop_keys(b());
    let other = Header { relay: RelayNumber::new(66).unwrap(), ..header };
    assert_eq!(refused_by(&table, &with(other, &hop.up), A), DropReason::FrameRelay, "of another relay's client");
    let foreign = secret_of_b().hop_keys(a());
    assert_eq!(refused_by(&table, &with(header, &foreign.up), A), DropReason::FrameTag, "the opposite role's key");
    let down = Header { direction: Direction::Down, ..header };
    assert_eq!(refused_by(&table, &with(down, &hop.down), A), DropReason::FrameTag);
    assert_eq!(refused_by(&table_of_a(), &with(header, &hop.up), B), DropReason::FrameKey, "A is nobody's way in");
    let stale = Header { time: coarse_time(NOW - 121), ..header };
    let refusal = classify_frame(&table, now(), &with(stale, &hop.up), address(A), Ecn::NotEct, &mut Memo::default())
        .unwrap_err();
    let skew = Skew { sender: Sender::Relay(a()), ahead_s: -121 };
    assert_eq!(refusal, Refusal { reason: DropReason::FrameStale, skew: Some(skew) });
}

#[test]
fn a_frame_that_would_loop_dies_and_says_why() {
    // To B, but for a worker that A reaches itself, or the other way round: B serves its own region only.
    let back = short(&live_cid());
    let table = table_of_b();
    let hop = secret().hop_keys(b());
    let seal = |packet: &[u8], hop_limit| {
        let mut frame = [&[0; HEADER_LEN][..], packet].concat();
        let header =
            Header { direction: Direction::Up, hop_limit, client: address(CLIENT).into(), relay: a(), ..down_header() };
        header.seal_frame(&hop.up, &mut frame).unwrap();
        frame
    };
    assert_eq!(refused_by(&table, &seal(&back, 4), A), DropReason::FrameRegion);
    let good = short(&minter(far()).mint_connection());
    assert_eq!(refused_by(&table, &seal(&good, 1), A), DropReason::FrameHopLimit);
    assert_eq!(refused_by(&table, &seal(&good, 0), A), DropReason::FrameHopLimit);
    let gone = ServerId::from_u64(far().to_u64() ^ 1);
    assert_eq!(refused_by(&table, &seal(&short(&minter(gone).mint_connection()), 4), A), DropReason::DeadIncarnation);
    assert_eq!(refused_by(&table, &seal(b"garbage", 4), A), DropReason::TooShort);
    // Down: an answer that has gone round, and one for a relay that nobody knows.
    let answer = |hop_limit, relay| {
        let mut frame = [&[0; HEADER_LEN][..], b"answer"].concat();
        let header = Header { hop_limit, relay, ..down_header() };
        header.seal_frame(&secret_of_b().tunnel_keys(far()).down, &mut frame).unwrap();
        frame
    };
    assert_eq!(refused_by(&table, &answer(1, a()), WORKER), DropReason::FrameHopLimit);
    assert_eq!(refused_by(&table, &answer(4, RelayNumber::new(200).unwrap()), WORKER), DropReason::FrameRelay);
}

#[test]
fn expired_and_misused_first_ids_die_at_either_relay() {
    let table = table_of_b();
    let seal = |packet: &[u8]| {
        let mut frame = [&[0; HEADER_LEN][..], packet].concat();
        let header = Header { direction: Direction::Up, hop_limit: 4, relay: a(), ..down_header() };
        header.seal_frame(&secret().hop_keys(b()).up, &mut frame).unwrap();
        frame
    };
    for (expires, reason) in [(NOW - 5, DropReason::InitialExpired), (NOW + 60, DropReason::InitialMisused)] {
        let cid = minter(far()).mint_initial(expires).0;
        let packet = if reason == DropReason::InitialMisused { short(&cid) } else { initial(&cid) };
        let at_a =
            classify_up(&table_of_a(), now(), &packet, address(CLIENT), Ecn::NotEct, &mut Memo::default()).map(|_| ());
        assert_eq!((at_a, refused_by(&table, &seal(&packet), A)), (Err(reason), reason));
    }
}

#[test]
fn a_draining_neighbour_is_heard_and_an_unknown_notice_is_not() {
    let notice = |direction, relay, key: &TunnelKey, bytes: &[u8]| {
        let mut frame = [&[0; HEADER_LEN][..], bytes].concat();
        let header = Header { direction, client: ClientAddr::RELAY, relay, hop_limit: 4, ..down_header() };
        header.seal_frame(key, &mut frame).unwrap();
        frame
    };
    let draining = Notice::Draining { deadline_ms: 900 };
    let hop = secret().hop_keys(b());
    let table = table_of_b();
    let of_a = notice(Direction::Up, a(), &hop.up, &draining.to_bytes());
    let judged = classify_frame(&table, now(), &of_a, address(A), Ecn::NotEct, &mut Memo::default()).unwrap();
    assert!(matches!(judged, FromTunnel::Notice { from, notice, .. } if from.number == a() && notice == draining));
    let of_b = notice(Direction::Down, b(), &hop.down, &draining.to_bytes());
    let table_of_a = table_of_a();
    let judged = classify_frame(&table_of_a, now(), &of_b, address(B), Ecn::NotEct, &mut Memo::default()).unwrap();
    assert!(matches!(judged, FromTunnel::Notice { from, .. } if from.number == b()));
    assert_eq!(refused_by(&table, &notice(Direction::Up, a(), &hop.up, &[9]), A), DropReason::FrameNotice);
    // A worker's or another relay's client at no address is no notice.
    assert_eq!(refused_by(&table_of_a, &notice(Direction::Down, a(), &hop.down, b"x"), B), DropReason::ClientAddress);
}

#[test]
fn one_flow_is_one_connection_id_through_one_relay() {
    let cid = minter(far()).mint_connection();
    let flow_at_b = |relay: RelayNumber| {
        let (server, nonce) = table_of_b().codec().decode_u64(cid.as_bytes()).unwrap();
        flow(server, nonce, &Header { relay, ..down_header() }, false).unwrap().key
    };
    assert_ne!(flow_at_b(a()), flow_at_b(b()), "spoofing through one relay costs callers of another nothing");
}

#[test]
fn the_dead_are_answered_for_unless_they_live() {
    let mut routing = routing();
    let dead = |server_id| DeadServer { server_id, keys: vec![(generation(4), [5; 32])] };
    let change = RouteChange { version: 2, dead: vec![dead(far()), dead(server_id())], ..RouteChange::default() };
    routing.apply(0, NOW, change).unwrap();
    let bereaved = routing.table();
    let own = short(&live_cid());
    let judged = classify_up(&bereaved, now(), &own, address(CLIENT), Ecn::NotEct, &mut Memo::default());
    assert!(matches!(judged, Ok(FromClient::Reset { .. })), "a route is no life");
    let back = RouteChange { version: 3, upserts: vec![(server_id(), address(WORKER))], ..RouteChange::default() };
    routing.apply(0, NOW, back).unwrap();
    let table = routing.table();
    let judge = |packet: &[u8], from: &str| {
        classify_up(&table, now(), packet, address(from), Ecn::NotEct, &mut Memo::default())
    };
    let cid = minter(far()).mint_connection();
    let packet = short(&cid);
    let answered = judge(&packet, CLIENT).unwrap();
    assert!(matches!(answered, FromClient::Reset { cid: of, .. } if of == *cid.as_bytes()));
    assert!(matches!(judge(&short(&live_cid()), CLIENT), Ok(FromClient::Onward(_))), "a live route says more");
    for packet in [initial(&cid), long(0xe0, 1, cid.as_bytes(), 60), short(&minter(far()).mint_initial(NOW + 9).0)] {
        assert_eq!(judge(&packet, CLIENT).unwrap_err(), DropReason::DeadServer, "no token is known for it");
    }
    assert_eq!(judge(&packet, "192.0.2.7:0").unwrap_err(), DropReason::DeadServer);
    let later = Now { unix_s: NOW + 600, ..now() };
    let forgotten =
        classify_up(&table, later, &packet, address(CLIENT), Ecn::NotEct, &mut Memo::default()).unwrap_err();
    assert_eq!(forgotten, DropReason::UnknownServer);
}
