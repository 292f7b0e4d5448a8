//! Errors as `application/problem+json` (RFC 9457).

use axum::{
    http::{
        HeaderValue, StatusCode,
        header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use serde::Serialize;

use super::json::Candidate;
use crate::{
    field::FieldError,
    refusals::{Failure, Reason},
};

/// The body of every error.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Problem {
    #[serde(rename = "type")]
    kind: &'static str,
    title: &'static str,
    status: u16,
    detail: String,
    /// Closed word for machines.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    /// Field of the request that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    candidates: Option<Vec<Candidate>>,
}

impl Problem {
    pub(super) fn of(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            // RFC 9457, section 4.2.1: the title is the status's own phrase.
            kind: "about:blank",
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail: detail.into(),
            reason: None,
            path: None,
            retry_after_ms: None,
            candidates: None,
        }
    }
}

impl From<FieldError> for Problem {
    fn from(error: FieldError) -> Self {
        Self { path: Some(error.path), ..Self::of(StatusCode::BAD_REQUEST, error.problem) }
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        match failure {
            Failure::Unauthenticated(_) => Self::of(StatusCode::UNAUTHORIZED, text),
            Failure::Forbidden(_) => Self::of(StatusCode::FORBIDDEN, text),
            Failure::Invalid(error) => error.into(),
            Failure::NotFound(_) => Self::of(StatusCode::NOT_FOUND, text),
            Failure::Conflict(_) => Self::of(StatusCode::CONFLICT, text),
            Failure::Unavailable(_) => {
                Self { retry_after_ms: Some(1000), ..Self::of(StatusCode::SERVICE_UNAVAILABLE, text) }
            }
            Failure::Refused(refusal, reason) => {
                let status = match reason {
                    Reason::TenantLimit | Reason::KeyLimit => StatusCode::TOO_MANY_REQUESTS,
                    _ if refusal.retry_after_ms > 0 => StatusCode::SERVICE_UNAVAILABLE,
                    _ => StatusCode::UNPROCESSABLE_ENTITY,
                };
                let candidates = refusal.candidates.into_iter().map(Candidate::from);
                Self {
                    reason: Some(reason.label()),
                    retry_after_ms: (refusal.retry_after_ms > 0).then_some(refusal.retry_after_ms),
                    candidates: Some(candidates.collect()),
                    ..Self::of(status, refusal.detail)
                }
            }
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_string(&self).expect("strings and numbers have a JSON form");
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        let kind = HeaderValue::from_static("application/problem+json");
        headers.insert(CONTENT_TYPE, kind);
        if status == StatusCode::UNAUTHORIZED {
            // RFC 6750, section 3.
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(ms) = self.retry_after_ms {
            // RFC 9110, section 10.2.3: whole seconds.
            headers.insert(RETRY_AFTER, ms.div_ceil(1000).into());
        }
        response
    }
}
