//! The binary: starts from files, says what is wrong with them, stops on SIGTERM.

use std::{path::Path, process::Stdio};

use antiphon_runtime::pki::{Role, write_secret};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::world::{World, soon};

fn start(dir: &Path, region: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_antiphon-router"))
        .env_clear()
        .env("ANTIPHON_ROUTER_REGION", region)
        .args(["--public", "127.0.0.1:0", "--internal", "127.0.0.1:0"])
        .args(["--admin", "127.0.0.1:0", "--log-json"])
        .arg("--identity")
        .arg(dir)
        .arg("--root")
        .arg(dir.join("root.hex"))
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn the_binary_starts_from_files_and_stops_on_sigterm() {
    let world = World::new();
    let dir = tempfile::tempdir().unwrap();
    let identity = world.identity("router-1", Role::Router, "frankfurt");
    identity.save(dir.path()).unwrap();
    let root = dir.path().join("root.hex");
    write_secret(&root, "07".repeat(32).as_bytes()).unwrap();

    let mut child = start(dir.path(), "frankfurt");
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = soon("its first words", lines.next_line()).await.unwrap().unwrap();
    assert!(line.contains("router starts"), "{line}");
    let pid = Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let status = soon("its end", child.wait()).await.unwrap();
    assert!(status.success(), "{status}");

    let other = start(dir.path(), "virginia");
    let output = soon("its refusal", other.wait_with_output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(text.contains("expected a router of virginia"), "{text}");

    std::fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let open = start(dir.path(), "frankfurt");
    let output = soon("its refusal", open.wait_with_output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(text.contains("chmod 600"), "{text}");
}
