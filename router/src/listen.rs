//! The public port: TLS, HTTP/1.1 and HTTP/2 on one listener, bounded in connections, streams, headers and time.
//!
//! Anybody may connect. Without a key a source gets its share of the connections only, each for a short time only, and
//! makes room when the port is full.

use std::{sync::Arc, time::Duration};

use antiphon_runtime::{
    Tasks,
    crowd::{Crowd, Entry, Place},
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
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::{Status, service::Routes};
use tower::{ServiceExt as _, service_fn};

use crate::{auth::Proof, metrics::Metrics};

/// What is served.
#[derive(Clone, Debug)]
struct Services {
    http: axum::Router,
    grpc: Routes,
}

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
    let services = Services { http, grpc: grpc.prepare() };
    let crowd = Crowd::new(MAX_CONNECTIONS, MAX_PER_SOURCE);
    let stopping = tasks.stopping();
    loop {
        let (stream, source) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                // One connection's trouble, or out of descriptors: neither ends the port.
                Err(error) => {
                    tracing::debug!(%error, "accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            () = stopping.cancelled() => return Ok(()),
        };
        // Taken from the backlog in any case: what waits there must not keep others from being heard.
        let Entry { place, bound } = crowd.enter(source.ip());
        if let Some(bound) = bound {
            metrics.connection_refused(bound.into());
        }
        let Some(place) = place else {
            continue;
        };
        let (acceptor, services) = (acceptor.clone(), services.clone());
        let (stopping, metrics) = (stopping.clone(), metrics.clone());
        tasks.spawn("public connection", async move {
            metrics.connections.inc();
            let served = connection(stream, place, acceptor, services, stopping).await;
            metrics.connections.dec();
            if let Err(error) = served {
                tracing::debug!(error, "public connection");
            }
            Ok(())
        });
    }
}

async fn connection(
    stream: TcpStream,
    place: Place,
    acceptor: TlsAcceptor,
    services: Services,
    stopping: CancellationToken,
) -> Result<(), String> {
    // Latency of small answers matters more than packets.
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let accepted = tokio::select! {
        accepted = timeout(HANDSHAKE_DEADLINE, acceptor.accept(stream)) => accepted,
        () = place.taken() => return Err(CROWDED.to_owned()),
    };
    let stream = accepted.map_err(|_| "TLS handshake took too long".to_owned())?.map_err(|e| e.to_string())?;
    answer(stream, &place, services, stopping).await
}

/// Answers requests until the other end closes, the stop, or [`UNPROVEN`] without a request that has a valid key. Whoever
/// has shown one is not turned away for others.
async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    place: &Place,
    services: Services,
    stopping: CancellationToken,
) -> Result<(), String> {
    let proof = Proof::default();
    let carried = proof.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let (Services { http, grpc }, proof) = (services.clone(), carried.clone());
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(proof);
            if !is_grpc(&request) {
                return http.oneshot(request).await.map(|r| r.into_response());
            }
            // A message may never end. Streams that go on after their headers live as long as the connection.
            match timeout(GRPC_DEADLINE, grpc.oneshot(request)).await {
                Ok(answered) => answered.map(|r| r.map(Body::new)),
                Err(_late) => Ok(Status::deadline_exceeded("the request took too long").into_http()),
            }
        }
    });
    let builder = protocols();
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::pin!(connection);
    let unproven = async {
        while timeout(UNPROVEN, proof.given()).await.is_ok() {
            place.prove();
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => return ended.map_err(|e| e.to_string()),
        () = unproven => Err("no request with a valid key".to_owned()),
        () = place.taken() => Err(CROWDED.to_owned()),
        () = stopping.cancelled() => Ok(()),
    };
    connection.as_mut().graceful_shutdown();
    // Who does not take the last answers goes without.
    let _ = timeout(SHUTDOWN_DEADLINE, connection).await;
    ended
}

fn protocols() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_DEADLINE)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(MAX_HEADER_BYTES).expect("16 KiB"))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .keep_alive_timeout(KEEP_ALIVE);
    builder
}

fn is_grpc(request: &Request<Body>) -> bool {
    let kind = request.headers().get(CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

const CROWDED: &str = "too many connections at once";
const MAX_CONNECTIONS: usize = 4096;
const MAX_PER_SOURCE: usize = 256;
const MAX_STREAMS: u32 = 256;
const MAX_HEADERS: usize = 64;
/// Of one request, all its headers together.
const MAX_HEADER_BYTES: usize = 16 << 10;
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// Above the deadlines of all that a key can ask for.
const GRPC_DEADLINE: Duration = Duration::from_secs(10);
/// A connection without a valid key is closed after this; so is one on which no key was shown for so long.
const UNPROVEN: Duration = Duration::from_secs(30);
const KEEP_ALIVE: Duration = Duration::from_secs(20);
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use antiphon_core::keys::FleetRoot;
    use antiphon_proto::api_key::ApiKey;
    use antiphon_runtime::pki::{FleetCa, PeerName, Role};
    use axum::http::{
        HeaderValue, Response, StatusCode, Version,
        header::{AUTHORIZATION, HOST},
    };
    use bytes::Bytes;
    use http_body_util::Full;
    use hyper::client::conn::{http1, http2};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
        time::Instant,
    };

    use super::*;
    use crate::{Key, Memory, Records, admission::Admission, fleet::Fleet, grpc, http::router};

    /// The services with one key.
    fn services(tasks: &Tasks) -> (Services, ApiKey) {
        let root = FleetRoot::from_bytes([7; 32]);
        let peer = PeerName::new("router-1", Role::Router, "here").unwrap();
        let ca = FleetCa::from_seed(&root.ca_seed()).unwrap();
        let identity = ca.issue(&peer, &[], std::time::SystemTime::now()).unwrap();
        let fleet = Fleet::new(identity, root, Arc::new(Memory::default()));
        let key = ApiKey::from_random(&[9; ApiKey::RANDOM]);
        let record = Key { sha256: key.sha256(), tenant: "acme".into(), agents: vec![], tickets_per_minute: 0 };
        let keys = [(key.id().to_owned(), record)].into();
        fleet.records_changed(Arc::new(Records { keys, ..Records::default() }));
        let metrics = Metrics::new(&mut prometheus_client::registry::Registry::default());
        let admission = Admission::new(fleet, tasks.clone(), metrics);
        let grpc = grpc::public(&admission).unwrap().prepare();
        (Services { http: router(admission), grpc }, key)
    }

    fn get(path: &str) -> Request<Full<Bytes>> {
        Request::get(format!("https://router{path}")).header(HOST, "router").body(Full::default()).unwrap()
    }

    fn with_key(key: &ApiKey, mut request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
        let value = HeaderValue::try_from(format!("Bearer {}", key.text())).unwrap();
        request.headers_mut().insert(AUTHORIZATION, value);
        request
    }

    /// Serves one end; the other end asks whatever `ask` wants and tells when the server hung up.
    async fn until_closed<A: Future<Output = ()>>(ask: impl FnOnce(DuplexStream, ApiKey) -> A) -> Duration {
        let tasks = Tasks::new();
        let (services, key) = services(&tasks);
        let (server, client) = tokio::io::duplex(64 << 10);
        let started = Instant::now();
        let served = async {
            let place = Crowd::new(1, 1).enter([127, 0, 0, 1].into()).place.unwrap();
            let _ = answer(server, &place, services, tasks.stopping()).await;
            started.elapsed()
        };
        tokio::join!(served, ask(client, key)).0
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_shows_no_valid_key_is_closed() {
        let lived = until_closed(async |client, _key| {
            let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(client)).await;
            let (mut sender, connection) = handshake.unwrap();
            let ask = async {
                // What needs no key, and wrong keys, keep nothing open.
                let stranger = ApiKey::from_random(&[8; ApiKey::RANDOM]);
                while let Ok(answer) = sender.send_request(get("/openapi.json")).await {
                    assert_eq!(answer.status(), StatusCode::OK);
                    let _ = sender.send_request(with_key(&stranger, get("/v1/sessions"))).await;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            };
            let _ = tokio::join!(connection, ask);
        })
        .await;
        assert!((UNPROVEN..=UNPROVEN + SHUTDOWN_DEADLINE).contains(&lived), "{lived:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_is_closed() {
        let lived = until_closed(async |client, _key| {
            let held = client;
            tokio::time::sleep(2 * UNPROVEN).await;
            drop(held);
        })
        .await;
        assert!(lived <= UNPROVEN + SHUTDOWN_DEADLINE, "{lived:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn valid_keys_keep_a_connection_open() {
        let lived = until_closed(async |client, key| {
            let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(client)).await;
            let (mut sender, connection) = handshake.unwrap();
            let ask = async {
                for _ in 0..10 {
                    tokio::time::sleep(UNPROVEN * 2 / 3).await;
                    let answer = sender.send_request(with_key(&key, get("/v1/sessions"))).await.unwrap();
                    assert_eq!(answer.status(), StatusCode::OK);
                }
            };
            tokio::select! {
                () = ask => {}
                ended = connection => panic!("closed in between: {ended:?}"),
            }
        })
        .await;
        assert!(lived >= 6 * UNPROVEN, "{lived:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_grpc_message_that_never_ends_is_answered() {
        let closed = until_closed(async |client, _key| {
            let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(client)).await;
            let (mut sender, connection) = handshake.unwrap();
            let ask = async {
                let endless = Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>());
                let request = Request::post("https://router/antiphon.v1.Sessions/CreateSession")
                    .version(Version::HTTP_2)
                    .header(CONTENT_TYPE, "application/grpc")
                    .body(endless)
                    .unwrap();
                let answer: Response<_> = sender.send_request(request).await.unwrap();
                // DEADLINE_EXCEEDED.
                assert_eq!(answer.headers()["grpc-status"], "4");
            };
            tokio::select! {
                () = ask => {}
                ended = connection => panic!("closed before the answer: {ended:?}"),
            }
        })
        .await;
        assert!(closed < UNPROVEN, "{closed:?}");
    }

    /// Writes the beginning, then one piece each second for as long as somebody listens; what was answered, and after
    /// how long.
    async fn drip(begin: impl FnOnce(&ApiKey) -> String, piece: &'static [u8]) -> (String, Duration) {
        let (tasks, started) = (Tasks::new(), Instant::now());
        let (services, key) = services(&tasks);
        let (server, client) = tokio::io::duplex(64 << 10);
        let (mut read, mut write) = tokio::io::split(client);
        write.write_all(begin(&key).as_bytes()).await.unwrap();
        let dripping = async {
            while write.write_all(piece).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            std::future::pending::<()>().await;
        };
        let listening = async {
            let mut answer = vec![0; 4096];
            let length = read.read(&mut answer).await.unwrap();
            answer.truncate(length);
            (String::from_utf8(answer).unwrap(), started.elapsed())
        };
        let serving = async {
            let place = Crowd::new(1, 1).enter([127, 0, 0, 1].into()).place.unwrap();
            let _ = answer(server, &place, services, tasks.stopping()).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            heard = listening => heard,
            () = serving => unreachable!("waits for ever"),
            () = dripping => unreachable!("waits for ever"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn headers_that_never_end_are_cut_off() {
        let (answer, after) = drip(|_| "GET /v1/sessions HTTP/1.1\r\nhost: router\r\n".into(), b"a: b\r\n").await;
        assert!(after <= HEADER_DEADLINE + Duration::from_secs(1), "{after:?} {answer}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_ends_is_answered() {
        let begin = |key: &ApiKey| {
            let key = key.text();
            format!(
                "POST /v1/sessions HTTP/1.1\r\nhost: router\r\nauthorization: Bearer {key}\r\n\
                 content-type: application/json\r\ncontent-length: 1000\r\n\r\n"
            )
        };
        let (answer, after) = drip(begin, b" ").await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(after <= Duration::from_secs(6), "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn too_many_headers_are_refused() {
        let many = |n| move |_: &ApiKey| format!("GET /x HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(n));
        let (answer, _) = drip(many(MAX_HEADERS), b"").await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
        assert!(answer.contains("\r\ndate: "), "clients can tell whether their clock is right: {answer}");
        let (answer, _) = drip(many(MAX_HEADERS + 1), b"").await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }

    /// RFC 9113, section 4.1.
    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    #[tokio::test(start_paused = true)]
    async fn streams_beyond_the_bound_are_refused() {
        const MORE: u32 = MAX_STREAMS + 44;
        until_closed(async |client, _key| {
            let (mut read, mut write) = tokio::io::split(client);
            let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
            // POST, https, a path and a content type (RFC 7541): each is a gRPC request whose message does not come.
            let path = [&[0x04][..], &text("/antiphon.v1.Sessions/CreateSession")].concat();
            let kind = [&[0x0f, 0x10][..], &text("application/grpc")].concat();
            let headers = [&[0x83, 0x87][..], &path, &kind].concat();
            let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            bytes.extend(frame(4, 0, 0, &[]));
            for n in 0..MORE {
                bytes.extend(frame(1, 4, 2 * n + 1, &headers));
            }
            write.write_all(&bytes).await.unwrap();
            let mut refused = 0;
            while refused < MORE - MAX_STREAMS {
                let mut head = [0; 9];
                read.read_exact(&mut head).await.unwrap();
                let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
                let mut payload = vec![0; length];
                read.read_exact(&mut payload).await.unwrap();
                // RST_STREAM with REFUSED_STREAM: the streams below the bound stay.
                if head[3] == 3 {
                    assert_eq!(payload, [0, 0, 0, 7]);
                    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                    assert!(stream > 2 * MAX_STREAMS - 1, "{stream}");
                    refused += 1;
                }
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn long_headers_are_refused_over_http1() {
        until_closed(async |client, key| {
            let (mut sender, connection) = http1::handshake(TokioIo::new(client)).await.unwrap();
            let ask = async {
                let mut request = with_key(&key, get("/v1/sessions"));
                let long = HeaderValue::try_from("x".repeat(MAX_HEADER_BYTES)).unwrap();
                request.headers_mut().insert("x-long", long);
                let answer = sender.send_request(request).await.unwrap();
                assert_eq!(answer.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
            };
            let _ = tokio::join!(connection, ask);
        })
        .await;
    }
}
