//! Against a stand-in for the API server: what counts is which requests are made.

use std::{convert::Infallible, sync::Arc};

use http::{Request, Response};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Client, client::Body};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::*;

/// Every request that was made, and what the server makes of what it is sent.
#[derive(Clone)]
struct Server {
    requests: Arc<Mutex<Vec<(String, Value)>>>,
    store: fn(Value) -> (u16, Value),
}

impl Server {
    fn new(store: fn(Value) -> (u16, Value)) -> Self {
        Self { requests: Arc::default(), store }
    }

    fn applier(&self) -> Applier {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body: Value = serde_json::from_slice(&body.collect_bytes().await.unwrap()).unwrap_or_default();
                server.requests.lock().push((format!("{} {}", parts.method, parts.uri), body.clone()));
                let (code, answer) = (server.store)(body);
                let answer = Body::from(answer.to_string().into_bytes());
                Ok::<_, Infallible>(Response::builder().status(code).body(answer).unwrap())
            }
        });
        Applier::new(Client::new(service, "ns"), Arc::default())
    }

    fn count(&self) -> usize {
        self.requests.lock().len()
    }
}

fn map(data: Value) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": "a", "namespace": "ns", "uid": "u"}, "data": data})).unwrap()
}

/// What is stored when `desired` was applied and nothing else happened.
fn stored(server: &Server) -> ConfigMap {
    serde_json::from_value(server.requests.lock().last().unwrap().1.clone()).unwrap()
}

#[tokio::test]
async fn an_object_that_is_as_it_should_be_costs_no_request() {
    let server = Server::new(|body| (200, body));
    let applier = server.applier();
    let desired = map(json!({"x": "1"}));
    assert_eq!(applier.apply(&desired, None).await.unwrap(), Applied::Created);
    let (request, body) = server.requests.lock()[0].clone();
    assert!(request.starts_with("PATCH /api/v1/namespaces/ns/configmaps/a?"), "{request}");
    for parameter in ["force=true", "fieldManager=antiphon-operator", "fieldValidation=Strict"] {
        assert!(request.contains(parameter), "{request}");
    }
    assert_eq!((&body["kind"], &body["data"]["x"]), (&json!("ConfigMap"), &json!("1")));

    let mut live = stored(&server);
    live.data.as_mut().unwrap().insert("theirs".into(), "kept".into());
    assert_eq!(applier.apply(&desired, Some(&live)).await.unwrap(), Applied::Unchanged);
    assert_eq!(server.count(), 1);

    live.data.as_mut().unwrap().insert("x".into(), "by hand".into());
    assert_eq!(applier.apply(&desired, Some(&live)).await.unwrap(), Applied::Corrected);
    // A field that is no longer wanted is to be found in the mark only.
    let fewer = map(json!({}));
    assert_eq!(applier.apply(&fewer, Some(&stored(&server))).await.unwrap(), Applied::Changed);
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn what_the_server_writes_otherwise_is_applied_once() {
    let server = Server::new(|mut body| {
        body["data"]["cpu"] = "1".into();
        (200, body)
    });
    let applier = server.applier();
    let desired = map(json!({"cpu": "1000m"}));
    applier.apply(&desired, None).await.unwrap();
    let mut live = stored(&server);
    live.data.as_mut().unwrap().insert("cpu".into(), "1".into());
    assert_eq!(applier.apply(&desired, Some(&live)).await.unwrap(), Applied::Unchanged);
    // Neither what was applied nor what the server had made of it.
    live.data.as_mut().unwrap().insert("cpu".into(), "2".into());
    assert_eq!(applier.apply(&desired, Some(&live)).await.unwrap(), Applied::Corrected);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn seeding_leaves_what_is_there() {
    let server = Server::new(|body| (201, body));
    assert!(server.applier().seed(&map(json!({}))).await.unwrap());
    assert!(server.requests.lock()[0].0.contains("fieldManager=antiphon-operator-seed"));
    let server = Server::new(|_| {
        (
            409,
            json!({"kind": "Status", "status": "Failure", "reason": "AlreadyExists", "code": 409, "message": "is there"}),
        )
    });
    assert!(!server.applier().seed(&map(json!({}))).await.unwrap());
}

#[tokio::test]
async fn deletion_names_the_object_that_was_meant() {
    let server = Server::new(|_| (200, json!({"kind": "Status", "status": "Success"})));
    let mut live = map(json!({}));
    live.metadata.resource_version = Some("7".into());
    assert!(server.applier().delete(&live).await.unwrap());
    assert!(server.applier().delete_unchanged(&live).await.unwrap());
    let requests = server.requests.lock();
    assert_eq!(requests[0].1["preconditions"], json!({"uid": "u"}));
    assert_eq!(requests[1].1["preconditions"], json!({"uid": "u", "resourceVersion": "7"}));
}

#[tokio::test]
async fn finalizers_are_written_on_what_was_read() {
    let server = Server::new(|body| {
        let mut body = body;
        body["metadata"]["name"] = "a".into();
        (200, body)
    });
    let mut live = map(json!({}));
    live.metadata.resource_version = Some("7".into());
    live.metadata.finalizers = Some(vec!["other".into()]);
    let applier = server.applier();
    assert!(applier.add_finalizer(&live, "antiphon.dev/drain").await.unwrap());
    let written = server.requests.lock()[0].1["metadata"].clone();
    assert_eq!(written, json!({"finalizers": ["other", "antiphon.dev/drain"], "resourceVersion": "7", "uid": "u"}));
    assert!(!applier.remove_finalizer(&live, "antiphon.dev/drain").await.unwrap());
    assert_eq!(server.count(), 1);
}
