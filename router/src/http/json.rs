//! JSON forms: the protocol's messages in camelCase, bytes as base64url without padding, times as RFC 3339.

use std::{fmt, marker::PhantomData};

use antiphon_core::id::SessionId;
use antiphon_proto::{
    ticket::{codec_label, codec_of_label},
    v1,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

use crate::{
    admission,
    create::{Create, session_id},
    field::FieldError,
};

/// Body of `POST /v1/sessions`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct CreateBody {
    agent: String,
    location: Option<Object<LocationBody>>,
    client_key: String,
    constraints: Option<Object<ConstraintsBody>>,
    codec: Option<String>,
    session: Option<String>,
    epoch: Option<u32>,
    waited_ms: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LocationBody {
    latitude: f64,
    longitude: f64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ConstraintsBody {
    regions: Vec<String>,
    residency: Vec<String>,
    max_rtt_ms: u32,
}

/// Takes a JSON object only; derived forms take an array of their fields as well.
#[derive(Debug)]
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

impl CreateBody {
    /// Reads the body; an error names the place in the JSON.
    pub(super) fn parse(body: &[u8]) -> Result<Self, FieldError> {
        let mut json = serde_json::Deserializer::from_slice(body);
        let Object(parsed) = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            // Where the JSON itself is broken the path ends in "?"; a lone "." is the whole.
            let path = error.path().to_string();
            let path = path.trim_end_matches(['?', '.']);
            FieldError::new(path, error.into_inner().to_string())
        })?;
        json.end().map_err(|e| FieldError::new("", e.to_string()))?;
        Ok(parsed)
    }

    pub(super) fn into_proto(self) -> Result<v1::CreateSessionRequest, FieldError> {
        let codec = match &self.codec {
            None => v1::Codec::Unspecified,
            Some(label) => codec_of_label(label).ok_or_else(|| {
                let problem = "is no codec: use \"opus\", \"l16-16k\" or \"l16-24k\"";
                FieldError::new("codec", problem)
            })?,
        };
        let session = self.session.as_deref().map(session_id).transpose()?;
        if self.epoch == Some(0) {
            return Err(FieldError::new("epoch", "starts at 1"));
        }
        let client_key = BASE64
            .decode(&self.client_key)
            .map_err(|_| FieldError::new("clientKey", "is not base64url without padding (RFC 4648, section 5)"))?;
        Ok(v1::CreateSessionRequest {
            agent: self.agent,
            location: self.location.map(|Object(l)| v1::Location { latitude: l.latitude, longitude: l.longitude }),
            client_key: client_key.into(),
            constraints: self.constraints.map(|Object(c)| v1::Constraints {
                regions: c.regions,
                residency: c.residency,
                max_rtt_ms: c.max_rtt_ms,
            }),
            codec: codec.into(),
            session: session.map_or_else(Vec::new, |s| s.as_bytes().to_vec()).into(),
            epoch: self.epoch.unwrap_or(0),
            waited_ms: self.waited_ms.unwrap_or(0),
        })
    }
}

/// Reads and checks a body of `POST /v1/sessions` as the API does before anybody is asked; the agent that it names.
///
/// # Errors
/// Names the field and what is wrong with it.
pub fn check_session_request(body: &[u8]) -> Result<String, FieldError> {
    let request = CreateBody::parse(body)?.into_proto()?;
    Ok(Create::check(&request, SessionId::from_bytes([1; 16]))?.agent)
}

/// Query of `GET /v1/sessions`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    limit: Option<String>,
}

impl ListQuery {
    /// 0 if absent.
    pub(super) fn limit(&self) -> Result<u32, FieldError> {
        let Some(text) = &self.limit else { return Ok(0) };
        text.parse().map_err(|_| FieldError::new("limit", "is not a whole number: leave it out or write 1 to 10000"))
    }
}

/// Answer of `POST /v1/sessions`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Session {
    pub(super) session: String,
    epoch: u32,
    ticket: String,
    initial_connection_ids: Vec<String>,
    relays: Vec<Relay>,
    server_name: String,
    trust_anchor: String,
    expires_at: String,
    codec: &'static str,
    region: String,
    worker: String,
    reason: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Relay {
    number: u32,
    address: String,
    region: String,
    estimated_rtt_ms: u32,
}

impl From<v1::Session> for Session {
    fn from(session: v1::Session) -> Self {
        let relay = |r: v1::RelayAddress| Relay {
            number: r.number,
            address: r.address,
            region: r.region,
            estimated_rtt_ms: r.estimated_rtt_ms,
        };
        let ids = session.initial_connection_ids.iter();
        Self {
            codec: codec_label(session.codec()).unwrap_or("unspecified"),
            session: session.session,
            epoch: session.epoch,
            ticket: session.ticket,
            initial_connection_ids: ids.map(|id| BASE64.encode(id)).collect(),
            relays: session.relays.into_iter().map(relay).collect(),
            server_name: session.server_name,
            trust_anchor: BASE64.encode(&session.trust_anchor),
            expires_at: session.expires_at.unwrap_or_default().to_string(),
            region: session.region,
            worker: session.worker,
            reason: session.reason,
        }
    }
}

/// One line of a refusal or an explanation.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Candidate {
    region: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    worker: String,
    verdict: String,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    estimated_rtt_ms: Option<u32>,
    free: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f64>,
}

impl From<v1::Candidate> for Candidate {
    fn from(c: v1::Candidate) -> Self {
        Self {
            region: c.region,
            worker: c.worker,
            verdict: c.verdict,
            detail: c.detail,
            estimated_rtt_ms: (c.estimated_rtt_ms > 0).then_some(c.estimated_rtt_ms),
            free: c.free,
            score: c.score,
        }
    }
}

/// Answer of `GET /v1/sessions/{session}/explain`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Explanation {
    session: String,
    agent: String,
    region: String,
    worker: String,
    reason: String,
    decided_at: String,
    candidates: Vec<Candidate>,
    attempts: u32,
}

impl From<v1::Explanation> for Explanation {
    fn from(e: v1::Explanation) -> Self {
        Self {
            session: e.session,
            agent: e.agent,
            region: e.region,
            worker: e.worker,
            reason: e.reason,
            decided_at: e.decided_at.unwrap_or_default().to_string(),
            candidates: e.candidates.into_iter().map(Candidate::from).collect(),
            attempts: e.attempts,
        }
    }
}

/// Answer of `GET /v1/sessions`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Listing {
    sessions: Vec<Summary>,
    missing: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    session: String,
    agent: String,
    region: String,
    worker: String,
    state: String,
    epoch: u32,
    since: String,
    turns: u32,
    relay: u32,
    codec: &'static str,
}

impl From<admission::Listing> for Listing {
    fn from(listing: admission::Listing) -> Self {
        let summary = |s: v1::SessionSummary| Summary {
            codec: codec_label(s.codec()).unwrap_or("unspecified"),
            session: s.session,
            agent: s.agent,
            region: s.region,
            worker: s.worker,
            state: s.state,
            epoch: s.epoch,
            since: s.since.unwrap_or_default().to_string(),
            turns: s.turns,
            relay: s.relay,
        };
        Self { sessions: listing.sessions.into_iter().map(summary).collect(), missing: listing.missing }
    }
}
