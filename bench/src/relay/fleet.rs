//! One relay, one worker and their keys; the packets that they exchange.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    time::{SystemTime, UNIX_EPOCH},
};

use antiphon_core::{
    cid::{CidMinter, ConfigId, NonceCounter},
    id::{KeyGeneration, RelayNumber, ServerId},
    keys::{FleetRoot, RelaySecret},
    tunnel::{Direction, Ecn, HEADER_LEN, Header, INITIAL_HOP_LIMIT, KeySlot, coarse_time},
};
use antiphon_relay::{
    data_path::{Config, DataPath},
    keyring::{CidKey, Keyring},
    limits::Limits,
    metrics::Metrics,
    routing::{RouteChange, Routing, Welcome},
};
use prometheus_client::registry::Registry;

use super::PACKET_LEN;

/// Runs a relay's data path on one thread, until standard input ends. Says its public and its tunnel address.
pub(crate) fn serve(worker: SocketAddr) -> anyhow::Result<()> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let metrics = Metrics::register(&mut Registry::default());
    let config = Config { public: any, tunnel: any, cores: 1, pin: true, limits: Limits::default() };
    let (path, _exits) = DataPath::start(&config, &metrics)?;
    let mut routing = Routing::new(1);
    let cid = CidKey { config: config_id(), generation: generation(), key: root().cid_key(generation()) };
    let keys = Keyring { cid: vec![cid], secrets: vec![(generation(), secret())], sealing: generation() };
    routing.welcome(0, Welcome { relay: relay_number(), keys })?;
    let change = RouteChange { version: 1, full: true, upserts: vec![(SERVER, worker)], ..RouteChange::default() };
    routing.apply(0, 0, change)?;
    path.swap(routing.table());
    until_input_ends(&format!("{} {}", path.public(), path.tunnel()))
}

/// Says something to the process that started this one, and waits for its end.
pub(crate) fn until_input_ends(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")?;
    out.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// A client's packet: short header, a live connection ID; the client's index at the end.
pub(super) fn packet(client: u16) -> Vec<u8> {
    let cid = root().cid_key(generation());
    let counter = NonceCounter::starting_at(u64::from(client));
    let cid = CidMinter::new(SERVER, config_id(), cid, counter).mint_connection();
    let mut packet = vec![0x40];
    packet.extend_from_slice(cid.as_bytes());
    packet.resize(PACKET_LEN - 2, 0x22);
    packet.extend_from_slice(&client.to_be_bytes());
    packet
}

/// The worker's frame around a packet for a client.
pub(super) fn frame(client: SocketAddr, packet: &[u8]) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let header = Header {
        direction: Direction::Down,
        key_slot: KeySlot::of(generation()),
        hop_limit: INITIAL_HOP_LIMIT,
        ecn: Ecn::NotEct,
        client: client.into(),
        relay: relay_number(),
        time: coarse_time(now),
    };
    let mut head = [0; HEADER_LEN];
    header.seal_into(&secret().tunnel_keys(SERVER).down, packet, &mut head);
    [&head, packet].concat()
}

pub(crate) fn generation() -> KeyGeneration {
    KeyGeneration::new(1).expect("1 is a generation")
}

pub(crate) fn relay_number() -> RelayNumber {
    RelayNumber::new(65).expect("65 is a relay number")
}

fn config_id() -> ConfigId {
    ConfigId::new(2).expect("2 is a configuration")
}

fn root() -> FleetRoot {
    FleetRoot::from_bytes([7; 32])
}

fn secret() -> RelaySecret {
    root().relay_secret(relay_number(), generation())
}

const SERVER: ServerId = ServerId::from_u64(0x0001_0002_0300_0009);
