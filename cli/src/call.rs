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
use anyhow::{Context as _, bail, ensure};
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
    let (codec, rate) = match args.codec {
        CodecArg::Opus => (Codec::Opus, 16_000),
        CodecArg::L1616k => (Codec::L1616k, 16_000),
        CodecArg::L1624k => (Codec::L1624k, 24_000),
    };
    // What is wrong here is said before anybody is asked for anything.
    let key = args.key.given()?;
    let turns = turns(&args.wav, rate)?;
    check_outputs(args)?;
    let context = Context::load(dir)?;
    let router = context.nearest(args.from).context("the fleet has no router")?;
    let client = context.client(router, key.as_deref())?;
    let agent = if args.agent.contains('/') { args.agent.clone() } else { format!("default/{}", args.agent) };
    let wanted = Wanted {
        agent,
        location: args.from,
        codec,
        regions: args.region.clone(),
        turns,
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

/// What is written can be, and overwrites nothing that is read or written besides.
fn check_outputs(args: &CallArgs) -> anyhow::Result<()> {
    let outputs = [("--save", &args.save), ("--qlog", &args.qlog)];
    let outputs = outputs.into_iter().filter_map(|(flag, path)| Some((flag, path.as_deref()?)));
    let mut others: Vec<(&str, &Path)> = args.wav.iter().map(|wav| ("--wav", wav.as_path())).collect();
    for (flag, path) in outputs {
        if let Some((other, _)) = others.iter().find(|(_, other)| is_same(other, path)) {
            bail!("{flag} {}: that is the file of {other}, which would be lost: name another", path.display());
        }
        writable(flag, path)?;
        others.push((flag, path));
    }
    Ok(())
}

/// By whatever name; a device is nobody's file.
fn is_same(a: &Path, b: &Path) -> bool {
    let file = |path: &Path| fs::canonicalize(path).ok().filter(|path| path.is_file());
    a == b && !a.exists() || file(a).is_some_and(|a| file(b) == Some(a))
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

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    async fn refused(dir: &Path, more: &[&str]) -> String {
        let cli = Cli::try_parse_from(["antiphon", "call", "desk"].iter().chain(more)).unwrap();
        let Command::Call(args) = cli.command else { panic!("another command") };
        format!("{:#}", run(&args, dir, false).await.unwrap_err())
    }

    #[tokio::test]
    async fn files_are_checked_before_a_fleet_is_looked_for_and_none_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (said, answer) = (dir.path().join("said.wav"), dir.path().join("answer.wav"));
        fs::write(&said, wav::write(&Utterance::ALL[0].pcm(), antiphon_media::speech::RATE)).unwrap();
        let (said, answer) = (said.to_str().unwrap(), answer.to_str().unwrap());
        let missing = refused(dir.path(), &["--wav", "/nonexistent/a.wav"]).await;
        assert!(missing.starts_with("/nonexistent/a.wav: "), "{missing}");
        let unwritable = refused(dir.path(), &["--save", "/nonexistent/a.wav"]).await;
        assert!(unwritable.starts_with("--save /nonexistent/a.wav: "), "{unwritable}");
        let roundabout = format!("{}/./said.wav", dir.path().display());
        for same in [said, roundabout.as_str()] {
            let text = refused(dir.path(), &["--wav", said, "--save", same]).await;
            assert!(text.contains("that is the file of --wav, which would be lost"), "{text}");
        }
        let text = refused(dir.path(), &["--save", answer, "--qlog", answer]).await;
        assert!(text.starts_with("--qlog ") && text.contains("the file of --save"), "{text}");
        let text = refused(dir.path(), &["--wav", said, "--save", answer]).await;
        assert!(text.starts_with("no fleet in "), "{text}");
    }
}
