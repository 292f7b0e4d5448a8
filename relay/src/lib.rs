//! The relay: a stateless UDP forwarder between clients and workers.
//!
//! A client's datagram names its worker in its connection ID; the relay decrypts one AES block, matches the whole
//! server ID against its table and sends the datagram on behind a tunnel header. A worker's frame names its client in
//! the tunnel header; the relay verifies it and sends the datagram on without it. Nothing is kept in between: any
//! relay can forward any packet, and memory does not grow with clients. A region whose workers cannot be reached is
//! reached through its relays: the header is then written anew at each hop.
//!
//! A datagram's way is [`socket`] → [`forward`] (against the [`table`]) → [`train`] → [`socket`], all within one
//! thread of the [`data_path`]. The [`control`] connections to the routers replace the table as a
//! whole, made by [`routing`] of what they say; the [`state`] on disk brings it back after a restart.
#![forbid(unsafe_code)]

mod args;
pub mod control;
pub mod data_path;
pub mod drain;
pub mod forward;
pub mod keyring;
pub mod limits;
pub mod metrics;
pub mod neighbour;
pub mod public;
pub mod reset;
pub mod routing;
pub mod serve;
pub mod socket;
pub mod state;
pub mod table;
pub mod train;

pub use args::Args;
pub use serve::{run, serve};
