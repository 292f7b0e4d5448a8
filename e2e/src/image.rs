//! Container images FROM scratch: one layer of files, written as an OCI layout in a tar, without registry or daemon.
//!
//! Equal files give equal bytes. containerd (`ctr images import`), podman and Docker (`load`) read them.

use std::{fs, io::Write, path::PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// What an image is made of.
#[derive(Clone, Debug)]
pub struct Image {
    /// Without a registry: `antiphon/router:0.1.0`.
    pub name: String,
    /// What it runs, where it lies in the image, and from where it is taken. The first one is the entry point.
    pub programs: Vec<(String, PathBuf)>,
}

impl Image {
    /// An image of one program, which lies in the root.
    #[must_use]
    pub fn of(name: &str, program: PathBuf) -> Self {
        let file = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self { name: name.to_owned(), programs: vec![(format!("/{file}"), program)] }
    }

    /// The name as containerd keeps it.
    #[must_use]
    pub fn reference(&self) -> String {
        format!("docker.io/{}", self.name)
    }

    /// Writes the archive; returns the digest of the image's configuration, which is its ID.
    ///
    /// # Errors
    /// A program cannot be read, or the archive not be written.
    pub fn write(&self, to: impl Write) -> Result<String> {
        let layer = self.layer()?;
        let layer_digest = sha256(&layer);
        let config = self.config(&layer_digest).to_string().into_bytes();
        let config_digest = sha256(&config);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config_digest, config.len()),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer_digest, layer.len())],
        });
        let manifest = manifest.to_string().into_bytes();
        let manifest_digest = sha256(&manifest);
        let mut entry = descriptor(MANIFEST, &manifest_digest, manifest.len());
        entry["annotations"] = json!({
            "io.containerd.image.name": self.reference(),
            "org.opencontainers.image.ref.name": self.name.rsplit(':').next(),
        });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] });
        // What `docker load` has read since before there was an OCI layout.
        let docker = json!([{
            "Config": blob(&config_digest),
            "RepoTags": [self.name],
            "Layers": [blob(&layer_digest)],
        }]);
        let mut archive = tar::Builder::new(to);
        for (path, bytes) in [
            ("oci-layout".to_owned(), json!({ "imageLayoutVersion": "1.0.0" }).to_string().as_bytes()),
            ("index.json".to_owned(), index.to_string().as_bytes()),
            ("manifest.json".to_owned(), docker.to_string().as_bytes()),
            (blob(&manifest_digest), &manifest),
            (blob(&config_digest), &config),
            (blob(&layer_digest), &layer),
        ] {
            append(&mut archive, &path, 0o644, bytes)?;
        }
        archive.into_inner()?.flush()?;
        Ok(config_digest)
    }

    /// The file system, as a tar.
    fn layer(&self) -> Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, file) in &self.programs {
            let bytes = fs::read(file).with_context(|| format!("{} cannot be read", file.display()))?;
            append(&mut archive, path.trim_start_matches('/'), 0o755, &bytes)?;
        }
        Ok(archive.into_inner()?)
    }

    fn config(&self, layer_digest: &str) -> Value {
        let (title, version) = self.name.rsplit_once(':').unwrap_or((&self.name, "latest"));
        json!({
            "architecture": architecture(),
            "os": "linux",
            "created": CREATED,
            "config": {
                "User": USER,
                "Entrypoint": self.programs.first().map(|(path, _)| [path]),
                "Labels": {
                    "org.opencontainers.image.title": title,
                    "org.opencontainers.image.version": version,
                    "org.opencontainers.image.licenses": "Apache-2.0",
                },
            },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer_digest}")] },
            "history": [{ "created": CREATED, "comment": "FROM scratch" }],
        })
    }
}

fn append(archive: &mut tar::Builder<impl Write>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    Ok(archive.append_data(&mut header, path, bytes)?)
}

fn descriptor(media_type: &str, digest: &str, size: usize) -> Value {
    json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size })
}

fn blob(digest: &str) -> String {
    format!("blobs/sha256/{digest}")
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// As Go and OCI call it.
const fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Nobody: neither root nor anybody of the node.
const USER: &str = "65532:65532";
/// The same for every build.
const CREATED: &str = "1970-01-01T00:00:00Z";

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read as _};

    use super::*;

    fn image(directory: &std::path::Path) -> Image {
        let program = directory.join("antiphon-router");
        fs::write(&program, "a program").unwrap();
        Image::of("antiphon/router:0.1.0", program)
    }

    fn files(archive: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            (path, (entry.header().mode().unwrap(), bytes))
        });
        entries.collect()
    }

    #[test]
    fn every_digest_in_an_archive_names_a_blob_of_that_content() {
        let directory = tempfile::tempdir().unwrap();
        let mut archive = Vec::new();
        let id = image(directory.path()).write(&mut archive).unwrap();
        let files = files(&archive);
        let follow = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let bytes = &files[&blob(digest)].1;
            assert_eq!((sha256(bytes).as_str(), descriptor["size"].as_u64()), (digest, Some(bytes.len() as u64)));
            bytes
        };
        let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        let index = json(&files["index.json"].1);
        assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], "docker.io/antiphon/router:0.1.0");
        let manifest = json(follow(&index["manifests"][0]));
        let config = json(follow(&manifest["config"]));
        assert_eq!(manifest["config"]["digest"], format!("sha256:{id}"));
        assert_eq!(
            (&config["config"]["User"], &config["config"]["Entrypoint"][0]),
            (&json!(USER), &json!("/antiphon-router"))
        );
        let layer = follow(&manifest["layers"][0]);
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let inside = self::files(layer);
        assert_eq!(inside["antiphon-router"], (0o755, b"a program".to_vec()));
        let docker = json(&files["manifest.json"].1);
        assert!(files.contains_key(docker[0]["Layers"][0].as_str().unwrap()));
    }

    #[test]
    fn equal_programs_make_equal_archives() {
        let directory = tempfile::tempdir().unwrap();
        let [mut one, mut two] = [Vec::new(), Vec::new()];
        image(directory.path()).write(&mut one).unwrap();
        image(directory.path()).write(&mut two).unwrap();
        assert_eq!(one, two);
    }
}
