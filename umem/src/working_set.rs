//! Working sets: which pages a run touched, and roughly in which order, so that the next run can have them before it asks.
//!
//! ```text
//! offset  size  field
//!      0     8  magic "umemwset"
//!      8     4  version, 1
//!     12     4  runs n
//!     16     8  pages of RAM
//!     24    32  digest of the image that the pages are of
//!     56     8  xxh3-64 of all other bytes
//!     64  16 n  the runs, by rank and then by page
//!
//! of each run
//!      0     8  first page
//!      8     4  pages, at least 1
//!     12     4  rank: all pages of a lower one were touched before all of a higher one
//! ```
//!
//! All numbers are little-endian. The rank is coarse because only the set repeats itself from run to run, and the order does
//! not; what is in one rank is loaded in address order, which is faster.

use std::collections::HashSet;

use xxhash_rust::xxh3::Xxh3;

use crate::units::{PageIndex, PageRange};

const MAGIC: [u8; 8] = *b"umemwset";
const VERSION: u32 = 1;
const HEADER: usize = 64;
const CHECKSUM: usize = 56;
const RUN: usize = 16;

/// Pages touched that make a rank.
const RANK: usize = 1024;

/// Runs of a set at most: a file of 64 MiB, and more pages than a pager records.
const MAX_RUNS: usize = crate::pager::MAX_TOUCHED;

/// The most bytes that a set takes.
pub const MAX_SIZE: usize = HEADER + MAX_RUNS * RUN;

/// Pages of one rank that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankedRun {
    /// The pages.
    pub pages: PageRange,
    /// When they were touched, relative to others.
    pub rank: u32,
}

/// The pages that a run touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    digest: [u8; 32],
    ram_pages: u64,
    runs: Vec<RankedRun>,
}

/// Why bytes are no working set, or not the one that is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkingSetError {
    /// It does not begin like one.
    #[error("this is no working set")]
    NotAWorkingSet,
    /// From another version of this program.
    #[error("the working set has version {0}, and this program knows version {VERSION}")]
    Version(u32),
    /// Shorter or longer than it says.
    #[error("the working set has {got} bytes and should have {expected}: it is damaged")]
    Length {
        /// Bytes there are.
        got: usize,
        /// Bytes there should be.
        expected: usize,
    },
    /// Not what was written.
    #[error("the working set does not match its checksum: it is damaged")]
    Checksum,
    /// Runs that cannot be.
    #[error("run {0} of the working set makes no sense: it is damaged")]
    Run(usize),
    /// Recorded with another image.
    #[error("the working set was recorded with another image: record it anew with this one")]
    OtherImage,
}

impl WorkingSet {
    /// The set of the pages in `touched`, which are in the order of their first touches, of RAM with this digest and size.
    pub fn new(digest: [u8; 32], ram_pages: u64, touched: &[PageIndex]) -> Self {
        let mut seen = HashSet::with_capacity(touched.len());
        let mut runs: Vec<RankedRun> = Vec::new();
        for (rank, touched) in (0..).zip(touched.chunks(RANK)) {
            let mut pages: Vec<u64> = touched
                .iter()
                .map(|page| page.0)
                .filter(|page| *page < ram_pages && seen.insert(*page))
                .collect();
            pages.sort_unstable();
            for page in pages {
                match runs.last_mut() {
                    Some(last) if last.rank == rank && last.pages.end().0 == page => last.pages.count += 1,
                    _ => runs.push(RankedRun {
                        pages: PageRange::single(PageIndex(page)),
                        rank,
                    }),
                }
            }
        }
        runs.truncate(MAX_RUNS);
        Self {
            digest,
            ram_pages,
            runs,
        }
    }

    /// The runs, in the order in which they are to be loaded.
    pub fn runs(&self) -> &[RankedRun] {
        &self.runs
    }

    /// How many pages they are.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.pages.count).sum()
    }

    /// Refuses RAM that the set is not of.
    pub fn check(&self, digest: Option<[u8; 32]>, ram_pages: u64) -> Result<(), WorkingSetError> {
        if digest == Some(self.digest) && ram_pages == self.ram_pages {
            Ok(())
        } else {
            Err(WorkingSetError::OtherImage)
        }
    }

    /// As bytes for a file.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.runs.len() * RUN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.ram_pages.to_le_bytes());
        out.extend_from_slice(&self.digest);
        out.extend_from_slice(&[0; 8]);
        for RankedRun { pages, rank } in &self.runs {
            out.extend_from_slice(&pages.start.0.to_le_bytes());
            out.extend_from_slice(&(pages.count as u32).to_le_bytes());
            out.extend_from_slice(&rank.to_le_bytes());
        }
        let checksum = checksum(&out);
        out[CHECKSUM..HEADER].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// From the bytes of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        let (header, body) = bytes
            .split_first_chunk::<HEADER>()
            .filter(|(header, _)| header.starts_with(&MAGIC))
            .ok_or(WorkingSetError::NotAWorkingSet)?;
        let version = u32_at(header, 8);
        if version != VERSION {
            return Err(WorkingSetError::Version(version));
        }
        let count = u32_at(header, 12) as usize;
        let expected = HEADER.saturating_add(count.saturating_mul(RUN));
        if bytes.len() != expected || count > MAX_RUNS {
            let got = bytes.len();
            return Err(WorkingSetError::Length { got, expected });
        }
        if checksum(bytes) != u64_at(header, CHECKSUM) {
            return Err(WorkingSetError::Checksum);
        }
        let ram_pages = u64_at(header, 16);
        let mut digest = [0; 32];
        digest.copy_from_slice(&header[24..CHECKSUM]);
        let mut runs: Vec<RankedRun> = Vec::with_capacity(count);
        for (index, run) in body.as_chunks::<RUN>().0.iter().enumerate() {
            let (start, count, rank) = (u64_at(run, 0), u64::from(u32_at(run, 8)), u32_at(run, 12));
            let fits = start.checked_add(count).is_some_and(|end| end <= ram_pages);
            let in_order = runs
                .last()
                .is_none_or(|last| last.rank < rank || (last.rank == rank && last.pages.end().0 <= start));
            if count == 0 || !fits || !in_order {
                return Err(WorkingSetError::Run(index));
            }
            let pages = PageRange::new(PageIndex(start), count);
            runs.push(RankedRun { pages, rank });
        }
        Ok(Self {
            digest,
            ram_pages,
            runs,
        })
    }
}

/// Of all bytes but the checksum's own.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&bytes[..CHECKSUM]);
    hash.update(&bytes[HEADER..]);
    hash.digest()
}

/// # Panics
///
/// Where `bytes` ends before `at + 4`.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// # Panics
///
/// Where `bytes` ends before `at + 8`.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: [u8; 32] = [7; 32];

    fn set(touched: &[u64]) -> WorkingSet {
        let touched: Vec<PageIndex> = touched.iter().copied().map(PageIndex).collect();
        WorkingSet::new(DIGEST, 10_000, &touched)
    }

    #[test]
    fn neighbours_of_one_rank_are_one_run() {
        let set = set(&[9, 5, 6, 4, 8, 6]);
        let runs: Vec<_> = set
            .runs()
            .iter()
            .map(|run| (run.pages.start.0, run.pages.count))
            .collect();
        assert_eq!(runs, [(4, 3), (8, 2)]);
        assert_eq!(set.pages(), 5);
    }

    #[test]
    fn the_set_of_another_image_is_refused() {
        let set = set(&[1]);
        assert_eq!(set.check(Some(DIGEST), 10_000), Ok(()));
        for (digest, pages) in [(Some([8; 32]), 10_000), (None, 10_000), (Some(DIGEST), 9999)] {
            assert_eq!(set.check(digest, pages), Err(WorkingSetError::OtherImage));
        }
    }

    #[test]
    fn runs_that_make_no_sense_are_refused() {
        for (run, pages, rank) in [(0u64, 0u32, 0u32), (9_999, 2, 0), (u64::MAX, 1, 0), (3, 1, 0)] {
            let mut bytes = set(&[5]).encode();
            bytes[12] = 2;
            bytes.extend_from_slice(&run.to_le_bytes());
            bytes.extend_from_slice(&pages.to_le_bytes());
            bytes.extend_from_slice(&rank.to_le_bytes());
            let checksum = checksum(&bytes);
            bytes[CHECKSUM..HEADER].copy_from_slice(&checksum.to_le_bytes());
            assert_eq!(WorkingSet::decode(&bytes), Err(WorkingSetError::Run(1)));
        }
    }

    proptest! {
        #[test]
        fn what_was_touched_comes_back_in_order_of_rank(touched in prop::collection::vec(0u64..10_000, 0..4000)) {
            let set = set(&touched);
            prop_assert_eq!(&WorkingSet::decode(&set.encode()).unwrap(), &set);
            let mut first = std::collections::HashMap::new();
            for (index, page) in touched.iter().enumerate() {
                first.entry(*page).or_insert(index / RANK);
            }
            let mut found = 0;
            for run in set.runs() {
                for page in run.pages.pages() {
                    prop_assert_eq!(first.get(&page.0), Some(&(run.rank as usize)));
                    found += 1;
                }
            }
            prop_assert_eq!(found, first.len());
        }

        #[test]
        fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = WorkingSet::decode(&bytes);
            let mut named = MAGIC.to_vec();
            named.extend(bytes);
            let _ = WorkingSet::decode(&named);
        }

        #[test]
        fn a_changed_byte_is_found(at: prop::sample::Index, change in 1u8..) {
            let mut bytes = set(&[3, 1, 4, 1, 5, 9, 2, 6]).encode();
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            prop_assert!(WorkingSet::decode(&bytes).is_err());
        }
    }
}
