//! Arbitrary bytes for every parser that strangers reach.
//!
//! A [`Target`] takes any bytes and must neither panic nor hang, and what it understands must keep the promises that it
//! asserts. `cargo xtask fuzz` looks for bytes that break one, guided by the code they reach; the inputs that reach
//! most are kept in `corpus/`, and `cargo test -p antiphon-fuzz` gives all of them to the targets again.
#![forbid(unsafe_code)]

mod input;
mod targets;

pub use targets::TARGETS;

/// One parser, or one machine that bytes steer.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Names it, its corpus and its findings.
    pub name: &'static str,
    /// Whose bytes they are.
    pub about: &'static str,
    /// Takes any bytes; whether they were understood. Panics if a promise is broken.
    pub run: fn(&[u8]) -> bool,
    /// Inputs that are understood: where the search begins.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

impl Target {
    /// The target of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }
}
