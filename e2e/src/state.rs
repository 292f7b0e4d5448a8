//! What is kept on disk about a set of clusters, so that any process can look after it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    network::{MOST, Network},
    tools::base,
};

/// How many of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// 1 to 15.
    pub clusters: u8,
    /// Of each cluster: 1 to 50.
    pub nodes: u8,
}

/// A set of clusters that has been started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) shape: Shape,
    pub(crate) network: Network,
    /// Where Kubernetes' programs were, and the CNI plugins.
    pub(crate) kubernetes: PathBuf,
    pub(crate) cni: PathBuf,
    /// Of this package.
    pub(crate) program: PathBuf,
    /// It stays until it is told to go; else it goes with whoever started it.
    pub(crate) stays: bool,
}

/// The directory of a set, locked for whoever starts or stops it.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "the lock is held while the file is open")] File);

/// Name and directory of a set.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    pub(crate) name: String,
    pub(crate) directory: PathBuf,
}

impl Home {
    /// The set of that name, whether it is there or not.
    pub(crate) fn of(name: &str) -> Result<Self> {
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        ensure!(
            (1..=12).contains(&name.len()) && name.chars().all(legal),
            "{name:?} names no set of clusters: use 1 to 12 of a-z and 0-9"
        );
        let directory = root()?.join(name);
        Ok(Self { name: name.to_owned(), directory })
    }

    /// Waits until nobody else starts or stops it.
    pub(crate) fn lock(&self) -> Result<Lock> {
        let root = root()?;
        fs::create_dir_all(&root).with_context(|| format!("{} cannot be made", root.display()))?;
        let file = File::create(root.join(format!(".{}.lock", self.name)))?;
        file.lock()?;
        Ok(Lock(file))
    }

    /// What is written down, if the set was ever wholly begun.
    pub(crate) fn read(&self) -> Result<Option<Description>> {
        read(&self.directory)
    }

    /// Writes down what the set is, with a network that no other set has.
    pub(crate) fn claim(&self, describe: impl FnOnce(Network) -> Description) -> Result<Description> {
        let choosing = File::create(root()?.join(".networks.lock"))?;
        choosing.lock()?;
        let others = sets()?.into_iter().filter(|other| other.name != self.name);
        let taken: Vec<_> = others.filter_map(|other| other.read().ok().flatten()).map(|other| other.network).collect();
        let free = (0..MOST).filter_map(Network::numbered).find(|network| !taken.contains(network));
        let description = describe(free.context("32 sets of clusters are up already")?);
        fs::create_dir_all(&self.directory)?;
        fs::write(self.directory.join(FILE), serde_json::to_vec_pretty(&description)?)?;
        Ok(description)
    }

    /// What the names of its namespaces begin with.
    pub(crate) fn prefix(&self) -> String {
        format!("antiphon-{}-", self.name)
    }
}

/// All sets that have left something on disk.
pub(crate) fn sets() -> Result<Vec<Home>> {
    let entries = fs::read_dir(root()?).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut found: Vec<_> = names.filter_map(|name| Home::of(&name).ok()).collect();
    found.sort_by(|one, two| one.name.cmp(&two.name));
    Ok(found)
}

/// Below `$XDG_STATE_HOME`, or `~/.local/state`.
fn root() -> Result<PathBuf> {
    let root = base("XDG_STATE_HOME", ".local/state")?;
    // Nodes have directories of their own there.
    if let Some(hidden) = HIDDEN.iter().find(|hidden| root.starts_with(hidden)) {
        bail!("clusters cannot be kept below {hidden}: set XDG_STATE_HOME to another directory");
    }
    Ok(root.join("antiphon/clusters"))
}

fn read(directory: &Path) -> Result<Option<Description>> {
    let file = directory.join(FILE);
    let Ok(bytes) = fs::read(&file) else { return Ok(None) };
    serde_json::from_slice(&bytes).with_context(|| file.display().to_string()).map(Some)
}

const FILE: &str = "clusters.json";
const HIDDEN: [&str; 4] = ["/proc", "/run", "/var/lib", "/var/log"];
