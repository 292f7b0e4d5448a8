//! The router over real sockets and real mutual TLS.
//!
//! Workers are stand-ins that keep a real slot count and speak the real registration and reservation protocol; what a
//! worker does with a session is not the router's business, and the real one is tested with the router end to end
//! elsewhere.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "helpers and tables of tests")]

#[path = "it/etcd.rs"]
mod etcd;
#[path = "it/fleet.rs"]
mod fleet;
#[path = "it/http.rs"]
mod http;
#[path = "it/keys.rs"]
mod keys;
#[path = "it/limits.rs"]
mod limits;
#[path = "it/openapi.rs"]
mod openapi;
#[path = "it/orders.rs"]
mod orders;
#[path = "it/peering.rs"]
mod peering;
#[path = "it/placement.rs"]
mod placement;
#[path = "it/process.rs"]
mod process;
#[path = "it/restart.rs"]
mod restart;
#[path = "it/siblings.rs"]
mod siblings;
#[path = "it/tiers.rs"]
mod tiers;
#[path = "it/world.rs"]
mod world;
