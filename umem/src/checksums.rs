//! An image's checksum table, read and checked block by block when it is needed.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::image::checksum;
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Checksums in a block of 4096 bytes.
pub(crate) const CHECKSUMS_PER_BLOCK: u64 = (PAGE_SIZE / 8) as u64;

/// Blocks kept in memory: at most 2 MiB of them, the checksums of 1 GiB.
const SLOTS: u64 = 512;

/// The checksums of a block.
pub(crate) type Block = [u64; CHECKSUMS_PER_BLOCK as usize];

/// The table behind a bounded cache, in which a block has one place.
#[derive(Debug)]
pub(crate) struct ChecksumTable {
    /// Where it begins in the file.
    offset: u64,
    pages: u64,
    /// The checksum of each block.
    blocks: Vec<u64>,
    cache: Mutex<Cache>,
}

/// Allocated at once and used as blocks come, so that keeping one takes no memory from anybody.
#[derive(Debug)]
struct Cache {
    /// For each slot the index of the block in it, plus 1; 0 is an empty slot.
    tags: Vec<u64>,
    checksums: Vec<u64>,
}

impl ChecksumTable {
    /// A table of `pages` checksums that begins at `offset` and whose blocks have the (little-endian) checksums `blocks`.
    pub(crate) fn new(offset: u64, pages: u64, blocks: &[u8]) -> Self {
        let slots = SLOTS.min(blocks.len() as u64 / 8) as usize;
        let cache = Cache {
            tags: vec![0; slots],
            checksums: vec![0; slots * CHECKSUMS_PER_BLOCK as usize],
        };
        Self {
            offset,
            pages,
            blocks: words(blocks).collect(),
            cache: Mutex::new(cache),
        }
    }

    /// The checksums of `pages`. `read` fills a buffer from an offset of the file for a page's sake, or answers `None` if
    /// it would have to wait; it is called without the lock. `damaged` makes the error for a block that is not what it was.
    pub(crate) fn get<E>(
        &self,
        pages: PageRange,
        into: &mut [u64],
        mut read: impl FnMut(u64, &mut [u8], PageIndex) -> Result<Option<()>, E>,
        damaged: impl Fn(PageIndex) -> E,
    ) -> Result<Option<()>, E> {
        let mut page = pages.start;
        while page < pages.end() {
            let block = page.0 / CHECKSUMS_PER_BLOCK;
            let first = (page.0 % CHECKSUMS_PER_BLOCK) as usize;
            let count = (CHECKSUMS_PER_BLOCK - first as u64).min(pages.end().0 - page.0) as usize;
            let at = (page.0 - pages.start.0) as usize;
            let target = &mut into[at..at + count];
            if self.blocks[block as usize] == 0 {
                target.fill(0);
            } else if !self.lock().copy_out(block, first, target) {
                let Some(checksums) =
                    self.read_block(block, |offset, bytes| read(offset, bytes, page), || damaged(page))?
                else {
                    return Ok(None);
                };
                let mut cache = self.lock();
                cache.keep(block, &checksums);
                cache.copy_out(block, first, target);
            }
            page = page.advance(count as u64);
        }
        Ok(Some(()))
    }

    /// Reads a block, also one that is known to be zero, and checks it.
    pub(crate) fn read_block<E>(
        &self,
        block: u64,
        read: impl FnOnce(u64, &mut [u8]) -> Result<Option<()>, E>,
        damaged: impl FnOnce() -> E,
    ) -> Result<Option<Block>, E> {
        let length = ((self.pages - block * CHECKSUMS_PER_BLOCK).min(CHECKSUMS_PER_BLOCK) * 8) as usize;
        let mut bytes = [0; PAGE_SIZE];
        if read(self.offset + block * PAGE_SIZE as u64, &mut bytes[..length])?.is_none() {
            return Ok(None);
        }
        if checksum(&bytes[..length]) != self.blocks[block as usize] {
            return Err(damaged());
        }
        let words = bytes.as_chunks::<8>().0;
        Ok(Some(std::array::from_fn(|index| {
            u64::from_le_bytes(words[index])
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache {
    fn slot(&self, block: u64) -> usize {
        (block % self.tags.len() as u64) as usize
    }

    /// Copies checksums of `block` from `first` on. False: the block is not here.
    fn copy_out(&self, block: u64, first: usize, target: &mut [u64]) -> bool {
        let slot = self.slot(block);
        let here = self.tags[slot] == block + 1;
        if here {
            let at = slot * CHECKSUMS_PER_BLOCK as usize + first;
            target.copy_from_slice(&self.checksums[at..at + target.len()]);
        }
        here
    }

    fn keep(&mut self, block: u64, checksums: &Block) {
        let slot = self.slot(block);
        self.tags[slot] = block + 1;
        let at = slot * CHECKSUMS_PER_BLOCK as usize;
        self.checksums[at..at + checksums.len()].copy_from_slice(checksums);
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word))
}
