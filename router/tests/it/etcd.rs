//! The store on a real etcd: what it does, and what it survives.

#[path = "etcd/access.rs"]
mod access;
#[path = "etcd/descriptors.rs"]
mod descriptors;
#[path = "etcd/losses.rs"]
mod losses;
#[path = "etcd/routers.rs"]
mod routers;
#[path = "etcd/server.rs"]
mod server;
#[path = "etcd/stores.rs"]
mod stores;
