//! Which packages may know which.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use anyhow::{Context, Result};
use serde_json::Value;

use super::Violation;

/// Who depends on whom, by name.
#[derive(Debug, Default)]
pub(super) struct Graph {
    edges: BTreeMap<String, BTreeSet<(String, Kind)>>,
    /// Those whose manifest asks for a Kubernetes client.
    kubernetes_clients: BTreeSet<String>,
}

/// Kinds of dependency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Normal,
    Build,
    Dev,
}

impl Graph {
    /// The resolved graph of `cargo metadata`.
    pub(super) fn of_metadata(metadata: &Value) -> Result<Self> {
        let packages = metadata["packages"].as_array().context("metadata has packages")?;
        let name_of: BTreeMap<&str, &str> =
            packages.iter().filter_map(|package| Some((package["id"].as_str()?, package["name"].as_str()?))).collect();
        let mut graph = Self::default();
        for package in packages {
            let dependencies = package["dependencies"].as_array().into_iter().flatten();
            let asks = dependencies.filter(|dependency| dependency["name"] == "kube").any(|dependency| {
                let features = dependency["features"].as_array().into_iter().flatten().filter_map(Value::as_str);
                let client = |feature: &str| KUBERNETES_CLIENT.contains(&feature);
                dependency["uses_default_features"] == true || features.into_iter().any(client)
            });
            if let Some(name) = package["name"].as_str().filter(|_| asks) {
                graph.kubernetes_clients.insert(name.to_owned());
            }
        }
        for node in metadata["resolve"]["nodes"].as_array().context("metadata is resolved")? {
            let name = |id: &Value| id.as_str().and_then(|id| name_of.get(id).copied());
            let from = name(&node["id"]).context("a node is a package")?;
            for dependency in node["deps"].as_array().into_iter().flatten() {
                let to = name(&dependency["pkg"]).context("a dependency is a package")?;
                for kind in dependency["dep_kinds"].as_array().into_iter().flatten() {
                    let kind = match kind["kind"].as_str() {
                        Some("dev") => Kind::Dev,
                        Some("build") => Kind::Build,
                        _ => Kind::Normal,
                    };
                    graph.add(from, to, kind);
                }
            }
        }
        Ok(graph)
    }

    fn add(&mut self, from: &str, to: &str, kind: Kind) {
        self.edges.entry(from.to_owned()).or_default().insert((to.to_owned(), kind));
    }

    fn of(&self, package: &str) -> impl Iterator<Item = &(String, Kind)> {
        self.edges.get(package).into_iter().flatten()
    }

    /// Whether a package links a dependency's dependency. The resolved graph has the features that any member asks for:
    /// the client of `kube` belongs to those who want it.
    fn links(&self, package: &str, last: &str, next: &str) -> bool {
        last != "kube" || !next.starts_with("kube-") || next == "kube-core" || next == "kube-derive" || {
            self.kubernetes_clients.contains(package)
        }
    }

    /// The shortest way from `package` to `target`: its own dependencies of the kinds in `first`, then what those link.
    fn way(&self, package: &str, target: &str, first: &[Kind]) -> Option<Vec<String>> {
        let mut queue = VecDeque::from([vec![package.to_owned()]]);
        let mut seen = BTreeSet::from([package.to_owned()]);
        while let Some(way) = queue.pop_front() {
            let last = way.last()?;
            let kinds: &[Kind] = if way.len() == 1 { first } else { &[Kind::Normal] };
            let linked = self.of(last).filter(|(next, kind)| kinds.contains(kind) && self.links(package, last, next));
            for (next, _) in linked {
                let longer = [&way[..], std::slice::from_ref(next)].concat();
                if next == target {
                    return Some(longer);
                }
                if seen.insert(next.clone()) {
                    queue.push_back(longer);
                }
            }
        }
        None
    }
}

/// Everything in the graph that should not be there.
pub(super) fn check(graph: &Graph) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut report = |package: &str, way: Vec<String>, why: &str| {
        let manifest = format!("{}/Cargo.toml", package.trim_start_matches("antiphon-"));
        violations.push(Violation::new(manifest.as_ref(), 0, format!("{}: {why}", way.join(" → "))));
    };
    for (package, forbidden, why) in FORBIDDEN {
        for target in *forbidden {
            // Tests of pure code are pure as well.
            if let Some(way) = graph.way(package, target, &[Kind::Normal, Kind::Build, Kind::Dev]) {
                report(package, way, why);
            }
        }
    }
    for package in graph.kubernetes_clients.iter().filter(|package| package.starts_with("antiphon-")) {
        if !CREDENTIALED.contains(&package.as_str()) {
            report(package, vec![package.clone(), "kube".into()], "only the operator holds Kubernetes credentials");
        }
    }
    for package in BINARIES {
        for other in BINARIES.iter().filter(|other| *other != package) {
            if let Some(way) = graph.way(package, other, &[Kind::Normal, Kind::Build, Kind::Dev]) {
                report(package, way, "binaries meet on the wire and never link each other");
            }
        }
    }
    violations
}

/// Features of `kube` that speak to an API server.
const KUBERNETES_CLIENT: &[&str] = &["client", "runtime", "ws", "config"];
const CREDENTIALED: &[&str] = &["antiphon-operator", "antiphon-e2e"];

const BINARIES: &[&str] =
    &["antiphon-cli", "antiphon-operator", "antiphon-relay", "antiphon-router", "antiphon-worker"];

const IO: &[&str] =
    &["etcd-client", "k8s-openapi", "kube", "mio", "prost", "quinn", "quinn-proto", "quinn-udp", "tokio", "tonic"];

const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    ("antiphon-core", IO, "the core does no I/O and knows no wire format"),
    ("antiphon-media", IO, "media does no I/O and knows no wire format"),
    ("antiphon-crds", &["antiphon-core", "kube-client", "tokio", "tonic"], "resource types are plain data"),
    ("antiphon-relay", &["kube-client"], "only the operator holds Kubernetes credentials"),
    ("antiphon-router", &["kube-client"], "only the operator holds Kubernetes credentials"),
    ("antiphon-worker", &["kube-client"], "only the operator holds Kubernetes credentials"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(edges: &[(&str, &str, Kind)]) -> Vec<String> {
        let mut graph = Graph::default();
        for (from, to, kind) in edges {
            graph.add(from, to, *kind);
        }
        check(&graph).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn core_that_reaches_tokio_is_shown_with_the_way() {
        let found = violations(&[
            ("antiphon-core", "helper", Kind::Normal),
            ("helper", "tokio", Kind::Normal),
            ("helper", "tonic", Kind::Dev),
        ]);
        assert_eq!(
            found,
            ["core/Cargo.toml: antiphon-core → helper → tokio: the core does no I/O and knows no wire format"]
        );
    }

    #[test]
    fn binaries_may_not_know_each_other_even_in_tests() {
        let found = violations(&[("antiphon-cli", "antiphon-router", Kind::Dev)]);
        assert_eq!(found.len(), 1, "{found:?}");
        let found = violations(&[
            ("antiphon-cli", "antiphon-client", Kind::Normal),
            ("antiphon-client", "antiphon-worker", Kind::Normal),
        ]);
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn libraries_may_be_shared() {
        let edges = [
            ("antiphon-relay", "antiphon-core", Kind::Normal),
            ("antiphon-worker", "antiphon-core", Kind::Normal),
            ("antiphon-worker", "tokio", Kind::Normal),
        ];
        assert_eq!(violations(&edges), [""; 0]);
    }

    #[test]
    fn features_that_others_ask_for_are_not_held_against_a_package() {
        let metadata = |features: &[&str]| {
            let kube = serde_json::json!({"name": "kube", "uses_default_features": false, "features": features});
            let edge = |to: &str| serde_json::json!({"pkg": to, "dep_kinds": [{"kind": null}]});
            serde_json::json!({
                "packages": [
                    {"id": "crds", "name": "antiphon-crds", "dependencies": [kube]},
                    {"id": "kube", "name": "kube"},
                    {"id": "client", "name": "kube-client"},
                ],
                "resolve": {"nodes": [
                    {"id": "crds", "deps": [edge("kube")]},
                    {"id": "kube", "deps": [edge("client")]},
                    {"id": "client", "deps": []},
                ]},
            })
        };
        let found = |features: &[&str]| check(&Graph::of_metadata(&metadata(features)).unwrap()).len();
        assert_eq!(found(&["derive"]), 0);
        assert_eq!(found(&["derive", "client"]), 2, "plain data, and no credentials");
    }

    #[test]
    fn graph_is_read_from_metadata() {
        let metadata = serde_json::json!({
            "packages": [{"id": "a#1", "name": "antiphon-media"}, {"id": "b#1", "name": "quinn"}],
            "resolve": {"nodes": [
                {"id": "a#1", "deps": [{"pkg": "b#1", "dep_kinds": [{"kind": null}]}]},
                {"id": "b#1", "deps": []},
            ]},
        });
        assert_eq!(check(&Graph::of_metadata(&metadata).unwrap()).len(), 1);
    }
}
