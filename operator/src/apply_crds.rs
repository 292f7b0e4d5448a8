//! `antiphon-operator apply-crds`: the CustomResourceDefinitions of this release, unless the cluster has newer ones.
//!
//! Each definition bears the release that wrote it. helm installs those of a chart once and never changes them, so the
//! first ones bear none and count as older than any.

use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use tokio::time::{Instant, sleep};

use crate::{args::ApplyCrdsArgs, labels::FIELD_MANAGER};

/// Applies them and waits until the API server serves them.
///
/// # Errors
/// The API server refuses, or does not serve them in time.
pub async fn run(client: Client, args: &ApplyCrdsArgs) -> anyhow::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client);
    let ours = Release::of(env!("CARGO_PKG_VERSION")).context("version of this release")?;
    let definitions = antiphon_crds::crdgen::definitions();
    for definition in &definitions {
        let name = definition.name_any();
        let found = api.get_opt(&name).await.with_context(|| format!("reading {name}"))?;
        match found.as_ref().and_then(release) {
            Some(theirs) if theirs > ours => {
                tracing::info!(name, %theirs, %ours, "the cluster has a newer definition, which stays");
                continue;
            }
            theirs => tracing::info!(name, theirs = theirs.map(|theirs| theirs.to_string()), %ours, "applied"),
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let marked = marked(definition.clone(), &ours);
        api.patch(&name, &params, &Patch::Apply(&marked)).await.with_context(|| format!("applying {name}"))?;
    }
    let deadline = Instant::now() + args.timeout;
    for definition in &definitions {
        established(&api, &definition.name_any(), deadline).await?;
    }
    Ok(())
}

async fn established(api: &Api<CustomResourceDefinition>, name: &str, deadline: Instant) -> anyhow::Result<()> {
    loop {
        let found = api.get_opt(name).await.with_context(|| format!("reading {name}"))?;
        let conditions = found.and_then(|found| found.status?.conditions).unwrap_or_default();
        let holds = |type_: &str| conditions.iter().any(|c| c.type_ == type_ && c.status == "True");
        if holds("Established") {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let why: Vec<_> =
                conditions.iter().filter(|c| c.status != "True").filter_map(|c| c.message.clone()).collect();
            bail!(
                "{name} is not served in time: {}",
                if why.is_empty() { "no reason is given".into() } else { why.join("; ") }
            );
        }
        // The hook may read these by name, not watch all definitions.
        sleep(PAUSE).await;
    }
}

/// A version of Antiphon: major, minor, patch, and whether it is before that one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Release {
    numbers: [u32; 3],
    /// A pre-release comes before its release.
    is_final: bool,
}

impl Release {
    fn of(text: &str) -> Option<Self> {
        let text = text.split('+').next()?;
        let (numbers, pre) = text.split_once('-').map_or((text, None), |(numbers, pre)| (numbers, Some(pre)));
        let parsed: Option<Vec<u32>> = numbers.split('.').map(|number| number.parse().ok()).collect();
        Some(Self { numbers: parsed?.try_into().ok()?, is_final: pre.is_none() })
    }
}

impl std::fmt::Display for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [major, minor, patch] = self.numbers;
        write!(f, "{major}.{minor}.{patch}{}", if self.is_final { "" } else { "-pre" })
    }
}

/// The release that wrote a definition.
fn release(definition: &CustomResourceDefinition) -> Option<Release> {
    Release::of(definition.annotations().get(RELEASE)?)
}

fn marked(mut definition: CustomResourceDefinition, release: &Release) -> CustomResourceDefinition {
    definition.annotations_mut().insert(RELEASE.to_owned(), release.to_string());
    // Somebody else's to write.
    definition.status = None;
    definition.metadata.managed_fields = None;
    definition
}

/// Annotation: the release that wrote a definition.
const RELEASE: &str = "antiphon.dev/release";
const PAUSE: Duration = Duration::from_millis(300);

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

    use http::{Method, Request, Response};
    use kube::client::Body;
    use parking_lot::Mutex;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn releases_are_in_order() {
        let order = ["0.0.9", "0.1.0-rc.1", "0.1.0", "0.1.1", "0.2.0", "0.10.0", "1.0.0-beta", "1.0.0"];
        let releases: Vec<_> = order.iter().map(|text| Release::of(text).unwrap()).collect();
        assert!(releases.is_sorted_by(|a, b| a < b), "{releases:?}");
        assert_eq!(Release::of("1.2"), None);
    }

    /// An API server with definitions of this release, and what was written to it.
    async fn applied(release: Option<&str>) -> BTreeMap<String, Value> {
        let written: Arc<Mutex<BTreeMap<String, Value>>> = Arc::default();
        let (writes, release) = (written.clone(), release.map(str::to_owned));
        let service = tower::service_fn(move |request: Request<Body>| {
            let (writes, release) = (writes.clone(), release.clone());
            async move {
                let (parts, body) = request.into_parts();
                let name = parts.uri.path().rsplit('/').next().unwrap().to_owned();
                let mut answer = json!({"metadata": {"name": name, "annotations": {}},
                    "spec": {"group": "antiphon.dev", "names": {"kind": "K", "plural": "ks"}, "scope": "Namespaced", "versions": []},
                    "status": {"conditions": [{"type": "Established", "status": "True"}]}});
                if let Some(release) = release {
                    answer["metadata"]["annotations"][RELEASE] = release.into();
                }
                if parts.method == Method::PATCH {
                    let body = body.collect_bytes().await.unwrap();
                    writes.lock().insert(name, serde_json::from_slice(&body).unwrap());
                }
                Ok::<_, Infallible>(Response::new(Body::from(answer.to_string().into_bytes())))
            }
        });
        run(Client::new(service, "default"), &ApplyCrdsArgs { timeout: Duration::from_secs(1) }).await.unwrap();
        written.lock().clone()
    }

    #[tokio::test]
    async fn older_and_unmarked_definitions_are_replaced_and_newer_ones_stay() {
        for older in [None, Some("0.0.1"), Some(env!("CARGO_PKG_VERSION"))] {
            let written = applied(older).await;
            assert_eq!(written.len(), 4, "{older:?}");
            let region = &written["voiceregions.antiphon.dev"];
            assert_eq!(region["metadata"]["annotations"][RELEASE], env!("CARGO_PKG_VERSION"));
            assert!(region["kind"] == "CustomResourceDefinition" && region["status"].is_null());
        }
        assert!(applied(Some("999.0.0")).await.is_empty());
    }
}
