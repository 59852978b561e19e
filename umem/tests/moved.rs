//! Memory that is moved to another address, unmapped, or made larger while a pager serves it.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::sync::{Arc, RwLock};
use std::thread;

use common::{BACKINGS, Fixture, Random, eventually, expected, image, start};
use umem::pager::{Fill, PagerOptions};
use umem::region::{Backing, PageSize};
use umem::source::file::{Checksums, FileSource};
use umem::units::PAGE_SIZE;

/// Address space of `pages` pages in which nothing is.
fn reserve(pages: usize) -> *mut u8 {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            pages * PAGE_SIZE,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert_ne!(start, libc::MAP_FAILED);
    start.cast()
}

/// Moves `pages` pages from one address to another, where a reservation is.
fn move_pages(from: *mut u8, to: *mut u8, pages: usize) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let length = pages * PAGE_SIZE;
    // SAFETY: the caller's memory, which is nowhere else in use under either address, and its own reservation.
    let moved = unsafe { libc::mremap(from.cast(), length, length, flags, to) };
    assert_eq!(moved, to.cast(), "{}", std::io::Error::last_os_error());
}

fn read_at(address: *mut u8) -> [u8; PAGE_SIZE] {
    // SAFETY: the caller knows that a page is mapped there, and nobody writes to it.
    unsafe { address.cast::<[u8; PAGE_SIZE]>().read_volatile() }
}

/// A served region that the test moves about. It is never unmapped: its first address may be somebody else's by then.
fn served(pages: u64, backing: Backing, options: PagerOptions) -> Fixture {
    let (_directory, image) = image(pages);
    let source = Arc::new(FileSource::new(image, Checksums::On));
    let fixture = start(source, pages, backing, PageSize::Small, options);
    std::mem::forget(Arc::clone(&fixture.region));
    fixture
}

#[test]
fn moved_pages_come_at_their_new_address() {
    for backing in BACKINGS {
        let Fixture { region, .. } = &served(64, backing, Fill::Off.into());
        let (old, new) = (region.start(), reserve(16));
        assert_eq!(read_at(old.wrapping_add(17 * PAGE_SIZE)), expected(17), "before");
        move_pages(old.wrapping_add(16 * PAGE_SIZE), new, 16);
        for page in 0..64 {
            let address = match page {
                16..32 => new.wrapping_add((page - 16) * PAGE_SIZE),
                _ => old.wrapping_add(page * PAGE_SIZE),
            };
            assert_eq!(read_at(address), expected(page as u64), "{backing:?} page {page}");
        }
    }
}

#[test]
fn unmapped_pages_are_removed_and_the_rest_is_served() {
    for backing in BACKINGS {
        let Fixture {
            pager,
            region,
            notices,
        } = &served(64, backing, Fill::Off.into());
        let start = region.start();
        // SAFETY: nobody uses these pages.
        let result = unsafe { libc::munmap(start.wrapping_add(40 * PAGE_SIZE).cast(), 8 * PAGE_SIZE) };
        assert_eq!(result, 0);
        eventually(pager, |stats| stats.states.removed == 8);
        for page in (0..40).chain(48..64) {
            assert_eq!(
                read_at(start.wrapping_add(page * PAGE_SIZE)),
                expected(page as u64)
            );
        }
        // Nothing is missing any more, so umem leaves, though a part of the region is not there.
        common::assert_all_present(notices);
    }
}

#[test]
fn what_is_behind_the_end_of_enlarged_memory_is_zero() {
    let Fixture { region, .. } = &served(64, Backing::Anonymous, Fill::Off.into());
    let new = reserve(80);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the region, which nobody uses under its old address, and a reservation of this test.
    let moved = unsafe { libc::mremap(region.start().cast(), 64 * PAGE_SIZE, 80 * PAGE_SIZE, flags, new) };
    assert_eq!(moved, new.cast());
    for page in (0..80).rev() {
        let right = if page < 64 {
            expected(page as u64)
        } else {
            [0; PAGE_SIZE]
        };
        assert_eq!(read_at(new.wrapping_add(page * PAGE_SIZE)), right, "page {page}");
    }
}

/// Blocks of pages are moved and dropped while threads read and a fill loads, at random.
#[test]
fn pages_that_move_under_a_fill_are_right_wherever_they_are() {
    const BLOCK: usize = 8;
    const BLOCKS: usize = 32;
    let seed = std::env::var("UMEM_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
    println!("UMEM_TEST_SEED={seed}");
    for (round, backing) in BACKINGS.into_iter().cycle().take(20).enumerate() {
        let fill = if round % 3 == 0 {
            Fill::Sequential
        } else {
            Fill::NearFaults
        };
        let options = PagerOptions {
            stripes: 1 + round % 2,
            ..fill.into()
        };
        let Fixture { region, .. } = &served((BLOCK * BLOCKS) as u64, backing, options);
        // Where each block is, and whether it was dropped. Whoever reads a block keeps it from being moved.
        let blocks: Vec<RwLock<(usize, bool)>> = (0..BLOCKS)
            .map(|block| {
                RwLock::new((
                    region.start().wrapping_add(block * BLOCK * PAGE_SIZE) as usize,
                    false,
                ))
            })
            .collect();
        thread::scope(|scope| {
            for thread in 0..3 {
                let blocks = &blocks;
                let mut random = Random(seed ^ (round * 3 + thread) as u64);
                scope.spawn(move || {
                    for _ in 0..400 {
                        let (block, page) = (random.below(BLOCKS as u64), random.below(BLOCK as u64));
                        let place = blocks[block as usize].read().unwrap();
                        let address = (place.0 + page as usize * PAGE_SIZE) as *mut u8;
                        let page = block * BLOCK as u64 + page;
                        let right = if place.1 { [0; PAGE_SIZE] } else { expected(page) };
                        assert_eq!(read_at(address), right, "round {round}: page {page}");
                    }
                });
            }
            let mut random = Random(seed.wrapping_add(99));
            for _ in 0..60 {
                let mut place = blocks[random.below(BLOCKS as u64) as usize].write().unwrap();
                if random.below(4) > 0 {
                    let to = reserve(BLOCK);
                    move_pages(place.0 as *mut u8, to, BLOCK);
                    place.0 = to as usize;
                } else {
                    let advice = match backing {
                        Backing::Memfd => libc::MADV_REMOVE,
                        Backing::Anonymous => libc::MADV_DONTNEED,
                    };
                    // SAFETY: nobody reads the block meanwhile, and whoever does after it expects zeros.
                    let result = unsafe { libc::madvise(place.0 as *mut _, BLOCK * PAGE_SIZE, advice) };
                    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
                    place.1 = true;
                }
            }
        });
    }
}
