//! An etcd of one member on loopback.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use tempfile::TempDir;

/// A running server with an empty directory of its own. Ends with the value.
#[derive(Debug)]
pub(super) struct Etcd {
    pub(super) address: SocketAddr,
    child: Child,
    _data: TempDir,
}

impl Etcd {
    pub(super) fn start() -> anyhow::Result<Self> {
        let (data, address) = (tempfile::tempdir()?, free()?);
        let (url, peers) = (format!("http://{address}"), format!("http://{}", free()?));
        // setpriv ends it with this thread, also if that is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(binary()?).arg("--data-dir").arg(data.path().join("etcd"));
        command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url, "--name", "etcd"]);
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.args(["--initial-cluster", &format!("etcd={peers}")]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("starting etcd")?;
        let etcd = Self { address, child, _data: data };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            ensure!(Instant::now() < deadline, "etcd does not answer at {address}");
            std::thread::park_timeout(Duration::from_millis(50));
        }
        Ok(etcd)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may have ended by itself; there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where the binary is; fetched if need be.
fn binary() -> anyhow::Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/etcd-server");
    let output = Command::new("sh").arg(script).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "no etcd server to be had");
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim_end()))
}

fn free() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

const PATIENCE: Duration = Duration::from_secs(20);
