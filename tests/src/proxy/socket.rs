//! Unix and TCP sockets, as descriptors.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_linger, set_socket_timeout};
use rustix::net::{SendFlags, Shutdown, accept, send, shutdown};

/// A socket that waits for connections, and its URL.
pub(super) fn listen(url: &str) -> (OwnedFd, String) {
    match url.split_once(':') {
        Some(("unix", path)) => {
            // One that nobody listens at any more.
            let _ = std::fs::remove_file(path);
            (UnixListener::bind(path).unwrap().into(), url.to_owned())
        }
        Some(("tcp", address)) => {
            let listener = TcpListener::bind(address).unwrap();
            let url = format!("tcp:{}", listener.local_addr().unwrap());
            (listener.into(), url)
        }
        _ => panic!("{url} is no URL of a socket"),
    }
}

/// A connection to `url`.
pub(super) fn connect(url: &str) -> io::Result<OwnedFd> {
    match url.split_once(':') {
        Some(("unix", path)) => Ok(UnixStream::connect(path)?.into()),
        Some(("tcp", address)) => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            Ok(stream.into())
        }
        _ => panic!("{url} is no URL of a socket"),
    }
}

/// The next connection; `None`: there will be none.
pub(super) fn take(listener: &OwnedFd) -> Option<OwnedFd> {
    loop {
        match accept(listener) {
            Ok(connection) => {
                // Unix sockets have no such option.
                let _ = rustix::net::sockopt::set_tcp_nodelay(&connection, true);
                return Some(connection);
            }
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => return None,
        }
    }
}

/// How long a connection may take nothing before it is looked whether it is to end.
const STEP: Duration = Duration::from_millis(20);

/// Sends all of `bytes`, unless `ended` says that it is no use. False: not all could be sent.
pub(super) fn send_all(to: &OwnedFd, mut bytes: &[u8], ended: impl Fn() -> bool) -> bool {
    set_socket_timeout(to, Timeout::Send, Some(STEP)).unwrap();
    while !bytes.is_empty() {
        match send(to, bytes, SendFlags::NOSIGNAL) {
            Ok(length) => bytes = &bytes[length..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if !ended() => {}
            Err(_) => return false,
        }
    }
    true
}

/// Ends one or both directions. What has ended already cannot be ended.
pub(super) fn end(socket: &OwnedFd, how: Shutdown) {
    let _ = shutdown(socket, how);
}

/// Makes its end a reset where there is such a thing: when its descriptor is closed.
pub(super) fn reset(socket: &OwnedFd) {
    let _ = set_socket_linger(socket, Some(Duration::ZERO));
    end(socket, Shutdown::Read);
}
