//! Answers that are ready before the request's body was read.
//!
//! HTTP/2 has a server reset the stream then (RFC 9113, section 8.1), and many clients throw the answer away with it. So
//! what is left of a short body is read first.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::{Body, HttpBody, to_bytes},
    extract::Request,
    http::Response,
    middleware::Next,
};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::{sync::oneshot, time::timeout};

/// Lets a request be answered once its body was read, as far as it is short and comes soon.
pub(super) async fn drained(request: Request, next: Next) -> Response<Body> {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (back, mut unread) = oneshot::channel();
    let request = request.map(|body| Body::new(Lent { body: Some(body), back: Some(back) }));
    let response = next.run(request).await;
    if let Ok(body) = unread.try_recv() {
        // Longer ones are cut off, and so is their answer: nobody has to listen to all that somebody sends.
        let _ = timeout(DEADLINE, to_bytes(body, MAX_UNREAD)).await;
    }
    response
}

/// A body that comes back if it is dropped before its end.
#[derive(Debug)]
struct Lent {
    /// `None`: it was read to its end.
    body: Option<Body>,
    back: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(body).poll_frame(context));
        if !matches!(frame, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(body), Some(back)) = (self.body.take(), self.back.take())
            && !body.is_end_stream()
        {
            let _ = back.send(body);
        }
    }
}

/// Above the longest body that is of use.
const MAX_UNREAD: usize = 128 << 10;
const DEADLINE: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use axum::{Router, http::StatusCode, middleware::from_fn, routing::post};
    use hyper_util::{
        rt::{TokioExecutor, TokioIo},
        server::conn::auto,
        service::TowerToHyperService,
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// RFC 9113, section 4.1, on the first stream.
    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const END_STREAM: u8 = 1;
    const END_HEADERS: u8 = 4;

    /// The kinds of the frames of stream 1 that answer a POST whose body comes a moment after its headers, in so many
    /// full frames.
    async fn answered(frames: usize) -> Vec<u8> {
        let refuse = async || (StatusCode::UNSUPPORTED_MEDIA_TYPE, "send application/json");
        let router = Router::new().route("/", post(refuse)).layer(from_fn(drained));
        let (server, client) = tokio::io::duplex(1 << 20);
        let builder = auto::Builder::new(TokioExecutor::new());
        let serving = async move {
            let _ = builder.serve_connection(TokioIo::new(server), TowerToHyperService::new(router)).await;
            std::future::pending::<()>().await;
        };
        let asking = async {
            let (mut read, mut write) = tokio::io::split(client);
            let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            bytes.extend(frame(SETTINGS, 0, 0, &[]));
            // POST, https, "/" (RFC 7541, appendix A).
            bytes.extend(frame(HEADERS, END_HEADERS, 1, &[0x83, 0x87, 0x84]));
            write.write_all(&bytes).await.unwrap();
            tokio::time::sleep(DEADLINE / 10).await;
            for n in 1..=frames {
                let last = if n == frames { END_STREAM } else { 0 };
                write.write_all(&frame(DATA, last, 1, &[b'x'; 16 << 10][..16_383])).await.unwrap();
            }
            let (mut kinds, mut over) = (Vec::new(), false);
            loop {
                let mut head = [0; 9];
                read.read_exact(&mut head).await.unwrap();
                let length = usize::from(head[1]) << 8 | usize::from(head[2]);
                read.read_exact(&mut vec![0; length]).await.unwrap();
                match (head[3], head[8]) {
                    (PING, _) if over => return kinds,
                    (kind @ (DATA | HEADERS | RST_STREAM), 1) => kinds.push(kind),
                    _ => {}
                }
                // What follows the end of the answer comes before the answer to this.
                if !over && (head[3] == RST_STREAM || (head[3] == DATA && head[4] & END_STREAM != 0)) {
                    over = true;
                    write.write_all(&frame(PING, 0, 0, &[7; 8])).await.unwrap();
                }
            }
        };
        tokio::select! {
            kinds = asking => kinds,
            () = serving => unreachable!("waits for ever"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_before_the_body_resets_no_stream() {
        assert_eq!(answered(1).await, [HEADERS, DATA]);
        assert_eq!(answered(3).await, [HEADERS, DATA]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_is_not_waited_for() {
        assert!(answered(0).await.contains(&RST_STREAM));
    }
}
