//! The admin port: liveness, readiness and metrics.
//!
//! Liveness depends on nothing but the process itself (invariant I8); readiness names what is still missing.

use std::sync::Arc;

use anyhow::Context as _;
use axum::{
    Router, extract::State, http::StatusCode, http::header::CONTENT_TYPE, response::IntoResponse, routing::get,
};
use parking_lot::RwLock;
use prometheus_client::{encoding::text, registry::Registry};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

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
/// # Errors
/// The listener fails.
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
    axum::serve(listener, app).with_graceful_shutdown(stopping.cancelled_owned()).await.context("admin port")
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

#[cfg(test)]
mod tests {
    use super::*;

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
