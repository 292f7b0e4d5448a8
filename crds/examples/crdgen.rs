//! Writes the CustomResourceDefinitions to where they are committed, `crds/yaml` and the chart: `cargo xtask crds`.
#![forbid(unsafe_code)]

use std::{fs, io, path::Path};

fn main() -> io::Result<()> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for directory in antiphon_crds::crdgen::DIRECTORIES {
        fs::create_dir_all(workspace.join(directory))?;
        for file in antiphon_crds::crdgen::files() {
            fs::write(workspace.join(directory).join(&file.name), &file.yaml)?;
            println!("{directory}/{}", file.name);
        }
    }
    Ok(())
}
