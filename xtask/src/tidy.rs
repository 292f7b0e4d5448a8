//! `cargo xtask tidy`: the conventions of the project that no compiler knows.

mod architecture;
mod dependencies;
mod metrics;
mod modules;
mod sources;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

use crate::workspace::Workspace;

/// A convention that is not kept. Shown as `FILE:LINE: what`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Violation {
    /// Relative to the workspace.
    file: PathBuf,
    /// From 1; 0 if the whole file is meant.
    line: usize,
    /// What is wrong and what to do.
    text: String,
}

/// A Rust file of the workspace.
#[derive(Clone, Debug)]
struct Source {
    /// Relative to the workspace.
    file: PathBuf,
    text: String,
}

/// Prints every violation; any is an error.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let metadata = workspace.metadata()?;
    let packages = modules::packages(&metadata, &workspace.root)?;
    let mut sources = Vec::new();
    for package in &packages {
        collect(&workspace.root, &package.directory, &mut sources)?;
    }
    let tree = modules::walk(&packages, &sources);
    let mut violations = dependencies::check(&dependencies::Graph::of_metadata(&metadata)?);
    violations.extend(tree.check(&sources));
    violations.extend(sources.iter().flat_map(sources::check));
    violations.extend(tree.roots.iter().filter_map(sources::check_root));
    let mut document = |name: &str, check: &dyn Fn(&Path, &str) -> Vec<Violation>| {
        let file = Path::new(name);
        violations.extend(match fs::read_to_string(workspace.root.join(file)) {
            Ok(text) => check(file, &text),
            Err(error) => vec![Violation::new(file, 0, format!("cannot be read: {error}"))],
        });
    };
    document("ARCHITECTURE.md", &|file, text| architecture::check(file, text, &tree.tests));
    document("docs/metrics.md", &|file, text| metrics::check(file, text, &sources));
    for violation in &violations {
        println!("{violation}");
    }
    match violations.len() {
        0 => {
            println!("{} files, {} tests: tidy", sources.len(), tree.tests.len());
            Ok(())
        }
        count => bail!("{count} conventions are not kept"),
    }
}

/// All Rust files below a directory, without those of cargo or hidden ones.
fn collect(root: &Path, directory: &Path, sources: &mut Vec<Source>) -> Result<()> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(root.join(directory))? {
        entries.push(entry?.file_name());
    }
    entries.sort();
    for name in entries {
        let file = directory.join(&name);
        let hidden = name.to_string_lossy().starts_with('.');
        let path = root.join(&file);
        if path.is_dir() {
            if !hidden && name != "target" {
                collect(root, &file, sources)?;
            }
        } else if file.extension().is_some_and(|extension| extension == "rs") {
            sources.push(Source { text: fs::read_to_string(path)?, file });
        }
    }
    Ok(())
}

impl Violation {
    fn new(file: &Path, line: usize, text: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line, text: text.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file.display(), self.text),
            line => write!(f, "{}:{line}: {}", self.file.display(), self.text),
        }
    }
}
