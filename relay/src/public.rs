//! Where clients reach this relay, which may become known only while it runs, and may change.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use tokio::{sync::watch, time::interval};
use tokio_util::sync::CancellationToken;

/// All addresses, the preferred one first; empty: not known yet.
pub type Addresses = Vec<SocketAddr>;

/// Where the addresses come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// Known from the start.
    Fixed(Addresses),
    /// A file that somebody writes when he knows.
    File(PathBuf),
    /// Nobody has said, and what is bound cannot be told to clients.
    Nowhere,
}

impl Source {
    /// What the command line says; `bound` is the public port.
    ///
    /// # Errors
    /// Addresses that nobody can reach, or too many.
    pub(crate) fn new(given: &[SocketAddr], file: Option<PathBuf>, bound: SocketAddr) -> anyhow::Result<Self> {
        if let Some(file) = file {
            return Ok(Self::File(file));
        }
        if given.is_empty() && bound.ip().is_unspecified() {
            tracing::warn!(%bound, "clients cannot be told this address: give --public-address or --public-address-file");
            return Ok(Self::Nowhere);
        }
        let addresses = if given.is_empty() { vec![bound] } else { given.to_vec() };
        check(&addresses).context("--public-address")?;
        Ok(Self::Fixed(addresses))
    }

    /// What is known from the start.
    pub(crate) fn known(&self) -> Addresses {
        match self {
            Self::Fixed(addresses) => addresses.clone(),
            Self::File(path) => read(path).unwrap_or_default(),
            Self::Nowhere => Addresses::new(),
        }
    }

    /// Follows it until the stop. What cannot be read or makes no sense changes nothing.
    pub(crate) async fn follow(
        self,
        addresses: watch::Sender<Addresses>,
        stopping: CancellationToken,
    ) -> anyhow::Result<()> {
        let Self::File(path) = self else {
            // The sender lives as long as those who follow it.
            stopping.cancelled().await;
            return Ok(());
        };
        let mut every = interval(POLL);
        let mut problem = String::new();
        while stopping.run_until_cancelled(every.tick()).await.is_some() {
            match read(&path) {
                Ok(new) => {
                    problem.clear();
                    addresses.send_if_modified(|present| {
                        let news = *present != new;
                        if news {
                            tracing::info!(?new, "public addresses");
                            *present = new;
                        }
                        news
                    });
                }
                Err(error) => {
                    let text = format!("{error:#}");
                    if text != problem {
                        tracing::warn!("public addresses: {text}; what was known stays");
                    }
                    problem = text;
                }
            }
        }
        Ok(())
    }
}

/// A small file of a local disk or a `ConfigMap`: as quick as reading a directory.
fn read(path: &Path) -> anyhow::Result<Addresses> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let words = text.split(|c: char| c.is_whitespace() || c == ',').filter(|word| !word.is_empty());
    let parse = |word: &str| {
        let word: String = word.chars().take(80).collect();
        word.parse().with_context(|| format!("{}: {word:?} is no IP:PORT", path.display()))
    };
    let addresses = words.take(MOST + 1).map(parse).collect::<Result<Addresses, _>>()?;
    ensure!(!addresses.is_empty(), "{} has no address yet", path.display());
    check(&addresses).with_context(|| path.display().to_string())?;
    Ok(addresses)
}

fn check(addresses: &[SocketAddr]) -> anyhow::Result<()> {
    ensure!(addresses.len() <= MOST, "at most {MOST} addresses");
    for address in addresses {
        ensure!(
            !address.ip().is_unspecified() && address.port() != 0,
            "{address} is no address that clients can reach"
        );
    }
    Ok(())
}

/// As many as routers take.
const MOST: usize = 4;
const POLL: Duration = Duration::from_secs(2);
/// The condition of readiness that they are known.
pub(crate) const CONDITION: &str = "public address";

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_command_line_the_bound_port_or_nobody_knows() {
        let any = address("[::]:4433");
        let of = |given: &[&str], bound| {
            let given: Vec<_> = given.iter().map(|text| address(text)).collect();
            Source::new(&given, None, bound).map(|source| source.known())
        };
        assert_eq!(of(&["192.0.2.1:9"], any).unwrap(), [address("192.0.2.1:9")]);
        assert_eq!(of(&[], address("127.0.0.1:7")).unwrap(), [address("127.0.0.1:7")]);
        assert!(of(&[], any).unwrap().is_empty());
        assert!(of(&["0.0.0.0:9"], any).is_err());
        assert!(of(&["192.0.2.1:0"], any).is_err());
        assert!(of(&["192.0.2.1:9"; 5], any).is_err());
    }

    #[test]
    fn a_file_is_taken_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("addresses");
        assert!(read(&path).is_err());
        for (text, expected) in [
            ("", None),
            ("\n", None),
            ("192.0.2.1:4433\n[2001:db8::1]:4433\n", Some(2)),
            ("192.0.2.1:4433, 192.0.2.2:4433", Some(2)),
            ("192.0.2.1:4433 lb.example.com:4433", None),
            ("192.0.2.1", None),
            ("0.0.0.0:4433", None),
            ("192.0.2.1:1 192.0.2.1:2 192.0.2.1:3 192.0.2.1:4 192.0.2.1:5", None),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read(&path).ok().map(|a| a.len()), expected, "{text:?}");
        }
    }
}
