//! Who is on the caller's end of the line.

use antiphon_media::stream::Heard;
use antiphon_proto::v1::EndCode;

use crate::path::Switch;

/// What a party wants after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// To go on.
    Continue,
    /// To end the call.
    HangUp,
}

/// Something happened on the line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The agent heard the caller begin.
    SpeechStarted {
        /// Which turn.
        turn: u32,
    },
    /// The agent heard the caller's turn end.
    SpeechStopped {
        /// Which turn.
        turn: u32,
    },
    /// The agent began an answer.
    ResponseStarted {
        /// Names the answer.
        generation: u32,
        /// The turn that it answers.
        turn: u32,
    },
    /// An answer was played, to its end or until it was cut.
    ResponsePlayed {
        /// Names the answer.
        generation: u32,
        /// To its end.
        complete: bool,
    },
    /// The call uses another relay now.
    Switched(Switch),
    /// The call has another local address now.
    Rebound,
    /// The worker ended the session.
    Ended(EndCode),
}

/// The caller's end: a microphone and a loudspeaker on one clock.
pub trait Party: Send {
    /// 20 ms pass: `heard` was played, `say` (zeros, the format's frame) is what the microphone picked up.
    fn step(&mut self, heard: &Heard<'_>, say: &mut [i16]) -> Step;

    /// Something happened between two steps.
    fn on_event(&mut self, event: &Event);
}
