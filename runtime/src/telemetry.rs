//! Logging.

use std::io::IsTerminal as _;

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// Installs the process's log output on standard error.
///
/// `ANTIPHON_LOG` takes the filter syntax of `tracing-subscriber` (`info` unless set). Colours only on a terminal and
/// without `NO_COLOR`.
pub fn init(json: bool) {
    let filter = EnvFilter::try_from_env("ANTIPHON_LOG").unwrap_or_else(|_| EnvFilter::new("info,h2=warn,quinn=warn"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let registry = tracing_subscriber::registry().with(filter);
    let outcome = if json {
        registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init()
    } else {
        registry.with(fmt::layer().with_ansi(colours).with_target(false).with_writer(std::io::stderr)).try_init()
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "logging is set up already");
    }
}

/// For commands that people run: warnings only unless `ANTIPHON_LOG` asks for more.
pub fn init_for_people() {
    let filter = EnvFilter::try_from_env("ANTIPHON_LOG").unwrap_or_else(|_| EnvFilter::new("error"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let layer = fmt::layer().with_ansi(colours).with_target(false).with_writer(std::io::stderr);
    if let Err(error) = tracing_subscriber::registry().with(filter).with(layer).try_init() {
        tracing::debug!(%error, "logging is set up already");
    }
}
