//! One line in the log, now and then, about clocks that differ.

use antiphon_core::clock::Millis;

use crate::forward::{Sender, Skew};

/// Says what is wrong with whose clock, at most once a minute.
#[derive(Debug, Default)]
pub(super) struct SkewLog {
    quiet_until: Millis,
}

impl SkewLog {
    /// A genuine frame of that skew was dropped. One who sees frames go by can replay an old one: the line says what
    /// came, the metric tells whether it goes on.
    pub(super) fn note(&mut self, now: Millis, skew: Skew) {
        if now < self.quiet_until {
            return;
        }
        self.quiet_until = now.after(INTERVAL);
        tracing::warn!("{}", line(skew));
    }
}

fn line(Skew { sender, ahead_s }: Skew) -> String {
    let sender = match sender {
        Sender::Shard(id) => format!("worker {} in region {} (server ID {id})", id.worker, id.region),
        Sender::Relay(number) => format!("relay {number} in region {}", number.region()),
    };
    let seconds = ahead_s.unsigned_abs();
    let way = if ahead_s < 0 { "old" } else { "ahead" };
    format!("frames of {sender} are {seconds} s {way}: clocks differ, and its frames are dropped")
}

const INTERVAL: std::time::Duration = std::time::Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use antiphon_core::id::{RelayNumber, ServerId};

    #[test]
    fn the_line_names_who_and_how_much() {
        let worker = Sender::Shard(ServerId::from_u64(3 << 54 | 17 << 38 | 0xbeef));
        let of = |sender, ahead_s| line(Skew { sender, ahead_s });
        assert_eq!(
            of(worker, -121),
            "frames of worker 17 in region 3 (server ID 3.17.0#0000beef) are 121 s old: clocks differ, and its frames \
             are dropped"
        );
        assert!(of(Sender::Relay(RelayNumber::new(129).unwrap()), 45).contains("relay 129 in region 2 are 45 s ahead"));
    }

    #[test]
    fn it_is_said_once_a_minute() {
        let mut log = SkewLog::default();
        let skew = Skew { sender: Sender::Relay(RelayNumber::new(1).unwrap()), ahead_s: 60 };
        log.note(Millis(5), skew);
        assert_eq!(log.quiet_until, Millis(60_005));
        log.note(Millis(60_004), skew);
        assert_eq!(log.quiet_until, Millis(60_005));
        log.note(Millis(60_005), skew);
        assert_eq!(log.quiet_until, Millis(120_005));
    }
}
