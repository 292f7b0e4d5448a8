//! One forwarding thread.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use antiphon_core::tunnel::{Direction, Ecn, HEADER_LEN, Header, Notice};
use mio::{Events, Interest, Poll, Token, Waker};
use quinn::udp::{BATCH_SIZE, RecvMeta};
use rand::{SeedableRng as _, rngs::StdRng};

use super::{Shared, skew::SkewLog};
use crate::{
    forward::{DropReason, FromClient, FromTunnel, Memo, Now, Onward, Refusal, classify_frame, classify_up},
    limits::{FlowLimiter, Limits},
    metrics::{Metrics, Tally, Way},
    neighbour::Neighbour,
    reset::{MAX_RESET, Resets},
    socket::{MESSAGE_BYTES, Port, ecn_of, source_of},
    table::Table,
    train::{Full, Join, Leg, Trains},
};

/// Sockets and memory of one thread. All memory is allocated here; forwarding allocates nothing.
pub(super) struct Core {
    poll: Poll,
    /// Towards clients.
    front: Port,
    /// Towards workers and other relays.
    back: Port,
    shared: Arc<Shared>,
    /// Which thread this is.
    index: usize,
    metrics: Metrics,
    /// By [`Way`]: whether the port of clients, or of the tunnel, may have something to receive.
    ready: [bool; 2],
    inbox: Inbox,
    outbox: Outbox,
}

struct Inbox {
    memory: Vec<u8>,
    meta: [RecvMeta; BATCH_SIZE],
    failures: u32,
}

struct Outbox {
    to_clients: Trains,
    to_tunnel: Trains,
    tally: Tally,
    limiter: FlowLimiter,
    resets: Resets,
    skews: SkewLog,
}

/// Where trains leave.
struct Ports<'p> {
    front: &'p Port,
    back: &'p Port,
}

/// One datagram as it came.
struct Arrival<'d> {
    datagram: &'d [u8],
    from: SocketAddr,
    ecn: Ecn,
}

impl Core {
    pub(super) fn new(
        front: std::net::UdpSocket,
        back: std::net::UdpSocket,
        index: usize,
        shared: Arc<Shared>,
        metrics: Metrics,
        limits: &Limits,
    ) -> io::Result<(Self, Waker)> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKE)?;
        let (mut front, mut back) = (Port::new(front)?, Port::hearing_errors(back)?);
        for (port, token) in [(&mut front, FRONT), (&mut back, BACK)] {
            poll.registry().register(port.source(), token, Interest::READABLE)?;
        }
        let core = Self {
            poll,
            front,
            back,
            shared,
            index,
            metrics,
            ready: [false; 2],
            inbox: Inbox {
                memory: vec![0; BATCH_SIZE * MESSAGE_BYTES],
                meta: [RecvMeta::default(); BATCH_SIZE],
                failures: 0,
            },
            outbox: Outbox {
                to_clients: Trains::new(),
                to_tunnel: Trains::new(),
                tally: Tally::default(),
                limiter: FlowLimiter::new(limits),
                resets: Resets::new(limits.reset_rate.get(), StdRng::from_os_rng()),
                skews: SkewLog::default(),
            },
        };
        Ok((core, waker))
    }

    /// Forwards until `stop` is set and the waker called.
    pub(super) fn run(mut self, stop: &AtomicBool) -> io::Result<()> {
        let mut events = Events::with_capacity(8);
        while !stop.load(Ordering::Acquire) {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                outcome => outcome?,
            }
            for event in &events {
                match event.token() {
                    FRONT => self.ready[Way::Up as usize] = true,
                    BACK => self.ready[Way::Down as usize] = true,
                    _ => {}
                }
                if event.token() == BACK && event.is_error() {
                    self.back.trouble();
                }
            }
            // Readiness is told once: both sockets have to be emptied before the next wait.
            while self.turn()? && !stop.load(Ordering::Acquire) {}
        }
        Ok(())
    }

    /// One batch of each port that is ready; false when both are empty.
    ///
    /// A batch that is not full has emptied its port: whatever comes later is told as a new event (epoll(7), edge
    /// triggered), so asking once more would be a system call for nothing.
    pub(super) fn turn(&mut self) -> io::Result<bool> {
        if self.ready == [false; 2] {
            // Woken for a new table.
            self.shared.in_force(self.index);
        }
        for side in [Way::Up, Way::Down] {
            if self.ready[side as usize] {
                self.ready[side as usize] = self.batch(side)? == BATCH_SIZE;
            }
        }
        self.back.closed(|address| {
            if let Some(neighbour) = self.shared.table().neighbour_at(address) {
                neighbour.contact.lost(self.shared.clock.now().ms);
            }
        });
        Ok(self.ready != [false; 2])
    }

    /// Messages of one port, and how many they were: of clients, which go up, or of the tunnel, where most go down.
    fn batch(&mut self, side: Way) -> io::Result<usize> {
        let ports = Ports { front: &self.front, back: &self.back };
        let port = match side {
            Way::Up => ports.front,
            Way::Down => ports.back,
        };
        let Some(messages) = self.inbox.fill(port, &self.metrics)? else {
            return Ok(0);
        };
        let (table, now) = (self.shared.in_force(self.index), self.shared.clock.now());
        let outbox = &mut self.outbox;
        let (mut of_clients, mut memo) = (false, Memo::default());
        for (buffer, meta) in self.inbox.messages(messages) {
            outbox.to_clients.message();
            outbox.to_tunnel.message();
            let (from, ecn) = (source_of(meta), ecn_of(meta));
            // An empty datagram is one, too.
            let datagrams = buffer[..meta.len].chunks(meta.stride.max(1));
            let empty = (meta.len == 0).then_some(&[][..]);
            for datagram in datagrams.chain(empty) {
                let arrival = Arrival { datagram, from, ecn };
                let judged = match side {
                    Way::Up => outbox.of_client(&table.table, now, &arrival, &ports, &mut memo),
                    Way::Down => outbox.of_tunnel(&table.table, now, &arrival, &ports, &mut memo),
                };
                let (way, outcome) = judged;
                outbox.tally.received(way, datagram.len());
                match outcome {
                    Ok(()) => of_clients |= way == Way::Up,
                    Err(reason) => outbox.tally.dropped(reason, 1),
                }
            }
        }
        outbox.flush(&ports);
        outbox.tally.publish(&self.metrics);
        if of_clients {
            self.shared.clock.record(now);
        }
        Ok(messages)
    }
}

impl Inbox {
    /// Receives a batch; `None` when there is nothing. Errors that pass are counted, lasting ones end the thread.
    fn fill(&mut self, port: &Port, metrics: &Metrics) -> io::Result<Option<usize>> {
        loop {
            match port.receive(&mut self.memory, &mut self.meta) {
                Ok(messages) => {
                    self.failures = 0;
                    return Ok(Some(messages));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => {
                    metrics.receive_error();
                    self.failures += 1;
                    if self.failures > MAX_FAILURES {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn messages(&self, count: usize) -> impl Iterator<Item = (&[u8], &RecvMeta)> {
        self.memory.chunks_exact(MESSAGE_BYTES).zip(&self.meta[..count])
    }
}

impl Outbox {
    fn of_client<'t>(
        &mut self,
        table: &'t Table,
        now: Now,
        arrival: &Arrival<'_>,
        ports: &Ports<'_>,
        memo: &mut Memo<'t>,
    ) -> (Way, Result<(), DropReason>) {
        let Arrival { datagram, from, ecn } = *arrival;
        let outcome = match classify_up(table, now, datagram, from, ecn, memo) {
            Err(reason) => Err(reason),
            Ok(FromClient::Onward(onward)) => self.onward(now, &onward, datagram, ports),
            Ok(FromClient::Reset { key, cid }) => {
                let mut reset = [0; MAX_RESET];
                if let Some(len) = self.resets.answer(now.ms, key, &cid, datagram.len(), &mut reset)
                    && ports.front.send_one(from, &reset[..len])
                {
                    self.tally.reset();
                }
                Err(DropReason::DeadServer)
            }
        };
        (Way::Up, outcome)
    }

    fn of_tunnel<'t>(
        &mut self,
        table: &'t Table,
        now: Now,
        arrival: &Arrival<'_>,
        ports: &Ports<'_>,
        memo: &mut Memo<'t>,
    ) -> (Way, Result<(), DropReason>) {
        let Arrival { datagram: frame, from, ecn } = *arrival;
        match classify_frame(table, now, frame, from, ecn, memo) {
            Err(Refusal { reason, skew }) => {
                if let Some(skew) = skew {
                    self.skews.note(now.ms, skew);
                    self.tally.skewed(skew);
                }
                (Way::Down, Err(reason))
            }
            Ok(FromTunnel::ToClient(to)) => {
                let leg = Leg { destination: to.client, ecn: to.ecn, way: Way::Down };
                let mut push = |outbox: &mut Self| outbox.to_clients.push(leg, Join::Latest, &[], to.datagram);
                (Way::Down, self.board(&mut push, ports))
            }
            Ok(FromTunnel::Onward(onward, datagram)) => {
                (way_of(onward.header.direction), self.onward(now, &onward, datagram, ports))
            }
            Ok(FromTunnel::Notice { from, header, notice }) => {
                (way_of(header.direction), self.pass_on(table, now, from, &header, notice, ports))
            }
        }
    }

    fn onward(&mut self, now: Now, onward: &Onward<'_>, datagram: &[u8], ports: &Ports<'_>) -> Result<(), DropReason> {
        if onward.flow.is_some_and(|flow| !self.limiter.admit(now.ms, &flow)) {
            return Err(DropReason::CidRate);
        }
        if let Some(through) = onward.through {
            through.contact.sent(now.ms);
        }
        let Onward { address, key, header, .. } = onward;
        let mut head = [0; HEADER_LEN];
        header.seal_into(key, datagram, &mut head);
        let leg = Leg { destination: *address, ecn: header.ecn, way: way_of(header.direction) };
        let mut push = |outbox: &mut Self| outbox.to_tunnel.push(leg, Join::SameSize, &head, datagram);
        self.board(&mut push, ports)
    }

    /// What a relay of another region tells: its clients' workers hear it from here, or this relay itself does.
    fn pass_on(
        &mut self,
        table: &Table,
        now: Now,
        from: &Neighbour,
        header: &Header,
        notice: Notice,
        ports: &Ports<'_>,
    ) -> Result<(), DropReason> {
        let Notice::Draining { .. } = notice;
        if header.direction == Direction::Down {
            from.contact.lost(now.ms);
            return Ok(());
        }
        if !from.contact.may_tell_all(now.ms) {
            return Err(DropReason::FrameNotice);
        }
        let home = table.relay().region();
        for (_, route) in table.routes().filter(|(server_id, _)| server_id.region == home) {
            let next = header.next_hop(route.slot).map_err(|_| DropReason::FrameHopLimit)?;
            let onward = Onward { address: route.address, key: &route.key, header: next, through: None, flow: None };
            self.onward(now, &onward, &notice.to_bytes(), ports)?;
        }
        Ok(())
    }

    /// When no train is left, all leave before the batch ends.
    fn board(
        &mut self,
        push: &mut dyn FnMut(&mut Self) -> Result<(), Full>,
        ports: &Ports<'_>,
    ) -> Result<(), DropReason> {
        if push(self) == Err(Full) {
            self.flush(ports);
            return push(self).map_err(|Full| DropReason::SendBuffer);
        }
        Ok(())
    }

    fn flush(&mut self, ports: &Ports<'_>) {
        let tally = &mut self.tally;
        self.to_clients.drain(|train| ports.front.send(train, tally));
        self.to_tunnel.drain(|train| ports.back.send(train, tally));
    }
}

const fn way_of(direction: Direction) -> Way {
    match direction {
        Direction::Up => Way::Up,
        Direction::Down => Way::Down,
    }
}

const FRONT: Token = Token(0);
const BACK: Token = Token(1);
const WAKE: Token = Token(2);

/// Receive calls that may fail in a row.
const MAX_FAILURES: u32 = 100;

#[cfg(test)]
mod tests;
