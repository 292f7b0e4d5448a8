//! Loopback addresses for a fleet.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::bail;

/// 127.77.N.0/24, held by listening on one of its ports. All of 127.0.0.0/8 is loopback (RFC 1122, section 3.2.1.3).
#[derive(Debug)]
pub struct Subnet {
    third: u8,
    last: u8,
    _claim: TcpListener,
}

impl Subnet {
    /// The first subnet that no other fleet on this machine holds.
    ///
    /// # Errors
    /// All are held, or loopback addresses other than 127.0.0.1 do not exist here.
    pub fn claim() -> std::io::Result<Self> {
        let mut last_error = None;
        for third in 0..=255 {
            match TcpListener::bind((Ipv4Addr::new(127, 77, third, 1), CLAIM_PORT)) {
                // Processes of a fleet whose owner was killed may still be on their way out.
                Ok(_) if (2..=254).any(|last| in_use(Ipv4Addr::new(127, 77, third, last))) => {}
                Ok(claim) => return Ok(Self { third, last: 1, _claim: claim }),
                Err(error) => last_error = Some(error),
            }
        }
        Err(last_error.unwrap_or_else(|| std::io::ErrorKind::AddrInUse.into()))
    }

    /// An address that nobody in the fleet has yet.
    ///
    /// # Errors
    /// More than 253 processes.
    pub fn take(&mut self) -> anyhow::Result<Ipv4Addr> {
        if self.last == 254 {
            bail!("a fleet on one machine has at most 253 processes: lower minReplicas or relay.replicas");
        }
        self.last += 1;
        Ok(Ipv4Addr::new(127, 77, self.third, self.last))
    }
}

/// Whether somebody listens on the port that every process of a fleet has.
fn in_use(address: Ipv4Addr) -> bool {
    TcpListener::bind((address, super::process::ADMIN)).is_err()
}

const CLAIM_PORT: u16 = 7399;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_fleets_never_share_an_address() {
        let (mut a, mut b) = (Subnet::claim().unwrap(), Subnet::claim().unwrap());
        assert_ne!(a.take().unwrap(), b.take().unwrap());
        let rest = std::iter::from_fn(|| a.take().ok()).count();
        assert_eq!(rest, 252);
        let error = a.take().unwrap_err().to_string();
        assert!(error.contains("at most 253"), "{error}");
    }
}
