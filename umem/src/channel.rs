//! A channel: frames over a connection, in both directions.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;
use std::time::Duration;

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

/// Bytes received at a time, and room for as many small frames.
const READ: usize = 64 << 10;

/// What comes in: either by [`Receiver::receive`], which waits, or by [`Receiver::fill`] and [`Receiver::next_message`], which do not. A
/// frame of which a part has come is kept until the rest comes, whichever of them it comes by.
#[derive(Debug)]
pub struct Receiver {
    stream: Arc<Stream>,
    /// Which frame may come when.
    pub incoming: Incoming,
    buffer: Vec<u8>,
    /// What of the buffer was received and not yet given out.
    start: usize,
    end: usize,
    /// What those bytes begin with, if that was looked at: its payload is still to come, or a part of it.
    header: Option<Header>,
}

impl Receiver {
    /// Frames from `stream`, which begin as `incoming` says.
    pub fn new(stream: Arc<Stream>, incoming: Incoming) -> Self {
        Self {
            stream,
            incoming,
            buffer: vec![0; READ],
            start: 0,
            end: 0,
            header: None,
        }
    }

    /// Waits for a message, for as long as the connection's time-out for reading says.
    pub fn receive(&mut self) -> Result<Message<'_>, ChannelError> {
        while !self.has_frame()? {
            match self.fill_by(|mut stream, buffer| stream.read(buffer)) {
                Err(ChannelError::Quiet) if self.is_within_frame() => return Err(self.stuck()),
                filled => filled?,
            }
        }
        self.take_frame()
    }

    /// The same, for at most `patience`, which is that time-out. In a Unix socket it does not wait in a read: who does is woken
    /// not only when something comes but also whenever the other side has read something (the kernel's `unix_write_space`
    /// wakes all who sleep on the socket). For a server that would be once for each answer, and its client would wait for that.
    pub fn receive_within(&mut self, patience: Duration) -> Result<Message<'_>, ChannelError> {
        if let Stream::Unix(_) = &*self.stream {
            while !self.has_frame()? {
                let came = self.stream.wait_to_read(patience).map_err(ChannelError::Lost)?;
                if !came && self.is_within_frame() {
                    return Err(self.stuck());
                }
                if !came {
                    return Err(ChannelError::Quiet);
                }
                self.fill()?;
            }
        }
        self.receive()
    }

    /// Receives what has come, without waiting, of which [`Self::next_message`] then has all that is whole. False: nothing has.
    pub fn fill(&mut self) -> Result<bool, ChannelError> {
        match self.fill_by(Stream::try_read) {
            Ok(()) => Ok(true),
            Err(ChannelError::Quiet) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The next message, if all of it was received.
    pub fn next_message(&mut self) -> Result<Option<Message<'_>>, ChannelError> {
        if self.has_frame()? {
            self.take_frame().map(Some)
        } else {
            Ok(None)
        }
    }

    /// Whether a part of a frame has come, and not the rest.
    pub fn is_within_frame(&self) -> bool {
        self.start < self.end
    }

    /// What it is that the rest of a frame does not come.
    pub fn stuck(&self) -> ChannelError {
        let text = "the rest of a frame does not come";
        self.broken(io::Error::new(io::ErrorKind::WouldBlock, text))
    }

    /// The end in the middle of a frame. An alert of TLS is shorter than a header.
    fn broken(&self, error: io::Error) -> ChannelError {
        if self.header.is_none() && is_tls(&self.buffer[self.start..self.end]) {
            ChannelError::SpeaksTls
        } else {
            ChannelError::Lost(error)
        }
    }

    /// Whether all of the next frame is in the buffer. Its header is looked at, once, before there is room for its payload.
    fn has_frame(&mut self) -> Result<bool, ChannelError> {
        let received = &self.buffer[self.start..self.end];
        if self.header.is_none()
            && let Some(bytes) = received.first_chunk::<HEADER_SIZE>()
        {
            let header = Header::decode(bytes).map_err(|error| wrong_header(bytes, error))?;
            self.incoming.accept(&header)?;
            self.header = Some(header);
        }
        Ok(self.header.is_some() && received.len() >= self.needed())
    }

    /// Bytes of the next frame, or of its header if that has not come. No more than its type allows, which `decode` has seen to.
    fn needed(&self) -> usize {
        HEADER_SIZE + self.header.map_or(0, |header| header.length as usize)
    }

    fn take_frame(&mut self) -> Result<Message<'_>, ChannelError> {
        let frame = self.start..self.start + self.needed();
        let Some(header) = self.header.take() else {
            // Only called when there is one.
            return Err(ChannelError::Quiet);
        };
        self.start = frame.end;
        Ok(Message::decode(&header, &self.buffer[frame][HEADER_SIZE..])?)
    }

    /// Receives some bytes by `read`, once.
    fn fill_by(
        &mut self,
        read: impl Fn(&Stream, &mut [u8]) -> io::Result<usize>,
    ) -> Result<(), ChannelError> {
        let needed = self.needed();
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start + needed > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.buffer.len() < needed {
            self.buffer.resize(needed, 0);
        }
        // Not much more than the frame: what is behind it has to be moved where there is no room for the rest of that.
        let left = (self.start + needed).saturating_sub(self.end);
        let room = self.end..(self.end + left.max(READ)).min(self.buffer.len());
        if room.is_empty() {
            // Full of frames that nobody has taken.
            return Ok(());
        }
        let count = loop {
            match read(&self.stream, &mut self.buffer[room.clone()]) {
                Ok(0) if self.start == self.end => return Err(ChannelError::Closed),
                Ok(0) => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => break count,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Err(ChannelError::Quiet),
                    _ if self.start == self.end => return Err(ChannelError::Lost(error)),
                    _ => return Err(self.broken(error)),
                },
            }
        };
        self.end += count;
        Ok(())
    }
}

/// Whether what came instead of a frame's header begins like a record of TLS: a handshake or an alert.
fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x15 | 0x16, 3, 0..=4, ..])
}

fn wrong_header(bytes: &[u8; HEADER_SIZE], error: WireError) -> ChannelError {
    match error {
        WireError::HeaderChecksum if is_tls(bytes) => ChannelError::SpeaksTls,
        error => error.into(),
    }
}

/// What goes out: either by [`Sender::send`] and [`Sender::send_pages_with`], which wait, or by [`Sender::post`], which does not.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{PAGE_SIZE, PageIndex, PageRange};
    use crate::wire::{
        ChannelKind, Checksums, Encoding, Epoch, Features, MAX_PAGES_PER_FRAME, Pages, RequestId, Role,
    };
    use proptest::prelude::*;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Receiver) {
        let (there, here) = UnixStream::pair().unwrap();
        let mut receiver = Receiver::new(Arc::new(Stream::Unix(here)), Incoming::connector());
        receiver
            .incoming
            .open(ChannelKind::Demand, Role::Provider, Features::NONE);
        (there, receiver)
    }

    /// Frames of as many pages each, each page with the frame's number; none for a ping.
    fn frames(pages: &[usize]) -> Vec<Vec<u8>> {
        let mut outgoing = Outgoing::default();
        let frame = |(number, count): (usize, &usize)| {
            let mut frame = Vec::new();
            let data = vec![number as u8 + 1; count * PAGE_SIZE];
            let checksums: Vec<u64> = data.chunks(PAGE_SIZE).map(crate::image::checksum).collect();
            let message = match count {
                0 => Message::Ping { token: number as u64 },
                _ => Message::Pages(Pages {
                    request: RequestId(1),
                    range: PageRange::new(PageIndex(number as u64), *count as u64),
                    epoch: Epoch(0),
                    encoding: Encoding::Raw,
                    checksums: Checksums::from(&checksums[..]),
                    data: &data,
                }),
            };
            outgoing.append(&message, &mut frame).unwrap();
            frame
        };
        pages.iter().enumerate().map(frame).collect()
    }

    fn is_frame(message: &Message<'_>, number: usize, count: usize) -> bool {
        match message {
            Message::Ping { token } => count == 0 && *token == number as u64,
            Message::Pages(pages) => {
                pages.range.start.0 == number as u64
                    && pages.data.len() == count * PAGE_SIZE
                    && pages.data.iter().all(|byte| *byte == number as u8 + 1)
            }
            _ => false,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// However a connection cuts frames, and whichever way they are received: they are what was sent.
        #[test]
        fn frames_come_whole(
            sizes in proptest::collection::vec(prop_oneof![4 => Just(0), 4 => 1..3_usize, 1 => Just(MAX_PAGES_PER_FRAME)], 1..12),
            cuts in proptest::collection::vec((1..40_000_usize, any::<bool>()), 1..200),
        ) {
            let (mut there, mut receiver) = pair();
            let frames = frames(&sizes);
            let (mut sent, mut got) = (0, 0);
            let bytes = frames.concat();
            for (length, waits) in cuts {
                let piece = &bytes[sent..(sent + length).min(bytes.len())];
                there.write_all(piece).unwrap();
                sent += piece.len();
                let mut whole = 0;
                let there_is = frames.iter().take_while(|frame| { whole += frame.len(); whole <= sent }).count();
                // All that has come, without waiting, or waiting for what is known to have come.
                if waits {
                    while got < there_is {
                        prop_assert!(is_frame(&receiver.receive().unwrap(), got, sizes[got]));
                        got += 1;
                    }
                    // Or the connection would be full.
                    while receiver.fill().unwrap() {
                        prop_assert!(receiver.next_message().unwrap().is_none());
                    }
                } else {
                    loop {
                        while let Some(message) = receiver.next_message().unwrap() {
                            prop_assert!(is_frame(&message, got, sizes[got]));
                            got += 1;
                        }
                        if !receiver.fill().unwrap() {
                            break;
                        }
                    }
                }
                prop_assert_eq!(got, there_is);
            }
            drop(there);
            let rest = sent - frames.iter().take(got).map(Vec::len).sum::<usize>();
            let error = receiver.receive().unwrap_err();
            prop_assert_eq!(matches!(error, ChannelError::Closed), rest == 0, "{}", error);
        }
    }

    #[test]
    fn silence_is_no_loss_but_within_a_frame() {
        let (mut there, mut receiver) = pair();
        let patience = Duration::from_millis(20);
        receiver.stream.set_timeouts(Some(patience), None).unwrap();
        assert!(matches!(receiver.receive(), Err(ChannelError::Quiet)));
        assert!(matches!(
            receiver.receive_within(patience),
            Err(ChannelError::Quiet)
        ));
        let frames = frames(&[0, 1]);
        there.write_all(&frames[0]).unwrap();
        assert!(is_frame(&receiver.receive_within(patience).unwrap(), 0, 0));
        there.write_all(&frames[1][..40]).unwrap();
        assert!(matches!(receiver.receive(), Err(ChannelError::Lost(_))));
        assert!(matches!(
            receiver.receive_within(patience),
            Err(ChannelError::Lost(_))
        ));
        there.write_all(&frames[1][40..]).unwrap();
        assert!(is_frame(&receiver.receive_within(patience).unwrap(), 1, 1));
    }
}
