//! The control groups in which a node's pods run: made before its kubelet, removed after it.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::command::until;

/// Makes the group in every hierarchy that there is.
pub(crate) fn make(group: &str) -> Result<()> {
    let all = mounted()?;
    // Where there are both versions, the second has no controllers.
    let first: Vec<_> = all.iter().filter(|hierarchy| hierarchy.version == 1).collect();
    let used = if first.is_empty() { all.iter().collect() } else { first };
    for Hierarchy { root, .. } in used {
        let mut directory = root.clone();
        for name in group.trim_start_matches('/').split('/') {
            delegate(&directory);
            let child = directory.join(name);
            fs::create_dir_all(&child).with_context(|| format!("{} cannot be made", child.display()))?;
            // In version 1 a new group of CPUs is empty until it is told which ones it has.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let (from, to) = (directory.join(file), child.join(file));
                if let Ok(value) = fs::read_to_string(from).map(|value| value.trim().to_owned())
                    && fs::read_to_string(&to).is_ok_and(|value| value.trim().is_empty())
                {
                    fs::write(&to, value).with_context(|| to.display().to_string())?;
                }
            }
            directory = child;
        }
        delegate(&directory);
    }
    Ok(())
}

/// Removes the group, and all in it, wherever it is, and the groups around it that are empty then. Waits for what still
/// ends in it.
pub(crate) async fn remove(group: &str) -> Result<()> {
    until(&format!("the removal of control group {group}"), PATIENCE, async || prune_all(group).map(Some)).await
}

fn prune_all(group: &str) -> Result<()> {
    for Hierarchy { root, .. } in mounted()? {
        let directory = root.join(group.trim_start_matches('/'));
        prune(&directory)?;
        let around = directory.ancestors().skip(1).take_while(|ancestor| **ancestor != root);
        // Others may have groups there.
        around.take_while(|ancestor| fs::remove_dir(ancestor).is_ok()).for_each(drop);
    }
    Ok(())
}

fn prune(directory: &Path) -> Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| directory.display().to_string())?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            prune(&entry.path())?;
        }
    }
    // Its files are the kernel's and go with it.
    fs::remove_dir(directory).with_context(|| format!("{} cannot be removed", directory.display()))
}

/// In version 2 children have the controllers that their parent passes on. One that it does not have is no loss.
fn delegate(directory: &Path) {
    let control = directory.join("cgroup.subtree_control");
    if let Ok(controllers) = fs::read_to_string(directory.join("cgroup.controllers")) {
        for controller in controllers.split_whitespace() {
            let _ = fs::write(&control, format!("+{controller}"));
        }
    }
}

/// A tree of groups.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    version: u8,
}

fn mounted() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts cannot be read")?;
    Ok(of_mounts(&mounts))
}

fn of_mounts(mounts: &str) -> Vec<Hierarchy> {
    let found = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (path, kind) = (words.next()?, words.next()?);
        let version = match kind {
            "cgroup" => 1,
            "cgroup2" => 2,
            _ => return None,
        };
        Some(Hierarchy { root: path.into(), version })
    });
    found.collect()
}

const PATIENCE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_among_mounts() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nproc /proc proc rw 0 0\n";
        let found: Vec<_> = of_mounts(mounts).into_iter().map(|found| (found.root, found.version)).collect();
        assert_eq!(found, [("/sys/fs/cgroup/cpu".into(), 1), ("/sys/fs/cgroup/unified".into(), 2)]);
    }
}
