//! Pages, counted. A page is 4 KiB everywhere in this crate, whatever the size in which memory is installed.

use std::fmt;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// Bytes in a huge page.
pub const HUGE_PAGE_SIZE: usize = 2 << 20;

/// A page of a region, counted from the region's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Offset of the page from the start of the region, in bytes.
    pub const fn byte_offset(self) -> u64 {
        self.0 * PAGE_SIZE as u64
    }

    /// The page that holds the byte at `offset` from the start of the region.
    pub const fn containing(offset: u64) -> Self {
        Self(offset / PAGE_SIZE as u64)
    }

    /// The page `count` pages on.
    pub const fn advance(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// `count` pages from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first page.
    pub start: PageIndex,
    /// How many; may be 0.
    pub count: u64,
}

impl PageRange {
    /// `count` pages from `start` on.
    pub const fn new(start: PageIndex, count: u64) -> Self {
        Self { start, count }
    }

    /// One page.
    pub const fn single(page: PageIndex) -> Self {
        Self::new(page, 1)
    }

    /// The page after the last.
    pub const fn end(self) -> PageIndex {
        self.start.advance(self.count)
    }

    /// Whether `page` is one of them.
    pub fn contains(self, page: PageIndex) -> bool {
        self.start <= page && page < self.end()
    }

    /// Length in bytes.
    pub const fn bytes(self) -> usize {
        self.count as usize * PAGE_SIZE
    }

    /// The pages, in order.
    pub fn pages(self) -> impl DoubleEndedIterator<Item = PageIndex> + Clone {
        (self.start.0..self.end().0).map(PageIndex)
    }

    /// The pages of it from `start` on.
    pub fn from(self, start: PageIndex) -> Self {
        let start = start.max(self.start);
        Self::new(start, self.end().0.saturating_sub(start.0))
    }

    /// The pages of it that are below `end`.
    pub fn clamp_to(self, end: PageIndex) -> Self {
        let last = self.end().min(end);
        Self::new(self.start, last.0.saturating_sub(self.start.0))
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.count)
    }
}

/// An address in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddress(pub u64);

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
