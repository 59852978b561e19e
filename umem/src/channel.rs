//! A channel: frames over a connection, in both directions.

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
        match self.stream.read(&mut header[..1]) {
            Ok(0) => return Err(ChannelError::Closed),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Err(ChannelError::Quiet);
            }
            Err(error) => return Err(ChannelError::Lost(error)),
        }
        self.stream
            .read_exact(&mut header[1..])
            .map_err(ChannelError::Lost)?;
        let header = Header::decode(&header)?;
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

/// What goes out.
#[derive(Debug)]
pub struct Sender {
    stream: Arc<Stream>,
    outgoing: Outgoing,
    buffer: Vec<u8>,
}

impl Sender {
    /// Frames to `stream`.
    pub fn new(stream: Arc<Stream>) -> Self {
        Self {
            stream,
            outgoing: Outgoing::default(),
            buffer: Vec::new(),
        }
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
        match stream.write_now(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut slices, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(stream)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
