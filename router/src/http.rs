//! HTTP/JSON under `/v1/sessions`; errors are `application/problem+json` (RFC 9457).

mod drain;
mod json;
mod path;
mod problem;

use std::{sync::Arc, time::Duration};

use antiphon_core::id::SessionId;
use antiphon_proto::v1;
use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{FromRequestParts, Path, Query, State, rejection::QueryRejection},
    http::{
        HeaderMap, StatusCode,
        header::{AUTHORIZATION, CONTENT_TYPE, LOCATION},
        request::Parts,
    },
    middleware::from_fn,
    response::{IntoResponse, Response},
    routing::{delete, get},
};
use tokio::time::timeout;

use crate::{
    admission::{Admission, Question},
    auth::{self, Caller},
    create::{limit, session_id},
    field::FieldError,
};
pub use json::check_session_request;
use json::{CreateBody, Explanation, ListQuery, Listing, Session};
use path::SessionPath;
use problem::Problem;

/// The routes of the public port.
pub(crate) fn router(admission: Arc<Admission>) -> Router {
    Router::new()
        .route("/v1/sessions", get(list).post(create))
        .route("/v1/sessions/{session}", delete(remove))
        .route("/v1/sessions/{session}/explain", get(explain))
        .route("/v1/sessions/{session}/path", get(path))
        .route("/openapi.json", get(openapi))
        .fallback(async || Problem::of(StatusCode::NOT_FOUND, "no such resource: see /openapi.json"))
        .method_not_allowed_fallback(async || {
            let text = "no such method here: see /openapi.json";
            Problem::of(StatusCode::METHOD_NOT_ALLOWED, text)
        })
        .layer(from_fn(drain::drained))
        .with_state(admission)
}

type Answer<T> = Result<T, Problem>;

/// The key that the request came with; extracted first, so that nobody else learns anything.
#[derive(Clone, Debug)]
struct Keyed(Caller);

impl FromRequestParts<Arc<Admission>> for Keyed {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, admission: &Arc<Admission>) -> Answer<Self> {
        let header = parts.headers.get(AUTHORIZATION).map(|h| h.as_bytes());
        Ok(Self(auth::authenticate(&admission.fleet.records(), header, &parts.extensions)?))
    }
}

/// The session that the path names.
#[derive(Clone, Copy, Debug)]
struct Named(SessionId);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(session) = path.map_err(|e| FieldError::new("session", e.body_text()))?;
        Ok(Self(session_id(&session)?))
    }
}

async fn create(
    State(admission): State<Arc<Admission>>,
    Keyed(caller): Keyed,
    headers: HeaderMap,
    body: Body,
) -> Answer<Response> {
    let request = create_body(&headers, body).await?;
    let session = Session::from(admission.create(&caller, &request).await?);
    let location = format!("/v1/sessions/{}", session.session);
    Ok((StatusCode::CREATED, [(LOCATION, location)], axum::Json(session)).into_response())
}

async fn list(
    State(admission): State<Arc<Admission>>,
    Keyed(caller): Keyed,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Answer<axum::Json<Listing>> {
    let Query(query) = query.map_err(|e| FieldError::new("", e.body_text()))?;
    let limit = limit(query.limit()?)?;
    admission.admit_question(&caller, Question::Look)?;
    let listing = admission.list(&caller.tenant, limit).await;
    Ok(axum::Json(listing.into()))
}

async fn explain(
    State(admission): State<Arc<Admission>>,
    Keyed(caller): Keyed,
    Named(session): Named,
) -> Answer<axum::Json<Explanation>> {
    Ok(axum::Json(admission.explain(&caller, session)?.into()))
}

async fn path(
    State(admission): State<Arc<Admission>>,
    Keyed(caller): Keyed,
    Named(session): Named,
) -> Answer<axum::Json<SessionPath>> {
    admission.admit_question(&caller, Question::Look)?;
    Ok(axum::Json(admission.path(&caller.tenant, session).await?.into()))
}

async fn remove(
    State(admission): State<Arc<Admission>>,
    Keyed(caller): Keyed,
    Named(session): Named,
) -> Answer<StatusCode> {
    admission.admit_question(&caller, Question::Delete)?;
    admission.delete(&caller.tenant, session).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], OPENAPI)
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
