//! The planner's words.

use std::{fmt, time::Duration};

/// What sets the ceiling on the round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CeilingSetBy {
    /// The agent's preferred ceiling.
    Agent,
    /// The same, relaxed by the caller's waiting.
    Waiting,
    /// The nearest region that serves the caller: it is farther than the agent's ceiling and taken all the same.
    NearestRegion,
    /// The agent's hard ceiling.
    AgentMax,
    /// The request.
    Request,
}

/// What was found about one region or worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It took the session.
    Chosen,
    /// It could have taken the session.
    Eligible {
        /// Its place in the order, from 1.
        rank: u32,
    },
    /// The agent does not run there.
    NotServed,
    /// The request names other regions.
    NotAllowed,
    /// It is in none of the residency zones that the request names.
    Residency,
    /// Its GPUs are not of the agent's class.
    WrongGpuClass,
    /// Its round trip is above the ceiling.
    TooFar {
        /// Measured or estimated round trip.
        rtt: Duration,
        /// The ceiling that held at the decision.
        ceiling: Duration,
        /// What had set it.
        set_by: CeilingSetBy,
    },
    /// It keeps what it has and gets nothing new.
    Cordoned,
    /// It is being emptied.
    Draining,
    /// What we know of it is older than its lease.
    Stale {
        /// How old; `None`: nothing was heard yet.
        age: Option<Duration>,
    },
    /// Its control stream is broken.
    Disconnected,
    /// Its clock is too far behind the router's.
    ClockBehind {
        /// How far.
        by: Duration,
    },
    /// No worker of the agent is registered.
    NoWorkers,
    /// No free lease.
    Full,
    /// It was asked and refused.
    Refused,
    /// It was asked and did not answer in time.
    Unreachable,
}

impl Verdict {
    /// The closed word for metrics and machines.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Chosen => "chosen",
            Self::Eligible { .. } => "eligible",
            Self::NotServed => "not_served",
            Self::NotAllowed => "not_allowed",
            Self::Residency => "residency",
            Self::WrongGpuClass => "wrong_gpu_class",
            Self::TooFar { .. } => "too_far",
            Self::Cordoned => "cordoned",
            Self::Draining => "draining",
            Self::Stale { .. } => "stale",
            Self::Disconnected => "disconnected",
            Self::ClockBehind { .. } => "clock_behind",
            Self::NoWorkers => "no_workers",
            Self::Full => "full",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
        }
    }

    /// What the region of a verdict with this label does or is, to go on from its name: "frankfurt is full".
    #[must_use]
    pub fn predicate(label: &str) -> &'static str {
        match label {
            "chosen" => "took it",
            "eligible" => "is busier or liked less",
            "not_served" => "does not run the agent",
            "not_allowed" => "is not among those asked for",
            "residency" => "is in none of the residency zones asked for",
            "wrong_gpu_class" => "has other GPUs",
            "too_far" => "is too far",
            "cordoned" => "is cordoned",
            "draining" => "is draining",
            "stale" => "has not reported lately",
            "disconnected" => "is disconnected",
            "clock_behind" => "has a clock that is behind",
            "no_workers" => "has no workers",
            "full" => "is full",
            "refused" => "refused",
            "unreachable" => "did not answer",
            _ => "was not chosen",
        }
    }

    /// Whether the objection may be gone in a moment.
    pub(super) const fn is_about_capacity(self) -> bool {
        match self {
            Self::Cordoned
            | Self::Draining
            | Self::Stale { .. }
            | Self::Disconnected
            | Self::ClockBehind { .. }
            | Self::NoWorkers
            | Self::Full
            | Self::Refused
            | Self::Unreachable => true,
            Self::Chosen
            | Self::Eligible { .. }
            | Self::NotServed
            | Self::NotAllowed
            | Self::Residency
            | Self::WrongGpuClass
            | Self::TooFar { .. } => false,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen => f.write_str("took the session"),
            Self::Eligible { rank } => write!(f, "eligible, number {rank} in the order"),
            Self::NotServed => f.write_str("the agent does not run there"),
            Self::NotAllowed => f.write_str("not among the regions that the request names"),
            Self::Residency => f.write_str("in none of the residency zones that the request names"),
            Self::WrongGpuClass => f.write_str("its GPUs are not of the agent's class"),
            Self::TooFar { ceiling, set_by, .. } => {
                let ceiling = ceiling.as_millis();
                match set_by {
                    CeilingSetBy::Agent => write!(f, "above rttCeiling, {ceiling} ms"),
                    CeilingSetBy::Waiting => write!(f, "above rttCeiling, risen to {ceiling} ms with the wait"),
                    CeilingSetBy::NearestRegion => write!(f, "farther than the nearest region, {ceiling} ms away"),
                    CeilingSetBy::AgentMax => write!(f, "above rttCeilingMax, {ceiling} ms"),
                    CeilingSetBy::Request => write!(f, "above maxRttMs of the request, {ceiling} ms"),
                }
            }
            Self::Cordoned => f.write_str("cordoned: gets nothing new"),
            Self::Draining => f.write_str("draining: is being emptied"),
            Self::Stale { age: Some(age) } => {
                write!(f, "last report is {} ms old", age.as_millis())
            }
            Self::Stale { age: None } => f.write_str("has not reported yet"),
            Self::Disconnected => f.write_str("its control stream is broken"),
            Self::ClockBehind { by } => {
                write!(f, "clock is {} s behind this router's: fix time synchronisation", by.as_secs())
            }
            Self::NoWorkers => f.write_str("no worker of the agent is registered"),
            Self::Full => f.write_str("no free lease"),
            Self::Refused => f.write_str("was asked and refused"),
            Self::Unreachable => f.write_str("was asked and did not answer in time"),
        }
    }
}

/// One line of an explanation. Indices are those of the snapshot that was planned on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Index of the region.
    pub region: usize,
    /// Index of the worker; `None`: the region as a whole.
    pub worker: Option<usize>,
    /// What was found.
    pub verdict: Verdict,
    /// Measured or estimated round trip; `None`: unknown.
    pub rtt: Option<Duration>,
    /// Free leases as seen at the decision.
    pub free: u32,
    /// Cost in milliseconds, where it was computed.
    pub cost: Option<f64>,
}

/// Why nothing was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// No agent of this name.
    NoSuchAgent,
    /// Regions match, but all are full or out of service.
    NoCapacity,
    /// Every region that matches is above the ceiling.
    TooFar,
    /// No region satisfies the constraints.
    NoRegionMatches,
}

impl RefusalReason {
    /// All reasons.
    pub const ALL: [Self; 4] = [Self::NoSuchAgent, Self::NoCapacity, Self::TooFar, Self::NoRegionMatches];

    /// The closed word for metrics and machines.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::NoSuchAgent => "no_such_agent",
            Self::NoCapacity => "no_capacity",
            Self::TooFar => "too_far",
            Self::NoRegionMatches => "no_region_matches",
        }
    }
}

impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSuchAgent => "there is no such agent",
            Self::NoCapacity => "every region that matches is full or out of service",
            Self::TooFar => "every region that matches is farther than the round-trip ceiling",
            Self::NoRegionMatches => "no region satisfies the constraints",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_label_has_a_predicate() {
        let age = Duration::ZERO;
        let too_far = Verdict::TooFar { rtt: age, ceiling: age, set_by: CeilingSetBy::Agent };
        let all = [
            Verdict::Chosen,
            Verdict::Eligible { rank: 1 },
            Verdict::NotServed,
            Verdict::NotAllowed,
            Verdict::Residency,
            Verdict::WrongGpuClass,
            too_far,
            Verdict::Cordoned,
            Verdict::Draining,
            Verdict::Stale { age: None },
            Verdict::Disconnected,
            Verdict::ClockBehind { by: age },
            Verdict::NoWorkers,
            Verdict::Full,
            Verdict::Refused,
            Verdict::Unreachable,
        ];
        let unknown = Verdict::predicate("no label");
        assert!(all.iter().all(|verdict| Verdict::predicate(verdict.label()) != unknown));
    }
}
