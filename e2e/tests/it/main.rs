//! Tests that run on Kubernetes clusters on this machine: `cargo xtask e2e`.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chart;
mod clusters;
mod crds;
mod leftovers;
mod paths;
mod world;
