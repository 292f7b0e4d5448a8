//! Frames on their way out: what one turn of a shard's thread produces leaves in trains.
//!
//! A system call and a way through the network stack for each frame cost more than all that QUIC does for it. So
//! frames wait until everybody who is ready to run has run, which takes microseconds, and neighbours of one size for
//! one relay leave together (UDP segmentation offload).

use std::{io, net::SocketAddr};

use quinn::udp::{EcnCodepoint, Transmit};

/// Frames that wait, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    bytes: Vec<u8>,
    frames: Vec<Frame>,
    /// Frames that have left; they are forgotten when all have.
    gone: usize,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    destination: SocketAddr,
    ecn: Option<EcnCodepoint>,
    end: usize,
}

impl Outgoing {
    /// Nothing waits.
    pub(crate) const fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// More waits than the system takes in one turn.
    pub(crate) const fn is_full(&self) -> bool {
        self.bytes.len() >= FULL_BYTES
    }

    /// Where the bytes of the next frames go; [`Self::push`] says whose they are.
    pub(crate) const fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// The next `length` bytes are a frame.
    pub(crate) fn push(&mut self, destination: SocketAddr, ecn: Option<EcnCodepoint>, length: usize) {
        let end = self.end_of(self.frames.len()) + length;
        self.frames.push(Frame { destination, ecn, end });
    }

    /// Sends what waits, at most `longest` frames at once.
    ///
    /// # Errors
    /// The first of `send`'s; what it was about still waits if the system would block, and is lost otherwise.
    pub(crate) fn flush(
        &mut self,
        longest: usize,
        mut send: impl FnMut(&Transmit<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        while let Some(first) = self.frames.get(self.gone).copied() {
            let start = self.end_of(self.gone);
            let size = first.end - start;
            let mut last = self.gone;
            // All segments but the last have one size.
            while last + 1 - self.gone < longest && self.end_of(last + 1) == start + (last + 1 - self.gone) * size {
                let Some(next) = self.frames.get(last + 1) else { break };
                let fits = next.end - start <= LONGEST_TRAIN && next.end - self.end_of(last + 1) <= size;
                if !fits || (next.destination, next.ecn) != (first.destination, first.ecn) {
                    break;
                }
                last += 1;
            }
            let sent = send(&Transmit {
                destination: first.destination,
                ecn: first.ecn,
                contents: &self.bytes[start..self.frames[last].end],
                segment_size: (last > self.gone).then_some(size),
                src_ip: None,
            });
            if sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                return sent;
            }
            self.gone = last + 1;
            sent?;
        }
        self.bytes.clear();
        self.frames.clear();
        self.gone = 0;
        Ok(())
    }

    /// Where the first `count` frames end.
    fn end_of(&self, count: usize) -> usize {
        count.checked_sub(1).and_then(|last| self.frames.get(last)).map_or(0, |frame| frame.end)
    }
}

/// From here on the sockets' users have to wait: 200 sessions' linear PCM at once.
const FULL_BYTES: usize = 256 << 10;
/// The most that a datagram over IPv4 holds; a train is one for a while.
const LONGEST_TRAIN: usize = 65_507;

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: [&str; 2] = ["127.0.0.1:1", "127.0.0.1:2"];

    fn outgoing(frames: &[(usize, usize)]) -> Outgoing {
        let mut outgoing = Outgoing::default();
        for (n, (to, length)) in frames.iter().enumerate() {
            outgoing.bytes().extend(std::iter::repeat_n(n as u8, *length));
            outgoing.push(TWO[*to].parse().unwrap(), None, *length);
        }
        outgoing
    }

    /// Port, segment size and the frames' first bytes of every train.
    fn trains(outgoing: &mut Outgoing, longest: usize) -> Vec<(u16, Vec<u8>)> {
        let mut trains = Vec::new();
        let taken = outgoing.flush(longest, |train| {
            let size = train.segment_size.unwrap_or(train.contents.len());
            let firsts = train.contents.chunks(size).map(|frame| {
                assert!(frame.iter().all(|byte| *byte == frame[0]), "a frame is whole");
                frame[0]
            });
            trains.push((train.destination.port(), firsts.collect()));
            Ok(())
        });
        taken.unwrap();
        assert!(outgoing.is_empty());
        trains
    }

    #[test]
    fn neighbours_of_one_size_leave_together_and_a_shorter_one_ends_a_train() {
        let frames = [(0, 50), (0, 50), (0, 20), (0, 50), (1, 50), (1, 60), (1, 60)];
        let expected = [(1, vec![0, 1, 2]), (1, vec![3]), (2, vec![4]), (2, vec![5, 6])];
        assert_eq!(trains(&mut outgoing(&frames), 64), expected);
        assert_eq!(trains(&mut outgoing(&[(0, 5); 5]), 2), [(1, vec![0, 1]), (1, vec![2, 3]), (1, vec![4])]);
        assert_eq!(trains(&mut outgoing(&[(0, 5); 3]), 1).len(), 3);
        assert_eq!(trains(&mut outgoing(&[(0, 1_300); 51]), 64).len(), 2, "no longer than a datagram");
    }

    #[test]
    fn what_the_system_does_not_take_waits_and_what_it_refuses_is_lost() {
        let mut outgoing = outgoing(&[(0, 9), (1, 9), (0, 8)]);
        let mut calls = 0;
        let blocked = outgoing.flush(64, |_| {
            calls += 1;
            if calls == 2 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        assert_eq!(blocked.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let refused = outgoing.flush(64, |_| Err(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(trains(&mut outgoing, 64), [(1, vec![2])]);
    }
}
