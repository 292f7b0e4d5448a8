//! Calls over real sockets. The worker is a stand-in that speaks the real protocol up to heartbeats: what is tested is
//! how the client gets there and stays there.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::disallowed_methods, reason = "a test owns its tasks by awaiting them")]

#[path = "it/families.rs"]
mod families;
#[path = "it/support.rs"]
mod support;
