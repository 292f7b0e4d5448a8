//! `antiphon-operator bootstrap`: the fleet's one secret, and the issuer of certificates that follows from it.
//!
//! The root is made only where there is none, and never replaced: everything in the fleet derives from it. The issuer is
//! made again whenever it is not the root's.

use antiphon_core::keys::FleetRoot;
use antiphon_runtime::pki::FleetCa;
use anyhow::{Context as _, bail};
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use rand::{TryRngCore as _, rngs::OsRng};

use crate::{
    args::BootstrapArgs,
    labels::{COMPONENT, FIELD_MANAGER, INSTANCE, NAME},
    trim,
};

/// Makes what is missing.
///
/// # Errors
/// The root that is there is none, it is missing where one has to be, or the API server refuses.
pub async fn run(client: Client, args: &BootstrapArgs) -> anyhow::Result<()> {
    let secrets: Api<Secret> = Api::namespaced(client, &args.place.namespace);
    let issuer = secrets.get_opt(&args.issuer_secret).await.context("reading the issuer")?;
    let root = load_or_make(&secrets, args, issuer.is_some()).await?;
    let ca = FleetCa::from_seed(&root.ca_seed()).context("issuer")?;
    let wanted = issuer_secret(args, &ca);
    if issuer.as_ref().is_some_and(|issuer| issuer.data == wanted.data) {
        tracing::info!(secret = args.issuer_secret, "the issuer is the root's");
        return Ok(());
    }
    let params = PatchParams::apply(FIELD_MANAGER).force();
    secrets.patch(&args.issuer_secret, &params, &Patch::Apply(&wanted)).await.context("writing the issuer")?;
    tracing::info!(secret = args.issuer_secret, replaced = issuer.is_some(), "issuer of certificates written");
    Ok(())
}

async fn load_or_make(secrets: &Api<Secret>, args: &BootstrapArgs, issuer_is_there: bool) -> anyhow::Result<FleetRoot> {
    let name = &args.root_secret;
    if let Some(found) = secrets.get_opt(name).await.context("reading the fleet root")? {
        tracing::info!(secret = name, "the fleet root is there");
        return read(name, &found);
    }
    if args.require_root {
        bail!("Secret {name} is missing: copy it from another cluster of the fleet (key `root`, 64 hex digits)");
    }
    if issuer_is_there {
        bail!(
            "Secret {name} is missing although {} is there: bring the root back from its backup. With a new root nothing \
             that runs would know anything that starts; to begin a new fleet delete {} as well",
            args.issuer_secret,
            args.issuer_secret
        );
    }
    let mut bytes = [0; 32];
    OsRng.try_fill_bytes(&mut bytes).context("no randomness")?;
    let secret = Secret {
        metadata: metadata(args, name),
        type_: Some("Opaque".to_owned()),
        data: Some([("root".to_owned(), ByteString(hex::encode(bytes).into_bytes()))].into()),
        ..Secret::default()
    };
    let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    match secrets.create(&params, &secret).await {
        Ok(_) => tracing::info!(
            secret = name,
            "a new fleet root was made: back it up, and copy it to the fleet's other clusters"
        ),
        // Somebody was faster; theirs it is.
        Err(kube::Error::Api(status)) if status.is_already_exists() => {}
        Err(error) => return Err(error).context("writing the fleet root"),
    }
    read(name, &secrets.get(name).await.context("reading the fleet root")?)
}

fn read(name: &str, secret: &Secret) -> anyhow::Result<FleetRoot> {
    let entry = secret.data.as_ref().and_then(|data| data.get("root"));
    let entry = entry.with_context(|| format!("Secret {name} has no key `root`"))?;
    let text = std::str::from_utf8(&entry.0).unwrap_or_default();
    FleetRoot::from_hex(text.trim()).with_context(|| format!("Secret {name}, key `root`"))
}

fn issuer_secret(args: &BootstrapArgs, ca: &FleetCa) -> Secret {
    let data = [("tls.crt", ca.certificate_pem()), (trim::KEY, ca.key_pem()), ("ca.crt", ca.certificate_pem())];
    Secret {
        metadata: metadata(args, &args.issuer_secret),
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(data.map(|(key, text)| (key.to_owned(), ByteString(text.as_bytes().to_vec()))).into()),
        ..Secret::default()
    }
}

fn metadata(args: &BootstrapArgs, name: &str) -> ObjectMeta {
    let labels = [(NAME, "antiphon"), (COMPONENT, "fleet"), (INSTANCE, args.place.instance.as_str())];
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(args.place.namespace.clone()),
        labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
        ..ObjectMeta::default()
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

    use http::{Method, Request, Response};
    use kube::client::Body;
    use parking_lot::Mutex;
    use serde_json::{Value, json};

    use super::*;
    use crate::args::{ISSUER_SECRET, Place, ROOT_SECRET};

    /// The Secrets of an API server.
    type Secrets = Arc<Mutex<BTreeMap<String, Value>>>;

    fn client(secrets: &Secrets) -> Client {
        let secrets = secrets.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let secrets = secrets.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body: Value = serde_json::from_slice(&body.collect_bytes().await.unwrap()).unwrap_or_default();
                let mut secrets = secrets.lock();
                let path = parts.uri.path();
                let name = path.rsplit('/').next().unwrap().to_owned();
                let (code, answer) = match parts.method {
                    Method::GET => match secrets.get(&name) {
                        Some(secret) => (200, secret.clone()),
                        None => (
                            404,
                            json!({"kind": "Status", "reason": "NotFound", "code": 404, "message": "", "status": "Failure"}),
                        ),
                    },
                    Method::POST => {
                        secrets.insert(body["metadata"]["name"].as_str().unwrap().to_owned(), body.clone());
                        (201, body)
                    }
                    _ => {
                        secrets.insert(name, body.clone());
                        (200, body)
                    }
                };
                Ok::<_, Infallible>(
                    Response::builder().status(code).body(Body::from(answer.to_string().into_bytes())).unwrap(),
                )
            }
        });
        Client::new(service, "antiphon-system")
    }

    fn args(require_root: bool) -> BootstrapArgs {
        BootstrapArgs {
            place: Place { namespace: "antiphon-system".into(), instance: "a".into() },
            root_secret: ROOT_SECRET.into(),
            issuer_secret: ISSUER_SECRET.into(),
            require_root,
        }
    }

    #[tokio::test]
    async fn a_root_is_made_once_and_the_issuer_follows_from_it() {
        let secrets = Secrets::default();
        run(client(&secrets), &args(false)).await.unwrap();
        let made = secrets.lock().clone();
        let secret: Secret = serde_json::from_value(made[ROOT_SECRET].clone()).unwrap();
        let root = read(ROOT_SECRET, &secret).unwrap();
        let issuer: Secret = serde_json::from_value(made[ISSUER_SECRET].clone()).unwrap();
        let key = String::from_utf8(issuer.data.unwrap()["tls.key"].0.clone()).unwrap();
        let ca = FleetCa::from_seed(&root.ca_seed()).unwrap();
        assert_eq!(FleetCa::from_key_pem(&key).unwrap().certificate_pem(), ca.certificate_pem());
        run(client(&secrets), &args(true)).await.unwrap();
        assert_eq!(*secrets.lock(), made);
    }

    #[tokio::test]
    async fn an_issuer_of_another_root_is_replaced() {
        let secrets = Secrets::default();
        run(client(&secrets), &args(false)).await.unwrap();
        let made = secrets.lock().clone();
        secrets.lock().get_mut(ISSUER_SECRET).unwrap()["data"]["tls.key"] = "AAAA".into();
        run(client(&secrets), &args(false)).await.unwrap();
        assert_eq!(*secrets.lock(), made);
    }

    #[tokio::test]
    async fn no_root_is_made_where_there_must_have_been_one() {
        let secrets = Secrets::default();
        let error = run(client(&secrets), &args(true)).await.unwrap_err();
        assert!(error.to_string().contains("copy it from another cluster"), "{error}");
        run(client(&secrets), &args(false)).await.unwrap();
        secrets.lock().remove(ROOT_SECRET);
        let error = run(client(&secrets), &args(false)).await.unwrap_err();
        assert!(error.to_string().contains("from its backup"), "{error}");
        assert!(!secrets.lock().contains_key(ROOT_SECRET));
    }

    #[tokio::test]
    async fn a_root_that_is_none_is_refused_and_stays() {
        let secrets = Secrets::default();
        let wrong = json!({"metadata": {"name": ROOT_SECRET}, "data": {"root": "c2VjcmV0"}});
        secrets.lock().insert(ROOT_SECRET.into(), wrong.clone());
        run(client(&secrets), &args(false)).await.unwrap_err();
        assert_eq!(secrets.lock()[ROOT_SECRET], wrong);
    }
}
