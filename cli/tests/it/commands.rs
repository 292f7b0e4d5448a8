//! The command line as people and scripts use it.

use std::{
    fs::File,
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

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

struct Up {
    child: Child,
    pids: Vec<i32>,
    processes: Vec<Value>,
    dir: tempfile::TempDir,
}

fn up() -> Up {
    up_with("")
}

/// `antiphon up --json`, with more than one region, until it says that it is ready; standard error is the file `log`.
fn up_with(more: &str) -> Up {
    let dir = tempfile::tempdir().unwrap();
    let manifest = dir.path().join("fleet.yaml");
    std::fs::write(&manifest, format!("{}{more}", Shape { relays: 1, workers: 1, slots: 4 }.manifest())).unwrap();
    let mut child = antiphon(dir.path())
        .args(["up", "--json", "--stop-deadline", "1s"])
        .arg(&manifest)
        .stdout(Stdio::piped())
        .stderr(File::create(dir.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: Value = serde_json::from_str(&line).expect("a line of JSON once it is ready");
    let processes = ready["processes"].as_array().unwrap().clone();
    let pids = processes.iter().map(|p| i32::try_from(p["pid"].as_i64().unwrap()).unwrap()).collect();
    Up { child, pids, processes, dir }
}

impl Drop for Up {
    /// A test that failed leaves no fleet behind: its processes end with their parent.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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
    let best = &explained["candidates"][0];
    assert_eq!((&best["verdict"], best["score"].is_number()), (&"chosen".into(), true), "{explained}");
    let listed = json(&run(dir, &["sessions", "--json"]));
    assert!(listed["sessions"].is_array() && listed["missing"] == Value::Array(Vec::new()), "{listed}");

    let created = run(dir, &["keys", "create", "--tenant", "acme"]);
    let key = String::from_utf8(created.stdout).unwrap().trim().to_owned();
    let with_key = run(dir, &["sessions", "--json", "--api-key", &key]);
    assert!(json(&with_key)["sessions"].is_array());
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
    let stopped = run(dir, &["call", "echo"]);
    assert!(stderr(&stopped).ends_with(": is the fleet running?\n"), "{stopped:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_call_is_not_the_agents_fault() {
    let up = up();
    let dir = up.dir.path();
    let call = antiphon(dir).args(["call", "echo", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let call = call.unwrap();
    eventually("the call is live", async || {
        let sessions = json(&run(dir, &["sessions", "--json"]));
        sessions["sessions"].as_array().unwrap().iter().any(|session| session["state"] == "active")
    })
    .await;
    kill_process(Pid::from_raw(i32::try_from(call.id()).unwrap()).unwrap(), Signal::INT).unwrap();
    let output = call.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*stderr(&output)), (Some(130), "error: interrupted\n"));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["error"], "interrupted");
    let turns = said["turns"].as_array().unwrap();
    let told = ["interrupted", "not said"].map(Value::from);
    assert!(turns.len() == 1 && told.contains(&turns[0]["problems"][0]), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_what_was_found_and_what_was_meant() {
    let up = up();
    let dir = up.dir.path();
    let nowhere = run(dir, &["call", "echo", "--region", "nort"]);
    let text = stderr(&nowhere);
    assert!(
        text.starts_with("error: refused: ") && text.contains("there is no region nort: did you mean north?"),
        "{text}"
    );
    assert!(text.contains("\nREGION  WORKER  VERDICT") && text.contains("\nnorth   -       not_allowed"), "{text}");
    let output = run(dir, &["call", "echo", "--region", "nort", "--json"]);
    let refusal: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &refusal["reason"]), (Some(1), &"no_region_matches".into()), "{refusal}");
    assert_eq!(refusal["candidates"][0]["verdict"], "not_allowed");
    let misspelt = stderr(&run(dir, &["call", "ehco"]));
    assert!(misspelt.ends_with("there is no agent default/ehco: did you mean default/echo?\n"), "{misspelt}");

    // Nobody saw the key, so nobody may have it.
    let mut unseen = antiphon(dir);
    unseen.args(["keys", "create", "--tenant", "acme"]).stdout(File::options().write(true).open("/dev/full").unwrap());
    let unseen = unseen.stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert!(stderr(&unseen).starts_with("error: the new key could not be printed and was revoked"), "{unseen:?}");
    let keys = json(&run(dir, &["keys", "list", "--json"]));
    assert_eq!(keys.as_array().unwrap().len(), 1, "only the fleet's own: {keys}");
    // Empty variables are no settings.
    let mut sessions = antiphon(dir);
    sessions.env("ANTIPHON_API_KEY", "").args(["sessions", "--json"]);
    json(&sessions.output().unwrap());
    let status = json(&run(dir, &["status", "--json"]));
    assert_eq!(status["agents"][0]["agent"], "default/echo", "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_gone_or_silent_is_said_wherever_it_is_read() {
    let south = "---
apiVersion: antiphon.dev/v1alpha1
kind: VoiceRegion
metadata: {name: south}
spec: {cluster: here, cloud: nimbus, location: {latitude: -33.9, longitude: 151.2}, relay: {replicas: 0}}
";
    let up = up_with(south);
    let dir = up.dir.path();
    let pid_of = |kind: &str, region: &str| {
        let found = up.processes.iter().find(|process| process["kind"] == kind && process["region"] == region);
        Pid::from_raw(i32::try_from(found.unwrap()["pid"].as_i64().unwrap()).unwrap()).unwrap()
    };
    kill_process(pid_of("worker", "north"), Signal::KILL).unwrap();
    eventually("the end of a worker stands in the log", async || {
        let log = std::fs::read_to_string(dir.join("log")).unwrap();
        log.contains("worker north/default-echo-0 ended (signal: 9 (SIGKILL)); started again")
    })
    .await;
    let south = pid_of("router", "south");
    kill_process(south, Signal::STOP).unwrap();
    let listed = run(dir, &["sessions", "--json"]);
    kill_process(south, Signal::CONT).unwrap();
    let listing: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!((listed.status.code(), &listing["missing"]), (Some(1), &serde_json::json!(["south"])), "{listed:?}");
    assert!(stderr(&listed).starts_with("error: calls of south are missing: no answer from there"), "{listed:?}");
}

#[test]
fn a_demo_has_a_fleet_of_its_own() {
    let output = Command::new(env!("CARGO_BIN_EXE_antiphon")).args(["demo", "--dir", "/nonexistent"]).output().unwrap();
    assert!(stderr(&output).contains("--keep, not --dir") && !output.status.success(), "{output:?}");
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
