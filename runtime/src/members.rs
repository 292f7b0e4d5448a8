//! Names that stand for several processes, and one task for each of those.
//!
//! A name is looked up every few seconds, and at once when a connection to one of its addresses ends. Who is new gets a
//! task; a task ends when its address is no longer named *and* it is not connected: that a name server leaves somebody
//! out is no evidence that anything is gone, and a failed lookup says nothing at all.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::{sync::Notify, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::Tasks;

/// Finds the addresses of `HOST:PORT`.
pub trait Resolver: Debug + Send + Sync {
    /// All of them; an `IP:PORT` is its own.
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>>;
}

/// The system's resolver.
#[derive(Clone, Copy, Debug, Default)]
pub struct System;

impl Resolver for System {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        Box::pin(async move {
            let found = timeout(LOOKUP, tokio::net::lookup_host(name)).await;
            Ok(found.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??.collect())
        })
    }
}

/// Who is named, and who has a task; a machine without I/O.
#[derive(Debug, Default)]
pub struct Roster {
    named: BTreeMap<String, BTreeSet<SocketAddr>>,
    present: BTreeSet<SocketAddr>,
}

/// What to begin and to end.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Addresses that get a task.
    pub joined: Vec<SocketAddr>,
    /// Addresses whose task ends.
    pub left: Vec<SocketAddr>,
}

impl Roster {
    /// Takes the answer to a lookup; an empty one counts as failed.
    ///
    /// Where a name has addresses of both IP versions, each process has one of each: those of IPv4 are taken, as two
    /// connections to one process would only drive each other out.
    pub fn answered(&mut self, name: &str, addresses: &[SocketAddr]) {
        let canonical = addresses.iter().map(|a| SocketAddr::new(a.ip().to_canonical(), a.port()));
        let mut named: BTreeSet<SocketAddr> = canonical.filter(|a| a.port() != 0).collect();
        if named.iter().any(SocketAddr::is_ipv4) {
            named.retain(SocketAddr::is_ipv4);
        }
        if named.len() > MOST {
            tracing::warn!(name, addresses = named.len(), "too many addresses: the first {MOST} are used");
            named = named.into_iter().take(MOST).collect();
        }
        if !named.is_empty() {
            self.named.insert(name.to_owned(), named);
        }
    }

    /// What to do now; it counts as done. Who is `connected` stays.
    pub fn plan(&mut self, connected: impl Fn(SocketAddr) -> bool) -> Change {
        let named: BTreeSet<SocketAddr> = self.named.values().flatten().copied().collect();
        let joined = named.difference(&self.present).copied().collect::<Vec<_>>();
        let gone = self.present.difference(&named);
        let left = gone.copied().filter(|address| !connected(*address)).collect::<Vec<_>>();
        self.present.extend(&joined);
        for address in &left {
            self.present.remove(address);
        }
        Change { joined, left }
    }

    /// How many names have never been found.
    #[must_use]
    pub fn unknown(&self, names: &[String]) -> usize {
        names.iter().filter(|name| !self.named.contains_key(*name)).count()
    }
}

/// One address with a task.
#[derive(Clone, Debug)]
pub struct Member {
    /// Where it is.
    pub address: SocketAddr,
    left: CancellationToken,
    connections: Arc<AtomicUsize>,
    again: Arc<Notify>,
}

/// A connection that keeps its address from being given up.
#[derive(Debug)]
pub struct Connected {
    connections: Arc<AtomicUsize>,
    again: Arc<Notify>,
}

impl Member {
    /// Says that there is a connection for as long as the value lives; at its end names are looked up again.
    #[must_use]
    pub fn connected(&self) -> Connected {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Connected { connections: self.connections.clone(), again: self.again.clone() }
    }

    /// Fires when the address is given up; not at the stop, which tasks look at by themselves.
    #[must_use]
    pub const fn left(&self) -> &CancellationToken {
        &self.left
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
        self.again.notify_one();
    }
}

/// Keeps a task, made by `start`, for every address that `names` stand for, until the stop.
///
/// # Errors
/// Never: what cannot be found is looked up again.
pub async fn follow<F>(
    names: Vec<String>,
    resolver: Arc<dyn Resolver>,
    tasks: Tasks,
    mut start: impl FnMut(Member) -> F + Send,
) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let stopping = tasks.stopping();
    let again = Arc::new(Notify::new());
    let mut roster = Roster::default();
    let mut members: BTreeMap<SocketAddr, Member> = BTreeMap::new();
    let mut unheard = BTreeSet::new();
    loop {
        for name in &names {
            match stopping.run_until_cancelled(resolver.resolve(name)).await {
                None => return Ok(()),
                Some(Ok(addresses)) => {
                    unheard.remove(name);
                    roster.answered(name, &addresses);
                }
                Some(Err(error)) => {
                    if unheard.insert(name.clone()) {
                        tracing::warn!(name, %error, "name not found; it is looked up again and again");
                    }
                }
            }
        }
        let connected = |a: SocketAddr| members.get(&a).is_some_and(|m| m.connections.load(Ordering::Relaxed) > 0);
        let Change { joined, left } = roster.plan(connected);
        for address in left {
            tracing::info!(%address, "no longer named and not connected: given up");
            if let Some(member) = members.remove(&address) {
                member.left.cancel();
            }
        }
        for address in joined {
            let member =
                Member { address, left: CancellationToken::new(), connections: Arc::default(), again: again.clone() };
            members.insert(address, member.clone());
            tasks.spawn("member", start(member));
        }
        let pause = async {
            // A connection that ends at once must not make lookups of every moment.
            tokio::time::sleep(SHORTEST).await;
            let _ = timeout(INTERVAL, again.notified()).await;
        };
        if stopping.run_until_cancelled(pause).await.is_none() {
            return Ok(());
        }
    }
}

/// Far more routers than a region has.
const MOST: usize = 64;
const LOOKUP: Duration = Duration::from_secs(5);
const INTERVAL: Duration = Duration::from_secs(4);
const SHORTEST: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use parking_lot::Mutex;
    use tokio::sync::mpsc;

    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn additions_are_followed_and_removals_once_nothing_is_connected() {
        let [a, b, c] = ["10.0.0.1:7444", "10.0.0.2:7444", "10.0.0.3:7444"];
        let mut roster = Roster::default();
        assert_eq!(roster.plan(|_| false), Change::default());
        roster.answered("r", &addresses(&[b, a]));
        assert_eq!(roster.plan(|_| false).joined, addresses(&[a, b]));
        assert_eq!(roster.plan(|_| false), Change::default());
        roster.answered("r", &addresses(&[b, c]));
        let on_a = |address: SocketAddr| address == addresses(&[a])[0];
        assert_eq!(roster.plan(on_a), Change { joined: addresses(&[c]), left: vec![] }, "a lives: it stays");
        assert_eq!(roster.plan(|_| false), Change { joined: vec![], left: addresses(&[a]) });
        // Nobody there is what a name server says that knows nothing.
        roster.answered("r", &[]);
        assert_eq!(roster.plan(|_| false), Change::default());
        // Another name holds the same address.
        roster.answered("s", &addresses(&[c]));
        roster.answered("r", &addresses(&[b]));
        assert_eq!(roster.plan(|_| false), Change::default());
        assert_eq!(roster.unknown(&["r".into(), "t".into()]), 1);
    }

    #[test]
    fn a_process_is_one_member_whatever_its_ip_versions() {
        let mut roster = Roster::default();
        roster.answered("r", &addresses(&["[fd00::1]:7444", "10.0.0.1:7444", "[::ffff:10.0.0.1]:7444"]));
        assert_eq!(roster.plan(|_| false).joined, addresses(&["10.0.0.1:7444"]));
        roster.answered("r", &addresses(&["[fd00::1]:7444", "[fd00::2]:7444"]));
        assert_eq!(roster.plan(|_| true).joined, addresses(&["[fd00::1]:7444", "[fd00::2]:7444"]));
    }

    #[test]
    fn the_number_of_members_is_bounded() {
        let mut roster = Roster::default();
        let many: Vec<SocketAddr> = (0..200_u8).map(|n| SocketAddr::from(([10, 0, 0, n], 1))).collect();
        roster.answered("r", &many);
        assert_eq!(roster.plan(|_| false).joined.len(), MOST);
    }

    /// Gives its answers in turn; the last one for ever.
    #[derive(Debug)]
    struct Script(Mutex<VecDeque<Option<Vec<SocketAddr>>>>);

    impl Resolver for Script {
        fn resolve<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
            let mut answers = self.0.lock();
            let answer = if answers.len() > 1 { answers.pop_front().unwrap() } else { answers[0].clone() };
            Box::pin(async move { answer.ok_or_else(|| io::ErrorKind::NotFound.into()) })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn names_are_looked_up_again_and_at_once_when_a_connection_ends() {
        let [a, b] = ["10.0.0.1:1", "10.0.0.2:1"].map(|text| text.parse::<SocketAddr>().unwrap());
        let script = [None, Some(vec![a]), Some(vec![a]), Some(vec![b])];
        let (tasks, resolver) = (Tasks::new(), Arc::new(Script(Mutex::new(script.into_iter().collect()))));
        let (events, mut heard) = mpsc::unbounded_channel();
        let connection = Arc::new(Mutex::new(None));
        let kept = connection.clone();
        let stopping = tasks.stopping();
        let start = move |member: Member| {
            let stopping = stopping.clone();
            let events = events.clone();
            if member.address == a {
                *kept.lock() = Some(member.connected());
            }
            async move {
                let _ = events.send(("joined", member.address));
                if stopping.run_until_cancelled(member.left().cancelled()).await.is_some() {
                    let _ = events.send(("left", member.address));
                }
                Ok(())
            }
        };
        tasks.service("members", follow(vec!["r:1".into()], resolver, tasks.clone(), start));
        let began = tokio::time::Instant::now();
        assert_eq!(heard.recv().await, Some(("joined", a)), "after a lookup that failed");
        assert_eq!(heard.recv().await, Some(("joined", b)));
        assert!(began.elapsed() > 2 * INTERVAL);
        assert!(heard.try_recv().is_err(), "a is connected");
        let ended = tokio::time::Instant::now();
        *connection.lock() = None;
        assert_eq!(heard.recv().await, Some(("left", a)));
        assert!(ended.elapsed() < INTERVAL);
        tasks.wait(std::future::ready(())).await.unwrap();
        assert_eq!(heard.recv().await, None, "the stop gives nobody up");
    }

    #[tokio::test]
    async fn the_system_knows_addresses_and_its_own_name() {
        assert_eq!(System.resolve("127.0.0.1:7444").await.unwrap(), addresses(&["127.0.0.1:7444"]));
        assert_eq!(System.resolve("[::1]:7444").await.unwrap(), addresses(&["[::1]:7444"]));
        let own = System.resolve("localhost:7444").await.unwrap();
        assert!(own.iter().all(|a| a.ip().is_loopback() && a.port() == 7444) && !own.is_empty(), "{own:?}");
        assert!(System.resolve("no-such-name.invalid:1").await.is_err());
        assert!(System.resolve("no-port").await.is_err());
    }
}
