//! The identities of a fleet's processes: issued when it starts, renewed while it runs.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::SystemTime,
};

use antiphon_runtime::pki::{FleetCa, LEAF_LIFETIME, PeerName, PkiError, Role};

/// Issues into `identities/REGION/NAME` of the fleet's directory; processes take new files up by themselves.
#[derive(Debug)]
pub(super) struct Identities {
    ca: FleetCa,
    dir: PathBuf,
    issued: Vec<Issued>,
}

#[derive(Debug)]
struct Issued {
    peer: PeerName,
    /// That it serves, if it is a worker.
    agent: Option<String>,
    addresses: Vec<IpAddr>,
    dir: PathBuf,
    not_after: SystemTime,
}

impl Identities {
    pub(super) const fn new(ca: FleetCa, dir: PathBuf) -> Self {
        Self { ca, dir, issued: Vec::new() }
    }

    /// The trust anchor, PEM.
    pub(super) fn ca_pem(&self) -> &str {
        self.ca.certificate_pem()
    }

    /// Makes an identity and returns its directory.
    pub(super) fn issue(
        &mut self,
        name: &str,
        role: Role,
        region: &str,
        address: Option<Ipv4Addr>,
    ) -> Result<PathBuf, PkiError> {
        self.issue_for(PeerName::new(name, role, region)?, None, address)
    }

    /// Makes an identity for a worker of an agent, `namespace/name`.
    pub(super) fn issue_worker(
        &mut self,
        name: &str,
        region: &str,
        agent: &str,
        address: Ipv4Addr,
    ) -> Result<PathBuf, PkiError> {
        self.issue_for(PeerName::new(name, Role::Worker, region)?, Some(agent.to_owned()), Some(address))
    }

    fn issue_for(
        &mut self,
        peer: PeerName,
        agent: Option<String>,
        address: Option<Ipv4Addr>,
    ) -> Result<PathBuf, PkiError> {
        let dir = self.dir.join("identities").join(&peer.region).join(&peer.name);
        let addresses = address.into_iter().map(IpAddr::V4).collect();
        let not_after = SystemTime::UNIX_EPOCH;
        let mut issued = Issued { peer, agent, addresses, dir: dir.clone(), not_after };
        issued.renew(&self.ca)?;
        self.issued.push(issued);
        Ok(dir)
    }

    /// Issues anew what has a third of its life left at `now`, or less; says of each how it went.
    pub(super) fn renew(&mut self, now: SystemTime) -> Vec<Result<(), String>> {
        let due = self.issued.iter_mut().filter(|issued| now >= issued.not_after - LEAF_LIFETIME / 3);
        due.map(|issued| issued.renew(&self.ca).map_err(|error| format!("identity of {}: {error}", issued.peer)))
            .collect()
    }
}

impl Issued {
    fn renew(&mut self, ca: &FleetCa) -> Result<(), PkiError> {
        let identity = ca.issue_for(&self.peer, self.agent.as_deref(), &self.addresses, SystemTime::now())?;
        identity.save(Path::new(&self.dir))?;
        self.not_after = identity.not_after();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use antiphon_runtime::pki::Identity;

    use super::*;

    #[test]
    fn identities_are_renewed_at_two_thirds_of_their_life() {
        const DAY: Duration = Duration::from_secs(86_400);
        let dir = tempfile::tempdir().unwrap();
        let mut identities = Identities::new(FleetCa::from_seed(&[3; 32]).unwrap(), dir.path().to_owned());
        let path = identities.issue("relay-0", Role::Relay, "north", Some(Ipv4Addr::LOCALHOST)).unwrap();
        let before = Identity::load(&path).unwrap();
        let now = SystemTime::now();
        assert!(identities.renew(now + 19 * DAY).is_empty());
        assert_eq!(Identity::load(&path).unwrap().certificate(), before.certificate());
        assert_eq!(identities.renew(now + 20 * DAY), [Ok(())]);
        let after = Identity::load(&path).unwrap();
        assert!(after.peer() == before.peer() && after.certificate() != before.certificate());
    }

    #[test]
    fn one_that_cannot_be_written_is_named_and_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut identities = Identities::new(FleetCa::from_seed(&[3; 32]).unwrap(), dir.path().to_owned());
        let path = identities.issue("relay-0", Role::Relay, "north", None).unwrap();
        let due = SystemTime::now() + LEAF_LIFETIME;
        std::fs::remove_dir_all(&path).unwrap();
        std::fs::write(&path, "in the way").unwrap();
        let failed = identities.renew(due).pop().unwrap().unwrap_err();
        assert!(failed.starts_with("identity of relay relay-0 of north: "), "{failed}");
        std::fs::remove_file(&path).unwrap();
        assert!(identities.renew(due)[0].is_ok());
    }
}
