//! The resources of Antiphon, group `antiphon.dev`, version `v1alpha1`.
//!
//! - [`VoiceAgent`], [`VoiceRegion`], [`WorkerPool`] and [`Drain`]: the types, their schema and the rules that the API
//!   server enforces. [`pod`] holds the parts of Kubernetes' pods that they take over.
//! - [`manifest`]: the same resources read from YAML files, with errors that name file, line and field.
//! - [`compile`]: what a fleet consists of, worked out from its resources without any I/O.
//! - [`crdgen`]: the CustomResourceDefinitions as YAML, committed in `crds/yaml`.
#![forbid(unsafe_code)]

mod agent;
pub mod compile;
pub mod crdgen;
mod drain;
mod field;
mod form;
pub mod manifest;
pub mod pod;
mod pool;
mod region;
mod rules;
mod schema;
mod time_span;

pub use agent::{
    AgentRegionStatus, Autoscaling, Canary, Codec, Disruption, DrainPolicy, Engine, EngineContainer, EngineType,
    Latency, Placement, Privacy, RegionPool, Retention, RetentionPolicy, RevisionStatus, Rollout, RolloutStrategy,
    Sessions, TurnTaking, VoiceAgent, VoiceAgentSpec, VoiceAgentStatus, Worker, WorkerRevisionStatus, Workload,
};
pub use drain::{CapacityCheck, Drain, DrainCapacity, DrainPhase, DrainSpec, DrainStatus, DrainTarget, DrainingWorker};
pub use field::{FieldError, FieldPath, Step};
pub use pool::{WorkerPool, WorkerPoolSpec, WorkerPoolStatus};
pub use region::{
    Ingress, IngressService, IngressType, KeyStatus, Location, PeerStatus, RegionPhase, Relay, RelayServiceType,
    Router, RouterService, RouterServiceType, Serving, Tunnel, VoiceRegion, VoiceRegionSpec, VoiceRegionStatus,
};
pub use rules::Resource;
pub use schema::nearest;
pub use time_span::{InvalidTimeSpan, TimeSpan};

/// API group of every resource.
pub const GROUP: &str = "antiphon.dev";
/// Version of every resource.
pub const VERSION: &str = "v1alpha1";
