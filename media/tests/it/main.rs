//! Whole calls without I/O: a caller, two seeded networks, a worker, in virtual time.
#![forbid(unsafe_code)]

#[cfg(test)]
mod call;
#[cfg(test)]
mod proof;
