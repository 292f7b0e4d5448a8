//! What comes of a registration, a worker's or a relay's: it is in force, or it is refused.

use antiphon_runtime::tls;

use crate::store::StoreError;

/// A registration in force; names the stream, so that a later one is not undone by an earlier one's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing<N> {
    pub(crate) number: N,
    pub(crate) stream: u64,
}

/// Why a worker or relay cannot register.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegisterError {
    #[error("region {0} has no record yet")]
    NoRegion(String),
    #[error("there is no agent {0}")]
    NoAgent(String),
    #[error("{0} is connected with another incarnation; it can be replaced once that one is gone")]
    Alive(String),
    #[error("{0} has 10000 workers here, as many as an agent may have in a region: report those that are gone")]
    TooMany(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

impl From<RegisterError> for tonic::Status {
    fn from(error: RegisterError) -> Self {
        let text = error.to_string();
        match error {
            RegisterError::NoRegion(_) => Self::unavailable(text),
            RegisterError::NoAgent(_) => Self::failed_precondition(text),
            RegisterError::Alive(_) => Self::already_exists(text),
            RegisterError::TooMany(_) => Self::resource_exhausted(text),
            RegisterError::Store(error) => error.into(),
            RegisterError::Tls(_) => Self::invalid_argument(text),
        }
    }
}
