//! From the command line to a store.

use std::{sync::Arc, time::Duration};

use antiphon_runtime::Tasks;
use anyhow::Context as _;

use super::{Etcd, EtcdConfig, Memory, Owner, SnapshotDir, Store};
use crate::args::StoreArgs;

/// Opens the store that the arguments name; it lives as long as the tasks.
///
/// # Errors
/// The directory or what the store needs to be reached is not usable.
pub(crate) async fn open(args: &StoreArgs, owner: Owner, tasks: &Tasks) -> anyhow::Result<Arc<dyn Store>> {
    let etcd = EtcdConfig::new(args, &owner.region)?;
    let dir = args.state.as_deref().map(|path| SnapshotDir::open(path, owner.clone()));
    let dir = dir.transpose().context("--state")?;
    let wait = args.newcomers_wait;
    if let Some(config) = etcd {
        let store = Etcd::start(config, owner, dir, wait, tasks);
        // Whom etcd answers now need not be answered from an old snapshot.
        store.connected_within(FIRST_ANSWER).await;
        return Ok(store);
    }
    Ok(match dir {
        Some(dir) => Arc::new(Memory::kept(dir, wait, tasks)),
        None => Arc::new(Memory::default()),
    })
}

const FIRST_ANSWER: Duration = Duration::from_secs(1);
