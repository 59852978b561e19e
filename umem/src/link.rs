//! Connections between page servers and who asks them: where one is, listening there, and going there.

mod address;
mod credentials;
mod listener;
#[cfg(test)]
pub(crate) mod test_credentials;
mod tls;

use std::io::{self, IoSlice, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

pub use address::{Address, AddressError};
pub use credentials::{Credentials, CredentialsError};
pub use listener::{ListenError, Listener, UnixSocket};
pub use tls::{TlsError, TlsStream};

/// The longest that one address of a host is tried.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Within this host.
    Unix(UnixStream),
    /// Anywhere, open to who is on the way.
    Tcp(TcpStream),
    /// Anywhere.
    Tls(Box<TlsStream>),
}

impl Stream {
    /// Connects to a page server, for at most `patience` for each address that its host has, and once again as long for TLS.
    /// With `credentials`, TCP is with TLS; Unix sockets never are.
    pub fn connect(
        address: &Address,
        patience: Duration,
        credentials: Option<&Credentials>,
    ) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Ok(Self::Unix(connect_unix(path, patience)?)),
            Address::Tcp(host_and_port) => {
                let patience = patience.min(CONNECT_PATIENCE);
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for address in host_and_port.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, patience) {
                        Ok(stream) => {
                            let stream = no_delay(stream)?;
                            let Some(credentials) = credentials else {
                                return Ok(Self::Tcp(stream));
                            };
                            let host = host_and_port.rsplit_once(':').map_or("", |(host, _)| host);
                            let stream = TlsStream::client(stream, credentials, host)?;
                            stream.handshake(patience)?;
                            return Ok(Self::Tls(Box::new(stream)));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// A connection that was taken from a listener.
    fn accepted(stream: TcpStream, credentials: Option<&Credentials>) -> io::Result<Self> {
        let stream = no_delay(stream)?;
        Ok(match credentials {
            None => Self::Tcp(stream),
            Some(credentials) => Self::Tls(Box::new(TlsStream::server(stream, credentials)?)),
        })
    }

    /// Makes the handshake on a connection that was taken from a listener, which cannot be read or written before; but for
    /// TLS there is none.
    pub fn handshake(&self, patience: Duration) -> io::Result<()> {
        match self {
            Self::Unix(_) | Self::Tcp(_) => Ok(()),
            Self::Tls(stream) => stream.handshake(patience),
        }
    }

    /// How long a read or a write may wait; `None`: for ever.
    pub fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        set_socket_timeout(self, Timeout::Recv, read)?;
        Ok(set_socket_timeout(self, Timeout::Send, write)?)
    }

    /// Reads what has come, without waiting. An error of the kind `WouldBlock`: nothing has.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(_) | Self::Tcp(_) => Ok(rustix::net::recv(self, buffer, RecvFlags::DONTWAIT)?.0),
            Self::Tls(stream) => stream.try_read(buffer),
        }
    }

    /// Waits until something has come, or the end; perhaps a shorter time. False: nothing came for `patience`.
    pub fn wait_to_read(&self, patience: Duration) -> io::Result<bool> {
        let patience = Timespec::try_from(patience).map_err(|_| io::ErrorKind::InvalidInput)?;
        match rustix::event::poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&patience)) {
            Ok(count) => Ok(count > 0),
            Err(Errno::INTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Writes what can be written without waiting, and says how much that was. With TLS it may take more than is written then,
    /// which the next call writes first, or [`Stream::try_flush`]. An error of the kind `WouldBlock`: nothing was taken.
    pub fn try_write(&self, data: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(_) | Self::Tcp(_) => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                Ok(rustix::io::retry_on_intr(|| {
                    rustix::net::sendmsg(self, data, &mut SendAncillaryBuffer::default(), flags)
                })?)
            }
            Self::Tls(stream) => stream.try_write(data),
        }
    }

    /// Writes what [`Stream::try_write`] took. An error of the kind `WouldBlock`: not all of it could be written yet.
    pub fn try_flush(&self) -> io::Result<()> {
        match self {
            Self::Unix(_) | Self::Tcp(_) => Ok(()),
            Self::Tls(stream) => stream.try_flush(),
        }
    }

    /// Whether what comes is ciphertext, of which nothing is known before the handshake.
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Ends both directions: who waits in a read or write is told.
    pub fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(std::net::Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(std::net::Shutdown::Both),
            Self::Tls(stream) => stream.shutdown(),
        }
    }
}

/// A TCP connection sends at once what it is given: requests are small and somebody waits for them.
fn no_delay(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Where as many wait to be taken as can, `connect` waits for a place: for as long as the socket's time-out for sending.
fn connect_unix(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let deadline = Instant::now() + patience;
    let address = SocketAddrUnix::new(path)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // No time is for ever.
        set_socket_timeout(&socket, Timeout::Send, Some(left.max(Duration::from_millis(1))))?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket.into()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let text = "the server takes no connections";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.as_fd(),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).read(buffer),
            Stream::Tcp(stream) => (&*stream).read(buffer),
            Stream::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).write(buffer),
            Stream::Tcp(stream) => (&*stream).write(buffer),
            Stream::Tls(stream) => stream.write(&[IoSlice::new(buffer)]),
        }
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).write_vectored(buffers),
            Stream::Tcp(stream) => (&*stream).write_vectored(buffers),
            Stream::Tls(stream) => stream.write(buffers),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn talk(address: &str) {
        let listener = Listener::bind(&address.parse().unwrap()).unwrap();
        let client = Stream::connect(&listener.address().unwrap(), PATIENCE, None).unwrap();
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

    /// Nobody takes connections, and as many wait as can: the next does not wait for ever.
    #[test]
    fn a_full_backlog_ends_the_wait() {
        let directory = tempfile::tempdir().unwrap();
        let address = Address::Unix(directory.path().join("socket"));
        let listener = Listener::bind(&address).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let limit = Duration::from_millis(50);
        let mut waiting = Vec::new();
        let error = loop {
            match Stream::connect(&address, limit, None) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
            assert!(waiting.len() < 10, "the backlog has no end");
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        // It is somebody's all the same.
        assert!(matches!(Listener::bind(&address), Err(ListenError::InUse(_))));
        listener.accept().unwrap();
        Stream::connect(&address, PATIENCE, None).unwrap();
    }
}
