//! Every way in which a request fails, and its form in gRPC and HTTP.

use antiphon_core::placement::RefusalReason;
use antiphon_proto::{refusal, v1};
use tonic::{Code, Status};

use crate::field::FieldError;

/// Why a request got no answer but an error.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum Failure {
    /// No key, or not one of ours.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// The key does not allow it.
    #[error("{0}")]
    Forbidden(String),
    /// A field is wrong.
    #[error(transparent)]
    Invalid(#[from] FieldError),
    /// No such session of this tenant.
    #[error("{0}")]
    NotFound(String),
    /// The session exists with other properties.
    #[error("{0}")]
    Conflict(String),
    /// Someone who has to answer does not.
    #[error("{0}")]
    Unavailable(String),
    /// Nothing can be placed now.
    #[error("{}", .0.detail)]
    Refused(Box<v1::Refusal>, Reason),
}

/// The closed set of reasons of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reason {
    NoSuchAgent,
    NoCapacity,
    TooFar,
    NoRegionMatches,
    TenantLimit,
    KeyLimit,
    Overloaded,
}

impl Reason {
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::NoSuchAgent => RefusalReason::NoSuchAgent.label(),
            Self::NoCapacity => RefusalReason::NoCapacity.label(),
            Self::TooFar => RefusalReason::TooFar.label(),
            Self::NoRegionMatches => RefusalReason::NoRegionMatches.label(),
            Self::TenantLimit => "tenant_limit",
            Self::KeyLimit => "key_limit",
            Self::Overloaded => "overloaded",
        }
    }
}

impl From<RefusalReason> for Reason {
    fn from(reason: RefusalReason) -> Self {
        match reason {
            RefusalReason::NoSuchAgent => Self::NoSuchAgent,
            RefusalReason::NoCapacity => Self::NoCapacity,
            RefusalReason::TooFar => Self::TooFar,
            RefusalReason::NoRegionMatches => Self::NoRegionMatches,
        }
    }
}

impl Failure {
    pub(crate) fn refused(
        reason: Reason,
        detail: impl Into<String>,
        retry_after_ms: u32,
        candidates: Vec<v1::Candidate>,
    ) -> Self {
        let refusal =
            v1::Refusal { reason: reason.label().to_owned(), detail: detail.into(), candidates, retry_after_ms };
        Self::Refused(Box::new(refusal), reason)
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        match failure {
            Failure::Unauthenticated(_) => Self::unauthenticated(text),
            Failure::Forbidden(_) => Self::permission_denied(text),
            Failure::Invalid(error) => error.into(),
            Failure::NotFound(_) => Self::not_found(text),
            Failure::Conflict(_) => Self::already_exists(text),
            Failure::Unavailable(_) => Self::unavailable(text),
            Failure::Refused(refusal, reason) => {
                let code = match reason {
                    Reason::NoSuchAgent => Code::NotFound,
                    _ if refusal.retry_after_ms > 0 => Code::ResourceExhausted,
                    _ => Code::FailedPrecondition,
                };
                refusal::to_status(code, &refusal)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_by_their_code_whether_waiting_helps() {
        let status = |reason, retry| Status::from(Failure::refused(reason, "x", retry, vec![]));
        let soon = status(Reason::TooFar, 10);
        assert_eq!(soon.code(), Code::ResourceExhausted);
        assert_eq!(refusal::of_status(&soon).unwrap().reason, "too_far");
        assert_eq!(status(Reason::TooFar, 0).code(), Code::FailedPrecondition);
        assert_eq!(status(Reason::NoSuchAgent, 0).code(), Code::NotFound);
    }
}
