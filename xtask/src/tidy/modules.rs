//! The module tree: which files are compiled at all, and where each test is.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Source, Violation, sources::code};

/// A member of the workspace.
#[derive(Debug)]
pub(super) struct Package {
    /// Relative to the workspace.
    pub(super) directory: PathBuf,
    targets: Vec<Target>,
}

#[derive(Debug)]
struct Target {
    /// Path of its root module: `relay`, or `relay::it` for the test binary `it`.
    path: Vec<String>,
    file: PathBuf,
}

/// What the compiler would see.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// Root files of crates.
    pub(super) roots: Vec<Source>,
    /// Every test: `relay::table::tests::name`.
    pub(super) tests: BTreeSet<String>,
    reached: BTreeSet<PathBuf>,
    /// Modules that are declared and have no file.
    missing: Vec<Violation>,
}

/// The members of the workspace with their targets.
pub(super) fn packages(metadata: &Value, root: &Path) -> Result<Vec<Package>> {
    let members = metadata["workspace_members"].as_array().context("metadata has members")?;
    let relative =
        |path: &Value| -> Option<PathBuf> { Path::new(path.as_str()?).strip_prefix(root).ok().map(Path::to_owned) };
    let packages = metadata["packages"].as_array().context("metadata has packages")?;
    let members = packages.iter().filter(|package| members.contains(&package["id"]));
    members
        .map(|package| {
            let name = package["name"].as_str().context("a package has a name")?;
            let name = name.trim_start_matches("antiphon-").to_owned();
            let manifest = relative(&package["manifest_path"]).context("a member lies in the workspace")?;
            let targets = package["targets"].as_array().into_iter().flatten();
            let targets = targets.filter_map(|target| {
                let kind = target["kind"][0].as_str()?;
                let own = ["test", "bench", "example"].contains(&kind).then(|| target["name"].as_str());
                let path = std::iter::once(name.clone()).chain(own.flatten().map(str::to_owned)).collect();
                Some(Target { path, file: relative(&target["src_path"])? })
            });
            let targets = targets.collect();
            Ok(Package { directory: manifest.parent().unwrap_or(Path::new("")).to_owned(), targets })
        })
        .collect()
}

/// Follows `mod` declarations from the root of every target.
pub(super) fn walk(packages: &[Package], sources: &[Source]) -> Tree {
    let by_file: BTreeMap<&Path, &Source> = sources.iter().map(|source| (source.file.as_path(), source)).collect();
    let mut tree = Tree::default();
    for target in packages.iter().flat_map(|package| &package.targets) {
        if let Some(root) = by_file.get(target.file.as_path()) {
            tree.roots.push((*root).clone());
            let directory = target.file.parent().unwrap_or(Path::new("")).to_owned();
            tree.file(&by_file, root, &directory, &target.path);
        }
    }
    tree
}

impl Tree {
    /// Files that no target reaches and modules without a file.
    pub(super) fn check(&self, sources: &[Source]) -> Vec<Violation> {
        let unreached = sources.iter().filter(|source| !self.reached.contains(&source.file));
        let unreached = unreached
            .map(|source| Violation::new(&source.file, 0, "no module declares this file: it is never compiled"));
        self.missing.iter().cloned().chain(unreached).collect()
    }

    /// One file, whose modules lie in `directory`.
    fn file(&mut self, by_file: &BTreeMap<&Path, &Source>, source: &Source, directory: &Path, path: &[String]) {
        if !self.reached.insert(source.file.clone()) {
            return;
        }
        for item in items(&source.text) {
            let full = [path, &item.inside, std::slice::from_ref(&item.name)].concat();
            let Kind::Module { file } = &item.kind else {
                self.tests.insert(full.join("::"));
                continue;
            };
            let inner: PathBuf = directory.join(item.inside.iter().collect::<PathBuf>());
            let here = source.file.parent().unwrap_or(Path::new(""));
            let child = match file {
                Some(file) => here.join(file),
                None => inner.join(&item.name).with_extension("rs"),
            };
            match by_file.get(child.as_path()) {
                Some(child) => self.file(by_file, child, &inner.join(&item.name), &full),
                None => {
                    let text = format!("module {} has no file {}", item.name, child.display());
                    self.missing.push(Violation::new(&source.file, item.line, text));
                }
            }
        }
    }
}

/// Something that a file declares.
struct Item {
    kind: Kind,
    name: String,
    /// The inline modules around it.
    inside: Vec<String>,
    line: usize,
}

enum Kind {
    Test,
    /// A module in a file of its own; `file` if a `#[path]` says which.
    Module {
        file: Option<PathBuf>,
    },
}

/// Modules in files of their own and tests. Relies on the layout that rustfmt gives: one item per line, and a block ends at
/// the indentation where it began.
fn items(text: &str) -> Vec<Item> {
    let mut items = Vec::new();
    let mut inside: Vec<(usize, String)> = Vec::new();
    let (mut is_test, mut path, mut in_attribute) = (false, None, false);
    for (index, line) in text.lines().enumerate() {
        let code = code(line);
        let indent = code.len() - code.trim_start().len();
        let code = code.trim();
        if code == "}" && inside.last().is_some_and(|(at, _)| *at == indent) {
            inside.pop();
        }
        if in_attribute {
            in_attribute = !code.ends_with(")]");
            continue;
        }
        if code.starts_with("#[") {
            in_attribute = !code.ends_with(']');
            is_test |= ["#[test]", "#[tokio::test"].iter().any(|attribute| code.starts_with(attribute));
            if code.starts_with("#[path") {
                path = line.split('"').nth(1).map(PathBuf::from);
            }
            continue;
        }
        let names = || inside.iter().map(|(_, name)| name.clone()).collect();
        let item = |kind, name: &str| Item { kind, name: name.to_owned(), inside: names(), line: index + 1 };
        if let Some(name) = after(code, "mod ") {
            if let Some(name) = name.strip_suffix(';') {
                items.push(item(Kind::Module { file: path.take() }, name));
            } else if let Some(name) = name.strip_suffix(" {") {
                inside.push((indent, name.to_owned()));
            }
        } else if let Some(name) = after(code, "fn ").filter(|_| is_test) {
            let name = name.split(['(', '<']).next().unwrap_or_default();
            items.push(item(Kind::Test, name));
        }
        if !code.is_empty() {
            (is_test, path) = (false, None);
        }
    }
    items
}

/// What follows the keyword of an item, whatever its visibility.
fn after<'a>(code: &'a str, keyword: &str) -> Option<&'a str> {
    let mut rest = code;
    for prefix in ["pub(crate) ", "pub(super) ", "pub ", "async "] {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
    }
    rest.strip_prefix(keyword)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let sources: Vec<Source> =
            files.iter().map(|(file, text)| Source { file: file.into(), text: (*text).to_owned() }).collect();
        let target = |path: &[&str], file: &str| Target {
            path: path.iter().map(|name| (*name).to_owned()).collect(),
            file: file.into(),
        };
        let packages = [Package {
            directory: "relay".into(),
            targets: vec![target(&["relay"], "relay/src/lib.rs"), target(&["relay", "it"], "relay/tests/it.rs")],
        }];
        let tree = walk(&packages, &sources);
        let violations = tree.check(&sources).iter().map(ToString::to_string).collect();
        (violations, tree.tests.into_iter().collect())
    }

    #[test]
    fn tests_are_named_by_their_modules() {
        let (violations, tests) = tree(&[
            ("relay/src/lib.rs", "pub mod table;\n"),
            (
                "relay/src/table.rs",
                "pub(crate) mod swap;\n\n#[cfg(test)]\nmod tests {\n    #[test]\n    fn inline() {\n    }\n\n    fn helper() {}\n}\n",
            ),
            ("relay/src/table/swap.rs", "#[cfg(test)]\nmod tests;\n"),
            (
                "relay/src/table/swap/tests.rs",
                "#[tokio::test(\n    start_paused = true,\n)]\n#[should_panic]\nasync fn in_a_file() {}\n",
            ),
            ("relay/tests/it.rs", "mod it {\n    mod drain;\n}\n"),
            ("relay/tests/it/drain.rs", "#[test]\nfn whole() {}\n"),
        ]);
        assert_eq!(violations, [""; 0]);
        assert_eq!(
            tests,
            ["relay::it::it::drain::whole", "relay::table::swap::tests::in_a_file", "relay::table::tests::inline"]
        );
    }

    #[test]
    fn files_that_nobody_declares_are_found() {
        let (violations, _) = tree(&[
            ("relay/src/lib.rs", "// mod ghost;\nmod absent;\n"),
            ("relay/src/ghost.rs", "#[test]\nfn never_runs() {}\n"),
        ]);
        assert_eq!(
            violations,
            [
                "relay/src/lib.rs:2: module absent has no file relay/src/absent.rs",
                "relay/src/ghost.rs: no module declares this file: it is never compiled",
            ]
        );
    }

    #[test]
    fn path_attributes_are_followed() {
        let (violations, _) =
            tree(&[("relay/src/lib.rs", "#[path = \"other.rs\"]\nmod named;\n"), ("relay/src/other.rs", "")]);
        assert_eq!(violations, [""; 0]);
    }

    #[test]
    fn members_are_read_from_metadata() {
        let metadata = serde_json::json!({
            "workspace_members": ["r#1"],
            "packages": [
                {"id": "x#1", "name": "tokio", "manifest_path": "/registry/tokio/Cargo.toml", "targets": []},
                {
                    "id": "r#1", "name": "antiphon-relay", "manifest_path": "/w/relay/Cargo.toml",
                    "targets": [
                        {"name": "antiphon_relay", "kind": ["lib"], "src_path": "/w/relay/src/lib.rs"},
                        {"name": "it", "kind": ["test"], "src_path": "/w/relay/tests/it.rs"},
                    ],
                },
            ],
        });
        let packages = packages(&metadata, Path::new("/w")).unwrap();
        assert_eq!(packages.len(), 1);
        assert_eq!(packages[0].directory, Path::new("relay"));
        assert_eq!(packages[0].targets[1].path, ["relay", "it"]);
        assert_eq!(packages[0].targets[1].file, Path::new("relay/tests/it.rs"));
    }
}
