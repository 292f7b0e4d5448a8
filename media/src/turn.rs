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
        Self {
            end_silence: Duration::from_millis(600),
            min_speech: Duration::from_millis(120),
            interruptible: true,
        }
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
        Self {
            settings,
            state: State::Quiet,
            turn: 0,
            agent_speaking: false,
            events: VecDeque::with_capacity(2),
        }
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
            self.state = State::Rising {
                began,
                ended: end,
                spoken,
            };
            return;
        }
        self.turn += 1;
        self.state = State::Speaking { ended: end };
        self.events.push_back(TurnEvent::SpeechStarted {
            turn: self.turn,
            at: began,
        });
        if self.agent_speaking && self.settings.interruptible {
            self.events.push_back(TurnEvent::Interrupted {
                turn: self.turn,
                at: end,
            });
        }
    }

    fn hear_quiet(&mut self, at: u64) {
        let quiet_since = |ended: u64| {
            FRAME * ((at + FRAME_POSITIONS).saturating_sub(ended) / FRAME_POSITIONS) as u32
        };
        match self.state {
            State::Rising { ended, .. } if quiet_since(ended) >= LONGEST_HESITATION => {
                self.state = State::Quiet
            }
            State::Speaking { ended } if quiet_since(ended) >= self.settings.end_silence => {
                self.state = State::Quiet;
                self.events.push_back(TurnEvent::SpeechStopped {
                    turn: self.turn,
                    at: ended,
                });
            }
            State::Quiet | State::Rising { .. } | State::Speaking { .. } => {}
        }
    }
}

/// Quiet between sounds that together may begin a turn.
const LONGEST_HESITATION: Duration = Duration::from_millis(200);
