//! Sequence numbers without end, losses and jitter (RFC 3550, sections 6.4.1, A.1, A.3 and A.8).

/// What a packet's sequence number says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sequence {
    /// New, in or out of order. Extended: it does not wrap.
    New(u64),
    /// Was here already, or is too old to tell.
    Duplicate,
    /// Far from what was expected; its successor next makes the two of them a restart.
    Suspect,
    /// The sender began anew. Extended: higher than any number before.
    Restarted(u64),
}

/// Losses so far, as a receiver report tells them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceptionReport {
    /// Packets received, without duplicates.
    pub received: u64,
    /// Packets that were sent and have not arrived (A.3), however late the others came.
    pub lost: u64,
}

/// Extends the 16-bit sequence numbers of one stream, tells duplicates and restarts, counts losses.
#[derive(Debug, Clone, Default)]
pub struct SequenceTracker {
    stream: Option<Stream>,
    /// The high bits that the next stream begins with, less one.
    cycle: u64,
    /// Of the streams before the last restart.
    past: ReceptionReport,
}

#[derive(Debug, Clone)]
struct Stream {
    first: u64,
    highest: u64,
    received: u64,
    /// Bit i: `highest - i` was received.
    seen: u128,
    /// What would turn a suspicion into a restart.
    suspect_next: Option<u16>,
}

impl SequenceTracker {
    /// Accounts for a packet.
    pub fn track(&mut self, sequence: u16) -> Sequence {
        let Some(stream) = &mut self.stream else {
            return Sequence::New(self.begin(sequence));
        };
        let ahead = u32::from(sequence.wrapping_sub(stream.highest as u16));
        let behind = u32::from((stream.highest as u16).wrapping_sub(sequence));
        if (1..MAX_DROPOUT).contains(&ahead) {
            stream.suspect_next = None;
            stream.highest += u64::from(ahead);
            stream.seen = stream.seen.checked_shl(ahead).unwrap_or(0) | 1;
            stream.received += 1;
            Sequence::New(stream.highest)
        } else if behind < MAX_MISORDER {
            if stream.seen & (1 << behind) != 0 {
                return Sequence::Duplicate;
            }
            let extended = stream.highest - u64::from(behind);
            stream.seen |= 1 << behind;
            stream.first = stream.first.min(extended);
            stream.received += 1;
            Sequence::New(extended)
        } else if stream.suspect_next == Some(sequence) {
            self.restart();
            // The suspect was the first packet of the new stream; it was not kept.
            self.past.received += 1;
            Sequence::Restarted(self.begin(sequence))
        } else {
            stream.suspect_next = Some(sequence.wrapping_add(1));
            Sequence::Suspect
        }
    }

    /// Begins anew with the next packet, whatever its number: another source speaks. Extended numbers go on growing.
    pub fn restart(&mut self) {
        self.past = self.report();
        if let Some(stream) = self.stream.take() {
            self.cycle = (stream.highest >> 16) + 1;
        }
    }

    /// Low 16 bits of the highest sequence number received.
    pub fn highest(&self) -> Option<u16> {
        self.stream.as_ref().map(|stream| stream.highest as u16)
    }

    /// Received and lost, over all restarts.
    pub fn report(&self) -> ReceptionReport {
        let ReceptionReport { received, lost } = self.past;
        match &self.stream {
            None => self.past,
            Some(stream) => ReceptionReport {
                received: received + stream.received,
                lost: lost + (stream.highest - stream.first + 1 - stream.received),
            },
        }
    }

    fn begin(&mut self, sequence: u16) -> u64 {
        // One cycle in hand, so that numbers before the first can be extended too.
        let first = (self.cycle + 1) << 16 | u64::from(sequence);
        self.stream = Some(Stream { first, highest: first, received: 1, seen: 1, suspect_next: None });
        first
    }
}

/// The interarrival jitter estimate of RFC 3550, section A.8.
#[derive(Debug, Clone, Copy, Default)]
pub struct InterarrivalJitter {
    last_transit: Option<i64>,
    /// In sixteenths.
    estimate: i64,
}

impl InterarrivalJitter {
    /// Takes a packet's transit, arrival less timestamp, in any one unit and from any origin.
    pub fn update(&mut self, transit: i64) {
        if let Some(last) = self.last_transit.replace(transit) {
            let difference = transit.saturating_sub(last).saturating_abs().min(i64::MAX / 32);
            self.estimate += difference - ((self.estimate + 8) >> 4);
        }
    }

    /// Forgets the last transit: the timestamps have jumped.
    pub fn rebase(&mut self) {
        self.last_transit = None;
    }

    /// In the unit of the transits.
    pub fn estimate(&self) -> i64 {
        self.estimate >> 4
    }
}

const MAX_DROPOUT: u32 = 3000; // A.1
const MAX_MISORDER: u32 = 100; // A.1; less than the bits of `Stream::seen`

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_extend_over_the_wrap_in_any_order() {
        let mut tracker = SequenceTracker::default();
        let base = 1 << 16;
        assert_eq!(tracker.track(65534), Sequence::New(base + 65534));
        assert_eq!(tracker.track(1), Sequence::New(base + 65537));
        assert_eq!(tracker.track(65535), Sequence::New(base + 65535));
        assert_eq!(tracker.track(65535), Sequence::Duplicate);
        assert_eq!(tracker.track(65533), Sequence::New(base + 65533), "before the first");
        assert_eq!(tracker.report(), ReceptionReport { received: 4, lost: 1 });
        assert_eq!(tracker.track(0), Sequence::New(base + 65536));
        assert_eq!(tracker.report(), ReceptionReport { received: 5, lost: 0 });
    }

    #[test]
    fn one_stray_number_changes_nothing_and_two_in_a_row_restart() {
        let mut tracker = SequenceTracker::default();
        tracker.track(100);
        assert_eq!(tracker.track(40_000), Sequence::Suspect);
        assert_eq!(tracker.track(101), Sequence::New((1 << 16) + 101));
        assert_eq!(tracker.track(40_001), Sequence::Suspect, "the suspicion ended");
        assert_eq!(tracker.track(40_002), Sequence::Restarted((3 << 16) + 40_002));
        assert_eq!(tracker.track(40_003), Sequence::New((3 << 16) + 40_003));
        assert_eq!(tracker.report(), ReceptionReport { received: 5, lost: 0 });
    }

    #[test]
    fn jitter_converges_on_the_mean_difference() {
        let mut jitter = InterarrivalJitter::default();
        for i in 0..200 {
            jitter.update(1_000_000 + if i % 2 == 0 { 0 } else { 800 });
        }
        assert!((780..=800).contains(&jitter.estimate()), "{}", jitter.estimate());
    }

    proptest! {
        #[test]
        fn any_numbers_are_counted_once(numbers: Vec<u16>, transits: Vec<i64>) {
            let mut tracker = SequenceTracker::default();
            let mut jitter = InterarrivalJitter::default();
            let mut seen = std::collections::BTreeSet::new();
            for number in numbers {
                if let Sequence::New(extended) | Sequence::Restarted(extended) = tracker.track(number) {
                    prop_assert_eq!(extended as u16, number);
                    prop_assert!(seen.insert(extended), "{} twice", extended);
                }
            }
            transits.into_iter().for_each(|transit| jitter.update(transit));
            prop_assert!(tracker.report().received >= seen.len() as u64);
        }
    }
}
