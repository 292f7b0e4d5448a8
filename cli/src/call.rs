//! `antiphon call`: one call, paced in real time, then its timeline.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use antiphon_client::ClockSkew;
use antiphon_core::id::SessionId;
use antiphon_media::{
    engine::opening_code,
    resample,
    script::{Script, ScriptTurn},
    speech::Utterance,
    verify, wav,
};
use antiphon_proto::v1::Codec;
use antiphon_runtime::shutdown;
use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tokio::{sync::oneshot, time::timeout};

use crate::present::out;
use crate::{
    args::{CallArgs, CodecArg},
    caller::{self, Called, Stage, Wanted},
    fleet::Context,
    present::{self, Progress, duration},
};

pub(crate) async fn run(args: &CallArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let context = Context::load(dir)?;
    let router = context.nearest(args.from).context("the fleet has no router")?;
    let client = context.client(router, args.api_key.as_deref())?;
    let agent = if args.agent.contains('/') { args.agent.clone() } else { format!("default/{}", args.agent) };
    let (codec, rate) = match args.codec {
        CodecArg::Opus => (Codec::Opus, 16_000),
        CodecArg::L1616k => (Codec::L1616k, 16_000),
        CodecArg::L1624k => (Codec::L1624k, 24_000),
    };
    if let Some(save) = &args.save {
        writable("--save", save)?;
    }
    if let Some(qlog) = &args.qlog {
        writable("--qlog", qlog)?;
    }
    let wanted = Wanted {
        agent,
        location: args.from,
        codec,
        regions: args.region.clone(),
        turns: turns(&args.wav, rate)?,
        patience: args.patience,
        session: SessionId::from_bytes(rand::random()),
        qlog: args.qlog.clone(),
    };
    let progress = Progress::new(json);
    let called = with_progress(&client, &wanted, &progress).await;
    progress.clear();
    let Some(called) = called? else { return Ok(ExitCode::from(INTERRUPTED)) };
    if let Some(save) = &args.save {
        let bytes = wav::write(&called.heard.recording, called.rate);
        fs::write(save, bytes).with_context(|| save.display().to_string())?;
    }
    let found = called.verify(&wanted.turns);
    if json {
        out!("{}", serde_json::to_string_pretty(&as_json(&called, &found, args.save.as_deref()))?);
    } else {
        print_timeline(&called, &found, args.save.as_deref());
    }
    let answered = called.broken.is_none() && called.heard.unanswered == 0;
    if let Some(broken) = &called.broken {
        present::error(&anyhow::anyhow!("{broken}"));
    }
    Ok(if answered { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn with_progress(
    client: &antiphon_client::Router,
    wanted: &Wanted,
    progress: &Progress,
) -> anyhow::Result<Option<Called>> {
    let stage = Stage::default();
    let mut signal = std::pin::pin!(shutdown::signal()?);
    let (steer, mut steered) = oneshot::channel();
    let call = caller::call(client, wanted, &stage, Some(steer));
    let mut call = std::pin::pin!(call);
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    let started = tokio::time::Instant::now();
    loop {
        tokio::select! {
            called = &mut call => return Ok(Some(called?)),
            () = &mut signal => match steered.try_recv() {
                // The caller hangs up; what was heard so far is saved and shown.
                Ok(handle) => {
                    handle.hang_up();
                    return Ok(Some(call.await?));
                }
                // Nothing is heard yet: the reservation, if there is one, is given back.
                Err(_) => {
                    let _ = timeout(GIVE_BACK, client.delete(&wanted.session.to_string())).await;
                    return Ok(None);
                }
            },
            _ = ticks.tick() => {
                let total = wanted.turns.len();
                let doing = match stage.value() {
                    0 => "asking for a ticket".to_owned(),
                    1 => "connecting".to_owned(),
                    n => format!("turn {} of {total}", (n - 1).min(total)),
                };
                progress.say(format!("{}: {doing}  {:.1} s", wanted.agent, started.elapsed().as_secs_f64()));
            }
        }
    }
}

/// One turn per file, each as it is; the built-in sentence with a code in front when there is none.
fn turns(files: &[PathBuf], rate: u32) -> anyhow::Result<Vec<ScriptTurn>> {
    if files.is_empty() {
        let words = resample::convert(&Utterance::ALL[0].pcm(), antiphon_media::speech::RATE, rate)?;
        return Ok(Script::new(rand::random(), rate, [words.as_slice()]).turns);
    }
    files.iter().map(|file| turn(file, rate).with_context(|| file.display().to_string())).collect()
}

fn turn(file: &Path, rate: u32) -> anyhow::Result<ScriptTurn> {
    let read = wav::read(&fs::read(file)?)?;
    let pcm = resample::convert(&read.pcm, read.rate, rate)?;
    ensure!(!antiphon_media::levels::is_silent(&pcm), "nothing is said in it: it is silent");
    let longest = LONGEST_TURN.as_secs() * u64::from(rate);
    ensure!(pcm.len() as u64 <= longest, "longer than {LONGEST_TURN:?}: cut it into several files, one per turn");
    let code = opening_code(&pcm, rate);
    Ok(ScriptTurn { code, pcm })
}

/// Found out before the call, not after it.
fn writable(flag: &str, path: &Path) -> anyhow::Result<()> {
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("{flag} {}", path.display()))?;
    Ok(())
}

fn print_timeline(called: &Called, found: &verify::Report, saved: Option<&Path>) {
    let (session, report) = (&called.session, &called.report);
    out!("session      {}", session.session);
    out!("placed       {}/{}: {}", session.region, session.worker, session.reason);
    out!("ticket       {}", duration(called.ticket));
    if let Some(clock) = called.clock.filter(|clock| clock.is_notable()) {
        out!("clock        {clock}: set one of them right");
    }
    out!("handshake    {} (attempt {})", duration(report.handshake), report.attempts);
    out!("active       {}", duration(report.activated));
    if let Some(first) = report.first_audio {
        out!("first audio  {} (the caller's own turn included)", duration(first));
    }
    out!("lasted       {}", duration(report.ended));
    out!();
    let rows = found.turns.iter().map(|turn| {
        let receipt = turn.receipt.map_or("none".into(), |r| format!("{:08x} by {:04x}", r.chain, r.nonce));
        let delay = turn.response_delay.map_or("-".into(), duration);
        let problems: Vec<_> = turn.problems.iter().map(ToString::to_string).collect();
        let verdict = if problems.is_empty() { "own words".into() } else { problems.join("; ") };
        let similarity = format!("{:.2}", turn.similarity);
        vec![turn.turn.to_string(), delay, receipt, similarity, duration(turn.longest_silence), verdict]
    });
    let header = ["TURN", "ANSWERED AFTER", "RECEIPT", "LIKENESS", "LONGEST PAUSE", "ANSWER"];
    present::print(&present::table(&header, &[0, 1, 3, 4], rows));
    out!();
    let jitter = report.received.jitter;
    out!(
        "network      loss {:.2} %, concealed {} frames, jitter {}, buffer {}, round trip {}",
        called.loss() * 100.0,
        jitter.concealed,
        duration(jitter.jitter),
        duration(jitter.delay),
        duration(report.rtt)
    );
    for switch in &report.switches {
        let gap = switch.gap.map_or("nothing heard since".into(), |gap| format!("quiet for {}", duration(gap)));
        let relay = |index: usize| session.relays.get(index).map_or(0, |relay| relay.number);
        let (from, to) = (relay(switch.switch.from), relay(switch.switch.to));
        out!("relay        {from} -> {to} at {}: {:?}, {gap}", duration(switch.at), switch.switch.reason);
    }
    if let Some(saved) = saved {
        out!("saved        {}", saved.display());
    }
}

fn as_json(called: &Called, found: &verify::Report, saved: Option<&Path>) -> Value {
    let (session, report) = (&called.session, &called.report);
    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    let turns: Vec<_> = found
        .turns
        .iter()
        .map(|turn| {
            json!({
                "turn": turn.turn,
                "responseDelayMs": turn.response_delay.map(ms),
                "chain": turn.receipt.map(|r| format!("{:08x}", r.chain)),
                "process": turn.receipt.map(|r| format!("{:04x}", r.nonce)),
                "epoch": turn.receipt.map(|r| r.epoch),
                "similarity": turn.similarity,
                "longestSilenceMs": ms(turn.longest_silence),
                "problems": turn.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
            })
        })
        .collect();
    let jitter = report.received.jitter;
    json!({
        "session": session.session,
        "region": session.region,
        "worker": session.worker,
        "reason": session.reason,
        "ticketMs": ms(called.ticket),
        "clockAheadOfRouterMs": called.clock.map(ClockSkew::ahead_ms),
        "handshakeMs": ms(report.handshake),
        "attempts": report.attempts,
        "activatedMs": ms(report.activated),
        "firstAudioMs": report.first_audio.map(ms),
        "lastedMs": ms(report.ended),
        "turns": turns,
        "loss": called.loss(),
        "concealedFrames": jitter.concealed,
        "jitterMs": ms(jitter.jitter),
        "rttMs": ms(report.rtt),
        "relaySwitches": report.switches.len(),
        "error": called.broken.as_ref().map(ToString::to_string),
        "saved": saved.map(|path| path.display().to_string()),
    })
}

/// As shells report a command that Ctrl-C ended.
const INTERRUPTED: u8 = 130;
const GIVE_BACK: Duration = Duration::from_secs(2);
const LONGEST_TURN: Duration = Duration::from_secs(55);
