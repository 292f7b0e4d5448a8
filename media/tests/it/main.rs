//! Whole calls without I/O: a caller, two seeded networks, a worker, in virtual time.

#[cfg(test)]
mod call;
#[cfg(test)]
mod proof;
