//! A cluster's certificates.

use std::{
    fs,
    io::Write as _,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;

/// Certificate and key, PEM.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// Whom a certificate names, for Kubernetes: a user with a group, and a server with addresses.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subject<'a> {
    pub(crate) user: &'a str,
    pub(crate) group: Option<&'a str>,
    pub(crate) hosts: &'a [&'a str],
    pub(crate) addresses: &'a [IpAddr],
}

/// Issues certificates, with a key that is made for it.
pub(crate) struct Authority {
    pub(crate) pair: Pair,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = params(&Subject { user: name, ..Subject::default() })?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pair = Pair { certificate: params.self_signed(&key)?.pem(), key: key.serialize_pem() };
        Ok(Self { pair, issuer: Issuer::new(params, key) })
    }

    pub(crate) fn issue(&self, subject: &Subject<'_>) -> Result<Pair> {
        let mut params = params(subject)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        Ok(Pair { certificate: params.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() })
    }

    /// What lets the holder of `pair` in at `server`.
    pub(crate) fn kubeconfig(&self, server: &str, pair: &Pair) -> String {
        let base64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let (authority, certificate, key) =
            (base64(&self.pair.certificate), base64(&pair.certificate), base64(&pair.key));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "c", "cluster": { "server": server, "certificate-authority-data": authority } }],
            "users": [{ "name": "u", "user": { "client-certificate-data": certificate, "client-key-data": key } }],
            "contexts": [{ "name": "antiphon", "context": { "cluster": "c", "user": "u" } }],
            "current-context": "antiphon",
        });
        config.to_string()
    }
}

impl Pair {
    /// A key and its public half, as service accounts' tokens take it.
    pub(crate) fn bare() -> Result<Self> {
        let key = KeyPair::generate()?;
        Ok(Self { certificate: key.public_key_pem(), key: key.serialize_pem() })
    }

    /// Writes `NAME.crt` and `NAME.key`.
    pub(crate) fn write(&self, directory: &Path, name: &str) -> Result<()> {
        write_private(&directory.join(format!("{name}.crt")), &self.certificate)?;
        write_private(&directory.join(format!("{name}.key")), &self.key)
    }
}

/// Writes a file that only its owner can read.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    let open = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = open.and_then(|mut file| file.write_all(text.as_bytes()));
    written.with_context(|| format!("{} cannot be written", path.display()))
}

fn params(subject: &Subject<'_>) -> Result<CertificateParams> {
    let hosts: Vec<String> = subject.hosts.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(hosts)?;
    params.subject_alt_names.extend(subject.addresses.iter().copied().map(SanType::IpAddress));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, subject.user);
    if let Some(group) = subject.group {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    let now = SystemTime::now();
    params.not_before = (now - SLACK).into();
    params.not_after = (now + LIFETIME).into();
    Ok(params)
}

const SLACK: Duration = Duration::from_secs(3600);
const LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
