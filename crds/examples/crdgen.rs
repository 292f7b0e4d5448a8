//! Writes the CustomResourceDefinitions into the directory that the first argument names: `cargo xtask crds`.
#![forbid(unsafe_code)]

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    let directory: PathBuf = env::args_os().nth(1).unwrap_or_else(|| "crds/yaml".into()).into();
    fs::create_dir_all(&directory)?;
    for file in antiphon_crds::crdgen::files() {
        fs::write(directory.join(&file.name), &file.yaml)?;
        println!("{}", directory.join(&file.name).display());
    }
    Ok(())
}
