//! The fleet's own issuer and the identities that processes present to each other.
//!
//! Every certificate carries two DNS names: `NAME.ROLE.REGION.antiphon.internal`, which is the process's own, and
//! `ROLE.REGION.antiphon.internal`, which its siblings share. Processes that are made from one template may hold one
//! certificate together: it covers NAME and `NAME-…`. A worker's also names the agent that it may serve, as
//! `AGENT.NAMESPACE.agents.worker.antiphon.internal`. The issuer's key is derived from the fleet root, and so
//! is its certificate, byte for byte, so that every region that holds the root has the same trust anchor.

use std::{
    fmt, fs, io,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    str::FromStr,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ED25519, SanType, SerialNumber,
};
use rustls_pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};

pub use crate::identity::Identity;
use crate::private_file::SecretError;

/// What a process is; decides what it may ask of whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Session router.
    Router,
    /// Packet relay.
    Relay,
    /// Session worker.
    Worker,
    /// The operator, or a person's command line acting as one.
    Operator,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 4] = [Self::Router, Self::Relay, Self::Worker, Self::Operator];

    /// The label in certificates and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Relay => "relay",
            Self::Worker => "worker",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// Who a certificate names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerName {
    /// Process name, a DNS label.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Region name, a DNS label.
    pub region: String,
}

/// Why an identity cannot be made, read or recognised.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A name that is no DNS label (1..=63 of `a-z`, `0-9`, `-`, not at the ends).
    #[error("{0:?} is not a DNS label: use 1 to 63 of a-z, 0-9 and '-'")]
    BadLabel(String),
    /// The certificate does not name a process of the fleet.
    #[error("certificate names no process of the fleet: expected NAME.ROLE.REGION.{DOMAIN}")]
    NotOurs,
    /// A file of the identity cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A private key that others can read.
    #[error(transparent)]
    Exposed(SecretError),
    /// A part of an identity is not the PEM that it should be.
    #[error("not a valid PEM {0}")]
    Pem(&'static str),
    /// Key and certificate are not a pair, or the trust anchor did not issue the certificate, or it is not valid now.
    #[error("certificate of {peer}: {source}")]
    Unfit {
        /// Whom the certificate names.
        peer: PeerName,
        /// What the library said.
        source: rustls::Error,
    },
    /// An identity is renewed for the same process and by the same fleet only.
    #[error("{0}; restart the process to give it another identity")]
    Changed(String),
    /// What is wrong with the files of a directory.
    #[error("{dir}: {source}")]
    Directory {
        /// Which one.
        dir: PathBuf,
        /// What is wrong.
        source: Box<Self>,
    },
    /// Issuing failed.
    #[error("issuing a certificate: {0}")]
    Issue(#[from] rcgen::Error),
}

impl From<SecretError> for PkiError {
    fn from(error: SecretError) -> Self {
        match error {
            SecretError::File { path, source } => Self::File { path, source },
            SecretError::Exposed { .. } => Self::Exposed(error),
        }
    }
}

impl PeerName {
    /// Checks the labels.
    ///
    /// # Errors
    /// [`PkiError::BadLabel`].
    pub fn new(name: &str, role: Role, region: &str) -> Result<Self, PkiError> {
        for label in [name, region] {
            let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let edge = label.starts_with('-') || label.ends_with('-');
            if label.is_empty() || label.len() > 63 || edge || !label.chars().all(legal) {
                return Err(PkiError::BadLabel(label.chars().take(80).collect()));
            }
        }
        Ok(Self { name: name.to_owned(), role, region: region.to_owned() })
    }

    /// Whether who holds this certificate may go by a name: the certificate's, or that with a dash and more behind it.
    #[must_use]
    pub fn covers(&self, name: &str) -> bool {
        let rest = name.strip_prefix(&self.name);
        let legal = Self::new(name, self.role, &self.region).is_ok();
        legal && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }

    /// The name in its certificate.
    #[must_use]
    pub fn dns(&self) -> String {
        format!("{}.{}", self.name, shared_dns(self.role, &self.region))
    }

    /// Reads the name from a verified certificate (DER).
    ///
    /// # Errors
    /// [`PkiError::NotOurs`].
    pub fn of_certificate(der: &[u8]) -> Result<Self, PkiError> {
        dns_names(der)?.iter().find_map(|dns| dns.parse().ok()).ok_or(PkiError::NotOurs)
    }
}

/// The agents, `namespace/name`, that the holder of a verified certificate (DER) may serve.
///
/// # Errors
/// [`PkiError::NotOurs`].
pub fn agents_of_certificate(der: &[u8]) -> Result<Vec<String>, PkiError> {
    let agent = |dns: &String| {
        let (name, namespace) = dns.strip_suffix(AGENTS)?.strip_suffix('.')?.split_once('.')?;
        let legal = |label: &str| PeerName::new(label, Role::Worker, label).is_ok();
        (legal(name) && legal(namespace)).then(|| format!("{namespace}/{name}"))
    };
    Ok(dns_names(der)?.iter().filter_map(agent).collect())
}

fn dns_names(der: &[u8]) -> Result<Vec<String>, PkiError> {
    use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| PkiError::NotOurs)?;
    let names = certificate.subject_alternative_name().map_err(|_| PkiError::NotOurs)?.ok_or(PkiError::NotOurs)?;
    let dns = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(dns) => Some((*dns).to_owned()),
        _ => None,
    };
    Ok(names.value.general_names.iter().filter_map(dns).collect())
}

/// The DNS names of a process's certificate, its own first; `agent`, `namespace/name`, is what a worker serves.
///
/// Whoever issues certificates in our place (cert-manager) needs them, and the addresses, if any.
///
/// # Errors
/// [`PkiError::BadLabel`] of the agent.
pub fn dns_names_of(peer: &PeerName, agent: Option<&str>) -> Result<Vec<String>, PkiError> {
    let mut names = vec![peer.dns(), shared_dns(peer.role, &peer.region)];
    if let Some(agent) = agent {
        let (namespace, name) = agent.split_once('/').ok_or_else(|| PkiError::BadLabel(agent.to_owned()))?;
        for label in [namespace, name] {
            PeerName::new(label, Role::Worker, label)?;
        }
        names.push(format!("{name}.{namespace}.{AGENTS}"));
    }
    Ok(names)
}

impl FromStr for PeerName {
    type Err = PkiError;

    fn from_str(dns: &str) -> Result<Self, PkiError> {
        let labels = dns.strip_suffix(DOMAIN).and_then(|s| s.strip_suffix('.')).ok_or(PkiError::NotOurs)?;
        let mut parts = labels.split('.');
        let (Some(name), Some(role), Some(region), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(PkiError::NotOurs);
        };
        let role = Role::ALL.into_iter().find(|r| r.label() == role).ok_or(PkiError::NotOurs)?;
        Self::new(name, role, region)
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of {}", self.role, self.name, self.region)
    }
}

/// The name that all processes of a role in a region share.
#[must_use]
pub fn shared_dns(role: Role, region: &str) -> String {
    format!("{role}.{region}.{DOMAIN}")
}

/// The fleet's certificate authority.
pub struct FleetCa {
    certificate_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for FleetCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetCa").finish_non_exhaustive()
    }
}

impl FleetCa {
    /// Makes the authority from its 32-byte Ed25519 seed; the same seed gives the same certificate.
    ///
    /// # Errors
    /// The seed is refused by the key library.
    pub fn from_seed(seed: &[u8; 32]) -> Result<Self, PkiError> {
        let mut pkcs8 = PKCS8_ED25519_PREFIX.to_vec();
        pkcs8.extend_from_slice(seed);
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(pkcs8), &PKCS_ED25519)?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "Antiphon fleet");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(SerialNumber::from(1_u64));
        params.not_before = rcgen::date_time_ymd(2024, 1, 1);
        params.not_after = rcgen::date_time_ymd(2124, 1, 1);
        let certificate_pem = params.self_signed(&key)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Self { certificate_pem, key_pem, issuer: Issuer::new(params, key) })
    }

    /// The authority from its key alone, PEM (PKCS #8, Ed25519): whoever has only that needs no fleet root.
    ///
    /// # Errors
    /// It is no Ed25519 key in PKCS #8.
    pub fn from_key_pem(key_pem: &str) -> Result<Self, PkiError> {
        let key = PrivatePkcs8KeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| PkiError::Pem("issuer's key"))?;
        let seed = key.secret_pkcs8_der().strip_prefix(&PKCS8_ED25519_PREFIX);
        let seed = seed.and_then(|seed| seed.first_chunk()).ok_or(PkiError::Pem("Ed25519 key"))?;
        Self::from_seed(seed)
    }

    /// The authority's own key, PEM (PKCS #8). Whoever holds it can make himself any process of the fleet.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The trust anchor, PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Issues an identity with a fresh key, valid from an hour before `now` for [`LEAF_LIFETIME`].
    ///
    /// # Errors
    /// The key library refuses.
    pub fn issue(&self, peer: &PeerName, addresses: &[IpAddr], now: SystemTime) -> Result<Identity, PkiError> {
        self.issue_for(peer, None, addresses, now)
    }

    /// The same for a worker, with the agent, `namespace/name`, that it may serve.
    ///
    /// # Errors
    /// The agent has a bad name, or the key library refuses.
    pub fn issue_for(
        &self,
        peer: &PeerName,
        agent: Option<&str>,
        addresses: &[IpAddr],
        now: SystemTime,
    ) -> Result<Identity, PkiError> {
        let mut params = CertificateParams::new(dns_names_of(peer, agent)?)?;
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, peer.to_string());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = (now - CLOCK_SLACK).into();
        params.not_after = (now + LEAF_LIFETIME).into();
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Identity::issued(certificate.pem(), key.serialize_pem(), self.certificate_pem.clone(), now)
    }
}

/// Writes a file that only its owner can read, replacing what was there.
///
/// # Errors
/// The file system refuses.
pub fn write_secret(path: &Path, bytes: &[u8]) -> Result<(), PkiError> {
    use io::Write as _;
    let wrap = |source| PkiError::File { path: path.to_owned(), source };
    // Removed first: an existing file would keep its looser mode.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(wrap(e)),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(wrap)?;
    file.write_all(bytes).map_err(wrap)
}

/// Suffix of every name in the fleet.
pub const DOMAIN: &str = "antiphon.internal";
/// Behind the name and the namespace of an agent that a worker may serve.
const AGENTS: &str = "agents.worker.antiphon.internal";
/// How long an issued certificate is valid.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
const CLOCK_SLACK: Duration = Duration::from_secs(3600);
/// PKCS #8 v1 around a bare Ed25519 seed (RFC 8410, section 7).
const PKCS8_ED25519_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_trust_anchor() {
        let (a, b) = (FleetCa::from_seed(&[7; 32]).unwrap(), FleetCa::from_seed(&[7; 32]).unwrap());
        assert_eq!(a.certificate_pem(), b.certificate_pem());
        assert_ne!(a.certificate_pem(), FleetCa::from_seed(&[8; 32]).unwrap().certificate_pem());
    }

    #[test]
    fn the_issuer_is_its_key() {
        let ca = FleetCa::from_seed(&[7; 32]).unwrap();
        let again = FleetCa::from_key_pem(ca.key_pem()).unwrap();
        assert_eq!(again.certificate_pem(), ca.certificate_pem());
        let leaf = ca.issue(&PeerName::new("r", Role::Relay, "r").unwrap(), &[], SystemTime::now()).unwrap();
        assert!(FleetCa::from_key_pem(&leaf.certificate_pem()).is_err());
        assert!(FleetCa::from_key_pem("no").is_err());
    }

    #[test]
    fn a_certificate_covers_its_name_and_what_a_dash_adds() {
        let peer = PeerName::new("desk-1a2b", Role::Worker, "north").unwrap();
        for (name, covered) in [
            ("desk-1a2b", true),
            ("desk-1a2b-55d9f-x7x2k", true),
            ("desk-1a2b-", false),
            ("desk-1a2bc", false),
            ("desk-1a2", false),
            ("desk", false),
            ("other-desk-1a2b", false),
            ("desk-1a2b-X", false),
            ("", false),
        ] {
            assert_eq!(peer.covers(name), covered, "{name}");
        }
    }

    #[test]
    fn a_workers_certificate_names_its_agent_and_no_other_process() {
        let ca = FleetCa::from_seed(&[7; 32]).unwrap();
        let peer = PeerName::new("desk", Role::Worker, "north").unwrap();
        // A namespace that is called like a role makes nobody a process of that role.
        for agent in ["shop/desk", "router/north", "worker/north"] {
            let identity = ca.issue_for(&peer, Some(agent), &[], SystemTime::now()).unwrap();
            assert_eq!(agents_of_certificate(&identity.certificate()).unwrap(), [agent]);
            assert_eq!(PeerName::of_certificate(&identity.certificate()).unwrap(), peer);
            let names = dns_names(&identity.certificate()).unwrap();
            assert_eq!(names.iter().filter(|n| n.parse::<PeerName>().is_ok()).count(), 1, "{names:?}");
        }
        let none = ca.issue(&peer, &[], SystemTime::now()).unwrap();
        assert!(agents_of_certificate(&none.certificate()).unwrap().is_empty());
        for bad in ["shop", "shop/", "/desk", "shop/desk/x", "shop/desk.evil", "Shop/desk"] {
            assert!(ca.issue_for(&peer, Some(bad), &[], SystemTime::now()).is_err(), "{bad}");
        }
    }

    #[test]
    fn strangers_names_are_refused() {
        for bad in
            ["x.example.com", "a.b.worker.r.antiphon.internal", "a.boss.r.antiphon.internal", "antiphon.internal"]
        {
            assert!(bad.parse::<PeerName>().is_err(), "{bad}");
        }
        assert!(PeerName::new("Über", Role::Relay, "r").is_err());
    }
}
