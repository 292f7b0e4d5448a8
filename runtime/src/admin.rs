//! The admin port: liveness, readiness and metrics.
//!
//! Liveness depends on nothing but the process itself (invariant I8); readiness names what is still missing.

use std::{sync::Arc, time::Duration};

use axum::{
    Router, extract::State, http::StatusCode, http::header::CONTENT_TYPE, response::IntoResponse, routing::get,
};
use futures::{StreamExt as _, stream::FuturesUnordered};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use parking_lot::RwLock;
use prometheus_client::{encoding::text, registry::Registry};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::crowd::{Crowd, Place};

/// Named conditions that all have to hold before the process is ready.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    conditions: Arc<RwLock<Vec<(&'static str, bool)>>>,
    note: Arc<RwLock<Option<String>>>,
}

impl Readiness {
    /// Adds conditions that do not hold yet.
    #[must_use]
    pub fn new(conditions: &[&'static str]) -> Self {
        let conditions = conditions.iter().map(|c| (*c, false)).collect();
        Self { conditions: Arc::new(RwLock::new(conditions)), note: Arc::default() }
    }

    /// Says whether a condition holds; an unknown name is added.
    pub fn set(&self, condition: &'static str, holds: bool) {
        let mut conditions = self.conditions.write();
        match conditions.iter_mut().find(|(name, _)| *name == condition) {
            Some(entry) => entry.1 = holds,
            None => conditions.push((condition, holds)),
        }
    }

    /// Says, beside being ready or not, what people should know; it changes nothing.
    pub fn note(&self, note: Option<String>) {
        *self.note.write() = note;
    }

    /// Names of the conditions that do not hold.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        self.conditions.read().iter().filter(|(_, holds)| !holds).map(|(name, _)| *name).collect()
    }
}

struct Shared {
    registry: Registry,
    readiness: Readiness,
}

/// Serves `/livez`, `/readyz` and `/metrics` (OpenMetrics text) until `stopping`.
///
/// Whoever reaches the port may ask, and can do no more than that: connections are bounded in number and time, and those
/// of whom there are most make room for others.
///
/// # Errors
/// None at present: an error of one connection ends that one.
pub async fn serve(
    listener: TcpListener,
    registry: Registry,
    readiness: Readiness,
    stopping: CancellationToken,
) -> anyhow::Result<()> {
    let app = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Arc::new(Shared { registry, readiness }));
    let (crowd, mut connections) = (Crowd::new(CONNECTIONS, CONNECTIONS_OF_SOURCE), FuturesUnordered::new());
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, from)) => {
                    if let Some(place) = crowd.enter(from.ip()).place {
                        connections.push(connection(stream, place, app.clone()));
                    }
                }
                // One connection's trouble, or out of descriptors: neither ends the port.
                Err(error) => {
                    tracing::debug!(%error, "accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(()) = connections.next(), if !connections.is_empty() => {}
            () = stopping.cancelled() => return Ok(()),
        }
    }
}

/// Answers until the other end closes, somebody else needs the place, or its time is over.
async fn connection(stream: TcpStream, place: Place, app: Router) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADERS).max_buf_size(HEADER_BYTES);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    tokio::select! {
        ended = timeout(LIFETIME, served) => if let Ok(Err(error)) = ended {
            tracing::debug!(%error, "admin connection");
        },
        () = place.taken() => {}
    }
}

async fn ready(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let missing = shared.readiness.missing();
    let note = shared.readiness.note.read().as_ref().map_or_else(String::new, |note| format!("{note}\n"));
    if missing.is_empty() {
        return (StatusCode::OK, format!("ok\n{note}"));
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n{note}", missing.join(", ")))
}

async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let mut body = String::new();
    match text::encode(&mut body, &shared.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, [(CONTENT_TYPE, kind)], body)
        }
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, [(CONTENT_TYPE, "text/plain")], format!("encoding metrics: {error}\n"))
        }
    }
}

/// At a time.
const CONNECTIONS: usize = 64;
const CONNECTIONS_OF_SOURCE: usize = 16;
/// For the headers of a request.
const HEADERS: Duration = Duration::from_secs(5);
const HEADER_BYTES: usize = 16 << 10;
/// Of a connection, whatever is asked on it: a reader that takes nothing keeps an answer in memory.
const LIFETIME: Duration = Duration::from_secs(60);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn asks(address: std::net::SocketAddr) -> String {
        let mut connection = TcpStream::connect(address).await.unwrap();
        connection.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(20), connection.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn who_holds_connections_open_keeps_nobody_else_from_asking() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stopping = CancellationToken::new();
        let served = serve(listener, Registry::default(), Readiness::default(), stopping.clone());
        let asking = async {
            let mut held = Vec::new();
            for _ in 0..200 {
                let mut silent = TcpStream::connect(address).await.unwrap();
                silent.write_all(b"GET /livez HTTP/1.1\r\n").await.unwrap();
                held.push(silent);
                if held.len() % 50 == 0 {
                    assert!(asks(address).await.ends_with("ok\n"));
                }
            }
            let mut closed = [0; 1];
            let first = timeout(Duration::from_secs(20), held[0].read(&mut closed)).await.unwrap();
            assert!(matches!(first, Ok(0) | Err(_)), "the oldest had to go");
            stopping.cancel();
        };
        let (served, ()) = tokio::join!(served, asking);
        served.unwrap();
    }

    #[test]
    fn readiness_names_what_is_missing() {
        let readiness = Readiness::new(&["keys", "routes"]);
        readiness.set("keys", true);
        assert_eq!(readiness.missing(), ["routes"]);
        readiness.set("routes", true);
        assert!(readiness.missing().is_empty());
        readiness.set("routes", false);
        assert_eq!(readiness.missing(), ["routes"]);
    }
}
