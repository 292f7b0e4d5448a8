//! A process's certificate and key, renewed while it runs.
//!
//! Who issues certificates writes new files into the identity's directory, and [`Identity::follow`] takes them up: a
//! poll, because Kubernetes swaps Secrets by symbolic links and tells nobody. Connections that live go on with the
//! certificate they began with; every handshake from then on shows the new one. That holds for all that is made of an
//! identity:
//!
//! - servers of [`crate::tls::server_config`] and [`crate::tls::incoming`], clients of [`crate::tls::channel`];
//! - a QUIC endpoint whose `rustls::ServerConfig` is built with `.with_cert_resolver(identity.presenter())` instead of
//!   `.with_single_cert(…)`: its configuration never has to be replaced.
//!
//! A set of files that does not fit together is one that is being written: it gets time until the next poll, then it is
//! refused with a line in the log, and what was in force stays.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use rustls::{
    RootCertStore, SignatureScheme,
    client::{ResolvesClientCert, WebPkiServerVerifier, danger::ServerCertVerifier as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _};

use crate::{
    Tasks,
    pki::{PeerName, PkiError, agents_of_certificate, write_secret},
    private_file::read_secret,
    tls::provider,
};

/// A process's certificate, key and trust anchor. Clones are one identity: renewing renews all of them.
#[derive(Clone)]
pub struct Identity {
    shared: Arc<Shared>,
}

struct Shared {
    peer: PeerName,
    ca_pem: String,
    ca: CertificateDer<'static>,
    /// None if it exists in memory only.
    origin: Option<Origin>,
    leaf: ArcSwap<Leaf>,
    renewals: AtomicU64,
    refusals: AtomicU64,
}

/// Where it was read from and is renewed from.
#[derive(Clone)]
struct Origin {
    dir: PathBuf,
    /// Of the files that are in force.
    taken: Stamp,
}

/// What is replaced.
struct Leaf {
    certificate_pem: String,
    key_pem: String,
    certified: Arc<CertifiedKey>,
    not_after: SystemTime,
}

/// Keys never appear in logs.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("peer", self.peer()).finish_non_exhaustive()
    }
}

impl Identity {
    /// An identity in memory, from PEM, valid at `now`; it is renewed from nowhere.
    pub(crate) fn issued(
        certificate_pem: String,
        key_pem: String,
        ca_pem: String,
        now: SystemTime,
    ) -> Result<Self, PkiError> {
        Self::read(Files { certificate_pem, key_pem, ca_pem }, None, now)
    }

    /// Reads `cert.pem`, `key.pem` and `ca.pem` from a directory.
    ///
    /// # Errors
    /// A file is missing or is not what it should be, others can read the key, or they do not fit together, or are not
    /// valid now.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let origin = Origin { dir: dir.to_owned(), taken: Stamp::of(dir) };
        Self::read(Files::load(dir)?, Some(origin), SystemTime::now())
            .map_err(|source| PkiError::Directory { dir: dir.to_owned(), source: source.into() })
    }

    fn read(files: Files, origin: Option<Origin>, now: SystemTime) -> Result<Self, PkiError> {
        let (peer, leaf) = files.check(now)?;
        let ca = files.ca()?;
        let shared = Shared {
            peer,
            ca_pem: files.ca_pem,
            ca,
            origin,
            leaf: ArcSwap::from_pointee(leaf),
            renewals: AtomicU64::new(0),
            refusals: AtomicU64::new(0),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Writes the three files into `dir`, made if absent; the key is readable by its owner only.
    ///
    /// Each file is replaced whole, the key first. Who reads in between sees a pair that does not fit.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn save(&self, dir: &Path) -> Result<(), PkiError> {
        let wrap = |path: &Path| {
            let path = path.to_owned();
            move |source| PkiError::File { path, source }
        };
        fs::create_dir_all(dir).map_err(wrap(dir))?;
        let leaf = self.shared.leaf.load();
        for (name, text) in
            [(KEY_FILE, &leaf.key_pem), (CA_FILE, &self.shared.ca_pem), (CERT_FILE, &leaf.certificate_pem)]
        {
            let (path, next) = (dir.join(name), dir.join(format!(".{name}.next")));
            if name == KEY_FILE {
                write_secret(&next, text.as_bytes())?;
            } else {
                fs::write(&next, text).map_err(wrap(&next))?;
            }
            fs::rename(&next, &path).map_err(wrap(&path))?;
        }
        Ok(())
    }

    /// Whom this identity names.
    #[must_use]
    pub fn peer(&self) -> &PeerName {
        &self.shared.peer
    }

    /// The agents, `namespace/name`, that the certificate in force lets a worker serve.
    #[must_use]
    pub fn agents(&self) -> Vec<String> {
        agents_of_certificate(&self.certificate()).unwrap_or_default()
    }

    /// Certificate in force, PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> String {
        self.shared.leaf.load().certificate_pem.clone()
    }

    /// Private key in force, PEM (PKCS #8).
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.shared.leaf.load().key_pem.clone()
    }

    /// Trust anchor, PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.shared.ca_pem
    }

    /// Certificate in force, DER.
    #[must_use]
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.shared.leaf.load().certified.cert[0].clone()
    }

    /// Trust anchor, DER.
    #[must_use]
    pub fn ca(&self) -> CertificateDer<'static> {
        self.shared.ca.clone()
    }

    /// Private key in force.
    #[must_use]
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_slice(self.shared.leaf.load().key_pem.as_bytes()).expect("checked when it was taken")
    }

    /// When the certificate in force ends to be valid.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.shared.leaf.load().not_after
    }

    /// For TLS configurations: shows what is in force at each handshake.
    #[must_use]
    pub fn presenter(&self) -> Arc<Presenter> {
        Arc::new(Presenter(self.clone()))
    }

    /// Takes new files up while the process runs, and says in `registry` how long the certificate is still valid.
    ///
    /// An identity that is in memory only stays as it is.
    pub fn follow(&self, tasks: &Tasks, registry: &mut Registry) {
        registry.register_collector(Box::new(Expiry(self.clone())));
        let Some(mut follower) = Follower::new(self) else { return };
        let stopping = tasks.stopping();
        tasks.service("identity", async move {
            let mut every = tokio::time::interval(POLL);
            while stopping.run_until_cancelled(every.tick()).await.is_some() {
                // Three small files of a local disk or a Secret: as quick as reading a directory.
                follower.poll(SystemTime::now());
            }
            Ok(())
        });
    }

    fn renew(&self, files: &Files, now: SystemTime) -> Result<(), PkiError> {
        let (peer, leaf) = files.check(now)?;
        if peer != *self.peer() {
            return Err(PkiError::Changed(format!("the certificate names {peer}, not {}", self.peer())));
        }
        if files.ca()? != self.shared.ca {
            return Err(PkiError::Changed("the trust anchor is another one".into()));
        }
        self.shared.leaf.store(Arc::new(leaf));
        self.shared.renewals.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// An identity at the handshakes of servers and clients.
#[derive(Debug)]
pub struct Presenter(Identity);

impl ResolvesServerCert for Presenter {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.shared.leaf.load().certified.clone())
    }
}

impl ResolvesClientCert for Presenter {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.shared.leaf.load().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The texts of the three files.
struct Files {
    certificate_pem: String,
    key_pem: String,
    ca_pem: String,
}

impl Files {
    fn load(dir: &Path) -> Result<Self, PkiError> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(|source| PkiError::File { path, source })
        };
        let key_pem = |name: &str| read_secret(&dir.join(name));
        Ok(Self { certificate_pem: read(CERT_FILE)?, key_pem: key_pem(KEY_FILE)?, ca_pem: read(CA_FILE)? })
    }

    fn ca(&self) -> Result<CertificateDer<'static>, PkiError> {
        CertificateDer::from_pem_slice(self.ca_pem.as_bytes()).map_err(|_| PkiError::Pem("trust anchor in ca.pem"))
    }

    /// Whether the parts belong together and are valid at `now`.
    fn check(&self, now: SystemTime) -> Result<(PeerName, Leaf), PkiError> {
        let certificate = CertificateDer::from_pem_slice(self.certificate_pem.as_bytes());
        let certificate = certificate.map_err(|_| PkiError::Pem("certificate in cert.pem"))?;
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes());
        let key = key.map_err(|_| PkiError::Pem("private key in key.pem"))?;
        let peer = PeerName::of_certificate(&certificate)?;
        let unfit = |source| PkiError::Unfit { peer: peer.clone(), source };
        let certified = CertifiedKey::from_der(vec![certificate.clone()], key, &provider()).map_err(unfit)?;
        let mut roots = RootCertStore::empty();
        roots.add(self.ca()?).map_err(unfit)?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let verifier = verifier.map_err(|e| unfit(rustls::Error::General(e.to_string())))?;
        let name = ServerName::try_from(peer.dns()).map_err(|_| PkiError::NotOurs)?;
        let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
        verifier.verify_server_cert(&certificate, &[], &name, &[], now).map_err(unfit)?;
        let not_after = not_after(&certificate).ok_or(PkiError::NotOurs)?;
        let (certificate_pem, key_pem) = (self.certificate_pem.clone(), self.key_pem.clone());
        Ok((peer, Leaf { certificate_pem, key_pem, certified: Arc::new(certified), not_after }))
    }
}

fn not_after(certificate: &[u8]) -> Option<SystemTime> {
    use x509_parser::prelude::{FromDer as _, X509Certificate};
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Where the files are, how long and from when: changes with every way of replacing one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp([Option<(PathBuf, SystemTime, u64)>; 3]);

impl Stamp {
    fn of(dir: &Path) -> Self {
        Self([CERT_FILE, KEY_FILE, CA_FILE].map(|name| {
            // With all links resolved: that is what Kubernetes changes.
            let path = fs::canonicalize(dir.join(name)).ok()?;
            let metadata = fs::metadata(&path).ok()?;
            Some((path, metadata.modified().ok()?, metadata.len()))
        }))
    }
}

/// Notices new files.
struct Follower {
    identity: Identity,
    origin: Origin,
    /// Of what does not fit, and whether that was said.
    unfit: Option<(Stamp, bool)>,
}

/// What a look at the files brought.
#[derive(Debug)]
enum Seen {
    Nothing,
    Renewed,
    /// Does not fit, as if it were being written.
    Unfinished,
    /// Still does not fit.
    Refused(PkiError),
}

impl Follower {
    fn new(identity: &Identity) -> Option<Self> {
        Some(Self { identity: identity.clone(), origin: identity.shared.origin.clone()?, unfit: None })
    }

    fn poll(&mut self, now: SystemTime) {
        let seen = self.look(now);
        let peer = self.identity.peer();
        match seen {
            Seen::Nothing | Seen::Unfinished => {}
            Seen::Renewed => {
                let left = self.identity.not_after().duration_since(now).unwrap_or_default();
                tracing::info!(%peer, hours_left = left.as_secs() / 3600, "certificate taken up");
            }
            Seen::Refused(error) => {
                tracing::error!(%peer, dir = %self.origin.dir.display(), "new certificate refused, the old one stays: {error}");
            }
        }
    }

    fn look(&mut self, now: SystemTime) -> Seen {
        let stamp = Stamp::of(&self.origin.dir);
        if stamp == self.origin.taken {
            self.unfit = None;
            return Seen::Nothing;
        }
        let seen_before = self.unfit.as_ref().filter(|(unfit, _)| *unfit == stamp).map(|(_, said)| *said);
        if seen_before == Some(true) {
            return Seen::Nothing;
        }
        // What changes while it is read has another stamp next time.
        match Files::load(&self.origin.dir).and_then(|files| self.identity.renew(&files, now)) {
            Ok(()) => {
                (self.origin.taken, self.unfit) = (stamp, None);
                Seen::Renewed
            }
            Err(error) => {
                self.unfit = Some((stamp, seen_before.is_some()));
                if seen_before.is_none() {
                    return Seen::Unfinished;
                }
                self.identity.shared.refusals.fetch_add(1, Ordering::Relaxed);
                Seen::Refused(error)
            }
        }
    }
}

/// Metrics of an identity, computed when they are asked for.
#[derive(Debug)]
struct Expiry(Identity);

impl Collector for Expiry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Shared { renewals, refusals, .. } = &*self.0.shared;
        let (now, end) = (SystemTime::now(), self.0.not_after());
        let left = match end.duration_since(now) {
            Ok(left) => left.as_secs_f64(),
            Err(over) => -over.duration().as_secs_f64(),
        };
        let left = ConstGauge::new(left);
        let kind = left.metric_type();
        let help = "Time for which the certificate in use is still valid";
        left.encode(encoder.encode_descriptor(
            "antiphon_runtime_certificate_expiry",
            help,
            Some(&Unit::Seconds),
            kind,
        )?)?;
        for (name, help, value) in [
            ("antiphon_runtime_certificate_renewals", "New certificates taken up", renewals),
            ("antiphon_runtime_certificate_refusals", "New certificates that did not fit", refusals),
        ] {
            let counter = ConstCounter::new(value.load(Ordering::Relaxed));
            let kind = counter.metric_type();
            counter.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        Ok(())
    }
}

/// How often the files are looked at.
const POLL: Duration = Duration::from_secs(2);
const CERT_FILE: &str = "cert.pem";
const KEY_FILE: &str = "key.pem";
const CA_FILE: &str = "ca.pem";

#[cfg(test)]
mod tests;
