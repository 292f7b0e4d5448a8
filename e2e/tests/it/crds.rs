//! The resource definitions, as a real API server takes them.

use std::{collections::BTreeMap, fs, path::PathBuf};

use antiphon_e2e::Cluster;
use futures::future::join_all;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::world::shared;

/// `crds/refused.yaml`.
#[derive(Deserialize)]
struct Refusals {
    bases: BTreeMap<String, Value>,
    refused: Vec<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    kind: String,
    at: String,
    value: Value,
    #[serde(default)]
    update: bool,
    message: String,
}

#[tokio::test]
async fn definitions_are_accepted_and_mistakes_refused_with_our_words() {
    let shared = shared().await;
    let cluster = shared.cluster(1);
    let kinds = define(&cluster).await;
    shared.namespace(&cluster, "crds").await;
    let client = cluster.client().await.unwrap();
    let text = fs::read_to_string(root().join("crds/refused.yaml")).unwrap();
    let Refusals { mut bases, refused } = serde_saphyr::from_str(&text).unwrap();
    bases.values_mut().for_each(|base| base["metadata"]["namespace"] = json!("crds"));
    assert_eq!(bases.keys().collect::<Vec<_>>(), kinds.iter().collect::<Vec<_>>(), "each kind has a base");
    for (kind, base) in &bases {
        let base = serde_json::from_value(base.clone()).unwrap();
        api(&client, kind).create(&PostParams::default(), &base).await.unwrap();
    }
    assert!(refused.len() > 20, "{}", refused.len());
    let client = &client;
    let verdicts = join_all(refused.iter().map(async |case| {
        let api = api(client, &case.kind);
        let base = &bases[&case.kind];
        let answer = if case.update {
            let name = base["metadata"]["name"].as_str().unwrap();
            let patch = at(json!({}), &case.at, &case.value);
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await
        } else {
            let mut new = base.clone();
            new["metadata"]["name"] = json!("new");
            let new = at(new, &case.at, &case.value);
            let dry_run = PostParams { dry_run: true, ..PostParams::default() };
            api.create(&dry_run, &serde_json::from_value(new).unwrap()).await
        };
        let expected = &case.message;
        let which = format!("{} {} {}", case.kind, case.at, case.value);
        match answer {
            Ok(_) => Some(format!("{which} is accepted, but expected is: {expected}")),
            Err(error) => {
                let said = error.to_string();
                (!said.contains(expected.as_str())).then(|| format!("{which}: {said}, but expected is: {expected}"))
            }
        }
    }))
    .await;
    let wrong: Vec<_> = verdicts.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn examples_are_accepted() {
    let shared = shared().await;
    let cluster = shared.cluster(1);
    define(&cluster).await;
    let mut seen = 0;
    for directory in fs::read_dir(root().join("examples")).unwrap() {
        for file in fs::read_dir(directory.unwrap().path()).unwrap() {
            let file = file.unwrap().path();
            if file.extension().is_some_and(|extension| extension == "yaml") {
                let text = fs::read_to_string(&file).unwrap();
                let arguments = ["create", "--dry-run=server", "--validate=strict", "--filename"];
                let namespaced = text.lines().filter(|line| !line.trim_start().starts_with("namespace:"));
                let directory = tempfile::tempdir().unwrap();
                // Its namespaces are not there.
                let copy = directory.path().join("example.yaml");
                fs::write(&copy, namespaced.collect::<Vec<_>>().join("\n")).unwrap();
                cluster.kubectl(arguments.iter().map(std::ffi::OsStr::new).chain([copy.as_os_str()])).await.unwrap();
                seen += 1;
            }
        }
    }
    assert!(seen > 0);
}

/// Applies all definitions; their kinds, sorted.
async fn define(cluster: &Cluster) -> Vec<String> {
    let directory = root().join("crds/yaml");
    let directory = directory.to_str().unwrap();
    cluster.kubectl(["apply", "--server-side", "--force-conflicts", "--filename", directory]).await.unwrap();
    let names = cluster.kubectl(["get", "--output=name", "--filename", directory]).await.unwrap();
    for name in names.lines() {
        cluster.kubectl(["wait", "--for=condition=Established", "--timeout=60s", name]).await.unwrap();
    }
    let path = "--output=jsonpath={range .items[*]}{.spec.names.kind}{\"\\n\"}{end}";
    let kinds = cluster.kubectl(["get", path, "--filename", directory]).await.unwrap();
    let mut kinds: Vec<_> = kinds.lines().map(str::to_owned).collect();
    kinds.sort();
    kinds
}

fn api(client: &Client, kind: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("antiphon.dev", "v1alpha1", kind));
    Api::namespaced_with(client.clone(), "crds", &resource)
}

/// The document with a value at a JSON pointer, and objects on the way to it.
fn at(mut document: Value, pointer: &str, value: &Value) -> Value {
    let mut place = &mut document;
    for name in pointer.split('/').skip(1) {
        place = match name.parse::<usize>() {
            Ok(index) => &mut place[index],
            Err(_) => &mut place[name],
        };
    }
    *place = value.clone();
    document
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}
