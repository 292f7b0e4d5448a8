//! The programs that clusters are made of: where they come from, and what to do about those that are missing.
//!
//! Kubernetes, etcd, CoreDNS, helm and kubeconform are built from Go modules, once, into a cache that outlives the clone.
//! What talks to the kernel comes from Debian's packages.

mod go;
mod system;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

pub(crate) use system::require_musl;

/// Where the programs of a cluster are.
#[derive(Clone, Debug)]
pub struct Tools {
    /// Kubernetes' programs, etcd, etcdctl.
    pub(crate) kubernetes: PathBuf,
    /// The CNI plugins.
    pub(crate) cni: PathBuf,
}

impl Tools {
    /// Finds, installs and builds what is missing. On a machine that has never done it, that takes minutes.
    ///
    /// # Errors
    /// One that names everything that is missing and cannot be had, and what to do about it.
    pub async fn provide() -> Result<Self> {
        let cni = system::require().await?;
        let kubernetes = match given()? {
            Some(directory) => directory,
            None => go::kubernetes().await?,
        };
        Ok(Self { kubernetes, cni })
    }

    /// Those that speak to a cluster which others run: kubectl, the one in the path if there is one, and helm.
    ///
    /// # Errors
    /// There is no kubectl, and none can be built.
    pub(crate) async fn clients() -> Result<Self> {
        let found = match given()? {
            Some(directory) => Some(directory),
            None => system::program("kubectl").and_then(|file| file.parent().map(Path::to_owned)),
        };
        let kubernetes = match found {
            Some(directory) => directory,
            None => go::kubernetes().await?,
        };
        Ok(Self { kubernetes, cni: PathBuf::new() })
    }

    /// A program of Kubernetes, or etcd.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.kubernetes.join(name)
    }

    /// The cluster's DNS server.
    pub(crate) async fn coredns(&self) -> Result<PathBuf> {
        Ok(go::coredns().await?.join("coredns"))
    }

    /// What holds a pod's namespaces.
    pub(crate) async fn pause(&self) -> Result<PathBuf> {
        Ok(go::pause().await?.join("pause"))
    }

    /// What the tests of the clusters themselves run.
    ///
    /// # Errors
    /// It cannot be built.
    pub async fn probe(&self) -> Result<PathBuf> {
        Ok(go::probe().await?.join("probe"))
    }

    /// What carries packets with faults.
    pub(crate) async fn cable() -> Result<PathBuf> {
        Ok(go::cable().await?.join("cable"))
    }

    /// Helm.
    ///
    /// # Errors
    /// It cannot be built.
    pub async fn helm(&self) -> Result<PathBuf> {
        Ok(go::installed(&go::HELM).await?.join("helm"))
    }

    /// The validator of manifests against schemas.
    ///
    /// # Errors
    /// It cannot be built.
    pub async fn kubeconform(&self) -> Result<PathBuf> {
        Ok(go::installed(&go::KUBECONFORM).await?.join("kubeconform"))
    }
}

/// The directory that the environment names for Kubernetes' programs.
fn given() -> Result<Option<PathBuf>> {
    for variable in [KUBE_BIN, "KUBEBUILDER_ASSETS"] {
        let Some(directory) = env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from) else {
            continue;
        };
        let missing: Vec<_> = PROGRAMS.into_iter().filter(|name| !directory.join(name).is_file()).collect();
        if !missing.is_empty() {
            bail!(
                "{variable} names {}, which has no {}: put them there, or unset {variable} to have all built",
                directory.display(),
                missing.join(", ")
            );
        }
        let directory = fs::canonicalize(&directory).with_context(|| format!("{variable}: {}", directory.display()))?;
        return Ok(Some(directory));
    }
    Ok(None)
}

/// Where built programs are kept between runs and clones.
fn cache() -> Result<PathBuf> {
    Ok(base("XDG_CACHE_HOME", ".cache")?.join("antiphon"))
}

/// A directory of the user, by the XDG base directory specification.
pub(crate) fn base(variable: &str, otherwise: &str) -> Result<PathBuf> {
    let named = env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(otherwise));
    named.or_else(home).with_context(|| format!("neither {variable} nor HOME is set"))
}

const KUBE_BIN: &str = "ANTIPHON_KUBE_BIN";

/// What a directory of Kubernetes' programs has to have.
const PROGRAMS: [&str; 8] = [
    "etcd",
    "etcdctl",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
];
