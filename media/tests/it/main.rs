//! Whole calls without I/O: a caller, two seeded networks, a worker, in virtual time.

mod call;
mod proof;
