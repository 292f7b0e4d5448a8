//! The control stream: protobuf messages, each preceded by its length as a QUIC variable-length integer
//! (RFC 9000, section 16).

use std::marker::PhantomData;

use antiphon_core::varint;
use bytes::{Buf as _, BytesMut};
use prost::Message;
use quinn::{ReadError, RecvStream, SendStream, WriteError};

/// Why the control stream cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The other end announced a message longer than [`LONGEST_MESSAGE`].
    #[error("control message of {0} bytes: at most {LONGEST_MESSAGE} are allowed")]
    TooLong(u64),
    /// The bytes are no message of the expected type.
    #[error("control message is malformed: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// The stream ended in the middle of a message.
    #[error("control stream ended within a message")]
    Truncated,
    /// The stream or the connection broke.
    #[error("control stream: {0}")]
    Read(#[from] ReadError),
    /// The stream or the connection broke.
    #[error("control stream: {0}")]
    Write(#[from] WriteError),
}

/// Reads messages of one type. Cancel safe: a message that is partly here stays buffered.
#[derive(Debug)]
pub struct ControlReader<M> {
    stream: RecvStream,
    buffer: BytesMut,
    message: PhantomData<fn() -> M>,
}

impl<M: Message + Default> ControlReader<M> {
    /// Takes the receiving half of the control stream.
    #[must_use]
    pub fn new(stream: RecvStream) -> Self {
        Self { stream, buffer: BytesMut::new(), message: PhantomData }
    }

    /// The next message, or `None` when the other end finished the stream.
    ///
    /// # Errors
    /// The message is too long, malformed or cut short, or the connection broke.
    pub async fn read(&mut self) -> Result<Option<M>, ControlError> {
        loop {
            if let Some(message) = take(&mut self.buffer)? {
                return Ok(Some(message));
            }
            match self.stream.read_chunk(READ_CHUNK, true).await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk.bytes),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(ControlError::Truncated),
            }
        }
    }
}

/// Takes one message off the front of `buffer` if it is whole.
fn take<M: Message + Default>(buffer: &mut BytesMut) -> Result<Option<M>, ControlError> {
    let Some((length, prefix)) = varint::read(buffer) else {
        return Ok(None);
    };
    if length > LONGEST_MESSAGE as u64 {
        return Err(ControlError::TooLong(length));
    }
    let length = usize::try_from(length).map_err(|_| ControlError::TooLong(length))?;
    if buffer.len() < prefix + length {
        return Ok(None);
    }
    buffer.advance(prefix);
    Ok(Some(M::decode(buffer.split_to(length))?))
}

/// Writes messages of one type.
#[derive(Debug)]
pub struct ControlWriter<M> {
    stream: SendStream,
    buffer: Vec<u8>,
    message: PhantomData<fn(M)>,
}

impl<M: Message> ControlWriter<M> {
    /// Takes the sending half of the control stream.
    #[must_use]
    pub const fn new(stream: SendStream) -> Self {
        Self { stream, buffer: Vec::new(), message: PhantomData }
    }

    /// Writes one message.
    ///
    /// # Errors
    /// The message is too long for the other end, or the connection broke.
    pub async fn write(&mut self, message: &M) -> Result<(), ControlError> {
        let length = message.encoded_len();
        if length > LONGEST_MESSAGE {
            return Err(ControlError::TooLong(length as u64));
        }
        self.buffer.clear();
        varint::write(length as u64, &mut self.buffer);
        message.encode(&mut self.buffer).expect("a Vec grows as needed");
        Ok(self.stream.write_all(&self.buffer).await?)
    }

    /// Ends the stream after what was written.
    pub fn finish(&mut self) {
        // Fails only if it was finished or reset before: then there is nothing left to end.
        let _ = self.stream.finish();
    }

    /// Waits until the other end has everything, or is gone.
    pub async fn delivered(&mut self) {
        let _ = self.stream.stopped().await;
    }
}

/// Bound on one control message, both directions.
pub const LONGEST_MESSAGE: usize = 16 * 1024;
const READ_CHUNK: usize = 4 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use antiphon_proto::v1::{ClientMessage, Goodbye, client_message::Message as Body};
    use proptest::prelude::*;

    fn goodbye(reason: &str) -> ClientMessage {
        ClientMessage { message: Some(Body::Goodbye(Goodbye { reason: reason.into() })) }
    }

    fn framed(message: &ClientMessage) -> Vec<u8> {
        let mut out = Vec::new();
        varint::write(message.encoded_len() as u64, &mut out);
        message.encode(&mut out).unwrap();
        out
    }

    #[test]
    fn messages_arrive_whatever_the_chunks() {
        let wanted = [goodbye("a"), goodbye(&"b".repeat(300))];
        let wire: Vec<u8> = wanted.iter().flat_map(framed).collect();
        let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
        for byte in wire {
            buffer.extend_from_slice(&[byte]);
            while let Some(message) = take::<ClientMessage>(&mut buffer).unwrap() {
                seen.push(message);
            }
        }
        assert_eq!(seen, wanted);
    }

    #[test]
    fn a_long_announcement_is_refused_before_it_is_buffered() {
        let mut buffer = BytesMut::new();
        let mut wire = Vec::new();
        varint::write(LONGEST_MESSAGE as u64 + 1, &mut wire);
        buffer.extend_from_slice(&wire);
        assert!(matches!(take::<ClientMessage>(&mut buffer), Err(ControlError::TooLong(16_385))));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = take::<ClientMessage>(&mut buffer) {}
        }
    }
}
