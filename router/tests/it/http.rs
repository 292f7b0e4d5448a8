//! HTTP/JSON: what callers send wrong, and what they get for it.

use antiphon_proto::api_key::ApiKey;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};

use crate::world::{AGENT, World, client_key, eventually, key_record};

pub(crate) fn body() -> Value {
    json!({ "agent": AGENT, "clientKey": BASE64.encode(client_key()) })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_json_is_refused_with_its_place_and_a_way_out() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let with = |change: fn(&mut Value)| {
        let mut value = body();
        change(&mut value);
        value.to_string()
    };
    let table: Vec<(String, &str, &str)> = vec![
        (String::new(), "", "EOF"),
        ("{".into(), "", "EOF"),
        ("[]".into(), "", "expected an object"),
        (with(|b| b["location"] = json!([50, 8])), "location", "expected an object"),
        (format!("{} x", body()), "", "trailing"),
        (with(|b| b["agnet"] = json!("x")), "agnet", "unknown field"),
        (with(|b| drop(b.as_object_mut().unwrap().remove("agent"))), "", "missing field `agent`"),
        (with(|b| b["agent"] = json!(7)), "agent", "invalid type"),
        (with(|b| b["agent"] = json!("desk")), "agent", "namespace/name"),
        (with(|b| b["clientKey"] = json!("AAA=")), "clientKey", "base64url"),
        (with(|b| b["clientKey"] = json!("AAAA")), "clientKey", "32 bytes"),
        (with(|b| b["clientKey"] = json!(BASE64.encode([0; 32]))), "clientKey", "all zeros"),
        (with(|b| b["codec"] = json!("mp3")), "codec", "l16-16k"),
        (with(|b| b["epoch"] = json!(0)), "epoch", "starts at 1"),
        (with(|b| b["epoch"] = json!(-1)), "epoch", "invalid value"),
        (with(|b| b["session"] = json!("abc")), "session", "26 characters"),
        (with(|b| b["location"] = json!({"latitude": 91, "longitude": 0})), "location.latitude", "-90..=90"),
        (with(|b| b["location"] = json!({"latitude": 1})), "location", "missing field"),
        (
            with(|b| b["location"] = json!({"latitude": 1, "longitude": 1, "altitude": 1})),
            "location.altitude",
            "unknown field",
        ),
        (with(|b| b["constraints"] = json!({"regions": ["ok", 7]})), "constraints.regions[1]", "invalid type"),
        (with(|b| b["constraints"] = json!({"regions": ["Not OK"]})), "constraints.regions[0]", "a-z"),
        (with(|b| b["constraints"] = json!({"maxRttMs": 20})), "constraints.maxRttMs", "needs location"),
        (with(|b| b["waitedMs"] = json!(1.5)), "waitedMs", "invalid type"),
    ];
    for (text, path, detail) in table {
        let request = http::Request::post("/v1/sessions")
            .header("host", "router")
            .header("content-type", "application/json; charset=utf-8")
            .header("authorization", format!("Bearer {}", world.key.text()))
            .body(Full::new(Bytes::from(text.clone())))
            .unwrap();
        let answer = region.http(request).await;
        assert_eq!(answer.status, 400, "{text}: {answer:?}");
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        assert_eq!(answer.body["path"], path, "{text}: {answer:?}");
        let found = answer.body["detail"].as_str().unwrap();
        assert!(found.contains(detail), "{text}: {found:?} has no {detail:?}");
    }
    for limit in ["x", "-1", "10001"] {
        let answer = region.ask(&world.key, "GET", &format!("/v1/sessions?limit={limit}"), None).await;
        assert_eq!((answer.status, &answer.body["path"]), (400, &json!("limit")), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_open_only_what_is_theirs() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let worker = world.worker(&region, "w-1", 10).await;
    let (limited, other) = (ApiKey::from_random(&[21; ApiKey::RANDOM]), ApiKey::from_random(&[22; ApiKey::RANDOM]));
    let mut foreign = key_record(&other, &[]);
    foreign.tenant = "rival".into();
    let change = antiphon_proto::v1::ApplyRequest {
        keys: vec![key_record(&limited, &["other/*"]), foreign],
        ..antiphon_proto::v1::ApplyRequest::default()
    };
    world.apply(&region, change).await.unwrap();
    let bare = http::Request::get("/v1/sessions").header("host", "router");
    let bare = region.http(bare.body(Full::default()).unwrap()).await;
    assert_eq!(bare.status, 401);
    assert_eq!(bare.headers["www-authenticate"], "Bearer");
    let stranger = ApiKey::from_random(&[23; ApiKey::RANDOM]);
    assert_eq!(region.ask(&stranger, "GET", "/v1/sessions", None).await.status, 401);
    let refused = region.ask(&limited, "POST", "/v1/sessions", Some(body())).await;
    assert_eq!(refused.status, 403, "{refused:?}");
    // Another tenant neither sees nor ends what is not its own.
    let session = region.ask(&world.key, "POST", "/v1/sessions", Some(body())).await;
    assert_eq!(session.status, 201, "{session:?}");
    let path = session.headers["location"].to_str().unwrap().to_owned();
    let explain = region.ask(&other, "GET", &format!("{path}/explain"), None).await;
    assert_eq!(explain.status, 404);
    let list = region.ask(&other, "GET", "/v1/sessions", None).await;
    assert_eq!(list.body, json!({ "sessions": [], "missing": [] }));
    assert_eq!(region.ask(&other, "DELETE", &path, None).await.status, 204);
    assert_eq!(worker.held(), 1);
    assert_eq!(region.ask(&world.key, "DELETE", &path, None).await.status, 204);
    assert_eq!(worker.held(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_and_http1_share_the_port() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let _worker = world.worker(&region, "w-1", 10).await;
    // gRPC is HTTP/2; the JSON client here speaks HTTP/1.1.
    let over_http1 = region.ask(&world.key, "POST", "/v1/sessions", Some(body())).await;
    assert_eq!(over_http1.status, 201);
    let over_http2 = region.sessions().create_session(crate::world::with_key(&world.key, crate::world::create())).await;
    assert!(over_http2.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_source_cannot_take_all_connections() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let mut held = Vec::new();
    // Connections that say nothing, from 127.0.0.1.
    eventually("a connection is refused", async || {
        for _ in 0..100 {
            held.push(TcpStream::connect(region.public).await.unwrap());
        }
        let (_, metrics) = region.admin_get("/metrics").await;
        metrics.contains("antiphon_router_connections_refused_total{bound=\"source\"}")
    })
    .await;
    let another = TcpSocket::new_v4().unwrap();
    another.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let another = another.connect(region.public).await.unwrap();
    let request = http::Request::get("/openapi.json").header("host", "router").body(Full::default()).unwrap();
    assert_eq!(region.http_over(another, request).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_is_no_text_is_a_problem_like_any_other() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    for (method, path) in [("DELETE", "/v1/sessions/%ff"), ("GET", "/v1/sessions/%ff/explain")] {
        let answer = region.ask(&world.key, method, path, None).await;
        assert_eq!(answer.status, 400, "{answer:?}");
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        assert_eq!(answer.body["path"], "session", "{answer:?}");
    }
    // Without a key there is nothing to learn.
    let bare = http::Request::delete("/v1/sessions/%ff").header("host", "router").body(Full::default()).unwrap();
    assert_eq!(region.http(bare).await.status, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_unread_is_answered_whole_over_http2() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let request = |(method, path, kind, _): &(&str, &str, &str, u16)| {
        http::Request::builder()
            .method(*method)
            .uri(format!("https://router{path}"))
            .header("content-type", *kind)
            .header("authorization", format!("Bearer {}", world.key.text()))
            .body(Full::new(Bytes::from(vec![b' '; 60 << 10])))
            .unwrap()
    };
    let table = [
        ("POST", "/v1/sessions", "text/plain", 415),
        ("PUT", "/v1/sessions", "application/json", 405),
        ("POST", "/v1/session", "application/json", 404),
        // Read to its end: an answer like any other.
        ("POST", "/v1/sessions", "application/json", 400),
    ];
    let answers = region.http2(table.iter().map(request).collect()).await;
    for (answer, row) in answers.iter().zip(&table) {
        assert_eq!(
            (answer.status, answer.headers["content-type"].as_bytes()),
            (row.3, &b"application/problem+json"[..])
        );
        assert!(answer.body["detail"].is_string(), "{row:?}: {answer:?}");
    }
}
