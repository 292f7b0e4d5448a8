//! Conditions, merged by type: a condition that says the same as before keeps its time.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// It does.
    True,
    /// It does not.
    False,
    /// Nobody can tell now.
    Unknown,
}

impl Holds {
    /// As in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Holds {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// What is to be said of an object. Type and reason are CamelCase and closed sets; the message is for people and says
/// what to do where something is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Say {
    /// The condition's type.
    pub type_: &'static str,
    /// Whether it holds.
    pub holds: Holds,
    /// Why, in one word.
    pub reason: &'static str,
    /// Why, in words. Cut at 1024 characters.
    pub message: String,
}

impl Say {
    /// Puts it together.
    pub fn new(type_: &'static str, holds: impl Into<Holds>, reason: &'static str, message: impl Into<String>) -> Self {
        Self { type_, holds: holds.into(), reason, message: message.into() }
    }
}

/// The conditions that `said` makes of those from before: order and transition times of what stays are kept, types that
/// are not spoken of go.
#[must_use]
pub fn merge(before: &[Condition], said: Vec<Say>, generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    let position = |type_: &str| before.iter().position(|condition| condition.type_ == type_);
    let mut merged: Vec<(usize, Condition)> = said
        .into_iter()
        .enumerate()
        .map(|(index, say)| {
            let previous = position(say.type_);
            let status = say.holds.as_str();
            let unchanged = previous.map(|at| &before[at]).filter(|condition| condition.status == status);
            let condition = Condition {
                type_: say.type_.to_owned(),
                status: status.to_owned(),
                reason: say.reason.to_owned(),
                message: say.message.chars().take(LONGEST_MESSAGE).collect(),
                observed_generation: generation,
                last_transition_time: unchanged
                    .map_or_else(|| Time(seconds(now)), |condition| condition.last_transition_time.clone()),
            };
            (previous.unwrap_or(before.len() + index), condition)
        })
        .collect();
    merged.sort_by_key(|(at, _)| *at);
    merged.into_iter().map(|(_, condition)| condition).collect()
}

/// The API keeps whole seconds.
fn seconds(now: Timestamp) -> Timestamp {
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// Far below what the API allows; a status is no log.
const LONGEST_MESSAGE: usize = 1_024;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_time_changes_only_with_the_status() {
        let first = merge(&[], vec![Say::new("Ready", false, "Starting", "0 of 2 relays")], Some(1), at(10));
        let second = merge(&first, vec![Say::new("Ready", false, "Starting", "1 of 2 relays")], Some(1), at(20));
        assert_eq!(second[0].last_transition_time, Time(at(10)));
        assert_eq!(second[0].message, "1 of 2 relays");
        let third = merge(&second, vec![Say::new("Ready", true, "Ready", "")], Some(2), at(30));
        assert_eq!((third[0].last_transition_time.clone(), third[0].observed_generation), (Time(at(30)), Some(2)));
    }

    #[test]
    fn order_stays_and_what_is_not_said_any_more_goes() {
        let say = |types: &[&'static str]| types.iter().map(|type_| Say::new(type_, true, "Yes", "")).collect();
        let first = merge(&[], say(&["Ready", "Degraded", "Progressing"]), None, at(1));
        let second = merge(&first, say(&["New", "Progressing", "Ready"]), None, at(2));
        let types: Vec<_> = second.iter().map(|condition| condition.type_.as_str()).collect();
        assert_eq!(types, ["Ready", "Progressing", "New"]);
    }
}
