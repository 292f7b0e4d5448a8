//! Every input that was ever worth keeping, again.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{fs, panic::catch_unwind, path::PathBuf};

use antiphon_fuzz::TARGETS;

fn corpus(target: &str) -> Vec<PathBuf> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let entries = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn no_input_of_the_corpus_breaks_its_target() {
    let mut broken = Vec::new();
    for target in TARGETS {
        for file in corpus(target.name) {
            let bytes = fs::read(&file).unwrap();
            if catch_unwind(|| (target.run)(&bytes)).is_err() {
                broken.push(format!(
                    "cargo run -p antiphon-fuzz --example replay -- {} {}",
                    target.name,
                    file.display()
                ));
            }
        }
    }
    assert!(broken.is_empty(), "reproduce with\n{}", broken.join("\n"));
}

#[test]
fn every_target_understands_its_seeds_and_not_everything() {
    for target in TARGETS {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{}", target.name);
        for (n, seed) in seeds.iter().enumerate() {
            assert!((target.run)(seed), "{}: seed {n} is not understood", target.name);
        }
        assert!(!(target.run)(&[0xa4; 3]), "{} understands anything", target.name);
        assert!(!corpus(target.name).is_empty(), "{}: cargo xtask fuzz --keep", target.name);
    }
}

#[test]
fn the_corpus_stays_small_and_belongs_to_targets() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for entry in fs::read_dir(directory).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(TARGETS.iter().any(|target| target.name == name), "corpus/{name} is of no target");
    }
    let sizes = TARGETS.iter().flat_map(|target| corpus(target.name)).map(|file| fs::metadata(file).unwrap().len());
    let total: u64 = sizes.sum();
    assert!(total < 1_000_000, "{total} bytes");
}
