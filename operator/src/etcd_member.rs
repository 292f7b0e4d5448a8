//! `antiphon-operator etcd-member`: prepares one member of the managed etcd before etcd itself starts.
//!
//! etcd cannot replace a member that has lost its data: started as before it refuses, as its peers know it already. So the
//! member is taken out of the cluster and added anew, and etcd is told to join instead of to found. A cluster that grows
//! is the same without the taking out. Everybody else's data decide; nothing is done to members that run.

use std::{fs, net::IpAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use tokio::{
    net::lookup_host,
    time::{Instant, sleep, timeout},
};

/// `antiphon-operator etcd-member`.
#[derive(clap::Args, Clone, Debug)]
pub struct EtcdMemberArgs {
    /// Name of this member: its pod's, which ends in its number.
    #[arg(long)]
    pub name: String,
    /// Address of this pod, to listen at.
    #[arg(long)]
    pub address: IpAddr,
    /// Domain of the members: `SERVICE.NAMESPACE.svc`.
    #[arg(long)]
    pub domain: String,
    /// How many members there are, 1 to 9.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=9))]
    pub members: u8,
    /// Directory with tls.crt, tls.key and ca.crt.
    #[arg(long)]
    pub tls: PathBuf,
    /// What all members have in common of etcd's configuration (YAML).
    #[arg(long)]
    pub config: PathBuf,
    /// etcd's data directory.
    #[arg(long)]
    pub data: PathBuf,
    /// Where to write the member's whole configuration.
    #[arg(long)]
    pub output: PathBuf,
}

/// A member as the others list it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    id: u64,
    /// Empty: added and not started since.
    name: String,
    peer_url: String,
    /// It has run: it said where its clients reach it.
    published: bool,
}

/// What a member finds when it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    /// It has its data.
    has_data: bool,
    /// What the others say, if any of them answers.
    listed: Option<Vec<Listed>>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Take this one out: it is our former life.
    Remove(u64),
    /// Add this member.
    Add,
    /// Start etcd.
    Start {
        /// `initial-cluster-state`.
        state: &'static str,
        /// `initial-cluster`.
        cluster: String,
    },
}

/// The names and addresses of all members.
#[derive(Clone, Debug)]
struct Members {
    own: String,
    prefix: String,
    domain: String,
    count: u8,
}

impl Members {
    fn new(args: &EtcdMemberArgs) -> anyhow::Result<Self> {
        let (prefix, number) = args.name.rsplit_once('-').context("--name: expected NAME-NUMBER")?;
        let number: u8 = number.parse().context("--name: expected NAME-NUMBER")?;
        if number >= args.members {
            bail!("--name {}: there are {} members, numbered from 0", args.name, args.members);
        }
        Ok(Self { own: args.name.clone(), prefix: prefix.to_owned(), domain: args.domain.clone(), count: args.members })
    }

    fn names(&self) -> impl Iterator<Item = String> {
        (0..self.count).map(|number| format!("{}-{number}", self.prefix))
    }

    fn peer_url(&self, name: &str) -> String {
        format!("https://{name}.{}:{PEER}", self.domain)
    }

    fn client_url(&self, name: &str) -> String {
        format!("https://{name}.{}:{CLIENT}", self.domain)
    }

    /// As `initial-cluster` has it, if all members found the cluster together.
    fn all(&self) -> String {
        let entries: Vec<String> = self.names().map(|name| format!("{name}={}", self.peer_url(&name))).collect();
        entries.join(",")
    }

    fn plan(&self, found: &Found) -> Step {
        let founding = || Step::Start { state: "new", cluster: self.all() };
        // With data etcd does not look at the initial cluster.
        let (false, Some(listed)) = (found.has_data, &found.listed) else {
            return founding();
        };
        let own = self.peer_url(&self.own);
        match listed.iter().find(|member| member.peer_url == own || member.name == self.own) {
            None => Step::Add,
            Some(former) if former.published => Step::Remove(former.id),
            Some(added) if added.name.is_empty() => Step::Start { state: "existing", cluster: self.of(listed) },
            // Of those who found the cluster together, and not started yet.
            Some(_) => founding(),
        }
    }

    fn of(&self, listed: &[Listed]) -> String {
        let entries: Vec<String> = listed
            .iter()
            .map(|member| {
                let host = member.peer_url.trim_start_matches("https://");
                let name = host.split(['.', ':']).next().unwrap_or_default();
                format!("{name}={}", member.peer_url)
            })
            .collect();
        entries.join(",")
    }

    /// The member's configuration: what all have in common, then its own.
    fn config(&self, common: &str, address: IpAddr, state: &str, cluster: &str) -> String {
        let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let (own, peer, client) = (&self.own, self.peer_url(&self.own), self.client_url(&self.own));
        format!(
            "{}\nname: {own}\nlisten-peer-urls: https://{host}:{PEER}\nlisten-client-urls: https://{host}:{CLIENT}\n\
             listen-metrics-urls: http://{host}:{METRICS}\ninitial-advertise-peer-urls: {peer}\n\
             advertise-client-urls: {client}\ninitial-cluster: {cluster}\ninitial-cluster-state: {state}\n",
            common.trim_end()
        )
    }
}

/// Prepares the member; returns when etcd can be started.
///
/// # Errors
/// Files that cannot be read or written, or a cluster that does not take the member back for a minute.
pub async fn run(args: &EtcdMemberArgs) -> anyhow::Result<()> {
    let members = Members::new(args)?;
    let common = fs::read_to_string(&args.config).with_context(|| args.config.display().to_string())?;
    let deadline = Instant::now() + PATIENCE;
    named(&members, args.address, deadline).await;
    loop {
        match step(&members, args).await {
            Ok(Some((state, cluster))) => {
                tracing::info!(state, cluster, "etcd may start");
                let config = members.config(&common, args.address, state, &cluster);
                return fs::write(&args.output, config).with_context(|| args.output.display().to_string());
            }
            Ok(None) => {}
            // etcd changes its members only while all of the others have been connected for some seconds.
            Err(error) if Instant::now() < deadline => {
                tracing::info!("not yet: {error:#}");
                sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Waits until the member's name stands for its address. The others look it up to see whose certificate it shows, and
/// refuse a stranger's.
async fn named(members: &Members, address: IpAddr, deadline: Instant) {
    let host = format!("{}.{}:{PEER}", members.own, members.domain);
    loop {
        if lookup_host(&host).await.is_ok_and(|mut found| found.any(|found| found.ip() == address)) {
            return;
        }
        if Instant::now() >= deadline {
            tracing::warn!(host, %address, "the name does not stand for this address yet");
            return;
        }
        sleep(PAUSE).await;
    }
}

/// Looks and does one thing; the state and members to start etcd with when there is nothing left to do.
async fn step(members: &Members, args: &EtcdMemberArgs) -> anyhow::Result<Option<(&'static str, String)>> {
    let has_data = holds_data(&args.data)?;
    let others = if has_data { None } else { Others::connect(members, args).await };
    let (client, listed) = others.map_or((None, None), |others| (Some(others.client), Some(others.listed)));
    match members.plan(&Found { has_data, listed }) {
        Step::Start { state, cluster } => return Ok(Some((state, cluster))),
        Step::Remove(id) => {
            tracing::warn!(id = format!("{id:x}"), "came without its data: taking its former life out of the cluster");
            let mut client = client.context("nobody to ask")?;
            timeout(ANSWER, client.member_remove(id)).await.context("no answer")?.context("removing the member")?;
        }
        Step::Add => {
            tracing::info!("joining the cluster");
            let mut client = client.context("nobody to ask")?;
            let adding = client.member_add([members.peer_url(&members.own)], None);
            timeout(ANSWER, adding).await.context("no answer")?.context("adding the member")?;
        }
    }
    Ok(None)
}

/// A connection to any of the other members, and its list.
struct Others {
    client: Client,
    listed: Vec<Listed>,
}

impl Others {
    async fn connect(members: &Members, args: &EtcdMemberArgs) -> Option<Self> {
        for name in members.names().filter(|name| *name != members.own) {
            let url = members.client_url(&name);
            match timeout(ANSWER, Self::ask(&url, args)).await {
                Ok(Ok(others)) => return Some(others),
                Ok(Err(error)) => tracing::info!(%url, %error, "does not answer"),
                Err(_) => tracing::info!(%url, "does not answer in time"),
            }
        }
        None
    }

    async fn ask(url: &str, args: &EtcdMemberArgs) -> anyhow::Result<Self> {
        let read = |file: &str| {
            let path = args.tls.join(file);
            fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(read("ca.crt")?))
            .identity(Identity::from_pem(read("tls.crt")?, read("tls.key")?));
        let options = ConnectOptions::new().with_tls(tls).with_connect_timeout(ANSWER);
        let mut client = Client::connect([url], Some(options)).await?;
        let answer = client.member_list().await?;
        let listed = answer.members().iter().map(|member| Listed {
            id: member.id(),
            name: member.name().to_owned(),
            peer_url: member.peer_urls().first().cloned().unwrap_or_default(),
            published: !member.client_urls().is_empty(),
        });
        Ok(Self { listed: listed.collect(), client })
    }
}

/// Whether etcd has written anything there.
fn holds_data(data: &std::path::Path) -> anyhow::Result<bool> {
    let log = data.join("member").join("wal");
    match fs::read_dir(&log) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| log.display().to_string()),
    }
}

const CLIENT: u16 = 2379;
const PEER: u16 = 2380;
const METRICS: u16 = 2381;
/// Longest wait for one member.
const ANSWER: Duration = Duration::from_secs(5);
/// Between attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// How long to try; Kubernetes tries again after that.
const PATIENCE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn members() -> Members {
        Members { own: "etcd-1".into(), prefix: "etcd".into(), domain: "etcd.antiphon.svc".into(), count: 3 }
    }

    fn listed(id: u64, name: &str, published: bool) -> Listed {
        Listed { id, name: name.into(), peer_url: format!("https://etcd-{id}.etcd.antiphon.svc:2380"), published }
    }

    fn plan(has_data: bool, listed: Option<Vec<Listed>>) -> Step {
        members().plan(&Found { has_data, listed })
    }

    fn founding() -> Step {
        let cluster = "etcd-0=https://etcd-0.etcd.antiphon.svc:2380,etcd-1=https://etcd-1.etcd.antiphon.svc:2380,\
                       etcd-2=https://etcd-2.etcd.antiphon.svc:2380";
        Step::Start { state: "new", cluster: cluster.into() }
    }

    #[test]
    fn a_new_cluster_is_founded_by_all() {
        assert_eq!(plan(false, None), founding());
        // Two of three are enough to answer; the third has never run.
        let others = vec![listed(0, "etcd-0", true), listed(1, "etcd-1", false), listed(2, "etcd-2", true)];
        assert_eq!(plan(false, Some(others)), founding());
    }

    #[test]
    fn a_member_with_its_data_changes_nothing() {
        let everybody = vec![listed(0, "etcd-0", true), listed(1, "etcd-1", true), listed(2, "etcd-2", true)];
        assert_eq!(plan(true, Some(everybody)), founding());
        assert_eq!(plan(true, None), founding());
    }

    #[test]
    fn a_member_that_lost_its_data_goes_out_and_comes_in_again() {
        let mut others = vec![listed(0, "etcd-0", true), listed(1, "etcd-1", true), listed(2, "etcd-2", true)];
        assert_eq!(plan(false, Some(others.clone())), Step::Remove(1));
        others.remove(1);
        assert_eq!(plan(false, Some(others.clone())), Step::Add);
        others.push(listed(1, "", false));
        let Step::Start { state, cluster } = plan(false, Some(others)) else { panic!("it is in") };
        assert_eq!(state, "existing");
        let mut entries: Vec<&str> = cluster.split(',').collect();
        entries.sort_unstable();
        assert_eq!(entries[1], "etcd-1=https://etcd-1.etcd.antiphon.svc:2380");
        assert_eq!(entries.len(), 3);
    }

    #[test]
    fn a_cluster_of_one_grows() {
        assert_eq!(plan(false, Some(vec![listed(0, "etcd-0", true)])), Step::Add);
        let Step::Start { state, cluster } = plan(false, Some(vec![listed(0, "etcd-0", true), listed(1, "", false)]))
        else {
            panic!("it is in")
        };
        assert_eq!(state, "existing");
        assert!(!cluster.contains("etcd-2"), "{cluster}");
    }

    #[test]
    fn the_configuration_names_the_pod() {
        let config = members().config("data-dir: /data\n", "fd00::7".parse().expect("an address"), "new", "a=b");
        assert!(
            config.starts_with("data-dir: /data\nname: etcd-1\nlisten-peer-urls: https://[fd00::7]:2380\n"),
            "{config}"
        );
        assert!(config.contains("advertise-client-urls: https://etcd-1.etcd.antiphon.svc:2379\n"), "{config}");
        assert!(config.ends_with("initial-cluster: a=b\ninitial-cluster-state: new\n"), "{config}");
    }

    #[test]
    fn a_data_directory_counts_once_etcd_has_written_there() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(!holds_data(dir.path()).expect("readable"));
        fs::create_dir_all(dir.path().join("member/wal")).expect("writable");
        assert!(!holds_data(dir.path()).expect("readable"));
        fs::write(dir.path().join("member/wal/0.wal"), "x").expect("writable");
        assert!(holds_data(dir.path()).expect("readable"));
    }
}
