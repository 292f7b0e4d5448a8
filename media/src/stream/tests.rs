use super::*;
use std::time::Duration;

const ORIGIN: StreamOrigin = StreamOrigin { ssrc: 9, sequence: 65_535, timestamp: 5 };

fn sender(format: AudioFormat) -> Sender {
    Sender::new(format, EncoderSettings::default(), 300, ORIGIN).unwrap()
}

fn tone(format: AudioFormat) -> Vec<i16> {
    (0..format.frame_samples()).map(|i| ((i as f32 * 0.3).sin() * 6000.0) as i16).collect()
}

fn parse(datagram: &Bytes) -> RtpPacket {
    let (flow, packet) = rtp::split_flow(datagram).unwrap();
    assert_eq!(flow, 300);
    RtpPacket::parse(&packet).unwrap()
}

#[test]
fn headers_count_on_and_mark_the_first_packet_after_a_silence() {
    for format in AudioFormat::ALL {
        let mut sender = sender(format);
        sender.set_generation(Some(0x0003_0002));
        let first = parse(&sender.push(&tone(format)).unwrap().unwrap());
        let second = parse(&sender.push(&tone(format)).unwrap().unwrap());
        assert_eq!((first.header.sequence, second.header.sequence), (65_535, 0));
        assert_eq!(second.header.timestamp, 5 + format.rtp_timestamp_step());
        assert_eq!((first.header.marker, second.header.marker), (true, false));
        assert_eq!(first.header.generation, Some(2));
        let silence = vec![0; format.frame_samples()];
        let sent = (0..40).filter(|_| sender.push(&silence).unwrap().is_some()).count();
        assert_eq!(sent, 10);
        sender.skip();
        let next = parse(&sender.push(&tone(format)).unwrap().unwrap());
        assert!(next.header.marker);
        assert_eq!(next.header.sequence, 11);
        assert_eq!(next.header.timestamp, 5 + 43 * format.rtp_timestamp_step());
        assert_eq!((sender.stats().packets, sender.stats().suppressed), (13, 31));
    }
}

#[test]
fn datagrams_are_not_larger_than_promised() {
    for format in AudioFormat::ALL {
        let settings = EncoderSettings { bitrate: 128_000, ..EncoderSettings::default() };
        let mut sender = Sender::new(format, settings, 300, ORIGIN).unwrap();
        sender.set_generation(Some(1));
        for seed in 0..50u32 {
            let noise: Vec<i16> = (0..format.frame_samples() as u32)
                .map(|i| ((i + seed * 1000).wrapping_mul(2_654_435_761) >> 16) as i16)
                .collect();
            let datagram = sender.push(&noise).unwrap().unwrap();
            assert!(datagram.len() <= format.max_packet_bytes() + 2, "{format:?} {}", datagram.len());
        }
    }
}

#[test]
fn sound_passes_and_flushed_responses_do_not() {
    for format in AudioFormat::ALL {
        let (mut sender, mut receiver) = (sender(format), Receiver::new(format));
        let epoch = Instant::now();
        let mut heard = Vec::new();
        for tick in 0..60u32 {
            let now = epoch + Duration::from_millis(20) * tick;
            sender.set_generation(Some(1 + tick / 40));
            let datagram = sender.push(&tone(format)).unwrap().unwrap();
            let (_, packet) = rtp::split_flow(&datagram).unwrap();
            receiver.insert(now, &packet).unwrap();
            if tick == 30 {
                receiver.flush(1);
            }
            let frame = receiver.pull(now);
            assert_eq!(frame.pcm.len(), format.frame_samples());
            heard.push((frame.kind, frame.generation));
        }
        assert_eq!(heard[10], (FrameKind::Played, Some(1)));
        assert!(heard[30..40].iter().all(|&frame| frame == (FrameKind::Silence, None)), "{format:?} {heard:?}");
        assert_eq!(heard[45], (FrameKind::Played, Some(2)));
        assert_eq!(receiver.stats().jitter.lost, 0);
    }
}

#[test]
fn wrong_payloads_are_refused_or_concealed() {
    let mut receiver = Receiver::new(AudioFormat::Opus);
    let now = Instant::now();
    let (_, foreign) = rtp::split_flow(&sender(AudioFormat::L16At16k).push(&[500; 320]).unwrap().unwrap()).unwrap();
    assert_eq!(receiver.insert(now, &foreign), Err(RtpError::PayloadType { found: 97, agreed: 96 }));
    let mut packet = Vec::new();
    let header = RtpHeader { payload_type: 96, marker: true, sequence: 1, timestamp: 1, ssrc: 1, generation: None };
    header.write(&mut packet);
    packet.extend(b"\xffgarbage");
    assert_eq!(receiver.insert(now, &packet.into()), Ok(Inserted::Kept));
    assert_eq!(receiver.pull(now + Duration::from_millis(60)).kind, FrameKind::Concealed);
    assert_eq!(receiver.stats().undecodable, 1);
    assert!(receiver.last_error().is_some());
}
