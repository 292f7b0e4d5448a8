//! What goes wrong in a reconcile, under which label it is counted, and when it is tried again.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelValue;

use crate::fence::Fenced;

/// Why an object could not be reconciled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached.
    #[error("{}", describe(.0))]
    Kube(#[source] kube::Error),
    /// This process may not write any more: its lease has run out.
    #[error(transparent)]
    Fenced(#[from] Fenced),
    /// No router of the region has been found yet.
    #[error("no router of region {0} is running")]
    NoRouter(String),
    /// A router refused or could not be reached.
    #[error("router of region {region}: {}: {}", source.code(), source.message())]
    Router {
        /// Which region.
        region: String,
        /// What it said.
        source: Box<tonic::Status>,
    },
    /// A certificate cannot be issued.
    #[error("certificate: {0}")]
    Identity(#[from] antiphon_runtime::pki::PkiError),
    /// What the object says cannot be carried out; its conditions say so as well.
    #[error("{0}")]
    Spec(String),
    /// An object is not what it has to be.
    #[error("{0}")]
    Object(String),
}

impl From<kube::Error> for Error {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Service(source) => match source.downcast::<Fenced>() {
                Ok(fenced) => Self::Fenced(*fenced),
                Err(source) => Self::Kube(kube::Error::Service(source)),
            },
            error => Self::Kube(error),
        }
    }
}

/// Kinds of error, as metrics tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "these are the labels as Prometheus shows them")]
pub enum Reason {
    /// Somebody else changed the object meanwhile.
    conflict,
    /// Permissions are missing.
    forbidden,
    /// The object or its namespace is gone.
    not_found,
    /// The API server does not accept the object.
    invalid,
    /// The API server asks for patience.
    throttled,
    /// The API server cannot be reached or failed.
    unavailable,
    /// The lease has run out.
    fenced,
    /// A router refused or could not be reached.
    router,
    /// A certificate cannot be issued or read.
    identity,
    /// The resource cannot be carried out as it is.
    spec,
}

impl Error {
    /// What is counted.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Kube(kube::Error::Api(status)) => match status {
                status if status.is_conflict() || status.is_already_exists() => Reason::conflict,
                status if status.is_forbidden() || status.code == 401 => Reason::forbidden,
                status if status.is_not_found() => Reason::not_found,
                status if status.is_invalid() || status.code == 400 => Reason::invalid,
                status if status.code == 429 => Reason::throttled,
                _ => Reason::unavailable,
            },
            Self::Kube(_) => Reason::unavailable,
            Self::Fenced(_) => Reason::fenced,
            Self::NoRouter(_) | Self::Router { .. } => Reason::router,
            Self::Identity(_) | Self::Object(_) => Reason::identity,
            Self::Spec(_) => Reason::spec,
        }
    }

    /// How long to wait before the next attempt, after `failures` of them in a row (1 for the first).
    ///
    /// Doubles up to a minute; half of it is chance (`jitter`, 0..1), so that a thousand objects that failed together
    /// do not come back together. Conflicts are over as soon as the cache has caught up.
    #[must_use]
    pub fn retry_after(&self, failures: u32, jitter: f64) -> Duration {
        let first = match self.reason() {
            Reason::conflict => Duration::from_millis(100),
            Reason::spec | Reason::invalid | Reason::forbidden => Duration::from_secs(5),
            _ => Duration::from_millis(500),
        };
        let full = first.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST);
        full.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
    }

    /// Whether the API server said that the object is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.reason() == Reason::not_found
    }

    /// Whether somebody else was faster.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.reason() == Reason::conflict
    }
}

fn describe(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        error => error.to_string(),
    }
}

const LONGEST: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn api(code: u16, reason: &str) -> Error {
        Status::failure("said the server", reason).with_code(code).boxed().map_api()
    }

    trait MapApi {
        fn map_api(self) -> Error;
    }
    impl MapApi for Box<Status> {
        fn map_api(self) -> Error {
            kube::Error::Api(self).into()
        }
    }

    #[test]
    fn errors_are_counted_by_what_can_be_done_about_them() {
        for (code, reason, expected) in [
            (409, "Conflict", Reason::conflict),
            (409, "AlreadyExists", Reason::conflict),
            (403, "Forbidden", Reason::forbidden),
            (404, "NotFound", Reason::not_found),
            (422, "Invalid", Reason::invalid),
            (429, "TooManyRequests", Reason::throttled),
            (500, "InternalError", Reason::unavailable),
        ] {
            assert_eq!(api(code, reason).reason(), expected, "{reason}");
        }
        assert_eq!(api(403, "Forbidden").to_string(), "said the server");
        let fenced: Error = kube::Error::Service(Box::new(Fenced)).into();
        assert_eq!(fenced.reason(), Reason::fenced);
    }

    #[test]
    fn retries_become_rarer_and_never_stop() {
        let error = api(500, "InternalError");
        let waits: Vec<_> = (1..=40).map(|failures| error.retry_after(failures, 1.0)).collect();
        assert!(waits.is_sorted() && waits[0] == Duration::from_millis(500) && waits[39] == LONGEST, "{waits:?}");
        assert_eq!(error.retry_after(1, 0.0), Duration::from_millis(250));
        assert!(api(409, "Conflict").retry_after(1, 1.0) < error.retry_after(1, 0.0));
    }
}
