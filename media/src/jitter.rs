//! The adaptive jitter buffer: packets in as they come, one frame out every 20 ms.
//!
//! A frame's *delay* is how much later it is played than the fastest packet of the last seconds would have allowed.
//! The target delay follows the arrivals: up at once, down slowly, 20..=200 ms. The buffer changes its
//! real delay where nobody hears it: at the beginning of a talkspurt, in quiet frames, and when a frame has to be
//! concealed anyway. The sender's silences (timestamps jump, sequence numbers do not) are silence, not loss.
//!
//! Nothing that the sender writes makes it play a packet twice or out of order, or keep more than [`CAPACITY`].

mod delay;
mod outcome;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::format::AudioFormat;
use crate::rtp::{InterarrivalJitter, RtpPacket, Sequence, SequenceTracker};
use delay::TargetDelay;

pub use outcome::{Frame, Inserted, JitterStats};

/// Packets held at most; the oldest go first.
pub const CAPACITY: usize = 32;

/// See the module.
#[derive(Debug)]
pub struct JitterBuffer {
    clock: i64,
    step: i64,
    /// Ordered by sequence.
    packets: VecDeque<Waiting>,
    tracker: SequenceTracker,
    jitter: InterarrivalJitter,
    target: TargetDelay,
    source: Option<Source>,
    previous_ssrc: Option<u32>,
    epoch: Option<Instant>,
    playout: Playout,
    /// Highest sequence that was played or given up.
    taken: u64,
    gap: Gap,
    quiet: bool,
    flushed: Option<u16>,
    stats: JitterStats,
}

#[derive(Debug)]
struct Waiting {
    sequence: u64,
    timestamp: i64,
    payload: Bytes,
    generation: Option<u16>,
}

/// The stream being received.
#[derive(Debug)]
struct Source {
    ssrc: u32,
    /// Extended, of the packet with the highest sequence.
    sequence: u64,
    timestamp: i64,
}

/// Frames concealed since the last packet: loss or the sender's silence, the next packet tells.
#[derive(Debug, Clone, Copy, Default)]
struct Gap {
    frames: u64,
    /// Timestamp of the first of them.
    from: i64,
}

#[derive(Debug, Clone, Copy)]
enum Playout {
    /// Between talkspurts.
    Silent,
    /// `next` is the timestamp due; `concealed` frames were made up since the last packet.
    Playing { next: i64, concealed: u32 },
}

impl JitterBuffer {
    /// An empty buffer for a stream of `format`.
    pub fn new(format: AudioFormat) -> Self {
        Self {
            clock: format.rtp_clock().into(),
            step: format.rtp_timestamp_step().into(),
            packets: VecDeque::with_capacity(CAPACITY + 1),
            tracker: SequenceTracker::default(),
            jitter: InterarrivalJitter::default(),
            target: TargetDelay::default(),
            source: None,
            previous_ssrc: None,
            epoch: None,
            playout: Playout::Silent,
            taken: 0,
            gap: Gap::default(),
            quiet: false,
            flushed: None,
            stats: JitterStats::default(),
        }
    }

    /// Takes a packet that arrived at `now`.
    pub fn insert(&mut self, now: Instant, packet: RtpPacket) -> Inserted {
        let RtpPacket { header, payload } = packet;
        if let Some(verdict) = self.accept_source(header.ssrc) {
            return verdict;
        }
        let (sequence, restarted) = match self.tracker.track(header.sequence) {
            Sequence::New(sequence) => (sequence, false),
            Sequence::Restarted(sequence) => (sequence, true),
            Sequence::Duplicate => {
                self.stats.duplicated += 1;
                return Inserted::Duplicate;
            }
            Sequence::Suspect => return Inserted::Suspect,
        };
        if restarted {
            self.begin_anew();
        }
        let timestamp = self.extend_timestamp(header.ssrc, sequence, header.timestamp);
        self.observe_arrival(now, timestamp);
        if header.generation.is_some_and(|generation| self.is_flushed(generation)) {
            self.taken = self.taken.max(sequence);
            self.stats.flushed += 1;
            return Inserted::Flushed;
        }
        if sequence <= self.taken || !self.still_due(now, timestamp) {
            self.stats.late += 1;
            return Inserted::Late;
        }
        let place = self.packets.partition_point(|waiting| waiting.sequence < sequence);
        self.packets.insert(place, Waiting { sequence, timestamp, payload, generation: header.generation });
        if self.packets.len() > CAPACITY {
            self.give_up_oldest();
            self.stats.dropped += 1;
        }
        Inserted::Kept
    }

    /// What to play now. To be called every 20 ms.
    pub fn pull(&mut self, now: Instant) -> Frame {
        self.give_up_stale(now);
        match self.playout {
            Playout::Silent => self.pull_silent(now),
            Playout::Playing { next, concealed } => self.pull_playing(now, next, concealed),
        }
    }

    /// Tells whether the frame pulled last was too quiet to be heard: then the next one may be left out to catch up.
    pub fn note_quiet(&mut self, quiet: bool) {
        self.quiet = quiet;
    }

    /// Drops what waits of responses up to and including `generation`, now and when it arrives later.
    ///
    /// Generations are compared by their low 16 bits, as serial numbers (RFC 1982). Packets without one stay.
    pub fn flush(&mut self, generation: u32) {
        self.flushed = Some(generation as u16);
        let before = self.packets.len();
        let mut taken = self.taken;
        self.packets.retain(|waiting| {
            let keep = !waiting.generation.is_some_and(|waiting| is_at_most(waiting, generation as u16));
            if !keep {
                taken = taken.max(waiting.sequence);
            }
            keep
        });
        self.taken = taken;
        self.stats.flushed += (before - self.packets.len()) as u64;
        self.playout = Playout::Silent;
        self.gap = Gap::default();
    }

    /// Low 16 bits of the highest sequence number received.
    pub fn highest(&self) -> Option<u16> {
        self.tracker.highest()
    }

    /// Counts and delays.
    pub fn stats(&self) -> JitterStats {
        let report = self.tracker.report();
        JitterStats {
            received: report.received,
            lost: report.lost,
            jitter: Duration::from_micros(self.jitter.estimate().unsigned_abs()),
            target: self.target.get(),
            ..self.stats
        }
    }

    /// Another SSRC is another stream; stragglers of the one before are dropped.
    fn accept_source(&mut self, ssrc: u32) -> Option<Inserted> {
        let current = self.source.as_ref().map(|source| source.ssrc);
        if current.is_none_or(|current| current == ssrc) {
            return None;
        }
        if self.previous_ssrc == Some(ssrc) {
            self.stats.late += 1;
            return Some(Inserted::Late);
        }
        self.previous_ssrc = current;
        self.tracker.restart();
        self.begin_anew();
        None
    }

    /// Nothing of the timeline before means anything any more.
    fn begin_anew(&mut self) {
        self.stats.dropped += self.packets.len() as u64;
        if let Some(last) = self.packets.back() {
            self.taken = self.taken.max(last.sequence);
        }
        self.packets.clear();
        self.source = None;
        self.begin_timing_anew();
    }

    fn begin_timing_anew(&mut self) {
        self.target.begin_anew();
        self.jitter.rebase();
        self.playout = Playout::Silent;
        self.gap = Gap::default();
    }

    /// Timestamps without end, around the newest one.
    fn extend_timestamp(&mut self, ssrc: u32, sequence: u64, timestamp: u32) -> i64 {
        let source = self.source.get_or_insert(Source { ssrc, sequence, timestamp: timestamp.into() });
        let difference = timestamp.wrapping_sub(source.timestamp as u32) as i32;
        let extended = source.timestamp + i64::from(difference);
        if sequence >= source.sequence {
            source.sequence = sequence;
            source.timestamp = extended;
        }
        extended
    }

    fn observe_arrival(&mut self, now: Instant, timestamp: i64) {
        let transit = self.transit(now, timestamp);
        if self.target.is_jump(transit) {
            // The sender's clock jumped, or everything is held up by seconds.
            self.stats.dropped += self.packets.len() as u64;
            if let Some(last) = self.packets.back() {
                self.taken = self.taken.max(last.sequence);
            }
            self.packets.clear();
            self.begin_timing_anew();
        }
        self.jitter.update(transit);
        self.target.observe(transit);
    }

    /// Microseconds between the frame's time on the sender's clock and `now`, from an arbitrary origin.
    fn transit(&mut self, now: Instant, timestamp: i64) -> i64 {
        let epoch = *self.epoch.get_or_insert(now);
        let arrival = now.saturating_duration_since(epoch).as_micros() as i64;
        // Timestamps are the other end's word and may run away: in the end they are a jump, never an overflow.
        arrival.saturating_sub(timestamp.saturating_mul(1_000_000) / self.clock)
    }

    /// How late the frame would be if it were played now.
    fn delay(&mut self, now: Instant, timestamp: i64) -> i64 {
        let transit = self.transit(now, timestamp);
        self.target.relative(transit)
    }

    /// Whether a packet can still be played. The newest one can although its frame was concealed: the stream is
    /// behind us, so we go back to it and play with more delay from here on.
    fn still_due(&mut self, now: Instant, timestamp: i64) -> bool {
        let Playout::Playing { next, concealed } = self.playout else {
            return true;
        };
        if timestamp >= next {
            return true;
        }
        let rewind = self.packets.is_empty() && self.delay(now, timestamp) <= delay::MOST;
        if rewind {
            self.playout = Playout::Playing { next: timestamp, concealed };
        }
        rewind
    }

    fn is_flushed(&self, generation: u16) -> bool {
        self.flushed.is_some_and(|flushed| is_at_most(generation, flushed))
    }

    /// Oldest audio first, when it has waited for longer than anybody wants to.
    fn give_up_stale(&mut self, now: Instant) {
        while let Some(head) = self.packets.front() {
            let timestamp = head.timestamp;
            if self.delay(now, timestamp) <= delay::MOST + delay::FRAME {
                return;
            }
            self.give_up_oldest();
            self.stats.late += 1;
            self.playout = Playout::Silent;
        }
    }

    fn give_up_oldest(&mut self) {
        if let Some(oldest) = self.packets.pop_front() {
            self.taken = oldest.sequence;
        }
    }

    fn pull_silent(&mut self, now: Instant) -> Frame {
        let Some(timestamp) = self.packets.front().map(|head| head.timestamp) else {
            return Frame::Silence;
        };
        if self.delay(now, timestamp) + delay::FRAME / 2 < self.target.micros() {
            return Frame::Silence;
        }
        self.play(now)
    }

    fn pull_playing(&mut self, now: Instant, next: i64, concealed: u32) -> Frame {
        let Some(head) = self.packets.front() else {
            return self.conceal(now, next, concealed, None);
        };
        if head.timestamp < next + self.step {
            let behind = self.delay(now, next) >= self.target.micros() + delay::FRAME;
            if behind && self.quiet && self.packets.len() > 1 {
                self.give_up_oldest();
                self.stats.skipped += 1;
            }
            return self.play(now);
        }
        if head.sequence == self.taken + 1 {
            self.playout = Playout::Silent;
            self.gap = Gap::default(); // it was the sender's silence
            return self.pull_silent(now);
        }
        let successor = (head.timestamp < next + 2 * self.step).then(|| head.payload.clone());
        self.conceal(now, next, concealed, successor)
    }

    fn conceal(&mut self, now: Instant, next: i64, concealed: u32, successor: Option<Bytes>) -> Frame {
        if concealed >= MOST_CONCEALED {
            self.playout = Playout::Silent;
            return self.pull_silent(now);
        }
        // With less delay than there should be, wait for the packet and let the delay grow.
        let wait = self.delay(now, next) + delay::FRAME / 2 < self.target.micros();
        let due = next;
        let next = if wait { next } else { next + self.step };
        self.playout = Playout::Playing { next, concealed: concealed + 1 };
        if self.gap.frames == 0 {
            self.gap.from = due;
        }
        self.gap.frames += 1;
        Frame::Conceal { fec_from: successor.filter(|_| !wait) }
    }

    fn play(&mut self, now: Instant) -> Frame {
        let Some(head) = self.packets.pop_front() else {
            return Frame::Silence;
        };
        let gap = std::mem::take(&mut self.gap);
        let paused = head.sequence == self.taken + 1 && head.timestamp > gap.from;
        if !paused {
            self.stats.concealed += gap.frames;
        }
        self.stats.played += 1;
        self.taken = head.sequence;
        self.playout = Playout::Playing { next: head.timestamp + self.step, concealed: 0 };
        let delay = self.delay(now, head.timestamp);
        self.stats.delay = Duration::from_micros(delay.unsigned_abs());
        Frame::Packet { payload: head.payload, generation: head.generation }
    }
}

/// Serial number comparison (RFC 1982).
fn is_at_most(generation: u16, limit: u16) -> bool {
    limit.wrapping_sub(generation) as i16 >= 0
}

/// Frames made up in a row; what would follow is silence.
const MOST_CONCEALED: u32 = 3;

#[cfg(test)]
mod tests;
