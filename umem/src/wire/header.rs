//! The header before every payload.

use xxhash_rust::xxh3::xxh3_64;

use super::codes::codes;
use super::{
    Features, MAX_BITMAP_PAGES, MAX_HELLO, MAX_METADATA, MAX_PAGES_PER_FRAME, MAX_PAYLOAD, MAX_RANGES,
    MAX_REQUEST_RANGES, MAX_TEXT, WireError,
};
use crate::units::PAGE_SIZE;

/// Bytes in a header.
pub const HEADER_SIZE: usize = 32;

/// Flag: who does not know the message may skip it.
pub const SKIPPABLE: u16 = 1;

/// Where the payload's checksum, the sequence number and the header's own checksum are.
const SEQUENCE_AT: usize = 24;
const CHECKSUM_AT: usize = 28;

codes! {
    /// What a frame is. The high byte is the group; 0x04 is about moving machines, 0xf0 for trials.
    pub enum MessageType {
        /// [`Hello`](super::Hello), the first frame on every channel.
        Hello = 0x0001 => "hello",
        /// [`Welcome`](super::Welcome), the answer to it.
        Welcome = 0x0002 => "welcome",
        /// [`Refused`](super::Refused), the other answer to it.
        Refused = 0x0003 => "refusal",
        /// [`Goodbye`](super::Goodbye): the sender starts nothing new.
        Goodbye = 0x0004 => "goodbye",
        /// Are you there?
        Ping = 0x0101 => "ping",
        /// Yes.
        Pong = 0x0102 => "pong",
        /// Everything sent before it on this channel comes before it.
        Barrier = 0x0103 => "barrier",
        /// Everything before that barrier has been dealt with.
        BarrierAck = 0x0104 => "barrier acknowledgement",
        /// [`Request`](super::Request) for pages.
        Request = 0x0201 => "request",
        /// [`Pages`](super::Pages), asked for or pushed.
        Pages = 0x0202 => "pages",
        /// [`Zero`](super::Zero): pages that are zero.
        Zero = 0x0203 => "zero pages",
        /// [`Failed`](super::Failed): pages that cannot be had.
        Failed = 0x0204 => "failed pages",
        /// Pages that the fetcher no longer wants.
        Cancel = 0x0205 => "cancel",
        /// Pages whose content sent before is no longer right.
        Discard = 0x0206 => "discard",
        /// Where the guest is.
        Locality = 0x0207 => "locality",
        /// [`BitmapRequest`](super::BitmapRequest).
        BitmapRequest = 0x0301 => "bitmap request",
        /// [`Bitmap`](super::Bitmap).
        Bitmap = 0x0302 => "bitmap",
        /// What does a VMM have to know to start this image?
        MetadataRequest = 0x0303 => "metadata request",
        /// This.
        Metadata = 0x0304 => "metadata",
        /// What machine is about to move.
        Machine = 0x0401 => "machine",
        /// All of its state but RAM.
        State = 0x0402 => "machine state",
        /// [`Handover`](super::Handover): whose it is.
        Handover = 0x0403 => "handover",
    }
}

impl MessageType {
    /// The shortest and the longest payload.
    pub const fn payload_bounds(self) -> (usize, usize) {
        match self {
            Self::Hello | Self::Welcome => (104, MAX_HELLO),
            Self::Refused => (16, MAX_HELLO),
            Self::Goodbye => (4, 4 + MAX_TEXT),
            Self::Ping | Self::Pong | Self::BarrierAck | Self::MetadataRequest => (0, 0),
            Self::Barrier | Self::Locality => (8, 8),
            Self::Request => (16, 16 * MAX_REQUEST_RANGES),
            Self::Pages => (32, 24 + MAX_PAGES_PER_FRAME * (8 + PAGE_SIZE)),
            Self::Zero | Self::BitmapRequest => (24, 24),
            Self::Failed => (16, 16 + MAX_TEXT),
            Self::Cancel => (16, 16 * MAX_RANGES),
            Self::Discard => (24, 8 + 16 * MAX_RANGES),
            Self::Bitmap => (17, 16 + MAX_BITMAP_PAGES as usize / 8),
            Self::Metadata => (0, MAX_METADATA),
            Self::Machine | Self::State => (1, MAX_METADATA),
            Self::Handover => (8, 8 + MAX_TEXT),
            Self::Other(_) => (0, MAX_PAYLOAD),
        }
    }

    /// The feature without which it is not sent.
    pub const fn feature(self) -> Features {
        match self {
            Self::Cancel => Features::CANCEL,
            Self::Discard => Features::DISCARD,
            Self::Locality => Features::LOCALITY,
            Self::Machine | Self::State | Self::Handover => Features::HANDOVER,
            _ => Features::NONE,
        }
    }

    /// The flags that it is sent with.
    pub(super) const fn flags(self) -> u16 {
        match self {
            Self::Locality | Self::Other(_) => SKIPPABLE,
            _ => 0,
        }
    }

    const fn id_is_valid(self, id: u64) -> bool {
        match self {
            Self::Request | Self::BitmapRequest | Self::Bitmap | Self::MetadataRequest | Self::Metadata => {
                id != 0
            }
            Self::Hello
            | Self::Welcome
            | Self::Refused
            | Self::Goodbye
            | Self::Cancel
            | Self::Discard
            | Self::Locality
            | Self::Machine
            | Self::State
            | Self::Handover => id == 0,
            // Tokens and numbers, and pages that may be pushed.
            _ => true,
        }
    }
}

/// What precedes a payload.
///
/// ```text
/// offset  size  field
///      0     4  length of the payload
///      4     2  message type
///      6     2  flags: bit 0, who does not know the type may skip it; the others 0
///      8     8  id: of the request, the token of a ping, the number of a barrier; else 0
///     16     8  xxh3-64 of the payload; of a pages frame only up to its data
///     24     4  sequence number: how many frames this side has sent on this channel before, modulo 2^32
///     28     4  xxh3-64 of the header up to here, its low half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the payload in bytes.
    pub length: u32,
    /// What the payload is.
    pub kind: MessageType,
    /// [`SKIPPABLE`] or nothing.
    pub flags: u16,
    /// Request, token or barrier number.
    pub id: u64,
    /// Checksum of the payload, without page data.
    pub payload_checksum: u64,
    /// How many frames the sender sent before on this channel.
    pub sequence: u32,
}

impl Header {
    /// The header for a payload, as the first of a channel.
    pub fn for_payload(kind: MessageType, id: u64, payload: &[u8]) -> Self {
        Self {
            length: payload.len() as u32,
            kind,
            flags: kind.flags(),
            id,
            payload_checksum: xxh3_64(covered(kind, payload)),
            sequence: 0,
        }
    }

    /// The header as it is sent.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.length.to_le_bytes());
        put(4, &self.kind.code().to_le_bytes());
        put(6, &self.flags.to_le_bytes());
        put(8, &self.id.to_le_bytes());
        put(16, &self.payload_checksum.to_le_bytes());
        stamp(&mut bytes, self.sequence);
        bytes
    }

    /// Reads a header, and checks all that can be said without the payload: who goes on to read a payload of this length
    /// reads no more than [`MAX_PAYLOAD`] and no more than this type may have.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Self, WireError> {
        let u16_at = |at: usize| u16::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if u32_at(CHECKSUM_AT) != checksum_of(bytes) {
            return Err(WireError::HeaderChecksum);
        }
        let header = Self {
            length: u32_at(0),
            kind: MessageType::from_code(u16_at(4)),
            flags: u16_at(6),
            id: u64_at(8),
            payload_checksum: u64_at(16),
            sequence: u32_at(SEQUENCE_AT),
        };
        if header.flags & !SKIPPABLE != 0 {
            return Err(WireError::UnknownFlags(header.flags));
        }
        if let MessageType::Other(code) = header.kind
            && header.flags & SKIPPABLE == 0
        {
            return Err(WireError::UnknownMessage(code));
        }
        check_length(header.kind, header.length as usize)?;
        check_id(header.kind, header.id)?;
        Ok(header)
    }

    /// Whether `payload` is the one that this header was made for; page data is not looked at.
    pub(super) fn check_payload(&self, payload: &[u8]) -> Result<(), WireError> {
        if payload.len() != self.length as usize {
            return Err(WireError::Payload {
                kind: self.kind,
                expected: self.length as usize,
                got: payload.len(),
            });
        }
        if xxh3_64(covered(self.kind, payload)) != self.payload_checksum {
            return Err(WireError::PayloadChecksum { kind: self.kind });
        }
        Ok(())
    }
}

pub(super) fn check_length(kind: MessageType, length: usize) -> Result<(), WireError> {
    let (min, max) = kind.payload_bounds();
    if (min..=max).contains(&length) {
        Ok(())
    } else {
        Err(WireError::Length {
            kind,
            length,
            min,
            max,
        })
    }
}

pub(super) fn check_id(kind: MessageType, id: u64) -> Result<(), WireError> {
    if kind.id_is_valid(id) {
        Ok(())
    } else {
        Err(WireError::Field {
            kind,
            field: "id",
            value: id,
        })
    }
}

/// Writes the sequence number into the header that `frame` begins with.
pub(super) fn stamp(frame: &mut [u8], sequence: u32) {
    frame[SEQUENCE_AT..CHECKSUM_AT].copy_from_slice(&sequence.to_le_bytes());
    let checksum = checksum_of(frame);
    frame[CHECKSUM_AT..HEADER_SIZE].copy_from_slice(&checksum.to_le_bytes());
}

fn checksum_of(frame: &[u8]) -> u32 {
    xxh3_64(&frame[..CHECKSUM_AT]) as u32
}

/// The part of a payload that the checksum in the header covers.
fn covered(kind: MessageType, payload: &[u8]) -> &[u8] {
    let end = match kind {
        MessageType::Pages => super::pages::head_length(payload),
        _ => payload.len(),
    };
    payload.get(..end).unwrap_or(payload)
}
