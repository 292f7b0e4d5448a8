//! The chart in `charts/antiphon`: its files agree with each other and with the project's, the API server takes every
//! case, and a release is installed, tested, upgraded and uninstalled. Whoever changes these tests changes the chart.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use antiphon_e2e::{Cluster, images, run_with, until};
use anyhow::{Context as _, Result, ensure};

use crate::world::{alone, shared};

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(project().join(path)).with_context(|| path.to_owned())
}

/// Names of the files in a directory that end so.
fn names(directory: &str, end: &str) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(project().join(directory)).with_context(|| directory.to_owned())?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names = names.collect::<Result<Vec<_>>>()?;
    Ok(names.iter().filter_map(|name| name.strip_suffix(end)).map(str::to_owned).collect())
}

#[test]
fn definitions_are_those_that_are_generated() -> Result<()> {
    let (ours, generated) = ("charts/antiphon/crds", "crds/yaml");
    assert_eq!(names(ours, ".yaml")?, names(generated, ".yaml")?, "copy {generated} to {ours}");
    for name in names(generated, ".yaml")? {
        let same = read(&format!("{ours}/{name}.yaml"))? == read(&format!("{generated}/{name}.yaml"))?;
        assert!(same, "{name}.yaml: copy {generated} to {ours}");
    }
    Ok(())
}

#[test]
fn versions_are_the_workspaces() -> Result<()> {
    let chart = read("charts/antiphon/Chart.yaml")?;
    let version = env!("CARGO_PKG_VERSION");
    for line in [format!("version: {version}"), format!("appVersion: {version}")] {
        assert!(chart.lines().any(|found| found == line), "Chart.yaml has no line `{line}`");
    }
    for image in ["operator", "router", "relay", "worker", "cli"] {
        let image = format!("image: antiphon/{image}:{version}");
        assert!(chart.contains(&image), "Chart.yaml has no `{image}`");
    }
    Ok(())
}

/// Every word of a text that begins so.
fn words<'a>(text: &'a str, begin: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(move |word| word.starts_with(begin))
}

#[test]
fn each_alert_has_a_runbook_and_known_metrics() -> Result<()> {
    let text = read("charts/antiphon/alerts.yaml")?;
    let alerts: BTreeSet<String> =
        text.lines().filter_map(|line| line.strip_prefix("- alert: ")).map(str::to_owned).collect();
    ensure!(!alerts.is_empty(), "no alerts");
    let mut runbooks = names("docs/runbooks", ".md")?;
    runbooks.remove("README");
    assert_eq!(alerts, runbooks, "alerts (left) and docs/runbooks (right)");
    let list = read("docs/runbooks/README.md")?;
    for alert in &alerts {
        assert!(list.contains(&format!("[{alert}]({alert}.md)")), "docs/runbooks/README.md does not list {alert}");
        assert!(read(&format!("docs/runbooks/{alert}.md"))?.starts_with(&format!("# {alert}\n")));
    }
    let metrics = read("docs/metrics.md")?;
    let known: BTreeSet<&str> = words(&metrics, "antiphon_").collect();
    let labels = ["antiphon_dev_region", "antiphon_dev_agent"];
    for metric in words(&text, "antiphon_").filter(|word| !labels.contains(word)) {
        assert!(known.contains(metric.trim_end_matches("_bucket")), "docs/metrics.md has no {metric}");
    }
    Ok(())
}

/// The arguments of helm for a case.
fn case(verb: &[&str], namespace: &str, values: &str) -> Vec<String> {
    let chart = project().join("charts/antiphon");
    let values = chart.join("ci").join(format!("{values}-values.yaml"));
    let mut arguments: Vec<String> = verb.iter().map(ToString::to_string).collect();
    arguments.push(chart.display().to_string());
    arguments.extend(["--namespace", namespace, "--values"].map(str::to_owned));
    arguments.push(values.display().to_string());
    arguments
}

#[tokio::test]
async fn the_api_server_takes_every_case() -> Result<()> {
    let clusters = shared().await;
    let cluster = clusters.cluster(1);
    let definitions = project().join("charts/antiphon/crds").display().to_string();
    cluster.kubectl(["apply", "--server-side", "--force-conflicts", "--filename", &definitions]).await?;
    for name in ["chart-cases", "team-a", "team-b"] {
        cluster.apply(&format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}}}}}")).await?;
    }
    let cases = names("charts/antiphon/ci", "-values.yaml")?;
    ensure!(!cases.is_empty(), "no cases");
    for name in cases {
        cluster.helm(case(&["lint", "--strict"], "chart-cases", &name)).await.with_context(|| name.clone())?;
        let rendered = cluster.helm(case(&["template", "antiphon"], "chart-cases", &name)).await?;
        // Their definitions are not Antiphon's and not on the clusters.
        let foreign = ["monitoring.coreos.com/", "cert-manager.io/"];
        let ours = |object: &&str| !foreign.iter().any(|group| object.contains(&format!("apiVersion: {group}")));
        let objects: Vec<&str> = rendered.split("\n---\n").filter(ours).collect();
        let arguments =
            ["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "--filename", "-"];
        let applied = run_with(&mut cluster.kubectl_command(arguments), objects.join("\n---\n").as_bytes()).await;
        let applied = applied.with_context(|| name.clone())?;
        assert!(applied.lines().count() > 10, "{name}: {applied}");
    }
    Ok(())
}

#[tokio::test]
async fn wrong_values_are_refused_with_a_reason() -> Result<()> {
    let clusters = shared().await;
    let cluster = clusters.cluster(1);
    for (set, reason) in [
        ("cluster=", "cluster: name this cluster"),
        ("cluster=Laptop", "/cluster"),
        ("nonsense=1", "nonsense"),
        ("etcd.managed.members=2", "/etcd/managed/members"),
        ("etcd.mode=external", "/etcd/external/endpoints"),
        ("etcd.mode=external,etcd.external.endpoints={https://e:2379}", "etcd.external.tlsSecret: needed"),
        ("etcd.managed.tlsSecret=mine", "tlsSecret and clientTlsSecret go together"),
        ("certificates.issuerKind=Issuer", "issuerKind and issuerName go together"),
        ("rbac.scope=everything", "/rbac/scope"),
        ("operator.resources.limits.memory=lots", "/operator/resources/limits/memory"),
    ] {
        let mut arguments = case(&["template", "antiphon"], "chart-cases", "single-cluster");
        arguments.extend(["--set".to_owned(), set.to_owned()]);
        let Err(error) = cluster.helm(arguments).await else { panic!("{set} is accepted") };
        let error = format!("{error:#}");
        assert!(error.contains(reason), "{set}: {error}");
    }
    Ok(())
}

/// A release in a namespace of its own that enforces the restricted profile.
struct Release {
    cluster: Cluster,
    namespace: &'static str,
}

impl Release {
    const NAME: &'static str = "antiphon";

    fn arguments(&self, verb: &str, more: &[&str]) -> Vec<String> {
        let mut arguments = case(&[verb, Self::NAME], self.namespace, "single-cluster");
        let etcd = format!("images.etcd.repository=antiphon/etcd,images.etcd.tag={}", images::VERSION);
        arguments.extend(["--timeout", "3m", "--set", &etcd].map(str::to_owned));
        arguments.extend(["--set", "etcd.managed.members=3,etcd.managed.storage.type=EmptyDir"].map(str::to_owned));
        // Whatever else is on the cluster is not this release's to serve, nor to tear down.
        arguments.extend(["--set", "rbac.scope=namespaces"].map(str::to_owned));
        arguments.extend(more.iter().map(ToString::to_string));
        arguments
    }

    async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.cluster.kubectl([&["--namespace", self.namespace], arguments].concat()).await
    }

    /// Waits until every component has pods and all of them are ready.
    async fn ready(&self) -> Result<()> {
        until("all pods are ready", MINUTES, async || {
            for component in ["operator", "etcd", "router", "relay", "worker"] {
                let selector = format!("app.kubernetes.io/component={component}");
                let path = "jsonpath={range .items[*]}{.status.conditions[?(@.type=='Ready')].status} {end}";
                let pods = self.kubectl(&["get", "pods", "--selector", &selector, "--output", path]).await?;
                let ready = !pods.trim().is_empty() && pods.split_whitespace().all(|ready| ready == "True");
                ensure!(ready, "{component}: {pods}");
            }
            Ok(Some(()))
        })
        .await
    }

    async fn secrets(&self) -> Result<String> {
        let names = [
            "antiphon-fleet-root",
            "antiphon-issuer",
            "antiphon-etcd-tls",
            "antiphon-etcd-client-tls",
            "antiphon-key-demo",
        ];
        self.kubectl(&[&["get", "secret", "--output=jsonpath={.items[*].data}"], &names[..]].concat()).await
    }

    /// Everything in the namespace but what Kubernetes itself puts there.
    async fn objects(&self) -> Result<BTreeSet<String>> {
        let kinds = self.cluster.kubectl(["api-resources", "--verbs=list", "--namespaced", "--output=name"]).await?;
        let kinds: Vec<&str> = kinds.lines().filter(|kind| !kind.starts_with("events")).collect();
        let objects = self.kubectl(&["get", &kinds.join(","), "--output=name", "--ignore-not-found"]).await?;
        let own = ["configmap/kube-root-ca.crt", "serviceaccount/default"];
        Ok(objects.lines().filter(|object| !own.contains(object)).map(str::to_owned).collect())
    }
}

#[tokio::test]
async fn a_release_is_installed_tested_upgraded_and_leaves_only_what_is_documented() -> Result<()> {
    let clusters = alone().await;
    let cluster = clusters.cluster(1);
    let archives = images::antiphon(clusters.world.clusters.tools(), &images::Programs::build().await?).await?;
    cluster.load(&archives).await?;
    let release = Release { cluster: cluster.clone(), namespace: "chart" };
    clusters.namespace(&cluster, release.namespace).await;
    let restricted = "pod-security.kubernetes.io/enforce=restricted";
    cluster.kubectl(["label", "namespace", release.namespace, restricted]).await?;

    cluster.helm(release.arguments("install", &[])).await?;
    release.ready().await?;
    cluster.helm(["test", Release::NAME, "--namespace", release.namespace]).await?;

    // Each of these pods takes its data with it.
    release.kubectl(&["delete", "pod", "antiphon-etcd-1"]).await?;
    release.ready().await?;
    let tls = ["--cacert=/etc/etcd/tls/ca.crt", "--cert=/etc/etcd/tls/tls.crt", "--key=/etc/etcd/tls/tls.key"];
    let asked = ["exec", "antiphon-etcd-0", "--container=etcd", "--", "/usr/local/bin/etcdctl", "member", "list"];
    let endpoint = format!("--endpoints=https://antiphon-etcd-0.antiphon-etcd.{}.svc:2379", release.namespace);
    let members = release.kubectl(&[&asked[..], &tls[..], &[endpoint.as_str()]].concat()).await?;
    assert_eq!(members.lines().filter(|member| member.contains(", started, ")).count(), 3, "{members}");

    let before = release.secrets().await?;
    cluster.helm(release.arguments("upgrade", &["--set", "operator.log=debug"])).await?;
    release.ready().await?;
    assert!(release.secrets().await? == before, "an upgrade replaced secrets");
    let fewer = cluster.helm(release.arguments("upgrade", &["--set", "etcd.managed.members=1"])).await;
    assert!(format!("{:#}", fewer.expect_err("fewer members")).contains("keep 3"));

    cluster.helm(["uninstall", Release::NAME, "--namespace", release.namespace, "--timeout", "5m"]).await?;
    let kept = ["secret/antiphon-fleet-root", "secret/antiphon-issuer"].map(str::to_owned).into();
    until("nothing is left but what is documented", MINUTES, async || {
        let left = release.objects().await?;
        ensure!(left == kept, "left: {left:?}");
        Ok(Some(()))
    })
    .await?;
    let everywhere =
        ["get", "clusterroles,clusterrolebindings", "--selector=app.kubernetes.io/name=antiphon", "--output=name"];
    let everywhere = cluster.kubectl(everywhere).await?;
    assert!(!everywhere.contains(&format!(":{}", release.namespace)), "{everywhere}");
    cluster.kubectl(["delete", "namespace", release.namespace]).await.map(drop)
}

const MINUTES: Duration = Duration::from_secs(180);
