//! Forwarders in processes of their own, on the CPU to be measured.

use std::{
    fs,
    io::{BufRead as _, BufReader, ErrorKind},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum as _;
use tempfile::TempDir;

use super::{fleet::frame, load::CLIENTS};
use crate::{Served, machine::Cpus};

/// A running forwarder. Ends with the value.
#[derive(Debug)]
pub(super) struct Forwarder {
    pub(super) name: &'static str,
    /// Where clients send to.
    pub(super) public: SocketAddr,
    pub(super) back: Back,
    child: Child,
    _files: Option<TempDir>,
}

/// How the worker answers.
#[derive(Debug)]
pub(super) enum Back {
    /// With frames that name the client, to this address.
    Tunnel(SocketAddr),
    /// To the address that the client's packets came from, learnt by client.
    Sessions(Vec<Option<SocketAddr>>),
}

impl Forwarder {
    /// A forwarder of this program.
    pub(super) fn own(name: &'static str, served: Served, sink: SocketAddr, cpus: Cpus) -> anyhow::Result<Self> {
        let (child, line) = start(served, sink, cpus)?;
        let addresses = line.trim().split_once(' ').with_context(|| format!("the {name} says {line:?}"))?;
        Ok(Self { name, public: addresses.0.parse()?, back: Back::Tunnel(addresses.1.parse()?), child, _files: None })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where the worker sends a packet for a client, and as what.
    pub(super) fn answer(&self, client: usize, address: SocketAddr, packet: &[u8]) -> anyhow::Result<Answer> {
        match &self.back {
            Back::Tunnel(tunnel) => Ok((*tunnel, frame(address, packet))),
            Back::Sessions(sessions) => {
                let learnt = sessions.get(client).copied().flatten();
                Ok((learnt.with_context(|| format!("{} has forwarded nothing of a client", self.name))?, packet.into()))
            }
        }
    }
}

/// Address and datagram.
pub(super) type Answer = (SocketAddr, Vec<u8>);

impl Drop for Forwarder {
    fn drop(&mut self) {
        // It may have ended by itself; there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts this program as what is measured, and gives the first line that it says.
pub(crate) fn start(served: Served, sink: SocketAddr, cpus: Cpus) -> anyhow::Result<(Child, String)> {
    let kind = served.to_possible_value().context("every kind has a name")?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--serve", kind.get_name(), "--sink", &sink.to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = cpus.measured(|| command.spawn().context("starting this program again"))?;
    let mut line = String::new();
    let out = child.stdout.take().context("the output was asked for")?;
    BufReader::new(out).read_line(&mut line)?;
    Ok((child, line))
}

/// nginx as a stream proxy in a single process, installed from Debian where it is absent and can be.
pub(super) fn nginx(sink: SocketAddr, cpus: Cpus) -> anyhow::Result<Forwarder> {
    if !nginx_is_there() {
        install()?;
    }
    let files = TempDir::new()?;
    let public = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let config = files.path().join("nginx.conf");
    let module = if Path::new(STREAM).exists() { format!("load_module {STREAM};") } else { String::new() };
    let text = format!(
        "daemon off; master_process off; pid {pid}; error_log stderr crit; {module}\n\
         events {{ worker_connections 1024; }}\n\
         stream {{ server {{ listen {public} udp rcvbuf=4m; proxy_pass {sink}; proxy_timeout 10m; }} }}\n",
        pid = files.path().join("pid").display(),
    );
    fs::write(&config, text)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(files.path()).arg("-c").arg(&config).stdin(Stdio::null());
    let child = cpus.measured(|| command.spawn().context("starting nginx"))?;
    let back = Back::Sessions(vec![None; CLIENTS]);
    Ok(Forwarder { name: "nginx", public, back, child, _files: Some(files) })
}

fn nginx_is_there() -> bool {
    let version = Command::new("nginx").arg("-V").stdin(Stdio::null()).output();
    let built_in = |text: &[u8]| String::from_utf8_lossy(text).split_whitespace().any(|word| word == "--with-stream");
    version.is_ok_and(|said| built_in(&said.stderr) || Path::new(STREAM).exists())
}

fn install() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("its stream proxy is not installed: `apt-get install {PACKAGE}` as root");
    }
    eprintln!("  installing {PACKAGE}");
    let mut command = Command::new("apt-get");
    command.args(["install", "--yes", "--no-install-recommends", PACKAGE]).stdin(Stdio::null());
    match command.stdout(Stdio::null()).status() {
        Ok(status) => ensure!(status.success(), "apt-get install {PACKAGE}: {status}"),
        Err(error) if error.kind() == ErrorKind::NotFound => bail!("its stream proxy is not installed"),
        Err(error) => return Err(error).context("apt-get"),
    }
    Ok(())
}

/// Debian's.
const STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
const PACKAGE: &str = "libnginx-mod-stream";
