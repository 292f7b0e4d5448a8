//! The relay on real sockets: its data path alone, and the whole process against a router.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

#[path = "it/fixture.rs"]
mod fixture;
#[path = "it/forwarding.rs"]
mod forwarding;
#[path = "it/process.rs"]
mod process;
