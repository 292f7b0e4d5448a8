//! What every Antiphon process needs: owned tasks, telemetry, the admin port and mTLS identities.
#![forbid(unsafe_code)]

pub mod admin;
pub mod cause;
pub mod crowd;
mod identity;
pub mod members;
pub mod pki;
pub mod private_dir;
pub mod private_file;
pub mod shutdown;
pub mod tasks;
pub mod telemetry;
pub mod tls;

pub use tasks::Tasks;
