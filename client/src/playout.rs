//! What was really heard of each answer: a machine on the playout clock.

use antiphon_core::clock::SamplePosition;
use antiphon_media::stream::Heard;
use antiphon_proto::v1::PlayoutReport;

/// Follows the answer being played.
#[derive(Debug, Default)]
pub(crate) struct Playout {
    /// Newest generation announced on the control stream.
    announced: u32,
    playing: Option<Playing>,
    /// An answer that the worker has sent to its end but of which nothing was heard yet.
    unheard: Option<Unheard>,
    /// Newest answer that is over: frames that still come of it begin nothing.
    over: u32,
}

#[derive(Debug, Clone, Copy)]
struct Playing {
    generation: u32,
    heard: u64,
    total: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Unheard {
    generation: u32,
    total: u64,
    patience: u32,
}

impl Playout {
    /// Whether an answer is being played: then a packet is due every 20 ms.
    pub(crate) const fn is_playing(&self) -> bool {
        self.playing.is_some()
    }

    /// The worker began an answer.
    pub(crate) fn on_started(&mut self, generation: u32) {
        self.announced = self.announced.max(generation);
    }

    /// The worker sent the last of an answer of `total` samples (48 kHz).
    pub(crate) fn on_done(&mut self, generation: u32, total: u64) {
        match &mut self.playing {
            Some(playing) if playing.generation == generation => playing.total = Some(total),
            _ => self.unheard = Some(Unheard { generation, total, patience: PATIENCE_FRAMES }),
        }
    }

    /// The worker cut every answer up to this one.
    pub(crate) fn on_flush(&mut self, generation: u32) -> Option<PlayoutReport> {
        self.unheard = self.unheard.filter(|unheard| unheard.generation > generation);
        let cut = self.playing.take_if(|playing| playing.generation <= generation)?;
        Some(PlayoutReport { generation: cut.generation, heard_samples: cut.heard, complete: false })
    }

    /// One frame was played; the report of an answer that this completed.
    pub(crate) fn on_frame(&mut self, heard: &Heard<'_>) -> Option<PlayoutReport> {
        let mut finished = None;
        if let Some(low) = heard.generation {
            let generation = self.full(low);
            let begun = self.playing.is_some_and(|playing| playing.generation == generation);
            if !begun && generation > self.over {
                // The next answer has begun: whatever is missing of the last one will not come any more.
                finished = self.playing.take().map(|playing| self.end(playing));
                let unheard = self.unheard.take_if(|unheard| unheard.generation == generation);
                self.playing = Some(Playing { generation, heard: 0, total: unheard.map(|u| u.total) });
            }
        }
        if let Some(playing) = &mut self.playing {
            playing.heard += SamplePosition::FRAME;
            if playing.total.is_some_and(|total| playing.heard >= total) {
                finished = self.playing.take().map(|playing| self.end(playing));
            }
        }
        finished.or_else(|| self.give_up())
    }

    fn end(&mut self, playing: Playing) -> PlayoutReport {
        self.over = self.over.max(playing.generation);
        playing.report()
    }

    /// An answer whose every packet was lost ends too.
    fn give_up(&mut self) -> Option<PlayoutReport> {
        let unheard = self.unheard.as_mut()?;
        unheard.patience = unheard.patience.saturating_sub(1);
        if unheard.patience > 0 {
            return None;
        }
        let Unheard { generation, .. } = self.unheard.take()?;
        Some(PlayoutReport { generation, heard_samples: 0, complete: false })
    }

    /// Frames carry the low 16 bits of the generation; the control stream says the rest.
    fn full(&self, low: u16) -> u32 {
        let high = self.announced & 0xffff_0000;
        let candidate = high | u32::from(low);
        // The frame may be of an answer from before the low bits wrapped.
        if candidate > self.announced.saturating_add(0x8000) { candidate.saturating_sub(0x1_0000) } else { candidate }
    }
}

impl Playing {
    fn report(self) -> PlayoutReport {
        let heard_samples = self.total.map_or(self.heard, |total| total.min(self.heard));
        PlayoutReport {
            generation: self.generation,
            heard_samples,
            complete: self.total.is_some_and(|total| self.heard >= total),
        }
    }
}

/// One second.
const PATIENCE_FRAMES: u32 = 50;

#[cfg(test)]
mod tests {
    use super::*;
    use antiphon_media::stream::FrameKind;

    fn frame(generation: Option<u16>) -> Heard<'static> {
        Heard { pcm: &[], kind: FrameKind::Played, generation }
    }

    #[test]
    fn an_answer_with_pauses_is_reported_complete_at_its_end() {
        let mut playout = Playout::default();
        playout.on_started(1);
        assert_eq!(playout.on_frame(&frame(None)), None);
        assert_eq!(playout.on_frame(&frame(Some(1))), None);
        playout.on_done(1, 3 * 960);
        assert_eq!(playout.on_frame(&frame(None)), None, "a pause inside the answer counts");
        let report = PlayoutReport { generation: 1, heard_samples: 2880, complete: true };
        assert_eq!(playout.on_frame(&frame(Some(1))), Some(report));
        assert_eq!(playout.on_frame(&frame(None)), None);
    }

    #[test]
    fn late_frames_of_an_answer_that_is_over_begin_nothing() {
        let mut playout = Playout::default();
        playout.on_frame(&frame(Some(1)));
        playout.on_done(1, 960 * 2);
        assert!(playout.on_frame(&frame(Some(1))).is_some());
        assert_eq!(playout.on_frame(&frame(Some(1))), None);
        assert_eq!(playout.on_frame(&frame(Some(2))), None, "nothing of the first is left to report");
    }

    #[test]
    fn a_flush_says_how_much_was_heard() {
        let mut playout = Playout::default();
        playout.on_started(2);
        playout.on_frame(&frame(Some(2)));
        assert_eq!(playout.on_flush(1), None);
        let report = PlayoutReport { generation: 2, heard_samples: 960, complete: false };
        assert_eq!(playout.on_flush(2), Some(report));
    }

    #[test]
    fn a_wholly_lost_answer_ends_after_a_second() {
        let mut playout = Playout::default();
        playout.on_done(1, 96_000);
        let reports: Vec<_> = (0..60).filter_map(|_| playout.on_frame(&frame(None))).collect();
        assert_eq!(reports, [PlayoutReport { generation: 1, heard_samples: 0, complete: false }]);
    }

    #[test]
    fn generations_continue_beyond_sixteen_bits() {
        let mut playout = Playout::default();
        playout.on_started(0x1_0001);
        assert_eq!(playout.full(1), 0x1_0001);
        assert_eq!(playout.full(0xffff), 0xffff);
    }
}
