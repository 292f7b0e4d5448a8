//! Protobuf messages and gRPC services of Antiphon, and how they map to the domain.
//!
//! The only crate that knows protobuf's generated code; `.proto` files are the reference for every field.
#![forbid(unsafe_code)]

pub mod api_key;
pub mod refusal;
pub mod ticket;

/// Generated from `proto/antiphon/v1/*.proto`.
#[allow(
    missing_docs,
    clippy::all,
    clippy::use_self,
    unreachable_pub,
    unused_qualifications,
    clippy::too_many_lines,
    clippy::cognitive_complexity,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("antiphon.v1");
}

/// Encoded `FileDescriptorSet` of all files, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
