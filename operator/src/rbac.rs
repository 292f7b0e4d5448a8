//! What the operator may do: the permissions that its code needs, and no more.
//!
//! The chart's roles are held against this table by a test. Kubernetes cannot limit Secrets to those of one owner; all
//! else is bounded by kind.

/// Where a permission is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// In Antiphon's own namespace.
    Here,
    /// In every namespace that is served, Antiphon's own included.
    Served,
    /// On the cluster itself; only with `--watch-nodes`.
    Cluster,
}

/// Some verbs on a kind.
#[derive(Clone, Copy, Debug)]
pub struct Permission {
    /// Where.
    pub scope: Scope,
    /// API group; empty for the core.
    pub group: &'static str,
    /// Resource, with its subresource if that is meant.
    pub resource: &'static str,
    /// What may be done.
    pub verbs: &'static [&'static str],
}

const fn may(scope: Scope, group: &'static str, resource: &'static str, verbs: &'static [&'static str]) -> Permission {
    Permission { scope, group, resource, verbs }
}

const WATCH: &[&str] = &["get", "list", "watch"];
const APPLY: &[&str] = &["get", "list", "watch", "create", "patch"];
const OWN: &[&str] = &["get", "list", "watch", "create", "patch", "delete"];
/// Finalizers are set by patching the object itself.
const RESOURCE: &[&str] = &["get", "list", "watch", "patch"];

/// Everything that `antiphon-operator run` needs.
pub const PERMISSIONS: &[Permission] = &[
    may(Scope::Here, "antiphon.dev", "voiceregions", RESOURCE),
    may(Scope::Here, "antiphon.dev", "voiceregions/status", &["patch"]),
    // For owner references that block deletion, where the cluster checks those.
    may(Scope::Here, "antiphon.dev", "voiceregions/finalizers", &["update"]),
    may(Scope::Here, "apps", "deployments", APPLY),
    may(Scope::Here, "", "services", OWN),
    may(Scope::Here, "coordination.k8s.io", "leases", &["get", "create", "update"]),
    may(Scope::Served, "antiphon.dev", "voiceagents", RESOURCE),
    may(Scope::Served, "antiphon.dev", "voiceagents/status", &["patch"]),
    may(Scope::Served, "antiphon.dev", "voiceagents/finalizers", &["update"]),
    may(Scope::Served, "antiphon.dev", "drains", RESOURCE),
    may(Scope::Served, "antiphon.dev", "drains/status", &["patch"]),
    may(Scope::Served, "antiphon.dev", "workerpools", OWN),
    may(Scope::Served, "antiphon.dev", "workerpools/status", &["patch"]),
    may(Scope::Served, "antiphon.dev", "workerpools/finalizers", &["update"]),
    may(Scope::Served, "apps", "replicasets", OWN),
    may(Scope::Served, "", "pods", &["get", "list", "watch", "patch", "delete"]),
    may(Scope::Served, "", "serviceaccounts", APPLY),
    may(Scope::Served, "", "secrets", APPLY),
    may(Scope::Served, "policy", "poddisruptionbudgets", APPLY),
    may(Scope::Served, "networking.k8s.io", "networkpolicies", APPLY),
    may(Scope::Served, "events.k8s.io", "events", &["create", "patch"]),
    // Only where cert-manager issues certificates.
    may(Scope::Served, "cert-manager.io", "certificates", APPLY),
    may(Scope::Cluster, "", "nodes", WATCH),
];

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// Resources with their verbs, by the definition in the chart that grants them.
    fn granted(definition: &str) -> BTreeMap<(String, String), BTreeSet<String>> {
        let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/antiphon/templates/operator/_rules.tpl");
        let text = std::fs::read_to_string(chart).unwrap();
        let (_, text) = text.split_once(&format!("define \"{definition}\"")).unwrap();
        let list = |line: &str| -> Vec<String> {
            let (_, list) = line.split_once('[').unwrap();
            let list = list.split_once(']').unwrap().0;
            list.split(',').map(|item| item.trim().trim_matches('"').to_owned()).collect()
        };
        let (mut groups, mut resources, mut found) = (Vec::new(), Vec::new(), BTreeMap::new());
        // Conditions within a definition end with an `end` of their own; the next definition ends this one.
        for line in text.split("{{- define").next().unwrap().lines().map(str::trim) {
            match line.trim_start_matches("- ").split_once(':') {
                Some(("apiGroups", _)) => groups = list(line),
                Some(("resources", _)) => resources = list(line),
                Some(("verbs", _)) => {
                    for (group, resource) in groups.iter().flat_map(|g| resources.iter().map(move |r| (g, r))) {
                        let verbs: &mut BTreeSet<String> = found.entry((group.clone(), resource.clone())).or_default();
                        verbs.extend(list(line));
                    }
                }
                _ => {}
            }
        }
        found
    }

    #[test]
    fn the_chart_grants_what_is_needed_and_no_other_kind() {
        for (scope, definition) in [
            (Scope::Here, "antiphon.rulesHere"),
            (Scope::Served, "antiphon.rulesServed"),
            (Scope::Cluster, "antiphon.rulesCluster"),
        ] {
            let mut granted = granted(definition);
            for permission in PERMISSIONS.iter().filter(|permission| permission.scope == scope) {
                let key = (permission.group.to_owned(), permission.resource.to_owned());
                let verbs = granted.remove(&key).unwrap_or_default();
                let missing: Vec<_> = permission.verbs.iter().filter(|verb| !verbs.contains(**verb)).collect();
                assert!(missing.is_empty(), "{definition} does not grant {missing:?} on {key:?}");
                assert!(!verbs.contains("*") && !verbs.contains("deletecollection"), "{key:?}");
            }
            assert!(granted.is_empty(), "{definition} grants what nobody needs: {granted:?}");
        }
    }
}
