//! Audio.

use std::time::{Duration, Instant};

use antiphon_media::{
    codec::{Decoder, Encoder, EncoderSettings, OpusPacket},
    dtmf,
    format::AudioFormat,
    jitter::{Inserted, JitterBuffer},
    receipt::{self, Receipt},
    rtp::{self as packets, RtpHeader, RtpPacket},
    stream::Receiver,
    wav as files,
};
use bytes::Bytes;

use crate::input::Input;

const FORMATS: [AudioFormat; 3] = [AudioFormat::Opus, AudioFormat::L16At16k, AudioFormat::L16At24k];

/// A datagram with its flow identifier, or without one.
pub(super) fn rtp(data: &[u8]) -> bool {
    let datagram = Bytes::copy_from_slice(data);
    if let Ok((flow, payload)) = packets::split_flow(&datagram) {
        let mut again = Vec::new();
        packets::write_flow(flow, &mut again);
        assert_eq!(again.len(), packets::flow_bytes(flow));
        let _ = RtpPacket::parse(&payload);
    }
    match RtpPacket::parse(&datagram) {
        Ok(packet) => {
            let mut again = Vec::new();
            packet.header.write(&mut again);
            again.extend_from_slice(&packet.payload);
            assert_eq!(RtpPacket::parse(&again.into()), Ok(packet), "what is understood survives");
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

fn packet(sequence: u16, timestamp: u32, generation: Option<u16>, payload: &[u8]) -> Vec<u8> {
    let header = RtpHeader { payload_type: 96, marker: false, sequence, timestamp, ssrc: 7, generation };
    let mut bytes = Vec::new();
    header.write(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

pub(super) fn rtp_seeds() -> Vec<Vec<u8>> {
    // With a contributing source, somebody's extension and padding.
    let mut full = vec![0xb1, 0xe0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4];
    full.extend_from_slice(&[0xbe, 0xde, 0, 2, 0x11, 1, 2, 0x20, 9, 0, 0x30, 8, 1, 2, 3, 4, 0, 2]);
    vec![packet(1, 960, None, b"payload"), packet(2, 1_920, Some(3), b"payload"), full]
}

/// Operations on a jitter buffer: time passes, packets come, frames are pulled, answers are flushed.
pub(super) fn jitter(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let format = FORMATS[usize::from(input.byte()) % 3];
    let (mut buffer, mut now) = (JitterBuffer::new(format), Instant::now());
    let (mut inserted, mut pulled) = (0_u64, 0_u64);
    while !input.is_empty() {
        match input.byte() % 8 {
            0..=2 => {
                pulled += 1;
                buffer.pull(now);
                now += Duration::from_millis(20);
            }
            3..=5 => {
                let (sequence, timestamp) = (input.u16(), u32::from(input.u16()) * format.rtp_timestamp_step());
                let generation = Some(u16::from(input.byte())).filter(|generation| *generation > 0);
                let ssrc = u32::from(input.byte() & 1);
                let header = RtpHeader {
                    payload_type: format.payload_type(),
                    marker: false,
                    sequence,
                    timestamp,
                    ssrc,
                    generation,
                };
                let outcome = buffer.insert(now, RtpPacket { header, payload: Bytes::from_static(b"x") });
                inserted += u64::from(outcome != Inserted::Duplicate);
            }
            6 => now += Duration::from_micros(u64::from(input.u16()) * 16),
            _ => match input.byte() {
                quiet @ 0..=1 => buffer.note_quiet(quiet == 0),
                generation => buffer.flush(generation.into()),
            },
        }
    }
    let stats = buffer.stats();
    assert!(stats.received <= inserted && stats.played <= inserted.min(pulled), "{stats:?}");
    stats.played > 0
}

pub(super) fn jitter_seeds() -> Vec<Vec<u8>> {
    let mut seed = vec![0];
    for n in 0..20_u8 {
        // Every fifth is missing, every seventh comes twice; the answer changes in the middle.
        let insert = [3, 0, n, 0, n, 1 + n / 10, 0];
        if n % 5 != 4 {
            seed.extend_from_slice(&insert);
        }
        if n % 7 == 6 {
            seed.extend_from_slice(&insert);
        }
        seed.push(0);
    }
    seed.extend_from_slice(&[7, 1, 0, 0, 6, 255, 255, 0]);
    vec![seed]
}

/// Packets behind their lengths, into one decoder.
pub(super) fn opus(data: &[u8]) -> bool {
    let (mut input, mut decoder, mut understood) = (Input::new(data), Decoder::new(AudioFormat::Opus), false);
    while !input.is_empty() {
        let length = usize::from(input.u16());
        let payload = input.bytes(length & 0x7ff);
        match length >> 14 {
            0 => drop(decoder.conceal_from(payload).to_vec()),
            1 => drop(decoder.conceal().to_vec()),
            _ => match decoder.decode(payload) {
                Ok(pcm) => {
                    assert_eq!(pcm.len(), AudioFormat::Opus.frame_samples());
                    assert!(OpusPacket::parse(payload).is_ok(), "the rules of RFC 6716 come first");
                    understood = true;
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            },
        }
        assert_eq!(decoder.frame().len(), AudioFormat::Opus.frame_samples());
    }
    understood
}

fn speech(frames: usize) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(AudioFormat::Opus, EncoderSettings::default()).expect("default settings");
    let mut tone = Vec::new();
    dtmf::generate(5, Duration::from_millis(20 * frames as u64), AudioFormat::Opus.sample_rate(), &mut tone);
    let frames = tone.chunks_exact(AudioFormat::Opus.frame_samples());
    frames.filter_map(|pcm| encoder.encode(pcm).expect("a frame")).collect()
}

pub(super) fn opus_seeds() -> Vec<Vec<u8>> {
    let mut seed = Vec::new();
    for (n, packet) in speech(4).into_iter().enumerate() {
        let kind = if n == 2 { 0 } else { 3 << 14 };
        seed.extend_from_slice(&(kind | packet.len() as u16).to_be_bytes());
        seed.extend_from_slice(&packet);
    }
    vec![seed]
}

/// Datagrams behind their lengths; a length of zero lets 20 ms pass.
pub(super) fn receiver(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let format = FORMATS[usize::from(input.byte()) % 3];
    let (mut receiver, mut now) = (Receiver::new(format), Instant::now());
    // A packet waits for its time: what is left is played out.
    let mut tail = 10;
    while !input.is_empty() || tail > 0 {
        let length = usize::from(input.u16()) & 0x7ff;
        if length == 0 {
            assert_eq!(receiver.pull(now).pcm.len(), format.frame_samples());
            now += Duration::from_millis(20);
            tail -= usize::from(input.is_empty());
        } else {
            let _ = receiver.insert(now, &Bytes::copy_from_slice(input.bytes(length)));
        }
    }
    let stats = receiver.stats();
    stats.jitter.played > stats.undecodable
}

pub(super) fn receiver_seeds() -> Vec<Vec<u8>> {
    let mut seed = vec![0];
    for (n, payload) in speech(5).into_iter().enumerate() {
        let datagram = packet(n as u16, n as u32 * 960, Some(1), &payload);
        seed.extend_from_slice(&(datagram.len() as u16).to_be_bytes());
        seed.extend_from_slice(&datagram);
        seed.extend_from_slice(&[0, 0]);
    }
    vec![seed]
}

/// Sound (behind an odd first byte, with a digit generated before it), and the receipt that its bytes would be.
pub(super) fn tones(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let choices = input.byte();
    let rate = [16_000, 24_000, 48_000][usize::from(choices >> 1) % 3];
    let mut pcm = Vec::new();
    if choices & 1 == 1 {
        dtmf::generate(choices >> 4, Duration::from_millis(80), rate, &mut pcm);
    }
    let rest = input.rest();
    pcm.extend(rest.chunks_exact(2).take(4_800).map(|sample| i16::from_le_bytes([sample[0], sample[1]])));
    let found = dtmf::detect(&pcm, rate);
    assert!(found.iter().all(|found| found.digit < 16));
    let digits: Vec<u8> = rest.iter().take(receipt::DIGITS).map(|byte| byte & 15).collect();
    if let Ok(parsed) = Receipt::parse(&digits) {
        assert_eq!(parsed.digits()[..], digits);
        return true;
    }
    let _ = Receipt::parse(rest).map_err(|error| error.to_string());
    !found.is_empty()
}

pub(super) fn tones_seeds() -> Vec<Vec<u8>> {
    let receipt = Receipt { turn: 1, chain: 0x0102_0304, nonce: 5, epoch: 1 };
    vec![[&[0][..], &receipt.digits()].concat(), vec![0x51; 64]]
}

pub(super) fn wav(data: &[u8]) -> bool {
    match files::read(data) {
        Ok(wav) => {
            let again = files::read(&files::write(&wav.pcm, wav.rate)).expect("ours can be read");
            assert_eq!((again.pcm, again.rate), (wav.pcm, wav.rate));
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

pub(super) fn wav_seeds() -> Vec<Vec<u8>> {
    vec![files::write(&[1, -2, 3, -4], 16_000)]
}
