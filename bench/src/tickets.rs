//! Tickets per second over gRPC: a router on one CPU; applications and workers on the other.

mod etcd;
pub(crate) mod region;
mod workers;

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use antiphon_proto::{
    api_key::ApiKey,
    ticket,
    v1::{self, admin_client::AdminClient, sessions_client::SessionsClient},
};
use antiphon_runtime::{Tasks, pki::Role, tls};
use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures::future::try_join_all;
use tokio::{
    runtime,
    time::{interval, timeout},
};
use tonic::{Request, transport::Channel};

use crate::{
    machine::{cpu_of_process, with_cpus},
    measure::{median, quantile},
    report::{Goal, Row},
};
use etcd::Etcd;
use region::{AGENT, REGION, Router, identity};

/// Tickets per second, their 99th percentile, and the router's CPU time for one: with the records in memory, then in
/// etcd.
pub(crate) fn rate() -> anyhow::Result<Vec<Row>> {
    with_cpus(|cpus| {
        let mut rows = of(&Router::start(cpus, None)?, "tickets")?;
        match Etcd::start() {
            Ok(etcd) => {
                rows.extend(of(&Router::start(cpus, Some(&etcd))?, "tickets-etcd")?);
            }
            Err(error) => eprintln!("  no etcd, no figures with it: {error:#}"),
        }
        Ok(rows)
    })
}

fn of(router: &Router, name: &str) -> anyhow::Result<Vec<Row>> {
    // Its threads inherit this thread's CPU.
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(measure(router, name))
}

async fn measure(router: &Router, name: &str) -> anyhow::Result<Vec<Row>> {
    let tasks = Tasks::new();
    let key = ApiKey::from_random(&[9; ApiKey::RANDOM]);
    let mut operator = AdminClient::new(internal(router, "bench", Role::Operator)?);
    timeout(PATIENCE, applied(&mut operator, &records(router, &key))).await.context("applying records")?;
    for n in 0..WORKERS {
        workers::start(&format!("w-{n}"), router, &tasks).await?;
    }
    timeout(PATIENCE, placeable(&mut operator)).await.context("workers do not get into placement")??;
    let ca = identity("bench", Role::Operator)?;
    let mut lanes = Vec::new();
    for _ in 0..CONNECTIONS {
        let name = antiphon_runtime::pki::shared_dns(Role::Router, REGION);
        let channel = tls::public_channel(&router.public.to_string(), ca.ca_pem(), &name)?;
        lanes.extend(std::iter::repeat_n(SessionsClient::new(channel), IN_FLIGHT / CONNECTIONS));
    }
    window(&lanes, &key, WARM_UP).await?;
    let (mut rates, mut tails, mut costs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..WINDOWS {
        let (before, begin) = (cpu_of_process(router.pid())?, Instant::now());
        let mut latencies = window(&lanes, &key, WINDOW).await?;
        let tickets = latencies.len() as f64;
        rates.push(tickets / begin.elapsed().as_secs_f64());
        costs.push((cpu_of_process(router.pid())? - before).as_secs_f64() * 1e6 / tickets);
        tails.push(quantile(&mut latencies, 0.99));
    }
    tasks.stopping().cancel();
    Ok(vec![
        Row::new(name, median(rates), "1/s").goal(Goal::AtLeast(5000.0)),
        Row::new(format!("{name}-p99"), median(tails), "ms").goal(Goal::AtMost(5.0)),
        Row::new(format!("{name}-router-cpu"), median(costs), "µs/ticket"),
    ])
}

/// Each lane asks for one session after the other: milliseconds of every ticket.
async fn window(lanes: &[SessionsClient<Channel>], key: &ApiKey, length: Duration) -> anyhow::Result<Vec<f64>> {
    let end = Instant::now() + length;
    let client_key = Bytes::copy_from_slice(&ticket::public_key(&[5; 32]));
    let lane = |mut sessions: SessionsClient<Channel>| {
        let client_key = client_key.clone();
        async move {
            let mut latencies = Vec::new();
            while Instant::now() < end {
                let begin = Instant::now();
                let session = sessions.create_session(request(key, client_key.clone())?).await?.into_inner();
                latencies.push(begin.elapsed().as_secs_f64() * 1e3);
                ensure!(!session.ticket.is_empty(), "a session without a ticket");
            }
            Ok(latencies)
        }
    };
    Ok(try_join_all(lanes.iter().cloned().map(lane)).await?.concat())
}

fn request(key: &ApiKey, client_key: Bytes) -> anyhow::Result<Request<v1::CreateSessionRequest>> {
    let mut request = Request::new(v1::CreateSessionRequest {
        agent: AGENT.into(),
        client_key,
        location: Some(v1::Location { latitude: 48.86, longitude: 2.35 }),
        ..v1::CreateSessionRequest::default()
    });
    request.metadata_mut().insert("authorization", format!("Bearer {}", key.text()).parse()?);
    Ok(request)
}

/// A store that is not connected yet takes no records.
async fn applied(operator: &mut AdminClient<Channel>, records: &v1::ApplyRequest) {
    let mut tick = interval(Duration::from_millis(50));
    loop {
        tick.tick().await;
        match operator.apply(records.clone()).await {
            Ok(_) => return,
            Err(error) => eprintln!("  records: {}", error.message()),
        }
    }
}

async fn placeable(operator: &mut AdminClient<Channel>) -> anyhow::Result<()> {
    let mut tick = interval(Duration::from_millis(50));
    loop {
        tick.tick().await;
        let status = operator.fleet_status(v1::FleetStatusRequest {}).await?.into_inner();
        let workers = status.regions.iter().flat_map(|region| &region.workers);
        if workers.filter(|worker| worker.placeable).count() == WORKERS {
            return Ok(());
        }
    }
}

/// The region, an agent and an application's key.
fn records(router: &Router, key: &ApiKey) -> v1::ApplyRequest {
    let region = v1::RegionRecord {
        name: REGION.into(),
        number: 1,
        cloud: "bench".into(),
        location: Some(v1::Location { latitude: 50.11, longitude: 8.68 }),
        phase: v1::Phase::Active.into(),
        residency: vec![],
        router_address: router.internal.to_string(),
        ..v1::RegionRecord::default()
    };
    let agent = v1::AgentRecord {
        behaviour: Some(v1::AgentBehaviour {
            agent: AGENT.into(),
            revision: "r1".into(),
            engine: "echo".into(),
            ..v1::AgentBehaviour::default()
        }),
        regions: vec![v1::AgentRegion { region: REGION.into(), weight: 100 }],
        ..v1::AgentRecord::default()
    };
    let key = v1::KeyRecord {
        id: key.id().to_owned(),
        sha256: key.sha256().to_vec().into(),
        tenant: "bench".into(),
        agents: vec![],
        tickets_per_minute: u32::MAX,
    };
    v1::ApplyRequest { regions: vec![region], agents: vec![agent], keys: vec![key], ..v1::ApplyRequest::default() }
}

/// A channel to the router's internal port as somebody.
fn internal(router: &Router, name: &str, role: Role) -> anyhow::Result<Channel> {
    Ok(tls::channel(&router.internal.to_string(), &identity(name, role)?, Role::Router, REGION)?)
}

fn any_port() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

const WORKERS: usize = 4;
const CONNECTIONS: usize = 4;
const IN_FLIGHT: usize = 16;
const WARM_UP: Duration = Duration::from_secs(1);
const WINDOWS: usize = 7;
const WINDOW: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(10);
