//! The domain of Antiphon without I/O.
//!
//! Everything here is a value, a codec, a *planner* (`plan(&Snapshot, &Policy, now) -> Plan`) or a *machine*
//! (`handle(now, Input)`, `poll_output()`, `next_timeout()`). Time, randomness and keys are arguments; sockets,
//! clocks and storage live in the crates around this one. The crate depends on no async runtime, no protobuf, no
//! Kubernetes and no QUIC library, and builds for wasm32.
#![forbid(unsafe_code)]

pub mod cid;
pub mod clock;
pub mod drain;
pub mod generation;
pub mod geo;
pub mod id;
pub mod keys;
pub mod lease;
pub mod placement;
pub mod pool;
pub mod rollout;
pub mod sketch;
pub mod tunnel;
pub mod varint;
