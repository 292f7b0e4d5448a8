//! What encoding and decoding cost per frame of 20 ms, with recorded speech: `cargo bench -p antiphon-media`.
//!
//! Each iteration is one whole utterance; the item count is its frames, so divan's throughput is frames per second.
#![forbid(unsafe_code)]

use antiphon_media::codec::{Decoder, Encoder, EncoderSettings};
use antiphon_media::format::AudioFormat;
use antiphon_media::speech::Utterance;
use divan::counter::ItemsCount;

fn main() {
    divan::main();
}

fn frames() -> Vec<Vec<i16>> {
    let samples = AudioFormat::Opus.frame_samples();
    let all = Utterance::ALL.iter().flat_map(Utterance::pcm).collect::<Vec<_>>();
    all.chunks_exact(samples).map(<[i16]>::to_vec).collect()
}

fn encoder(complexity: u8) -> Encoder {
    let settings = EncoderSettings { complexity, ..EncoderSettings::default() };
    Encoder::new(AudioFormat::Opus, settings).expect("settings are in range")
}

#[divan::bench(args = 0..=10, sample_count = 20, sample_size = 1)]
fn encode(bencher: divan::Bencher<'_, '_>, complexity: u8) {
    let frames = frames();
    bencher.counter(ItemsCount::new(frames.len())).with_inputs(|| encoder(complexity)).bench_local_refs(|encoder| {
        for frame in &frames {
            divan::black_box(encoder.encode(frame)).expect("frames have the right length");
        }
    });
}

#[divan::bench(sample_count = 20, sample_size = 1)]
fn decode(bencher: divan::Bencher<'_, '_>) {
    let mut encoder = encoder(EncoderSettings::default().complexity);
    let payloads: Vec<_> = frames().iter().filter_map(|frame| encoder.encode(frame).ok().flatten()).collect();
    bencher.counter(ItemsCount::new(payloads.len())).with_inputs(|| Decoder::new(AudioFormat::Opus)).bench_local_refs(
        |decoder| {
            for payload in &payloads {
                divan::black_box(decoder.decode(payload)).expect("payloads are valid");
            }
        },
    );
}
