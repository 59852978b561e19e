//! Connections between page servers and who asks them: where one is, listening there, and going there.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::{CWD, FlockOperation, Mode, OFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendmsg,
};

/// How long a host may take to answer at all.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Where a page server is: `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host name or address (IPv6 in brackets), and a port.
    Tcp(String),
}

/// Why a word is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an address: expected unix:PATH or tcp:HOST:PORT")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", host_and_port)) => {
                let (host, port) = host_and_port.rsplit_once(':').ok_or_else(wrong)?;
                let bracketed = host.starts_with('[') && host.ends_with(']');
                let ambiguous = host.contains(':') && !bracketed;
                if host.is_empty() || ambiguous || port.parse::<u16>().is_err() {
                    return Err(wrong());
                }
                Ok(Self::Tcp(host_and_port.to_owned()))
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host_and_port) => write!(f, "tcp:{host_and_port}"),
        }
    }
}

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
    /// At a port.
    Tcp(TcpListener),
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
        match address {
            Address::Unix(path) => UnixSocket::bind(path).map(Self::Unix),
            Address::Tcp(host_and_port) => match TcpListener::bind(host_and_port) {
                Ok(listener) => Ok(Self::Tcp(listener)),
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

    /// Waits for a connection.
    pub fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(socket) => Ok(Stream::Unix(socket.listener.accept()?.0)),
            Self::Tcp(listener) => Stream::tcp(listener.accept()?.0),
        }
    }

    /// Where it listens; for TCP with the port that the kernel chose, if it was asked to.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Self::Unix(socket) => Ok(Address::Unix(socket.path.clone())),
            Self::Tcp(listener) => Ok(Address::Tcp(listener.local_addr()?.to_string())),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
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
    match UnixStream::connect(path) {
        // The kernel's word for a socket file without a socket.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(fail)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Connected, or too many who try to: somebody listens.
        _ => Err(ListenError::InUse(format!("unix:{}", path.display()))),
    }
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Within this host.
    Unix(UnixStream),
    /// Anywhere.
    Tcp(TcpStream),
}

impl Stream {
    /// Connects to a page server.
    pub fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Ok(Self::Unix(UnixStream::connect(path)?)),
            Address::Tcp(host_and_port) => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for address in host_and_port.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT_PATIENCE) {
                        Ok(stream) => return Self::tcp(stream),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// A TCP connection sends at once what it is given: requests are small and somebody waits for them.
    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    /// The same connection, for another thread.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    /// How long a read or a write may wait; `None`: for ever.
    pub fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(read)?;
                stream.set_write_timeout(write)
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(read)?;
                stream.set_write_timeout(write)
            }
        }
    }

    /// Writes what the connection takes at once, and says how much that was. [`io::ErrorKind::WouldBlock`]: nothing, until it
    /// is writable.
    pub fn write_now(&self, data: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(self, data, &mut SendAncillaryBuffer::default(), flags)?)
    }

    /// Ends both directions, for every clone: who waits in a read or write is told.
    pub fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(std::net::Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(std::net::Shutdown::Both),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).read(buffer),
            Stream::Tcp(stream) => (&*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).write(buffer),
            Stream::Tcp(stream) => (&*stream).write(buffer),
        }
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).write_vectored(buffers),
            Stream::Tcp(stream) => (&*stream).write_vectored(buffers),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::thread;

    #[test]
    fn addresses_are_read_and_printed() {
        for text in [
            "unix:/run/umem",
            "tcp:host:1",
            "tcp:127.0.0.1:80",
            "tcp:[::1]:8080",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "unix:",
            "tcp:",
            "tcp:host",
            "tcp::1",
            "tcp:host:x",
            "tcp:host:65536",
            "tcp:::1:80",
            "file:x",
        ] {
            assert_eq!(text.parse::<Address>(), Err(AddressError(text.to_owned())));
        }
    }

    fn talk(address: &str) {
        let listener = Listener::bind(&address.parse().unwrap()).unwrap();
        let client = Stream::connect(&listener.address().unwrap()).unwrap();
        let server = listener.accept().unwrap();
        (&client).write_all(b"ping").unwrap();
        let mut buffer = [0; 4];
        (&server).read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"ping");
        server.shutdown().unwrap();
        assert_eq!((&client).read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn both_kinds_connect() {
        let directory = tempfile::tempdir().unwrap();
        talk(&format!("unix:{}", directory.path().join("socket").display()));
        talk("tcp:127.0.0.1:0");
        talk("tcp:[::1]:0");
        assert_eq!(
            std::fs::read_dir(&directory).unwrap().count(),
            0,
            "the socket's path stayed"
        );
    }

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
            Stream::connect(&address).is_ok(),
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
