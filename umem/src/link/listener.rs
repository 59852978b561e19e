//! Listening for connections.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{Address, Credentials, Stream, connect_unix};

/// Why nobody can listen at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody listens there.
    #[error("'{0}' is in use: another process listens there; stop it or choose another path")]
    InUse(String),
    /// The name belongs to something else.
    #[error("'{}' exists and is no socket: remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// Anything else.
    #[error("cannot listen at {address}")]
    Io {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
}

/// A socket that takes connections.
#[derive(Debug)]
pub enum Listener {
    /// At a path.
    Unix(UnixSocket),
    /// At a port, with TLS or without.
    Tcp(TcpListener, Option<Credentials>),
}

/// A listening Unix socket, whose path goes with it.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    /// The file's identity, so that a successor's socket of the same name is left alone.
    inode: u64,
}

impl Listener {
    /// Listens at `address`. A Unix socket is for its owner alone (mode 0600); a path left behind by a process that is gone
    /// is replaced, one that somebody listens at is refused.
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        Self::bind_with(address, None)
    }

    /// The same; with `credentials`, TCP is with TLS. Unix sockets never are.
    pub fn bind_with(address: &Address, credentials: Option<Credentials>) -> Result<Self, ListenError> {
        match address {
            Address::Unix(path) => UnixSocket::bind(path).map(Self::Unix),
            Address::Tcp(host_and_port) => match TcpListener::bind(host_and_port) {
                Ok(listener) => Ok(Self::Tcp(listener, credentials)),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    Err(ListenError::InUse(address.to_string()))
                }
                Err(source) => Err(ListenError::Io {
                    address: address.to_string(),
                    source,
                }),
            },
        }
    }

    /// Waits for a connection, whose [`Stream::handshake`] is still to be made: by another thread, so that nobody who takes
    /// his time for it holds up others.
    pub fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(socket) => Ok(Stream::Unix(socket.listener.accept()?.0)),
            Self::Tcp(listener, credentials) => Stream::accepted(listener.accept()?.0, credentials.as_ref()),
        }
    }

    /// Where it listens; for TCP with the port that the kernel chose, if it was asked to.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Self::Unix(socket) => Ok(Address::Unix(socket.path.clone())),
            Self::Tcp(listener, _) => Ok(Address::Tcp(listener.local_addr()?.to_string())),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.listener.as_fd(),
            Self::Tcp(listener, _) => listener.as_fd(),
        }
    }
}

impl UnixSocket {
    fn bind(path: &Path) -> Result<Self, ListenError> {
        let fail = |source| ListenError::Io {
            address: format!("unix:{}", path.display()),
            source,
        };
        // Two processes that find the same stale socket must not remove each other's new one: the directory is locked from
        // the look to the bind. The lock goes with the descriptor.
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let lock = rustix::fs::openat(
            CWD,
            directory,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| fail(errno.into()))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(|errno| fail(errno.into()))?;
        remove_stale(path)?;
        Self::listen(path).map_err(fail)
    }

    fn listen(path: &Path) -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // Before it has a name, so that at no time it is for others.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 128)?;
        let inode = path.symlink_metadata()?.ino();
        Ok(Self {
            listener: socket.into(),
            path: path.to_path_buf(),
            inode,
        })
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let ours = self
            .path
            .symlink_metadata()
            .is_ok_and(|metadata| metadata.ino() == self.inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove socket");
        }
    }
}

/// Removes the socket of a process that is gone.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let fail = |source| ListenError::Io {
        address: format!("unix:{}", path.display()),
        source,
    };
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_path_buf()));
        }
        Ok(_) => {}
    }
    match connect_unix(path, Duration::ZERO) {
        // The kernel's word for a socket file without a socket.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(fail)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Connected, or too many who try to: somebody listens.
        _ => Err(ListenError::InUse(format!("unix:{}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::thread;

    #[test]
    fn a_stale_path_is_replaced_and_a_live_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let address = Address::Unix(path.clone());
        // A listener that went without removing its path, as one that was killed.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let live = Listener::bind(&address).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(matches!(Listener::bind(&address), Err(ListenError::InUse(_))));
        assert!(
            Stream::connect(&address, Duration::from_secs(30), None).is_ok(),
            "the refused one took the path away"
        );
        drop(live);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Listener::bind(&address),
            Err(ListenError::NotASocket(_))
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    /// Of many that find the same stale path, one gets it.
    #[test]
    fn two_cannot_replace_a_stale_path() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..50 {
            let path = directory.path().join(format!("socket{round}"));
            drop(UnixListener::bind(&path).unwrap());
            let begin = Barrier::new(4);
            let bound: Vec<_> = thread::scope(|scope| {
                let bind = || {
                    begin.wait();
                    Listener::bind(&Address::Unix(path.clone())).ok()
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(bind)).collect();
                threads
                    .into_iter()
                    .filter_map(|thread| thread.join().unwrap())
                    .collect()
            });
            assert_eq!(bound.len(), 1, "round {round}");
        }
    }

    #[test]
    fn a_path_that_is_too_long_is_an_error() {
        let path = PathBuf::from("/tmp/".to_owned() + &"x".repeat(200));
        assert!(matches!(
            Listener::bind(&Address::Unix(path)),
            Err(ListenError::Io { .. })
        ));
    }
}
