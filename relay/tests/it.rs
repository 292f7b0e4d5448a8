//! The relay on real sockets: its data path alone, and the whole process against a router.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

#[path = "it/fixture.rs"]
mod fixture;
#[path = "it/forwarding.rs"]
mod forwarding;
#[path = "it/hostile.rs"]
mod hostile;
#[path = "it/process.rs"]
mod process;
#[path = "it/router.rs"]
mod router;
#[path = "it/routers.rs"]
mod routers;
#[path = "it/tiers.rs"]
mod tiers;
