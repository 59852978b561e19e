//! What page servers, pagers and migrating machines say to each other: frames, and nothing else. No sockets, no threads, no
//! clocks.
//!
//! A session joins two sides, a [`Role::Provider`] that has pages and a [`Role::Fetcher`] that wants them, by several channels,
//! each a byte stream of its own (a Unix socket, TCP, TLS over TCP). Every channel starts with a hello, and after it carries
//! frames in both directions. Every frame is a header of 32 bytes and a payload; everything is little-endian:
//!
//! ```text
//!  0        4        8                16               24       28       32
//!  +--------+---+----+----------------+----------------+--------+--------+---------...---+
//!  | length |typ|flag| id             | payload check  | seq    | header | payload       |
//!  |  u32   |u16|u16 | u64            | u64            | u32    | check  | length bytes  |
//!  +--------+---+----+----------------+----------------+--------+--------+---------...---+
//! ```
//!
//! A channel, as each of its sides sees it:
//!
//! ```text
//!              connector sends Hello,            Goodbye sent or received:
//!              acceptor answers Welcome          what was asked is still answered
//!   +---------+        +---------+         +----------+  both said Goodbye,    +--------+
//!   | hello   |------->| open    |-------->| draining |--all requests answered->| closed |
//!   +---------+        +---------+         +----------+                        +--------+
//!        | Refused          | stream ends, or anything wrong   |                   ^
//!        +------------------+----------------------------------+-------------------+
//!                                   (a lost link: call again with the session's id)
//! ```
//!
//! What happens to a byte that is not what was sent:
//!
//! * the header has a checksum of its own, so that a length is believed only when it is right;
//! * the payload has one, which the header holds. It covers everything but page data, so that no damage can put a right page
//!   in a wrong place;
//! * page data is covered page by page, by the same checksums as in images;
//! * frames are numbered, so that one that is lost, doubled or out of order is noticed at the next.
//!
//! The whole protocol is described in `docs/protocol.md`. In this module, from the top: [`Message`] is a frame's content,
//! [`Header`] what precedes it, [`Outgoing`] and [`Incoming`] are the two directions of a channel.
//!
//! ```
//! use umem::units::{PageIndex, PageRange};
//! use umem::wire::{Header, HEADER_SIZE, Message, Outgoing, Request, RequestId};
//!
//! let mut bytes = Vec::new();
//! let mut outgoing = Outgoing::default();
//! let ranges = [PageRange::new(PageIndex(7), 256)];
//! let request = Request { request: RequestId(1), ranges: (&ranges[..]).into() };
//! outgoing.append(&Message::Request(request), &mut bytes)?;
//!
//! let (header, payload) = bytes.split_first_chunk::<HEADER_SIZE>().unwrap();
//! let header = Header::decode(header)?;
//! assert_eq!(payload.len(), header.length as usize);
//! assert_eq!(Message::decode(&header, payload)?, Message::Request(request));
//! # Ok::<(), umem::wire::WireError>(())
//! ```

mod channel;
mod codec;
mod codes;
mod control;
mod error;
mod fields;
mod header;
mod hello;
pub mod lz4;
mod machine;
mod pages;
#[cfg(test)]
mod tests;
mod views;

pub use channel::{Incoming, Outgoing};
pub use codec::Message;
pub use control::{Bitmap, BitmapKind, BitmapRequest, Goodbye, GoodbyeReason};
pub use error::WireError;
pub use header::{HEADER_SIZE, Header, MessageType, SKIPPABLE};
pub use hello::{
    ChannelKind, Features, Hello, RefuseCode, Refused, Role, SessionId, VERSION, Version, Welcome,
};
pub use machine::{Handover, Step};
pub use pages::{Encoding, FailCode, Failed, Pages, PagesHead, Request, Run, Runs, Unpacked, Zero};
pub use views::{Checksums, Ranges};

/// The most pages that one [`Pages`] frame carries: 1 MiB of data.
pub const MAX_PAGES_PER_FRAME: usize = 256;
/// The longest payload of any frame, also of one of an unknown type.
pub const MAX_PAYLOAD: usize = (1 << 20) + 4096;
/// The most ranges in a [`Request`].
pub const MAX_REQUEST_RANGES: usize = 256;
/// The most pages that all ranges of a [`Request`] have together: 16 MiB.
pub const MAX_REQUEST_PAGES: u64 = 4096;
/// The most ranges in a cancel or a discard.
pub const MAX_RANGES: usize = 4096;
/// No page has this index or a higher one: an image has fewer than 2^44 pages.
pub const MAX_PAGES: u64 = 1 << 44;
/// The most pages that one range on the wire has.
pub const MAX_RANGE_PAGES: u64 = u32::MAX as u64;
/// The most pages that one [`Bitmap`] frame speaks of: 64 KiB of bits, 2 GiB of memory.
pub const MAX_BITMAP_PAGES: u64 = 1 << 19;
/// Bitmaps start at a multiple of this many pages.
pub const BITMAP_ALIGNMENT: u64 = 64;
/// The longest metadata.
pub const MAX_METADATA: usize = crate::image::MAX_METADATA;
/// The longest name of an image, in bytes.
pub const MAX_NAME: usize = 255;
/// The longest text for people, in bytes; what is longer is cut when it is encoded.
pub const MAX_TEXT: usize = 512;
/// The longest payload of a hello and of its answers, whatever a later version adds to them.
pub const MAX_HELLO: usize = 1024;

/// Names a request on the channel that it was sent on. Its sender chooses it; it may be used again once the request is complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

impl RequestId {
    /// What nobody asked for: the id of pushed pages.
    pub const PUSH: Self = Self(0);
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How old a page is: the provider counts up when it discards what it sent before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
