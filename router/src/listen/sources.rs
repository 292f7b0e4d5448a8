//! How many connections whom: all together, and each source alone.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use parking_lot::Mutex;

use crate::metrics::ConnectionBound;

/// Open connections by source. Never more sources than connections.
#[derive(Clone, Debug, Default)]
pub(super) struct Sources(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    total: usize,
    by_source: HashMap<IpAddr, usize>,
}

/// One open connection.
#[derive(Debug)]
#[must_use = "dropping it frees the place"]
pub(super) struct Place {
    sources: Sources,
    source: IpAddr,
}

impl Sources {
    /// A place for one more connection.
    ///
    /// # Errors
    /// The bound that it would be over.
    pub(super) fn enter(&self, address: IpAddr) -> Result<Place, ConnectionBound> {
        let source = source(address);
        let mut open = self.0.lock();
        if open.by_source.get(&source).is_some_and(|n| *n >= MAX_PER_SOURCE) {
            return Err(ConnectionBound::Source);
        }
        if open.total >= MAX_CONNECTIONS {
            return Err(ConnectionBound::Total);
        }
        open.total += 1;
        *open.by_source.entry(source).or_default() += 1;
        Ok(Place { sources: self.clone(), source })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.sources.0.lock();
        open.total -= 1;
        if let Some(n) = open.by_source.get_mut(&self.source) {
            *n -= 1;
            if *n == 0 {
                open.by_source.remove(&self.source);
            }
        }
    }
}

/// An IPv4 address, or the /64 that one host may use freely (RFC 4291, section 2.5.4).
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

const MAX_CONNECTIONS: usize = 4096;
const MAX_PER_SOURCE: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(sources: &Sources, address: &str) -> Result<Place, ConnectionBound> {
        sources.enter(address.parse().unwrap())
    }

    #[test]
    fn a_source_has_its_share_and_no_more() {
        let sources = Sources::default();
        let mut held: Vec<_> = (0..MAX_PER_SOURCE).map(|_| enter(&sources, "192.0.2.1").unwrap()).collect();
        assert_eq!(enter(&sources, "192.0.2.1").unwrap_err(), ConnectionBound::Source);
        // The same address as a dual-stack socket shows it.
        assert_eq!(enter(&sources, "::ffff:192.0.2.1").unwrap_err(), ConnectionBound::Source);
        assert!(enter(&sources, "192.0.2.2").is_ok());
        held.pop();
        assert!(enter(&sources, "192.0.2.1").is_ok());
        held.clear();
        assert!(sources.0.lock().by_source.is_empty());
    }

    #[test]
    fn a_network_of_64_bits_is_one_source() {
        let sources = Sources::default();
        let _held: Vec<_> =
            (0..MAX_PER_SOURCE).map(|n| enter(&sources, &format!("2001:db8:0:1::{n:x}")).unwrap()).collect();
        assert_eq!(enter(&sources, "2001:db8:0:1:ffff::").unwrap_err(), ConnectionBound::Source);
        assert!(enter(&sources, "2001:db8:0:2::").is_ok());
    }

    #[test]
    fn all_together_are_bounded() {
        let sources = Sources::default();
        let held: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|n| sources.enter(Ipv6Addr::from_bits((n as u128) << 64).into()).unwrap())
            .collect();
        assert_eq!(enter(&sources, "192.0.2.1").unwrap_err(), ConnectionBound::Total);
        drop(held);
        let open = sources.0.lock();
        assert_eq!((open.total, open.by_source.len()), (0, 0));
    }
}
