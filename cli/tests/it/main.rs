//! End to end: real routers, relays and workers as processes, real QUIC, real audio.
#![forbid(unsafe_code)]

mod calls;
mod capacity;
mod commands;
mod hostile;
mod support;
mod workers;
