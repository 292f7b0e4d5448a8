//! The command line as people and scripts use it.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use antiphon_media::wav;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

use crate::support::{Shape, eventually};

fn antiphon(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_antiphon"));
    command.env("ANTIPHON_DIR", dir).stdin(Stdio::null());
    command
}

fn run(dir: &Path, args: &[&str]) -> Output {
    antiphon(dir).args(args).output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

struct Up {
    child: Child,
    pids: Vec<i32>,
    dir: tempfile::TempDir,
}

/// `antiphon up --json` until it says that it is ready.
fn up() -> Up {
    let dir = tempfile::tempdir().unwrap();
    let manifest = dir.path().join("fleet.yaml");
    std::fs::write(&manifest, Shape { relays: 1, workers: 1, slots: 4 }.manifest()).unwrap();
    let mut child = antiphon(dir.path())
        .args(["up", "--json", "--stop-deadline", "1s"])
        .arg(&manifest)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: Value = serde_json::from_str(&line).expect("a line of JSON once it is ready");
    let processes = ready["processes"].as_array().unwrap();
    let pids = processes.iter().map(|p| i32::try_from(p["pid"].as_i64().unwrap()).unwrap()).collect();
    Up { child, pids, dir }
}

fn alive(pid: i32) -> bool {
    test_kill_process(Pid::from_raw(pid).unwrap()).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn up_call_sessions_explain_keys_and_a_clean_end() {
    let mut up = up();
    let dir = up.dir.path();
    assert_eq!(up.pids.len(), 3);
    let saved = dir.join("answer.wav");
    let output = run(dir, &["call", "echo", "--from", "-33.9,151.2", "--save", saved.to_str().unwrap(), "--json"]);
    let call = json(&output);
    assert_eq!(call["turns"][0]["problems"], Value::Array(Vec::new()), "{call}");
    assert_eq!(call["region"], "north");
    let recording = wav::read(&std::fs::read(&saved).unwrap()).unwrap();
    assert_eq!(recording.rate, 16_000);

    let session = call["session"].as_str().unwrap();
    let explained = json(&run(dir, &["explain", session, "--json"]));
    assert_eq!(explained["session"], session);
    assert!(!explained["candidates"].as_array().unwrap().is_empty());
    let listed = json(&run(dir, &["sessions", "--json"]));
    assert!(listed.is_array());

    let created = run(dir, &["keys", "create", "--tenant", "acme"]);
    let key = String::from_utf8(created.stdout).unwrap().trim().to_owned();
    let with_key = run(dir, &["sessions", "--json", "--api-key", &key]);
    assert!(json(&with_key).is_array());
    let keys = json(&run(dir, &["keys", "list", "--json"]));
    let id =
        keys.as_array().unwrap().iter().find(|k| k["tenant"] == "acme").unwrap()["id"].as_str().unwrap().to_owned();
    assert!(run(dir, &["keys", "revoke", &id]).status.success());
    let revoked = run(dir, &["sessions", "--api-key", &key]);
    assert!(!revoked.status.success());
    assert!(String::from_utf8_lossy(&revoked.stderr).starts_with("error: not allowed"), "{revoked:?}");

    let pid = Pid::from_raw(i32::try_from(up.child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    assert!(up.child.wait().unwrap().success());
    assert!(!up.pids.iter().any(|pid| alive(*pid)), "nothing is left behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_up_leaves_no_process_behind() {
    let mut up = up();
    up.child.kill().unwrap();
    up.child.wait().unwrap();
    eventually("its processes end with it", async || !up.pids.iter().any(|pid| alive(*pid))).await;
}

#[test]
fn mistakes_in_manifests_name_file_line_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.yaml");
    let text = Shape { relays: 1, workers: 1, slots: 4 }.manifest();
    let text = text.replace("sessions: {slotsPerWorker: 4}", "sessions: {slotsPerWorker: 0, slotsPerWoker: 4}");
    std::fs::write(&file, text).unwrap();
    let output = run(dir.path(), &["up", file.to_str().unwrap()]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(message.contains("bad.yaml:"), "{message}");
    assert!(message.contains("slotsPerWoker") && message.contains("slotsPerWorker"), "{message}");
    assert!(!message.contains("backtrace") && !message.contains("panicked"), "{message}");
}

#[test]
fn without_a_fleet_commands_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    for args in [&["sessions"][..], &["call", "echo"], &["keys", "list"], &["explain", "0000000000000000000000000a"]] {
        let output = run(dir.path(), args);
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(message.contains("antiphon up"), "{args:?}: {message}");
    }
    let missing = PathBuf::from("/nonexistent/fleet.yaml");
    let output = run(dir.path(), &["up", missing.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/fleet.yaml"));
}
