//! The processes of a cluster and how each is told what to do.

use std::path::Path;

use serde_json::{Value, json};

use crate::network::{self, Network, SERVICES};

/// A process of a cluster's control plane, or what stands for its cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The cluster's own etcd.
    Etcd,
    /// kube-apiserver.
    ApiServer,
    /// kube-controller-manager.
    ControllerManager,
    /// kube-scheduler.
    Scheduler,
    /// What gives addresses to Services of type LoadBalancer.
    LoadBalancers,
}

impl Part {
    /// All of them, in the order to start them.
    pub const ALL: [Self; 5] =
        [Self::Etcd, Self::ApiServer, Self::ControllerManager, Self::Scheduler, Self::LoadBalancers];

    /// The name of its program.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::ApiServer => "kube-apiserver",
            Self::ControllerManager => "kube-controller-manager",
            Self::Scheduler => "kube-scheduler",
            Self::LoadBalancers => "load-balancers",
        }
    }

    /// What it is told. `home` is the cluster's directory.
    pub(crate) fn arguments(self, home: &Path, network: Network, cluster: u8) -> Vec<String> {
        let pki = |name: &str| home.join("pki").join(name).display().to_string();
        let file = |name: &str| home.join(name).display().to_string();
        let kubeconfig = |name: &str| file(&format!("{name}.kubeconfig"));
        let address = network.control_plane(cluster);
        let options: Vec<(&str, String)> = match self {
            Self::Etcd => vec![
                ("data-dir", file("etcd")),
                ("listen-client-urls", ETCD.into()),
                ("advertise-client-urls", ETCD.into()),
                ("listen-peer-urls", "http://127.0.0.1:2380".into()),
                // What the machine itself forgets when it loses its power, no test asks for again.
                ("unsafe-no-fsync", "true".into()),
                ("log-level", "warn".into()),
            ],
            Self::ApiServer => vec![
                ("etcd-servers", ETCD.into()),
                ("advertise-address", address.to_string()),
                ("secure-port", API_PORT.to_string()),
                ("service-cluster-ip-range", SERVICES.into()),
                ("authorization-mode", "Node,RBAC".into()),
                ("enable-admission-plugins", "NodeRestriction".into()),
                ("endpoint-reconciler-type", "lease".into()),
                ("allow-privileged", "true".into()),
                ("profiling", "false".into()),
                ("client-ca-file", pki("ca.crt")),
                ("tls-cert-file", pki("apiserver.crt")),
                ("tls-private-key-file", pki("apiserver.key")),
                ("kubelet-certificate-authority", pki("ca.crt")),
                // Nodes have no names that could be resolved.
                ("kubelet-preferred-address-types", "InternalIP".into()),
                ("kubelet-client-certificate", pki("apiserver-kubelet.crt")),
                ("kubelet-client-key", pki("apiserver-kubelet.key")),
                ("service-account-issuer", "https://kubernetes.default.svc.cluster.local".into()),
                ("service-account-key-file", pki("service-accounts.crt")),
                ("service-account-signing-key-file", pki("service-accounts.key")),
                ("requestheader-client-ca-file", pki("front-proxy-ca.crt")),
                ("requestheader-allowed-names", "front-proxy-client".into()),
                ("requestheader-extra-headers-prefix", "X-Remote-Extra-".into()),
                ("requestheader-group-headers", "X-Remote-Group".into()),
                ("requestheader-username-headers", "X-Remote-User".into()),
                ("proxy-client-cert-file", pki("front-proxy-client.crt")),
                ("proxy-client-key-file", pki("front-proxy-client.key")),
                ("audit-policy-file", file("audit-policy.json")),
                ("audit-log-path", file("log/audit.log")),
            ],
            Self::ControllerManager => vec![
                ("kubeconfig", kubeconfig("controller-manager")),
                ("authentication-kubeconfig", kubeconfig("controller-manager")),
                ("authorization-kubeconfig", kubeconfig("controller-manager")),
                ("bind-address", "127.0.0.1".into()),
                ("cluster-cidr", network::pods(cluster)),
                ("cluster-signing-cert-file", pki("ca.crt")),
                ("cluster-signing-key-file", pki("ca.key")),
                ("root-ca-file", pki("ca.crt")),
                ("service-account-private-key-file", pki("service-accounts.key")),
                ("service-cluster-ip-range", SERVICES.into()),
                ("use-service-account-credentials", "true".into()),
                ("leader-elect", "false".into()),
                ("profiling", "false".into()),
            ],
            Self::Scheduler => vec![
                ("kubeconfig", kubeconfig("scheduler")),
                ("authentication-kubeconfig", kubeconfig("scheduler")),
                ("authorization-kubeconfig", kubeconfig("scheduler")),
                ("bind-address", "127.0.0.1".into()),
                ("leader-elect", "false".into()),
                ("profiling", "false".into()),
            ],
            Self::LoadBalancers => {
                let addresses: Vec<_> = network.load_balancers(cluster).map(|address| address.to_string()).collect();
                vec![("kubeconfig", kubeconfig("admin")), ("addresses", addresses.join(","))]
            }
        };
        let command = (self == Self::LoadBalancers).then(|| "load-balancers".to_owned());
        command.into_iter().chain(options.into_iter().map(|(name, value)| format!("--{name}={value}"))).collect()
    }
}

/// Writes only, and no more of them than who did what to which object.
pub(crate) fn audit_policy() -> Value {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            { "level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"] },
            { "level": "None" },
        ],
    })
}

/// How a node's kubelet is told what to do.
pub(crate) fn kubelet(network: Network, cluster: u8, node: u8, cgroup: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": network.node(cluster, node),
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": format!("{NODE_HOME}/pki/ca.crt") },
        },
        "authorization": { "mode": "Webhook" },
        "tlsCertFile": format!("{NODE_HOME}/pki/kubelet.crt"),
        "tlsPrivateKeyFile": format!("{NODE_HOME}/pki/kubelet.key"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "failCgroupV1": false,
        "failSwapOn": false,
        "clusterDNS": [network::DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "resolvConf": format!("{NODE_HOME}/resolv.conf"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "nodeStatusUpdateFrequency": "5s",
        "evictionHard": {
            "memory.available": "50Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%",
        },
        "imageGCHighThresholdPercent": 100,
        "serializeImagePulls": false,
        "maxPods": 200,
    })
}

/// How a node's proxy for Services is told what to do.
pub(crate) fn proxy(cluster: u8, name: &str) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": network::pods(cluster),
        "hostnameOverride": name,
        "clientConnection": { "kubeconfig": format!("{NODE_HOME}/proxy.kubeconfig") },
        // The machine's own connection tracking is not a node's to change.
        "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
    })
}

/// How a node's containerd is told what to do (its configuration, version 2).
pub(crate) fn containerd(cni: &Path, pause: &str) -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{}"
    conf_dir = "{NODE_HOME}/cni"
"#,
        cni.display()
    )
}

/// How a node's pods are connected: routed one by one, so that packets between neighbours meet the rules for Services.
pub(crate) fn cni(cluster: u8, node: u8) -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{ "subnet": network::pods_of(cluster, node) }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}

/// What leaves the cluster has the node's address; what stays inside keeps its own.
pub(crate) fn masquerade(network: Network, cluster: u8, node: u8) -> String {
    format!(
        "table ip antiphon {{
    chain leaving {{
        type nat hook postrouting priority srcnat
        ip saddr {} ip daddr != {{ {}, {} }} masquerade
    }}
}}
",
        network::pods_of(cluster, node),
        network::pods(cluster),
        network.cluster(cluster)
    )
}

/// Where a node's own files are, for its own processes.
pub(crate) const NODE_HOME: &str = "/run/node";
/// Of the API server.
pub(crate) const API_PORT: u16 = 6443;
const ETCD: &str = "http://127.0.0.1:2379";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_told_where_its_files_are() {
        let network = Network::numbered(1).unwrap();
        for part in Part::ALL {
            let arguments = part.arguments(Path::new("/somewhere/2"), network, 2);
            assert!(arguments.iter().any(|argument| argument.contains("=/somewhere/2/")), "{arguments:?}");
        }
        let api = Part::ApiServer.arguments(Path::new("/x"), network, 2);
        assert!(api.contains(&"--advertise-address=198.18.18.1".to_owned()), "{api:?}");
    }
}
