//! Session set-up on a path with delay, in round trips.

mod delay;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use antiphon_cli::fleet::{Fleet, Options};
use antiphon_client::{ClientKey, Dial, Router, SessionRequest};
use antiphon_core::id::{Epoch, SessionId};
use antiphon_crds::{compile, manifest};
use antiphon_proto::v1::Codec;
use antiphon_runtime::Tasks;
use anyhow::Context as _;
use tokio::runtime;

use crate::{
    measure::median,
    report::{Goal, Row},
};

/// Round trips until a session is set up, from the request for a ticket on a warm connection.
pub(crate) fn round_trips() -> anyhow::Result<Vec<Row>> {
    let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let dir = tempfile::tempdir()?;
        let plan = compile::compile(&manifest::parse(&[("bench.yaml", MANIFEST)])?)?;
        let stop_deadline = Duration::from_secs(1);
        let options = Options { dir: dir.path().to_owned(), stop_deadline, tenant: "bench".into() };
        let fleet = Fleet::start(plan, options, &|_| ()).await?;
        let measured = measure(&fleet).await;
        fleet.stop().await;
        measured
    })
}

async fn measure(fleet: &Fleet) -> anyhow::Result<Vec<Row>> {
    let tasks = Tasks::new();
    let context = fleet.context();
    let router = &context.routers[0];
    let delayed = delay::tcp(router.public.parse()?, ONE_WAY, &tasks).await?;
    let api_key = context.api_key()?;
    let client = Router::new(&delayed.to_string(), &context.ca_pem, &router.server_name, api_key.text())?;
    let (mut tickets, mut speaking, mut confirmed) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=2 * ROUNDS {
        let key = ClientKey::generate()?;
        let begin = Instant::now();
        let mut session = client.create(&request(&key)).await.context("ticket")?;
        let ticket = begin.elapsed();
        session.relays.truncate(1);
        let relay: SocketAddr = session.relays[0].address.parse()?;
        // Laying the line is not what is measured.
        let line = delay::udp(relay, ONE_WAY, &tasks).await?;
        session.relays[0].address = line.to_string();
        let (dial, dialled) = (Dial::new(&session)?, Instant::now());
        let confirms = round % 2 == 1;
        let call = if confirms { dial.connect(&key).await? } else { dial.begin(&key).await? };
        let whole = (ticket + dialled.elapsed()).as_secs_f64();
        drop(call);
        client.delete(&session.session).await?;
        // The first request makes the connection.
        if round > 0 {
            tickets.push(ticket.as_secs_f64());
            if confirms { &mut confirmed } else { &mut speaking }.push(whole);
        }
    }
    tasks.stopping().cancel();
    let round_trip = 2.0 * ONE_WAY.as_secs_f64();
    let trips = |seconds| median(seconds) / round_trip;
    Ok(vec![
        Row::new("setup-ticket", trips(tickets), "round trips"),
        // A tenth of a round trip for everything that is not the path: 10 ms here.
        Row::new("setup", trips(speaking), "round trips").goal(Goal::AtMost(2.1)),
        Row::new("setup-confirmed", trips(confirmed), "round trips"),
    ])
}

fn request(key: &ClientKey) -> SessionRequest {
    SessionRequest {
        agent: "default/echo".into(),
        location: Some((52.5, 13.4)),
        client_key: key.public(),
        codec: Codec::Opus,
        regions: Vec::new(),
        max_rtt_ms: 0,
        session: SessionId::from_bytes(rand::random()),
        epoch: Epoch::FIRST,
    }
}

/// One way.
const ONE_WAY: Duration = Duration::from_millis(50);

const ROUNDS: usize = 9;

const MANIFEST: &str = "
apiVersion: antiphon.dev/v1alpha1
kind: VoiceRegion
metadata: {name: bench, namespace: antiphon-system}
spec:
  number: 7
  cluster: here
  cloud: bench
  location: {latitude: 52.5, longitude: 13.4}
  relay: {replicas: 1}
---
apiVersion: antiphon.dev/v1alpha1
kind: VoiceAgent
metadata: {name: echo, namespace: default}
spec:
  engine: {type: Echo}
  regions:
    - {name: bench, minReplicas: 1, maxReplicas: 1}
  sessions: {slotsPerWorker: 4}
";
