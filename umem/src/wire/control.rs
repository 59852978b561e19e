//! The end of a channel, and what is said about pages without sending them.

use super::codes::codes;
use super::fields::{Fields, check_range, put_range, put_text};
use super::{BITMAP_ALIGNMENT, MAX_BITMAP_PAGES, MAX_PAGES, MAX_TEXT, MessageType, RequestId, WireError};
use crate::units::{PageIndex, PageRange};

codes! {
    /// Why a side says goodbye.
    pub enum GoodbyeReason {
        /// All is done.
        Done = 1 => "done",
        /// It is about to end; try another one.
        Draining = 2 => "about to end",
        /// The other side did what it must not do.
        ProtocolError = 3 => "protocol error",
        /// The image was replaced or damaged while it was served.
        BadImage = 4 => "the image cannot be used any more",
        /// Its operator wants it.
        Stopped = 5 => "stopped",
    }
}

/// The sender starts nothing new on this channel; it still answers what it was asked.
///
/// ```text
/// offset  size  field
///      0     2  reason
///      2     2  length of the text, at most 512
///      4     n  text for people, UTF-8
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goodbye<'a> {
    /// Why.
    pub reason: GoodbyeReason,
    /// Why, for people.
    pub text: &'a str,
}

impl<'a> Goodbye<'a> {
    pub(super) fn decode(mut fields: Fields<'a>) -> Result<Self, WireError> {
        let reason = GoodbyeReason::from_code(fields.u16()?);
        let length = usize::from(fields.u16()?);
        let text = fields.text("text", length, MAX_TEXT)?;
        fields.end()?;
        Ok(Self { reason, text })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.reason.code().to_le_bytes());
        put_text(out, self.text);
    }
}

/// What a bit that is set says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BitmapKind {
    /// The fetcher has the page, in the newest epoch that it knows.
    Received,
    /// The page is not all zero at the provider.
    Data,
}

impl BitmapKind {
    const fn code(self) -> u16 {
        match self {
            Self::Received => 1,
            Self::Data => 2,
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        match fields.u16()? {
            1 => Ok(Self::Received),
            2 => Ok(Self::Data),
            code => Err(fields.wrong("bitmap", u64::from(code))),
        }
    }
}

/// Asks for a bitmap. It is answered by [`Bitmap`] frames that cover the range once, in order, or by one
/// [`Failed`](super::Failed).
///
/// ```text
/// offset  size  field
///      0     8  first page, a multiple of 64
///      8     8  pages, at least 1
///     16     2  bitmap: 1 received, 2 data
///     18     6  reserved, 0
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapRequest {
    /// Not 0, and not that of another request in flight on this channel.
    pub request: RequestId,
    /// Which one.
    pub kind: BitmapKind,
    /// For which pages.
    pub range: PageRange,
}

impl BitmapRequest {
    pub(super) fn decode(request: RequestId, mut fields: Fields<'_>) -> Result<Self, WireError> {
        let range = PageRange::new(PageIndex(fields.u64()?), fields.u64()?);
        check_bitmap(fields.kind, range, MAX_PAGES)?;
        let kind = BitmapKind::decode(&mut fields)?;
        fields.reserved::<6>()?;
        fields.end()?;
        Ok(Self { request, kind, range })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        check_bitmap(MessageType::BitmapRequest, self.range, MAX_PAGES)?;
        out.extend_from_slice(&self.range.start.0.to_le_bytes());
        out.extend_from_slice(&self.range.count.to_le_bytes());
        out.extend_from_slice(&self.kind.code().to_le_bytes());
        out.extend_from_slice(&[0; 6]);
        Ok(())
    }
}

/// A bit for each page of a range.
///
/// ```text
/// offset  size  field
///      0     8  first page, a multiple of 64
///      8     4  pages n, 1 to 524288
///     12     2  bitmap: 1 received, 2 data
///     14     2  reserved, 0
///     16   n/8  bits, rounded up to a byte: page i is bit i % 8 of byte i / 8; bits beyond the last page are 0
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap<'a> {
    /// What is answered.
    pub request: RequestId,
    /// Which one.
    pub kind: BitmapKind,
    /// For which pages, at most [`MAX_BITMAP_PAGES`].
    pub range: PageRange,
    /// The bits.
    pub bits: &'a [u8],
}

impl<'a> Bitmap<'a> {
    /// The pages whose bit is set, in as few ranges as can be.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + use<'a> {
        let Self { range, bits, .. } = *self;
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = find(bits, next, range.count, true)?;
            next = find(bits, start, range.count, false).unwrap_or(range.count);
            Some(PageRange::new(range.start.advance(start), next - start))
        })
    }

    pub(super) fn decode(request: RequestId, mut fields: Fields<'a>) -> Result<Self, WireError> {
        let range = fields.range(MAX_BITMAP_PAGES)?;
        let kind = BitmapKind::decode(&mut fields)?;
        fields.reserved::<2>()?;
        let bits = fields.rest();
        check_bits(fields.kind, range, bits)?;
        Ok(Self {
            request,
            kind,
            range,
            bits,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        check_bits(MessageType::Bitmap, self.range, self.bits)?;
        put_range(out, MessageType::Bitmap, self.range, MAX_BITMAP_PAGES)?;
        out.extend_from_slice(&self.kind.code().to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(self.bits);
        Ok(())
    }
}

/// The first bit at or after `from` and before `end` that is `set`.
fn find(bits: &[u8], from: u64, end: u64, set: bool) -> Option<u64> {
    let skip = if set { 0 } else { u8::MAX };
    let mut at = from;
    while at < end {
        let byte = *bits.get((at / 8) as usize)?;
        if byte == skip {
            at = (at / 8 + 1) * 8;
        } else if (byte >> (at % 8) & 1 == 1) == set {
            return Some(at);
        } else {
            at += 1;
        }
    }
    None
}

fn check_bitmap(kind: MessageType, range: PageRange, limit: u64) -> Result<(), WireError> {
    check_range(kind, range, limit)?;
    if range.start.0.is_multiple_of(BITMAP_ALIGNMENT) {
        Ok(())
    } else {
        Err(WireError::Field {
            kind,
            field: "first page",
            value: range.start.0,
        })
    }
}

fn check_bits(kind: MessageType, range: PageRange, bits: &[u8]) -> Result<(), WireError> {
    check_bitmap(kind, range, MAX_BITMAP_PAGES)?;
    if bits.len() as u64 != range.count.div_ceil(8) {
        return Err(WireError::Layout { kind });
    }
    match (range.count % 8, bits.last()) {
        (used @ 1.., Some(last)) if last >> used != 0 => Err(WireError::Field {
            kind,
            field: "bits beyond the last page",
            value: u64::from(*last),
        }),
        _ => Ok(()),
    }
}
