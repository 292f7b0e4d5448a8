//! The fleet root on disk: 64 hex digits, readable by its owner only.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use antiphon_core::keys::FleetRoot;
use antiphon_runtime::pki::write_secret;
use anyhow::Context as _;

pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("root.hex")
}

pub(super) fn load(dir: &Path) -> anyhow::Result<FleetRoot> {
    let path = path(dir);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    FleetRoot::from_hex(&text).with_context(|| path.display().to_string())
}

/// The same root for every start in one directory, so that what was issued stays valid.
pub(super) fn load_or_make(dir: &Path) -> anyhow::Result<FleetRoot> {
    match fs::metadata(path(dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let bytes: [u8; 32] = rand::random();
            write_secret(&path(dir), hex::encode(bytes).as_bytes())?;
        }
        _ => {}
    }
    load(dir)
}
