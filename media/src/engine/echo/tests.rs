use super::*;
use crate::script;
use crate::speech::Utterance;

const RATE: u32 = 16_000;
const FRAME: usize = 320;

fn engine() -> EchoEngine {
    EchoEngine::new(EchoSettings::new(RATE, 0xbeef, 7))
}

/// Frames of the caller and the events they cause, as a turn machine with 600 ms of end silence gives them.
struct Caller {
    at: u64,
    turn: u32,
}

impl Caller {
    fn hear(&mut self, engine: &mut dyn Engine, pcm: &[i16], events: &[TurnEvent]) {
        let mut events = events;
        for frame in pcm.chunks(FRAME) {
            let mut whole = [0; FRAME];
            whole[..frame.len()].copy_from_slice(frame);
            engine.hear(&whole, self.at, events);
            events = &[];
            self.at += FRAME_POSITIONS;
        }
    }

    /// A whole turn, noticed 100 ms after its beginning.
    fn say(&mut self, engine: &mut dyn Engine, pcm: &[i16]) {
        self.turn += 1;
        let began = self.at;
        let (onset, rest) = pcm.split_at(5 * FRAME);
        self.hear(engine, onset, &[]);
        self.hear(engine, rest, &[TurnEvent::SpeechStarted { turn: self.turn, at: began }]);
        let ended = self.at;
        self.hear(engine, &[0; 30 * FRAME], &[]);
        self.hear(engine, &[0; FRAME], &[TurnEvent::SpeechStopped { turn: self.turn, at: ended }]);
    }
}

fn answer(engine: &mut dyn Engine) -> (Vec<AnswerFrame>, Vec<i16>) {
    let mut frame = [0; FRAME];
    let (mut frames, mut pcm) = (Vec::new(), Vec::new());
    while let Some(answer) = engine.next_frame(&mut frame) {
        frames.push(answer);
        pcm.extend(frame);
    }
    (frames, pcm)
}

fn receipt_in(pcm: &[i16]) -> Receipt {
    let digits: Vec<u8> = pcm
        .chunks(16 * 60)
        .take(receipt::DIGITS)
        .map(|part| dtmf::tone(&part[160..800], RATE).unwrap().digit)
        .collect();
    Receipt::parse(&digits).unwrap()
}

#[test]
fn an_answer_is_receipt_pause_and_the_exact_words() {
    let (mut engine, mut caller) = (engine(), Caller { at: 0, turn: 0 });
    let said = script::with_code(0x1a2f, &Utterance::ALL[0].pcm(), RATE);
    caller.hear(&mut engine, &[0; 10 * FRAME], &[]);
    caller.say(&mut engine, &said);
    let (frames, pcm) = answer(&mut engine);
    let chain = receipt::chain(0, 0x1a2f);
    assert_eq!(receipt_in(&pcm), Receipt { turn: 1, chain, nonce: 0xbeef, epoch: 7 });
    let receipt = 16 * 1080;
    assert!(pcm[receipt..receipt + 16 * 120].iter().all(|&sample| sample == 0));
    // 20 ms of silence are kept before the first sound.
    let words = &pcm[receipt + 16 * 140..];
    assert_eq!(words[..said.len()], said);
    assert!(frames[0].first && frames[frames.len() - 1].last);
    assert_eq!(frames.iter().filter(|frame| frame.first || frame.last).count(), 2);
    assert!(frames.iter().all(|frame| (frame.generation, frame.turn) == (1, 1)));
    assert!(!engine.is_speaking());
}

#[test]
fn the_chain_holds_all_codes_and_zero_for_none() {
    let (mut engine, mut caller) = (engine(), Caller { at: 960 * 1000, turn: 0 });
    let words = Utterance::ALL[1].pcm();
    let mut chain = 0;
    for code in [0x0000, 0xffff, 0x00d0] {
        let said = if code == 0 { words.clone() } else { script::with_code(code, &words, RATE) };
        caller.say(&mut engine, &said);
        chain = receipt::chain(chain, code);
        assert_eq!(receipt_in(&answer(&mut engine).1).chain, chain, "{code:04x}");
    }
    let memory: Vec<_> = engine.memory().map(|turn| (turn.turn, turn.generation, turn.code)).collect();
    assert_eq!(memory, [(1, 1, 0), (2, 2, 0xffff), (3, 3, 0x00d0)]);
}

#[test]
fn an_interruption_stops_within_the_frame_and_names_what_to_flush() {
    let (mut engine, mut caller) = (engine(), Caller { at: 0, turn: 0 });
    assert_eq!(engine.interrupt(), None);
    caller.say(&mut engine, &Utterance::ALL[0].pcm());
    let mut frame = [0; FRAME];
    assert!(engine.next_frame(&mut frame).is_some());
    let events =
        [TurnEvent::SpeechStarted { turn: 2, at: caller.at }, TurnEvent::Interrupted { turn: 2, at: caller.at }];
    caller.hear(&mut engine, &[900; FRAME], &events);
    assert_eq!(engine.next_frame(&mut frame), None);
    assert!(!engine.is_speaking());
    assert_eq!(engine.interrupt(), Some(1));
    // The interrupting turn is answered, and the chain goes on.
    caller.hear(&mut engine, &[900; 10 * FRAME], &[]);
    let ended = caller.at;
    caller.hear(&mut engine, &[0; FRAME], &[TurnEvent::SpeechStopped { turn: 2, at: ended }]);
    let (frames, pcm) = answer(&mut engine);
    assert_eq!(frames[0].generation, 2);
    assert_eq!(receipt_in(&pcm).chain, receipt::chain(receipt::chain(0, 0), 0));
}

#[test]
fn what_was_heard_is_remembered() {
    let (mut engine, mut caller) = (engine(), Caller { at: 0, turn: 0 });
    caller.say(&mut engine, &Utterance::ALL[0].pcm());
    let report = PlayoutReport { generation: 1, heard_samples: 12_345, complete: false };
    engine.played(report);
    engine.played(PlayoutReport { generation: 99, ..report });
    assert_eq!(engine.memory().next().unwrap().heard, Some(report));
    let (_, pcm) = answer(&mut engine);
    let samples = engine.memory().next().unwrap().answer_samples;
    assert!(pcm.len() as u64 * 3 - samples < 960, "but for the last frame's padding");
}

#[test]
fn a_turn_without_end_is_cut_and_the_cut_counted() {
    let settings = EchoSettings { longest_turn: Duration::from_secs(3), ..EchoSettings::new(RATE, 1, 1) };
    let (mut engine, mut caller) = (EchoEngine::new(settings), Caller { at: 0, turn: 0 });
    caller.say(&mut engine, &[1000; 16_000 * 5]);
    let memory = *engine.memory().next().unwrap();
    assert!((16_000 * 2..16_000 * 3).contains(&memory.dropped_samples), "{memory:?}");
    assert!(memory.answer_samples <= 48_000 * 3 + 48 * 1200, "{memory:?}");
}

#[test]
fn answers_wait_their_turn_and_the_older_one_waiting_is_given_up() {
    let (mut engine, mut caller) = (engine(), Caller { at: 0, turn: 0 });
    let mut frame = [0; FRAME];
    for _ in 0..4 {
        caller.say(&mut engine, &Utterance::ALL[0].pcm());
        engine.next_frame(&mut frame);
    }
    let (frames, _) = answer(&mut engine);
    let mut turns: Vec<u32> = frames.iter().map(|frame| frame.turn).collect();
    turns.dedup();
    assert_eq!(turns, [1, 4]);
}

#[test]
fn a_forgetful_echo_starts_its_chain_anew() {
    let mut engine = ForgetfulEcho::new(EchoSettings::new(RATE, 1, 1));
    let mut caller = Caller { at: 0, turn: 0 };
    for code in [0x1234, 0x5678] {
        caller.say(&mut engine, &script::with_code(code, &Utterance::ALL[0].pcm(), RATE));
        assert_eq!(receipt_in(&answer(&mut engine).1).chain, receipt::chain(0, code));
    }
}
