//! The socket under a shard's QUIC endpoint: frames of relays outside, datagrams of clients inside.
//!
//! For QUIC a path is (client address, ingress relay): the remote address it is shown carries the relay's number in
//! the IPv6 flow-info field and comes back unchanged in what it sends. A change of relay is then an ordinary,
//! validated migration, and a spoofed packet through another relay moves nothing (invariant I3).

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, SocketAddrV6},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use antiphon_core::{
    id::RelayNumber,
    tunnel::{ClientAddr, Ecn, HEADER_LEN, Header, Notice, OpenError},
};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, Transmit, UdpSocketState},
};
use tokio::{io::Interest, sync::mpsc};

use crate::{
    gate::{Admitted, Gate, GateDrop},
    metrics::{Drop, ShardMetrics},
    outgoing::Outgoing,
    paths::Paths,
    quota::{Allowance, Quota},
    relays::{Opened, RelayTable},
    skew::{ClockSkew, NOTABLE_S},
};

/// A relay said something about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RelayNotice {
    pub(crate) relay: RelayNumber,
    pub(crate) notice: Notice,
}

/// A relay's address as a socket of this IP version has to be given it.
fn in_family(address: SocketAddr, is_ipv6: bool) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) if is_ipv6 => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        ip => SocketAddr::new(ip, address.port()),
    }
}

/// The path's address as QUIC sees it.
pub(crate) fn path_address(client: ClientAddr, relay: RelayNumber) -> SocketAddr {
    SocketAddr::V6(SocketAddrV6::new(client.ip, client.port, relay.value().into(), 0))
}

/// The ingress relay of a path.
pub(crate) fn path_relay(address: SocketAddr) -> Option<RelayNumber> {
    let SocketAddr::V6(address) = address else {
        return None;
    };
    u16::try_from(address.flowinfo()).ok().and_then(|n| RelayNumber::new(n).ok())
}

/// One shard's end of all its tunnels.
pub(crate) struct TunnelSocket {
    io: tokio::net::UdpSocket,
    state: UdpSocketState,
    rx: Mutex<Received>,
    gate: Arc<Mutex<Gate>>,
    relays: Arc<ArcSwap<RelayTable>>,
    paths: Arc<Paths>,
    notices: mpsc::Sender<RelayNotice>,
    metrics: ShardMetrics,
    started: Instant,
    /// Of the version that takes IPv4 as mapped addresses.
    is_ipv6: bool,
    tx: Mutex<Sending>,
}

/// Frames on their way out.
#[derive(Default)]
struct Sending {
    outgoing: Outgoing,
    /// Of the endpoint's task. Woken by the first frame, it runs after all who run already, and sends what they left.
    sender: Option<Waker>,
}

/// Frames that came in one batch and wait to be handed on.
struct Received {
    buffers: Vec<Vec<u8>>,
    pending: VecDeque<Pending>,
    limits: Limits,
    skew: ClockSkew,
}

/// What may come from where no session is known to be: enough for handshakes and migrations, and far less than would
/// keep QUIC busy. The first of each pair holds for one client address behind one relay, so that whoever forges a
/// client's packets from elsewhere takes nothing from that client; the second for one connection ID from everywhere.
struct Limits {
    initials: (Quota, Quota),
    others: (Quota, Quota),
}

impl Limits {
    fn new() -> Self {
        Self {
            initials: (Quota::new(INITIALS_OF_PATH), Quota::new(INITIALS_OF_ID)),
            others: (Quota::new(OTHERS_OF_PATH), Quota::new(OTHERS_OF_ID)),
        }
    }

    fn allow(&mut self, now_ms: u64, path: SocketAddr, seen: Admitted) -> bool {
        let (of_path, of_id) = if seen.initial { &mut self.initials } else { &mut self.others };
        of_path.take(now_ms, (path, seen.nonce)) && of_id.take(now_ms, seen.nonce)
    }
}

struct Pending {
    buffer: usize,
    start: usize,
    end: usize,
    from: SocketAddr,
    ecn: Option<EcnCodepoint>,
}

impl fmt::Debug for TunnelSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelSocket").finish_non_exhaustive()
    }
}

impl TunnelSocket {
    /// Takes a bound socket. `notices` is bounded; a notice that finds it full is dropped, relays repeat them.
    pub(crate) fn new(
        socket: std::net::UdpSocket,
        gate: Arc<Mutex<Gate>>,
        relays: Arc<ArcSwap<RelayTable>>,
        paths: Arc<Paths>,
        notices: mpsc::Sender<RelayNotice>,
        metrics: ShardMetrics,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let is_ipv6 = socket.local_addr()?.is_ipv6();
        let state = UdpSocketState::new((&socket).into())?;
        let buffers = (0..BATCH_SIZE).map(|_| vec![0; LARGEST_TRAIN]).collect();
        let (limits, skew) = (Limits::new(), ClockSkew::default());
        let rx = Mutex::new(Received { buffers, pending: VecDeque::new(), limits, skew });
        let io = tokio::net::UdpSocket::from_std(socket)?;
        let (started, tx) = (Instant::now(), Mutex::default());
        Ok(Self { io, state, rx, gate, relays, paths, notices, metrics, started, is_ipv6, tx })
    }

    /// Reads one batch off the system and keeps what may go on to QUIC.
    fn receive(&self, rx: &mut Received) -> io::Result<()> {
        let mut meta = [RecvMeta::default(); BATCH_SIZE];
        let count = {
            let mut slices: Vec<IoSliceMut<'_>> = rx.buffers.iter_mut().map(|b| IoSliceMut::new(b)).collect();
            self.io.try_io(Interest::READABLE, || self.state.recv((&self.io).into(), &mut slices, &mut meta))?
        };
        let moment = Moment { s: unix_seconds(), ms: self.started.elapsed().as_millis() as u64 };
        let relays = self.relays.load();
        let gate = self.gate.lock();
        let Received { buffers, pending, limits, skew } = rx;
        for (index, meta) in meta[..count].iter().enumerate() {
            // The system merges frames of different clients into one train: same relay, same port.
            let mut start = 0;
            while start < meta.len {
                let end = (start + meta.stride.max(1)).min(meta.len);
                let frame = &buffers[index][start..end];
                let opened = self.open(&relays, skew, moment.s, meta.addr, frame);
                if let Some((from, mark)) = opened.and_then(|frame| self.classify(&gate, limits, moment, frame)) {
                    // The client's own mark travels in the header; the tunnel leg may have added congestion.
                    let ecn = meta.ecn.filter(|e| *e == EcnCodepoint::Ce).or(mark);
                    pending.push_back(Pending { buffer: index, start: start + HEADER_LEN, end, from, ecn });
                }
                start = end;
            }
        }
        if let Some(furthest) = skew.poll(moment.s) {
            self.metrics.clock_skew.set(furthest.ahead_s.into());
            if furthest.ahead_s.unsigned_abs() >= NOTABLE_S {
                let (relay, ahead_s) = (furthest.relay, furthest.ahead_s);
                tracing::warn!(%relay, ahead_s, "a relay's clock differs from this one; frames are stale from 30 s on");
            }
        }
        Ok(())
    }

    /// Verifies a frame; notes how its clock goes.
    fn open<'a>(
        &self,
        relays: &RelayTable,
        skew: &mut ClockSkew,
        now_s: u64,
        source: SocketAddr,
        frame: &'a [u8],
    ) -> Option<Opened<'a>> {
        self.metrics.received.inc();
        let ahead = |header: Header| header.seconds_ahead(now_s);
        match relays.open(now_s, source, frame) {
            Some(Ok(opened)) => {
                skew.note(opened.header.relay, ahead(opened.header));
                Some(opened)
            }
            Some(Err(error)) => {
                if let (OpenError::Stale, Ok(header)) = (error, Header::parse(frame)) {
                    skew.note(header.relay, ahead(header));
                }
                self.drop(drop_reason(error))
            }
            None => self.drop(Drop::UnknownRelay),
        }
    }

    /// The path a frame came by and its ECN mark, if QUIC may see it.
    fn classify(
        &self,
        gate: &Gate,
        limits: &mut Limits,
        now: Moment,
        frame: Opened<'_>,
    ) -> Option<(SocketAddr, Option<EcnCodepoint>)> {
        let Opened { header, datagram } = frame;
        if header.client == ClientAddr::RELAY {
            if let Some(notice) = Notice::from_bytes(datagram) {
                // Full: the same notice is on its way already, and the relay repeats it.
                let _ = self.notices.try_send(RelayNotice { relay: header.relay, notice });
            }
            return None;
        }
        let path = path_address(header.client, header.relay);
        match gate.admit(now.s, datagram) {
            Ok(seen) if self.paths.note_received(path, seen.config) || limits.allow(now.ms, path, seen) => {}
            Ok(_) => return self.drop(Drop::Gate(GateDrop::Unproven)),
            Err(reason) => return self.drop(Drop::Gate(reason)),
        }
        Some((path, EcnCodepoint::from_bits(header.ecn.bits())))
    }

    /// Sends what waits; `WouldBlock` if the system does not take all of it.
    fn flush(&self, outgoing: &mut Outgoing) -> io::Result<()> {
        let longest = self.state.max_gso_segments();
        let mut send = |train: &Transmit<'_>| {
            let sent = self.io.try_io(Interest::WRITABLE, || self.state.send((&self.io).into(), train));
            match sent {
                // Whatever else it has against these frames, the next are others.
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    self.metrics.dropped(Drop::System);
                    Ok(())
                }
                sent => sent,
            }
        };
        outgoing.flush(longest, &mut send)
    }

    /// The endpoint's turn: everybody else has had theirs.
    fn poll_flush(&self, cx: &mut Context<'_>) {
        let tx = &mut *self.tx.lock();
        if !tx.sender.as_ref().is_some_and(|sender| sender.will_wake(cx.waker())) {
            tx.sender = Some(cx.waker().clone());
        }
        while !tx.outgoing.is_empty() && self.flush(&mut tx.outgoing).is_err() {
            // An error here is the runtime's end.
            if !matches!(self.io.poll_send_ready(cx), Poll::Ready(Ok(()))) {
                return;
            }
        }
    }

    fn drop<T>(&self, reason: Drop) -> Option<T> {
        self.metrics.dropped(reason);
        None
    }
}

impl AsyncUdpSocket for TunnelSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let (SocketAddr::V6(client), Some(relay)) = (transmit.destination, path_relay(transmit.destination)) else {
            return Ok(());
        };
        let now_s = unix_seconds();
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        if transmit.contents.first().is_some_and(|b| b & 0x80 != 0) {
            let mut gate = self.gate.lock();
            transmit.contents.chunks(segment).for_each(|datagram| gate.on_sent(now_s, datagram));
        }
        let tx = &mut *self.tx.lock();
        if tx.outgoing.is_full() {
            self.flush(&mut tx.outgoing)?;
        }
        let client = ClientAddr { ip: *client.ip(), port: client.port() };
        let ecn = transmit.ecn.map_or(Ecn::NotEct, |e| Ecn::from_bits(e as u8));
        let datagrams = transmit.contents.chunks(segment);
        let relays = self.relays.load();
        let Some(next) = relays.seal(now_s, relay, client, datagrams.clone(), ecn, tx.outgoing.bytes()) else {
            self.metrics.dropped(Drop::UnknownRelay);
            return Ok(());
        };
        if tx.outgoing.is_empty()
            && let Some(sender) = &tx.sender
        {
            sender.wake_by_ref();
        }
        let count = datagrams.len() as u64;
        let next = in_family(next, self.is_ipv6);
        datagrams.for_each(|datagram| tx.outgoing.push(next, transmit.ecn, HEADER_LEN + datagram.len()));
        self.metrics.sent.inc_by(count);
        self.paths.note_sent(transmit.destination, count);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.poll_flush(cx);
        let rx = &mut *self.rx.lock();
        for _ in 0..BATCHES_PER_TURN {
            let mut count = 0;
            while count < bufs.len().min(meta.len()) {
                let Some(next) = rx.pending.pop_front() else {
                    break;
                };
                let datagram = &rx.buffers[next.buffer][next.start..next.end];
                let Some(out) = bufs[count].get_mut(..datagram.len()) else {
                    self.metrics.dropped(Drop::TooLong);
                    continue;
                };
                out.copy_from_slice(datagram);
                let len = datagram.len();
                meta[count] = RecvMeta { addr: next.from, len, stride: len, ecn: next.ecn, dst_ip: None };
                count += 1;
            }
            if count > 0 {
                return Poll::Ready(Ok(count));
            }
            ready!(self.io.poll_recv_ready(cx))?;
            match self.receive(rx) {
                // An error here would end the endpoint: what one datagram causes must not end every call.
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => self.metrics.dropped(Drop::System),
                _ => {}
            }
        }
        // Whoever sends nothing but what is dropped must not keep the thread from the sessions.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        // QUIC compares families only; every path is shown as IPv6.
        let port = self.io.local_addr()?.port();
        Ok(SocketAddr::V6(SocketAddrV6::new(std::net::Ipv6Addr::UNSPECIFIED, port, 0, 0)))
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

const fn drop_reason(error: OpenError) -> Drop {
    match error {
        OpenError::TooShort | OpenError::Version | OpenError::Direction | OpenError::HopLimit => Drop::Frame,
        OpenError::Tag => Drop::Tag,
        OpenError::Stale => Drop::Stale,
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Waits until the system takes datagrams again.
struct Writable {
    socket: Arc<TunnelSocket>,
    waiting: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writable")
    }
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waiting.is_none() && !self.socket.tx.lock().outgoing.is_full() {
            return Poll::Ready(Ok(()));
        }
        let socket = self.socket.clone();
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(async move { socket.io.writable().await }));
        let outcome = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(outcome)
    }
}

/// Batches read in one turn when nothing in them is for QUIC.
const BATCHES_PER_TURN: usize = 8;

/// When a batch came.
#[derive(Debug, Clone, Copy)]
struct Moment {
    /// Unix seconds.
    s: u64,
    /// Milliseconds of this socket's own clock.
    ms: u64,
}

/// A handshake takes two datagrams and their retransmissions.
const INITIALS_OF_PATH: Allowance = Allowance { rate: 8, burst: 16 };
const INITIALS_OF_ID: Allowance = Allowance { rate: 32, burst: 64 };
/// A client on a new path sends 50 packets a second, and first again what the old one may have lost.
const OTHERS_OF_PATH: Allowance = Allowance { rate: 100, burst: 100 };
const OTHERS_OF_ID: Allowance = Allowance { rate: 1_000, burst: 400 };
/// The most that the system merges into one receive.
const LARGEST_TRAIN: usize = 65_535;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_names_its_relay_and_client() {
        let client = ClientAddr::from("192.0.2.1:5000".parse::<SocketAddr>().unwrap());
        let relay = RelayNumber::new(65_535).unwrap();
        let path = path_address(client, relay);
        assert_eq!(path_relay(path), Some(relay));
        assert_ne!(path, path_address(client, RelayNumber::new(1).unwrap()));
        assert_eq!(path_relay("192.0.2.1:5000".parse().unwrap()), None);
    }
}
