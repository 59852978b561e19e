//! What the tests of the pager share.

#![allow(dead_code, unreachable_pub)] // each test file uses a part of it

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use umem::image::{Image, ImageWriter};
use umem::pager::{Notice, Pager, PagerOptions, PagerStats};
use umem::publish::Existing;
use umem::region::{Backing, PageSize, Region};
use umem::source::PageSource;
use umem::units::{PAGE_SIZE, PageIndex};

pub const BACKINGS: [Backing; 2] = [Backing::Memfd, Backing::Anonymous];

/// What belongs to `page`: its index and a constant, in its first and last words. Every fifth page is zero.
pub fn expected(page: u64) -> [u8; PAGE_SIZE] {
    let mut content = [0; PAGE_SIZE];
    if !page.is_multiple_of(5) {
        content[..8].copy_from_slice(&(page ^ 0x5555).to_le_bytes());
        content[PAGE_SIZE - 8..].copy_from_slice(&page.to_le_bytes());
    }
    content
}

pub fn image(pages: u64) -> (tempfile::TempDir, Image) {
    let (directory, path) = image_file(pages);
    (directory, Image::open(&path).unwrap())
}

/// An image of `expected` pages.
pub fn image_file(pages: u64) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut writer = ImageWriter::create(&path, pages * PAGE_SIZE as u64).unwrap();
    for page in 0..pages {
        writer.write_page(PageIndex(page), &expected(page)).unwrap();
    }
    writer.finish(b"", Existing::Keep).unwrap();
    (directory, path)
}

pub fn read_page(region: &Region, page: u64) -> [u8; PAGE_SIZE] {
    assert!(page < region.pages());
    let mut content = [0; PAGE_SIZE];
    // SAFETY: within the region, which outlives the call. Nobody writes to it but through atomics of whole words.
    unsafe {
        let from = region.start().add(page as usize * PAGE_SIZE);
        std::ptr::copy_nonoverlapping(from, content.as_mut_ptr(), PAGE_SIZE);
    }
    content
}

pub struct Fixture {
    pub pager: Pager,
    pub region: Arc<Region>,
    pub notices: Receiver<Notice>,
}

pub fn start(
    source: Arc<dyn PageSource>,
    pages: u64,
    backing: Backing,
    size: PageSize,
    options: impl Into<PagerOptions>,
) -> Fixture {
    let region = Arc::new(Region::new(pages * PAGE_SIZE as u64, backing, size).unwrap());
    let (sender, notices) = channel();
    let pager = Pager::start(Arc::clone(&region), source, options, move |notice| {
        let _ = sender.send(notice);
    })
    .unwrap();
    Fixture {
        pager,
        region,
        notices,
    }
}

pub fn assert_all_present(notices: &Receiver<Notice>) {
    match notices.recv().unwrap() {
        Notice::AllPagesPresent => {}
        other => panic!("{other:?}"),
    }
}

/// The pager counts what it did after it has woken who waited, so a reader may be ahead of the counts for a moment.
pub fn eventually(pager: &Pager, right: impl Fn(&PagerStats) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !right(&pager.stats()) {
        assert!(Instant::now() < deadline, "{:?}", pager.stats());
        thread::yield_now();
    }
}

/// How often a random test is done: as `UMEM_TEST_ROUNDS` says, or so often.
pub fn rounds(otherwise: u64) -> u64 {
    std::env::var("UMEM_TEST_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(otherwise)
}

/// A walk over `0..n` in an order without pattern.
pub fn shuffled(n: u64, seed: u64) -> impl Iterator<Item = u64> {
    let mut order: Vec<u64> = (0..n).collect();
    let mut random = Random(seed);
    for i in (1..order.len()).rev() {
        order.swap(i, random.below(i as u64 + 1) as usize);
    }
    order.into_iter()
}

pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}
