//! Turn taking: when the caller begins, ends and interrupts.

use std::collections::VecDeque;
use std::time::Duration;

use crate::format::{FRAME, FRAME_POSITIONS};

/// How turns are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TurnTaking {
    /// Quiet that ends the caller's turn.
    pub end_silence: Duration,
    /// Less speech than this is not a turn.
    pub min_speech: Duration,
    /// Whether the caller's speech stops the agent's.
    pub interruptible: bool,
}

impl Default for TurnTaking {
    fn default() -> Self {
        Self { end_silence: Duration::from_millis(600), min_speech: Duration::from_millis(120), interruptible: true }
    }
}

/// What the machine is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnInput {
    /// The next 20 ms of the caller.
    Frame {
        /// Holds speech.
        speech: bool,
        /// Session clock position of the frame's first sample, 48 kHz.
        at: u64,
    },
    /// The agent began (true) or stopped (false) to speak.
    AgentSpeaking(bool),
}

/// What the machine found. Turns are counted from 1; positions are samples of the session clock, 48 kHz.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnEvent {
    /// The caller has said enough to be heard.
    SpeechStarted {
        /// Which turn.
        turn: u32,
        /// Where the speech began, some frames ago.
        at: u64,
    },
    /// The caller spoke while the agent was speaking: stop the agent.
    Interrupted {
        /// The caller's turn.
        turn: u32,
        /// End of the frame that decided it.
        at: u64,
    },
    /// The caller has been quiet for long enough.
    SpeechStopped {
        /// Which turn.
        turn: u32,
        /// Where the speech ended, `end_silence` ago.
        at: u64,
    },
}

/// Finds the caller's turns in a stream of decisions, one per 20 ms.
#[derive(Debug)]
pub struct TurnMachine {
    settings: TurnTaking,
    state: State,
    turn: u32,
    agent_speaking: bool,
    events: VecDeque<TurnEvent>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Quiet,
    /// Speech, not yet enough of it: `began` and `ended` are positions, `spoken` counts frames of speech.
    Rising {
        began: u64,
        ended: u64,
        spoken: u32,
    },
    Speaking {
        ended: u64,
    },
}

impl TurnMachine {
    /// Before the first turn.
    pub fn new(settings: TurnTaking) -> Self {
        Self { settings, state: State::Quiet, turn: 0, agent_speaking: false, events: VecDeque::with_capacity(2) }
    }

    /// Takes one input; then take the events until there are none.
    pub fn handle(&mut self, input: TurnInput) {
        match input {
            TurnInput::AgentSpeaking(speaking) => self.agent_speaking = speaking,
            TurnInput::Frame { speech: true, at } => self.hear_speech(at),
            TurnInput::Frame { speech: false, at } => self.hear_quiet(at),
        }
    }

    /// The next event, in order.
    pub fn poll_output(&mut self) -> Option<TurnEvent> {
        self.events.pop_front()
    }

    /// Turns begun so far.
    pub fn turns(&self) -> u32 {
        self.turn
    }

    /// Whether the caller is in a turn.
    pub fn caller_speaking(&self) -> bool {
        matches!(self.state, State::Speaking { .. })
    }

    fn hear_speech(&mut self, at: u64) {
        let end = at + FRAME_POSITIONS;
        let (began, spoken) = match self.state {
            State::Speaking { .. } => {
                self.state = State::Speaking { ended: end };
                return;
            }
            State::Quiet => (at, 1),
            State::Rising { began, spoken, .. } => (began, spoken + 1),
        };
        if FRAME * spoken < self.settings.min_speech {
            self.state = State::Rising { began, ended: end, spoken };
            return;
        }
        self.turn += 1;
        self.state = State::Speaking { ended: end };
        self.events.push_back(TurnEvent::SpeechStarted { turn: self.turn, at: began });
        if self.agent_speaking && self.settings.interruptible {
            self.events.push_back(TurnEvent::Interrupted { turn: self.turn, at: end });
        }
    }

    fn hear_quiet(&mut self, at: u64) {
        let quiet_since = |ended: u64| FRAME * ((at + FRAME_POSITIONS).saturating_sub(ended) / FRAME_POSITIONS) as u32;
        match self.state {
            State::Rising { ended, .. } if quiet_since(ended) >= LONGEST_HESITATION => self.state = State::Quiet,
            State::Speaking { ended } if quiet_since(ended) >= self.settings.end_silence => {
                self.state = State::Quiet;
                self.events.push_back(TurnEvent::SpeechStopped { turn: self.turn, at: ended });
            }
            State::Quiet | State::Rising { .. } | State::Speaking { .. } => {}
        }
    }
}

/// Quiet between sounds that together may begin a turn.
const LONGEST_HESITATION: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One character per frame: `#` speech, `.` quiet, `A`/`a` the agent begins/stops before the next frame.
    fn events(settings: TurnTaking, script: &str) -> Vec<TurnEvent> {
        let mut machine = TurnMachine::new(settings);
        let (mut at, mut events) = (0, Vec::new());
        for sign in script.chars() {
            match sign {
                'A' | 'a' => machine.handle(TurnInput::AgentSpeaking(sign == 'A')),
                _ => {
                    machine.handle(TurnInput::Frame { speech: sign == '#', at });
                    at += FRAME_POSITIONS;
                }
            }
            events.extend(std::iter::from_fn(|| machine.poll_output()));
        }
        events
    }

    fn settings() -> TurnTaking {
        TurnTaking {
            end_silence: Duration::from_millis(100),
            min_speech: Duration::from_millis(60),
            interruptible: true,
        }
    }

    const F: u64 = FRAME_POSITIONS;

    #[test]
    fn a_turn_begins_and_ends_where_the_speech_does() {
        assert_eq!(
            events(settings(), "..#####.....#"),
            [TurnEvent::SpeechStarted { turn: 1, at: 2 * F }, TurnEvent::SpeechStopped { turn: 1, at: 7 * F }]
        );
    }

    #[test]
    fn pauses_shorter_than_the_end_silence_belong_to_the_turn() {
        let found = events(settings(), "###....###....##.....");
        assert_eq!(found.last(), Some(&TurnEvent::SpeechStopped { turn: 1, at: 16 * F }));
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn short_sounds_are_no_turn_and_count_nothing() {
        assert_eq!(events(settings(), "##..........##..........#"), []);
        assert_eq!(
            events(settings(), "##..........###")[0],
            TurnEvent::SpeechStarted { turn: 1, at: 12 * F },
            "the first two were forgotten"
        );
        assert_eq!(events(settings(), "#.#.#")[0], TurnEvent::SpeechStarted { turn: 1, at: 0 });
    }

    #[test]
    fn the_agent_is_interrupted_once_and_only_if_it_may_be() {
        let interrupted = |settings, script| {
            events(settings, script).iter().filter(|event| matches!(event, TurnEvent::Interrupted { .. })).count()
        };
        assert_eq!(interrupted(settings(), "A..########"), 1);
        assert_eq!(interrupted(settings(), "A..##......"), 0, "too short");
        assert_eq!(interrupted(settings(), "Aa..########"), 0, "the agent had ended");
        assert_eq!(interrupted(TurnTaking { interruptible: false, ..settings() }, "A..########"), 0);
        assert_eq!(
            events(settings(), "A.###")[1],
            TurnEvent::Interrupted { turn: 1, at: 4 * F },
            "with the frame that made it a turn"
        );
    }

    proptest! {
        #[test]
        fn starts_and_stops_alternate(script in "[#.Aa]{0,300}") {
            let mut open = None;
            let mut last = 0;
            for event in events(settings(), &script) {
                match event {
                    TurnEvent::SpeechStarted { turn, at } => {
                        prop_assert_eq!(open.replace(turn), None);
                        prop_assert_eq!(turn, last + 1);
                        prop_assert!(at % F == 0);
                        last = turn;
                    }
                    TurnEvent::SpeechStopped { turn, .. } => prop_assert_eq!(open.take(), Some(turn)),
                    TurnEvent::Interrupted { turn, .. } => prop_assert_eq!(open, Some(turn)),
                }
            }
        }
    }
}
