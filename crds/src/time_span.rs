//! Lengths of time as people write them: `600ms`, `90s`, `1h30m`.

use std::{borrow::Cow, fmt, str::FromStr, time::Duration};

use kube::core::{Message, Rule};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::form;

/// A length of time in whole milliseconds, written as hours, minutes, seconds and milliseconds in this order:
/// `600ms`, `90s`, `1h30m`. A subset of what Go and CEL read as a duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TimeSpan(Duration);

/// The text is no [`TimeSpan`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no duration: write {meaning}", meaning = form::TIME_SPAN.meaning)]
pub struct InvalidTimeSpan(String);

/// Smallest and largest value of a field that holds a [`TimeSpan`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    min: &'static str,
    max: &'static str,
}

impl TimeSpan {
    /// A span of so many milliseconds.
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }

    /// A span of so many seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// The same as a [`Duration`].
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl FromStr for TimeSpan {
    type Err = InvalidTimeSpan;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidTimeSpan(text.chars().take(64).collect());
        let mut rest = text;
        let mut milliseconds = 0_u64;
        for unit in UNITS {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, tail) = rest.split_at(digits);
            // `5ms` is not five minutes and an "s".
            let Some(tail) = tail.strip_prefix(unit.name) else {
                continue;
            };
            if digits == 0 || digits > unit.digits || (unit.name == "m" && tail.starts_with('s')) {
                continue;
            }
            let number: u64 = number.parse().map_err(|_| invalid())?;
            milliseconds += number * unit.milliseconds;
            rest = tail;
        }
        if text.is_empty() || !rest.is_empty() {
            return Err(invalid());
        }
        Ok(Self::from_millis(milliseconds))
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if rest == 0 {
            return f.write_str("0s");
        }
        for unit in UNITS {
            let number = rest / unit.milliseconds;
            rest %= unit.milliseconds;
            if number > 0 {
                write!(f, "{number}{}", unit.name)?;
            }
        }
        Ok(())
    }
}

impl TryFrom<String> for TimeSpan {
    type Error = InvalidTimeSpan;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<TimeSpan> for String {
    fn from(span: TimeSpan) -> Self {
        span.to_string()
    }
}

impl From<TimeSpan> for Duration {
    fn from(span: TimeSpan) -> Self {
        span.0
    }
}

impl JsonSchema for TimeSpan {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "TimeSpan".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "minLength": 1,
            "maxLength": 32,
            "pattern": form::TIME_SPAN.pattern,
        })
    }
}

impl Range {
    pub(crate) const fn new(min: &'static str, max: &'static str) -> Self {
        Self { min, max }
    }

    /// The range as a rule of the API server, for the field itself.
    pub(crate) fn rule(self) -> Rule {
        let Self { min, max } = self;
        Rule::new(format!("duration(self) >= duration('{min}') && duration(self) <= duration('{max}')"))
            .message(Message::Message(format!("must lie between {min} and {max}")))
    }

    /// What is wrong with a value, or `None` if it lies within.
    pub(crate) fn problem(self, value: TimeSpan) -> Option<String> {
        let bound = |text: &str| text.parse::<TimeSpan>().expect("bounds are literals");
        let within = (bound(self.min)..=bound(self.max)).contains(&value);
        (!within).then(|| format!("does not lie between {} and {}", self.min, self.max))
    }
}

struct Unit {
    name: &'static str,
    milliseconds: u64,
    /// Most digits in front of it; keeps every sum far below `u64::MAX`.
    digits: usize,
}

const UNITS: [Unit; 4] = [
    Unit { name: "h", milliseconds: 3_600_000, digits: 4 },
    Unit { name: "m", milliseconds: 60_000, digits: 6 },
    Unit { name: "s", milliseconds: 1_000, digits: 8 },
    Unit { name: "ms", milliseconds: 1, digits: 10 },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_and_written_in_units() {
        for (text, milliseconds, canonical) in [
            ("600ms", 600, "600ms"),
            ("0s", 0, "0s"),
            ("90s", 90_000, "1m30s"),
            ("1h30m", 5_400_000, "1h30m"),
            ("5m", 300_000, "5m"),
            ("1m1ms", 60_001, "1m1ms"),
            ("2h3m4s5ms", 7_384_005, "2h3m4s5ms"),
        ] {
            let span: TimeSpan = text.parse().unwrap();
            assert_eq!(span, TimeSpan::from_millis(milliseconds), "{text}");
            assert_eq!(span.to_string(), canonical);
            assert_eq!(canonical.parse::<TimeSpan>().unwrap(), span);
        }
    }

    #[test]
    fn what_is_read_is_what_the_schema_admits() {
        let pattern = regex::Regex::new(form::TIME_SPAN.pattern).unwrap();
        let texts = [
            "",
            "5",
            "ms",
            "h",
            "1.5h",
            "-1s",
            "1s1h",
            "1h1h",
            "1 h",
            "1d",
            "600MS",
            "１s",
            "1hm",
            "1ms1ms",
            "99999h",
            "9999h",
            "999999m",
            "1m2",
            "1ms",
            "10m5ms",
            "100000000s",
            "99999999s",
            "9999999999ms",
        ];
        for text in texts {
            let admitted = !text.is_empty() && pattern.is_match(text);
            assert_eq!(text.parse::<TimeSpan>().is_ok(), admitted, "{text:?}");
        }
    }
}
