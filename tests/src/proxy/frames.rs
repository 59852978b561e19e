//! A byte stream cut into the frames that it is made of.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use umem::units::PageIndex;
use umem::wire::{ChannelKind, HEADER_SIZE, Header, Message, MessageType};

/// Read at a time.
const CHUNK: usize = 64 << 10;

/// The frames of one direction of a connection.
#[derive(Debug, Default)]
pub(super) struct Frames {
    bytes: Vec<u8>,
    /// What came is no frame, so neither is what comes after it: it goes through as it comes.
    opaque: bool,
    ended: bool,
}

impl Frames {
    /// The next frame, or what is left where the stream ends within one. `None`: nothing more comes.
    pub(super) fn next(&mut self, from: &OwnedFd) -> Option<Vec<u8>> {
        loop {
            let length = self.length();
            if self.bytes.len() >= length && !self.bytes.is_empty() {
                return Some(self.bytes.drain(..length).collect());
            }
            if self.ended {
                let rest = std::mem::take(&mut self.bytes);
                return (!rest.is_empty()).then_some(rest);
            }
            self.fill(from);
        }
    }

    /// Whether the next one is here already.
    pub(super) fn is_ready(&mut self) -> bool {
        let length = self.length();
        !self.bytes.is_empty() && self.bytes.len() >= length
    }

    /// How many bytes the frame at the front has, as far as one can tell.
    fn length(&mut self) -> usize {
        if self.opaque {
            return self.bytes.len();
        }
        let Some(header) = self.bytes.first_chunk::<HEADER_SIZE>() else {
            return HEADER_SIZE;
        };
        if let Ok(header) = Header::decode(header) {
            HEADER_SIZE + header.length as usize
        } else {
            self.opaque = true;
            self.bytes.len()
        }
    }

    fn fill(&mut self, from: &OwnedFd) {
        let at = self.bytes.len();
        self.bytes.resize(at + CHUNK, 0);
        let got = loop {
            match recv(from, &mut self.bytes[at..], RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                // A connection that was reset has nothing more either.
                result => break result.map_or(0, |(length, _)| length),
            }
        };
        self.bytes.truncate(at + got);
        self.ended = got == 0;
    }
}

/// The header of a frame that is one.
pub(super) fn header(frame: &[u8]) -> Option<Header> {
    Header::decode(frame.first_chunk()?).ok()
}

/// What a frame that is one says.
pub(super) fn message(frame: &[u8]) -> Option<Message<'_>> {
    Message::decode(&header(frame)?, &frame[HEADER_SIZE..]).ok()
}

/// The channel that a hello opens.
pub(super) fn channel(frame: &[u8]) -> Option<ChannelKind> {
    if header(frame)?.kind != MessageType::Hello {
        return None;
    }
    match message(frame)? {
        Message::Hello(hello) => Some(hello.channel),
        _ => None,
    }
}

/// Gives a frame that is one a higher number.
pub(super) fn add_to_number(frame: &mut [u8], distance: u32) {
    if let Some(mut header) = header(frame) {
        header.sequence = header.sequence.wrapping_add(distance);
        frame[..HEADER_SIZE].copy_from_slice(&header.encode());
    }
}

/// The pages whose data has this byte of a frame, as far as one can tell; none, where it is no data of pages.
pub(super) fn pages_at(frame: &[u8], byte: usize) -> Vec<PageIndex> {
    let Some(Message::Pages(pages)) = message(frame) else {
        return Vec::new();
    };
    let Some(offset) = byte.checked_sub(frame.len() - pages.data.len()) else {
        return Vec::new();
    };
    let filled = pages
        .range
        .pages()
        .zip(pages.checksums.iter())
        .filter(|(_, checksum)| *checksum != 0)
        .map(|(page, _)| page);
    match pages.encoding {
        umem::wire::Encoding::Raw => filled.skip(offset / umem::units::PAGE_SIZE).take(1).collect(),
        umem::wire::Encoding::Lz4 => filled.collect(),
    }
}
