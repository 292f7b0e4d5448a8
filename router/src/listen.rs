//! The public port: TLS, HTTP/1.1 and HTTP/2 on one listener, bounded in connections, streams, headers and time.

use std::{sync::Arc, time::Duration};

use antiphon_runtime::{
    Tasks,
    tls::{self, Clients},
};
use axum::{body::Body, response::IntoResponse as _};
use http::{Request, header::CONTENT_TYPE};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tonic::service::Routes;
use tower::{ServiceExt as _, service_fn};

use crate::metrics::Metrics;

/// Accepts until the stop; connections then finish what they are at.
pub(crate) async fn serve(
    listener: TcpListener,
    identity: &antiphon_runtime::pki::Identity,
    http: axum::Router,
    grpc: Routes,
    tasks: Tasks,
    metrics: Metrics,
) -> anyhow::Result<()> {
    let mut config = tls::server_config(identity, Clients::Anonymous)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let grpc = grpc.prepare();
    let stopping = tasks.stopping();
    loop {
        // No permit: the backlog of the operating system is the queue.
        let permit = tokio::select! {
            permit = Arc::clone(&permits).acquire_owned() => permit?,
            () = stopping.cancelled() => return Ok(()),
        };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // One connection's trouble, or out of descriptors: neither ends the port.
                Err(error) => {
                    tracing::debug!(%error, "accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            () = stopping.cancelled() => return Ok(()),
        };
        let (acceptor, http, grpc) = (acceptor.clone(), http.clone(), grpc.clone());
        let (stopping, metrics) = (stopping.clone(), metrics.clone());
        tasks.spawn("public connection", async move {
            metrics.connections.inc();
            let served = connection(stream, acceptor, http, grpc, stopping).await;
            metrics.connections.dec();
            if let Err(error) = served {
                tracing::debug!(error, "public connection");
            }
            drop(permit);
            Ok(())
        });
    }
}

async fn connection(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    http: axum::Router,
    grpc: Routes,
    stopping: tokio_util::sync::CancellationToken,
) -> Result<(), String> {
    // Latency of small answers matters more than packets.
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let accepted = timeout(HANDSHAKE_DEADLINE, acceptor.accept(stream)).await;
    let stream = accepted.map_err(|_| "TLS handshake took too long".to_owned())?.map_err(|e| e.to_string())?;
    let service = service_fn(move |request: Request<Incoming>| {
        let (http, grpc) = (http.clone(), grpc.clone());
        async move {
            let request = request.map(Body::new);
            if is_grpc(&request) {
                grpc.oneshot(request).await.map(|r| r.map(Body::new))
            } else {
                http.oneshot(request).await.map(|r| r.into_response())
            }
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_DEADLINE).max_headers(MAX_HEADERS);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .keep_alive_timeout(KEEP_ALIVE);
    let service = TowerToHyperService::new(service);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            timeout(SHUTDOWN_DEADLINE, connection).await.unwrap_or(Ok(()))
        }
    };
    ended.map_err(|e| e.to_string())
}

fn is_grpc(request: &Request<Body>) -> bool {
    let kind = request.headers().get(CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

const MAX_CONNECTIONS: usize = 4096;
const MAX_STREAMS: u32 = 256;
const MAX_HEADERS: usize = 64;
const MAX_HEADER_BYTES: u32 = 16 << 10;
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(20);
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
