//! The verifier passes what is right and names what is wrong.

use antiphon_media::engine::{EchoSettings, Engine, ForgetfulEcho, opening_code};
use antiphon_media::format::AudioFormat;
use antiphon_media::levels;
use antiphon_media::script::Script;
use antiphon_media::speech::{self, Utterance};
use antiphon_media::verify::{Problem, Said, find_receipts, verify};

use crate::call::{CLEAN, Call, Manners, Network, call, echo};

const LOSSY: Network = Network { loss_percent: 2, jitter_ms: 30 };

fn echo_call(format: AudioFormat, network: Network, seed: u64) -> Call {
    let script = Script::bundled(seed, format.sample_rate(), 3).unwrap();
    call(format, script, Box::new(echo(format)), (network, Manners::Waits), seed)
}

/// A good call's recording, changed. The words of the second answer are `words`.
fn tampered(change: impl FnOnce(&mut Vec<i16>, std::ops::Range<usize>)) -> (Call, Vec<Problem>) {
    let mut call = echo_call(AudioFormat::Opus, CLEAN, 3);
    let report = call.report();
    assert!(report.passed(), "{:?}", report.all_problems().collect::<Vec<_>>());
    let answer = report.turns[1].answer.clone().unwrap();
    let receipt = 16 * 1080;
    change(&mut call.recording, answer.start + receipt + 16 * 140..answer.end);
    let problems = call.report().all_problems().cloned().collect();
    (call, problems)
}

#[test]
fn right_answers_pass_in_every_format_on_clean_and_lossy_networks() {
    for format in AudioFormat::ALL {
        for (network, seed) in [(CLEAN, 1), (LOSSY, 2), (LOSSY, 3), (LOSSY, 4)] {
            let call = echo_call(format, network, seed);
            let report = call.report();
            let problems: Vec<_> = report.all_problems().map(ToString::to_string).collect();
            assert!(report.passed(), "{format:?} {network:?} {seed}: {problems:?}");
            assert_eq!(report.owners(), [(0xbeef, 1)]);
            assert!(report.least_similarity() > 0.85, "{}", report.least_similarity());
            for turn in &report.turns {
                let delay = turn.response_delay.unwrap().as_millis();
                assert!((600..1000).contains(&delay), "{delay} ms after the caller ended");
                assert!(turn.longest_silence.as_millis() <= 240, "{:?}", turn.longest_silence);
            }
        }
    }
}

#[test]
fn one_packet_in_twenty_lost_and_60_ms_of_jitter_leave_nothing_in_doubt() {
    let poor = Network { loss_percent: 5, jitter_ms: 60 };
    for format in [AudioFormat::Opus, AudioFormat::L16At24k] {
        for seed in 100..120 {
            let report = echo_call(format, poor, seed).report();
            let problems: Vec<_> = report.all_problems().map(ToString::to_string).collect();
            assert!(report.passed(), "{format:?} {seed}: {problems:?}");
            assert_eq!(report.owners(), [(0xbeef, 1)]);
        }
    }
}

#[test]
fn a_receipt_of_another_history_is_not_taken_for_a_damaged_one() {
    let call = echo_call(AudioFormat::Opus, CLEAN, 7);
    let found = find_receipts(&call.recording, call.rate);
    let own = found[1].receipt.unwrap();
    assert_eq!(found[1].as_answer(own.turn, own.chain, None), Some(own));
    for (turn, chain) in [(own.turn, own.chain ^ 0x1100_0000), (own.turn ^ 0x11, own.chain), (own.turn, !own.chain)] {
        assert_eq!(found[1].as_answer(turn, chain, Some((own.nonce, own.epoch))), None, "{turn} {chain:08x}");
    }
}

#[test]
fn speech_without_a_code_has_none() {
    for utterance in Utterance::ALL {
        assert_eq!(opening_code(&utterance.pcm(), speech::RATE), 0, "{utterance:?}");
    }
}

#[test]
fn loss_is_counted_where_it_happens() {
    let call = echo_call(AudioFormat::Opus, LOSSY, 5);
    for stats in [call.uplink.jitter, call.downlink.jitter] {
        assert!(stats.lost > 0 && stats.concealed >= stats.lost / 2, "{stats:?}");
        assert!(stats.target.as_millis() <= 80, "{stats:?}");
    }
    assert_eq!(call.uplink.undecodable + call.downlink.undecodable, 0);
}

#[test]
fn a_forgetful_engine_is_caught_at_the_second_turn() {
    let format = AudioFormat::Opus;
    let script = Script::bundled(1, format.sample_rate(), 3).unwrap();
    let engine: Box<dyn Engine> = Box::new(ForgetfulEcho::new(EchoSettings::new(format.sample_rate(), 1, 1)));
    let report = call(format, script, engine, (CLEAN, Manners::Waits), 1).report();
    assert_eq!(report.turns[0].problems, []);
    for turn in &report.turns[1..] {
        assert!(matches!(turn.problems[..], [Problem::Chain { .. }]), "{:?}", turn.problems);
    }
}

#[test]
fn silence_answers_nothing() {
    let call = echo_call(AudioFormat::Opus, CLEAN, 1);
    let report = verify(&call.said(), &vec![0; call.recording.len()], call.rate);
    let expected: Vec<_> = (1..=3).map(|turn| Problem::NoAnswer { turn }).collect();
    assert_eq!(report.all_problems().cloned().collect::<Vec<_>>(), expected);
    assert!(!verify(&call.said(), &[], call.rate).passed());
}

#[test]
fn words_of_somebody_else_are_not_the_callers() {
    for (other, seed) in [(4, 1), (5, 1), (6, 2)] {
        let call = echo_call(AudioFormat::Opus, CLEAN, seed);
        let others = Script::bundled(other, call.rate, 3).unwrap();
        let turns = call.script.turns.iter().zip(&others.turns);
        let said: Vec<_> = turns.map(|(own, other)| Said { pcm: &other.pcm, code: own.code, ended: None }).collect();
        let report = verify(&said, &call.recording, call.rate);
        for turn in &report.turns {
            assert!(turn.similarity < 0.5, "{}", turn.similarity);
            assert!(matches!(turn.problems[0], Problem::Words { .. }), "{:?}", turn.problems);
        }
    }
}

#[test]
fn half_of_the_words_missing_is_seen() {
    let (_, problems) = tampered(|recording, words| {
        let middle = usize::midpoint(words.start, words.end);
        recording[middle..words.end].fill(0);
    });
    let seen =
        |problem: &Problem| matches!(problem, Problem::Words { turn: 2, .. } | Problem::WordsMissing { turn: 2, .. });
    assert!(problems.iter().any(seen), "{problems:?}");
}

#[test]
fn cut_out_words_are_seen() {
    // 400 ms are gone, and everything after is early.
    let (_, problems) = tampered(|recording, words| {
        let at = words.start + 16_000;
        recording.drain(at..at + 6400);
    });
    let seen =
        |problem: &Problem| matches!(problem, Problem::Words { turn: 2, .. } | Problem::WordsMissing { turn: 2, .. });
    assert!(problems.iter().any(seen), "{problems:?}");
}

#[test]
fn a_gap_of_300_ms_is_seen() {
    let (_, problems) = tampered(|recording, words| {
        let at = words.start + 16_000;
        recording[at..at + 4800].fill(0);
    });
    assert!(!problems.is_empty());
}

#[test]
fn repeated_words_are_seen() {
    let (_, problems) = tampered(|recording, words| {
        let again = recording[words.clone()].to_vec();
        recording.splice(words.end..words.end, again);
    });
    assert!(matches!(problems[..], [Problem::ExtraSound { turn: 2, .. }]), "{problems:?}");
}

#[test]
fn an_answer_given_twice_or_with_a_broken_receipt_is_named() {
    let call = echo_call(AudioFormat::Opus, CLEAN, 3);
    let report = call.report();
    let answer = report.turns[0].answer.clone().unwrap();
    let mut twice = call.recording.clone();
    let again = twice[answer.start..].to_vec();
    twice.extend(again);
    let report = verify(&call.said(), &twice, call.rate);
    assert!(report.problems.iter().any(|problem| matches!(problem, Problem::UnexpectedAnswer { turn: 1, .. })));

    // Two digits of the receipt are overwritten by another one.
    let mut broken = call.recording.clone();
    let digit = 16 * 60;
    let first = broken[answer.start..answer.start + digit].to_vec();
    for place in [3, 8] {
        broken[answer.start + place * digit..][..digit].copy_from_slice(&first);
    }
    let problems: Vec<_> = verify(&call.said(), &broken, call.rate).all_problems().cloned().collect();
    assert!(problems.contains(&Problem::NoAnswer { turn: 1 }), "{problems:?}");
    assert!(problems.iter().any(|problem| matches!(problem, Problem::UnreadableReceipt { .. })), "{problems:?}");
}

#[test]
fn the_answer_begins_with_the_callers_first_sound() {
    // The code is part of the words, so a cut onset would cost its first digit.
    let call = echo_call(AudioFormat::L16At16k, CLEAN, 2);
    let report = call.report();
    for (turn, said) in report.turns.iter().zip(call.said()) {
        let answer = &call.recording[turn.answer.clone().unwrap()];
        let words = &answer[levels::audible_range(&answer[18_000..], call.rate).start + 18_000..];
        let (heard, said) = (levels::rms(&words[..800]), levels::rms(&said.pcm[..800]));
        assert!((heard - said).abs() < said * 0.15, "{heard} {said}");
    }
}

#[test]
fn an_interrupted_answer_stops_at_once_and_the_interruption_is_answered() {
    for (network, seed) in [(CLEAN, 1), (LOSSY, 2)] {
        let format = AudioFormat::Opus;
        let script = Script::bundled(seed, format.sample_rate(), 3).unwrap();
        let engine = Box::new(echo(format));
        let call = call(format, script, engine, (network, Manners::Interrupts), seed);
        assert_eq!(call.flushed.len(), 2);
        for &flushed in &call.flushed {
            let after = &call.recording[flushed..flushed + 16_000];
            assert!(levels::is_silent(after), "not one frame more: {}", levels::rms(after));
            let before = &call.recording[flushed - 1600..flushed];
            assert!(!levels::is_silent(before), "there was something to stop");
        }
        let report = call.report();
        for turn in &report.turns[..2] {
            assert!(!turn.problems.is_empty(), "the words were cut");
            assert_eq!(turn.receipt.map(|receipt| receipt.chain), Some(turn.expected_chain));
        }
        assert_eq!(report.turns[2].problems, [], "{network:?}");
    }
}
