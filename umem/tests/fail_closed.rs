//! What must never be served, on plain memory of this process: damage to the image, memory that others touched, and the ends
//! of things at awkward moments.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use common::{
    BACKINGS, Fixture, assert_all_present, eventually, expected, image, image_file, read_page, start,
};
use umem::image::Image;
use umem::pager::{Fill, Memory, Notice, Pager, PagerError, StartError, register};
use umem::region::{Backing, PageSize, Region};
use umem::source::file::{Checksums, FileSource};
use umem::source::{Class, Content, PageSource, SourceError, SourceStats};
use umem::states::{Claim, PageStates};
use umem::units::{PAGE_SIZE, PageIndex, PageRange};

const PAGES: u64 = 4096;

fn write_at(path: &Path, bytes: &[u8], offset: u64) {
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .write_all_at(bytes, offset)
        .unwrap();
}

fn punch_hole(path: &Path, offset: u64, length: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, offset, length).unwrap();
}

fn failure(notices: &Receiver<Notice>) -> Arc<PagerError> {
    match notices.recv().unwrap() {
        Notice::Failed(error) => error,
        other => panic!("{other:?} where a failure was due"),
    }
}

/// Opens an image, damages the file, and touches `page`; with and without a fill it must never be had.
fn never_served(page: u64, damage: impl Fn(&Path)) {
    for fill in [Fill::Off, Fill::Sequential, Fill::NearFaults] {
        let (_directory, path) = image_file(PAGES);
        let image = Image::open(&path).unwrap();
        damage(&path);
        let source = Arc::new(FileSource::new(image, Checksums::On));
        let Fixture {
            pager,
            region,
            notices,
        } = start(source, PAGES, Backing::Memfd, PageSize::Small, fill.clone());
        let touched = Arc::new(AtomicBool::new(false));
        let toucher = {
            let (region, touched) = (Arc::clone(&region), Arc::clone(&touched));
            thread::spawn(move || {
                std::hint::black_box(read_page(&region, page));
                touched.store(true, SeqCst);
            })
        };
        let error = failure(&notices);
        assert!(
            matches!(
                &*error,
                PagerError::Source {
                    source: SourceError::Corrupt(_),
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(
            !touched.load(SeqCst),
            "{fill:?}: the thread that touched the page went on"
        );
        // Only the end of the userfaultfd lets it go, and then it must not matter any more what it reads.
        drop(pager);
        toucher.join().unwrap();
    }
}

#[test]
fn a_page_with_a_flipped_bit() {
    never_served(13, |path| write_at(path, &[0x80], 13 * PAGE_SIZE as u64 + 100));
}

#[test]
fn a_page_that_became_a_hole() {
    never_served(1026, |path| {
        punch_hole(path, 1024 * PAGE_SIZE as u64, 16 * PAGE_SIZE as u64);
    });
}

#[test]
fn pages_whose_block_of_checksums_became_a_hole() {
    never_served(7, |path| {
        punch_hole(path, PAGES * PAGE_SIZE as u64, PAGE_SIZE as u64);
    });
}

#[test]
fn an_image_that_was_truncated() {
    never_served(7, |path| {
        std::fs::OpenOptions::new()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(0)
            .unwrap();
    });
}

#[test]
fn an_image_that_was_truncated_is_noticed_by_a_fill_without_checksums() {
    let (_directory, path) = image_file(PAGES);
    let image = Image::open(&path).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(0)
        .unwrap();
    let source = Arc::new(FileSource::new(image, Checksums::Off));
    let fixture = start(source, PAGES, Backing::Memfd, PageSize::Small, Fill::Sequential);
    failure(&fixture.notices);
}

#[test]
fn a_region_that_somebody_touched_is_refused() {
    for backing in BACKINGS {
        let (_directory, image) = image(64);
        let region = Arc::new(Region::new(64 * PAGE_SIZE as u64, backing, PageSize::Small).unwrap());
        std::hint::black_box(read_page(&region, 3));
        let source = Arc::new(FileSource::new(image, Checksums::On));
        let error = Pager::start(region, source, Fill::Off, |_| {}).unwrap_err();
        assert!(
            matches!(error, StartError::Populated(1)),
            "{backing:?}: {error:?}"
        );
    }
}

/// A source whose answers wait until they are let go: data up to a page, zero from there on.
struct Gated {
    data_until: u64,
    /// Reads, and searches for data behind the last, that are waiting or have waited.
    reading: AtomicU64,
    searching: AtomicU64,
    reads_go: Mutex<bool>,
    searches_go: Mutex<bool>,
    changed: Condvar,
}

impl Gated {
    fn new(data_until: u64) -> Arc<Self> {
        Arc::new(Self {
            data_until,
            reading: AtomicU64::new(0),
            searching: AtomicU64::new(0),
            reads_go: Mutex::new(false),
            searches_go: Mutex::new(false),
            changed: Condvar::new(),
        })
    }

    fn wait(&self, go: &Mutex<bool>) {
        let mut go = go.lock().unwrap();
        while !*go {
            go = self.changed.wait(go).unwrap();
        }
    }

    fn set(&self, which: &Mutex<bool>, go: bool) {
        *which.lock().unwrap() = go;
        self.changed.notify_all();
    }

    fn await_count(count: &AtomicU64, least: u64) {
        while count.load(SeqCst) < least {
            thread::yield_now();
        }
    }
}

impl PageSource for Gated {
    fn url(&self) -> String {
        "test:gated".into()
    }

    fn try_read(&self, _: PageRange, _: &mut [u8]) -> Result<Option<Content>, SourceError> {
        Ok(None)
    }

    fn read(&self, pages: PageRange, _: Class, buffer: &mut [u8]) -> Result<Content, SourceError> {
        self.reading.fetch_add(1, SeqCst);
        self.wait(&self.reads_go);
        if pages.start.0 >= self.data_until {
            return Ok(Content::Zero);
        }
        buffer.fill(1);
        Ok(Content::Data)
    }

    fn digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SourceError> {
        let data = within.clamp_to(PageIndex(self.data_until));
        if data.count > 0 {
            return Ok(Some(data));
        }
        self.searching.fetch_add(1, SeqCst);
        self.wait(&self.searches_go);
        Ok(None)
    }

    fn close(&self) {
        self.set(&self.reads_go, true);
        self.set(&self.searches_go, true);
    }

    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}

/// A source of which nothing comes until it is closed, and then an error.
#[derive(Default)]
struct Stuck {
    reading: AtomicU64,
    closed: Mutex<bool>,
    changed: Condvar,
}

impl PageSource for Stuck {
    fn url(&self) -> String {
        "test:stuck".into()
    }

    fn try_read(&self, _: PageRange, _: &mut [u8]) -> Result<Option<Content>, SourceError> {
        Ok(None)
    }

    fn read(&self, _: PageRange, _: Class, _: &mut [u8]) -> Result<Content, SourceError> {
        self.reading.fetch_add(1, SeqCst);
        let closed = self.closed.lock().unwrap();
        drop(self.changed.wait_while(closed, |closed| !*closed).unwrap());
        Err(SourceError::Lost("closed".into()))
    }

    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SourceError> {
        Ok(Some(within))
    }

    fn digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn close(&self) {
        *self.closed.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}

/// Of two pages that a pager had in flight when it was killed one was installed. Those that take over are killed too, each before it
/// has found out, until one has the time.
#[test]
fn what_may_have_been_installed_is_in_flight_until_somebody_knows() {
    const PAGES: u64 = 16;
    let (_directory, image) = image_file(PAGES);
    for backing in BACKINGS {
        let region = Region::new(PAGES * PAGE_SIZE as u64, backing, PageSize::Small).unwrap();
        let states = Arc::new(PageStates::new(PAGES, 1).unwrap());
        let (installed, missing) = (PageRange::new(PageIndex(3), 1), PageRange::new(PageIndex(7), 1));
        region.write(installed, &expected(3)).unwrap();
        for page in [installed, missing] {
            assert_eq!(states.claim(page), Claim::Granted);
        }
        let memory = || Memory {
            stripes: register(&region, 1, region.registration().1).unwrap(),
            page_size: PageSize::Small,
            states: Arc::clone(&states),
        };
        for _ in 0..2 {
            let source = Arc::new(Stuck::default());
            let pager = Pager::take_over(memory(), source.clone(), Fill::Off, |_| ()).unwrap();
            Gated::await_count(&source.reading, 1);
            drop(pager);
            assert_eq!(
                states.in_flight(),
                [installed.start, missing.start],
                "{backing:?}"
            );
        }
        let source = Arc::new(FileSource::new(Image::open(&image).unwrap(), Checksums::On));
        let pager = Pager::take_over(memory(), source, Fill::Off, |_| ()).unwrap();
        eventually(&pager, |stats| stats.states.in_flight == 0);
        assert_eq!(states.counts().present, 2);
        for page in [3, 7, 8] {
            assert_eq!(
                read_page(&region, page),
                expected(page),
                "{backing:?}, page {page}"
            );
        }
    }
}

/// The pager ends while the fill has pages to install and another thread drops memory: neither may wait for the other.
#[test]
fn an_end_with_a_removal_under_way_ends() {
    let source = Gated::new(64);
    let Fixture { pager, region, .. } = start(
        source.clone(),
        1024,
        Backing::Memfd,
        PageSize::Small,
        Fill::Sequential,
    );
    Gated::await_count(&source.reading, 1);
    thread::scope(|scope| {
        scope.spawn(move || drop(pager));
        let region = &region;
        scope.spawn(move || {
            for page in 512..520 {
                // SAFETY: within the region, whose pages nobody reads.
                let page = unsafe { region.start().add(page * PAGE_SIZE) };
                // SAFETY: the same.
                assert_eq!(0, unsafe {
                    libc::madvise(page.cast(), PAGE_SIZE, libc::MADV_REMOVE)
                });
            }
        });
        source.set(&source.reads_go, true);
    });
}

/// Zero pages that are being fetched when the region is released are counted once, as zero pages.
#[test]
fn what_is_in_flight_at_the_release_is_counted() {
    const PAGES: u64 = 64;
    let source = Gated::new(1);
    let Fixture {
        pager,
        region,
        notices,
    } = start(
        source.clone(),
        PAGES,
        Backing::Memfd,
        PageSize::Small,
        Fill::Sequential,
    );
    source.set(&source.searches_go, true);
    Gated::await_count(&source.reading, 1);
    source.set(&source.searches_go, false);
    source.set(&source.reads_go, true);
    // The fill has passed its last gate: it is looking for what is not settled yet.
    Gated::await_count(&source.searching, 2);
    source.set(&source.reads_go, false);
    thread::scope(|scope| {
        let region = &region;
        let touchers: Vec<_> = (10..18)
            .map(|page| scope.spawn(move || read_page(region, page)))
            .collect();
        // As many as there are reader threads; the others are in the queue or on their way to it.
        Gated::await_count(&source.reading, 5);
        source.set(&source.searches_go, true);
        assert_all_present(&notices);
        source.set(&source.reads_go, true);
        for toucher in touchers {
            assert_eq!(toucher.join().unwrap(), [0; PAGE_SIZE]);
        }
    });
    eventually(&pager, |stats| {
        stats.zero + stats.prefetched + stats.demand == PAGES && stats.states.in_flight == 0
    });
}

#[test]
fn content_that_the_pager_did_not_bring_is_refused() {
    let source = Gated::new(64);
    let Fixture {
        pager,
        region,
        notices,
    } = start(source.clone(), 64, Backing::Memfd, PageSize::Small, Fill::Off);
    let toucher = {
        let region = Arc::clone(&region);
        thread::spawn(move || std::hint::black_box(read_page(&region, 5)))
    };
    Gated::await_count(&source.reading, 1);
    rustix::io::pwrite(region.memfd().unwrap(), &[0xee; PAGE_SIZE], 5 * PAGE_SIZE as u64).unwrap();
    source.set(&source.reads_go, true);
    assert!(matches!(
        &*failure(&notices),
        PagerError::Unaccounted { page: PageIndex(5) }
    ));
    drop(pager);
    toucher.join().unwrap();
}

/// When the last page is there, what came page by page becomes huge pages again.
#[test]
fn memory_becomes_huge_pages_again() {
    const PAGES: u64 = 4 * 512;
    for backing in BACKINGS {
        let (_directory, image) = image(PAGES);
        let source = Arc::new(FileSource::new(image, Checksums::On));
        let fixture = start(source, PAGES, backing, PageSize::Small, Fill::Sequential);
        assert_all_present(&fixture.notices);
        // Zero pages that the kernel was left to fill in are not populated; touched, they are.
        for page in 0..PAGES {
            assert_eq!(read_page(&fixture.region, page), common::expected(page));
        }
        let start = fixture.region.all_addresses().start.0;
        assert!(
            start.is_multiple_of(2 << 20),
            "{start:#x}: no huge page can be here"
        );
        fixture.region.collapse(PageRange::new(PageIndex(0), 512));
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let region = &maps[maps.find(&format!("{start:x}-")).unwrap()..];
        let key = if backing == Backing::Memfd {
            "ShmemPmdMapped:"
        } else {
            "AnonHugePages:"
        };
        let line = region.lines().find(|line| line.starts_with(key)).unwrap();
        let kib: u64 = line
            .trim_start_matches(key)
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        if kib == 0 && !Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            println!("skipped: memory_becomes_huge_pages_again: this kernel has no transparent huge pages");
        } else {
            assert!(kib >= 2048, "{backing:?}: {line}");
        }
    }
}
