//! `antiphon call`: one call, paced in real time, then its timeline.

mod failure;
mod timeline;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use antiphon_core::id::SessionId;
use antiphon_media::{
    engine::opening_code,
    resample,
    script::{Script, ScriptTurn},
    speech::Utterance,
    wav,
};
use antiphon_proto::v1::Codec;
use antiphon_runtime::shutdown;
use anyhow::{Context as _, ensure};
use tokio::{sync::oneshot, time::timeout};

use crate::present::out;
use crate::{
    Interrupted,
    args::{CallArgs, CodecArg},
    caller::{self, Called, Stage, Wanted},
    fleet::Context,
    present::{self, Progress},
    status, words,
};
use timeline::Timeline;

pub(crate) async fn run(args: &CallArgs, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let context = Context::load(dir)?;
    let router = context.nearest(args.from).context("the fleet has no router")?;
    let client = context.client(router, args.key.given().as_deref())?;
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
    let (called, interrupted) = match called {
        Ok(called) => called,
        Err(error) => {
            let code = if error.is::<Interrupted>() { ExitCode::from(Interrupted::CODE) } else { ExitCode::FAILURE };
            failure::show(error, &wanted, &context, json).await?;
            return Ok(code);
        }
    };
    let saved = args.save.as_deref();
    if let Some(save) = saved {
        let bytes = wav::write(&called.heard.recording, called.rate);
        fs::write(save, bytes).with_context(|| save.display().to_string())?;
    }
    show(&called, &wanted, interrupted, saved, &context, json).await
}

async fn show(
    called: &Called,
    wanted: &Wanted,
    interrupted: bool,
    saved: Option<&Path>,
    context: &Context,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let error = match &called.broken {
        _ if interrupted => Some(Interrupted.to_string()),
        broken => broken.as_ref().map(words::broken),
    };
    // What was not waited for says nothing about the agent.
    let awaited = if error.is_some() { called.answered() } else { wanted.turns.len() };
    let found = called.verify(&wanted.turns[..awaited.min(wanted.turns.len())]);
    let has_moved = !called.report.switches.is_empty();
    let relays = if has_moved { status::relay_names(context).await } else { BTreeMap::new() };
    let (turns, text) = (wanted.turns.len(), error.as_deref());
    let timeline = Timeline { called, found: &found, turns, error: text, saved, relays: &relays };
    if json {
        out!("{}", serde_json::to_string_pretty(&timeline.as_json())?);
    } else {
        timeline.print();
    }
    if let Some(error) = error {
        present::error(&anyhow::anyhow!(error));
        return Ok(if interrupted { ExitCode::from(Interrupted::CODE) } else { ExitCode::FAILURE });
    }
    Ok(if called.heard.unanswered == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The call and whether a signal ended it.
async fn with_progress(
    client: &antiphon_client::Router,
    wanted: &Wanted,
    progress: &Progress,
) -> anyhow::Result<(Called, bool)> {
    let stage = Stage::default();
    let mut signal = std::pin::pin!(shutdown::signal()?);
    let (steer, mut steered) = oneshot::channel();
    let call = caller::call(client, wanted, &stage, Some(steer));
    let mut call = std::pin::pin!(call);
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    let started = tokio::time::Instant::now();
    loop {
        tokio::select! {
            called = &mut call => return Ok((called?, false)),
            () = &mut signal => match steered.try_recv() {
                // The caller hangs up; what was heard so far is saved and shown.
                Ok(handle) => {
                    handle.hang_up();
                    return Ok((call.await?, true));
                }
                // Nothing is heard yet: the reservation, if there is one, is given back.
                Err(_) => {
                    let _ = timeout(GIVE_BACK, client.delete(&wanted.session.to_string())).await;
                    return Err(Interrupted.into());
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
    ensure!(
        pcm.len() as u64 <= longest,
        "longer than {} s: cut it into several files, one per turn",
        LONGEST_TURN.as_secs()
    );
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

const GIVE_BACK: Duration = Duration::from_secs(2);
const LONGEST_TURN: Duration = Duration::from_secs(55);
