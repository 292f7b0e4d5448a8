//! Tickets from a router.

use std::{sync::Arc, time::SystemTime};

use antiphon_core::id::{Epoch, SessionId};
use antiphon_proto::{
    refusal,
    v1::{
        Codec, Constraints, CreateSessionRequest, DeleteSessionRequest, ExplainPathRequest, ExplainSessionRequest,
        Explanation, ListSessionsRequest, Location, Refusal, Session, SessionPath, SessionSummary,
        sessions_client::SessionsClient,
    },
};
use antiphon_runtime::tls::{self, TlsError};
use parking_lot::Mutex;
use tonic::{
    Code, Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

use crate::clock::ClockSkew;

/// Why a router did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// The address or the trust anchor is unusable.
    #[error(transparent)]
    Address(#[from] TlsError),
    /// The API key has characters that no key has.
    #[error("the API key has characters that no key has")]
    KeyForm,
    /// The router placed the session nowhere and says why.
    #[error("refused: {}", describe(.0))]
    Refused(Box<Refusal>),
    /// The router knows no such session.
    #[error("not found: {0}")]
    NotFound(String),
    /// The API key is unknown, or may not do this.
    #[error("not allowed: {0}")]
    NotAllowed(String),
    /// The request is impossible.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// The router cannot be reached or failed.
    #[error("router {address}: {message}")]
    Unavailable {
        /// Which router.
        address: String,
        /// What happened.
        message: String,
    },
}

fn describe(refusal: &Refusal) -> String {
    let waiting = match refusal.retry_after_ms {
        0 => String::new(),
        ms => format!(" (trying again in {:.1} s may help)", f64::from(ms) / 1000.0),
    };
    format!("{}{waiting}", refusal.detail)
}

/// What to ask a session for.
#[derive(Debug, Clone)]
pub struct SessionRequest {
    /// `namespace/name`.
    pub agent: String,
    /// Latitude and longitude of the caller in degrees, if known.
    pub location: Option<(f64, f64)>,
    /// The client's public key, see [`crate::ClientKey::public`].
    pub client_key: [u8; 32],
    /// Audio codec.
    pub codec: Codec,
    /// Only these regions; empty: any.
    pub regions: Vec<String>,
    /// Hard ceiling on the estimated round trip in milliseconds; 0: the agent's policy.
    pub max_rtt_ms: u32,
    /// Chosen by the caller, so that a retry is the same request.
    pub session: SessionId,
    /// The first unless the session is being moved.
    pub epoch: Epoch,
}

/// Live sessions of one tenant.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Listing {
    /// Newest first.
    pub sessions: Vec<SessionSummary>,
    /// Workers and regions that did not answer in time: their sessions are not listed.
    pub missing: Vec<String>,
}

impl Listing {
    /// Whether everybody answered and nobody has a session.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty() && self.missing.is_empty()
    }
}

/// One router's public API over gRPC. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Router {
    address: String,
    key: MetadataValue<Ascii>,
    client: SessionsClient<Channel>,
    clock: Arc<Mutex<Option<ClockSkew>>>,
}

impl Router {
    /// Prepares a connection; it is made with the first request.
    ///
    /// `server_name` is the name in the router's certificate, `ca_pem` the fleet's trust anchor.
    ///
    /// # Errors
    /// [`RouterError::Address`], [`RouterError::KeyForm`].
    pub fn new(address: &str, ca_pem: &str, server_name: &str, api_key: &str) -> Result<Self, RouterError> {
        let channel = tls::public_channel(address, ca_pem, server_name)?;
        let mut key: MetadataValue<Ascii> =
            format!("Bearer {}", api_key.trim()).parse().map_err(|_| RouterError::KeyForm)?;
        key.set_sensitive(true);
        Ok(Self { address: address.to_owned(), key, client: SessionsClient::new(channel), clock: Arc::default() })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.key.clone());
        request
    }

    /// How far this machine's clock is from the router's, by its last answer. Clones know the same.
    #[must_use]
    pub fn clock_skew(&self) -> Option<ClockSkew> {
        *self.clock.lock()
    }

    async fn answer<T>(&self, asked: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, RouterError> {
        let sent = SystemTime::now();
        let answer = asked.await;
        let metadata = match &answer {
            Ok(response) => response.metadata(),
            Err(status) => status.metadata(),
        };
        if let Some(clock) = ClockSkew::of(metadata, sent, SystemTime::now()) {
            *self.clock.lock() = Some(clock);
        }
        answer.map(Response::into_inner).map_err(|status| self.error(&status))
    }

    fn error(&self, status: &Status) -> RouterError {
        if let Some(refusal) = refusal::of_status(status) {
            return RouterError::Refused(Box::new(refusal));
        }
        let message = status.message().to_owned();
        match status.code() {
            Code::NotFound => RouterError::NotFound(message),
            Code::Unauthenticated | Code::PermissionDenied => RouterError::NotAllowed(message),
            Code::InvalidArgument => RouterError::Invalid(message),
            _ => RouterError::Unavailable { address: self.address.clone(), message: explain(status) },
        }
    }

    /// Places and reserves a session.
    ///
    /// # Errors
    /// [`RouterError::Refused`] with every candidate's reason, or another [`RouterError`].
    pub async fn create(&self, wanted: &SessionRequest) -> Result<Session, RouterError> {
        let message = CreateSessionRequest {
            agent: wanted.agent.clone(),
            location: wanted.location.map(|(latitude, longitude)| Location { latitude, longitude }),
            client_key: wanted.client_key.to_vec().into(),
            constraints: Some(Constraints {
                regions: wanted.regions.clone(),
                residency: Vec::new(),
                max_rtt_ms: wanted.max_rtt_ms,
            }),
            codec: wanted.codec.into(),
            session: wanted.session.as_bytes().to_vec().into(),
            epoch: wanted.epoch.value(),
            waited_ms: 0,
        };
        self.answer(self.client.clone().create_session(self.request(message))).await
    }

    /// Why a session is where it is.
    ///
    /// # Errors
    /// [`RouterError`].
    pub async fn explain(&self, session: &str) -> Result<Explanation, RouterError> {
        let message = ExplainSessionRequest { session: session.to_owned() };
        self.answer(self.client.clone().explain_session(self.request(message))).await
    }

    /// Which way a live session's packets went, how well, and why that changed.
    ///
    /// # Errors
    /// [`RouterError::NotFound`] if it is not live, or another [`RouterError`].
    pub async fn path(&self, session: &str) -> Result<SessionPath, RouterError> {
        let message = ExplainPathRequest { session: session.to_owned() };
        self.answer(self.client.clone().explain_path(self.request(message))).await
    }

    /// Ends a session or gives its reservation back.
    ///
    /// # Errors
    /// [`RouterError`].
    pub async fn delete(&self, session: &str) -> Result<(), RouterError> {
        let message = DeleteSessionRequest { session: session.to_owned() };
        self.answer(self.client.clone().delete_session(self.request(message))).await.map(drop)
    }

    /// The tenant's sessions.
    ///
    /// # Errors
    /// [`RouterError`].
    pub async fn list(&self, limit: u32) -> Result<Listing, RouterError> {
        let request = self.request(ListSessionsRequest { limit, ..ListSessionsRequest::default() });
        let listing = async {
            let answer = self.client.clone().list_sessions(request).await?;
            let missing = answer.metadata().get("antiphon-missing").and_then(|names| names.to_str().ok());
            let missing = missing.into_iter().flat_map(|names| names.split(',')).map(str::to_owned).collect();
            Ok(answer.map(|answer| Listing { sessions: answer.sessions, missing }))
        };
        self.answer(listing).await
    }
}

/// A transport error's own text is "transport error"; what happened is in its sources.
fn explain(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        source = error.source();
    }
    text
}
