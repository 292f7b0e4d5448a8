//! The resources of Antiphon, group `antiphon.dev`, version `v1alpha1`.
//!
//! - [`VoiceAgent`] and [`VoiceRegion`]: the types, their schema and the rules that the API server enforces.
//! - [`manifest`]: the same resources read from YAML files, with errors that name file, line and field.
//! - [`compile`]: what a fleet consists of, worked out from its resources without any I/O.
//! - [`crdgen`]: the CustomResourceDefinitions as YAML, committed in `crds/yaml`.
#![forbid(unsafe_code)]

mod agent;
pub mod compile;
pub mod crdgen;
mod field;
mod form;
pub mod manifest;
mod region;
mod rules;
mod schema;
mod time_span;

pub use agent::{
    AgentRegionStatus, Codec, Drain, Engine, EngineType, Latency, Placement, RegionPool, Sessions, TurnTaking,
    VoiceAgent, VoiceAgentSpec, VoiceAgentStatus, Worker, Workload,
};
pub use field::{FieldError, FieldPath, Step};
pub use region::{
    Ingress, IngressType, Location, RegionPhase, Relay, Router, Serving, Tunnel, VoiceRegion, VoiceRegionSpec,
    VoiceRegionStatus,
};
pub use rules::Resource;
pub use schema::nearest;
pub use time_span::{InvalidTimeSpan, TimeSpan};

/// API group of every resource.
pub const GROUP: &str = "antiphon.dev";
/// Version of every resource.
pub const VERSION: &str = "v1alpha1";
