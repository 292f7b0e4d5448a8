//! Kubernetes clusters on one machine, made for tests: real etcd, kube-apiserver, kube-controller-manager,
//! kube-scheduler, kube-proxy, kubelet and containerd, each cluster and node in network namespaces of its own.
//!
//! [`Clusters`] is a set of them side by side. Whole clusters and single nodes can be cut off and joined again
//! ([`Cluster::cut`], [`Node::cut`]), parts of a control plane and nodes stopped, killed, frozen and started
//! ([`Cluster::stop`], [`Cluster::kill`], [`Cluster::signal`], [`Node::kill`]), and [`Caller`]s reach them from outside,
//! over a [`Path`] with delay, jitter and loss where a test wants one.
//! It needs root. Nothing of the machine's own is changed but for one network link, and nothing is left afterwards.
#![forbid(unsafe_code)]

mod caller;
mod cgroup;
mod cluster;
mod clusters;
mod command;
mod daemon;
mod image;
pub mod images;
pub mod load_balancers;
mod network;
mod parts;
mod path;
mod pki;
mod progress;
mod state;
mod tools;

pub use caller::Caller;
pub use cluster::{Cluster, Node};
pub use clusters::{Clusters, stop};
pub use command::{run, run_with, until};
pub use image::Image;
pub use network::{Namespace, Network};
pub use parts::Part;
pub use path::{Carried, Counts, Faults, Path};
pub use state::Shape;
pub use tools::Tools;
