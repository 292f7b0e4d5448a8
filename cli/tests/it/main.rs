//! End to end: real routers, relays and workers as processes, real QUIC, real audio.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::disallowed_methods, reason = "a test owns its tasks by awaiting them")]

mod calls;
mod capacity;
mod commands;
mod floods;
mod hostile;
mod interop;
mod lossy;
mod operations;
mod outage;
mod support;
mod tiers;
mod workers;
