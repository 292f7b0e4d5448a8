//! The operator: watches Antiphon's resources, plans, applies and says in their status what became of them.
//!
//! Per kind there is one straight line: observe (the [`cache`]s) → plan (pure) → apply ([`apply`], which makes no request
//! where nothing would change) → status. Every write passes the [`fence`], which stands open only while this process
//! holds the lease ([`election`]). Nothing is on the way of any call: while the operator is away, calls go on, new ones
//! are placed, and nothing is scaled, healed or drained.
#![forbid(unsafe_code)]

pub mod apply;
pub mod args;
pub mod cache;
pub mod conditions;
pub mod config;
mod context;
pub mod controller;
pub mod election;
mod error;
pub mod etcd_member;
pub mod events;
pub mod fence;
pub mod labels;
pub mod metrics;
pub mod queue;
pub mod trim;

pub use context::{Caches, Context, Queues};
pub use error::{Error, Reason};
