//! What routers and hosts on the way say about frames that cannot arrive (RFC 792, RFC 4443).
//!
//! Anybody who guesses two addresses can forge such a message, so it decides nothing but the order in which relays of a
//! region are tried.

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt},
};

/// Lets the system keep such messages for the socket, in both families for one of IPv6.
pub(super) fn keep(socket: &impl AsFd, is_ipv6: bool) -> io::Result<()> {
    setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
    if is_ipv6 {
        setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
    }
    Ok(())
}

/// Takes all that were kept; `closed` hears the addresses at which nobody listens or that cannot be reached.
pub(super) fn take(socket: &impl AsRawFd, mut closed: impl FnMut(SocketAddr)) {
    let mut control = [0; CONTROL_BYTES];
    let mut datagram = [0; 64];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let mut buffers = [IoSliceMut::new(&mut datagram)];
    while let Ok(message) = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut buffers, Some(&mut control), flags) {
        let gone = message.cmsgs().is_ok_and(|mut all| all.any(|c| is_gone(&c)));
        if let Some(address) = message.address.filter(|_| gone).as_ref().and_then(to_std) {
            closed(address);
        }
    }
}

fn is_gone(message: &ControlMessageOwned) -> bool {
    let (ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _)) = message else {
        return false;
    };
    matches!(
        Errno::from_raw(error.ee_errno.cast_signed()),
        Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EHOSTDOWN
    )
}

/// In its own family.
fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|a| SocketAddr::from((a.ip(), a.port())));
    let address = v4.or_else(|| address.as_sockaddr_in6().map(|a| SocketAddr::from((a.ip(), a.port()))))?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// Room for the message and for what else the socket asks for (packet information, traffic class).
const CONTROL_BYTES: usize = 512;
