//! The pager on plain memory of this process: no VM, the real userfaultfd.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::thread;

use common::{
    BACKINGS, Fixture, Random, assert_all_present, eventually, expected, image, read_page, rounds, shuffled,
    start,
};
use umem::pager::Fill;
use umem::region::{Backing, PageSize, Region, RegionError};
use umem::source::file::{Checksums, FileSource};
use umem::source::zero::ZeroSource;
use umem::source::{Class, Content, PageSource, SourceError, SourceStats};
use umem::units::{PAGE_SIZE, PageRange};

#[test]
fn every_page_comes_on_demand_and_umem_leaves() {
    const PAGES: u64 = 2048;
    for backing in BACKINGS {
        let (_directory, image) = image(PAGES);
        let source = Arc::new(FileSource::new(image, Checksums::On));
        let Fixture {
            pager,
            region,
            notices,
        } = start(source, PAGES, backing, PageSize::Small, Fill::Off);
        assert_eq!(pager.stats().populated_at_start, 0);
        for (count, page) in shuffled(PAGES, 1).enumerate() {
            assert_eq!(
                read_page(&region, page),
                expected(page),
                "{backing:?} page {page}"
            );
            // No page but those that were touched: nothing is fetched ahead, nothing is populated by the kernel.
            if count % 256 == 0 {
                assert_eq!(region.populated().unwrap(), count as u64 + 1);
            }
        }
        assert_all_present(&notices);
        let stats = pager.stats();
        let zero = PAGES.div_ceil(5);
        assert_eq!(
            (stats.zero, stats.demand, stats.prefetched),
            (zero, PAGES - zero, 0)
        );
        assert_eq!(stats.states.present, PAGES);
        assert_eq!(stats.faults.count, PAGES);
        assert_eq!(stats.source.bytes, (PAGES - zero) * PAGE_SIZE as u64);
        assert!(stats.all_present_at.is_some());
        // Ordinary memory: what is dropped comes back as zero, and nobody is asked for it.
        // SAFETY: within the region.
        unsafe { libc::madvise(region.start().cast(), PAGE_SIZE, libc::MADV_REMOVE) };
        // SAFETY: the same.
        unsafe {
            libc::madvise(
                region.start().add(PAGE_SIZE).cast(),
                PAGE_SIZE,
                libc::MADV_DONTNEED,
            )
        };
        let second = read_page(&region, 1);
        assert_eq!(
            second,
            if backing == Backing::Memfd {
                expected(1)
            } else {
                [0; PAGE_SIZE]
            }
        );
        drop(pager);
    }
}

#[test]
fn a_fill_loads_what_nobody_touches() {
    const PAGES: u64 = 4096;
    for backing in BACKINGS {
        let (_directory, image) = image(PAGES);
        let source = Arc::new(FileSource::new(image, Checksums::On));
        let Fixture {
            pager,
            region,
            notices,
        } = start(source, PAGES, backing, PageSize::Small, Fill::Sequential);
        assert_all_present(&notices);
        let stats = pager.stats();
        assert_eq!(stats.zero, PAGES.div_ceil(5));
        assert_eq!(stats.prefetched, PAGES - PAGES.div_ceil(5));
        assert_eq!(stats.states.present, PAGES);
        for page in 0..PAGES {
            assert_eq!(
                read_page(&region, page),
                expected(page),
                "{backing:?} page {page}"
            );
        }
    }
}

#[test]
fn a_fill_of_nothing_but_zeros_costs_no_memory() {
    const PAGES: u64 = 1 << 18;
    for backing in BACKINGS {
        let fixture = start(
            Arc::new(ZeroSource),
            PAGES,
            backing,
            PageSize::Small,
            Fill::Sequential,
        );
        assert_all_present(&fixture.notices);
        assert_eq!(fixture.region.populated().unwrap(), 0);
        assert_eq!(fixture.pager.stats().zero, PAGES);
        assert_eq!(read_page(&fixture.region, 77), [0; PAGE_SIZE]);
    }
}

#[test]
fn threads_that_touch_everything_beside_a_fill_see_every_page_right() {
    const PAGES: u64 = 8192;
    for seed in 0..6 {
        let backing = BACKINGS[seed as usize % 2];
        let (_directory, image) = image(PAGES);
        let source = Arc::new(FileSource::new(image, Checksums::On));
        let Fixture {
            pager,
            region,
            notices,
        } = start(source, PAGES, backing, PageSize::Small, Fill::Sequential);
        thread::scope(|scope| {
            for thread in 0..4 {
                let region = &region;
                scope.spawn(move || {
                    for page in shuffled(PAGES, seed * 4 + thread) {
                        assert_eq!(read_page(region, page), expected(page), "seed {seed} page {page}");
                    }
                });
            }
        });
        assert_all_present(&notices);
        let stats = pager.stats();
        assert_eq!(stats.demand + stats.prefetched + stats.zero, PAGES, "seed {seed}");
        assert_eq!(stats.duplicate, 0, "seed {seed}: a page was fetched twice");
    }
}

#[test]
fn huge_pages_are_filled_two_mebibytes_at_a_time() {
    const PAGES: u64 = 4 * 512;
    for backing in BACKINGS {
        match Region::new(PAGES * PAGE_SIZE as u64, backing, PageSize::Huge) {
            Err(error @ RegionError::NoHugePages { .. }) => {
                println!("skipped: huge pages: {error}");
                return;
            }
            other => drop(other.unwrap()),
        }
        for fill in [Fill::Off, Fill::Sequential] {
            let (_directory, image) = image(PAGES);
            let source = Arc::new(FileSource::new(image, Checksums::On));
            let Fixture {
                pager,
                region,
                notices,
            } = start(source, PAGES, backing, PageSize::Huge, fill);
            assert_eq!(pager.stats().populated_at_start, 0);
            for page in shuffled(PAGES, 3) {
                assert_eq!(
                    read_page(&region, page),
                    expected(page),
                    "{backing:?} page {page}"
                );
            }
            assert_all_present(&notices);
            assert_eq!(pager.stats().states.present, PAGES);
        }
    }
}

/// A source of `expected` pages that answers when it likes: at once, later, or after having let others run. What it says is
/// right; when it says it is decided by a seed.
struct Moody {
    random: AtomicU64,
}

impl Moody {
    fn roll(&self, n: u64) -> u64 {
        let mut random = Random(self.random.fetch_add(0x9e37_79b9_7f4a_7c15, SeqCst));
        random.below(n);
        random.below(n)
    }

    fn write(pages: PageRange, buffer: &mut [u8]) -> Content {
        for (page, bytes) in pages.pages().zip(buffer.chunks_mut(PAGE_SIZE)) {
            bytes.copy_from_slice(&expected(page.0));
        }
        Content::Data
    }
}

impl PageSource for Moody {
    fn url(&self) -> String {
        "test:moody".into()
    }

    fn try_read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Option<Content>, SourceError> {
        Ok((self.roll(2) == 0).then(|| Self::write(pages, buffer)))
    }

    fn read(&self, pages: PageRange, _: Class, buffer: &mut [u8]) -> Result<Content, SourceError> {
        (0..self.roll(4)).for_each(|_| thread::yield_now());
        let content = Self::write(pages, buffer);
        (0..self.roll(4)).for_each(|_| thread::yield_now());
        Ok(content)
    }

    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SourceError> {
        Ok((within.count > 0).then_some(within))
    }

    fn digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}

/// Readers, a thread that drops pages, and a fill, at random. A page that was dropped before a read began must read zero; one
/// that nobody has begun to drop before the read ended must read its content.
#[test]
fn a_dropped_page_never_shows_its_old_content() {
    const PAGES: u64 = 64;
    for seed in 0..rounds(400) {
        let backing = BACKINGS[seed as usize % 2];
        let fill = match seed % 8 {
            0..4 => Fill::Off,
            4..6 => Fill::Sequential,
            _ => Fill::NearFaults,
        };
        let source = Arc::new(Moody {
            random: AtomicU64::new(seed),
        });
        let Fixture {
            pager,
            region,
            notices,
        } = start(source, PAGES, backing, PageSize::Small, fill);
        // 0: untouched, 1: somebody is dropping it, 2: it is dropped.
        let dropped: Vec<AtomicU8> = (0..PAGES).map(|_| AtomicU8::new(0)).collect();
        let begin = Barrier::new(3);
        let reading = AtomicBool::new(true);
        thread::scope(|scope| {
            let (region, dropped, begin, reading) = (&region, &dropped, &begin, &reading);
            let readers: Vec<_> = (0..2)
                .map(|reader| {
                    scope.spawn(move || {
                        begin.wait();
                        for page in shuffled(PAGES, seed * 2 + reader).chain(shuffled(PAGES, seed ^ reader)) {
                            let before = dropped[page as usize].load(SeqCst);
                            let content = read_page(region, page);
                            let after = dropped[page as usize].load(SeqCst);
                            let (old, zero) = (content == expected(page), content == [0; PAGE_SIZE]);
                            match (before, after) {
                                (2, _) => {
                                    assert!(zero, "seed {seed}: page {page} was dropped and is not zero");
                                }
                                (_, 0) => assert!(old, "seed {seed}: page {page} is wrong"),
                                // Being dropped while it is read, it may show either, and a part of each.
                                _ => {}
                            }
                        }
                    })
                })
                .collect();
            scope.spawn(move || {
                begin.wait();
                let advice = if backing == Backing::Memfd {
                    libc::MADV_REMOVE
                } else {
                    libc::MADV_DONTNEED
                };
                let mut random = Random(seed);
                for page in shuffled(PAGES, !seed).take(24) {
                    if !reading.load(SeqCst) {
                        break;
                    }
                    (0..random.below(8)).for_each(|_| thread::yield_now());
                    dropped[page as usize].store(1, SeqCst);
                    // SAFETY: within the region; it makes the page read zero.
                    let result = unsafe {
                        libc::madvise(
                            region.start().add(page as usize * PAGE_SIZE).cast(),
                            PAGE_SIZE,
                            advice,
                        )
                    };
                    assert_eq!(result, 0, "seed {seed}: {}", std::io::Error::last_os_error());
                    dropped[page as usize].store(2, SeqCst);
                }
            });
            for reader in readers {
                if let Err(panic) = reader.join() {
                    reading.store(false, SeqCst);
                    std::panic::resume_unwind(panic);
                }
            }
        });
        assert_all_present(&notices);
        let stats = pager.stats();
        assert_eq!(
            (stats.states.absent, stats.states.in_flight),
            (0, 0),
            "seed {seed}"
        );
        assert_eq!(
            stats.demand + stats.prefetched + stats.zero,
            stats.states.present,
            "seed {seed}"
        );
    }
}

#[test]
fn memory_taken_away_behind_the_pager_reads_zero() {
    const PAGES: u64 = 16;
    let (_directory, image) = image(PAGES);
    let source = Arc::new(FileSource::new(image, Checksums::On));
    let Fixture { pager, region, .. } = start(source, PAGES, Backing::Memfd, PageSize::Small, Fill::Off);
    assert_eq!(read_page(&region, 3), expected(3));
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(
        region.memfd().unwrap(),
        flags,
        3 * PAGE_SIZE as u64,
        PAGE_SIZE as u64,
    )
    .unwrap();
    assert_eq!(read_page(&region, 3), [0; PAGE_SIZE]);
    assert_eq!(read_page(&region, 4), expected(4));
    eventually(&pager, |stats| {
        (stats.zero, stats.demand, stats.states.present) == (1, 1, 2)
    });
}

#[test]
fn a_page_that_is_unmapped_but_still_in_shared_memory_is_only_mapped_again() {
    const PAGES: u64 = 16;
    let (_directory, image) = image(PAGES);
    let source = Arc::new(FileSource::new(image, Checksums::On));
    let Fixture { pager, region, .. } = start(source, PAGES, Backing::Memfd, PageSize::Small, Fill::Off);
    assert_eq!(read_page(&region, 3), expected(3));
    // On shared memory this drops the mapping and keeps the content.
    // SAFETY: within the region.
    let result = unsafe {
        libc::madvise(
            region.start().add(3 * PAGE_SIZE).cast(),
            PAGE_SIZE,
            libc::MADV_DONTNEED,
        )
    };
    assert_eq!(result, 0);
    assert_eq!(read_page(&region, 3), expected(3));
    let minor = umem::pager::FaultClass::Minor as usize;
    eventually(&pager, |stats| stats.fault_classes[minor].count == 1);
    assert_eq!(pager.stats().source.requests, 1);
}
