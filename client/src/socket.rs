//! The socket under a call's QUIC connection: one constant virtual server address inside, relays outside.
//!
//! QUIC drops packets from any address but the one it connected to, so a relay's address must not be QUIC's business:
//! it sees [`VIRTUAL`], and this socket sends to the relay in use. Each relay has a connected system socket of its own:
//! the system then drops what others send, and reports at once when a relay's port is closed.

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
use tokio::{io::Interest, sync::Notify};

/// The address that QUIC is told. Of the discard-only prefix (RFC 6666): it never appears on a network.
pub(crate) const VIRTUAL: SocketAddr =
    SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1), 443, 0, 0));

/// A call's socket.
pub(crate) struct RelaySocket {
    relays: Vec<Relay>,
    active: AtomicUsize,
    started: Instant,
    /// Of the endpoint's receiving task: woken when a link is opened or replaced.
    receiver: Mutex<Option<Waker>>,
    refused: Notify,
    /// The link in use is another one now.
    changed: Notify,
}

/// One relay and the way to it.
struct Relay {
    address: SocketAddr,
    /// Opened when the relay is first used; replaced when the local network changes.
    link: RwLock<Option<Arc<Link>>>,
    /// Microseconds since the start at which something last came through it; 0: never.
    heard: AtomicU64,
    /// The same for the last time that its port was reported closed.
    refused: AtomicU64,
}

struct Link {
    io: tokio::net::UdpSocket,
    state: UdpSocketState,
}

impl fmt::Debug for RelaySocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelaySocket").field("relays", &self.relays.len()).finish_non_exhaustive()
    }
}

impl RelaySocket {
    /// Opens a way to one of `relays`, of which there is at least one.
    pub(crate) fn new(relays: &[SocketAddr], first: usize, started: Instant) -> io::Result<Self> {
        let relay = |address: &SocketAddr| Relay {
            address: *address,
            link: RwLock::new(None),
            heard: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        };
        let socket = Self {
            relays: relays.iter().map(relay).collect(),
            active: AtomicUsize::new(0),
            started,
            receiver: Mutex::new(None),
            refused: Notify::new(),
            changed: Notify::new(),
        };
        socket.use_relay(first)?;
        Ok(socket)
    }

    /// Sends through another relay from now on; what still comes through the others is received.
    pub(crate) fn use_relay(&self, index: usize) -> io::Result<()> {
        let index = index.min(self.relays.len() - 1);
        let relay = &self.relays[index];
        if relay.link.read().is_none() {
            *relay.link.write() = Some(Arc::new(Link::open(relay.address)?));
        }
        self.active.store(index, Ordering::Relaxed);
        self.wake_receiver();
        Ok(())
    }

    /// Goes on from a new local address and port, as after a change of network. Returns the relay in use from now on:
    /// another one if the new network has no way to the one before, of the other family perhaps.
    pub(crate) fn rebind(&self) -> io::Result<usize> {
        let (active, count) = (self.active.load(Ordering::Relaxed), self.relays.len());
        let mut first_error = None;
        for index in (0..count).map(|step| (active + step) % count) {
            match Link::open(self.relays[index].address) {
                Ok(link) => {
                    for relay in &self.relays {
                        *relay.link.write() = None;
                    }
                    *self.relays[index].link.write() = Some(Arc::new(link));
                    self.active.store(index, Ordering::Relaxed);
                    self.wake_receiver();
                    return Ok(index);
                }
                Err(error) => drop(first_error.get_or_insert(error)),
            }
        }
        Err(first_error.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
    }

    /// When something last came through a relay, since the start.
    pub(crate) fn last_heard(&self, relay: usize) -> Option<Duration> {
        moment(&self.relays.get(relay)?.heard)
    }

    /// When a relay's port was last reported closed, since the start.
    pub(crate) fn last_refused(&self, relay: usize) -> Option<Duration> {
        moment(&self.relays.get(relay)?.refused)
    }

    /// Completes when the port of the relay in use is reported closed, or another one's was since the last call.
    pub(crate) async fn refused(&self) {
        loop {
            let Some((relay, link)) = self.active_link() else {
                self.changed.notified().await;
                continue;
            };
            tokio::select! {
                () = self.refused.notified() => return,
                () = self.changed.notified() => {}
                _ = link.io.ready(Interest::ERROR) => {
                    if let Ok(Some(error)) = link.io.take_error() {
                        self.note(relay, &error);
                    }
                    // Readiness for errors stays until it is told that there is none left.
                    let nothing_left = || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into());
                    let _ = link.io.try_io(Interest::ERROR, nothing_left);
                }
            }
        }
    }

    fn wake_receiver(&self) {
        self.changed.notify_one();
        if let Some(receiver) = self.receiver.lock().take() {
            receiver.wake();
        }
    }

    fn active_link(&self) -> Option<(usize, Arc<Link>)> {
        let active = self.active.load(Ordering::Relaxed);
        Some((active, self.relays[active].link.read().clone()?))
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX).max(1)
    }

    /// An error of the system's is a lost packet; a closed port is also news.
    fn note(&self, relay: usize, error: &io::Error) {
        if error.kind() == io::ErrorKind::ConnectionRefused {
            self.relays[relay].refused.store(self.now_us(), Ordering::Relaxed);
            self.refused.notify_one();
        }
    }

    fn receive(
        &self,
        index: usize,
        link: &Link,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(link.io.poll_recv_ready(cx))?;
            match link.io.try_io(Interest::READABLE, || link.state.recv((&link.io).into(), bufs, meta)) {
                Ok(count) => {
                    self.relays[index].heard.store(self.now_us(), Ordering::Relaxed);
                    for meta in &mut meta[..count] {
                        // QUIC cuts by the stride for as long as there is length: it must not be zero.
                        meta.stride = meta.stride.max(1);
                        meta.addr = VIRTUAL;
                        meta.dst_ip = None;
                    }
                    return Poll::Ready(Ok(count));
                }
                Err(error) => self.note(index, &error),
            }
        }
    }
}

fn moment(us: &AtomicU64) -> Option<Duration> {
    match us.load(Ordering::Relaxed) {
        0 => None,
        us => Some(Duration::from_micros(us)),
    }
}

impl Link {
    fn open(relay: SocketAddr) -> io::Result<Self> {
        let any: IpAddr = match relay {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = Socket::new(Domain::for_address(relay), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        socket.bind(&SocketAddr::new(any, 0).into())?;
        socket.connect(&relay.into())?;
        let socket = std::net::UdpSocket::from(socket);
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { io: tokio::net::UdpSocket::from_std(socket)?, state })
    }
}

impl AsyncUdpSocket for RelaySocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some((relay, link)) = self.active_link() else {
            return Ok(());
        };
        let outer = Transmit {
            destination: self.relays[relay].address,
            ecn: transmit.ecn,
            contents: transmit.contents,
            segment_size: transmit.segment_size,
            src_ip: None,
        };
        // `try_send` reports the system's errors; `send` would hide a closed port.
        match link.io.try_io(Interest::WRITABLE, || link.state.try_send((&link.io).into(), &outer)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Err(error) => {
                self.note(relay, &error);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        *self.receiver.lock() = Some(cx.waker().clone());
        for (index, relay) in self.relays.iter().enumerate() {
            let Some(link) = relay.link.read().clone() else {
                continue;
            };
            match self.receive(index, &link, cx, bufs, meta) {
                Poll::Ready(Ok(count)) => return Poll::Ready(Ok(count)),
                // The runtime is going down: the connection's own end will show.
                Poll::Ready(Err(_)) | Poll::Pending => {}
            }
        }
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        // Of the virtual address's family, whatever the relays' is.
        let port = match self.active_link() {
            Some((_, link)) => link.io.local_addr()?.port(),
            None => 0,
        };
        Ok(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))
    }

    fn max_transmit_segments(&self) -> usize {
        self.active_link().map_or(1, |(_, link)| link.state.max_gso_segments())
    }

    fn max_receive_segments(&self) -> usize {
        // The system merges datagrams that came together: buffers have to hold such a train.
        self.active_link().map_or(64, |(_, link)| link.state.gro_segments())
    }

    fn may_fragment(&self) -> bool {
        self.active_link().is_none_or(|(_, link)| link.state.may_fragment())
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
            let link = socket.active_link();
            Box::pin(async move {
                match link {
                    Some((_, link)) => link.io.writable().await,
                    None => Ok(()),
                }
            })
        });
        let outcome = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{net::UdpSocket, time::timeout};

    const SOON: Duration = Duration::from_secs(10);

    async fn relay() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    async fn send(socket: &RelaySocket, contents: &[u8]) {
        socket.active_link().unwrap().1.io.writable().await.unwrap();
        let transmit = Transmit { destination: VIRTUAL, ecn: None, contents, segment_size: None, src_ip: None };
        socket.try_send(&transmit).unwrap();
    }

    async fn receive(socket: &RelaySocket) -> (Vec<u8>, SocketAddr) {
        let mut buffer = vec![0; 65_536];
        let mut meta = [RecvMeta::default()];
        let receiving = std::future::poll_fn(|cx| socket.poll_recv(cx, &mut [IoSliceMut::new(&mut buffer)], &mut meta));
        assert_eq!(timeout(SOON, receiving).await.unwrap().unwrap(), 1);
        let [meta] = meta;
        (buffer[..meta.len].to_vec(), meta.addr)
    }

    #[tokio::test]
    async fn relays_look_alike_and_the_one_left_is_still_heard() {
        let ((one, at_one), (two, at_two)) = (relay().await, relay().await);
        let socket = RelaySocket::new(&[at_one, at_two], 0, Instant::now()).unwrap();
        send(&socket, b"a").await;
        let mut buffer = [0; 8];
        let (_, client_at_one) = one.recv_from(&mut buffer).await.unwrap();
        socket.use_relay(1).unwrap();
        send(&socket, b"b").await;
        let (_, client_at_two) = two.recv_from(&mut buffer).await.unwrap();
        two.send_to(b"new", client_at_two).await.unwrap();
        assert_eq!(receive(&socket).await, (b"new".to_vec(), VIRTUAL));
        one.send_to(b"late", client_at_one).await.unwrap();
        assert_eq!(receive(&socket).await, (b"late".to_vec(), VIRTUAL));
        assert!(socket.last_heard(0).is_some() && socket.last_heard(1).is_some());
        // A stranger's packet never arrives: the next one heard is the relay's.
        let (stranger, _) = relay().await;
        stranger.send_to(b"stranger", client_at_two).await.unwrap();
        two.send_to(b"relay", client_at_two).await.unwrap();
        assert_eq!(receive(&socket).await.0, b"relay");
    }

    #[tokio::test]
    async fn a_rebind_changes_the_port() {
        let (one, at_one) = relay().await;
        let socket = RelaySocket::new(&[at_one], 0, Instant::now()).unwrap();
        let mut buffer = [0; 8];
        send(&socket, b"a").await;
        let (_, before) = one.recv_from(&mut buffer).await.unwrap();
        socket.rebind().unwrap();
        send(&socket, b"b").await;
        let (_, after) = one.recv_from(&mut buffer).await.unwrap();
        assert_ne!(before, after);
        one.send_to(b"c", after).await.unwrap();
        assert_eq!(receive(&socket).await.0, b"c");
    }

    #[tokio::test]
    async fn a_network_without_a_way_to_the_relay_in_use_takes_the_next() {
        let (one, at_one) = relay().await;
        // The system opens no way to everybody.
        let everybody = "255.255.255.255:9".parse().unwrap();
        let socket = RelaySocket::new(&[everybody, at_one], 1, Instant::now()).unwrap();
        socket.active.store(0, Ordering::Relaxed);
        assert_eq!(socket.rebind().unwrap(), 1);
        send(&socket, b"a").await;
        let mut buffer = [0; 8];
        one.recv_from(&mut buffer).await.unwrap();
        let nowhere = RelaySocket::new(&[at_one, everybody], 0, Instant::now()).unwrap();
        let nowhere = RelaySocket { relays: nowhere.relays.into_iter().skip(1).collect(), ..nowhere };
        assert_eq!(nowhere.rebind().unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[tokio::test]
    async fn a_closed_port_is_reported() {
        let (one, at_one) = relay().await;
        let socket = RelaySocket::new(&[at_one], 0, Instant::now()).unwrap();
        drop(one);
        send(&socket, b"a").await;
        timeout(SOON, socket.refused()).await.unwrap();
        assert!(socket.last_refused(0).is_some());
    }
}
