//! What clusters have to be for the other tests to mean anything.

use std::{net::Ipv4Addr, time::Duration};

use antiphon_e2e::{Caller, Cluster, Part, run, until};
use anyhow::Result;

use crate::world::{alone, shared};

#[tokio::test]
async fn pods_find_each_other_by_name() {
    let shared = shared().await;
    let cluster = shared.cluster(1);
    shared.namespace(&cluster, "names").await;
    cluster.apply(&echo("names", 7001)).await.unwrap();
    ready(&cluster, "names").await;
    let pod = ["get", "pods", "--namespace=names", "--selector=app=echo", "--output=jsonpath={.items[0].status.podIP}"];
    let pod = cluster.kubectl(pod).await.unwrap();
    let addresses = in_pod(&cluster, "names", &["resolve", "headless.names.svc.cluster.local"]).await;
    assert_eq!(addresses.trim(), pod, "a headless Service names its pods");
    let service = in_pod(&cluster, "names", &["resolve", "local"]).await;
    assert!(service.starts_with("10.96."), "{service}");
    let answer = in_pod(&cluster, "names", &["ask", "http", "local:7000", "hello"]).await;
    assert_is_own(&answer, "hello");
    // Its own Service leads a pod to itself.
    let itself = ["exec", "--namespace=names", "deployment/echo", "--", "/probe", "ask", "http", "local:7000", "self"];
    let answer = cluster.kubectl(itself).await.unwrap();
    assert!(answer.trim().ends_with(" self"), "{answer}");
}

#[tokio::test]
async fn pods_see_the_callers_own_address_and_port() {
    let shared = shared().await;
    let cluster = shared.cluster(1);
    let caller = shared.caller(1).await;
    shared.namespace(&cluster, "ports").await;
    cluster.apply(&echo("ports", 7002)).await.unwrap();
    ready(&cluster, "ports").await;
    let node = cluster.node(1).address();
    ask_from(&cluster, &caller, &format!("{node}:7002"), "by the host's port").await.unwrap();
    let port = service(&cluster, "ports", "{.spec.ports[0].nodePort}").await.unwrap();
    ask_from(&cluster, &caller, &format!("{node}:{port}"), "by the node's port").await.unwrap();
    let ingress = "{.status.loadBalancer.ingress[0].ip}";
    let balancer = until("an address of the Service", Duration::from_secs(20), async || {
        Ok(service(&cluster, "ports", ingress).await?.parse::<Ipv4Addr>().ok())
    });
    let balancer = balancer.await.unwrap();
    ask_from(&cluster, &caller, &format!("{balancer}:7000"), "by the load balancer").await.unwrap();
    // This machine is outside as well.
    let mut probe = tokio::process::Command::new(shared.world.clusters.tools().probe().await.unwrap());
    let answer = run(probe.args(["ask", "udp", &format!("{balancer}:7000"), "host"])).await.unwrap();
    assert_is_own(&answer, "host");
    assert!(answer.starts_with(&shared.world.clusters.host().to_string()), "{answer}");
    caller.remove().await.unwrap();
}

#[tokio::test]
async fn a_cluster_that_is_cut_off_stays_whole_and_comes_back() {
    let alone = alone().await;
    let (cut, other) = (alone.cluster(1), alone.cluster(2));
    cut.cut().await.unwrap();
    let request = ["get", "nodes", "--request-timeout=1s"];
    assert!(cut.kubectl(request).await.is_err(), "nobody outside reaches it");
    other.kubectl(request).await.unwrap();
    let mut inside = cut.cloud().command(alone.world.clusters.tools().program("kubectl"));
    inside.env("KUBECONFIG", cut.kubeconfig()).args(["create", "namespace", "meanwhile"]);
    run(&mut inside).await.unwrap();
    cut.join().await.unwrap();
    cut.ready().await.unwrap();
    cut.kubectl(["delete", "namespace", "meanwhile"]).await.unwrap();
}

#[tokio::test]
async fn pods_serve_while_the_control_plane_is_gone_and_it_forgets_nothing() {
    let alone = alone().await;
    let cluster = alone.cluster(1);
    let caller = alone.caller(2).await;
    alone.namespace(&cluster, "outage").await;
    cluster.apply(&echo("outage", 7003)).await.unwrap();
    ready(&cluster, "outage").await;
    let address = format!("{}:7003", cluster.node(1).address());
    cluster.kill(Part::ApiServer).await.unwrap();
    cluster.kill(Part::Etcd).await.unwrap();
    assert!(cluster.kubectl(["get", "nodes", "--request-timeout=1s"]).await.is_err());
    ask_from(&cluster, &caller, &address, "meanwhile").await.unwrap();
    cluster.start(Part::Etcd).unwrap();
    cluster.start(Part::ApiServer).unwrap();
    cluster.ready().await.unwrap();
    cluster.settled().await.unwrap();
    cluster.kubectl(["get", "deployment/echo", "--namespace=outage"]).await.unwrap();
    caller.remove().await.unwrap();
}

#[tokio::test]
async fn a_node_that_lost_its_power_runs_its_pods_again() {
    let alone = alone().await;
    let cluster = alone.cluster(2);
    let caller = alone.caller(3).await;
    alone.namespace(&cluster, "power").await;
    cluster.apply(&echo("power", 7004)).await.unwrap();
    ready(&cluster, "power").await;
    let node = cluster.node(1);
    let address = format!("{}:7004", node.address());
    ask_from(&cluster, &caller, &address, "before").await.unwrap();
    node.kill().await.unwrap();
    assert!(node.command("true").is_err(), "nothing runs there");
    node.start().unwrap();
    until("an answer of the restarted pod", Duration::from_secs(90), async || {
        ask_from(&cluster, &caller, &address, "after").await.map(Some)
    })
    .await
    .unwrap();
    caller.remove().await.unwrap();
}

/// Asks a pod by UDP, as a caller, and checks that it sees whom it answers.
async fn ask_from(cluster: &Cluster, caller: &Caller, address: &str, text: &str) -> Result<()> {
    let probe = cluster.tools().probe().await?;
    let answer = run(caller.command(probe).args(["ask", "udp", address, text])).await?;
    assert_is_own(&answer, text);
    assert!(answer.starts_with(&caller.address().to_string()), "{answer}");
    Ok(())
}

/// What asked prints its own address, then the address that was seen, with the text.
fn assert_is_own(printed: &str, text: &str) {
    let (own, answer) = printed.trim().split_once('\n').unwrap();
    assert_eq!(answer, format!("{own} {text}"));
}

/// Runs the probe in a pod of its own; what it says.
async fn in_pod(cluster: &Cluster, namespace: &str, arguments: &[&str]) -> String {
    let namespace = format!("--namespace={namespace}");
    let start =
        ["run", "asker", &namespace, "--image=antiphon/probe:1", "--image-pull-policy=Never", "--restart=Never"];
    cluster.kubectl([&start[..], &["--"], arguments].concat()).await.unwrap();
    let succeeded = "--for=jsonpath={.status.phase}=Succeeded";
    let ended = cluster.kubectl(["wait", succeeded, "pod/asker", &namespace, "--timeout=60s"]).await;
    let said = cluster.kubectl(["logs", "asker", &namespace]).await.unwrap();
    ended.unwrap_or_else(|error| panic!("{error:#}: {said}"));
    cluster.kubectl(["delete", "pod", "asker", &namespace, "--now", "--wait"]).await.unwrap();
    said
}

async fn ready(cluster: &Cluster, namespace: &str) {
    let namespace = format!("--namespace={namespace}");
    cluster.kubectl(["rollout", "status", "deployment/echo", &namespace, "--timeout=60s"]).await.unwrap();
}

async fn service(cluster: &Cluster, namespace: &str, path: &str) -> Result<String> {
    let (namespace, path) = (format!("--namespace={namespace}"), format!("--output=jsonpath={path}"));
    cluster.kubectl(["get", "service/local", &namespace, &path]).await
}

/// A pod that tells callers who they are, and everything that leads to it. Each test has a port of its own on the node.
fn echo(namespace: &str, host_port: u16) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: echo, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: echo}}}}
  strategy: {{type: Recreate}}
  template:
    metadata: {{labels: {{app: echo}}}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: echo
          image: antiphon/probe:1
          imagePullPolicy: Never
          args: [serve, '7000']
          ports: [{{containerPort: 7000, protocol: UDP, hostPort: {host_port}}}]
          readinessProbe: {{httpGet: {{path: /, port: 7000}}, periodSeconds: 1}}
          resources: {{limits: {{cpu: 500m, memory: 64Mi}}}}
          securityContext:
            allowPrivilegeEscalation: false
            capabilities: {{drop: [ALL]}}
            readOnlyRootFilesystem: true
            runAsNonRoot: true
            seccompProfile: {{type: RuntimeDefault}}
---
apiVersion: v1
kind: Service
metadata: {{name: local, namespace: {namespace}}}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  selector: {{app: echo}}
  ports:
    - {{name: udp, port: 7000, protocol: UDP}}
    - {{name: http, port: 7000, protocol: TCP}}
---
apiVersion: v1
kind: Service
metadata: {{name: headless, namespace: {namespace}}}
spec:
  clusterIP: None
  selector: {{app: echo}}
  ports: [{{name: udp, port: 7000, protocol: UDP}}]
"
    )
}
