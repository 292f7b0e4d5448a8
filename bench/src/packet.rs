//! What each packet costs without any system call: its connection ID, its tunnel header.

use std::array;

use antiphon_core::{
    cid::{CidCodec, CidMinter, Config, ConfigId, NonceCounter},
    id::ServerId,
    keys::TunnelKey,
    tunnel::{ClientAddr, Direction, Ecn, HEADER_LEN, Header, KeySlot, MAX_SKEW, coarse_time, open},
};

use crate::{
    measure::ns_per_call,
    relay::fleet::{generation, relay_number},
    report::Row,
};

/// Decoding as the relay does it (one AES block), and of the other shape that the draft allows (four).
pub(crate) fn cid() -> anyhow::Result<Vec<Row>> {
    let id = ConfigId::new(0)?;
    let mut codec = CidCodec::new();
    codec.insert(id, KEY);
    let mut minter = CidMinter::new(ServerId::from_u64(7), id, KEY, NonceCounter::starting_at(1));
    let single: [_; MANY] = array::from_fn(|_| *minter.mint_connection().as_bytes());
    let config = Config::new(id, 8, 9, Some(KEY), true)?;
    let long = |n: usize| config.encode(&[1; 8], &[&(n as u64).to_be_bytes()[..], &[0]].concat(), 0);
    let long = (0..MANY).map(long).collect::<Result<Vec<_>, _>>()?;
    Ok(vec![
        Row::new("cid-single-pass", ns_per_call(|n| codec.decode_u64(&single[n % MANY]))?, "ns"),
        Row::new("cid-four-pass", ns_per_call(|n| config.decode(&long[n % MANY]))?, "ns"),
    ])
}

/// Sealing as the relay does it upstream, opening as it does downstream and the worker upstream.
pub(crate) fn tunnel() -> anyhow::Result<Vec<Row>> {
    let key = TunnelKey::from_bytes(KEY);
    let mut rows = Vec::new();
    for (len, seal, open_) in
        [(172, "tunnel-seal-172", "tunnel-open-172"), (1200, "tunnel-seal-1200", "tunnel-open-1200")]
    {
        let mut frame = vec![0x5a; HEADER_LEN + len];
        let header = |n: usize| Header {
            direction: Direction::Up,
            key_slot: KeySlot::of(generation()),
            hop_limit: 4,
            ecn: Ecn::Ect0,
            client: ClientAddr { port: n as u16, ..ClientAddr::RELAY },
            relay: relay_number(),
            time: coarse_time(NOW),
        };
        rows.push(Row::new(seal, ns_per_call(|n| header(n).seal_frame(&key, &mut frame))?, "ns"));
        rows.push(Row::new(open_, ns_per_call(|_| open(&frame, &key, Direction::Up, NOW, MAX_SKEW).is_ok())?, "ns"));
        anyhow::ensure!(open(&frame, &key, Direction::Up, NOW, MAX_SKEW).is_ok(), "the measured frame does not open");
    }
    Ok(rows)
}

const MANY: usize = 1024;
const KEY: [u8; 16] = [0x42; 16];
/// Any time will do.
const NOW: u64 = 1_800_000_000;
