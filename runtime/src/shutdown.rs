//! How processes stop, and what they say of it.

use std::{io::Write as _, process::ExitCode};

/// Completes on SIGTERM or SIGINT, whichever comes first.
///
/// # Errors
/// The operating system refuses the handler.
pub fn signal() -> std::io::Result<impl Future<Output = ()> + Send> {
    use tokio::signal::unix::{SignalKind, signal};
    follow_parent()?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => tracing::info!("SIGTERM: stopping"),
            _ = int.recv() => tracing::info!("SIGINT: stopping"),
        }
    })
}

/// How a process ended, for whoever started it: an error is one line on standard error, its causes included, and never
/// a backtrace.
#[must_use]
pub fn exit_code(outcome: &anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to do if nobody reads it.
            let _ = writeln!(std::io::stderr(), "Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// With [`PARENT_VARIABLE`] set the process stops when the parent that set it is gone, however it went.
fn follow_parent() -> std::io::Result<()> {
    let Ok(expected) = std::env::var(PARENT_VARIABLE) else {
        return Ok(());
    };
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    // It may have gone before the line above.
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if parent.as_deref() == Some(expected.as_str()) {
        return Ok(());
    }
    Err(std::io::Error::other("the parent process is gone"))
}

/// Names the process whose end ends this one.
pub const PARENT_VARIABLE: &str = "ANTIPHON_PARENT";
