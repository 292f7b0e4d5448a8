//! `Admin`, for operators.

use std::sync::Arc;

use antiphon_proto::v1::{
    ApplyRequest, ApplyResponse, FleetStatusRequest, FleetStatusResponse, KeyRecord, ListKeysRequest, ListKeysResponse,
    ReportRelayGoneRequest, ReportRelayGoneResponse, ReportWorkerGoneRequest, ReportWorkerGoneResponse,
    SetWorkerPhaseRequest, SetWorkerPhaseResponse, WatchFleetRequest, admin_server::Admin,
};
use antiphon_runtime::pki::Role;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::watch;
use crate::{admission::Admission, auth, field::FieldError, fleet::SetPhase};

#[derive(Clone, Debug)]
pub(super) struct Service(pub(super) Arc<Admission>);

#[tonic::async_trait]
impl Admin for Service {
    type WatchFleetStream = ReceiverStream<Result<FleetStatusResponse, Status>>;

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let operator = auth::peer(&request, Role::Operator, None)?;
        let change = request.into_inner();
        if change.minting_generation != 0 {
            return Err(FieldError::new("mintingGeneration", "is for routers to write").into());
        }
        let users = self.0.fleet.too_early_for(change.key_generation);
        if !users.is_empty() {
            let text = format!("key generation {} would be one too many: {}", change.key_generation, users.join("; "));
            return Err(Status::failed_precondition(text));
        }
        self.0.fleet.store.apply(&change).await?;
        // Who asks next has to see it, whether or not the watch was faster.
        let records = Arc::clone(&self.0.fleet.store.watch().borrow());
        self.0.fleet.records_changed(records);
        tracing::info!(
            by = operator.name,
            regions = change.regions.len(),
            agents = change.agents.len(),
            keys = change.keys.len(),
            "records applied"
        );
        Ok(Response::new(ApplyResponse { records_hash: self.0.fleet.records_hash() }))
    }

    async fn list_keys(&self, request: Request<ListKeysRequest>) -> Result<Response<ListKeysResponse>, Status> {
        auth::peer(&request, Role::Operator, None)?;
        let records = self.0.fleet.records();
        let keys = records.keys.iter().map(|(id, key)| KeyRecord {
            id: id.clone(),
            sha256: key.sha256.to_vec().into(),
            tenant: key.tenant.clone(),
            agents: key.agents.clone(),
            tickets_per_minute: key.tickets_per_minute,
        });
        Ok(Response::new(ListKeysResponse { keys: keys.collect() }))
    }

    async fn fleet_status(
        &self,
        request: Request<FleetStatusRequest>,
    ) -> Result<Response<FleetStatusResponse>, Status> {
        auth::peer(&request, Role::Operator, None)?;
        Ok(Response::new(self.0.fleet.status()))
    }

    async fn watch_fleet(
        &self,
        request: Request<WatchFleetRequest>,
    ) -> Result<Response<Self::WatchFleetStream>, Status> {
        auth::peer(&request, Role::Operator, None)?;
        let (listener, stream) = mpsc::channel(1);
        let (fleet, stopping) = (Arc::clone(&self.0.fleet), self.0.tasks.stopping());
        self.0.tasks.spawn("fleet watch", async move {
            stopping.run_until_cancelled(watch::tell(fleet, listener)).await;
            Ok(())
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn set_worker_phase(
        &self,
        request: Request<SetWorkerPhaseRequest>,
    ) -> Result<Response<SetWorkerPhaseResponse>, Status> {
        auth::peer(&request, Role::Operator, None)?;
        let asked = SetPhase::check(request.into_inner())?;
        Ok(Response::new(self.0.fleet.set_worker_phase(asked)))
    }

    async fn report_worker_gone(
        &self,
        request: Request<ReportWorkerGoneRequest>,
    ) -> Result<Response<ReportWorkerGoneResponse>, Status> {
        let operator = auth::peer(&request, Role::Operator, None)?;
        let ReportWorkerGoneRequest { name, incarnation } = request.into_inner();
        let known = self.0.fleet.worker_reported_gone(&name, incarnation).await;
        tracing::info!(by = operator.name, worker = name, known, "worker reported gone");
        Ok(Response::new(ReportWorkerGoneResponse { known }))
    }

    async fn report_relay_gone(
        &self,
        request: Request<ReportRelayGoneRequest>,
    ) -> Result<Response<ReportRelayGoneResponse>, Status> {
        let operator = auth::peer(&request, Role::Operator, None)?;
        let name = request.into_inner().name;
        let known = self.0.fleet.relay_reported_gone(&name).await;
        tracing::info!(by = operator.name, relay = name, known, "relay reported gone");
        Ok(Response::new(ReportRelayGoneResponse { known }))
    }
}
