//! An image's checksum table, read block by block when it is needed.

use std::sync::Mutex;

use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Checksums in a block of 4096 bytes.
const PER_BLOCK: u64 = (PAGE_SIZE / 8) as u64;

/// Blocks kept in memory: 2 MiB of them, the checksums of 1 GiB.
const SLOTS: u64 = 512;

/// The table behind a bounded cache, in which a block has one place.
#[derive(Debug)]
pub(crate) struct ChecksumTable {
    /// Where it begins in the file.
    offset: u64,
    pages: u64,
    slots: Mutex<Vec<Option<Box<Block>>>>,
}

#[derive(Debug)]
struct Block {
    index: u64,
    checksums: [u64; PER_BLOCK as usize],
}

impl ChecksumTable {
    pub(crate) fn new(offset: u64, pages: u64) -> Self {
        Self {
            offset,
            pages,
            slots: Mutex::new((0..SLOTS).map(|_| None).collect()),
        }
    }

    /// The checksums of `pages`. `read` fills a buffer from an offset of the file for a page's sake, or answers `None` if
    /// it would have to wait; it is called without the lock.
    pub(crate) fn get<E>(
        &self,
        pages: PageRange,
        into: &mut [u64],
        mut read: impl FnMut(u64, &mut [u8], PageIndex) -> Result<Option<()>, E>,
    ) -> Result<Option<()>, E> {
        let mut page = pages.start;
        while page < pages.end() {
            let index = page.0 / PER_BLOCK;
            let first = (page.0 % PER_BLOCK) as usize;
            let count = (PER_BLOCK - first as u64).min(pages.end().0 - page.0) as usize;
            let at = (page.0 - pages.start.0) as usize;
            let target = &mut into[at..at + count];
            if !self.copy_cached(index, first, target) {
                let length = ((self.pages - index * PER_BLOCK).min(PER_BLOCK) * 8) as usize;
                let mut bytes = [0; PAGE_SIZE];
                if read(self.offset + index * PAGE_SIZE as u64, &mut bytes[..length], page)?.is_none() {
                    return Ok(None);
                }
                let checksums = std::array::from_fn(|word| {
                    u64::from_le_bytes(std::array::from_fn(|byte| bytes[word * 8 + byte]))
                });
                target.copy_from_slice(&checksums[first..first + count]);
                self.keep(Block { index, checksums });
            }
            page = page.advance(count as u64);
        }
        Ok(Some(()))
    }

    fn copy_cached(&self, index: u64, first: usize, target: &mut [u64]) -> bool {
        let slots = self
            .slots
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match &slots[(index % SLOTS) as usize] {
            Some(block) if block.index == index => {
                target.copy_from_slice(&block.checksums[first..first + target.len()]);
                true
            }
            _ => false,
        }
    }

    fn keep(&self, block: Block) {
        let mut slots = self
            .slots
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match &mut slots[(block.index % SLOTS) as usize] {
            Some(place) => **place = block,
            place @ None => *place = Some(Box::new(block)),
        }
    }
}
