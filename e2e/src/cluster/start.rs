//! From nothing to a cluster that takes work.

use std::fs;

use anyhow::{Context as _, Result};
use futures::future::try_join_all;

use super::Cluster;
use crate::{
    images::Archive,
    network::{API_SERVICE, Namespace, PREFIX},
    parts::{Part, audit_policy},
    pki::{Authority, Pair, Subject, write_private},
    progress,
};

impl Cluster {
    /// Makes networks, keys and processes, and waits until nodes and DNS are ready. `images` are those of every node.
    pub(crate) async fn up(&self, hub: &Namespace, images: &[Archive; 2]) -> Result<()> {
        let what = format!("starting cluster {}", self.number);
        let up = async {
            self.connect(hub).await?;
            self.prepare(images)?;
            self.start(Part::Etcd)?;
            self.start(Part::ApiServer)?;
            for node in self.nodes() {
                node.start()?;
            }
            self.ready().await?;
            for part in [Part::ControllerManager, Part::Scheduler, Part::LoadBalancers] {
                self.start(part)?;
            }
            self.apply(include_str!("../assets/dns.yaml")).await?;
            self.settled().await
        };
        progress::step(&what, up).await.with_context(|| format!("cluster {} has not come up", self.number))
    }

    /// Waits until all nodes are ready and names are answered.
    ///
    /// # Errors
    /// They are not within two minutes.
    pub async fn settled(&self) -> Result<()> {
        let nodes = self.nodes();
        try_join_all(nodes.iter().map(async |node| {
            let name = format!("node/{}", node.name());
            // It is there when its kubelet has registered it.
            self.kubectl(["wait", "--for=create", &name, "--timeout=120s"]).await?;
            self.kubectl(["wait", "--for=condition=Ready", &name, "--timeout=120s"]).await
        }))
        .await?;
        let dns = ["rollout", "status", "deployment/coredns", "--namespace=kube-system", "--timeout=120s"];
        self.kubectl(dns).await.map(drop)
    }

    /// A bridge of its own, with a link to the hub's.
    async fn connect(&self, hub: &Namespace) -> Result<()> {
        let (cloud, number) = (self.cloud(), self.number);
        cloud.add().await?;
        hub.ip(&format!(
            "link add c{number} type veth peer name uplink netns {}\nlink set c{number} master bridge up",
            cloud.name()
        ))
        .await?;
        cloud
            .ip(&format!(
                "link add bridge type bridge forward_delay 0
address add {}/{PREFIX} dev bridge
link set bridge up
link set uplink master bridge up",
                self.address()
            ))
            .await?;
        // Load balancers' addresses are routed: asked who has one, the cloud answers, whoever asks.
        let settings = [
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/bridge/send_redirects", "0"),
            ("ipv4/conf/bridge/proxy_arp_pvlan", "1"),
            // A flow stays with its node, whatever its addresses are.
            ("ipv4/fib_multipath_hash_policy", "1"),
        ];
        cloud.sysctl(&settings).await?;
        for node in self.nodes() {
            node.connect().await?;
        }
        Ok(())
    }

    /// Keys, configurations, directories.
    fn prepare(&self, images: &[Archive]) -> Result<()> {
        let home = self.home();
        for directory in ["etcd", "log", "pki"] {
            fs::create_dir_all(home.join(directory))?;
        }
        let pki = home.join("pki");
        let authority = Authority::new("kubernetes")?;
        authority.pair.write(&pki, "ca")?;
        let front = Authority::new("front-proxy")?;
        front.pair.write(&pki, "front-proxy-ca")?;
        let front_client = Subject { user: "front-proxy-client", ..Subject::default() };
        front.issue(&front_client)?.write(&pki, "front-proxy-client")?;
        Pair::bare()?.write(&pki, "service-accounts")?;
        let addresses = [self.address().into(), API_SERVICE.into(), std::net::Ipv4Addr::LOCALHOST.into()];
        let server = Subject { user: "kube-apiserver", hosts: &API_NAMES, addresses: &addresses, group: None };
        authority.issue(&server)?.write(&pki, "apiserver")?;
        let masters = Some("system:masters");
        let kubelet_client = Subject { user: "kube-apiserver", group: masters, ..Subject::default() };
        authority.issue(&kubelet_client)?.write(&pki, "apiserver-kubelet")?;
        for (name, user, group) in [
            ("admin", "admin", masters),
            ("controller-manager", "system:kube-controller-manager", None),
            ("scheduler", "system:kube-scheduler", None),
        ] {
            let pair = authority.issue(&Subject { user, group, ..Subject::default() })?;
            let config = authority.kubeconfig(&self.server(), &pair);
            write_private(&home.join(format!("{name}.kubeconfig")), &config)?;
        }
        write_private(&home.join("audit-policy.json"), &audit_policy().to_string())?;
        self.nodes().iter().try_for_each(|node| node.prepare(&authority, images))
    }
}

const API_NAMES: [&str; 5] =
    ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"];
