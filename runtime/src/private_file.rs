//! Files with secrets in them: whose they have to be before they are used.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Why a file with a secret is not used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The system refuses.
    #[error("{}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others may read it.
    #[error("{} has mode {mode:o}: {whom} can read it; {remedy}", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// Who can.
        whom: &'static str,
        /// What to do.
        remedy: &'static str,
    },
}

/// Reads a secret, which has to be for its owner's eyes only; links are followed.
///
/// Files of a Kubernetes Secret belong to root and are readable by the group of the pod (`fsGroup`), which is how its
/// process gets to read them: that is accepted of files that are root's and not the process's own.
///
/// # Errors
/// It cannot be read, or others can read it.
pub fn read_secret(path: &Path) -> Result<String, SecretError> {
    check(path)?;
    fs::read_to_string(path).map_err(|source| SecretError::File { path: path.to_owned(), source })
}

/// Whether a file is as [`read_secret`] wants it.
///
/// # Errors
/// As there.
pub fn check(path: &Path) -> Result<(), SecretError> {
    let found = fs::metadata(path).map_err(|source| SecretError::File { path: path.to_owned(), source })?;
    let exposed =
        |(whom, remedy)| SecretError::Exposed { path: path.to_owned(), mode: found.mode() & 0o777, whom, remedy };
    judge(found.mode(), found.uid(), rustix::process::geteuid().as_raw()).map_err(exposed)
}

/// Who else may read or change a file of this mode and owner, and what to do about it.
const fn judge(mode: u32, owner: u32, us: u32) -> Result<(), (&'static str, &'static str)> {
    const ROOT: u32 = 0;
    if mode & 0o007 != 0 {
        return Err(("everybody", "chmod 600 it, or give a Secret volume defaultMode 0440"));
    }
    let of_a_secret_volume = owner == ROOT && us != ROOT && mode & 0o020 == 0;
    if mode & 0o070 != 0 && !of_a_secret_volume {
        return Err(("its group", "chmod 600 it"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn only_roots_files_may_be_read_by_a_group() {
        const USER: u32 = 65_532;
        for (mode, owner, us, fine) in [
            (0o600, USER, USER, true),
            (0o400, USER, USER, true),
            (0o640, USER, USER, false),
            (0o604, USER, USER, false),
            // A Secret with `fsGroup`.
            (0o440, 0, USER, true),
            (0o640, 0, USER, true),
            (0o660, 0, USER, false),
            (0o444, 0, USER, false),
            (0o644, 0, USER, false),
            // Somebody else's.
            (0o440, 1000, USER, false),
            // Root's own.
            (0o600, 0, 0, true),
            (0o640, 0, 0, false),
        ] {
            assert_eq!(judge(0o100_000 | mode, owner, us).is_ok(), fine, "{mode:o} of {owner} for {us}");
        }
    }

    /// A Secret's volume: `FILE -> ..data/FILE`, `..data -> ..TIME`.
    #[test]
    fn links_of_a_secret_volume_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let version = dir.path().join("..2026_11_21");
        fs::create_dir(&version).unwrap();
        fs::write(version.join("root"), "secret").unwrap();
        symlink("..2026_11_21", dir.path().join("..data")).unwrap();
        symlink("..data/root", dir.path().join("root")).unwrap();
        let path = dir.path().join("root");
        let set = |mode| fs::set_permissions(version.join("root"), fs::Permissions::from_mode(mode)).unwrap();
        set(0o600);
        assert_eq!(read_secret(&path).unwrap(), "secret");
        set(0o644);
        let error = read_secret(&path).unwrap_err().to_string();
        assert!(
            error.ends_with(
                "has mode 644: everybody can read it; chmod 600 it, or give a Secret volume defaultMode 0440"
            ),
            "{error}"
        );
        assert!(matches!(read_secret(&dir.path().join("none")), Err(SecretError::File { .. })));
    }
}
