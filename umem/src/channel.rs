//! A channel: frames over a connection, in both directions.

use std::collections::VecDeque;
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::sync::Arc;

use crate::link::Stream;
use crate::wire::{HEADER_SIZE, Header, Incoming, Message, Outgoing, PagesHead, WireError};

/// Why a channel ended.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection is gone.
    #[error("the connection is lost")]
    Lost(#[source] io::Error),
    /// Nothing came for as long as a read may wait. The channel is as it was.
    #[error("nothing came for too long")]
    Quiet,
    /// There is no TLS with the other side.
    #[error("no TLS with the other side")]
    Tls(#[source] io::Error),
    /// The other side speaks TLS, and this one does not.
    #[error(
        "the other side speaks TLS, this connection is without: both need certificates (tls-dir), or neither"
    )]
    SpeaksTls,
    /// The other side ended the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// Pages came that nobody asked for, or twice.
    #[error("the other side sent pages {pages}, which nobody asked for")]
    Unasked {
        /// The pages.
        pages: crate::units::PageRange,
    },
    /// What came is not what may come.
    #[error("the other side does not keep to the protocol")]
    Protocol(#[from] WireError),
}

/// Shares a connection's descriptor between the two directions.
#[derive(Clone, Debug)]
struct Shared(Arc<Stream>);

impl Read for Shared {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(buffer)
    }
}

/// What comes in.
#[derive(Debug)]
pub struct Receiver {
    stream: BufReader<Shared>,
    /// Which frame may come when.
    pub incoming: Incoming,
    payload: Vec<u8>,
}

impl Receiver {
    /// Frames from `stream`, which begin as `incoming` says.
    pub fn new(stream: Arc<Stream>, incoming: Incoming) -> Self {
        Self {
            stream: BufReader::with_capacity(64 << 10, Shared(stream)),
            incoming,
            payload: Vec::new(),
        }
    }

    /// Waits for a message, for as long as the connection's time-out for reading says.
    pub fn receive(&mut self) -> Result<Message<'_>, ChannelError> {
        let mut header = [0; HEADER_SIZE];
        loop {
            match self.stream.read(&mut header[..1]) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Err(ChannelError::Quiet);
                }
                Err(error) => return Err(ChannelError::Lost(error)),
            }
        }
        let rest = self.stream.read_exact(&mut header[1..]);
        let header = match rest {
            Ok(()) => Header::decode(&header).map_err(|error| wrong_header(&header, error))?,
            // An alert of TLS is shorter than a header.
            Err(_) if is_tls(&header) => return Err(ChannelError::SpeaksTls),
            Err(error) => return Err(ChannelError::Lost(error)),
        };
        self.incoming.accept(&header)?;
        // No longer than the header's type allows, which `decode` has seen to.
        let length = header.length as usize;
        if self.payload.len() < length {
            self.payload.resize(length, 0);
        }
        let payload = &mut self.payload[..length];
        self.stream.read_exact(payload).map_err(ChannelError::Lost)?;
        Ok(Message::decode(&header, payload)?)
    }
}

/// Whether what came instead of a frame's header begins like a record of TLS: a handshake or an alert.
fn is_tls(bytes: &[u8; HEADER_SIZE]) -> bool {
    matches!(bytes, [0x15 | 0x16, 3, 0..=4, ..])
}

fn wrong_header(bytes: &[u8; HEADER_SIZE], error: WireError) -> ChannelError {
    match error {
        WireError::HeaderChecksum if is_tls(bytes) => ChannelError::SpeaksTls,
        error => error.into(),
    }
}

/// What goes out: either by [`Sender::send`] and [`Sender::send_pages`], which wait, or by [`Sender::post`], which does not.
#[derive(Debug)]
pub struct Sender {
    stream: Arc<Stream>,
    outgoing: Outgoing,
    buffer: Vec<u8>,
    /// What was posted and is not yet out.
    backlog: VecDeque<u8>,
}

/// What became of messages that were posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// They are out.
    Out,
    /// Some are not: [`Sender::push_out`] is to be called again when the connection takes more.
    Waiting,
}

impl Sender {
    /// Frames to `stream`.
    pub fn new(stream: Arc<Stream>) -> Self {
        Self {
            stream,
            outgoing: Outgoing::default(),
            buffer: Vec::new(),
            backlog: VecDeque::new(),
        }
    }

    /// Sends a message without waiting for the other side to read it: what the connection does not take now is kept.
    pub fn post(&mut self, message: &Message<'_>) -> Result<Posted, ChannelError> {
        self.buffer.clear();
        self.outgoing.append(message, &mut self.buffer)?;
        self.backlog.extend(&self.buffer);
        self.push_out()
    }

    /// Sends what was posted, as far as that is possible without waiting.
    pub fn push_out(&mut self) -> Result<Posted, ChannelError> {
        match self.try_push_out() {
            Ok(()) => Ok(Posted::Out),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Posted::Waiting),
            Err(error) => Err(ChannelError::Lost(error)),
        }
    }

    fn try_push_out(&mut self) -> io::Result<()> {
        while !self.backlog.is_empty() {
            let count = self
                .stream
                .try_write(&[IoSlice::new(self.backlog.as_slices().0)])?;
            self.backlog.drain(..count);
        }
        self.stream.try_flush()
    }

    /// Sends a message.
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), ChannelError> {
        self.buffer.clear();
        self.outgoing.append(message, &mut self.buffer)?;
        (&*self.stream)
            .write_all(&self.buffer)
            .map_err(ChannelError::Lost)
    }

    /// Sends a message without waiting in the connection: whenever that takes no more, `wait` is called.
    pub fn send_with(&mut self, message: &Message<'_>, wait: impl Wait) -> Result<(), ChannelError> {
        self.buffer.clear();
        self.outgoing.append(message, &mut self.buffer)?;
        write_all(&self.stream, &mut [IoSlice::new(&self.buffer)], wait).map_err(ChannelError::Lost)
    }

    /// Sends pages from where they are, as [`Self::send_with`] does: `data` is as long as `head` says.
    pub fn send_pages_with(
        &mut self,
        head: &PagesHead<'_>,
        data: &[IoSlice<'_>],
        wait: impl Wait,
    ) -> Result<(), ChannelError> {
        self.buffer.clear();
        head.encode(&mut self.buffer)?;
        self.outgoing.stamp(&mut self.buffer);
        let mut all: Vec<IoSlice<'_>> = Vec::with_capacity(1 + data.len());
        all.push(IoSlice::new(&self.buffer));
        all.extend_from_slice(data);
        write_all(&self.stream, &mut all, wait).map_err(ChannelError::Lost)
    }
}

/// Returns when the connection takes more, or with the error that the frame, and so the channel, ends with.
pub trait Wait: FnMut(&Stream) -> io::Result<()> {}

impl<F: FnMut(&Stream) -> io::Result<()>> Wait for F {}

fn write_all(stream: &Stream, mut slices: &mut [IoSlice<'_>], mut wait: impl Wait) -> io::Result<()> {
    // Nothing that is empty may lead: a write of nothing looks like the end.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match stream.try_write(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut slices, count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(stream)?,
            Err(error) => return Err(error),
        }
    }
    loop {
        match stream.try_flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(stream)?,
            flushed => return flushed,
        }
    }
}
