//! What tests put in the place of a fleet's routers. The real ones are met in `tests/it`; what these are for is who is
//! told what, and what is made of the answers.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use antiphon_proto::v1::{
    ApplyRequest, ApplyResponse, FleetStatusRequest, FleetStatusResponse, KeyRecord, ListKeysRequest, ListKeysResponse,
    RegionDigest, RegionStatus, ReportRelayGoneRequest, ReportRelayGoneResponse, ReportWorkerGoneRequest,
    ReportWorkerGoneResponse, SetWorkerPhaseRequest, SetWorkerPhaseResponse, WatchFleetRequest,
    admin_server::{Admin, AdminServer},
};
use antiphon_runtime::{
    pki::{FleetCa, PeerName, Role, shared_dns},
    tls,
};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, transport::Server};

use crate::fleet::{Context, RouterContext};

/// Keeps what it is told as a router does, without its checks; a region of one router, which is ready at once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    keys: BTreeMap<String, KeyRecord>,
    wanted: u32,
    /// Looks at the status since the last generation was wanted; each brings it a step further.
    looks: u32,
    /// Never gets further than having loaded it.
    stuck: bool,
    /// Was not given its fleet yet.
    without_record: bool,
}

#[tonic::async_trait]
impl Admin for Told {
    type WatchFleetStream = tonic::codegen::BoxStream<FleetStatusResponse>;

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let change = request.into_inner();
        if change.keys.iter().any(|key| key.tenant == "refused") {
            return Err(Status::invalid_argument("no such tenant"));
        }
        let mut kept = self.0.lock();
        kept.keys.extend(change.keys.into_iter().map(|key| (key.id.clone(), key)));
        kept.keys.retain(|id, _| !change.removed_keys.contains(id));
        if change.key_generation > kept.wanted {
            (kept.wanted, kept.looks) = (change.key_generation, 0);
        }
        Ok(Response::new(ApplyResponse::default()))
    }

    async fn list_keys(&self, _: Request<ListKeysRequest>) -> Result<Response<ListKeysResponse>, Status> {
        Ok(Response::new(ListKeysResponse { keys: self.keys() }))
    }

    async fn fleet_status(&self, _: Request<FleetStatusRequest>) -> Result<Response<FleetStatusResponse>, Status> {
        let mut kept = self.0.lock();
        if kept.without_record {
            return Ok(Response::new(FleetStatusResponse::default()));
        }
        kept.looks += 1;
        let wanted = kept.wanted.max(1);
        let behind = if kept.wanted > 1 && (kept.looks < 3 || kept.stuck) { wanted - 1 } else { wanted };
        let digest = RegionDigest {
            region: "region-0".into(),
            number: 7,
            wanted_generation: kept.wanted,
            loaded_generations: (behind..=wanted).collect(),
            minting_generation: behind,
            oldest_generation: behind,
            ..RegionDigest::default()
        };
        let held_up = if behind < wanted { vec!["worker desk-0: has not loaded it".into()] } else { Vec::new() };
        Ok(Response::new(FleetStatusResponse {
            regions: vec![RegionStatus { digest: Some(digest), local: true, ..RegionStatus::default() }],
            rotation_held_up_by: held_up,
            ..FleetStatusResponse::default()
        }))
    }

    async fn watch_fleet(&self, _: Request<WatchFleetRequest>) -> Result<Response<Self::WatchFleetStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn set_worker_phase(
        &self,
        _: Request<SetWorkerPhaseRequest>,
    ) -> Result<Response<SetWorkerPhaseResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn report_worker_gone(
        &self,
        _: Request<ReportWorkerGoneRequest>,
    ) -> Result<Response<ReportWorkerGoneResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn report_relay_gone(
        &self,
        _: Request<ReportRelayGoneRequest>,
    ) -> Result<Response<ReportRelayGoneResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}

impl Told {
    pub(crate) fn stuck() -> Self {
        let told = Self::default();
        told.0.lock().stuck = true;
        told
    }

    pub(crate) fn without_record() -> Self {
        let told = Self::default();
        told.0.lock().without_record = true;
        told
    }

    pub(crate) fn keys(&self) -> Vec<KeyRecord> {
        self.0.lock().keys.values().cloned().collect()
    }

    pub(crate) fn ids(&self) -> Vec<String> {
        self.0.lock().keys.keys().cloned().collect()
    }

    pub(crate) fn wanted(&self) -> u32 {
        self.0.lock().wanted
    }
}

/// A fleet of one router per address, and an operator who may talk to them.
pub(crate) fn context(dir: &TempDir, ca: &FleetCa, addresses: &[String]) -> Context {
    let operator = PeerName::new("operator", Role::Operator, "local").unwrap();
    let identity = dir.path().join("operator");
    ca.issue(&operator, &[], SystemTime::now()).unwrap().save(&identity).unwrap();
    let router = |(index, address): (usize, &String)| RouterContext {
        region: format!("region-{index}"),
        public: address.clone(),
        internal: address.clone(),
        server_name: shared_dns(Role::Router, &format!("region-{index}")),
        latitude: 0.0,
        longitude: 0.0,
    };
    Context {
        routers: addresses.iter().enumerate().map(router).collect(),
        ca_pem: ca.certificate_pem().to_owned(),
        operator_identity: identity,
        api_key_file: dir.path().join("api-key"),
    }
}

/// Runs `body` against the router of `region-0`, over mTLS as in a fleet.
pub(crate) async fn with_router<F: Future>(ca: &FleetCa, told: Told, body: impl FnOnce(String) -> F) -> F::Output {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let name = PeerName::new("router-0", Role::Router, "region-0").unwrap();
    let identity = ca.issue(&name, &[], SystemTime::now()).unwrap();
    let incoming = tls::incoming(listener, &identity).unwrap();
    tokio::select! {
        served = Server::builder().add_service(AdminServer::new(told)).serve_with_incoming(incoming) => {
            panic!("the server ended: {served:?}")
        }
        output = body(address) => output,
    }
}

/// Privileged, and nothing has listened there for decades (tcpmux, RFC 1078).
pub(crate) const NOBODY: &str = "127.0.0.1:1";
