use proptest::prelude::*;

use super::*;
use crate::speech::Utterance;

fn encoder(format: AudioFormat) -> Encoder {
    Encoder::new(format, EncoderSettings::default()).unwrap()
}

fn opus_payloads() -> Vec<Vec<u8>> {
    let mut encoder = encoder(AudioFormat::Opus);
    let pcm = Utterance::ALL[0].pcm();
    pcm.chunks_exact(320).map(|frame| encoder.encode(frame).unwrap().unwrap()).collect()
}

#[test]
fn settings_out_of_range_are_named() {
    let settings = EncoderSettings { complexity: 11, ..EncoderSettings::default() };
    let error = Encoder::new(AudioFormat::Opus, settings).unwrap_err();
    assert_eq!(error.to_string(), "complexity of 11 is not between 0 and 10");
    assert!(matches!(encoder(AudioFormat::Opus).encode(&[0; 10]), Err(EncodeError::FrameLength { found: 10, .. })));
}

#[test]
fn opus_packets_of_ours_are_well_formed_and_near_their_bitrate() {
    let payloads = opus_payloads();
    for payload in &payloads {
        assert_eq!(OpusPacket::parse(payload).unwrap().duration_us(), 20_000);
    }
    let bits: usize = payloads.iter().map(|payload| payload.len() * 8).sum();
    let bitrate = bits * 50 / payloads.len();
    assert!((16_000..32_000).contains(&bitrate), "{bitrate}");
}

#[test]
fn linear_pcm_round_trips_exactly() {
    for format in [AudioFormat::L16At16k, AudioFormat::L16At24k] {
        let pcm: Vec<i16> = (0..format.frame_samples()).map(|i| i as i16 * 61 - 9000).collect();
        let payload = encoder(format).encode(&pcm).unwrap().unwrap();
        assert_eq!(payload[..2], pcm[0].to_be_bytes());
        let mut decoder = Decoder::new(format);
        assert_eq!(decoder.decode(&payload).unwrap(), pcm);
        assert!(matches!(decoder.decode(&payload[1..]), Err(DecodeError::Length { .. })));
    }
}

#[test]
fn silence_is_sent_for_200_ms_and_then_no_more() {
    for format in AudioFormat::ALL {
        let mut encoder = encoder(format);
        let silence = vec![3; format.frame_samples()];
        let sent = (0..50).filter(|_| encoder.encode(&silence).unwrap().is_some()).count();
        assert_eq!(sent, 10, "{format:?}");
        let sound = vec![900; format.frame_samples()];
        assert!(encoder.encode(&sound).unwrap().is_some());
    }
    let settings = EncoderSettings { dtx: false, ..EncoderSettings::default() };
    let mut always = Encoder::new(AudioFormat::Opus, settings).unwrap();
    assert!((0..50).all(|_| always.encode(&[0; 320]).unwrap().is_some()));
}

#[test]
fn forward_error_correction_is_closer_to_the_truth_than_concealment() {
    let settings = EncoderSettings { fec_loss_percent: 20, ..EncoderSettings::default() };
    let mut encoder = Encoder::new(AudioFormat::Opus, settings).unwrap();
    let pcm = Utterance::ALL[3].pcm();
    let payloads: Vec<_> = pcm.chunks_exact(320).map(|frame| encoder.encode(frame).unwrap().unwrap()).collect();
    let error = |fec: bool| {
        let (mut truth, mut decoder) = (Decoder::new(AudioFormat::Opus), Decoder::new(AudioFormat::Opus));
        let mut sum = 0.0;
        for (index, payload) in payloads.iter().enumerate() {
            let whole = truth.decode(payload).unwrap().to_vec();
            let heard = match payloads.get(index + 1).filter(|_| index % 8 == 5) {
                Some(next) if fec => decoder.conceal_from(next),
                Some(_) => decoder.conceal(),
                None => decoder.decode(payload).unwrap(),
            };
            if index % 8 == 5 {
                sum += whole.iter().zip(heard).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>();
            }
        }
        sum
    };
    let (with, without) = (error(true), error(false));
    assert!(with < without * 0.5, "{with} {without}");
}

#[test]
fn packets_of_another_duration_are_refused() {
    // SILK, wideband, 60 ms.
    assert!(matches!(Decoder::new(AudioFormat::Opus).decode(&[11 << 3, 0, 0]), Err(DecodeError::Duration(60_000))));
    assert!(matches!(Decoder::new(AudioFormat::Opus).decode(&[]), Err(DecodeError::Malformed(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_payloads_never_panic(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..6)) {
        for format in AudioFormat::ALL {
            let mut decoder = Decoder::new(format);
            for payload in &payloads {
                let _ = decoder.decode(payload);
                let _ = decoder.conceal_from(payload);
            }
        }
    }

    /// All 20 ms configurations, mono and stereo, with arbitrary contents.
    #[test]
    fn arbitrary_frames_of_legal_length_never_panic(
        frames in prop::collection::vec((0u8..32, any::<bool>(), prop::collection::vec(any::<u8>(), 0..160)), 1..8),
    ) {
        let mut decoder = Decoder::new(AudioFormat::Opus);
        for (config, stereo, contents) in frames {
            let count = match config {
                0..=11 if config % 4 == 1 => 0,
                0..=11 if config % 4 == 0 => 1,
                12..=15 if config % 2 == 1 => 0,
                12..=15 => 1,
                16..=31 if config % 4 == 3 => 0,
                16..=31 if config % 4 == 2 => 1,
                _ => 2,
            };
            let mut payload = vec![config << 3 | u8::from(stereo) << 2 | count];
            payload.extend(contents);
            let _ = decoder.conceal_from(&payload);
            let _ = decoder.decode(&payload);
            let _ = decoder.conceal();
        }
    }

    #[test]
    fn damaged_packets_never_panic(damage in prop::collection::vec((0usize..100, any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        let mut payloads = opus_payloads_once().to_vec();
        for (packet, at, byte) in damage {
            let payload = &mut payloads[packet];
            let at = at.index(payload.len());
            payload[at] ^= byte;
            if byte & 1 == 1 {
                payload.truncate(at + 1);
            }
        }
        let mut decoder = Decoder::new(AudioFormat::Opus);
        for (index, payload) in payloads.iter().take(100).enumerate() {
            if index % 5 == 0 {
                let _ = decoder.conceal_from(payload);
            }
            if decoder.decode(payload).is_err() {
                decoder.conceal();
            }
        }
    }
}

fn opus_payloads_once() -> &'static [Vec<u8>] {
    static PAYLOADS: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
    PAYLOADS.get_or_init(opus_payloads)
}
