//! Who calls: bearer API keys of applications, certificates of the fleet's own processes.

use std::sync::Arc;

use antiphon_proto::api_key::ApiKey;
use antiphon_runtime::{
    pki::{PeerName, Role},
    tls,
};
use http::Extensions;
use subtle::ConstantTimeEq as _;
use tokio::sync::Notify;
use tonic::{Request, Status};

use crate::{records::Key, records::Records, refusals::Failure};

/// The key of an application, verified.
pub(crate) type Caller = Key;

/// A connection's sign that a request came with a valid key; each of its requests carries a clone in its extensions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Proof(Arc<Notify>);

impl Proof {
    /// The next request with a valid key, or one since the last wait.
    pub(crate) async fn given(&self) {
        self.0.notified().await;
    }
}

/// The same as [`caller`]; a valid key keeps the request's connection open.
pub(crate) fn authenticate(
    records: &Records,
    header: Option<&[u8]>,
    extensions: &Extensions,
) -> Result<Caller, Failure> {
    let caller = caller(records, header)?;
    if let Some(Proof(given)) = extensions.get() {
        given.notify_one();
    }
    Ok(caller)
}

/// Finds the key of an `authorization` header.
fn caller(records: &Records, header: Option<&[u8]>) -> Result<Caller, Failure> {
    let header = header.ok_or(Failure::Unauthenticated("no API key: send \"authorization: Bearer ak_…\""))?;
    let text = std::str::from_utf8(header).ok();
    let scheme = text.and_then(|t| t.split_once(' '));
    let token = scheme.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let key = token.and_then(|(_, token)| ApiKey::parse(token.trim()).ok());
    let key = key.ok_or(Failure::Unauthenticated("malformed API key: send \"authorization: Bearer ak_ID_SECRET\""))?;
    let record = records.keys.get(key.id());
    // Compared in constant time, and also for an unknown id: the time tells nothing about which ids exist.
    let expected = record.map_or([0; 32], |r| r.sha256);
    let matches: bool = key.sha256().ct_eq(&expected).into();
    match record {
        Some(record) if matches => Ok(record.clone()),
        _ => Err(Failure::Unauthenticated("unknown or revoked API key")),
    }
}

/// Checks that a process of the fleet has one of the roles and, if given, is of this region.
pub(crate) fn peer<T>(request: &Request<T>, role: Role, region: Option<&str>) -> Result<PeerName, Status> {
    let peer = tls::peer_of(request).map_err(|e| Status::unauthenticated(e.to_string()))?;
    if peer.role == role && region.is_none_or(|region| peer.region == region) {
        return Ok(peer);
    }
    let expected = region.map_or_else(String::new, |region| format!(" of {region}"));
    Err(Status::permission_denied(format!("{peer} may not call this: expected a {role}{expected}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_key_opens() {
        let key = ApiKey::from_random(&[3; ApiKey::RANDOM]);
        let other = ApiKey::from_random(&[4; ApiKey::RANDOM]);
        let record = Key { sha256: key.sha256(), tenant: "acme".into(), agents: vec![], tickets_per_minute: 0 };
        let mut records = Records::default();
        records.keys.insert(key.id().to_owned(), record.clone());
        let ask = |header: &str| caller(&records, Some(header.as_bytes()));
        assert_eq!(ask(&format!("Bearer {}", key.text())), Ok(record.clone()));
        assert_eq!(ask(&format!("bearer  {}", key.text())), Ok(record));
        let forged = format!("Bearer ak_{}_{}", key.id(), &other.text()[16..]);
        let refused = [
            String::new(),
            key.text().to_owned(),
            format!("Basic {}", key.text()),
            format!("Bearer {}", other.text()),
            forged,
            format!("Bearer {}", &key.text()[..40]),
        ];
        for header in refused {
            assert!(matches!(ask(&header), Err(Failure::Unauthenticated(_))), "{header}");
        }
        assert!(caller(&records, None).is_err());
        assert!(caller(&records, Some(&[0xff, 0xfe])).is_err());
    }
}
