//! The images that run on clusters: Antiphon's own, and those that a cluster takes besides.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tokio::process::Command;

use crate::{
    command::run,
    image::Image,
    progress,
    tools::{Tools, require_musl},
};

/// An image in a file that containerd and Docker read.
#[derive(Clone, Debug)]
pub struct Archive {
    /// As containerd keeps it: `docker.io/antiphon/router:0.1.0`.
    pub reference: String,
    /// Where it is.
    pub file: PathBuf,
    /// Digest of the image's configuration.
    pub id: String,
}

/// Antiphon's programs, static, and where they are by name.
#[derive(Clone, Debug)]
pub struct Programs(BTreeMap<String, PathBuf>);

/// The version of everything in the workspace, which images have as their tag.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

impl Programs {
    /// Builds them.
    ///
    /// # Errors
    /// They do not compile, or what compiles static programs is missing.
    pub async fn build() -> Result<Self> {
        require_musl().await?;
        let target = target();
        add_target(&target).await?;
        let mut command = cargo();
        let profile = env::var(PROFILE).unwrap_or_else(|_| "image".to_owned());
        command.args(["build", "--profile", &profile, "--bins", "--target", &target]);
        command.args(["--message-format", "json-render-diagnostics"]);
        for part in &PARTS {
            command.args(["--package", part.package]);
        }
        let what = "building Antiphon's programs, static (the first time: minutes)";
        let said = progress::step(what, async {
            // What the compiler says is for people to read.
            let child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn();
            let output = child.context("cargo cannot be started")?.wait_with_output().await?;
            match output.status.success() {
                true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
                false => bail!("cargo build: {}", output.status),
            }
        });
        Self::of_messages(&said.await?)
    }

    /// A program by its name: `antiphon-router`.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn path(&self, name: &str) -> Result<&Path> {
        self.0.get(name).map(PathBuf::as_path).with_context(|| format!("no program is called {name}"))
    }

    /// What cargo's messages say of finished executables.
    fn of_messages(said: &str) -> Result<Self> {
        let messages = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let found = messages.filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, PathBuf::from(message["executable"].as_str()?)))
        });
        let programs = Self(found.collect());
        match PARTS.iter().find(|part| !programs.0.contains_key(part.program)) {
            Some(part) => bail!("cargo has built no {}", part.program),
            None => Ok(programs),
        }
    }
}

/// Builds all images of Antiphon, and etcd's.
///
/// # Errors
/// Something does not build.
pub async fn antiphon(tools: &Tools, programs: &Programs) -> Result<Vec<Archive>> {
    let mut archives = Vec::new();
    for part in &PARTS {
        let image = Image::of(&format!("antiphon/{}:{VERSION}", part.image), programs.path(part.program)?.to_owned());
        archives.push(archive(&image)?);
    }
    let etcd = ["etcd", "etcdctl"].map(|name| (format!("/usr/local/bin/{name}"), tools.program(name)));
    archives.push(archive(&Image { name: format!("antiphon/etcd:{VERSION}"), programs: etcd.into() })?);
    Ok(archives)
}

/// The image of what the tests of the clusters themselves run.
///
/// # Errors
/// It does not build.
pub async fn probe(tools: &Tools) -> Result<Archive> {
    archive(&Image::of("antiphon/probe:1", tools.probe().await?))
}

/// What every node has from its start.
pub(crate) async fn of_nodes(tools: &Tools) -> Result<[Archive; 2]> {
    let (pause, dns) = tokio::try_join!(tools.pause(), tools.coredns())?;
    Ok([archive(&Image::of(PAUSE, pause))?, archive(&Image::of(DNS, dns))?])
}

pub(crate) const PAUSE: &str = "antiphon/pause:1";
pub(crate) const DNS: &str = "antiphon/coredns:1";

/// Writes the image's file into the target directory; a file of it that is there already stays.
fn archive(image: &Image) -> Result<Archive> {
    let directory = workspace().join("target/images");
    fs::create_dir_all(&directory)?;
    // Renamed into place: others may be reading the one before.
    let partial = tempfile::NamedTempFile::new_in(&directory)?;
    let id = image.write(BufWriter::new(File::create(partial.path())?))?;
    let name = image.name.rsplit('/').next().unwrap_or_default().replace(':', "-");
    let file = directory.join(format!("{name}.tar"));
    partial.persist(&file)?;
    Ok(Archive { reference: image.reference(), file, id })
}

/// The target that links statically.
fn target() -> String {
    format!("{}-unknown-linux-musl", env::consts::ARCH)
}

async fn add_target(target: &str) -> Result<()> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let found = run(Command::new(rustc).args(["--print", "target-libdir", "--target", target])).await?;
    if Path::new(found.trim()).is_dir() {
        return Ok(());
    }
    let add = async { run(Command::new("rustup").args(["target", "add", target])).await };
    let added = progress::step(&format!("adding the target {target}"), add).await;
    added.map(drop).with_context(|| format!("images take Rust's standard library for {target}: install it"))
}

/// The cargo that runs this program, or the one in the path, in the workspace.
fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Set by the cargo that runs this program, for this program alone: build scripts look at some of them.
    for (name, _) in env::vars_os() {
        let own = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];
        if own.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            command.env_remove(name);
        }
    }
    command.current_dir(workspace());
    command
}

/// The workspace that this program was built from.
pub(crate) fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// Names the profile that programs are built with: `dev` compiles in a fraction of the time.
const PROFILE: &str = "ANTIPHON_IMAGE_PROFILE";

/// A program of Antiphon that has an image.
struct Part {
    image: &'static str,
    package: &'static str,
    program: &'static str,
}

const PARTS: [Part; 5] = [
    Part { image: "operator", package: "antiphon-operator", program: "antiphon-operator" },
    Part { image: "router", package: "antiphon-router", program: "antiphon-router" },
    Part { image: "relay", package: "antiphon-relay", program: "antiphon-relay" },
    Part { image: "worker", package: "antiphon-worker", program: "antiphon-worker" },
    Part { image: "cli", package: "antiphon-cli", program: "antiphon" },
];
