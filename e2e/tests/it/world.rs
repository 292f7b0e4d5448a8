//! The clusters that all tests of a run share.

use std::path::Path;

use antiphon_e2e::{Caller, Cluster, Clusters, Shape, images};
use tokio::sync::{OnceCell, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Two clusters, as two clouds.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) clusters: Clusters,
    /// Held together by those who leave the clusters as they are, alone by those who break something.
    peace: RwLock<()>,
}

/// The clusters, for one test.
#[derive(Debug)]
pub(crate) struct Use<G> {
    pub(crate) world: &'static World,
    _peace: G,
}

/// For tests that keep to a namespace of their own.
pub(crate) async fn shared() -> Use<RwLockReadGuard<'static, ()>> {
    let world = world().await;
    Use { world, _peace: world.peace.read().await }
}

/// For tests that break something, and mend it.
pub(crate) async fn alone() -> Use<RwLockWriteGuard<'static, ()>> {
    let world = world().await;
    Use { world, _peace: world.peace.write().await }
}

async fn world() -> &'static World {
    static WORLD: OnceCell<World> = OnceCell::const_new();
    WORLD
        .get_or_init(async || {
            let existing = std::env::var_os("ANTIPHON_E2E_KUBECONFIG");
            let clusters = match &existing {
                Some(files) => Clusters::existing(&std::env::split_paths(files).collect::<Vec<_>>()).await,
                None => Clusters::borrow("test", Shape { clusters: 2, nodes: 1 }, program()).await,
            };
            let clusters = clusters.unwrap_or_else(|error| panic!("{error:#}"));
            World { clusters, peace: RwLock::new(()) }
        })
        .await
}

/// The program of this package, which looks after clusters besides the tests.
pub(crate) fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_antiphon-e2e"))
}

impl<G> Use<G> {
    pub(crate) fn cluster(&self, number: u8) -> Cluster {
        self.world.clusters.cluster(number).unwrap()
    }

    /// Somebody outside; each test has an index of its own.
    pub(crate) async fn caller(&self, index: u8) -> Caller {
        self.world.clusters.caller(index).await.unwrap()
    }

    /// A namespace of that name, new and empty, and with what tests run in pods.
    pub(crate) async fn namespace(&self, cluster: &Cluster, name: &str) {
        let probe = images::probe(self.world.clusters.tools()).await.unwrap();
        cluster.load(&[probe]).await.unwrap();
        cluster.kubectl(["delete", "namespace", name, "--ignore-not-found", "--wait"]).await.unwrap();
        cluster.kubectl(["create", "namespace", name]).await.unwrap();
    }
}
