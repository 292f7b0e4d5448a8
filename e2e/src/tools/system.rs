//! What this machine has to have: rights, and packages that talk to its kernel.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use tokio::process::Command;

use crate::{command::run, progress};

/// Something that has to be there, and Debian's package of it.
struct Need {
    /// A program, or a plugin in one of the CNI directories.
    file: &'static str,
    package: &'static str,
}

/// Checks everything that a cluster takes, installs packages that are missing, and names the directory of the CNI
/// plugins.
pub(super) async fn require() -> Result<PathBuf> {
    if !cfg!(target_os = "linux") {
        bail!("clusters are made of Linux' namespaces: this machine runs another system");
    }
    let status = fs::read_to_string("/proc/self/status").context("/proc/self/status cannot be read")?;
    let missing = missing_rights(&status);
    if !missing.is_empty() {
        bail!("clusters are made by root: this process lacks {} (run it with sudo)", missing.join(", "));
    }
    packages(&NEEDS).await?;
    plugins().context("there are no CNI plugins")
}

/// Checks for what compiles the C parts of static programs.
///
/// # Errors
/// It is missing and cannot be installed.
pub(crate) async fn require_musl() -> Result<()> {
    packages(&[Need { file: "musl-gcc", package: "musl-tools" }]).await
}

/// Installs the packages of what is missing.
async fn packages(needs: &[Need]) -> Result<()> {
    let missing: Vec<_> = needs.iter().filter(|need| !is_there(need.file)).map(|need| need.package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    let advice = format!("missing on this machine: {names} (Debian's names): install them");
    if program("apt-get").is_none() {
        bail!(advice);
    }
    let install = async {
        let install = || {
            let mut command = Command::new("apt-get");
            command.args(["install", "--yes", "--no-install-recommends"]).args(&missing);
            command.env("DEBIAN_FRONTEND", "noninteractive");
            command
        };
        if run(&mut install()).await.is_err() {
            // A machine that never asked knows no packages.
            run(Command::new("apt-get").arg("update")).await?;
            run(&mut install()).await?;
        }
        Ok(())
    };
    progress::step(&format!("installing with apt-get: {names}"), install).await.context(advice)
}

fn is_there(file: &str) -> bool {
    program(file).is_some() || CNI.iter().any(|directory| Path::new(directory).join(file).is_file())
}

/// Where a program is; also in the directories that are root's alone.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    directories.map(|directory| directory.join(name)).find(|file| file.is_file())
}

fn plugins() -> Option<PathBuf> {
    CNI.iter().map(PathBuf::from).find(|directory| directory.join(CNI_PLUGIN).is_file())
}

/// Capabilities that `/proc/PID/status` does not list as effective.
fn missing_rights(status: &str) -> Vec<&'static str> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or(0);
    RIGHTS.iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| *name).collect()
}

/// Bits of capabilities(7).
const RIGHTS: [(u32, &str); 4] =
    [(12, "CAP_NET_ADMIN"), (19, "CAP_SYS_PTRACE"), (21, "CAP_SYS_ADMIN"), (1, "CAP_DAC_OVERRIDE")];

const CNI: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
const CNI_PLUGIN: &str = "ptp";

const NEEDS: [Need; 8] = [
    Need { file: "ip", package: "iproute2" },
    Need { file: "nsenter", package: "util-linux" },
    Need { file: "containerd", package: "containerd" },
    Need { file: "runc", package: "runc" },
    Need { file: CNI_PLUGIN, package: "containernetworking-plugins" },
    // Kubernetes' proxy takes the one, the plugin for host ports the other.
    Need { file: "nft", package: "nftables" },
    Need { file: "iptables", package: "iptables" },
    Need { file: "mount", package: "mount" },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_rights_have_names() {
        assert_eq!(missing_rights("Name:\tx\nCapEff:\t000001fffeffffff\n"), [""; 0]);
        assert_eq!(missing_rights("CapEff:\t0000000000080002\n"), ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]);
        assert_eq!(missing_rights("").len(), RIGHTS.len());
    }
}
