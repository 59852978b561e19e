//! Lists inside a payload, read in place; and the same lists in the caller's memory, to be encoded.

use std::fmt;

use super::fields::{check_range, put_range};
use super::{MAX_RANGE_PAGES, MessageType, WireError};
use crate::units::{PageIndex, PageRange};

/// Bytes of a range in a list: start (u64), count (u32), reserved (u32).
const RANGE_SIZE: usize = 16;

/// Ranges of pages, each of at least one page.
#[derive(Clone, Copy)]
pub struct Ranges<'a>(RangesIn<'a>);

#[derive(Clone, Copy)]
enum RangesIn<'a> {
    Payload(&'a [[u8; RANGE_SIZE]]),
    Memory(&'a [PageRange]),
}

impl<'a> Ranges<'a> {
    /// How many ranges.
    pub fn len(&self) -> usize {
        match self.0 {
            RangesIn::Payload(ranges) => ranges.len(),
            RangesIn::Memory(ranges) => ranges.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ranges.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = PageRange> + Clone + use<'a> {
        let ranges = self.0;
        (0..self.len()).map(move |index| match ranges {
            RangesIn::Payload(ranges) => range_in(&ranges[index]),
            RangesIn::Memory(ranges) => ranges[index],
        })
    }

    /// How many pages they have together; a page in two of them counts twice.
    pub fn pages(&self) -> u64 {
        self.iter()
            .fold(0, |pages, range| pages.saturating_add(range.count))
    }

    /// Reads a list that takes all of `bytes`.
    pub(super) fn decode(kind: MessageType, bytes: &'a [u8], limit: usize) -> Result<Self, WireError> {
        let (ranges, rest) = bytes.as_chunks::<RANGE_SIZE>();
        if !rest.is_empty() {
            return Err(WireError::Layout { kind });
        }
        check_count(kind, ranges.len(), limit)?;
        for range in ranges {
            check_range(kind, range_in(range), MAX_RANGE_PAGES)?;
            if range[12..] != [0; 4] {
                return Err(WireError::Field {
                    kind,
                    field: "reserved bytes",
                    value: u64::from(range[12..].iter().fold(0, |all, byte| all | byte)),
                });
            }
        }
        Ok(Self(RangesIn::Payload(ranges)))
    }

    pub(super) fn encode(&self, kind: MessageType, limit: usize, out: &mut Vec<u8>) -> Result<(), WireError> {
        check_count(kind, self.len(), limit)?;
        for range in self.iter() {
            put_range(out, kind, range, MAX_RANGE_PAGES)?;
            out.extend_from_slice(&[0; 4]);
        }
        Ok(())
    }
}

fn range_in(bytes: &[u8; RANGE_SIZE]) -> PageRange {
    let start = u64::from_le_bytes(std::array::from_fn(|i| bytes[i]));
    let count = u32::from_le_bytes(std::array::from_fn(|i| bytes[8 + i]));
    PageRange::new(PageIndex(start), u64::from(count))
}

fn check_count(kind: MessageType, count: usize, limit: usize) -> Result<(), WireError> {
    if (1..=limit).contains(&count) {
        Ok(())
    } else {
        Err(WireError::Field {
            kind,
            field: "number of ranges",
            value: count as u64,
        })
    }
}

impl<'a> From<&'a [PageRange]> for Ranges<'a> {
    fn from(ranges: &'a [PageRange]) -> Self {
        Self(RangesIn::Memory(ranges))
    }
}

impl PartialEq for Ranges<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Ranges<'_> {}

impl fmt::Debug for Ranges<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// The checksums of a range of pages, in order: 0 for a page that is all zero.
#[derive(Clone, Copy)]
pub struct Checksums<'a>(ChecksumsIn<'a>);

#[derive(Clone, Copy)]
enum ChecksumsIn<'a> {
    Payload(&'a [[u8; 8]]),
    Memory(&'a [u64]),
}

impl<'a> Checksums<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        match self.0 {
            ChecksumsIn::Payload(checksums) => checksums.len(),
            ChecksumsIn::Memory(checksums) => checksums.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// That of the page at `index`.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn get(&self, index: usize) -> u64 {
        match self.0 {
            ChecksumsIn::Payload(checksums) => u64::from_le_bytes(checksums[index]),
            ChecksumsIn::Memory(checksums) => checksums[index],
        }
    }

    /// The checksums.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u64> + Clone + use<'a> {
        let checksums = *self;
        (0..self.len()).map(move |index| checksums.get(index))
    }

    /// How many pages are not all zero.
    pub fn data_pages(&self) -> usize {
        self.iter().filter(|checksum| *checksum != 0).count()
    }

    /// `None`: `bytes` is no multiple of 8 long.
    pub(super) fn decode(bytes: &'a [u8]) -> Option<Self> {
        let (checksums, rest) = bytes.as_chunks::<8>();
        rest.is_empty().then_some(Self(ChecksumsIn::Payload(checksums)))
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        for checksum in self.iter() {
            out.extend_from_slice(&checksum.to_le_bytes());
        }
    }
}

impl<'a> From<&'a [u64]> for Checksums<'a> {
    fn from(checksums: &'a [u64]) -> Self {
        Self(ChecksumsIn::Memory(checksums))
    }
}

impl PartialEq for Checksums<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Checksums<'_> {}

impl fmt::Debug for Checksums<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
