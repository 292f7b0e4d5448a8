//! Tests of whole shards: real QUIC connections over real sockets, through relays that do as they are told.

mod amplification;
mod families;
mod hostile;
mod rig;
mod rotation;
mod routers;
