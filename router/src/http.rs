//! HTTP/JSON under `/v1/sessions`; errors are `application/problem+json` (RFC 9457).

mod json;
mod problem;

use std::{sync::Arc, time::Duration};

use antiphon_proto::v1;
use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{
        HeaderMap, StatusCode,
        header::{AUTHORIZATION, CONTENT_TYPE, LOCATION},
    },
    response::{IntoResponse, Response},
    routing::{delete, get},
};
use tokio::time::timeout;

use crate::{
    admission::Admission,
    auth::{self, Caller},
    create::{limit, session_id},
    field::FieldError,
    refusals::Failure,
};
use json::{CreateBody, Explanation, ListQuery, Listing, Session};
use problem::Problem;

/// The routes of the public port.
pub(crate) fn router(admission: Arc<Admission>) -> Router {
    Router::new()
        .route("/v1/sessions", get(list).post(create))
        .route("/v1/sessions/{session}", delete(remove))
        .route("/v1/sessions/{session}/explain", get(explain))
        .route("/openapi.json", get(openapi))
        .fallback(async || Problem::of(StatusCode::NOT_FOUND, "no such resource: see /openapi.json"))
        .method_not_allowed_fallback(async || {
            let text = "no such method here: see /openapi.json";
            Problem::of(StatusCode::METHOD_NOT_ALLOWED, text)
        })
        .with_state(admission)
}

type Answer<T> = Result<T, Problem>;

async fn create(State(admission): State<Arc<Admission>>, headers: HeaderMap, body: Body) -> Answer<Response> {
    let caller = caller(&admission, &headers)?;
    let request = create_body(&headers, body).await?;
    let session = Session::from(admission.create(&caller, &request).await?);
    let location = format!("/v1/sessions/{}", session.session);
    Ok((StatusCode::CREATED, [(LOCATION, location)], axum::Json(session)).into_response())
}

async fn list(
    State(admission): State<Arc<Admission>>,
    headers: HeaderMap,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Answer<axum::Json<Listing>> {
    let caller = caller(&admission, &headers)?;
    let Query(query) = query.map_err(|e| FieldError::new("", e.body_text()))?;
    let limit = limit(query.limit)?;
    let listing = admission.list(&caller.tenant, limit).await;
    Ok(axum::Json(listing.into()))
}

async fn explain(
    State(admission): State<Arc<Admission>>,
    headers: HeaderMap,
    Path(session): Path<String>,
) -> Answer<axum::Json<Explanation>> {
    let caller = caller(&admission, &headers)?;
    let explanation = admission.explain(&caller, session_id(&session)?)?;
    Ok(axum::Json(explanation.into()))
}

async fn remove(
    State(admission): State<Arc<Admission>>,
    headers: HeaderMap,
    Path(session): Path<String>,
) -> Answer<StatusCode> {
    let caller = caller(&admission, &headers)?;
    let session = session_id(&session)?;
    admission.delete(&caller.tenant, session).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], OPENAPI)
}

fn caller(admission: &Admission, headers: &HeaderMap) -> Result<Caller, Failure> {
    let header = headers.get(AUTHORIZATION).map(|h| h.as_bytes());
    auth::caller(&admission.fleet.records(), header)
}

async fn create_body(headers: &HeaderMap, body: Body) -> Answer<v1::CreateSessionRequest> {
    let kind = headers.get(CONTENT_TYPE).and_then(|h| h.to_str().ok());
    let kind = kind.unwrap_or("").split(';').next().unwrap_or("").trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        let text = format!("content-type is {kind:?}: send application/json");
        return Err(Problem::of(StatusCode::UNSUPPORTED_MEDIA_TYPE, text));
    }
    let late = |_| Problem::of(StatusCode::REQUEST_TIMEOUT, "the body took too long");
    let body = timeout(BODY_DEADLINE, to_bytes(body, MAX_BODY)).await;
    let body = body.map_err(late)?.map_err(|_| {
        let text = format!("the body is longer than {MAX_BODY} bytes, or broke off");
        Problem::of(StatusCode::PAYLOAD_TOO_LARGE, text)
    })?;
    Ok(CreateBody::parse(&body)?.into_proto()?)
}

/// The description of this API; a test exercises all of it.
pub(crate) const OPENAPI: &str = include_str!("../openapi.json");
const MAX_BODY: usize = 64 << 10;
const BODY_DEADLINE: Duration = Duration::from_secs(5);
