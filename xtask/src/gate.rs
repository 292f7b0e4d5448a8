//! `cargo xtask test`: everything that must hold before a change is merged.

use std::{
    env, fs,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    tidy,
    workspace::{Workspace, cargo},
};

struct Step {
    name: &'static str,
    about: &'static str,
    run: fn(&Workspace) -> Result<()>,
}

/// Prints the steps.
pub(crate) fn list() {
    for step in &STEPS {
        println!("{:<8} {}", step.name, step.about);
    }
}

/// Runs the named steps, or all, and stops at the first that fails.
pub(crate) fn run(workspace: &Workspace, names: &[String]) -> Result<()> {
    if let Some(unknown) = names.iter().find(|name| STEPS.iter().all(|step| step.name != **name)) {
        let known: Vec<&str> = STEPS.iter().map(|step| step.name).collect();
        bail!("no step is called {unknown}; the steps are {}", known.join(", "));
    }
    let begin = Instant::now();
    let mut times = Vec::new();
    for step in STEPS.iter().filter(|step| names.is_empty() || names.iter().any(|name| name == step.name)) {
        println!("\n== {}: {}", step.name, step.about);
        let begin = Instant::now();
        let result = (step.run)(workspace);
        let time = begin.elapsed();
        let verdict = if result.is_ok() { "passed" } else { "FAILED" };
        println!("== {}: {verdict} in {}", step.name, seconds(time));
        times.push((step.name, time));
        if let Err(error) = result {
            summary(&times, begin.elapsed());
            return Err(error.context(format!("{} failed", step.name)));
        }
    }
    summary(&times, begin.elapsed());
    println!("everything passed");
    Ok(())
}

fn summary(times: &[(&str, Duration)], total: Duration) {
    println!();
    for (name, time) in times {
        println!("{name:<8} {:>8}", seconds(*time));
    }
    println!("{:<8} {:>8}", "total", seconds(total));
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// The core has to build where there is no operating system. Where the target can be had neither from the toolchain nor
/// through rustup (Debian's rustc, a machine without a network), the dependency rules of `tidy` stand alone, and this says
/// so.
fn wasm(workspace: &Workspace) -> Result<()> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = workspace.command(rustc);
    let output = command.args(["--print", "target-libdir", "--target", WASM]).output()?;
    let directory = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    if !directory.is_dir() {
        let mut rustup = workspace.command("rustup");
        let added = rustup.args(["target", "add", WASM]).stdout(Stdio::null()).status();
        if !added.is_ok_and(|status| status.success()) {
            println!("{WASM} is neither installed nor to be had: only the dependency rules of tidy were checked");
            return Ok(());
        }
    }
    workspace.cargo(&["check", "--package", "antiphon-core", "--target", WASM])
}

fn documentation(workspace: &Workspace) -> Result<()> {
    let mut command = workspace.command(cargo());
    command.args(["doc", "--no-deps", "--workspace", "--document-private-items"]);
    workspace.run(command.env("RUSTDOCFLAGS", "-D warnings"))
}

fn deny(workspace: &Workspace) -> Result<()> {
    let directory = tools()?.join(format!("cargo-deny-{CARGO_DENY}"));
    let binary = directory.join("bin/cargo-deny");
    if !binary.is_file() {
        println!("installing cargo-deny {CARGO_DENY} into {} (once)", directory.display());
        fs::create_dir_all(&directory)?;
        let mut command = workspace.command(cargo());
        command.args(["install", "cargo-deny", "--locked", "--debug", "--version", CARGO_DENY]);
        // Not into the clone, whatever the caller's target directory is.
        command.arg("--root").arg(&directory).arg("--target-dir").arg(directory.join("target"));
        workspace.run(command.env("CARGO_PROFILE_DEV_DEBUG", "false"))?;
        fs::remove_dir_all(directory.join("target"))?;
    }
    // Advisories need a clone of the database, so they are a task of their own for machines that may fetch it.
    let mut command = workspace.command(binary);
    workspace.run(command.args(["--log-level", "error", "check", "bans", "licenses", "sources"]))
}

/// Where tools are kept between runs and clones.
fn tools() -> Result<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = cache.or_else(home).context("neither XDG_CACHE_HOME nor HOME is set")?;
    Ok(cache.join("antiphon/tools"))
}

const WASM: &str = "wasm32-unknown-unknown";
const CARGO_DENY: &str = "0.20.2";

/// Quick ones first.
const STEPS: [Step; 8] = [
    Step {
        name: "fmt",
        about: "the code is formatted",
        run: |workspace| workspace.cargo(&["fmt", "--all", "--check"]),
    },
    Step { name: "tidy", about: "the project's conventions hold", run: tidy::run },
    Step {
        name: "clippy",
        about: "no lint has anything to say",
        run: |workspace| workspace.cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    },
    Step {
        name: "build",
        about: "all binaries build",
        run: |workspace| workspace.cargo(&["build", "--workspace", "--bins"]),
    },
    Step { name: "wasm", about: "the core builds without an operating system", run: wasm },
    Step { name: "test", about: "all tests pass", run: |workspace| workspace.cargo(&["test", "--workspace"]) },
    Step { name: "doc", about: "the documentation has no broken links", run: documentation },
    Step { name: "deny", about: "dependencies keep to licences, sources and bans", run: deny },
];
