//! Fields one after the other, out of a payload and into one.

use super::{MAX_PAGES, MAX_RANGE_PAGES, MAX_TEXT, MessageType, WireError};
use crate::units::{PageIndex, PageRange};

/// What is left of a payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a> {
    pub(super) kind: MessageType,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn new(kind: MessageType, payload: &'a [u8]) -> Self {
        Self { kind, rest: payload }
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (array, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(WireError::Layout { kind: self.kind })?;
        self.rest = rest;
        Ok(*array)
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// `length` bytes.
    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], WireError> {
        let (bytes, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(WireError::Layout { kind: self.kind })?;
        self.rest = rest;
        Ok(bytes)
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// `N` bytes that are 0.
    pub(super) fn reserved<const N: usize>(&mut self) -> Result<(), WireError> {
        let bytes = self.array::<N>()?;
        if bytes.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            Err(self.wrong(
                "reserved bytes",
                u64::from(bytes.iter().fold(0, |all, byte| all | byte)),
            ))
        }
    }

    /// A start (u64) and a count (u32), in `limit` at most.
    pub(super) fn range(&mut self, limit: u64) -> Result<PageRange, WireError> {
        let start = self.u64()?;
        let count = self.u32()?;
        let range = PageRange::new(PageIndex(start), u64::from(count));
        check_range(self.kind, range, limit)?;
        Ok(range)
    }

    /// `length` bytes of text, `limit` at most.
    pub(super) fn text(
        &mut self,
        field: &'static str,
        length: usize,
        limit: usize,
    ) -> Result<&'a str, WireError> {
        let wrong = WireError::Text {
            kind: self.kind,
            field,
        };
        if length > limit {
            return Err(wrong);
        }
        let text = std::str::from_utf8(self.bytes(length)?).map_err(|_| wrong)?;
        if text.chars().any(char::is_control) {
            return Err(wrong);
        }
        Ok(text)
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(WireError::Layout { kind: self.kind })
        }
    }

    pub(super) fn wrong(&self, field: &'static str, value: u64) -> WireError {
        WireError::Field {
            kind: self.kind,
            field,
            value,
        }
    }
}

/// Whether a range can go on the wire.
pub(super) fn check_range(kind: MessageType, range: PageRange, limit: u64) -> Result<(), WireError> {
    let sound = range.count > 0
        && range.count <= limit
        && range
            .start
            .0
            .checked_add(range.count)
            .is_some_and(|end| end <= MAX_PAGES);
    if sound {
        Ok(())
    } else {
        Err(WireError::Range { kind, range })
    }
}

/// Appends what [`Fields::range`] reads.
pub(super) fn put_range(
    out: &mut Vec<u8>,
    kind: MessageType,
    range: PageRange,
    limit: u64,
) -> Result<(), WireError> {
    check_range(kind, range, limit.min(MAX_RANGE_PAGES))?;
    out.extend_from_slice(&range.start.0.to_le_bytes());
    out.extend_from_slice(&(range.count as u32).to_le_bytes());
    Ok(())
}

/// Appends the length (u16) of a text for people and the text: cut to what fits, without control characters.
pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    let at = out.len();
    out.extend_from_slice(&[0; 2]);
    let mut buffer = [0; 4];
    for char in text.chars() {
        let char = if char.is_control() { ' ' } else { char };
        let bytes = char.encode_utf8(&mut buffer).as_bytes();
        if out.len() - at - 2 + bytes.len() > MAX_TEXT {
            break;
        }
        out.extend_from_slice(bytes);
    }
    let length = (out.len() - at - 2) as u16;
    out[at..at + 2].copy_from_slice(&length.to_le_bytes());
}
