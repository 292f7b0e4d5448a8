//! From the command line to a store.

use std::sync::Arc;

use antiphon_runtime::Tasks;
use anyhow::Context as _;

use super::{Memory, Owner, SnapshotDir, Store};
use crate::args::StoreArgs;

/// Opens the store that the arguments name; it lives as long as the tasks.
///
/// # Errors
/// The directory or what the store needs to be reached is not usable.
pub(crate) async fn open(args: &StoreArgs, owner: Owner, tasks: &Tasks) -> anyhow::Result<Arc<dyn Store>> {
    let dir = args.state.as_deref().map(|path| SnapshotDir::open(path, owner));
    let dir = dir.transpose().context("--state")?;
    Ok(match dir {
        Some(dir) => Arc::new(Memory::kept(dir, args.newcomers_wait, tasks)),
        None => Arc::new(Memory::default()),
    })
}
