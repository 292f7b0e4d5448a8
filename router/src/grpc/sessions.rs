//! `Sessions`, for applications with an API key.

use std::sync::Arc;

use antiphon_proto::v1::{
    CreateSessionRequest, DeleteSessionRequest, DeleteSessionResponse, ExplainPathRequest, ExplainSessionRequest,
    Explanation, ListSessionsRequest, ListSessionsResponse, Session, SessionPath, sessions_server::Sessions,
};
use tonic::{Request, Response, Status, metadata::MetadataValue};

use crate::{
    admission::{Admission, Question},
    auth::{self, Caller},
    create::{limit, session_id},
    refusals::Failure,
};

#[derive(Clone, Debug)]
pub(super) struct Service(pub(super) Arc<Admission>);

impl Service {
    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, Failure> {
        let header = request.metadata().get("authorization");
        auth::authenticate(&self.0.fleet.records(), header.map(MetadataValue::as_bytes), request.extensions())
    }
}

#[tonic::async_trait]
impl Sessions for Service {
    async fn create_session(&self, request: Request<CreateSessionRequest>) -> Result<Response<Session>, Status> {
        let caller = self.caller(&request)?;
        let session = self.0.create(&caller, request.get_ref()).await?;
        Ok(Response::new(session))
    }

    async fn explain_session(&self, request: Request<ExplainSessionRequest>) -> Result<Response<Explanation>, Status> {
        let caller = self.caller(&request)?;
        let session = session_id(&request.get_ref().session)?;
        Ok(Response::new(self.0.explain(&caller, session)?))
    }

    async fn explain_path(&self, request: Request<ExplainPathRequest>) -> Result<Response<SessionPath>, Status> {
        let caller = self.caller(&request)?;
        let session = session_id(&request.get_ref().session)?;
        self.0.admit_question(&caller, Question::Look)?;
        Ok(Response::new(self.0.path(&caller.tenant, session).await?))
    }

    async fn delete_session(
        &self,
        request: Request<DeleteSessionRequest>,
    ) -> Result<Response<DeleteSessionResponse>, Status> {
        let caller = self.caller(&request)?;
        let session = session_id(&request.get_ref().session)?;
        self.0.admit_question(&caller, Question::Delete)?;
        self.0.delete(&caller.tenant, session).await?;
        Ok(Response::new(DeleteSessionResponse {}))
    }

    /// Who did not answer in time is named in the `antiphon-missing` metadata.
    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let caller = self.caller(&request)?;
        let limit = limit(request.get_ref().limit)?;
        self.0.admit_question(&caller, Question::Look)?;
        let listing = self.0.list(&caller.tenant, limit).await;
        let mut response = Response::new(ListSessionsResponse { sessions: listing.sessions });
        if !listing.missing.is_empty()
            && let Ok(missing) = listing.missing.join(",").parse()
        {
            response.metadata_mut().insert("antiphon-missing", missing);
        }
        Ok(response)
    }
}
