//! Programs that are built with Go, once, into the cache.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};
use tokio::process::Command;

use super::cache;
use crate::{command::run, progress};

/// A main package that others publish, at a version.
pub(super) struct Published {
    name: &'static str,
    package: &'static str,
    version: &'static str,
}

pub(super) const HELM: Published = Published { name: "helm", package: "helm.sh/helm/v4/cmd/helm", version: "v4.3.1" };
pub(super) const KUBECONFORM: Published =
    Published { name: "kubeconform", package: "github.com/yannh/kubeconform/cmd/kubeconform", version: "v0.8.0" };

/// A Go module of this project, and what is built of it.
struct Module<'a> {
    name: &'a str,
    directory: &'a str,
    version: &'a str,
    packages: &'a [&'a str],
    /// For people: how long it takes.
    takes: &'a str,
}

/// The project's Go modules.
pub(super) fn modules() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// The version of Kubernetes, `v1.36.3`.
pub(super) fn kubernetes_version() -> &'static str {
    version_in(include_str!("../../kube/go.mod"), "k8s.io/kubernetes")
}

pub(super) async fn kubernetes() -> Result<PathBuf> {
    let version = kubernetes_version();
    let module =
        Module { name: "kube", directory: "kube", version, packages: &KUBERNETES, takes: "about 6 minutes on 2 cores" };
    module.build().await
}

pub(super) async fn coredns() -> Result<PathBuf> {
    let version = version_in(include_str!("../../coredns/go.mod"), "github.com/coredns/coredns");
    Module { name: "coredns", directory: "coredns", version, packages: &["."], takes: "about a minute" }.build().await
}

pub(super) async fn pause() -> Result<PathBuf> {
    small("pause").await
}

pub(super) async fn probe() -> Result<PathBuf> {
    small("probe").await
}

pub(super) async fn cable() -> Result<PathBuf> {
    small("cable").await
}

async fn small(name: &str) -> Result<PathBuf> {
    let package = format!("./{name}");
    Module { name, directory: "probe", version: "own", packages: &[&package], takes: "seconds" }.build().await
}

impl Module<'_> {
    /// The directory with the programs.
    async fn build(&self) -> Result<PathBuf> {
        let source = modules().join(self.directory);
        let key = format!("{}-{}", self.version, &digest(&source)?[..12]);
        let what = format!("building {} {} with Go (once; {})", self.name, self.version, self.takes);
        cached(&cache()?.join(self.name), &key, &what, async |output| {
            let mut command = go()?;
            command.current_dir(&source).args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false"]);
            command.arg("-ldflags").arg(flags(self.version)).arg("-o").arg(output.join("")).args(self.packages);
            run(&mut command).await
        })
        .await
    }
}

/// The directory with the program.
pub(super) async fn installed(published: &Published) -> Result<PathBuf> {
    let Published { name, package, version } = published;
    let what = format!("building {name} {version} with Go (once; up to 2 minutes)");
    cached(&cache()?.join(name), version, &what, async |output| {
        let mut command = go()?;
        command.args(["install", "-trimpath", "-ldflags", "-s -w"]).arg(format!("{package}@{version}"));
        run(command.env("GOBIN", output)).await
    })
    .await
}

/// What `build` leaves in the directory that it is given. Built once, whoever asks; a build that fails leaves nothing.
async fn cached(
    parent: &Path,
    key: &str,
    what: &str,
    build: impl AsyncFnOnce(&Path) -> Result<String>,
) -> Result<PathBuf> {
    let directory = parent.join(key);
    if directory.is_dir() {
        return Ok(directory);
    }
    fs::create_dir_all(parent).with_context(|| format!("{} cannot be made", parent.display()))?;
    let lock = File::create(parent.join(".lock"))?;
    let locked = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock));
    let _lock = progress::step(&format!("waiting for whoever else is {what}"), async { Ok(locked.await??) }).await?;
    if directory.is_dir() {
        return Ok(directory);
    }
    let partial = tempfile::Builder::new().prefix(".partial-").tempdir_in(parent)?;
    progress::step(what, build(partial.path())).await?;
    fs::rename(partial.keep(), &directory)?;
    Ok(directory)
}

fn go() -> Result<Command> {
    let found = std::process::Command::new("go").arg("version").output();
    if !found.is_ok_and(|output| output.status.success()) {
        bail!(
            "there is no Go: install 1.26 or newer (https://go.dev/dl), or name a directory with the programs of \
             Kubernetes in ANTIPHON_KUBE_BIN"
        );
    }
    let mut command = Command::new("nice");
    // Others want to work meanwhile.
    command.args(["-n", "10", "go"]).env("CGO_ENABLED", "0");
    Ok(command)
}

/// Kubernetes' programs ask the linker for their version; others do not know the variables.
fn flags(version: &str) -> String {
    let mut parts = version.trim_start_matches('v').split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let package = "-X k8s.io/component-base/version";
    format!("-s -w {package}.gitVersion={version} {package}.gitMajor={major} {package}.gitMinor={minor}")
}

/// Of everything in a module's directory.
fn digest(directory: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory).with_context(|| format!("{} cannot be read", directory.display()))?;
        let mut paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>()?;
        paths.sort();
        for path in paths {
            if path.is_dir() {
                directories.push(path);
            } else {
                hash.update(
                    path.as_os_str().as_encoded_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default(),
                );
                hash.update(fs::read(&path)?);
            }
        }
    }
    Ok(hex::encode(hash.finalize()))
}

/// The version that a go.mod requires of a module.
fn version_in(module: &'static str, name: &str) -> &'static str {
    let found = module.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word == "require");
        (words.next() == Some(name)).then(|| words.next()).flatten()
    });
    found.expect("the module requires it")
}

const KUBERNETES: [&str; 8] = [
    "./etcd",
    "go.etcd.io/etcd/etcdctl/v3",
    "k8s.io/kubernetes/cmd/kube-apiserver",
    "k8s.io/kubernetes/cmd/kube-controller-manager",
    "k8s.io/kubernetes/cmd/kube-proxy",
    "k8s.io/kubernetes/cmd/kube-scheduler",
    "k8s.io/kubernetes/cmd/kubectl",
    "k8s.io/kubernetes/cmd/kubelet",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_tell_the_version_that_the_module_pins() {
        let version = kubernetes_version();
        assert!(version.starts_with("v1."), "{version}");
        let minor = version.split('.').nth(1).unwrap();
        assert!(flags(version).contains(&format!("gitMinor={minor}")), "{}", flags(version));
        assert!(minor.parse::<u32>().unwrap() >= 35, "what custom resources need");
    }

    #[tokio::test]
    async fn a_failed_build_leaves_nothing_in_the_cache() {
        let parent = tempfile::tempdir().unwrap();
        let failed = cached(parent.path(), "v1", "failing", async |output| {
            fs::write(output.join("half"), "")?;
            bail!("no")
        });
        assert!(failed.await.is_err());
        let built = cached(parent.path(), "v1", "building", async |output| {
            fs::write(output.join("whole"), "")?;
            Ok(String::new())
        });
        let directory = built.await.unwrap();
        let again = cached(parent.path(), "v1", "building", async |_| bail!("it is there"));
        assert_eq!(again.await.unwrap(), directory);
        let names: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["whole"]);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 2, "the directory and the lock");
    }
}
