//! What is left of clusters: nothing.

use std::{fs, path::Path, time::Duration};

use antiphon_e2e::{Clusters, Shape, stop, until};

use crate::world::program;

#[tokio::test]
async fn clusters_go_with_whoever_borrowed_them_and_leave_nothing() {
    let before = traces("gone");
    assert!(before.is_empty(), "{before:?}");
    let clusters = Clusters::borrow("gone", Shape { clusters: 1, nodes: 1 }, program()).await.unwrap();
    let link = format!("/sys/class/net/antiphon{}", clusters.network().number());
    assert!(!traces("gone").is_empty());
    assert!(Path::new(&link).exists());
    // The end of this process would do the same.
    drop(clusters);
    until("the end of the clusters", Duration::from_secs(60), async || {
        Ok((traces("gone").is_empty() && !Path::new(&link).exists()).then_some(()))
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn what_an_interrupted_start_has_left_is_removed() {
    let shape = Shape { clusters: 1, nodes: 1 };
    let node = async || Ok(traces("half").iter().any(|trace| trace.ends_with("half-1-1")).then_some(()));
    tokio::select! {
        started = Clusters::start("half", shape, program()) => panic!("it was not interrupted: {started:?}"),
        begun = until("a node", Duration::from_secs(120), node) => begun.unwrap(),
    }
    stop("half").await.unwrap();
    assert_eq!(traces("half"), [""; 0]);
    stop("half").await.unwrap();
}

/// Whatever is there of a set of clusters.
fn traces(set: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut look = |directory: &str, wanted: &dyn Fn(&str) -> bool| {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(wanted) {
                found.push(entry.path().display().to_string());
            }
        }
    };
    look("/run/netns", &|name| name.starts_with(&format!("antiphon-{set}-")));
    let state =
        std::env::var("XDG_STATE_HOME").unwrap_or_else(|_| format!("{}/.local/state", std::env::var("HOME").unwrap()));
    look(&format!("{state}/antiphon/clusters"), &|name| name == set);
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        look(&hierarchy.path().join("antiphon").display().to_string(), &|name| name == set);
    }
    found
}
