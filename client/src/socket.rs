//! The socket under a call's QUIC connection: one constant virtual server address inside, relays outside.
//!
//! QUIC drops packets from any address but the one it connected to, so a relay's address must not be QUIC's business:
//! it sees [`VIRTUAL`], and this socket sends to the relay in use. Packets are accepted from the ticket's relays only.

use std::{
    fmt,
    future::Future,
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit, UdpSocketState},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;

/// The address that QUIC is told. Of the discard-only prefix (RFC 6666): it never appears on a network.
pub(crate) const VIRTUAL: SocketAddr = SocketAddr::V6(SocketAddrV6::new(
    Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1),
    443,
    0,
    0,
));

/// A call's socket.
pub(crate) struct RelaySocket {
    bound: RwLock<Arc<Bound>>,
    relays: Vec<SocketAddr>,
    active: AtomicUsize,
    started: Instant,
    /// Microseconds since `started` at which something last came through each relay; 0: never.
    heard: Vec<AtomicU64>,
    /// Of the endpoint's receiving task: woken when the socket below is replaced.
    receiver: Mutex<Option<Waker>>,
}

struct Bound {
    io: tokio::net::UdpSocket,
    state: UdpSocketState,
    /// The socket is IPv6 and takes IPv4 destinations in mapped form.
    mapped: bool,
}

impl fmt::Debug for RelaySocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelaySocket")
            .field("relays", &self.relays)
            .finish_non_exhaustive()
    }
}

impl RelaySocket {
    /// Binds any port. `relays` is not empty; the first is in use.
    pub(crate) fn new(relays: Vec<SocketAddr>, started: Instant) -> io::Result<Self> {
        Ok(Self {
            bound: RwLock::new(Arc::new(Bound::new(&relays)?)),
            active: AtomicUsize::new(0),
            started,
            heard: relays.iter().map(|_| AtomicU64::new(0)).collect(),
            relays,
            receiver: Mutex::new(None),
        })
    }

    /// Sends through another relay from now on.
    pub(crate) fn use_relay(&self, index: usize) {
        self.active
            .store(index.min(self.relays.len() - 1), Ordering::Relaxed);
    }

    /// Goes on from a new local address and port, as after a change of network.
    pub(crate) fn rebind(&self) -> io::Result<()> {
        let bound = Arc::new(Bound::new(&self.relays)?);
        *self.bound.write() = bound;
        if let Some(receiver) = self.receiver.lock().take() {
            receiver.wake();
        }
        Ok(())
    }

    /// When something last came through a relay, since the socket's start.
    pub(crate) fn last_heard(&self, relay: usize) -> Option<Duration> {
        match self.heard.get(relay)?.load(Ordering::Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us)),
        }
    }

    fn bound(&self) -> Arc<Bound> {
        self.bound.read().clone()
    }

    /// Relabels what came from the ticket's relays and blanks what came from strangers.
    fn relabel(&self, meta: &mut [RecvMeta]) {
        let now_us = u64::try_from(self.started.elapsed().as_micros())
            .unwrap_or(u64::MAX)
            .max(1);
        for meta in meta {
            let from = SocketAddr::new(meta.addr.ip().to_canonical(), meta.addr.port());
            if let Some(relay) = self.relays.iter().position(|relay| *relay == from) {
                self.heard[relay].store(now_us, Ordering::Relaxed);
            } else {
                meta.len = 0;
            }
            // QUIC cuts by the stride for as long as there is length: it must not be zero.
            meta.stride = meta.stride.max(1);
            meta.addr = VIRTUAL;
            meta.dst_ip = None;
        }
    }
}

impl Bound {
    fn new(relays: &[SocketAddr]) -> io::Result<Self> {
        let any_v6 = relays.iter().any(SocketAddr::is_ipv6);
        let (domain, any) = if any_v6 {
            (Domain::IPV6, IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        } else {
            (Domain::IPV4, IpAddr::V4(Ipv4Addr::UNSPECIFIED))
        };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        if any_v6 {
            socket.set_only_v6(false)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&SocketAddr::new(any, 0).into())?;
        let socket = std::net::UdpSocket::from(socket);
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self {
            io: tokio::net::UdpSocket::from_std(socket)?,
            state,
            mapped: any_v6,
        })
    }

    fn destination(&self, relay: SocketAddr) -> SocketAddr {
        match relay.ip() {
            IpAddr::V4(v4) if self.mapped => {
                SocketAddr::new(IpAddr::V6(v4.to_ipv6_mapped()), relay.port())
            }
            _ => relay,
        }
    }
}

impl AsyncUdpSocket for RelaySocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable {
            socket: self,
            waiting: None,
        })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let bound = self.bound();
        let relay = self.relays[self.active.load(Ordering::Relaxed)];
        let outer = Transmit {
            destination: bound.destination(relay),
            ecn: transmit.ecn,
            contents: transmit.contents,
            segment_size: transmit.segment_size,
            src_ip: None,
        };
        match bound.io.try_io(Interest::WRITABLE, || {
            bound.state.send((&bound.io).into(), &outer)
        }) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            // A network that is gone is a lost packet: the path selector notices the silence and acts.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        *self.receiver.lock() = Some(cx.waker().clone());
        let bound = self.bound();
        loop {
            ready!(bound.io.poll_recv_ready(cx))?;
            let received = bound.io.try_io(Interest::READABLE, || {
                bound.state.recv((&bound.io).into(), bufs, meta)
            });
            // Errors of single datagrams (ICMP unreachable) are no end of the call.
            if let Ok(count) = received {
                self.relabel(&mut meta[..count]);
                return Poll::Ready(Ok(count));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        // Of the virtual address's family, whatever the relays' is.
        Ok(SocketAddr::new(
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            self.bound().io.local_addr()?.port(),
        ))
    }

    fn max_transmit_segments(&self) -> usize {
        self.bound().state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        // The system merges datagrams that came together: buffers have to hold such a train.
        self.bound().state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.bound().state.may_fragment()
    }
}

/// Waits until the system takes datagrams again.
struct Writable {
    socket: Arc<RelaySocket>,
    waiting: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writable")
    }
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.socket.clone();
        let waiting = self.waiting.get_or_insert_with(|| {
            let bound = socket.bound();
            Box::pin(async move { bound.io.writable().await })
        });
        let outcome = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn strangers_are_blanked_and_relays_look_alike() {
        let relays = vec![
            "127.0.0.1:9001".parse().unwrap(),
            "127.0.0.1:9002".parse().unwrap(),
        ];
        let socket = RelaySocket::new(relays, Instant::now()).unwrap();
        let from = |address: &str| RecvMeta {
            addr: address.parse().unwrap(),
            len: 100,
            stride: 100,
            ecn: None,
            dst_ip: None,
        };
        let mut meta = [
            from("127.0.0.1:9002"),
            from("127.0.0.1:9003"),
            from("[::ffff:127.0.0.1]:9001"),
        ];
        socket.relabel(&mut meta);
        assert!(meta.iter().all(|m| m.addr == VIRTUAL && m.stride > 0));
        assert_eq!(meta.map(|m| m.len), [100, 0, 100]);
        assert!(socket.last_heard(0).is_some() && socket.last_heard(1).is_some());
    }

    #[tokio::test]
    async fn a_rebind_changes_the_port() {
        let socket =
            RelaySocket::new(vec!["127.0.0.1:9001".parse().unwrap()], Instant::now()).unwrap();
        let before = socket.bound().io.local_addr().unwrap();
        socket.rebind().unwrap();
        assert_ne!(socket.bound().io.local_addr().unwrap(), before);
    }
}
