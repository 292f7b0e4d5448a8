//! A whole fleet of one region, as `antiphon up` runs it.

use std::time::Duration;

use antiphon_cli::fleet::{Fleet, Options};
use antiphon_client::{ClientKey, Router, SessionRequest};
use antiphon_core::id::{Epoch, SessionId};
use antiphon_crds::{compile, manifest};
use antiphon_proto::v1::Codec;

/// Name of the region.
pub(crate) const REGION: &str = "bench";

/// Starts router, relay and worker, runs `work` with them and stops them.
pub(crate) async fn with_fleet<T>(
    slots: u32,
    work: impl AsyncFnOnce(&mut Fleet) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let dir = tempfile::tempdir()?;
    let plan = compile::compile(&manifest::parse(&[("bench.yaml", &manifest_of(slots))])?)?;
    let options = Options { dir: dir.path().to_owned(), stop_deadline: Duration::from_secs(1), tenant: "bench".into() };
    let mut fleet = Fleet::start(plan, options, &|_| ()).await?;
    let done = work(&mut fleet).await;
    fleet.stop().await;
    done
}

/// An application of the fleet.
pub(crate) fn application(fleet: &Fleet) -> anyhow::Result<Router> {
    application_at(fleet, &fleet.context().routers[0].public)
}

/// The same, with its router behind another address.
pub(crate) fn application_at(fleet: &Fleet, address: &str) -> anyhow::Result<Router> {
    let context = fleet.context();
    let api_key = context.api_key()?;
    Ok(Router::new(address, &context.ca_pem, &context.routers[0].server_name, api_key.text())?)
}

/// What a caller of the fleet's agent asks for.
pub(crate) fn request(key: &ClientKey, codec: Codec) -> SessionRequest {
    SessionRequest {
        agent: "default/echo".into(),
        location: Some((52.5, 13.4)),
        client_key: key.public(),
        codec,
        regions: Vec::new(),
        max_rtt_ms: 0,
        session: SessionId::from_bytes(rand::random()),
        epoch: Epoch::FIRST,
    }
}

fn manifest_of(slots: u32) -> String {
    format!(
        "
apiVersion: antiphon.dev/v1alpha1
kind: VoiceRegion
metadata: {{name: {REGION}, namespace: antiphon-system}}
spec:
  number: 7
  cluster: here
  cloud: bench
  location: {{latitude: 52.5, longitude: 13.4}}
  relay: {{replicas: 1}}
---
apiVersion: antiphon.dev/v1alpha1
kind: VoiceAgent
metadata: {{name: echo, namespace: default}}
spec:
  engine: {{type: Echo}}
  regions:
    - {{name: {REGION}, minReplicas: 1, maxReplicas: 1}}
  sessions: {{slotsPerWorker: {slots}}}
"
    )
}
