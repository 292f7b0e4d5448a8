//! Programs that are run and waited for.

use std::{ffi::OsStr, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::AsyncWriteExt as _,
    process::Command,
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};

/// What a program writes to its standard output. It ends with whoever waits for it.
///
/// # Errors
/// It cannot be started, or fails: then with what it wrote to its standard error.
pub async fn run(command: &mut Command) -> Result<String> {
    run_with(command, b"").await
}

/// The same, with something for it to read.
///
/// # Errors
/// Those of [`run`].
pub async fn run_with(command: &mut Command, input: &[u8]) -> Result<String> {
    let line = shown(command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().with_context(|| format!("{line}: cannot be started"))?;
    let mut stdin = child.stdin.take().context("the standard input is a pipe")?;
    let write = async move {
        // Who does not want to hear it all may say why.
        let _ = stdin.write_all(input).await;
    };
    let ((), output) = tokio::join!(write, child.wait_with_output());
    let output = output.with_context(|| format!("{line}: cannot be waited for"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{line}: {}: {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Looks again and again until there is something, at the latest when the time is over.
///
/// # Errors
/// The time is over: with the last thing that went wrong, if anything did.
pub async fn until<T>(what: &str, limit: Duration, mut look: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    let mut tick = interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = None;
    loop {
        let turn = async {
            tick.tick().await;
            look().await
        };
        match timeout_at(deadline, turn).await {
            Ok(Ok(Some(found))) => return Ok(found),
            Ok(Ok(None)) => last = None,
            Ok(Err(error)) => last = Some(error),
            Err(_) => break,
        }
    }
    let late = format!("{what}: not within {} s", limit.as_secs());
    Err(match last {
        Some(error) => error.context(late),
        None => anyhow::anyhow!(late),
    })
}

/// The command's name and arguments; long arguments in short.
fn shown(command: &Command) -> String {
    let command = command.as_std();
    let name = std::path::Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(name).chain(command.get_args()).map(OsStr::to_string_lossy);
    let short = words.map(|word| {
        let mut short: String = word.chars().take(LONGEST_WORD).collect();
        if short.len() < word.len() {
            short.push('…');
        }
        short
    });
    short.collect::<Vec<_>>().join(" ")
}

const LOOK: Duration = Duration::from_millis(50);
const LONGEST_WORD: usize = 160;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_says_what_the_program_said() {
        let error = run(Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"])).await.unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("sh -c") && text.contains("exit status: 3") && text.contains("no such thing"), "{text}");
        assert_eq!(run_with(&mut Command::new("cat"), b"heard").await.unwrap(), "heard");
    }

    #[tokio::test(start_paused = true)]
    async fn looking_ends_with_the_last_reason() {
        let mut looks = 0;
        let found = until("three looks", Duration::from_secs(1), || {
            looks += 1;
            let found = (looks == 3).then_some(looks);
            async move { Ok(found) }
        });
        assert_eq!(found.await.unwrap(), 3);
        let never = until("a thing", Duration::from_secs(2), || async { bail!("still away") as Result<Option<()>> });
        assert_eq!(format!("{:#}", never.await.unwrap_err()), "a thing: not within 2 s: still away");
    }
}
