use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::rtp::RtpHeader;

/// A seeded network between a sender that speaks and a buffer that is pulled every 20 ms.
#[derive(Debug, Clone, Copy)]
struct Network {
    seed: u64,
    loss_percent: u64,
    jitter_ms: u64,
    duplicate_percent: u64,
}

struct Outcome {
    /// Index of each packet, in the order they were played.
    played: Vec<u32>,
    frames: Vec<Frame>,
    stats: JitterStats,
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn percent(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

const START: (u16, u32) = (65_500, u32::MAX - 10_000);

/// Packet `index` as sent in frame `frame`.
fn packet(index: u32, frame: u32) -> RtpPacket {
    let header = RtpHeader {
        payload_type: 96,
        marker: false,
        sequence: START.0.wrapping_add(index as u16),
        timestamp: START.1.wrapping_add(frame * 960),
        ssrc: 7,
        generation: None,
    };
    RtpPacket { header, payload: index.to_be_bytes().to_vec().into() }
}

fn index_of(payload: &Bytes) -> u32 {
    u32::from_be_bytes(payload[..4].try_into().unwrap())
}

/// Sends the frames for which `speaks` holds through the network.
fn run(network: Network, frames: u32, speaks: impl Fn(u32) -> bool) -> Outcome {
    let mut rng = Rng(network.seed.wrapping_mul(2) | 1);
    let mut arrivals = Vec::new();
    for (index, frame) in (0..).zip((0..frames).filter(|&frame| speaks(frame))) {
        let sent = packet(index, frame);
        if rng.percent(network.loss_percent) {
            continue;
        }
        let base = u64::from(frame) * 20_000 + 30_000;
        let jitter = network.jitter_ms * 1000 + 1;
        arrivals.push((base + rng.next() % jitter, sent.clone()));
        if rng.percent(network.duplicate_percent) {
            arrivals.push((base + rng.next() % jitter, sent));
        }
    }
    arrivals.sort_by_key(|arrival| arrival.0);
    deliver(arrivals, frames)
}

fn deliver(arrivals: Vec<(u64, RtpPacket)>, frames: u32) -> Outcome {
    let epoch = Instant::now();
    let mut buffer = JitterBuffer::new(AudioFormat::Opus);
    let mut arrivals = arrivals.into_iter().peekable();
    let mut outcome = Outcome { played: Vec::new(), frames: Vec::new(), stats: JitterStats::default() };
    for tick in 0..frames + 30 {
        let now = u64::from(tick) * 20_000 + 7_000;
        while let Some((at, packet)) = arrivals.next_if(|arrival| arrival.0 <= now) {
            buffer.insert(epoch + Duration::from_micros(at), packet);
        }
        assert!(buffer.packets.len() <= CAPACITY);
        let frame = buffer.pull(epoch + Duration::from_micros(now));
        if let Frame::Packet { payload, .. } = &frame {
            outcome.played.push(index_of(payload));
        }
        outcome.frames.push(frame);
    }
    outcome.stats = buffer.stats();
    outcome
}

fn always(_: u32) -> bool {
    true
}

const CLEAN: Network = Network { seed: 1, loss_percent: 0, jitter_ms: 0, duplicate_percent: 0 };

#[test]
fn a_clean_network_costs_40_ms_then_20_and_loses_nothing() {
    let outcome = run(CLEAN, 500, always);
    assert_eq!(outcome.played, (0..500).collect::<Vec<_>>());
    let stats = outcome.stats;
    assert_eq!((stats.received, stats.lost, stats.late, stats.duplicated), (500, 0, 0, 0));
    assert_eq!(stats.jitter, Duration::ZERO);
    assert_eq!(stats.target, Duration::from_millis(20));
    // Sent at 30 ms, due 40 ms later: silent until then.
    assert_eq!(outcome.frames.iter().position(|frame| *frame != Frame::Silence), Some(3));
}

#[test]
fn five_percent_loss_and_60_ms_jitter_are_concealed() {
    let network = Network { seed: 42, loss_percent: 5, jitter_ms: 60, duplicate_percent: 2 };
    let outcome = run(network, 3000, always);
    let stats = outcome.stats;
    assert!((100..200).contains(&stats.lost), "{stats:?}");
    assert!(stats.late < 60, "{stats:?}");
    assert!(stats.played + stats.late >= stats.received - 2, "{stats:?}");
    assert!(stats.concealed >= stats.lost * 9 / 10 && stats.concealed < stats.lost + stats.late + 30, "{stats:?}");
    assert!(stats.duplicated > 20, "{stats:?}");
    assert!((40..=100).contains(&(stats.target.as_millis() as u64)), "{stats:?}");
    let silent = outcome.frames[10..2990].iter().filter(|frame| **frame == Frame::Silence).count();
    assert_eq!(silent, 0, "nobody paused");
    let corrected = outcome.frames.iter().filter(|frame| matches!(frame, Frame::Conceal { fec_from: Some(_) }));
    assert!(corrected.count() as u64 > stats.concealed / 2, "successors are there to correct from");
}

#[test]
fn pauses_of_the_sender_are_silence_and_not_loss() {
    let outcome = run(CLEAN, 600, |frame| frame % 100 < 60);
    assert_eq!(outcome.played, (0..360).collect::<Vec<_>>());
    let stats = outcome.stats;
    assert_eq!((stats.lost, stats.late, stats.concealed), (0, 0, 0), "{stats:?}");
    let silent = outcome.frames.iter().filter(|frame| **frame == Frame::Silence).count();
    assert!(silent >= 200, "{silent}");
}

#[test]
fn after_three_concealed_frames_there_is_silence() {
    let epoch = Instant::now();
    let mut buffer = JitterBuffer::new(AudioFormat::Opus);
    let at = |tick: u64| epoch + Duration::from_millis(tick * 20);
    for index in 0..5 {
        buffer.insert(at(index.into()), packet(index, index));
    }
    let frames: Vec<_> = (2..12).map(|tick| buffer.pull(at(tick))).collect();
    assert!(frames[..5].iter().all(|frame| matches!(frame, Frame::Packet { .. })), "{frames:?}");
    assert_eq!(frames[5..8], [(); 3].map(|()| Frame::Conceal { fec_from: None }));
    assert_eq!(frames[8..], [Frame::Silence, Frame::Silence]);
}

#[test]
fn a_slower_path_delays_and_loses_no_word() {
    // From frame 200 on everything takes 80 ms longer.
    let arrivals = (0..600)
        .map(|index| (u64::from(index) * 20_000 + if index < 200 { 30_000 } else { 110_000 }, packet(index, index)))
        .collect();
    let outcome = deliver(arrivals, 600);
    assert_eq!(outcome.played, (0..600).collect::<Vec<_>>());
    assert!(outcome.stats.concealed <= 6, "{:?}", outcome.stats);
}

#[test]
fn a_much_slower_path_is_followed_within_a_fifth_of_a_second() {
    let arrivals = (0..600)
        .map(|index| (u64::from(index) * 20_000 + if index < 200 { 30_000 } else { 530_000 }, packet(index, index)))
        .collect();
    let outcome = deliver(arrivals, 600);
    assert!(outcome.played.len() >= 590 - 25, "{:?}", outcome.stats);
}

#[test]
fn a_stall_drops_the_oldest_audio_and_ends_with_little_delay() {
    // One second of packets arrives at once, then speech goes on and pauses.
    let arrivals = (0..400)
        .map(|index| {
            let sent = u64::from(index) * 20_000 + 30_000;
            (if (100..150).contains(&index) { 150 * 20_000 + 30_000 } else { sent }, packet(index, index))
        })
        .collect();
    let outcome = deliver(arrivals, 400);
    let stats = outcome.stats;
    assert!(stats.delay <= Duration::from_millis(240), "{stats:?}");
    assert!(outcome.played.len() >= 350, "{stats:?}");
    assert!(outcome.played.windows(2).all(|pair| pair[0] < pair[1]));
}

#[test]
fn a_restarted_sender_is_heard_again() {
    let mut arrivals: Vec<_> = (0..100).map(|index| (u64::from(index) * 20_000, packet(index, index))).collect();
    arrivals.extend((100..200).map(|index| {
        let mut packet = packet(index, index);
        packet.header.sequence = packet.header.sequence.wrapping_add(30_000);
        packet.header.timestamp = packet.header.timestamp.wrapping_add(3_000_000_000);
        (u64::from(index) * 20_000, packet)
    }));
    arrivals.extend((200..300).map(|index| {
        let mut packet = packet(index, index);
        packet.header.ssrc = 8;
        packet.header.sequence = 5 + index as u16;
        packet.header.timestamp = index * 960;
        (u64::from(index) * 20_000, packet)
    }));
    let outcome = deliver(arrivals, 300);
    assert!(outcome.played.len() >= 290, "{:?}", outcome.stats);
    assert!(outcome.played.windows(2).all(|pair| pair[0] < pair[1]));
    assert_eq!(outcome.stats.lost, 0);
}

#[test]
fn a_flush_drops_what_waits_and_what_still_comes_of_the_response() {
    let epoch = Instant::now();
    let mut buffer = JitterBuffer::new(AudioFormat::Opus);
    let of = |index: u32, generation: u16| {
        let mut packet = packet(index, index);
        packet.header.generation = Some(generation);
        packet
    };
    for index in 0..4 {
        buffer.insert(epoch, of(index, 1));
    }
    buffer.flush(1);
    assert_eq!(buffer.insert(epoch, of(4, 1)), Inserted::Flushed);
    assert_eq!(buffer.pull(epoch + Duration::from_millis(100)), Frame::Silence);
    assert_eq!(buffer.insert(epoch + Duration::from_millis(100), of(5, 2)), Inserted::Kept);
    let next = buffer.pull(epoch + Duration::from_millis(160));
    assert!(matches!(next, Frame::Packet { generation: Some(2), .. }), "{next:?}");
    assert_eq!(buffer.stats().flushed, 5);
    assert!(is_at_most(65_535, 3) && !is_at_most(4, 3), "generations wrap");
}

#[test]
fn delay_shrinks_in_quiet_frames() {
    // Two seconds of heavy jitter, then a clean network; all frames are quiet.
    let mut rng = Rng(3);
    let epoch = Instant::now();
    let mut buffer = JitterBuffer::new(AudioFormat::Opus);
    let mut arrivals: Vec<_> = (0..1000u32)
        .map(|index| {
            let jitter = if index < 100 { rng.next() % 150_000 } else { 0 };
            (u64::from(index) * 20_000 + jitter, packet(index, index))
        })
        .collect();
    arrivals.sort_by_key(|arrival| arrival.0);
    let mut arrivals = arrivals.into_iter().peekable();
    let mut highest = Duration::ZERO;
    for tick in 0..1000u64 {
        let now = tick * 20_000;
        while let Some((at, packet)) = arrivals.next_if(|arrival| arrival.0 <= now) {
            buffer.insert(epoch + Duration::from_micros(at), packet);
        }
        buffer.pull(epoch + Duration::from_micros(now));
        buffer.note_quiet(true);
        highest = highest.max(buffer.stats().delay);
    }
    assert!(highest >= Duration::from_millis(100), "{highest:?}");
    assert!(buffer.stats().delay <= Duration::from_millis(40), "{:?}", buffer.stats());
}

proptest! {
    #[test]
    fn packets_are_played_once_and_in_order(
        seed: u64, loss_percent in 0u64..40, jitter_ms in 0u64..400, duplicate_percent in 0u64..30, pause in 1u32..50,
    ) {
        let network = Network { seed, loss_percent, jitter_ms, duplicate_percent };
        let outcome = run(network, 400, |frame| frame % 60 >= pause);
        prop_assert!(outcome.played.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", outcome.played);
        prop_assert_eq!(outcome.stats.played, outcome.played.len() as u64);
    }

    #[test]
    fn hostile_headers_never_panic_nor_repeat(
        headers in prop::collection::vec((any::<u16>(), any::<u32>(), 0u32..3, any::<Option<u16>>(), 0u64..3_000_000), 0..200),
    ) {
        let epoch = Instant::now();
        let mut buffer = JitterBuffer::new(AudioFormat::Opus);
        let mut played = BTreeSet::new();
        let mut now = 0;
        for (id, (sequence, timestamp, ssrc, generation, step)) in (0u32..).zip(headers) {
            // Half of the time close to the last ones, so that packets are accepted.
            let (sequence, timestamp, step) = if id % 2 == 0 {
                (sequence, timestamp, step)
            } else {
                (id as u16, id * 960, step % 40_000)
            };
            now += step;
            let header = RtpHeader { payload_type: 96, marker: false, sequence, timestamp, ssrc, generation };
            let at = epoch + Duration::from_micros(now);
            buffer.insert(at, RtpPacket { header, payload: id.to_be_bytes().to_vec().into() });
            if let Frame::Packet { payload, .. } = buffer.pull(at) {
                prop_assert!(played.insert(index_of(&payload)));
            }
            prop_assert!(buffer.packets.len() <= CAPACITY);
            if let Some(generation) = generation.filter(|generation| generation % 16 == 0) {
                buffer.flush(generation.into());
            }
        }
    }
}

/// The other end's timestamps are its own word: steps of half the range never overflow anything.
#[test]
fn runaway_timestamps_do_no_harm() {
    let mut buffer = JitterBuffer::new(AudioFormat::Opus);
    let start = Instant::now();
    for n in 0..20_000_u32 {
        let now = start + Duration::from_millis(20) * n;
        let header = RtpHeader {
            payload_type: AudioFormat::Opus.payload_type(),
            marker: false,
            sequence: n as u16,
            timestamp: n.wrapping_mul(i32::MAX as u32),
            ssrc: 1,
            generation: None,
        };
        buffer.insert(now, RtpPacket { header, payload: vec![0; 3].into() });
        buffer.pull(now);
    }
    assert!(buffer.stats().received > 0);
}
