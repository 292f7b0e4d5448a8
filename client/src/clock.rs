//! This machine's clock beside the router's.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use tonic::metadata::MetadataMap;

/// How far this machine's clock is ahead of a router's, measured by the `date` of an answer (RFC 9110, section 6.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockSkew {
    ahead_ms: i64,
}

impl ClockSkew {
    /// From here on it is worth a word: tickets live for 30 s.
    pub const NOTABLE: Duration = Duration::from_secs(30);

    /// By the header of an answer to a request that left at `sent` and came back at `received`, by this machine's clock.
    #[must_use]
    pub fn of(metadata: &MetadataMap, sent: SystemTime, received: SystemTime) -> Option<Self> {
        let date = httpdate::parse_http_date(metadata.get("date")?.to_str().ok()?).ok()?;
        Some(Self::measure(sent, received, date))
    }

    /// The router made its answer half way between the two, and its date has whole seconds, rounded down.
    fn measure(sent: SystemTime, received: SystemTime, date: SystemTime) -> Self {
        let half_way = sent + received.duration_since(sent).unwrap_or_default() / 2;
        let date = date + Duration::from_millis(500);
        let ms = |span: Duration| i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
        let ahead_ms = match half_way.duration_since(date) {
            Ok(ahead) => ms(ahead),
            Err(behind) => -ms(behind.duration()),
        };
        Self { ahead_ms }
    }

    /// Milliseconds that this machine's clock is ahead; below zero: behind. Half a second either way means nothing.
    #[must_use]
    pub const fn ahead_ms(self) -> i64 {
        self.ahead_ms
    }

    /// Whether it is more than [`Self::NOTABLE`].
    #[must_use]
    pub const fn is_notable(self) -> bool {
        self.ahead_ms.unsigned_abs() as u128 > Self::NOTABLE.as_millis()
    }

    /// What the router's clock shows when this machine's shows `local`. A skew that is not notable is taken for none.
    #[must_use]
    pub fn router_time(self, local: SystemTime) -> SystemTime {
        let by = Duration::from_millis(self.ahead_ms.unsigned_abs());
        let shifted = match (self.is_notable(), self.ahead_ms > 0) {
            (false, _) => None,
            (true, true) => local.checked_sub(by),
            (true, false) => local.checked_add(by),
        };
        shifted.unwrap_or(local)
    }
}

impl fmt::Display for ClockSkew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = (self.ahead_ms.unsigned_abs() + 500) / 1000;
        let way = if self.ahead_ms < 0 { "behind" } else { "ahead of" };
        write!(f, "this machine's clock is {seconds} s {way} the router's")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_000 + ms)
    }

    #[test]
    fn the_date_of_an_answer_says_how_far_clocks_are_apart() {
        let mut metadata = MetadataMap::new();
        assert_eq!(ClockSkew::of(&metadata, at(0), at(1)), None);
        metadata.insert("date", "Fri, 15 Jan 2027 08:00:00 GMT".parse().unwrap());
        let skew = ClockSkew::of(&metadata, at(121_400), at(121_600)).unwrap();
        assert_eq!((skew.ahead_ms(), skew.is_notable()), (121_000, true));
        assert_eq!(skew.to_string(), "this machine's clock is 121 s ahead of the router's");
        assert_eq!(skew.router_time(at(121_500)), at(500));
        metadata.insert("date", "yesterday".parse().unwrap());
        assert_eq!(ClockSkew::of(&metadata, at(0), at(1)), None);
    }

    #[test]
    fn little_differences_are_none() {
        for (ahead, notable) in [(0, false), (30_000, false), (30_001, true)] {
            let ahead_of = ClockSkew::measure(at(ahead + 500), at(ahead + 500), at(0));
            let behind = ClockSkew::measure(at(500), at(500), at(ahead));
            assert_eq!((ahead_of.is_notable(), behind.is_notable()), (notable, notable), "{ahead}");
            assert_eq!(ahead_of.ahead_ms(), -behind.ahead_ms());
        }
        let behind = ClockSkew::measure(at(500), at(500), at(60_000));
        assert_eq!(behind.to_string(), "this machine's clock is 60 s behind the router's");
        assert_eq!(behind.router_time(at(0)), at(60_000));
        assert_eq!(ClockSkew { ahead_ms: 20_000 }.router_time(at(5)), at(5));
    }
}
