//! Session set-up on a path with delay, in round trips.

mod delay;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use antiphon_cli::fleet::Fleet;
use antiphon_client::{ClientKey, Dial};
use antiphon_proto::v1::Codec;
use antiphon_runtime::Tasks;
use anyhow::Context as _;
use tokio::runtime;

use crate::{
    fleet::{application_at, request, with_fleet},
    measure::median,
    report::{Goal, Row},
};

/// Round trips until a session is set up, from the request for a ticket on a warm connection.
pub(crate) fn round_trips() -> anyhow::Result<Vec<Row>> {
    let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(with_fleet(4, async |fleet| measure(fleet).await))
}

async fn measure(fleet: &Fleet) -> anyhow::Result<Vec<Row>> {
    let tasks = Tasks::new();
    let delayed = delay::tcp(fleet.context().routers[0].public.parse()?, ONE_WAY, &tasks).await?;
    let client = application_at(fleet, &delayed.to_string())?;
    let (mut tickets, mut speaking, mut confirmed) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=2 * ROUNDS {
        let key = ClientKey::generate()?;
        let begin = Instant::now();
        let mut session = client.create(&request(&key, Codec::Opus)).await.context("ticket")?;
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

/// One way.
const ONE_WAY: Duration = Duration::from_millis(50);

const ROUNDS: usize = 9;
