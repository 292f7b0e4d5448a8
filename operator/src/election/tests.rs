//! In virtual time, against a stand-in for the API server that keeps one Lease and compares versions.

use std::{convert::Infallible, sync::Arc};

use http::{Method, Request, Response};
use kube::{Client, client::Body};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::*;

#[derive(Clone, Default)]
struct Server {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    lease: Option<Value>,
    version: u64,
    unreachable: bool,
    writes: usize,
}

impl Server {
    fn candidate(&self, identity: &str) -> Elector {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect_bytes().await.unwrap();
                let (code, answer) = server.state.lock().handle(&parts.method, serde_json::from_slice(&body).ok());
                let answer = Body::from(answer.to_string().into_bytes());
                Ok::<_, Infallible>(Response::builder().status(code).body(answer).unwrap())
            }
        });
        let api = Api::default_namespaced(Client::new(service, "ns"));
        Elector::new(api, "antiphon-operator".into(), identity.into(), Timing::default())
    }

    fn cut_off(&self, unreachable: bool) {
        self.state.lock().unreachable = unreachable;
    }

    /// Somebody edits the Lease by hand.
    fn touch(&self) {
        let mut state = self.state.lock();
        state.version += 1;
        let version = state.version.to_string();
        state.lease.as_mut().unwrap()["metadata"]["resourceVersion"] = version.into();
    }

    fn delete(&self) {
        self.state.lock().lease = None;
    }
}

impl State {
    fn handle(&mut self, method: &Method, body: Option<Value>) -> (u16, Value) {
        let refuse = |code: u16, reason: &str| {
            (code, json!({"kind": "Status", "status": "Failure", "reason": reason, "code": code, "message": reason}))
        };
        if self.unreachable {
            return refuse(503, "ServiceUnavailable");
        }
        match (method, &self.lease, body) {
            (&Method::GET, Some(lease), _) => (200, lease.clone()),
            (&Method::POST, Some(_), _) => refuse(409, "AlreadyExists"),
            (&Method::POST, None, Some(body)) => self.put(body),
            (&Method::PUT, Some(lease), Some(body)) => {
                match body["metadata"]["resourceVersion"] == lease["metadata"]["resourceVersion"] {
                    true => self.put(body),
                    false => refuse(409, "Conflict"),
                }
            }
            _ => refuse(404, "NotFound"),
        }
    }

    fn put(&mut self, mut lease: Value) -> (u16, Value) {
        self.version += 1;
        self.writes += 1;
        lease["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.lease = Some(lease.clone());
        (200, lease)
    }
}

async fn pass(seconds: u64) {
    tokio::time::advance(Duration::from_secs(seconds)).await;
}

/// A candidate that came to a cluster without a Lease and waited.
async fn leader(server: &Server, identity: &str) -> Elector {
    let mut elector = server.candidate(identity);
    assert_eq!(elector.step().await.unwrap(), Standing::Follower(None));
    pass(3).await;
    assert!(matches!(elector.step().await.unwrap(), Standing::Leader(_)));
    elector
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_not_renewed_is_taken_after_its_whole_duration_on_the_takers_clock() {
    let server = Server::default();
    let mut a = leader(&server, "a").await;
    let mut b = server.candidate("b");
    assert_eq!(b.step().await.unwrap(), Standing::Follower(Some("a".into())));
    pass(9).await;
    assert_eq!(b.step().await.unwrap(), Standing::Follower(Some("a".into())));
    a.step().await.unwrap();
    pass(9).await;
    assert_eq!(b.step().await.unwrap(), Standing::Follower(Some("a".into())), "renewed meanwhile");
    pass(10).await;
    assert_eq!(b.step().await.unwrap(), Standing::Leader(1));
    assert_eq!(a.step().await.unwrap(), Standing::Follower(Some("b".into())));
}

#[tokio::test(start_paused = true)]
async fn renewing_is_one_write_and_keeps_the_token() {
    let server = Server::default();
    let mut a = leader(&server, "a").await;
    for renewals in 2..5 {
        assert_eq!(a.step().await.unwrap(), Standing::Leader(0));
        assert_eq!(server.state.lock().writes, renewals);
    }
    server.touch();
    assert_eq!(a.step().await.unwrap(), Standing::Leader(0), "an edit that leaves the holder alone costs nothing");
}

#[tokio::test(start_paused = true)]
async fn a_deleted_lease_is_the_holders_again_under_a_new_token() {
    let server = Server::default();
    let mut a = leader(&server, "a").await;
    server.delete();
    let mut newcomer = server.candidate("b");
    assert_eq!(newcomer.step().await.unwrap(), Standing::Follower(None));
    pass(2).await;
    assert_eq!(newcomer.step().await.unwrap(), Standing::Follower(None));
    assert_eq!(a.step().await.unwrap(), Standing::Leader(1));
    pass(2).await;
    assert_eq!(newcomer.step().await.unwrap(), Standing::Follower(Some("a".into())));
}

#[tokio::test(start_paused = true)]
async fn of_two_who_try_one_succeeds() {
    let server = Server::default();
    let (mut a, mut b) = (server.candidate("a"), server.candidate("b"));
    for _ in 0..2 {
        let standings = (a.step().await.unwrap(), b.step().await.unwrap());
        if let (Standing::Leader(_), Standing::Follower(_)) = standings {
            return;
        }
        pass(3).await;
    }
    panic!("nobody leads");
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_cannot_renew_stops_writing_before_anybody_else_begins() {
    let server = Server::default();
    let a = leader(&server, "a").await;
    let fence = Fence::closed();
    fence.open_until(Instant::now() + Duration::from_secs(8));
    server.cut_off(true);
    let began = Instant::now();
    let lost = a.hold(fence.clone(), CancellationToken::new()).await.unwrap_err();
    assert!(lost.to_string().contains("in time"), "{lost}");
    assert!(fence.check().is_err() && began.elapsed() <= Timing::default().lease);

    server.cut_off(false);
    let mut b = server.candidate("b");
    b.step().await.unwrap();
    pass(10).await;
    assert_eq!(b.step().await.unwrap(), Standing::Leader(1));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_given_back_is_taken_at_once() {
    let server = Server::default();
    let a = leader(&server, "a").await;
    let stopping = CancellationToken::new();
    stopping.cancel();
    a.hold(Fence::closed(), stopping).await.unwrap();
    assert_eq!(server.candidate("b").step().await.unwrap(), Standing::Leader(1));
}

#[tokio::test(start_paused = true)]
async fn acquiring_opens_the_fence() {
    let server = Server::default();
    let fence = Fence::closed();
    assert_eq!(server.candidate("a").acquire(&fence).await, 0);
    assert!(fence.check().is_ok());
}
