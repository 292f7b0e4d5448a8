//! Who the operator is to routers, and how it makes certificates for others.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use antiphon_runtime::{
    Tasks,
    pki::{FleetCa, Identity, LEAF_LIFETIME, PeerName, PkiError, Role},
};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;

/// The operator's own identity and, unless cert-manager has it, the fleet's issuer.
#[derive(Debug)]
pub struct Credentials {
    peer: PeerName,
    /// Directory of the issuer's Secret. It is read when a certificate is made: it may be replaced meanwhile.
    issuer: Option<PathBuf>,
    identity: Mutex<Option<Identity>>,
}

impl Credentials {
    /// With the issuer whose Secret is mounted at `dir`; the operator's own identity comes from it too.
    ///
    /// # Errors
    /// `cluster` is no DNS label, or the issuer is not there or is none.
    pub fn of_issuer(dir: &Path, cluster: &str) -> Result<Self, PkiError> {
        let peer = PeerName::new(NAME, Role::Operator, cluster)?;
        let credentials = Self { peer, issuer: Some(dir.to_owned()), identity: Mutex::default() };
        credentials.identity()?;
        Ok(credentials)
    }

    /// With an identity that somebody else made and renews.
    ///
    /// # Errors
    /// It is not there or not valid.
    pub fn of_identity(dir: &Path, tasks: &Tasks, registry: &mut Registry) -> Result<Self, PkiError> {
        let identity = Identity::load(dir)?;
        identity.follow(tasks, registry);
        Ok(Self { peer: identity.peer().clone(), issuer: None, identity: Mutex::new(Some(identity)) })
    }

    /// Who the operator is now. One that it made itself is made anew in good time.
    ///
    /// # Errors
    /// The issuer is not there or is none.
    pub fn identity(&self) -> Result<Identity, PkiError> {
        let mut held = self.identity.lock();
        let now = SystemTime::now();
        match &*held {
            Some(identity) if self.issuer.is_none() || now < renewal(identity.not_after()) => Ok(identity.clone()),
            _ => {
                let identity = self.issuer()?.issue(&self.peer, &[], now)?;
                *held = Some(identity.clone());
                Ok(identity)
            }
        }
    }

    /// The fleet's issuer.
    ///
    /// # Errors
    /// It is not there or is none.
    pub fn issuer(&self) -> Result<FleetCa, PkiError> {
        let dir = self.issuer.as_deref().unwrap_or(Path::new(""));
        let path = dir.join(crate::trim::KEY);
        let key = std::fs::read_to_string(&path).map_err(|source| PkiError::File { path, source })?;
        FleetCa::from_key_pem(&key)
    }
}

/// When a certificate that is valid until `not_after` is due to be made anew: with a third of its life left.
#[must_use]
pub fn renewal(not_after: SystemTime) -> SystemTime {
    not_after - LEAF_LIFETIME / 3
}

/// How long from `now` until then; at least a moment.
#[must_use]
pub fn until(then: SystemTime, now: SystemTime) -> Duration {
    then.duration_since(now).unwrap_or_default().max(Duration::from_secs(1))
}

const NAME: &str = "operator";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operators_identity_comes_from_the_issuer_and_stays_until_it_is_due() {
        let dir = tempfile::tempdir().unwrap();
        let ca = FleetCa::from_seed(&[3; 32]).unwrap();
        assert!(Credentials::of_issuer(dir.path(), "c1").is_err(), "there is no issuer");
        std::fs::write(dir.path().join("tls.key"), ca.key_pem()).unwrap();
        let credentials = Credentials::of_issuer(dir.path(), "c1").unwrap();
        let identity = credentials.identity().unwrap();
        assert_eq!(identity.peer().to_string(), "operator operator of c1");
        assert_eq!(identity.ca_pem(), ca.certificate_pem());
        assert_eq!(credentials.identity().unwrap().certificate_pem(), identity.certificate_pem());
        assert!(Credentials::of_issuer(dir.path(), "Not A Label").is_err());
    }
}
