//! One forwarding thread.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use antiphon_core::tunnel::{Ecn, HEADER_LEN};
use arc_swap::ArcSwap;
use mio::{Events, Interest, Poll, Token, Waker};
use quinn::udp::{BATCH_SIZE, RecvMeta};

use super::{Activity, unix_seconds};
use crate::{
    forward::{DropReason, Verdict, classify_down, classify_up},
    metrics::{Metrics, Tally, Way},
    socket::{MESSAGE_BYTES, Port, ecn_of, source_of},
    table::Table,
    train::{Full, Join, Trains},
};

/// Sockets and memory of one thread. All memory is allocated here; forwarding allocates nothing.
pub(super) struct Core {
    poll: Poll,
    /// Towards clients.
    front: Port,
    /// Towards workers.
    back: Port,
    table: Arc<ArcSwap<Table>>,
    activity: Arc<Activity>,
    metrics: Metrics,
    inbox: Inbox,
    outbox: Outbox,
}

struct Inbox {
    memory: Vec<u8>,
    meta: [RecvMeta; BATCH_SIZE],
    failures: u32,
}

struct Outbox {
    trains: Trains,
    tally: Tally,
}

impl Core {
    pub(super) fn new(
        front: std::net::UdpSocket,
        back: std::net::UdpSocket,
        table: Arc<ArcSwap<Table>>,
        metrics: Metrics,
        activity: Arc<Activity>,
    ) -> io::Result<(Self, Waker)> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKE)?;
        let (mut front, mut back) = (Port::new(front)?, Port::new(back)?);
        for (port, token) in [(&mut front, FRONT), (&mut back, BACK)] {
            poll.registry().register(port.source(), token, Interest::READABLE)?;
        }
        let core = Self {
            poll,
            front,
            back,
            table,
            activity,
            metrics,
            inbox: Inbox {
                memory: vec![0; BATCH_SIZE * MESSAGE_BYTES],
                meta: [RecvMeta::default(); BATCH_SIZE],
                failures: 0,
            },
            outbox: Outbox { trains: Trains::new(), tally: Tally::default() },
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
            // Readiness is told once: both sockets have to be emptied before the next wait.
            while self.turn()? && !stop.load(Ordering::Acquire) {}
        }
        Ok(())
    }

    /// One batch each way; false when nothing had come.
    pub(super) fn turn(&mut self) -> io::Result<bool> {
        let up = self.batch(Way::Up)?;
        let down = self.batch(Way::Down)?;
        Ok(up || down)
    }

    fn batch(&mut self, way: Way) -> io::Result<bool> {
        let (from, to) = match way {
            Way::Up => (&self.front, &self.back),
            Way::Down => (&self.back, &self.front),
        };
        let Some(messages) = self.inbox.fill(from, &self.metrics)? else {
            return Ok(false);
        };
        let (table, now) = (self.table.load(), unix_seconds());
        let mut forwarded = false;
        for (buffer, meta) in self.inbox.messages(messages) {
            self.outbox.trains.message();
            let (source, ecn) = (source_of(meta), ecn_of(meta));
            // An empty datagram is one, too.
            let datagrams = buffer[..meta.len].chunks(meta.stride.max(1));
            let empty = (meta.len == 0).then_some(&[][..]);
            for datagram in datagrams.chain(empty) {
                self.outbox.tally.received(way, datagram.len());
                let judged = match way {
                    Way::Up => self.outbox.up(&table, now, datagram, source, ecn, to),
                    Way::Down => self.outbox.down(&table, now, datagram, source, ecn, to),
                };
                match judged {
                    Ok(()) => forwarded = true,
                    Err(reason) => self.outbox.tally.dropped(reason, 1),
                }
            }
        }
        self.outbox.flush(to, way);
        self.outbox.tally.publish(&self.metrics);
        if forwarded && way == Way::Up {
            self.activity.record();
        }
        Ok(true)
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
    fn up(
        &mut self,
        table: &Table,
        now: u64,
        datagram: &[u8],
        from: SocketAddr,
        ecn: Ecn,
        port: &Port,
    ) -> Result<(), DropReason> {
        match classify_up(table, now, datagram, from, ecn) {
            Verdict::Drop(reason) => Err(reason),
            Verdict::Forward(to) => {
                let mut head = [0; HEADER_LEN];
                to.header.seal_into(&to.route.key, datagram, &mut head);
                let mut push =
                    |trains: &mut Trains| trains.push(to.route.address, ecn, Join::SameSize, &head, datagram);
                self.board(&mut push, port, Way::Up)
            }
        }
    }

    fn down(
        &mut self,
        table: &Table,
        now: u64,
        frame: &[u8],
        from: SocketAddr,
        outer: Ecn,
        port: &Port,
    ) -> Result<(), DropReason> {
        match classify_down(table, now, frame, from, outer) {
            Verdict::Drop(reason) => Err(reason),
            Verdict::Forward(to) => {
                let mut push = |trains: &mut Trains| trains.push(to.client, to.ecn, Join::Latest, &[], to.datagram);
                self.board(&mut push, port, Way::Down)
            }
        }
    }

    /// When no train is left, all leave before the batch ends.
    fn board(
        &mut self,
        push: &mut dyn FnMut(&mut Trains) -> Result<(), Full>,
        port: &Port,
        way: Way,
    ) -> Result<(), DropReason> {
        if push(&mut self.trains) == Err(Full) {
            self.flush(port, way);
            return push(&mut self.trains).map_err(|Full| DropReason::SendBuffer);
        }
        Ok(())
    }

    fn flush(&mut self, port: &Port, way: Way) {
        let tally = &mut self.tally;
        self.trains.drain(|train| port.send(train, way, tally));
    }
}

const FRONT: Token = Token(0);
const BACK: Token = Token(1);
const WAKE: Token = Token(2);

/// Receive calls that may fail in a row.
const MAX_FAILURES: u32 = 100;

#[cfg(test)]
mod tests;
