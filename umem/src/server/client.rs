//! Who a client is, as far as the server can tell.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::net::getpeername;

use crate::wire::SessionId;

/// Those among whom turns are shared. A session id is chosen by who says it and costs nothing, so sessions share what their
/// peer has: nobody gets more by having many, and nobody who says another's id takes anything from it elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Client {
    pub(super) peer: Peer,
    pub(super) session: SessionId,
}

/// What cannot be chosen freely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Peer {
    /// The process that connected to a Unix socket. One that this process cannot see has number 0.
    Process(u32),
    /// The host that connected by TCP.
    Host(IpAddr),
}

impl Peer {
    /// Who is at the other end of a socket.
    pub(super) fn of(socket: impl AsFd) -> Self {
        match getpeername(&socket).map(|name| name.map(SocketAddr::try_from)) {
            // One host by either way.
            Ok(Some(Ok(address))) => Self::Host(address.ip().to_canonical()),
            _ => Self::Process(process(socket.as_fd())),
        }
    }
}

fn process(socket: BorrowedFd<'_>) -> u32 {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // Not by rustix, to which no process has number 0.
    // SAFETY: `credentials` and `length` are places for the answer, and `length` says how long the first one is.
    unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        );
    }
    credentials.pid as u32
}
