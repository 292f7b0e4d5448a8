//! UDP sockets: many on one port, batched receive with offload, trains out.

use std::{
    cell::Cell,
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr},
};

use antiphon_core::tunnel::Ecn;
use quinn::udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{forward::DropReason, metrics::Tally, train::Train};

mod errors;

/// Binds `count` sockets to one address; the kernel spreads senders over them by their address.
///
/// # Errors
/// The system refuses, or another process holds the address.
pub fn bind_group(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::UdpSocket>> {
    if address.port() != 0 {
        // Sharing a port with another relay of the same user would split its packets silently.
        bind(address, false)?;
    }
    let first = bind(address, true)?;
    let bound = first.local_addr()?;
    let mut group = vec![first];
    for _ in 1..count {
        group.push(bind(bound, true)?);
    }
    Ok(group)
}

fn bind(address: SocketAddr, shared: bool) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    // The system may give less than asked for.
    socket.set_recv_buffer_size(BUFFER_BYTES)?;
    socket.set_send_buffer_size(BUFFER_BYTES)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// One thread's socket.
#[derive(Debug)]
pub struct Port {
    socket: mio::net::UdpSocket,
    state: UdpSocketState,
    is_ipv6: bool,
    /// Whether errors of other frames than the one at hand come up in its calls.
    hears_errors: bool,
    /// Some may be waiting.
    troubled: Cell<bool>,
}

impl Port {
    /// Turns on receive offload and congestion marks.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        let is_ipv6 = socket.local_addr()?.is_ipv6();
        let socket = mio::net::UdpSocket::from_std(socket);
        Ok(Self { socket, state, is_ipv6, hears_errors: false, troubled: Cell::new(false) })
    }

    /// Like [`Self::new`], and [`Self::closed`] tells where nobody listens.
    ///
    /// # Errors
    /// The system refuses.
    pub fn hearing_errors(socket: std::net::UdpSocket) -> io::Result<Self> {
        let port = Self::new(socket)?;
        errors::keep(&port.socket, port.is_ipv6)?;
        Ok(Self { hears_errors: true, ..port })
    }

    /// Something may wait for [`Self::closed`].
    pub fn trouble(&self) {
        self.troubled.set(self.hears_errors);
    }

    /// Tells the addresses, in their own family, that frames were sent to and at which nobody listens.
    pub fn closed(&self, closed: impl FnMut(SocketAddr)) {
        if self.troubled.take() {
            errors::take(&self.socket, closed);
        }
    }

    /// For registering with a poll.
    pub const fn source(&mut self) -> &mut mio::net::UdpSocket {
        &mut self.socket
    }

    /// Receives what has come: the number of messages, one per [`MESSAGE_BYTES`] of `memory`, described by `meta`.
    ///
    /// # Errors
    /// The system's, `WouldBlock` for nothing to receive.
    pub fn receive(&self, memory: &mut [u8], meta: &mut [RecvMeta; BATCH_SIZE]) -> io::Result<usize> {
        let mut chunks = memory.chunks_exact_mut(MESSAGE_BYTES);
        let mut buffers: [IoSliceMut<'_>; BATCH_SIZE] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        loop {
            match self.state.recv((&self.socket).into(), &mut buffers, meta) {
                // Of a frame sent earlier; told once.
                Err(error) if self.hears_errors && error.kind() != io::ErrorKind::WouldBlock && is_remote(&error) => {
                    self.trouble();
                }
                outcome => return outcome,
            }
        }
    }

    /// Sends a train, with one system call where the system can. What cannot be sent is dropped and counted: audio
    /// that waits for a full buffer is late anyway.
    pub fn send(&self, train: &Train, tally: &mut Tally) {
        let whole = self.state.max_gso_segments() >= train.len();
        if whole && self.transmit(train, train.bytes(), tally) {
            return;
        }
        for segment in train.bytes().chunks(train.segment_size()) {
            self.transmit(train, segment, tally);
        }
    }

    /// Sends one datagram that belongs to no train; says whether the system took it.
    pub fn send_one(&self, to: SocketAddr, contents: &[u8]) -> bool {
        let transmit = |destination| Transmit { destination, ecn: None, contents, segment_size: None, src_ip: None };
        in_family(to, self.is_ipv6).is_some_and(|to| self.try_send(&transmit(to)).is_ok())
    }

    /// An error may be that of a frame sent earlier: it is told once, so the second try is this frame's own.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self.state.try_send((&self.socket).into(), transmit) {
            Err(error) if self.hears_errors && is_remote(&error) => {
                self.trouble();
                self.state.try_send((&self.socket).into(), transmit)
            }
            outcome => outcome,
        }
    }

    /// False when several segments were refused as such: they have to go one by one.
    fn transmit(&self, train: &Train, contents: &[u8], tally: &mut Tally) -> bool {
        let leg = train.leg();
        let packets = contents.len().div_ceil(train.segment_size());
        let Some(destination) = in_family(leg.destination, self.is_ipv6) else {
            tally.dropped(DropReason::ClientAddress, packets);
            return true;
        };
        let transmit = Transmit {
            destination,
            ecn: EcnCodepoint::from_bits(leg.ecn.bits()),
            contents,
            segment_size: (packets > 1).then_some(train.segment_size()),
            src_ip: None,
        };
        let refused = match self.try_send(&transmit) {
            Ok(()) => {
                tally.sent(leg.way, packets, contents.len());
                return true;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => DropReason::SendBuffer,
            // Here the library has found that segments cannot be offloaded and has stopped trying (EIO, EINVAL).
            Err(_) if packets > 1 => return false,
            Err(error) if error.raw_os_error() == Some(EMSGSIZE) => DropReason::PathMtu,
            Err(_) => DropReason::SendError,
        };
        tally.dropped(refused, packets);
        true
    }
}

/// Whether a call's error is what somebody on a frame's way said.
fn is_remote(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, PermissionDenied};
    let kinds = [ConnectionRefused, HostUnreachable, NetworkUnreachable, PermissionDenied];
    kinds.contains(&error.kind()) || error.raw_os_error().is_some_and(|code| REMOTE.contains(&code))
}

/// The address as a socket of that family takes it; `None` for IPv6 on an IPv4 socket.
#[must_use]
pub fn in_family(address: SocketAddr, is_ipv6: bool) -> Option<SocketAddr> {
    let ip = match (address.ip().to_canonical(), is_ipv6) {
        (IpAddr::V4(v4), true) => v4.to_ipv6_mapped().into(),
        (IpAddr::V6(_), false) => return None,
        (ip, _) => ip,
    };
    Some(SocketAddr::new(ip, address.port()))
}

/// What a received datagram's mark is in the tunnel header.
#[must_use]
pub fn ecn_of(meta: &RecvMeta) -> Ecn {
    Ecn::from_bits(meta.ecn.map_or(0, |mark| mark as u8))
}

/// The source in its own family.
#[must_use]
pub fn source_of(meta: &RecvMeta) -> SocketAddr {
    SocketAddr::new(meta.addr.ip().to_canonical(), meta.addr.port())
}

/// Room for one received message: the largest that offload builds.
pub const MESSAGE_BYTES: usize = 1 << 16;

/// About 10,000 voice packets: what comes while a thread is held up for a tenth of a second.
const BUFFER_BYTES: usize = 4 << 20;

/// Linux: message too long.
const EMSGSIZE: i32 = rustix::io::Errno::MSGSIZE.raw_os_error();
/// Linux: what messages of others become that have no kind of their own.
const REMOTE: [i32; 4] = [
    EMSGSIZE,
    rustix::io::Errno::HOSTDOWN.raw_os_error(),
    rustix::io::Errno::NOPROTOOPT.raw_os_error(),
    rustix::io::Errno::PROTO.raw_os_error(),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        metrics::{Metrics, Way},
        train::{Join, Leg, Trains},
    };
    use prometheus_client::registry::Registry;

    #[test]
    fn addresses_fit_the_socket_or_are_refused() {
        let v4: SocketAddr = "192.0.2.1:5".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:5".parse().unwrap();
        let v6: SocketAddr = "[2001:db8::1]:5".parse().unwrap();
        assert_eq!(in_family(v4, true), Some(mapped));
        assert_eq!(in_family(mapped, true), Some(mapped));
        assert_eq!(in_family(mapped, false), Some(v4));
        assert_eq!(in_family(v6, true), Some(v6));
        assert_eq!(in_family(v6, false), None);
    }

    #[test]
    fn a_port_in_use_is_refused_even_by_the_same_user() {
        let held = bind_group("127.0.0.1:0".parse().unwrap(), 2).unwrap();
        let address = held[0].local_addr().unwrap();
        assert_eq!(held[1].local_addr().unwrap(), address);
        let error = bind_group(address, 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    fn one_train(to: SocketAddr, lengths: &[usize]) -> Trains {
        let mut trains = Trains::new();
        let leg = Leg { destination: to, ecn: Ecn::NotEct, way: Way::Up };
        for len in lengths {
            trains.push(leg, Join::SameSize, &[], &vec![1; *len]).unwrap();
        }
        trains
    }

    fn sent(port: &Port, trains: &mut Trains) -> Metrics {
        let (metrics, mut tally) = (Metrics::register(&mut Registry::default()), Tally::default());
        trains.drain(|train| port.send(train, &mut tally));
        tally.publish(&metrics);
        metrics
    }

    fn ports() -> [(Port, std::net::UdpSocket); 2] {
        ["127.0.0.1:0", "[::1]:0"].map(|at| {
            let socket = bind(at.parse().unwrap(), false).unwrap();
            (Port::hearing_errors(socket.try_clone().unwrap()).unwrap(), socket)
        })
    }

    /// Fragments are what loses whole datagrams on half-broken paths, and what nobody can verify before they are whole.
    #[test]
    fn nothing_is_ever_sent_in_fragments() {
        use rustix::net::sockopt;
        for (port, socket) in &ports() {
            assert!(!port.state.may_fragment());
            let v4 = sockopt::ip_mtu_discover(socket).unwrap();
            assert_eq!(v4, sockopt::Ipv4PathMtuDiscovery::PROBE);
            if port.is_ipv6 {
                let v6 = sockopt::ipv6_mtu_discover(socket).unwrap();
                assert_eq!(v6, sockopt::Ipv6PathMtuDiscovery::PROBE);
            }
        }
    }

    #[test]
    fn what_no_path_takes_is_counted_and_does_not_end_offload() {
        for (port, socket) in &ports() {
            let to = socket.local_addr().unwrap();
            let offload = port.state.max_gso_segments();
            // Longer than any UDP datagram.
            let metrics = sent(port, &mut one_train(to, &[65_536]));
            assert_eq!((metrics.dropped(DropReason::PathMtu), metrics.forwarded(Way::Up)), (1, 0));
            let metrics = sent(port, &mut one_train(to, &[1200, 1200, 700]));
            assert_eq!((metrics.forwarded(Way::Up), port.state.max_gso_segments()), (3, offload));
        }
    }

    /// The system's word about an earlier frame neither loses the one at hand nor goes unheard.
    #[test]
    fn a_closed_port_is_told_and_costs_no_frame_of_another() {
        for (port, socket) in &ports() {
            let ip = socket.local_addr().unwrap().ip();
            let nobody = bind((ip, 0).into(), false).unwrap().local_addr().unwrap();
            let friend = bind((ip, 0).into(), false).unwrap();
            let friends = friend.local_addr().unwrap();
            assert!(port.send_one(nobody, b"x"));
            // On loopback the answer is there when the call returns.
            let metrics = sent(port, &mut one_train(friends, &[100, 100]));
            assert_eq!(metrics.forwarded(Way::Up), 2);
            assert_eq!(friend.recv(&mut [0; 200]).unwrap(), 100);
            let mut closed = Vec::new();
            port.closed(|address| closed.push(address));
            assert_eq!(closed, [nobody]);
            port.closed(|address| panic!("{address} again"));
        }
    }
}
