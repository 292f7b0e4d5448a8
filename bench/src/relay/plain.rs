//! A forwarder without protocol work: `recvmmsg`, then `sendmmsg`, 64 datagrams at a time, no offload, no thread.
//!
//! Upstream it sends each datagram to the worker as it is. Downstream it believes the tunnel header about the client
//! and takes it off: without a table of clients it could not know where to.

use std::{
    array,
    io::{IoSlice, IoSliceMut},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::AsRawFd as _,
};

use antiphon_core::tunnel::{HEADER_LEN, Header};
use mio::{Events, Interest, Poll, Token, net::UdpSocket};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg},
};

use super::fleet::until_input_ends;

/// Forwards on one thread, until standard input ends. Says its public and its tunnel address.
pub(crate) fn serve(worker: SocketAddr) -> anyhow::Result<()> {
    let SocketAddr::V4(worker) = worker else {
        anyhow::bail!("{worker} is no IPv4 address");
    };
    let (mut front, mut back) = (bind()?, bind()?);
    let line = format!("{} {}", front.local_addr()?, back.local_addr()?);
    let mut poll = Poll::new()?;
    poll.registry().register(&mut front, Token(0), Interest::READABLE)?;
    poll.registry().register(&mut back, Token(1), Interest::READABLE)?;
    std::thread::Builder::new().name("plain".into()).spawn(move || {
        let (mut up, mut down) = (Batch::new(), Batch::new());
        let mut events = Events::with_capacity(8);
        let mut forward = || -> anyhow::Result<()> {
            loop {
                poll.poll(&mut events, None)?;
                // Readiness is told once: both sockets have to be emptied before the next wait.
                loop {
                    let upwards = up.forward(&front, &back, |_| Some((0, worker)))?;
                    let downwards = down.forward(&back, &front, to_client)?;
                    if !upwards && !downwards {
                        break;
                    }
                }
            }
        };
        if let Err(error) = forward() {
            eprintln!("plain forwarder: {error:#}");
        }
    })?;
    until_input_ends(&line)
}

fn bind() -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    // As large as the relay's.
    socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20)?;
    socket2::SockRef::from(&socket).set_send_buffer_size(4 << 20)?;
    Ok(socket)
}

/// Where the datagram within a frame begins, and whose it is.
fn to_client(frame: &[u8]) -> Option<(usize, SocketAddrV4)> {
    match Header::parse(frame).ok()?.client.to_socket_addr() {
        SocketAddr::V4(client) => Some((HEADER_LEN, client)),
        SocketAddr::V6(_) => None,
    }
}

struct Batch {
    memory: Vec<u8>,
    received: MultiHeaders<SockaddrIn>,
    sent: MultiHeaders<SockaddrIn>,
}

impl Batch {
    fn new() -> Self {
        Self {
            memory: vec![0; BATCH * DATAGRAM_BYTES],
            received: MultiHeaders::preallocate(BATCH, None),
            sent: MultiHeaders::preallocate(BATCH, None),
        }
    }

    /// One batch; false when nothing had come.
    fn forward(
        &mut self,
        from: &UdpSocket,
        to: &UdpSocket,
        route: impl Fn(&[u8]) -> Option<(usize, SocketAddrV4)>,
    ) -> nix::Result<bool> {
        let mut lengths = [0; BATCH];
        let mut chunks = self.memory.chunks_exact_mut(DATAGRAM_BYTES);
        let mut buffers: [_; BATCH] = array::from_fn(|_| [IoSliceMut::new(chunks.next().unwrap_or_default())]);
        let flags = MsgFlags::MSG_DONTWAIT;
        let count = match recvmmsg(from.as_raw_fd(), &mut self.received, buffers.iter_mut(), flags, None) {
            Err(Errno::EAGAIN) => return Ok(false),
            Err(error) => return Err(error),
            Ok(messages) => messages.zip(&mut lengths).map(|(message, len)| *len = message.bytes).count(),
        };
        let mut slices = [[IoSlice::new(&[])]; BATCH];
        let mut destinations = [None; BATCH];
        let mut used = 0;
        for (datagram, len) in self.memory.chunks_exact(DATAGRAM_BYTES).zip(lengths).take(count) {
            if let Some((begin, destination)) = route(&datagram[..len]) {
                slices[used] = [IoSlice::new(&datagram[begin..len])];
                destinations[used] = Some(SockaddrIn::from(destination));
                used += 1;
            }
        }
        let mut left = 0;
        while left < used {
            let rest = (&slices[left..used], &destinations[left..used]);
            match sendmmsg(to.as_raw_fd(), &mut self.sent, rest.0, rest.1, [], flags) {
                Ok(sent) => left += sent.count().max(1),
                // A full buffer: what is left is lost, as with the relay.
                Err(_) => break,
            }
        }
        Ok(true)
    }
}

const BATCH: usize = 64;
const DATAGRAM_BYTES: usize = 2048;
