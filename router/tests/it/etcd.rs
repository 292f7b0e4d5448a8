//! The store on a real etcd: what it does, and what it survives.

#[path = "etcd/server.rs"]
mod server;
#[path = "etcd/stores.rs"]
mod stores;
