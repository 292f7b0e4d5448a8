//! Nothing is written by a process that does not hold the lease.
//!
//! The fence stands in the client itself: every request that changes something passes it, whoever makes it. It is open
//! until a moment on this process's own clock, which is earlier than anybody else could take the lease; a request that
//! is on its way then is given up.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use http::{Method, Request, Response};
use kube::client::Body;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};
use tower::{BoxError, Layer, Service};

use crate::metrics::{Metrics, Verb};

/// This process may not write: it does not hold the lease, or not for long enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the leader's lease has run out: nothing is written any more")]
pub struct Fenced;

/// Until when this process may write. Clones are one fence.
#[derive(Clone, Debug)]
pub struct Fence {
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Closed,
    Until(Instant),
    Open,
}

impl Fence {
    /// A fence that lets nothing pass until the lease is held.
    #[must_use]
    pub fn closed() -> Self {
        Self { state: Arc::new(Mutex::new(State::Closed)) }
    }

    /// No fence: for commands that run once and need no lease.
    #[must_use]
    pub fn open() -> Self {
        Self { state: Arc::new(Mutex::new(State::Open)) }
    }

    /// Lets writes pass until then.
    pub fn open_until(&self, until: Instant) {
        *self.state.lock() = State::Until(until);
    }

    /// Lets nothing pass any more.
    pub fn close(&self) {
        *self.state.lock() = State::Closed;
    }

    /// Until when a write may be under way; `None`: without limit.
    ///
    /// # Errors
    /// Nothing may be written now.
    pub fn check(&self) -> Result<Option<Instant>, Fenced> {
        match *self.state.lock() {
            State::Open => Ok(None),
            State::Until(until) if Instant::now() < until => Ok(Some(until)),
            State::Until(_) | State::Closed => Err(Fenced),
        }
    }
}

/// Puts a [`Fence`] in front of a client, and counts what passes.
#[derive(Clone, Debug)]
pub struct FenceLayer {
    /// The fence.
    pub fence: Fence,
    /// Where writes are counted.
    pub metrics: Arc<Metrics>,
}

impl<S> Layer<S> for FenceLayer {
    type Service = FencedService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        FencedService { inner, layer: self.clone() }
    }
}

/// See [`FenceLayer`].
#[derive(Clone, Debug)]
pub struct FencedService<S> {
    inner: S,
    layer: FenceLayer,
}

impl<S, B> Service<Request<Body>> for FencedService<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: 'static,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<B>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let verb = match *request.method() {
            Method::POST => Verb::create,
            Method::PATCH => Verb::patch,
            Method::PUT => Verb::update,
            Method::DELETE => Verb::delete,
            // The rest changes nothing.
            _ => {
                let answer = self.inner.call(request);
                return Box::pin(async move { answer.await.map_err(Into::into) });
            }
        };
        match self.layer.fence.check() {
            Err(fenced) => Box::pin(async move { Err(fenced.into()) }),
            Ok(until) => {
                self.layer.metrics.wrote(verb);
                let answer = self.inner.call(request);
                Box::pin(async move {
                    match until {
                        None => answer.await.map_err(Into::into),
                        Some(until) => match timeout_at(until, answer).await {
                            Ok(answer) => answer.map_err(Into::into),
                            Err(_elapsed) => Err(Fenced.into()),
                        },
                    }
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, time::Duration};

    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::{Api, Client, api::PostParams, client::ClientBuilder};

    use super::*;
    use crate::Error;

    /// A client of an API server that answers when it likes.
    fn client(fence: &Fence, takes: Duration) -> Client {
        let server = tower::service_fn(move |_: Request<Body>| async move {
            tokio::time::sleep(takes).await;
            Ok::<_, Infallible>(Response::new(Body::from(br#"{"metadata":{"name":"a"}}"#.to_vec())))
        });
        let layer = FenceLayer { fence: fence.clone(), metrics: Arc::default() };
        ClientBuilder::new(server, "ns").with_layer(&layer).build()
    }

    async fn write(client: &Client) -> Result<ConfigMap, Error> {
        let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
        Ok(api.create(&PostParams::default(), &ConfigMap::default()).await?)
    }

    #[tokio::test(start_paused = true)]
    async fn writes_pass_while_the_lease_is_held_and_reads_always() {
        let fence = Fence::closed();
        let client = client(&fence, Duration::ZERO);
        let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
        assert!(matches!(write(&client).await, Err(Error::Fenced(_))));
        api.get("a").await.unwrap();

        fence.open_until(Instant::now() + Duration::from_secs(8));
        write(&client).await.unwrap();
        tokio::time::advance(Duration::from_secs(9)).await;
        assert!(matches!(write(&client).await, Err(Error::Fenced(_))));
        api.get("a").await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_outlives_the_lease_is_given_up() {
        let fence = Fence::closed();
        fence.open_until(Instant::now() + Duration::from_secs(2));
        let client = client(&fence, Duration::from_secs(3));
        assert!(matches!(write(&client).await, Err(Error::Fenced(_))));
    }
}
