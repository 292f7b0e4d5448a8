//! A caller with a script: says a turn, listens to the whole answer, says the next, hangs up.

use std::time::Duration;

use antiphon_media::stream::Heard;

use crate::party::{Event, Party, Step};

/// Plays a script and records what it hears.
#[derive(Debug)]
pub struct ScriptedCaller {
    turns: Vec<Vec<i16>>,
    frame: usize,
    state: State,
    next: usize,
    patience: u32,
    outcome: ScriptedOutcome,
}

/// What was heard, sample by sample on the caller's clock.
#[derive(Debug, Clone, Default)]
pub struct ScriptedOutcome {
    /// Everything that was played, at the call's rate.
    pub recording: Vec<i16>,
    /// Sample of the recording at which each turn had been said.
    pub ended: Vec<usize>,
    /// Answers played to their end.
    pub answers: usize,
    /// Turns whose answer did not come in time.
    pub unanswered: usize,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// Quiet for this many more steps.
    Waiting(u32),
    /// Saying a turn, from this sample on.
    Saying(usize),
    /// Listening for this many steps so far.
    Listening(u32),
}

impl ScriptedCaller {
    /// A caller who says `turns` (PCM at the call's `rate`) and waits `patience` for each answer to begin and end.
    #[must_use]
    pub fn new(turns: Vec<Vec<i16>>, rate: u32, patience: Duration) -> Self {
        let frame = usize::try_from(rate / 50).unwrap_or(320);
        let patience = u32::try_from(patience.as_millis() / 20).unwrap_or(u32::MAX);
        Self { turns, frame, state: State::Waiting(SETTLE), next: 0, patience, outcome: ScriptedOutcome::default() }
    }

    /// Turns said so far, and how many there are.
    #[must_use]
    pub fn progress(&self) -> (usize, usize) {
        (self.next, self.turns.len())
    }

    /// What was heard.
    #[must_use]
    pub fn into_outcome(self) -> ScriptedOutcome {
        self.outcome
    }
}

impl Party for ScriptedCaller {
    fn step(&mut self, heard: &Heard<'_>, say: &mut [i16]) -> Step {
        self.outcome.recording.extend_from_slice(heard.pcm);
        match self.state {
            State::Waiting(0) if self.next == self.turns.len() => return Step::HangUp,
            State::Waiting(0) => {
                self.next += 1;
                self.state = State::Saying(0);
            }
            State::Waiting(left) => self.state = State::Waiting(left - 1),
            State::Listening(heard) if heard >= self.patience => {
                self.outcome.unanswered += 1;
                self.state = State::Waiting(PAUSE);
            }
            State::Listening(heard) => self.state = State::Listening(heard + 1),
            State::Saying(_) => {}
        }
        if let State::Saying(from) = self.state {
            let turn = &self.turns[self.next - 1];
            let part = &turn[from.min(turn.len())..turn.len().min(from + self.frame)];
            say[..part.len()].copy_from_slice(part);
            self.state = State::Saying(from + self.frame);
            if from + self.frame >= turn.len() {
                self.outcome.ended.push(self.outcome.recording.len() - self.frame + part.len());
                self.state = State::Listening(0);
            }
        }
        Step::Continue
    }

    fn on_event(&mut self, event: &Event) {
        if let (Event::ResponsePlayed { complete, .. }, State::Listening(_)) = (event, self.state) {
            self.outcome.answers += usize::from(*complete);
            self.state = State::Waiting(PAUSE);
        }
    }
}

/// Steps before the first turn, so that the first word is not part of the set-up.
const SETTLE: u32 = 10;
/// Steps between an answer's end and the next turn.
const PAUSE: u32 = 15;

#[cfg(test)]
mod tests {
    use super::*;
    use antiphon_media::stream::FrameKind;

    fn step(caller: &mut ScriptedCaller) -> (Step, Vec<i16>) {
        let (pcm, mut say) = (vec![7; 320], vec![0; 320]);
        let heard = Heard { pcm: &pcm, kind: FrameKind::Played, generation: None };
        let step = caller.step(&heard, &mut say);
        (step, say)
    }

    #[test]
    fn says_every_sample_once_and_hangs_up_after_the_last_answer() {
        let mut caller = ScriptedCaller::new(vec![vec![1; 700], vec![2; 320]], 16_000, Duration::from_secs(1));
        let mut said = Vec::new();
        for _ in 0..200 {
            let (step, say) = step(&mut caller);
            said.extend(say.into_iter().filter(|sample| *sample != 0));
            if matches!(caller.state, State::Listening(_)) {
                caller.on_event(&Event::ResponsePlayed { generation: 1, complete: true });
            }
            if step == Step::HangUp {
                break;
            }
        }
        assert_eq!(said, [vec![1; 700], vec![2; 320]].concat());
        let outcome = caller.into_outcome();
        assert_eq!((outcome.answers, outcome.unanswered, outcome.ended.len()), (2, 0, 2));
        assert_eq!(outcome.ended[0] % 320, 60, "the exact sample, not the frame");
    }

    #[test]
    fn a_missing_answer_ends_the_wait() {
        let mut caller = ScriptedCaller::new(vec![vec![1; 320]], 16_000, Duration::from_millis(200));
        assert!((0..200).any(|_| step(&mut caller).0 == Step::HangUp));
        assert_eq!(caller.into_outcome().unanswered, 1);
    }
}
