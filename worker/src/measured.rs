//! Round trips that callers have had here, by where they are.

use std::{collections::BTreeMap, time::Duration};

use antiphon_core::clock::Millis;
use antiphon_proto::v1::MeasuredRtt;

/// The newest neighbourhoods and their round trips; bounded.
#[derive(Debug, Default)]
pub(crate) struct Measured(BTreeMap<u32, Entry>);

#[derive(Debug)]
struct Entry {
    /// Microseconds, smoothed over measurements and callers.
    rtt_us: u64,
    at: Millis,
}

impl Measured {
    /// A caller of a neighbourhood has this round trip now; 0 is nowhere.
    pub(crate) fn note(&mut self, now: Millis, neighbourhood: u32, rtt: Duration) {
        if neighbourhood == 0 {
            return;
        }
        let sample = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX).min(LONGEST_US);
        if let Some(entry) = self.0.get_mut(&neighbourhood) {
            // As QUIC smooths its own (RFC 9002, section 5.3).
            (entry.rtt_us, entry.at) = ((entry.rtt_us * 7 + sample) / 8, now);
            return;
        }
        if self.0.len() >= MOST {
            let oldest = self.0.iter().min_by_key(|(_, entry)| entry.at).map(|(number, _)| *number);
            oldest.and_then(|number| self.0.remove(&number));
        }
        self.0.insert(neighbourhood, Entry { rtt_us: sample, at: now });
    }

    /// What was measured lately.
    pub(crate) fn list(&mut self, now: Millis) -> Vec<MeasuredRtt> {
        self.0.retain(|_, entry| now.since(entry.at) <= MEMORY);
        let ms = |us: u64| u32::try_from(us.div_ceil(1000)).unwrap_or(u32::MAX).max(1);
        self.0.iter().map(|(n, entry)| MeasuredRtt { neighbourhood: *n, rtt_ms: ms(entry.rtt_us) }).collect()
    }
}

/// As many as routers take.
const MOST: usize = 64;
/// Networks change by the hour, not by the minute.
const MEMORY: Duration = Duration::from_secs(600);
const LONGEST_US: u64 = 60_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_of_a_neighbourhood_are_taken_together_and_forgotten_in_time() {
        let mut measured = Measured::default();
        let ms = Duration::from_millis;
        measured.note(Millis(0), 0, ms(1));
        measured.note(Millis(0), 7, ms(40));
        measured.note(Millis(0), 7, ms(120));
        measured.note(Millis(300_000), 9, Duration::MAX);
        let list = |measured: &mut Measured, now| -> Vec<(u32, u32)> {
            measured.list(Millis(now)).iter().map(|m| (m.neighbourhood, m.rtt_ms)).collect()
        };
        assert_eq!(list(&mut measured, 300_000), [(7, 50), (9, 60_000)], "one slow caller moves it a little");
        assert_eq!(list(&mut measured, 600_001), [(9, 60_000)]);
        for n in 100..300 {
            measured.note(Millis(600_000 + u64::from(n)), n, ms(5));
        }
        let kept = list(&mut measured, 600_400);
        assert_eq!((kept.len(), kept[0], kept[63]), (MOST, (236, 5), (299, 5)), "the newest");
    }
}
