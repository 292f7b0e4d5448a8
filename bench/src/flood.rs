//! A live call and new ones while forged handshakes pour in.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use antiphon_cli::fleet::{Fleet, Kind};
use antiphon_client::{Call, CallReport, ClientKey, Dial, Router, ScriptedCaller};
use antiphon_media::{
    script::Script,
    verify::{Report, Said, verify},
};
use antiphon_proto::v1::{Codec, Session};
use anyhow::{Context as _, ensure};
use quinn::udp::{Transmit, UdpSocketState};
use tokio::runtime;

use crate::{
    fleet::{REGION, application, request, with_fleet},
    machine::{Cpus, cpu_of_process, with_cpus},
    measure::median,
    report::{Goal, Row},
};

/// What a flood of forged Initials costs: relay, live call, other callers.
pub(crate) fn initials() -> anyhow::Result<Vec<Row>> {
    with_cpus(|cpus| {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(with_fleet(8, async |fleet| measure(fleet, cpus).await))
    })
}

async fn measure(fleet: &mut Fleet, cpus: Cpus) -> anyhow::Result<Vec<Row>> {
    let application = application(fleet)?;
    let mut pid_of = |kind| -> anyhow::Result<u32> {
        let process = fleet.process(kind, REGION, 0).context("the fleet is not complete")?;
        process.pid().context("a process has ended")
    };
    let (relay, worker) = (pid_of(Kind::Relay)?, pid_of(Kind::Worker)?);
    cpus.measure(relay)?;
    cpus.measure(worker)?;

    let (live, key) = ticket(&application).await?;
    let address: SocketAddr = live.relays.first().context("a ticket without a relay")?.address.parse()?;
    let call = Dial::new(&live)?.connect(&key).await.context("the live call")?;
    let flood = Flood::start(address, live.initial_connection_ids[0].to_vec())?;
    let before = [relay, worker].map(cpu_of_process);
    let began = Instant::now();

    let script = Script::bundled(5, call.sample_rate(), TURNS)?;
    let said = script.turns.iter().map(|turn| turn.pcm.clone()).collect();
    let mut caller = ScriptedCaller::new(said, call.sample_rate(), Duration::from_secs(20));
    let rate = call.sample_rate();
    let (report, newcomers) = beside_newcomers(call, &mut caller, &application).await?;
    let lasted = began.elapsed().as_secs_f64();
    let sent = flood.stop()? as f64;
    let after = [relay, worker].map(cpu_of_process);
    let heard = caller.into_outcome();
    let ended = heard.ended.iter().copied().map(Some).chain(std::iter::repeat(None));
    let said = script.turns.iter().zip(ended).map(|(turn, ended)| Said { pcm: &turn.pcm, code: turn.code, ended });
    let found = verify(&said.collect::<Vec<_>>(), &heard.recording, rate);
    ensure!(newcomers.handshakes.len() >= LEAST_NEWCOMERS, "only {} newcomers", newcomers.handshakes.len());
    let mut per_packet = Vec::new();
    for (before, after) in before.into_iter().zip(after) {
        per_packet.push((after? - before?).as_secs_f64() * 1e6 / sent);
    }
    Ok(rows(sent / lasted, (&report, &found), newcomers, &per_packet))
}

fn rows(rate: f64, (call, found): (&CallReport, &Report), newcomers: Newcomers, per_packet: &[f64]) -> Vec<Row> {
    for problem in found.all_problems() {
        eprintln!("  the live call: {problem}");
    }
    let lost = call.received.jitter.lost as f64;
    vec![
        Row::new("flood-initials", rate, "1/s").goal(Goal::AtLeast(RATE as f64 * 0.95)),
        Row::new("flood-frames-lost", lost, "frames").goal(Goal::AtMost(0.0)),
        Row::new("flood-words-wrong", found.all_problems().count() as f64, "answers").goal(Goal::AtMost(0.0)),
        Row::new("flood-handshakes-failed", newcomers.failed.into(), "calls").goal(Goal::AtMost(0.0)),
        Row::new("flood-handshake", median(newcomers.handshakes), "ms"),
        Row::new("flood-relay-cpu", per_packet[0], "µs/packet"),
        Row::new("flood-worker-cpu", per_packet[1], "µs/packet"),
    ]
}

/// Those who called during the flood.
#[derive(Debug, Default)]
struct Newcomers {
    /// Milliseconds.
    handshakes: Vec<f64>,
    failed: u32,
}

/// The live call to its end, and one newcomer after the other meanwhile.
async fn beside_newcomers(
    call: Call,
    caller: &mut ScriptedCaller,
    application: &Router,
) -> anyhow::Result<(CallReport, Newcomers)> {
    let mut newcomers = Newcomers::default();
    let coming = async {
        loop {
            match newcomer(application).await {
                Ok(handshake) => newcomers.handshakes.push(handshake.as_secs_f64() * 1e3),
                Err(error) => {
                    eprintln!("  a newcomer failed: {error:#}");
                    newcomers.failed += 1;
                }
            }
        }
    };
    let (report, outcome) = tokio::select! {
        done = call.run(caller) => done,
        () = coming => unreachable!("newcomers never end"),
    };
    outcome.context("the live call")?;
    Ok((report, newcomers))
}

async fn ticket(application: &Router) -> anyhow::Result<(Session, ClientKey)> {
    let key = ClientKey::generate()?;
    Ok((application.create(&request(&key, Codec::Opus)).await.context("ticket")?, key))
}

/// Somebody else calls and hangs up: how long the handshake took.
async fn newcomer(application: &Router) -> anyhow::Result<Duration> {
    tokio::time::sleep(BETWEEN_NEWCOMERS).await;
    let (session, key) = ticket(application).await?;
    let began = Instant::now();
    let call = Dial::new(&session)?.connect(&key).await?;
    let handshake = began.elapsed();
    drop(call);
    application.delete(&session.session).await?;
    Ok(handshake)
}

/// A thread that sends forged Initials at [`RATE`].
struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Flood {
    /// Half of them have the connection ID of an Initial that was genuine, the others connection IDs of nobody.
    fn start(relay: SocketAddr, genuine: Vec<u8>) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let state = UdpSocketState::new((&socket).into())?;
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), sent.clone());
        let thread = thread::spawn(move || {
            let mut train = vec![0; TRAIN * INITIAL_BYTES];
            let began = Instant::now();
            while !stopped.load(Relaxed) {
                let due = (began.elapsed().as_secs_f64() * RATE as f64) as u64;
                while count.load(Relaxed) < due {
                    let number = count.fetch_add(TRAIN as u64, Relaxed);
                    for (index, packet) in train.chunks_exact_mut(INITIAL_BYTES).enumerate() {
                        forge(packet, &genuine, number + index as u64);
                    }
                    let segment_size = Some(INITIAL_BYTES);
                    let transmit =
                        Transmit { destination: relay, ecn: None, contents: &train, segment_size, src_ip: None };
                    // No room: a train less, which the other figures do not depend on.
                    if state.try_send((&socket).into(), &transmit).is_err() {
                        count.fetch_sub(TRAIN as u64, Relaxed);
                        break;
                    }
                }
                // The pace: what is due by then goes in one go.
                thread::park_timeout(PAUSE);
            }
            Ok(())
        });
        Ok(Self { stop, sent, thread })
    }

    fn stop(self) -> anyhow::Result<u64> {
        self.stop.store(true, Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the flood ended by itself"))??;
        Ok(self.sent.load(Relaxed))
    }
}

/// A long header (RFC 9000, section 17.2.2) and nothing that anybody can decrypt.
fn forge(packet: &mut [u8], genuine: &[u8], number: u64) {
    packet[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, genuine.len() as u8]);
    let (id, rest) = packet[6..].split_at_mut(genuine.len());
    id.copy_from_slice(genuine);
    if number.is_multiple_of(2) {
        id[1..9].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    }
    // No source connection ID, no token, and the length of the rest.
    let length = (rest.len() - 4) as u16 | 0x4000;
    rest[..2].fill(0);
    rest[2..4].copy_from_slice(&length.to_be_bytes());
    rest[4..12].copy_from_slice(&number.to_be_bytes());
}

/// Initials a second.
const RATE: u32 = 100_000;
/// As large as a client's has to be.
const INITIAL_BYTES: usize = 1_200;
/// Initials that leave together.
const TRAIN: usize = 16;
const PAUSE: Duration = Duration::from_micros(500);
/// Of the live call: some twenty seconds.
const TURNS: usize = 3;
const BETWEEN_NEWCOMERS: Duration = Duration::from_millis(200);
const LEAST_NEWCOMERS: usize = 20;
