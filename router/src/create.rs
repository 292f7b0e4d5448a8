//! A request for a session, checked. HTTP and gRPC both end here.

use std::time::Duration;

use antiphon_core::{
    geo::Location,
    id::{Epoch, SessionId},
};
use antiphon_proto::{ticket::codec_label, v1};

use crate::{
    admission::MAX_LISTED,
    field::{self, FieldError},
    records,
};

/// What an application asks for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Create {
    pub(crate) agent: String,
    pub(crate) location: Option<Location>,
    pub(crate) client_key: [u8; 32],
    pub(crate) regions: Vec<String>,
    pub(crate) residency: Vec<String>,
    pub(crate) max_rtt: Option<Duration>,
    pub(crate) codec: v1::Codec,
    pub(crate) session: SessionId,
    pub(crate) epoch: Epoch,
    pub(crate) waited: Duration,
}

impl Create {
    /// Checks every field; `fresh` names the session if the request does not.
    pub(crate) fn check(request: &v1::CreateSessionRequest, fresh: SessionId) -> Result<Self, FieldError> {
        let constraints = request.constraints.clone().unwrap_or_default();
        let location = records::location(request.location.as_ref())?;
        if constraints.max_rtt_ms > 0 && location.is_none() {
            return Err(FieldError::new(
                "constraints.maxRttMs",
                "needs location: without it no round trip can be estimated",
            ));
        }
        let lists = [("constraints.regions", &constraints.regions), ("constraints.residency", &constraints.residency)];
        for (path, names) in lists {
            if names.len() > MAX_NAMES {
                let problem = format!("has {} names, at most {MAX_NAMES}", names.len());
                return Err(FieldError::new(path, problem));
            }
            for (index, name) in names.iter().enumerate() {
                field::label(&format!("{path}[{index}]"), name)?;
            }
        }
        let session = match request.session.len() {
            0 => fresh,
            _ => session_bytes(&request.session)?,
        };
        let codec = match v1::Codec::try_from(request.codec) {
            Ok(v1::Codec::Unspecified) => v1::Codec::Opus,
            Ok(codec) => codec,
            Err(_) => return Err(FieldError::new("codec", "is no codec")),
        };
        Ok(Self {
            agent: field::agent("agent", &request.agent)?,
            location,
            client_key: client_key(&request.client_key)?,
            regions: constraints.regions,
            residency: constraints.residency,
            max_rtt: (constraints.max_rtt_ms > 0).then(|| Duration::from_millis(constraints.max_rtt_ms.into())),
            codec,
            session,
            epoch: Epoch::new(request.epoch.max(1)).map_err(|e| FieldError::new("epoch", e.to_string()))?,
            waited: Duration::from_millis(request.waited_ms.into()),
        })
    }

    /// As another router needs it: the session is named, so that a retry is the same request there too.
    pub(crate) fn to_proto(&self) -> v1::CreateSessionRequest {
        let millis = |d: Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX);
        v1::CreateSessionRequest {
            agent: self.agent.clone(),
            location: self.location.map(|l| v1::Location { latitude: l.latitude(), longitude: l.longitude() }),
            client_key: self.client_key.to_vec().into(),
            constraints: Some(v1::Constraints {
                regions: self.regions.clone(),
                residency: self.residency.clone(),
                max_rtt_ms: self.max_rtt.map_or(0, millis),
            }),
            codec: self.codec.into(),
            session: self.session.as_bytes().to_vec().into(),
            epoch: self.epoch.value(),
            waited_ms: millis(self.waited),
        }
    }

    /// The codec's name.
    pub(crate) fn codec_label(&self) -> &'static str {
        codec_label(self.codec).expect("checked to be a codec")
    }
}

fn client_key(bytes: &[u8]) -> Result<[u8; 32], FieldError> {
    let found = bytes.len();
    let key: [u8; 32] = bytes.try_into().map_err(|_| {
        let problem = format!("has {found} bytes: expected an Ed25519 public key of 32 bytes");
        FieldError::new("clientKey", problem)
    })?;
    // A buffer that nobody filled. Other weak keys harm only who chose them.
    if key == [0; 32] {
        return Err(FieldError::new("clientKey", "is all zeros: expected an Ed25519 public key"));
    }
    Ok(key)
}

pub(crate) fn session_bytes(bytes: &[u8]) -> Result<SessionId, FieldError> {
    let found = bytes.len();
    let bytes = bytes
        .try_into()
        .map_err(|_| FieldError::new("session", format!("has {found} bytes: expected 16 random ones")))?;
    Ok(SessionId::from_bytes(bytes))
}

/// A session's name in a path or message.
pub(crate) fn session_id(text: &str) -> Result<SessionId, FieldError> {
    text.parse().map_err(|e: antiphon_core::id::IdError| FieldError::new("session", e.to_string()))
}

/// How many sessions to list; 0 is the default.
pub(crate) fn limit(limit: u32) -> Result<usize, FieldError> {
    match usize::try_from(limit) {
        Ok(0) => Ok(DEFAULT_LISTED),
        Ok(limit) if limit <= MAX_LISTED => Ok(limit),
        _ => {
            let problem = format!("{limit} is out of range 0..={MAX_LISTED}");
            Err(FieldError::new("limit", problem))
        }
    }
}

/// Regions or zones in one request.
const MAX_NAMES: usize = 64;
const DEFAULT_LISTED: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::CreateSessionRequest {
        v1::CreateSessionRequest {
            agent: "shop/desk".into(),
            client_key: vec![7; 32].into(),
            ..v1::CreateSessionRequest::default()
        }
    }

    #[test]
    fn a_short_request_gets_the_documented_defaults() {
        let fresh = SessionId::from_bytes([5; 16]);
        let create = Create::check(&request(), fresh).unwrap();
        assert_eq!((create.codec, create.epoch), (v1::Codec::Opus, Epoch::FIRST));
        assert_eq!(create.session, fresh);
        assert_eq!(Create::check(&create.to_proto(), SessionId::from_bytes([6; 16])), Ok(create));
    }

    #[test]
    fn impossible_values_name_their_field() {
        type Change = fn(&mut v1::CreateSessionRequest);
        let table: [(&str, Change); 10] = [
            ("agent", |r| r.agent = "desk".into()),
            ("clientKey", |r| r.client_key = vec![7; 31].into()),
            ("clientKey", |r| r.client_key = vec![0; 32].into()),
            ("session", |r| r.session = vec![0; 15].into()),
            ("codec", |r| r.codec = 99),
            ("location.latitude", |r| r.location = Some(v1::Location { latitude: f64::NAN, longitude: 0.0 })),
            ("location.longitude", |r| r.location = Some(v1::Location { latitude: 0.0, longitude: 181.0 })),
            ("constraints.maxRttMs", |r| {
                r.constraints = Some(v1::Constraints { max_rtt_ms: 50, ..v1::Constraints::default() })
            }),
            ("constraints.regions[1]", |r| {
                r.constraints =
                    Some(v1::Constraints { regions: vec!["ok".into(), "No".into()], ..v1::Constraints::default() })
            }),
            ("constraints.residency", |r| {
                r.constraints = Some(v1::Constraints { residency: vec!["eu".into(); 65], ..v1::Constraints::default() })
            }),
        ];
        for (path, change) in table {
            let mut bad = request();
            change(&mut bad);
            let error = Create::check(&bad, SessionId::from_bytes([5; 16])).unwrap_err();
            assert_eq!(error.path, path);
        }
    }
}
