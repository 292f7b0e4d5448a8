//! Clients and a worker that send at a steady pace and count what arrives, in one busy thread.

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use quinn::udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};

use super::{
    PATIENCE,
    fleet::packet,
    forwarder::{Back, Forwarder},
};

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Up,
    Down,
}

/// How packets leave: `train` of them at a time for one client, then for the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) train: usize,
    pub(super) per_second: u32,
}

/// Packets of one window.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) sent: usize,
    pub(super) received: usize,
}

/// A socket with the system's offloads.
#[derive(Debug)]
pub(super) struct Wire {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Wire {
    pub(super) fn bind(ip: Ipv4Addr) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind((ip, 0))?;
        socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20)?;
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket, state })
    }

    /// Sends datagrams of one size. A full buffer loses them: the counts show it.
    fn send(&self, destination: SocketAddr, contents: &[u8], size: usize) -> anyhow::Result<()> {
        let segment_size = (contents.len() > size).then_some(size);
        self.transmit(&Transmit { destination, ecn: None, contents, segment_size, src_ip: None })
    }

    /// Sends a datagram from one of this machine's addresses.
    pub(super) fn send_from(&self, source: IpAddr, destination: SocketAddr, contents: &[u8]) -> anyhow::Result<()> {
        self.transmit(&Transmit { destination, ecn: None, contents, segment_size: None, src_ip: Some(source) })
    }

    fn transmit(&self, transmit: &Transmit<'_>) -> anyhow::Result<()> {
        match self.state.try_send((&self.socket).into(), transmit) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error).context("sending"),
            _ => Ok(()),
        }
    }
}

/// Sockets with the memory to receive on one at a time.
#[derive(Debug)]
pub(super) struct Wires {
    wires: Vec<Wire>,
    memory: Vec<u8>,
}

impl Wires {
    pub(super) fn bind(addresses: &[Ipv4Addr]) -> anyhow::Result<Self> {
        let wires = addresses.iter().map(|ip| Wire::bind(*ip)).collect::<Result<_, _>>()?;
        Ok(Self { wires, memory: vec![0; BATCH_SIZE * MESSAGE_BYTES] })
    }

    pub(super) fn address(&self, index: usize) -> SocketAddr {
        self.wires[index].socket.local_addr().expect("a bound socket has an address")
    }

    /// Takes what has come to a socket: the number of datagrams.
    pub(super) fn receive(&mut self, index: usize, mut seen: impl FnMut(SocketAddr, &[u8])) -> anyhow::Result<usize> {
        let Wire { socket, state } = &self.wires[index];
        let mut chunks = self.memory.chunks_exact_mut(MESSAGE_BYTES);
        let mut buffers: [IoSliceMut<'_>; BATCH_SIZE] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        let mut meta = [RecvMeta::default(); BATCH_SIZE];
        let messages = match state.recv(socket.into(), &mut buffers, &mut meta) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            messages => messages.context("receiving")?,
        };
        let mut datagrams = 0;
        for (buffer, meta) in self.memory.chunks_exact(MESSAGE_BYTES).zip(&meta[..messages]) {
            for datagram in buffer[..meta.len].chunks(meta.stride.max(1)) {
                seen(meta.addr, datagram);
                datagrams += 1;
            }
        }
        Ok(datagrams)
    }
}

/// [`CLIENTS`] clients and a worker.
#[derive(Debug)]
pub(super) struct Load {
    clients: Wires,
    worker: Wires,
    packets: Vec<Vec<u8>>,
}

impl Load {
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            clients: Wires::bind(&[Ipv4Addr::LOCALHOST; CLIENTS])?,
            worker: Wires::bind(&[Ipv4Addr::LOCALHOST])?,
            packets: (0..CLIENTS as u16).map(packet).collect(),
        })
    }

    /// Where forwarders send what clients sent.
    pub(super) fn sink(&self) -> SocketAddr {
        self.worker.address(0)
    }

    /// Sends packets of every client until one of each has come through; learns where they come from.
    pub(super) fn greet(&mut self, forwarder: &mut Forwarder) -> anyhow::Result<()> {
        let mut heard = vec![None; CLIENTS];
        let begin = Instant::now();
        while heard.contains(&None) {
            ensure!(begin.elapsed() < PATIENCE, "{} does not forward", forwarder.name);
            for (wire, packet) in self.clients.wires.iter().zip(&self.packets) {
                wire.send(forwarder.public, packet, packet.len())?;
            }
            let wave = Instant::now();
            while wave.elapsed() < QUIET && heard.contains(&None) {
                self.worker.receive(0, |from, datagram| {
                    let client = datagram.last_chunk().map(|bytes| usize::from(u16::from_be_bytes(*bytes)));
                    if let Some(heard) = client.and_then(|client| heard.get_mut(client)) {
                        *heard = Some(from);
                    }
                })?;
            }
        }
        if let Back::Sessions(sessions) = &mut forwarder.back {
            *sessions = heard;
        }
        self.settle().map(drop)
    }

    /// Sends for a time and counts.
    pub(super) fn run(
        &mut self,
        forwarder: &Forwarder,
        way: Way,
        pace: Pace,
        window: Duration,
    ) -> anyhow::Result<Counts> {
        let trains = self.trains(forwarder, way, pace.train)?;
        let gap = Duration::from_secs(1) * pace.train as u32 / pace.per_second;
        let mut counts = Counts::default();
        let begin = Instant::now();
        let mut due = begin;
        for n in 0.. {
            while Instant::now() < due {
                counts.received += self.take(way, n)?;
            }
            if begin.elapsed() >= window {
                break;
            }
            let (to, train) = &trains[n % CLIENTS];
            let wire = match way {
                Way::Up => &self.clients.wires[n % CLIENTS],
                Way::Down => &self.worker.wires[0],
            };
            wire.send(*to, train, train.len() / pace.train)?;
            counts.sent += pace.train;
            counts.received += self.take(way, n)?;
            // After being held up: at the same pace again, without a burst.
            due = (due + gap).max(Instant::now().checked_sub(gap).unwrap_or(due));
        }
        counts.received += self.settle()?;
        Ok(counts)
    }

    /// What is sent for each client, and where to.
    fn trains(&self, forwarder: &Forwarder, way: Way, len: usize) -> anyhow::Result<Vec<(SocketAddr, Vec<u8>)>> {
        let train = |(client, packet): (usize, &Vec<u8>)| {
            let (to, datagram) = match way {
                Way::Up => (forwarder.public, packet.clone()),
                Way::Down => forwarder.answer(client, self.clients.address(client), packet)?,
            };
            Ok((to, datagram.repeat(len)))
        };
        self.packets.iter().enumerate().map(train).collect()
    }

    /// What came to the worker, or to the client whose packets have had time to pass.
    fn take(&mut self, way: Way, n: usize) -> anyhow::Result<usize> {
        match way {
            Way::Up => self.worker.receive(0, |_, _| {}),
            Way::Down => self.clients.receive((n + CLIENTS / 2) % CLIENTS, |_, _| {}),
        }
    }

    /// Takes everything that is still under way.
    fn settle(&mut self) -> anyhow::Result<usize> {
        let mut all = 0;
        let mut last = Instant::now();
        while last.elapsed() < QUIET {
            let mut come = self.worker.receive(0, |_, _| {})?;
            for client in 0..CLIENTS {
                come += self.clients.receive(client, |_, _| {})?;
            }
            all += come;
            if come > 0 {
                last = Instant::now();
            }
        }
        Ok(all)
    }
}

/// Clients that send in turns.
pub(super) const CLIENTS: usize = 64;
const MESSAGE_BYTES: usize = 1 << 16;
/// Nothing is under way any more.
const QUIET: Duration = Duration::from_millis(20);
