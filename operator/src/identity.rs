//! Identities of routers, relays and workers: Secrets of type `kubernetes.io/tls`, made by the operator from the fleet's
//! issuer or, if it is told so, by cert-manager.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use antiphon_runtime::pki::{self, PeerName};
use k8s_openapi::{
    ByteString,
    api::core::v1::Secret,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{CustomResource, Resource, ResourceExt as _};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{Context, Error, apply::diff::Digest, config::Certificates, credentials, trim};

/// Whose certificate goes where.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// Namespace of the Secret.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whom it belongs to.
    pub owner: OwnerReference,
    /// Whom it makes its holders: processes of this name, and of this name with `-…` behind it.
    pub peer: PeerName,
    /// "namespace/name" of the agent that a worker serves.
    pub agent: Option<String>,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Issued {
    /// The Secret is there; look again after so long.
    Ready(Duration),
    /// cert-manager has not made it yet.
    Waiting,
}

/// cert-manager's request for a certificate.
#[derive(CustomResource, Clone, Debug, Serialize, Deserialize)]
#[kube(group = "cert-manager.io", version = "v1", kind = "Certificate", namespaced, schema = "disabled")]
#[serde(rename_all = "camelCase")]
pub struct CertificateSpec {
    /// The Secret to make.
    pub secret_name: String,
    /// What else is to be in it, as cert-manager understands it.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, serde_json::Value>,
}

/// Makes sure that the Secret is there and will be for a while.
///
/// # Errors
/// The issuer cannot be used, or the API server refuses or cannot be reached.
pub async fn ensure<O: Resource<DynamicType = ()>>(context: &Context, owner: &O, leaf: &Leaf) -> Result<Issued, Error> {
    let names = pki::dns_names_of(&leaf.peer, leaf.agent.as_deref())?;
    let live = context.caches.identities.find(&leaf.namespace, &leaf.name);
    if let Certificates::CertManager { kind, name } = &context.config.certificates {
        let request = certificate(leaf, &names, kind, name);
        context.ensure(owner, &request, &context.caches.certificates).await?;
        let known = live.is_some_and(|secret| secret.data.is_some_and_tls());
        return Ok(if known { Issued::Ready(LOOK_AGAIN) } else { Issued::Waiting });
    }
    let ca = context.credentials.issuer()?;
    let now = SystemTime::now();
    let stale = match live.as_deref().map(|secret| validity(secret, &names, ca.certificate_pem(), now)) {
        Some(Ok(renew_in)) => return Ok(Issued::Ready(renew_in)),
        Some(Err(stale)) => Some(stale),
        None => None,
    };
    let identity = ca.issue_for(&leaf.peer, leaf.agent.as_deref(), &[], now)?;
    let data: Data = [
        (CERTIFICATE, identity.certificate_pem().into_bytes()),
        (trim::KEY, identity.key_pem().into_bytes()),
        (CA, identity.ca_pem().as_bytes().to_vec()),
    ]
    .map(|(name, bytes)| (name.to_owned(), ByteString(bytes)))
    .into();
    let mut seen = data.clone();
    seen.insert(trim::KEY.to_owned(), trim::hash(identity.key_pem().as_bytes()));
    let secret = Secret {
        metadata: ObjectMeta { annotations: Some([(ISSUED.to_owned(), mark(&names, &seen))].into()), ..metadata(leaf) },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(data),
        ..Secret::default()
    };
    // The cache has no private keys to compare with: it was decided above that this one is needed.
    match (&live, stale) {
        (None, _) | (_, None) => drop(context.ensure(owner, &secret, &context.caches.identities).await?),
        (Some(_), Some(stale)) => {
            context.applier.apply(&secret, None).await?;
            let note = format!("certificate of {} was made anew: {}", leaf.peer, stale.words());
            context.events.about(owner, &secret, "CertificateRenewed", "Issue", note).await;
        }
    }
    Ok(Issued::Ready(credentials::until(credentials::renewal(identity.not_after()), now)))
}

type Data = BTreeMap<String, ByteString>;

/// Why a Secret will not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stale {
    /// A third of its life is left, or less.
    Due,
    /// It is not as it was issued, or was issued for something else.
    Changed,
}

impl Stale {
    const fn words(self) -> &'static str {
        match self {
            Self::Due => "two thirds of its life are over",
            Self::Changed => "what it was for had changed, or the Secret had been edited",
        }
    }
}

/// How long a Secret, as the cache has it, will do.
fn validity(secret: &Secret, names: &[String], ca: &str, now: SystemTime) -> Result<Duration, Stale> {
    let data = secret.data.as_ref().ok_or(Stale::Changed)?;
    let untouched = secret.annotations().get(ISSUED) == Some(&mark(names, data));
    if !untouched || data.get(CA).is_none_or(|found| found.0 != ca.as_bytes()) {
        return Err(Stale::Changed);
    }
    let not_after = data.get(CERTIFICATE).and_then(|pem| not_after(&pem.0)).ok_or(Stale::Changed)?;
    credentials::renewal(not_after).duration_since(now).map_err(|_| Stale::Due)
}

/// A hash of what was issued, and for which names.
fn mark(names: &[String], data: &Data) -> String {
    let entry = |name: &str| data.get(name).map(|value| hex::encode(&value.0));
    Digest::of(&json!([names, entry(CERTIFICATE), entry(trim::KEY), entry(CA)])).to_string()
}

fn not_after(pem: &[u8]) -> Option<SystemTime> {
    use x509_parser::prelude::{FromDer as _, X509Certificate};
    let der = CertificateDer::from_pem_slice(pem).ok()?;
    let (_, certificate) = X509Certificate::from_der(&der).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

fn metadata(leaf: &Leaf) -> ObjectMeta {
    ObjectMeta {
        name: Some(leaf.name.clone()),
        namespace: Some(leaf.namespace.clone()),
        labels: Some(leaf.labels.clone()),
        owner_references: Some(vec![leaf.owner.clone()]),
        ..ObjectMeta::default()
    }
}

/// What cert-manager is asked for.
fn certificate(leaf: &Leaf, names: &[String], issuer_kind: &str, issuer: &str) -> Certificate {
    let rest = json!({
        "commonName": leaf.peer.to_string().chars().take(64).collect::<String>(),
        "dnsNames": names,
        "duration": "720h",
        "renewBefore": "240h",
        "privateKey": {"algorithm": "Ed25519", "encoding": "PKCS8", "rotationPolicy": "Always"},
        "usages": ["digital signature", "server auth", "client auth"],
        "issuerRef": {"group": "cert-manager.io", "kind": issuer_kind, "name": issuer},
        // So that the operator sees it.
        "secretTemplate": {"labels": leaf.labels},
    });
    let rest = match rest {
        serde_json::Value::Object(rest) => rest,
        _ => serde_json::Map::new(),
    };
    let mut request = Certificate::new(&leaf.name, CertificateSpec { secret_name: leaf.name.clone(), rest });
    request.metadata = metadata(leaf);
    request
}

trait Tls {
    fn is_some_and_tls(&self) -> bool;
}

impl Tls for Option<Data> {
    fn is_some_and_tls(&self) -> bool {
        let present =
            |name: &str| self.as_ref().and_then(|data| data.get(name)).is_some_and(|value| !value.0.is_empty());
        [CERTIFICATE, trim::KEY, CA].into_iter().all(present)
    }
}

const CERTIFICATE: &str = "tls.crt";
const CA: &str = "ca.crt";
/// Annotation: hash of what was issued.
const ISSUED: &str = "antiphon.dev/issued";
/// cert-manager renews by itself.
const LOOK_AGAIN: Duration = Duration::from_secs(3_600);

#[cfg(test)]
mod tests {
    use antiphon_runtime::pki::{FleetCa, Role};

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3_600);

    /// A Secret as the operator makes it, seen through the cache.
    fn issued(names: &[String], ca: &FleetCa, now: SystemTime) -> Secret {
        let peer = PeerName::new("a-relay", Role::Relay, "a").unwrap();
        let identity = ca.issue(&peer, &[], now).unwrap();
        let data: Data = [
            (CERTIFICATE, identity.certificate_pem().into_bytes()),
            (trim::KEY, identity.key_pem().into_bytes()),
            (CA, identity.ca_pem().as_bytes().to_vec()),
        ]
        .map(|(name, bytes)| (name.to_owned(), ByteString(bytes)))
        .into();
        let mut secret = Secret { data: Some(data), ..Secret::default() };
        trim::identity(&mut secret);
        let mark = mark(names, secret.data.as_ref().unwrap());
        secret.metadata.annotations = Some([(ISSUED.to_owned(), mark)].into());
        secret
    }

    #[test]
    fn a_certificate_is_made_anew_with_a_third_of_its_life_left() {
        let ca = FleetCa::from_seed(&[1; 32]).unwrap();
        let (names, now) = (vec!["n".to_owned()], SystemTime::now());
        let secret = issued(&names, &ca, now);
        let left = validity(&secret, &names, ca.certificate_pem(), now).unwrap();
        assert!(left > DAY * 19 && left <= DAY * 20, "{left:?}");
        validity(&secret, &names, ca.certificate_pem(), now + DAY * 19).unwrap();
        assert_eq!(validity(&secret, &names, ca.certificate_pem(), now + DAY * 21), Err(Stale::Due));
    }

    #[test]
    fn a_secret_that_was_edited_or_is_of_another_issuer_will_not_do() {
        let ca = FleetCa::from_seed(&[1; 32]).unwrap();
        let (names, now) = (vec!["n".to_owned()], SystemTime::now());
        let good = issued(&names, &ca, now);
        for entry in [CERTIFICATE, trim::KEY, CA] {
            let mut edited = good.clone();
            edited.data.as_mut().unwrap().insert(entry.to_owned(), ByteString(b"x".to_vec()));
            assert_eq!(validity(&edited, &names, ca.certificate_pem(), now), Err(Stale::Changed), "{entry}");
        }
        let other = FleetCa::from_seed(&[2; 32]).unwrap();
        assert_eq!(validity(&good, &names, other.certificate_pem(), now), Err(Stale::Changed));
        assert_eq!(validity(&good, &["m".to_owned()], ca.certificate_pem(), now), Err(Stale::Changed));
    }

    #[test]
    fn cert_manager_is_asked_for_the_same_names() {
        let peer = PeerName::new("p-1", Role::Worker, "a").unwrap();
        let leaf = Leaf {
            namespace: "shop".into(),
            name: "p-1".into(),
            labels: BTreeMap::new(),
            owner: OwnerReference::default(),
            agent: Some("shop/frontdesk".into()),
            peer,
        };
        let names = pki::dns_names_of(&leaf.peer, leaf.agent.as_deref()).unwrap();
        let request = serde_json::to_value(certificate(&leaf, &names, "ClusterIssuer", "fleet")).unwrap();
        assert_eq!(request["spec"]["secretName"], "p-1");
        assert_eq!(request["spec"]["dnsNames"][0], "p-1.worker.a.antiphon.internal");
        assert_eq!(request["spec"]["dnsNames"].as_array().unwrap().len(), 3);
        assert_eq!(request["spec"]["issuerRef"]["kind"], "ClusterIssuer");
    }
}
