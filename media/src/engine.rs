//! What answers the caller.

mod echo;

pub use echo::{EchoEngine, EchoSettings, ForgetfulEcho, TurnMemory, opening_code};

use std::fmt;

use crate::turn::TurnEvent;

/// A speech engine, fed and drained in frames of 20 ms at the session's PCM rate.
///
/// Responses carry a *generation*, counted from 1 and never used twice in a session.
pub trait Engine: fmt::Debug + Send {
    /// Hears the caller's next frame, whose first sample is at `at` on the session clock (48 kHz), together with
    /// the turn events that it brought about.
    fn hear(&mut self, frame: &[i16], at: u64, events: &[TurnEvent]);

    /// Fills in the next frame of the answer. `None`: nothing to say now.
    fn next_frame(&mut self, frame: &mut [i16]) -> Option<AnswerFrame>;

    /// Whether [`Self::next_frame`] has something to say.
    fn is_speaking(&self) -> bool;

    /// Stops speaking at once, if [`TurnEvent::Interrupted`] has not done so already. Gives the newest generation so
    /// far: the client has to flush up to it, since it may still be playing what was sent before.
    fn interrupt(&mut self) -> Option<u32>;

    /// What the caller really heard.
    fn played(&mut self, report: PlayoutReport);
}

/// Which part of which response a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerFrame {
    /// Of the response.
    pub generation: u32,
    /// The caller's turn that it answers.
    pub turn: u32,
    /// First frame of the response.
    pub first: bool,
    /// Last frame of the response.
    pub last: bool,
}

/// What was really played of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlayoutReport {
    /// Of the response.
    pub generation: u32,
    /// From its beginning, session clock (48 kHz).
    pub heard_samples: u64,
    /// To its end.
    pub complete: bool,
}
