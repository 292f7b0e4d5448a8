//! Liveness of the other end, from both ends' heartbeats.
//!
//! A machine without a clock: times are microseconds of one end's own monotonic clock. Each end sends a heartbeat when
//! it has sent nothing for [`Heartbeats::QUIET`], and one per [`Heartbeats::INTERVAL`] whatever else it sends, so that
//! silence of 100 ms means something and the epoch is acknowledged well within 400 ms (invariant I6). Who has heard
//! nothing for [`Heartbeats::UNHEARD`] says so more often: a way that is dead in one direction is known only by what
//! comes the other way.

use std::time::Duration;

use antiphon_core::id::Epoch;
use antiphon_proto::v1::Heartbeat;
use bytes::Bytes;

/// What an end tells the other of its audio.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AudioReceived {
    /// RTP packets received so far.
    pub received: u32,
    /// RTP packets missing so far.
    pub lost: u32,
    /// Low 16 bits of the highest sequence number received.
    pub highest: Option<u16>,
}

/// What an end knows of the other.
#[derive(Debug, Clone)]
pub struct Heartbeats {
    epoch: Epoch,
    sequence: u32,
    last_heard_us: u64,
    last_sent_us: u64,
    last_beat_us: u64,
    /// The newest heartbeat from the other end: its clock, and ours when it came.
    received: Option<(u64, u64)>,
    newest_sequence: u32,
    acknowledged_us: Option<u64>,
    rtt: Option<Duration>,
}

impl Heartbeats {
    /// Silence after which a heartbeat is due.
    pub const QUIET: Duration = Duration::from_millis(80);
    /// A heartbeat is due this often even between audio.
    pub const INTERVAL: Duration = Duration::from_millis(200);
    /// Silence of the other end after which a heartbeat is due every [`Self::URGENT`], until [`Self::ALONE`].
    pub const UNHEARD: Duration = Duration::from_millis(150);
    /// See [`Self::UNHEARD`].
    pub const URGENT: Duration = Duration::from_millis(40);
    /// Silence after which that is over: whoever could act on it has.
    pub const ALONE: Duration = Duration::from_secs(1);
    /// An acknowledgement of the epoch older than this no longer allows side effects.
    pub const EPOCH_ACK: Duration = Duration::from_millis(400);

    /// Zeros in a path opener: with them it still fits every path.
    const OPENER_PADDING: usize = 1_000;

    /// Starts at `now_us`, as if the other end had just been heard.
    #[must_use]
    pub const fn new(now_us: u64, epoch: Epoch) -> Self {
        Self {
            epoch,
            sequence: 0,
            last_heard_us: now_us,
            last_sent_us: now_us,
            last_beat_us: now_us,
            received: None,
            newest_sequence: 0,
            acknowledged_us: None,
            rtt: None,
        }
    }

    /// Something other than a heartbeat was sent.
    pub const fn on_sent(&mut self, now_us: u64) {
        self.last_sent_us = now_us;
    }

    /// Anything came from the other end.
    pub const fn on_heard(&mut self, now_us: u64) {
        self.last_heard_us = now_us;
    }

    /// A heartbeat came. Older ones than the newest (reordered by the path) only count as a sign of life.
    pub fn on_heartbeat(&mut self, now_us: u64, beat: &Heartbeat) {
        self.on_heard(now_us);
        if self.received.is_some() && beat.sequence <= self.newest_sequence {
            return;
        }
        self.newest_sequence = beat.sequence;
        self.received = Some((beat.sent_us, now_us));
        if beat.epoch == self.epoch.value() {
            self.acknowledged_us = Some(now_us);
        }
        // The echo is the other end's claim: kept only if it is a time that could have been.
        if let Some(elapsed) = now_us.checked_sub(beat.echoed_us).filter(|_| beat.echoed_us != 0)
            && let Some(rtt) = elapsed.checked_sub(u64::from(beat.echo_delay_us))
            && rtt < Duration::from_secs(60).as_micros() as u64
        {
            self.rtt = Some(Duration::from_micros(rtt));
        }
    }

    /// The heartbeat that is due now, if one is.
    pub fn poll(&mut self, now_us: u64, audio: AudioReceived) -> Option<Heartbeat> {
        let quiet = now_us.saturating_sub(self.last_sent_us) >= Self::QUIET.as_micros() as u64;
        let regular = now_us.saturating_sub(self.last_beat_us) >= Self::INTERVAL.as_micros() as u64;
        let unheard = (Self::UNHEARD..Self::ALONE).contains(&self.silence(now_us));
        let urgent = unheard && now_us.saturating_sub(self.last_beat_us) >= Self::URGENT.as_micros() as u64;
        if !quiet && !regular && !urgent {
            return None;
        }
        Some(self.beat(now_us, audio))
    }

    /// The first message on a new path: padded, because the other end may send no more than three times what it got
    /// there until it has validated the path (RFC 9000, section 8.2), and its challenge alone takes 1,200 bytes.
    pub fn path_opener(&mut self, now_us: u64, audio: AudioReceived) -> Heartbeat {
        let padding = vec![0; Self::OPENER_PADDING].into();
        Heartbeat { padding, new_path: true, ..self.beat(now_us, audio) }
    }

    /// A heartbeat whether one is due or not.
    pub fn beat(&mut self, now_us: u64, audio: AudioReceived) -> Heartbeat {
        self.sequence = self.sequence.wrapping_add(1);
        self.last_sent_us = now_us;
        self.last_beat_us = now_us;
        let (echoed_us, held_us) = self.received.map_or((0, 0), |(theirs, ours)| (theirs, now_us.saturating_sub(ours)));
        Heartbeat {
            epoch: self.epoch.value(),
            sequence: self.sequence,
            sent_us: now_us,
            echoed_us,
            echo_delay_us: u32::try_from(held_us).unwrap_or(u32::MAX),
            audio_received: audio.received,
            audio_lost: audio.lost,
            audio_highest: audio.highest.map(u32::from),
            new_path: false,
            padding: Bytes::new(),
        }
    }

    /// How long the other end has been silent.
    #[must_use]
    pub const fn silence(&self, now_us: u64) -> Duration {
        Duration::from_micros(now_us.saturating_sub(self.last_heard_us))
    }

    /// Whether the other end acknowledged the epoch recently enough for a side effect.
    #[must_use]
    pub fn epoch_acknowledged(&self, now_us: u64) -> bool {
        self.acknowledged_us.is_some_and(|at| now_us.saturating_sub(at) <= Self::EPOCH_ACK.as_micros() as u64)
    }

    /// The last round trip measured by heartbeats.
    #[must_use]
    pub const fn rtt(&self) -> Option<Duration> {
        self.rtt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1000;

    #[test]
    fn a_quiet_end_speaks_up_and_a_talking_one_acknowledges_in_time() {
        let mut quiet = Heartbeats::new(0, Epoch::FIRST);
        assert!(quiet.poll(79 * MS, AudioReceived::default()).is_none());
        assert!(quiet.poll(80 * MS, AudioReceived::default()).is_some());
        let mut talking = Heartbeats::new(0, Epoch::FIRST);
        let beats = (1..=50).filter(|frame| {
            talking.on_sent(frame * 20 * MS);
            talking.on_heard(frame * 20 * MS);
            talking.poll(frame * 20 * MS, AudioReceived::default()).is_some()
        });
        assert_eq!(beats.count(), 5, "five a second between audio");
    }

    #[test]
    fn who_hears_nothing_any_more_says_so_often_for_a_while() {
        let mut deaf = Heartbeats::new(0, Epoch::FIRST);
        let mut beats = Vec::new();
        for now in (20..=3_000).step_by(20) {
            deaf.on_sent(now * MS);
            if deaf.poll(now * MS, AudioReceived::default()).is_some() {
                beats.push(now);
            }
        }
        let within = |from, to| beats.iter().filter(|at| (from..to).contains(*at)).count();
        assert_eq!(within(0, 150), 0);
        assert_eq!(beats[0], 160);
        assert_eq!(within(160, 1_000), 21, "every 40 ms");
        assert_eq!(within(1_000, 3_000), 10, "five a second again");
    }

    #[test]
    fn round_trip_leaves_out_the_time_held() {
        let (mut a, mut b) = (Heartbeats::new(0, Epoch::FIRST), Heartbeats::new(500 * MS, Epoch::FIRST));
        let beat = a.poll(100 * MS, AudioReceived::default()).unwrap();
        b.on_heartbeat(600 * MS, &beat);
        let answer = b.poll(650 * MS, AudioReceived::default()).unwrap();
        a.on_heartbeat(180 * MS, &answer);
        assert_eq!(a.rtt(), Some(Duration::from_millis(30)));
        assert!(a.epoch_acknowledged(580 * MS) && !a.epoch_acknowledged(581 * MS));
    }

    #[test]
    fn another_epoch_acknowledges_nothing_and_lies_are_ignored() {
        let mut a = Heartbeats::new(0, Epoch::FIRST);
        a.on_heartbeat(5, &Heartbeat { epoch: 2, sequence: 1, echoed_us: u64::MAX, ..Heartbeat::default() });
        assert!(!a.epoch_acknowledged(5));
        assert_eq!(a.rtt(), None);
        assert_eq!(a.silence(5 + 7 * MS), Duration::from_millis(7));
    }
}
