//! `cargo xtask fuzz`: a bounded search for bytes that break a parser, guided by the code that they reach.
//!
//! libFuzzer on stable Rust: the compiler's own coverage pass is asked for by flag, so neither a nightly toolchain nor a
//! cargo plugin is needed, only a C++ compiler.

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::workspace::{Workspace, cargo};

/// What to search, and for how long.
#[derive(Debug)]
pub(crate) struct Search {
    /// Names of targets; none: all.
    pub(crate) targets: Vec<String>,
    /// For all of them together.
    pub(crate) seconds: u64,
    /// Whether inputs that reach new code are to be kept in the repository.
    pub(crate) keep: bool,
}

/// Builds the fuzzer, runs it on each target and prints a line for each. A finding is an error.
pub(crate) fn run(workspace: &Workspace, search: &Search) -> Result<()> {
    let all = listed(workspace)?;
    if let Some(unknown) = search.targets.iter().find(|name| !all.contains(name)) {
        bail!("no target is called {unknown}; the targets are {}", all.join(", "));
    }
    let targets: Vec<&String> =
        all.iter().filter(|name| search.targets.is_empty() || search.targets.contains(name)).collect();
    let fuzzer = Fuzzer::build(workspace)?;
    replay(workspace, &["--seeds", &fuzzer.found.to_string_lossy()])?;
    let seconds = (search.seconds / targets.len() as u64).max(1);
    println!("{} targets, {seconds} s each; inputs in {}", targets.len(), fuzzer.found.display());
    println!("{HEAD}");
    let mut findings = Vec::new();
    for target in targets {
        print!("{target:<16}");
        std::io::stdout().flush()?;
        let (run, found) = fuzzer.run(target, seconds)?;
        println!("{run}{:>8}", found.len());
        findings.extend(found.into_iter().map(|file| (target, file)));
        if search.keep {
            fuzzer.keep(target)?;
        }
    }
    for (target, file) in &findings {
        println!("\n{target} breaks; reproduce it with");
        println!("cargo run -p antiphon-fuzz --example replay -- {target} {}", file.display());
    }
    match findings.len() {
        0 => Ok(()),
        count => bail!("{count} findings; `cargo test -p antiphon-fuzz` fails until they are mended"),
    }
}

/// Names of all targets.
fn listed(workspace: &Workspace) -> Result<Vec<String>> {
    let list = replay(workspace, &["--list"])?;
    Ok(list.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

/// What the targets' own program says.
fn replay(workspace: &Workspace, arguments: &[&str]) -> Result<String> {
    let mut command = workspace.command(cargo());
    command.args(["run", "--quiet", "--package", "antiphon-fuzz", "--example", "replay", "--"]).args(arguments);
    let output = command.stderr(Stdio::inherit()).output().context("cargo run cannot be started")?;
    if !output.status.success() {
        bail!("the targets cannot be built: {}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}

struct Fuzzer<'w> {
    workspace: &'w Workspace,
    binary: PathBuf,
    /// What searches have found so far, by target. Outlives a search, not `cargo clean`.
    found: PathBuf,
    /// What is kept in the repository, by target.
    kept: PathBuf,
}

impl<'w> Fuzzer<'w> {
    fn build(workspace: &'w Workspace) -> Result<Self> {
        let compiler = env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let compiles = Command::new(&compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !compiles.is_ok_and(|status| status.success()) {
            bail!("libFuzzer is C++ and {} cannot be run: install g++ or clang", compiler.display());
        }
        let host = host(workspace)?;
        let mut command = workspace.command(cargo());
        command.args(["build", "--package", "antiphon-fuzz", "--bin", "antiphon-fuzz", "--features", "libfuzzer"]);
        // With a target named, build scripts and macros are built without the flags.
        command.args(["--profile", "fuzz", "--target", &host]);
        workspace.run(command.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", COVERAGE.join(" ")))?;
        let metadata = workspace.metadata()?;
        let target = Path::new(metadata["target_directory"].as_str().context("cargo names no target directory")?);
        Ok(Self {
            workspace,
            binary: target.join(host).join("fuzz/antiphon-fuzz"),
            found: target.join("fuzz-inputs"),
            kept: workspace.root.join("fuzz/corpus"),
        })
    }

    fn command(&self, target: &str) -> Command {
        let mut command = self.workspace.command(&self.binary);
        command.env("ANTIPHON_FUZZ_TARGET", target).args([LONGEST_INPUT, "-timeout=10", "-rss_limit_mb=2048"]);
        command
    }

    /// Searches one target. Inputs that break it go to the corpus, so that tests fail until they no longer do.
    fn run(&self, target: &str, seconds: u64) -> Result<(Run, Vec<PathBuf>)> {
        let (found, kept) = (self.found.join(target), self.kept.join(target));
        fs::create_dir_all(&found)?;
        fs::create_dir_all(&kept)?;
        let before = broken(&kept)?;
        let mut command = self.command(target);
        command.arg(&found).arg(&kept).arg(format!("-max_total_time={seconds}"));
        command.arg(format!("-artifact_prefix={}/", kept.display())).arg("-print_final_stats=1");
        let output = command.stdout(Stdio::null()).stderr(Stdio::piped()).output();
        let output = output.with_context(|| format!("{} cannot be started", self.binary.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        let log = self.found.join(format!("{target}.log"));
        fs::write(&log, &*said)?;
        let news: Vec<_> = broken(&kept)?.into_iter().filter(|file| !before.contains(file)).collect();
        if !output.status.success() && news.is_empty() {
            // An input of the corpus breaks it, or the fuzzer itself is broken.
            bail!("{target}: {}; see {}", output.status, log.display());
        }
        Ok((Run::of(&said), news))
    }

    /// Replaces what is kept by the fewest inputs that take the same edges, small ones first. Inputs that people have
    /// named stay.
    fn keep(&self, target: &str) -> Result<()> {
        let (kept, merged) = (self.kept.join(target), self.found.join(format!("{target}.merged")));
        if merged.is_dir() {
            fs::remove_dir_all(&merged)?;
        }
        fs::create_dir_all(&merged)?;
        let mut command = self.command(target);
        command.args(["-set_cover_merge=1", "-use_counters=0"]);
        command.arg(&merged).arg(self.found.join(target)).arg(&kept);
        self.workspace.run(command.stdout(Stdio::null()).stderr(Stdio::null()))?;
        let mut inputs = Vec::new();
        for entry in fs::read_dir(&merged)? {
            let path = entry?.path();
            inputs.push((fs::metadata(&path)?.len(), path));
        }
        inputs.sort();
        let mut room = KEPT_BYTES;
        inputs.retain(|(length, _)| {
            let fits = *length <= room;
            room -= if fits { *length } else { 0 };
            fits
        });
        for entry in fs::read_dir(&kept)? {
            let path = entry?.path();
            if is_digest(&path) {
                fs::remove_file(path)?;
            }
        }
        for (_, path) in inputs {
            fs::copy(&path, kept.join(path.file_name().context("a file has a name")?))?;
        }
        Ok(fs::remove_dir_all(merged)?)
    }
}

/// Inputs that break their target, by libFuzzer's names for them.
fn broken(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if ["crash-", "timeout-", "oom-", "leak-"].iter().any(|kind| name.starts_with(kind)) {
            files.push(path);
        }
    }
    Ok(files)
}

/// Whether libFuzzer has named the file: after the SHA-1 of what is in it.
fn is_digest(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.len() == 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The triple that this machine builds for.
fn host(workspace: &Workspace) -> Result<String> {
    let mut command = workspace.command(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let output = command.arg("-vV").output().context("rustc cannot be started")?;
    let said = String::from_utf8(output.stdout)?;
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc names no host")?.to_owned())
}

/// A search in figures.
#[derive(Debug, Default, PartialEq, Eq)]
struct Run {
    executions: u64,
    per_second: u64,
    /// Edges of the control flow that were taken.
    coverage: u64,
    /// Inputs that each reach something of their own.
    corpus: u64,
}

impl Run {
    /// Reads what libFuzzer has said.
    fn of(said: &str) -> Self {
        let number =
            |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
        let after = |label: &str| {
            let last = said.lines().rev().find_map(|line| line.split_once(label));
            last.map_or(0, |(_, rest)| number(rest.trim_start()))
        };
        // After a crash there are no final statistics: each progress line begins with the count.
        let last = said.lines().rev().find(|line| line.starts_with('#'));
        let counted = last.map_or(0, |line| number(&line[1..]));
        Self {
            executions: after("stat::number_of_executed_units:").max(counted),
            per_second: after("stat::average_exec_per_sec:"),
            coverage: after(" cov: "),
            corpus: after(" corp: "),
        }
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { executions, per_second, coverage, corpus } = self;
        write!(f, "{executions:>12}{per_second:>10}{coverage:>10}{corpus:>8}")
    }
}

const HEAD: &str = "TARGET            EXECUTIONS  PER SEC.  COVERAGE  CORPUS  BROKEN";

/// What libFuzzer needs to be told about the code: counters on every edge, and what comparisons compare.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// In bytes.
const LONGEST_INPUT: &str = "-max_len=4096";

/// Of one target, in the repository.
const KEPT_BYTES: u64 = 40_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_what_the_fuzzer_says() {
        let said = "INFO: seed corpus: files: 2\n#3 INITED cov: 12 ft: 13 corp: 2/77b\n\
            #1500 DONE cov: 321 ft: 900 corp: 45/1200b lim: 4096 exec/s: 750\nDone 1500 runs in 2 second(s)\n\
            stat::number_of_executed_units: 1501\nstat::average_exec_per_sec:     750\n";
        assert_eq!(Run::of(said), Run { executions: 1_501, per_second: 750, coverage: 321, corpus: 45 });
        let crashed = "#3 INITED cov: 12 ft: 13 corp: 2/77b\n#99 NEW cov: 14 ft: 15 corp: 3/80b\npanicked at x\n";
        assert_eq!(Run::of(crashed), Run { executions: 99, per_second: 0, coverage: 14, corpus: 3 });
        assert_eq!(Run::of(""), Run::default());
    }
}
