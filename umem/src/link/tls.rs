//! TLS over TCP, for threads that read and threads that write at the same time.
//!
//! ```text
//!            incoming (the one reader)                 outgoing (the one writer)
//!           +--------------------------+              +--------------------------+
//!   recv -->| ciphertext               |              |               ciphertext |--> send
//!           +-----------+--------------+              +-------------^------------+
//!                       |  decrypt                         encrypt  |
//!                       |        +----------------------+           |
//!                       +------->| connection           |-----------+
//!                                | (both, for moments)  |
//!                                +----------------------+
//! ```
//!
//! Three locks. `incoming` is held by who reads and `outgoing` by who writes, both also while they wait in the socket; nobody
//! takes both, but for the handshake, before which there is nothing else. `connection` is taken after either of them, for as
//! long as it takes to encrypt or decrypt what is in memory already, and **never while anybody waits in the socket**. So who
//! waits to write cannot hold up who reads: when both sides write until all buffers are full, both still read, which makes
//! room. (With one lock around connection and socket each side would wait in `send` for the other to read.)
//!
//! What the connection has to say by itself (an answer to a key update) goes out with the next write, so that a reader never
//! writes.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Release},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConnection, Connection, ServerConnection};

use super::Credentials;

/// Ciphertext taken from the socket at a time: some records of 16 KiB.
const INCOMING: usize = 64 << 10;

/// A TLS connection.
#[derive(Debug)]
pub struct TlsStream {
    tcp: TcpStream,
    /// The handshake is done.
    established: AtomicBool,
    connection: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
}

/// Ciphertext that was received and not yet decrypted.
#[derive(Debug)]
struct Incoming {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Ciphertext that is to be sent.
#[derive(Debug, Default)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
}

/// Why there is no TLS with the other side, or no more.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It does not come to an end.
    #[error("the TLS handshake took too long: does the other side speak TLS?")]
    TimedOut,
    /// It was broken off.
    #[error("the other side closed the connection during the TLS handshake: does it speak TLS?")]
    Closed,
    /// It has not been made yet.
    #[error("the TLS handshake is not done")]
    NotEstablished,
    /// The host cannot be in a certificate.
    #[error("'{0}' is neither a DNS name nor an IP address")]
    Name(String),
    /// The rules of TLS, or of certificates.
    #[error("{}", explain(.0))]
    Tls(#[source] rustls::Error),
}

/// What an error means for who set up the two sides.
fn explain(error: &rustls::Error) -> &'static str {
    use AlertDescription as Alert;
    use CertificateError as Certificate;
    match error {
        rustls::Error::InvalidCertificate(error) => match error {
            Certificate::Expired | Certificate::ExpiredContext { .. } => {
                "the other side's certificate has expired"
            }
            Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => {
                "the other side's certificate is not valid yet"
            }
            Certificate::UnknownIssuer => "the other side's certificate is not signed by the CA in ca.pem",
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
                "the other side's certificate is for another host"
            }
            _ => "the other side's certificate is not accepted",
        },
        rustls::Error::NoCertificatesPresented => "the other side has no certificate",
        rustls::Error::AlertReceived(alert) => match alert {
            Alert::CertificateRequired => "the other side asks for a certificate",
            Alert::CertificateExpired => {
                "the other side does not accept this side's certificate, which has expired"
            }
            Alert::UnknownCA => {
                "the other side does not accept this side's certificate, which is not signed by the CA that it trusts"
            }
            Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateUnknown
            | Alert::AccessDenied
            | Alert::DecryptError => "the other side does not accept this side's certificate",
            Alert::ProtocolVersion => "the other side does not speak TLS 1.3",
            _ => "the other side ended TLS",
        },
        rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. } => {
            "the other side does not speak TLS"
        }
        rustls::Error::PeerIncompatible(_) => "the other side does not speak TLS 1.3",
        _ => "TLS failed",
    }
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        let kind = match error {
            TlsError::TimedOut => io::ErrorKind::TimedOut,
            TlsError::Closed => io::ErrorKind::UnexpectedEof,
            TlsError::NotEstablished => io::ErrorKind::NotConnected,
            TlsError::Name(_) => io::ErrorKind::InvalidInput,
            TlsError::Tls(_) => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

impl TlsStream {
    /// The side that calls, which wants a certificate for `host`: a DNS name or an IP address, IPv6 in brackets or not. The
    /// handshake is still to be made.
    pub(super) fn client(tcp: TcpStream, credentials: &Credentials, host: &str) -> Result<Self, TlsError> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|_| TlsError::Name(host.to_owned()))?;
        let connection =
            ClientConnection::new(Arc::clone(&credentials.client), name).map_err(TlsError::Tls)?;
        Ok(Self::new(tcp, connection.into()))
    }

    /// The side that was called. The handshake is still to be made.
    pub(super) fn server(tcp: TcpStream, credentials: &Credentials) -> Result<Self, TlsError> {
        let connection = ServerConnection::new(Arc::clone(&credentials.server)).map_err(TlsError::Tls)?;
        Ok(Self::new(tcp, connection.into()))
    }

    fn new(tcp: TcpStream, connection: Connection) -> Self {
        Self {
            tcp,
            established: AtomicBool::new(false),
            connection: Mutex::new(connection),
            incoming: Mutex::new(Incoming {
                bytes: vec![0; INCOMING].into(),
                start: 0,
                end: 0,
            }),
            outgoing: Mutex::default(),
        }
    }

    #[cfg(test)]
    fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the handshake. Until it is made, nobody can read or write, nor waits here for who makes it.
    pub(super) fn handshake(&self, limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let done = {
                let mut connection = self.connection();
                outgoing.take(&mut connection)?;
                !connection.is_handshaking()
            };
            while !outgoing.is_empty() {
                if self.send(&mut outgoing, SendFlags::DONTWAIT)? == Progress::Full {
                    self.wait(PollFlags::OUT, deadline)?;
                }
            }
            if done {
                self.established.store(true, Release);
                return Ok(());
            }
            self.wait(PollFlags::IN, deadline)?;
            match incoming.receive(&self.tcp, RecvFlags::empty()) {
                Ok(true) => {}
                Ok(false) => return Err(TlsError::Closed.into()),
                // Who does not understand what it reads may close without reading the rest.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(TlsError::Closed.into());
                }
                Err(error) => return Err(error),
            }
            let mut connection = self.connection();
            while !incoming.is_empty() && connection.is_handshaking() {
                if let Err(error) = incoming.decrypt(&mut connection) {
                    // The other side is to know why. If it does not take that, it need not.
                    let _ = outgoing.take(&mut connection);
                    drop(connection);
                    let _ = self.send(&mut outgoing, SendFlags::DONTWAIT);
                    return Err(error);
                }
            }
        }
    }

    fn wait(&self, events: PollFlags, deadline: Instant) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut ready = [PollFd::new(&self.tcp, events)];
            match rustix::event::poll(&mut ready, Some(&left)) {
                Ok(0) => return Err(TlsError::TimedOut.into()),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn established(&self) -> io::Result<()> {
        if self.established.load(Acquire) {
            Ok(())
        } else {
            Err(TlsError::NotEstablished.into())
        }
    }

    /// As [`Read::read`]. The end of the stream counts as such only if the other side said so; else it is an error, as whoever
    /// is on the way can cut a connection.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.established()?;
        let incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        self.read_from(incoming, buffer, RecvFlags::empty())
    }

    /// As [`TlsStream::read`], of what has come. An error of the kind `WouldBlock`: nothing has, or not all of a record.
    pub(super) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.established()?;
        // Somebody who reads and waits gets what comes.
        let incoming = self.incoming.try_lock().map_err(|_| io::ErrorKind::WouldBlock)?;
        self.read_from(incoming, buffer, RecvFlags::DONTWAIT)
    }

    fn read_from(
        &self,
        mut incoming: MutexGuard<'_, Incoming>,
        buffer: &mut [u8],
        flags: RecvFlags,
    ) -> io::Result<usize> {
        loop {
            let mut connection = self.connection();
            match connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            if !incoming.is_empty() {
                let decrypted = incoming.decrypt(&mut connection);
                drop(connection);
                if decrypted.is_err() {
                    self.say_last_words(false);
                }
                decrypted?;
                continue;
            }
            drop(connection);
            if !incoming.receive(&self.tcp, flags)? {
                let text = "the connection ended in the middle of TLS";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
        }
    }

    /// As [`Write::write_vectored`]. What an earlier call left goes first.
    pub(super) fn write(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.established()?;
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        self.send_all(&mut outgoing)?;
        let count = self.encrypt(buffers, &mut outgoing)?;
        self.send_all(&mut outgoing)?;
        Ok(count)
    }

    /// Takes what can be sent without waiting, and some more, which the next call sends first. An error of the kind
    /// `WouldBlock`: nothing can be, and nothing was taken.
    pub(super) fn try_write(&self, data: &[IoSlice<'_>]) -> io::Result<usize> {
        self.try_flush()?;
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.encrypt(data, &mut outgoing)?;
        self.send(&mut outgoing, SendFlags::DONTWAIT)?;
        Ok(count)
    }

    /// Sends what [`TlsStream::try_write`] took. An error of the kind `WouldBlock`: not all of it can be sent yet.
    pub(super) fn try_flush(&self) -> io::Result<()> {
        self.established()?;
        // Somebody who writes and waits is in the way just as a full socket is.
        let mut outgoing = self.outgoing.try_lock().map_err(|_| io::ErrorKind::WouldBlock)?;
        match self.send(&mut outgoing, SendFlags::DONTWAIT)? {
            Progress::Done => Ok(()),
            Progress::Full => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Ends both directions, and says so if that is possible without waiting.
    pub(super) fn shutdown(&self) -> io::Result<()> {
        self.say_last_words(true);
        self.tcp.shutdown(Shutdown::Both)
    }

    /// Sends an alert that is due, or that this is the end, if nobody is writing.
    fn say_last_words(&self, close: bool) {
        if self.established().is_err() {
            return;
        }
        if let Ok(mut outgoing) = self.outgoing.try_lock() {
            let mut connection = self.connection();
            if close {
                connection.send_close_notify();
            }
            let taken = outgoing.take(&mut connection);
            drop(connection);
            if taken.is_ok() {
                // Whoever does not take it sees the connection end.
                let _ = self.send(&mut outgoing, SendFlags::DONTWAIT);
            }
        }
    }

    fn encrypt(&self, buffers: &[IoSlice<'_>], outgoing: &mut Outgoing) -> io::Result<usize> {
        let mut connection = self.connection();
        // As much as the connection's own buffer holds.
        let count = connection.writer().write_vectored(buffers)?;
        outgoing.take(&mut connection)?;
        Ok(count)
    }

    fn send_all(&self, outgoing: &mut Outgoing) -> io::Result<()> {
        match self.send(outgoing, SendFlags::empty())? {
            Progress::Done => Ok(()),
            Progress::Full => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn send(&self, outgoing: &mut Outgoing, flags: SendFlags) -> io::Result<Progress> {
        while !outgoing.is_empty() {
            let rest = &outgoing.bytes[outgoing.sent..];
            match rustix::net::send(&self.tcp, rest, flags | SendFlags::NOSIGNAL) {
                Ok(count) => outgoing.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Progress::Full),
                Err(errno) => return Err(errno.into()),
            }
        }
        outgoing.bytes.clear();
        outgoing.sent = 0;
        Ok(Progress::Done)
    }
}

/// Whether everything went out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    /// The socket takes no more for now.
    Full,
}

impl Incoming {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Receives ciphertext, and waits for it with the socket's time-out, unless `flags` say otherwise. False: there is no more. Only
    /// to be called when there is none left.
    fn receive(&mut self, tcp: &TcpStream, flags: RecvFlags) -> io::Result<bool> {
        let (count, _) = rustix::net::recv(tcp, &mut *self.bytes, flags)?;
        (self.start, self.end) = (0, count);
        Ok(count > 0)
    }

    /// Gives some to the connection, whose plaintext has been read before.
    fn decrypt(&mut self, connection: &mut Connection) -> io::Result<()> {
        let mut rest = &self.bytes[self.start..self.end];
        self.start += connection.read_tls(&mut rest)?;
        match connection.process_new_packets() {
            Ok(_) => Ok(()),
            Err(error) => Err(TlsError::Tls(error).into()),
        }
    }
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Takes all that the connection has to send.
    fn take(&mut self, connection: &mut Connection) -> io::Result<()> {
        while connection.wants_write() {
            connection.write_tls(&mut self.bytes)?;
        }
        Ok(())
    }
}

impl AsFd for TlsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }
}

#[cfg(test)]
mod tests;
