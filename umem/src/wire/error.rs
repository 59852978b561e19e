//! What can be wrong with a frame.

use super::{ChannelKind, MessageType, RefuseCode, Role, Version};
use crate::units::{PageIndex, PageRange};

/// Why bytes are not a frame, or a frame may not be sent or not come now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The header does not match its own checksum.
    #[error(
        "frame header does not match its checksum: the other side does not speak this protocol, or the stream is damaged"
    )]
    HeaderChecksum,
    /// The payload, without page data, does not match the checksum in the header.
    #[error("{kind} frame does not match its checksum")]
    PayloadChecksum {
        /// The frame's type.
        kind: MessageType,
    },
    /// A frame is missing, double or out of order.
    #[error("frame {got} where frame {expected} belongs: one is missing, double or out of order")]
    Sequence {
        /// The number that was due.
        expected: u32,
        /// The number in the header.
        got: u32,
    },
    /// The payload is longer or shorter than any of its type.
    #[error("{kind} frame with {length} bytes of payload, {min} to {max} are allowed")]
    Length {
        /// The frame's type.
        kind: MessageType,
        /// The payload's length.
        length: usize,
        /// The shortest payload of this type.
        min: usize,
        /// The longest payload of this type.
        max: usize,
    },
    /// The payload that was given for decoding is not as long as the header says.
    #[error("{kind} frame of {expected} bytes was given with {got} bytes of payload")]
    Payload {
        /// The frame's type.
        kind: MessageType,
        /// The length in the header.
        expected: usize,
        /// The bytes given.
        got: usize,
    },
    /// The payload ends before its content, or goes on after it.
    #[error("{kind} frame ends before its content or goes on after it")]
    Layout {
        /// The frame's type.
        kind: MessageType,
    },
    /// A type of message that is unknown and may not be skipped.
    #[error("unknown message type {0:#06x}, which may not be skipped")]
    UnknownMessage(u16),
    /// Flags that no frame of this version has.
    #[error("unknown flags {0:#06x}")]
    UnknownFlags(u16),
    /// The hello is not one.
    #[error("{kind} frame without the protocol's magic")]
    Magic {
        /// The frame's type.
        kind: MessageType,
    },
    /// The other side speaks another version.
    #[error("the other side speaks protocol version {0}, this program {own}", own = super::VERSION)]
    Version(Version),
    /// Pages of the other side are of another size.
    #[error("the other side has pages of {0} bytes, this program of {own}", own = crate::units::PAGE_SIZE)]
    PageSize(u32),
    /// A field has a value that it may not have.
    #[error("{kind} frame with {field} {value:#x}")]
    Field {
        /// The frame's type.
        kind: MessageType,
        /// The field's name.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A range that is empty, too long, or beyond all memory.
    #[error("{kind} frame with the range {range}, which is empty, too long or beyond all memory")]
    Range {
        /// The frame's type.
        kind: MessageType,
        /// The range.
        range: PageRange,
    },
    /// A text that is not UTF-8, too long, or has control characters in it.
    #[error("{kind} frame with a {field} that is too long, not UTF-8 or has control characters")]
    Text {
        /// The frame's type.
        kind: MessageType,
        /// The field's name.
        field: &'static str,
    },
    /// The data does not have the length that its checksums ask for.
    #[error("pages frame with {got} bytes of data where {expected} belong")]
    DataLength {
        /// What the checksums ask for; compressed data must be shorter.
        expected: usize,
        /// What is there.
        got: usize,
    },
    /// A page is not what its checksum says.
    #[error("page {page} does not match its checksum")]
    PageChecksum {
        /// The page.
        page: PageIndex,
    },
    /// Compressed data that does not decompress to what its checksums ask for.
    #[error("compressed pages do not decompress to the {expected} bytes that belong there")]
    Lz4 {
        /// The length that belongs there.
        expected: usize,
    },
    /// The caller's buffer is too small to decompress into.
    #[error("a buffer of {got} bytes is too small for {needed} bytes")]
    Buffer {
        /// What is needed.
        needed: usize,
        /// What the caller gave.
        got: usize,
    },
    /// The frame does not belong at this point of the channel.
    #[error("{kind} frame where {expected} belongs")]
    Unexpected {
        /// The frame's type.
        kind: MessageType,
        /// What belongs there.
        expected: &'static str,
    },
    /// The frame does not belong on this channel.
    #[error("{kind} frame from the {sender} on a {channel} channel")]
    Channel {
        /// The frame's type.
        kind: MessageType,
        /// The channel's kind.
        channel: ChannelKind,
        /// What the frame's sender is.
        sender: Role,
    },
    /// The frame belongs to a feature that was not agreed upon.
    #[error("{kind} frame without the feature that it belongs to having been agreed upon")]
    Feature {
        /// The frame's type.
        kind: MessageType,
    },
    /// The answer to the hello is not one to this hello.
    #[error("the other side's welcome has another {field} than the hello asked for")]
    Welcome {
        /// What differs.
        field: &'static str,
    },
}

impl WireError {
    /// What to refuse a hello with that could not be decoded or accepted because of this.
    pub const fn refuse_code(&self) -> RefuseCode {
        match self {
            Self::Version(_) => RefuseCode::WrongVersion,
            _ => RefuseCode::BadHello,
        }
    }
}
