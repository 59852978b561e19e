//! Asking for pages, and what comes back.

use super::codes::codes;
use super::fields::{Fields, put_range, put_text};
use super::{
    Checksums, Epoch, MAX_PAGES_PER_FRAME, MAX_RANGE_PAGES, MAX_REQUEST_PAGES, MAX_REQUEST_RANGES, MAX_TEXT,
    MessageType, Ranges, RequestId, WireError, lz4,
};
use crate::image;
use crate::units::{PAGE_SIZE, PageRange};

/// Fields of a pages frame before its checksums.
const FIXED: usize = 24;

/// Asks for pages. The class is the channel's.
///
/// ```text
/// offset   size  field
///      0  n * 16  ranges, at most 256 with 4096 pages together
///
/// of each range
///      0       8  first page
///      8       4  pages, at least 1
///     12       4  reserved, 0
/// ```
///
/// The request is complete when every page of every range has been answered once, by [`Pages`], [`Zero`] or [`Failed`] with
/// its id, in any order and in any number of frames. There is no other sign of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Not 0, and not that of another request in flight on this channel.
    pub request: RequestId,
    /// The pages. A page in two of the ranges is answered twice.
    pub ranges: Ranges<'a>,
}

/// How page data is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// As it is.
    Raw,
    /// One lz4 block with all of it, shorter than it.
    Lz4,
}

/// Everything of a pages frame but its data: for who sends that from where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagesHead<'a> {
    /// What is answered, or [`RequestId::PUSH`].
    pub request: RequestId,
    /// The pages, at most [`MAX_PAGES_PER_FRAME`].
    pub range: PageRange,
    /// How old they are.
    pub epoch: Epoch,
    /// How the data is written down.
    pub encoding: Encoding,
    /// A checksum for each page.
    pub checksums: Checksums<'a>,
    /// How many bytes of data follow.
    pub data_length: usize,
}

/// Pages, asked for or pushed. Data has only those pages whose checksum is not 0, in order.
///
/// ```text
///  offset   size  field
///       0      8  first page
///       8      4  pages n, 1 to 256
///      12      1  encoding: 0 raw, 1 lz4
///      13      3  reserved, 0
///      16      8  epoch
///      24  8 * n  checksum of each page: xxh3-64 of its bytes, 0 for a page that is all zero
/// 24+8*n          data: 4096 bytes for each checksum that is not 0, or an lz4 block of these, shorter than them
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages<'a> {
    /// What is answered, or [`RequestId::PUSH`].
    pub request: RequestId,
    /// The pages.
    pub range: PageRange,
    /// How old they are.
    pub epoch: Epoch,
    /// How the data is written down.
    pub encoding: Encoding,
    /// A checksum for each page.
    pub checksums: Checksums<'a>,
    /// The data.
    pub data: &'a [u8],
}

/// Pages that are all zero. They are there all the same: who waits for them must be given them.
///
/// ```text
/// offset  size  field
///      0     8  first page
///      8     4  pages, at least 1
///     12     4  reserved, 0
///     16     8  epoch
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zero {
    /// What is answered, or [`RequestId::PUSH`].
    pub request: RequestId,
    /// The pages.
    pub range: PageRange,
    /// How old they are.
    pub epoch: Epoch,
}

codes! {
    /// Why pages cannot be had.
    pub enum FailCode {
        /// The provider has something else than what belongs there.
        Corrupt = 1 => "corrupt at the provider",
        /// The provider cannot read them.
        Unreadable = 2 => "unreadable at the provider",
        /// There are no such pages.
        OutOfRange = 3 => "beyond the end of RAM",
        /// The fetcher cancelled them.
        Cancelled = 4 => "cancelled",
    }
}

/// Pages that cannot be had. It is an answer like any other: asked again, they are looked for again.
///
/// ```text
/// offset  size  field
///      0     8  first page; of a bitmap request its first page, of a metadata request 0
///      8     4  pages, at least 1; of a bitmap or metadata request 1
///     12     2  code
///     14     2  length of the text, at most 512
///     16     n  text for people, UTF-8
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed<'a> {
    /// What is answered; [`RequestId::PUSH`]: these will never be pushed.
    pub request: RequestId,
    /// The pages.
    pub range: PageRange,
    /// Why.
    pub code: FailCode,
    /// Why, for people.
    pub text: &'a str,
}

impl<'a> Request<'a> {
    pub(super) fn decode(request: RequestId, mut fields: Fields<'a>) -> Result<Self, WireError> {
        let ranges = Ranges::decode(fields.kind, fields.rest(), MAX_REQUEST_RANGES)?;
        check_request(ranges)?;
        Ok(Self { request, ranges })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        check_request(self.ranges)?;
        self.ranges.encode(MessageType::Request, MAX_REQUEST_RANGES, out)
    }
}

fn check_request(ranges: Ranges<'_>) -> Result<(), WireError> {
    match ranges.pages() {
        ..=MAX_REQUEST_PAGES => Ok(()),
        value => Err(WireError::Field {
            kind: MessageType::Request,
            field: "number of pages",
            value,
        }),
    }
}

/// Where the data of a pages frame begins, as far as the payload says so; the payload may be shorter.
pub(super) fn head_length(payload: &[u8]) -> usize {
    let count = match payload.get(8..12) {
        Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]) as usize,
        _ => 0,
    };
    FIXED + 8 * count
}

impl PagesHead<'_> {
    /// Appends header and payload up to the data. The caller sends `data_length` bytes of data behind it.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let tail = self.data_length;
        super::codec::frame(MessageType::Pages, self.request.0, tail, out, |out| self.put(out))
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let kind = MessageType::Pages;
        if self.checksums.len() as u64 != self.range.count {
            return Err(WireError::Field {
                kind,
                field: "number of checksums",
                value: self.checksums.len() as u64,
            });
        }
        check_data(self.checksums, self.encoding, self.data_length)?;
        put_range(out, kind, self.range, MAX_PAGES_PER_FRAME as u64)?;
        out.extend_from_slice(&[u8::from(self.encoding == Encoding::Lz4), 0, 0, 0]);
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        self.checksums.encode(out);
        Ok(())
    }
}

fn check_data(checksums: Checksums<'_>, encoding: Encoding, got: usize) -> Result<(), WireError> {
    let expected = checksums.data_pages() * PAGE_SIZE;
    let sound = match encoding {
        Encoding::Raw => got == expected,
        Encoding::Lz4 => 0 < got && got < expected,
    };
    if sound {
        Ok(())
    } else {
        Err(WireError::DataLength { expected, got })
    }
}

impl<'a> Pages<'a> {
    /// Everything but the data.
    pub fn head(&self) -> PagesHead<'a> {
        PagesHead {
            request: self.request,
            range: self.range,
            epoch: self.epoch,
            encoding: self.encoding,
            checksums: self.checksums,
            data_length: self.data.len(),
        }
    }

    /// The content of the pages; compressed data goes through `buffer`, for which `MAX_PAGES_PER_FRAME * PAGE_SIZE` bytes are
    /// always enough. Says nothing about checksums: [`Unpacked::verify`] does.
    pub fn unpack<'b>(&self, buffer: &'b mut [u8]) -> Result<Unpacked<'b>, WireError>
    where
        'a: 'b,
    {
        let data = match self.encoding {
            Encoding::Raw => self.data,
            Encoding::Lz4 => {
                let needed = self.checksums.data_pages() * PAGE_SIZE;
                let got = buffer.len();
                let into = buffer
                    .get_mut(..needed)
                    .ok_or(WireError::Buffer { needed, got })?;
                lz4::decompress(self.data, into)?;
                into
            }
        };
        Ok(Unpacked {
            range: self.range,
            checksums: self.checksums,
            data,
        })
    }

    pub(super) fn decode(request: RequestId, mut fields: Fields<'a>) -> Result<Self, WireError> {
        let range = fields.range(MAX_PAGES_PER_FRAME as u64)?;
        let encoding = match fields.u8()? {
            0 => Encoding::Raw,
            1 => Encoding::Lz4,
            code => return Err(fields.wrong("encoding", u64::from(code))),
        };
        fields.reserved::<3>()?;
        let epoch = Epoch(fields.u64()?);
        let kind = fields.kind;
        let checksums =
            Checksums::decode(fields.bytes(range.count as usize * 8)?).ok_or(WireError::Layout { kind })?;
        let data = fields.rest();
        check_data(checksums, encoding, data.len())?;
        Ok(Self {
            request,
            range,
            epoch,
            encoding,
            checksums,
            data,
        })
    }
}

/// A pages frame's content, decompressed.
#[derive(Clone, Copy, Debug)]
pub struct Unpacked<'a> {
    range: PageRange,
    checksums: Checksums<'a>,
    data: &'a [u8],
}

/// Pages of a frame that are next to each other and alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run<'a> {
    /// They are zero.
    Zero(PageRange),
    /// They hold this.
    Data(PageRange, &'a [u8]),
}

impl<'a> Unpacked<'a> {
    /// Whether every page is what its checksum says.
    pub fn verify(&self) -> Result<(), WireError> {
        let mut data = self.data.chunks_exact(PAGE_SIZE);
        for (page, checksum) in self.range.pages().zip(self.checksums.iter()) {
            if checksum != 0 && data.next().map(image::checksum) != Some(checksum) {
                return Err(WireError::PageChecksum { page });
            }
        }
        Ok(())
    }

    /// The pages, in as few pieces as can be.
    pub fn runs(&self) -> Runs<'a> {
        Runs {
            unpacked: *self,
            done: 0,
        }
    }
}

/// See [`Unpacked::runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    /// Its data is what is left of it.
    unpacked: Unpacked<'a>,
    /// Pages dealt with.
    done: usize,
}

impl<'a> Iterator for Runs<'a> {
    type Item = Run<'a>;

    fn next(&mut self) -> Option<Run<'a>> {
        let Unpacked { range, checksums, .. } = self.unpacked;
        let is_zero = |index: &usize| checksums.get(*index) == 0;
        let mut left = self.done..checksums.len();
        let zero = is_zero(&left.next()?);
        let count = 1 + left.take_while(|index| is_zero(index) == zero).count();
        let start = range.start.advance(self.done as u64);
        let range = PageRange::new(start, count as u64);
        self.done += count;
        if zero {
            return Some(Run::Zero(range));
        }
        let (data, rest) = self.unpacked.data.split_at_checked(range.bytes())?;
        self.unpacked.data = rest;
        Some(Run::Data(range, data))
    }
}

impl Zero {
    pub(super) fn decode(request: RequestId, mut fields: Fields<'_>) -> Result<Self, WireError> {
        let range = fields.range(MAX_RANGE_PAGES)?;
        fields.reserved::<4>()?;
        let epoch = Epoch(fields.u64()?);
        fields.end()?;
        Ok(Self {
            request,
            range,
            epoch,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        put_range(out, MessageType::Zero, self.range, MAX_RANGE_PAGES)?;
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        Ok(())
    }
}

impl<'a> Failed<'a> {
    pub(super) fn decode(request: RequestId, mut fields: Fields<'a>) -> Result<Self, WireError> {
        let range = fields.range(MAX_RANGE_PAGES)?;
        let code = FailCode::from_code(fields.u16()?);
        let length = usize::from(fields.u16()?);
        let text = fields.text("text", length, MAX_TEXT)?;
        fields.end()?;
        Ok(Self {
            request,
            range,
            code,
            text,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        put_range(out, MessageType::Failed, self.range, MAX_RANGE_PAGES)?;
        out.extend_from_slice(&self.code.code().to_le_bytes());
        put_text(out, self.text);
        Ok(())
    }
}
