//! A cable: what lies between callers and one relay, with the faults of real networks.
//!
//! A thread of its own carries datagrams between a port for callers and the relay. Like a NAT it gives every caller a
//! port of its own towards the relay, and can take it away or give it to somebody else. ECN bits pass untouched.

mod wire;

use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    net::{AddressFamily, SocketType, bind, socket, sockopt::set_socket_reuseaddr},
};

use wire::Wire;
pub(crate) use wire::{Counts, Faults};

/// Which directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
    Both,
}

/// A laid cable. It carries until it is dropped.
#[derive(Debug)]
pub(crate) struct Cable {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What both directions have carried so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Carried {
    pub(crate) up: Counts,
    pub(crate) down: Counts,
    /// Callers seen.
    pub(crate) callers: usize,
    /// Ports towards the relay, the given-up ones included.
    pub(crate) ports: usize,
    /// Datagrams for ports that belong to nobody any more.
    pub(crate) stray: u64,
}

/// What somebody on the way could write down: a datagram, and whom the relay took it from.
#[derive(Debug, Clone)]
pub(crate) struct Overheard {
    pub(crate) source: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Debug)]
struct Shared {
    wake: OwnedFd,
    control: Mutex<Control>,
    /// All commands are obeyed.
    obeyed: Condvar,
}

#[derive(Debug, Default)]
struct Control {
    commands: Vec<Command>,
    carried: Carried,
    overheard: [Option<Overheard>; 2],
    stop: bool,
}

#[derive(Debug, Clone, Copy)]
enum Command {
    Cut(Way, Instant),
    Rebind(Ipv4Addr),
    Rotate,
}

impl Cable {
    /// Lays a cable to a relay. Equal seeds treat equal sequences of datagrams alike.
    pub(crate) fn lay(relay: SocketAddr, seed: u64, up: Faults, down: Faults) -> io::Result<Self> {
        let callers = Socket::open(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let address = callers.io.local_addr()?;
        let wake = eventfd(0, EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { wake, control: Mutex::default(), obeyed: Condvar::new() });
        let carrier = Carrier {
            relay,
            callers,
            ports: Vec::new(),
            lines: Vec::new(),
            outside: Ipv4Addr::LOCALHOST,
            up: Wire::new(up, seed),
            down: Wire::new(down, !seed),
            stray: 0,
            shared: shared.clone(),
        };
        let thread = std::thread::Builder::new().name("cable".into()).spawn(move || carrier.run())?;
        Ok(Self { address, shared, thread: Some(thread) })
    }

    /// Where callers send.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Carries nothing that way for so long.
    pub(crate) fn cut(&self, way: Way, duration: Duration) {
        self.command(Command::Cut(way, Instant::now() + duration));
    }

    /// Gives every caller a new port of `outside` towards the relay; what comes to the old ones is lost.
    pub(crate) fn rebind(&self, outside: Ipv4Addr) {
        self.command(Command::Rebind(outside));
    }

    /// Gives every caller the port of the next one, and the last one the first one's.
    pub(crate) fn rotate(&self) {
        self.command(Command::Rotate);
    }

    /// What became of everything so far.
    pub(crate) fn carried(&self) -> Carried {
        self.shared.control.lock().carried
    }

    /// The last datagram towards the relay that a handshake begins with, and the last one of an established connection.
    pub(crate) fn overheard(&self) -> [Option<Overheard>; 2] {
        self.shared.control.lock().overheard.clone()
    }

    /// What is sent after this returns is treated as asked for.
    fn command(&self, command: Command) {
        let mut control = self.shared.control.lock();
        control.commands.push(command);
        self.wake();
        self.shared.obeyed.wait_while(&mut control, |control| !control.commands.is_empty());
    }

    fn wake(&self) {
        // Full: the carrier has enough reason to wake already.
        let _ = rustix::io::write(&self.shared.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.shared.control.lock().stop = true;
        self.wake();
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking(), "the cable's thread panicked");
        }
    }
}

/// A socket that allows others at its address, and may be one itself.
pub(crate) fn impostor(address: SocketAddr) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket(family, SocketType::DGRAM, None)?;
    set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    Ok(socket.into())
}

/// Bit of a QUIC packet's first octet (RFC 9000, section 17.2).
const LONG_HEADER: u8 = 0x80;

/// A socket that tells and sets ECN.
struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
}

/// A port towards the relay.
struct Port {
    socket: Socket,
    /// Index of the line it belongs to; none: given up.
    owner: Option<usize>,
}

/// A caller and its port.
struct Line {
    caller: SocketAddr,
    port: usize,
}

/// A datagram on its way, with the line it is for.
#[derive(Clone)]
struct Datagram {
    line: usize,
    ecn: Option<EcnCodepoint>,
    bytes: Vec<u8>,
}

struct Carrier {
    relay: SocketAddr,
    callers: Socket,
    ports: Vec<Port>,
    lines: Vec<Line>,
    outside: Ipv4Addr,
    up: Wire<Datagram>,
    down: Wire<Datagram>,
    stray: u64,
    shared: Arc<Shared>,
}

impl Carrier {
    fn run(mut self) {
        let mut buffer = vec![0; 65_536];
        while !self.obey() {
            self.receive(&mut buffer);
            self.deliver(Instant::now());
            let (callers, ports) = (self.lines.len(), self.ports.len());
            let (up, down, stray) = (self.up.counts(), self.down.counts(), self.stray);
            self.shared.control.lock().carried = Carried { up, down, callers, ports, stray };
            self.wait();
        }
    }

    /// Does what was asked; whether to stop.
    fn obey(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut control = shared.control.lock();
        for command in std::mem::take(&mut control.commands) {
            match command {
                Command::Cut(way, until) => {
                    if way != Way::Down {
                        self.up.cut(until);
                    }
                    if way != Way::Up {
                        self.down.cut(until);
                    }
                }
                Command::Rebind(outside) => self.rebind(outside),
                Command::Rotate => {
                    let ports: Vec<_> = self.lines.iter().map(|line| line.port).collect();
                    for (index, line) in self.lines.iter_mut().enumerate() {
                        line.port = ports[(index + 1) % ports.len()];
                        self.ports[line.port].owner = Some(index);
                    }
                }
            }
        }
        shared.obeyed.notify_all();
        control.stop
    }

    fn rebind(&mut self, outside: Ipv4Addr) {
        self.outside = outside;
        for port in &mut self.ports {
            port.owner = None;
        }
        for index in 0..self.lines.len() {
            self.lines[index].port = self.open_port(index);
        }
    }

    fn open_port(&mut self, line: usize) -> usize {
        let socket = Socket::open(SocketAddr::from((self.outside, 0))).expect("loopback has free ports");
        self.ports.push(Port { socket, owner: Some(line) });
        self.ports.len() - 1
    }

    fn receive(&mut self, buffer: &mut [u8]) {
        let now = Instant::now();
        while let Some((from, ecn, datagrams)) = self.callers.receive(buffer) {
            let known = self.lines.iter().position(|line| line.caller == from);
            let line = known.unwrap_or_else(|| {
                let line = self.lines.len();
                let port = self.open_port(line);
                self.lines.push(Line { caller: from, port });
                line
            });
            for bytes in datagrams {
                self.up.send(now, bytes.len(), Datagram { line, ecn, bytes: bytes.to_vec() });
            }
        }
        for port in &self.ports {
            while let Some((from, ecn, datagrams)) = port.socket.receive(buffer) {
                for bytes in datagrams {
                    match port.owner {
                        Some(line) if from == self.relay => {
                            self.down.send(now, bytes.len(), Datagram { line, ecn, bytes: bytes.to_vec() });
                        }
                        _ => self.stray += 1,
                    }
                }
            }
        }
    }

    fn deliver(&mut self, now: Instant) {
        while let Some(datagram) = self.up.poll(now) {
            // A NAT chooses the port when the datagram leaves it.
            let port = &self.ports[self.lines[datagram.line].port];
            port.socket.send(self.relay, &datagram);
            let established = datagram.bytes.first().is_some_and(|first| first & LONG_HEADER == 0);
            let source = port.socket.io.local_addr().expect("it is bound");
            let overheard = Overheard { source, bytes: datagram.bytes };
            self.shared.control.lock().overheard[usize::from(established)] = Some(overheard);
        }
        while let Some(datagram) = self.down.poll(now) {
            self.callers.send(self.lines[datagram.line].caller, &datagram);
        }
    }

    /// Until something comes, is due or is asked for.
    fn wait(&self) {
        let due = [self.up.next_due(), self.down.next_due()].into_iter().flatten().min();
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        let mut waited: Vec<_> = [self.shared.wake.as_fd(), self.callers.io.as_fd()]
            .into_iter()
            .chain(self.ports.iter().map(|port| port.socket.io.as_fd()))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        // Interrupted: the loop looks again.
        let _ = poll(&mut waited, left.as_ref());
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
    }
}

impl Socket {
    fn open(address: SocketAddr) -> io::Result<Self> {
        let io = impostor(address)?;
        let state = UdpSocketState::new((&io).into())?;
        Ok(Self { io, state })
    }

    /// What the system has: one sender's datagrams of one length, but for the last.
    fn receive<'a>(
        &self,
        buffer: &'a mut [u8],
    ) -> Option<(SocketAddr, Option<EcnCodepoint>, std::slice::Chunks<'a, u8>)> {
        let mut meta = [RecvMeta::default()];
        loop {
            match self.state.recv((&self.io).into(), &mut [IoSliceMut::new(buffer)], &mut meta) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                // A closed port at the other end is nothing that a cable could know.
                Err(_) => {}
            }
        }
        let [meta] = meta;
        Some((meta.addr, meta.ecn, buffer[..meta.len].chunks(meta.stride.max(1))))
    }

    fn send(&self, destination: SocketAddr, datagram: &Datagram) {
        let Datagram { ecn, bytes, .. } = datagram;
        let transmit = Transmit { destination, ecn: *ecn, contents: bytes, segment_size: None, src_ip: None };
        // A full buffer is one more lost datagram.
        let _ = self.state.try_send((&self.io).into(), &transmit);
    }
}

mod tests {
    use super::*;

    struct Ends {
        relay: Socket,
        cable: Cable,
    }

    impl Ends {
        fn new() -> Self {
            let relay = Socket::open(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
            let address = relay.io.local_addr().unwrap();
            let cable = Cable::lay(address, 1, Faults::default(), Faults::default()).unwrap();
            Self { relay, cable }
        }

        fn caller() -> Socket {
            Socket::open(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap()
        }

        /// Counts follow what they count by a moment.
        fn until(&self, condition: impl Fn(&Carried) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while !condition(&self.cable.carried()) {
                assert!(Instant::now() < deadline, "{:?}", self.cable.carried());
                std::thread::yield_now();
            }
        }

        fn up(&self, caller: &Socket, text: &[u8], ecn: Option<EcnCodepoint>) -> SocketAddr {
            let datagram = Datagram { line: 0, ecn, bytes: text.to_vec() };
            caller.send(self.cable.address(), &datagram);
            let (from, received, bytes) = arrived(&self.relay);
            assert_eq!((received, &bytes[..]), (ecn, text));
            from
        }
    }

    fn arrived(socket: &Socket) -> (SocketAddr, Option<EcnCodepoint>, Vec<u8>) {
        let mut waited = [PollFd::new(&socket.io, PollFlags::IN)];
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(poll(&mut waited, Some(&patience)).unwrap(), 1, "in time");
        let mut buffer = [0; 2_048];
        let (from, ecn, mut datagrams) = socket.receive(&mut buffer).unwrap();
        (from, ecn, datagrams.next().unwrap().to_vec())
    }

    #[test]
    fn callers_have_ports_of_their_own_and_ecn_passes() {
        let (ends, one, two) = (Ends::new(), Ends::caller(), Ends::caller());
        let at_one = ends.up(&one, b"one", Some(EcnCodepoint::Ect0));
        let at_two = ends.up(&two, b"two", Some(EcnCodepoint::Ce));
        assert_ne!(at_one, at_two);
        assert_eq!(ends.up(&one, b"again", None), at_one);
        ends.relay.send(at_one, &Datagram { line: 0, ecn: Some(EcnCodepoint::Ce), bytes: b"answer".to_vec() });
        let (from, ecn, bytes) = arrived(&one);
        assert_eq!((from, ecn, &bytes[..]), (ends.cable.address(), Some(EcnCodepoint::Ce), &b"answer"[..]));
    }

    #[test]
    fn ports_are_taken_away_and_given_to_others() {
        let (ends, one, two) = (Ends::new(), Ends::caller(), Ends::caller());
        let (at_one, at_two) = (ends.up(&one, b"a", None), ends.up(&two, b"b", None));
        ends.cable.rotate();
        assert_eq!((ends.up(&one, b"c", None), ends.up(&two, b"d", None)), (at_two, at_one));
        ends.relay.send(at_one, &Datagram { line: 0, ecn: None, bytes: b"of one".to_vec() });
        assert_eq!(arrived(&two).2, b"of one");
        let elsewhere = Ipv4Addr::new(127, 0, 0, 2);
        ends.cable.rebind(elsewhere);
        let moved = ends.up(&one, b"e", None);
        assert_eq!(moved.ip(), elsewhere);
        ends.relay.send(at_two, &Datagram { line: 0, ecn: None, bytes: b"too late".to_vec() });
        ends.relay.send(moved, &Datagram { line: 0, ecn: None, bytes: b"in time".to_vec() });
        assert_eq!(arrived(&one).2, b"in time");
        ends.until(|carried| carried.stray == 1);
    }

    #[test]
    fn a_cut_of_one_way_leaves_the_other() {
        let (ends, one) = (Ends::new(), Ends::caller());
        let at_one = ends.up(&one, b"a", None);
        ends.cable.cut(Way::Down, Duration::from_secs(3_600));
        ends.up(&one, b"b", None);
        ends.relay.send(at_one, &Datagram { line: 0, ecn: None, bytes: b"never".to_vec() });
        ends.until(|carried| (carried.up.cut, carried.down.cut) == (0, 1));
    }
}
