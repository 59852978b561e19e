//! What a background fill loads, and in which order.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::sync::{Arc, Condvar, Mutex};

use common::{
    BACKINGS, Fixture, assert_all_present, eventually, expected, image, read_page, shuffled, start,
};
use umem::image::{Image, ImageWriter};
use umem::pager::{Fill, PagerOptions, TouchRecord, register};
use umem::publish::Existing;
use umem::region::{Backing, PageSize, Region};
use umem::source::file::{Checksums, FileSource};
use umem::source::{Class, Content, PageSource, SourceError, SourceStats};
use umem::states::PageState;
use umem::units::{PAGE_SIZE, PageIndex, PageRange};
use umem::working_set::WorkingSet;

/// Pages whose content is their index. What more than one page is read at a time for is written down, and waits for a permit.
struct Stepped {
    fills: Mutex<(Vec<PageRange>, u64)>,
    changed: Condvar,
}

impl Stepped {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            fills: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Lets `count` more reads of the fill go on.
    fn permit(&self, count: u64) {
        self.fills.lock().unwrap().1 += count;
        self.changed.notify_all();
    }

    /// Waits for the read of the fill with this number, and answers what it is for.
    fn read_number(&self, number: usize) -> PageRange {
        let mut fills = self.fills.lock().unwrap();
        while fills.0.len() <= number {
            fills = self.changed.wait(fills).unwrap();
        }
        fills.0[number]
    }

    fn write(pages: PageRange, buffer: &mut [u8]) -> Content {
        for (page, bytes) in pages.pages().zip(buffer.chunks_mut(PAGE_SIZE)) {
            bytes.copy_from_slice(&expected(page.0));
        }
        Content::Data
    }
}

impl PageSource for Stepped {
    fn url(&self) -> String {
        "test:stepped".into()
    }

    fn try_read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Option<Content>, SourceError> {
        Ok(Some(Self::write(pages, buffer)))
    }

    fn read(&self, pages: PageRange, _: Class, buffer: &mut [u8]) -> Result<Content, SourceError> {
        let mut fills = self.fills.lock().unwrap();
        fills.0.push(pages);
        let number = fills.0.len() as u64;
        self.changed.notify_all();
        while fills.1 < number {
            fills = self.changed.wait(fills).unwrap();
        }
        Ok(Self::write(pages, buffer))
    }

    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SourceError> {
        Ok((within.count > 0).then_some(within))
    }

    fn digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn close(&self) {
        self.permit(u64::MAX / 2);
    }

    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}

#[test]
fn near_faults_goes_to_where_the_latest_fault_was() {
    const PAGES: u64 = 64 * 100;
    let source = Stepped::new();
    let Fixture {
        pager: _pager,
        region,
        notices,
    } = start(
        source.clone(),
        PAGES,
        Backing::Memfd,
        PageSize::Small,
        Fill::NearFaults,
    );
    // The fill is at its first step. Whatever it does next it decides after this fault.
    assert_eq!(source.read_number(0).start, PageIndex(0));
    assert_eq!(read_page(&region, 64 * 50 + 7), expected(64 * 50 + 7));
    source.permit(1);
    let near = [50, 49, 51, 48, 52];
    let mut number = 1;
    for chunk in near {
        // The chunk with the page that is there is read in two pieces around it.
        let pieces = if chunk == 50 { 2 } else { 1 };
        for _ in 0..pieces {
            assert_eq!(source.read_number(number).start.0 / 64, chunk);
            source.permit(1);
            number += 1;
        }
    }
    source.permit(PAGES);
    assert_all_present(&notices);
}

/// What one run touched is there in the next one before it is touched, zero pages too, and nothing else is.
/// A fill has asked for pages and waits. Who touches them does not wait for that; and what the fill brings in the end replaces nothing,
/// neither what was written nor what was dropped meanwhile.
#[test]
fn a_fault_does_not_wait_for_a_fill() {
    const PAGES: u64 = 64;
    for backing in BACKINGS {
        let source = Stepped::new();
        let Fixture {
            pager,
            region,
            notices,
        } = start(source.clone(), PAGES, backing, PageSize::Small, Fill::Sequential);
        assert_eq!(source.read_number(0).count, PAGES);
        for page in [3, 4, 5, 7] {
            assert_eq!(read_page(&region, page), expected(page), "{backing:?}");
        }
        let written = PageRange::single(PageIndex(7));
        region.write(written, &[0xee; PAGE_SIZE]).unwrap();
        let dropped = PageRange::single(PageIndex(4));
        region.remove(dropped).unwrap();
        assert_eq!(read_page(&region, 4), [0; PAGE_SIZE], "{backing:?}");
        source.permit(1);
        assert_all_present(&notices);
        for page in 0..PAGES {
            let content = match page {
                7 => [0xee; PAGE_SIZE],
                4 => [0; PAGE_SIZE],
                _ => expected(page),
            };
            assert_eq!(read_page(&region, page), content, "{backing:?}, page {page}");
        }
        eventually(&pager, |stats| {
            // Every fifth page is zero, and so is the one that was dropped and read again.
            (stats.demand, stats.prefetched, stats.zero) == (2, 48, 14)
        });
    }
}

#[test]
fn what_was_recorded_is_replayed() {
    const PAGES: u64 = 4096;
    for backing in BACKINGS {
        let (_directory, path) = common::image_file(PAGES);
        let open = || {
            let image = umem::image::Image::open(&path).unwrap();
            Arc::new(FileSource::new(image, Checksums::On))
        };
        let touched: Vec<u64> = shuffled(PAGES, 5).take(1500).collect();
        let record = Arc::new(TouchRecord::default());
        let options = PagerOptions {
            record: Some(Arc::clone(&record)),
            ..Fill::Off.into()
        };
        let source = open();
        let digest = source.digest().unwrap();
        let Fixture {
            mut pager, region, ..
        } = start(source, PAGES, backing, PageSize::Small, options);
        for page in &touched {
            assert_eq!(read_page(&region, *page), expected(*page));
        }
        pager.stop();
        let recorded = record.finish();
        let pages: Vec<u64> = recorded.iter().map(|page| page.0).collect();
        assert_eq!(pages, touched);

        let set = Arc::new(WorkingSet::new(digest, PAGES, &recorded));
        let Fixture { pager, region, .. } = start(
            open(),
            PAGES,
            backing,
            PageSize::Small,
            Fill::Recorded(Arc::clone(&set)),
        );
        eventually(&pager, |stats| stats.states.present == set.pages());
        let zero = touched.iter().filter(|page| page.is_multiple_of(5)).count() as u64;
        assert_eq!(pager.stats().zero, zero);
        assert_eq!(region.populated().unwrap(), set.pages());
        for page in 0..PAGES {
            assert_eq!(
                read_page(&region, page),
                expected(page),
                "{backing:?} page {page}"
            );
        }
        eventually(&pager, |stats| stats.faults.count == PAGES - set.pages());
    }
}

/// As many as asked for, of one length but the last, side by side; no more than there are huge pages.
#[test]
fn stripes_divide_a_region_at_huge_pages() {
    const PAGES: u64 = 5 * 512 + 100;
    let region = Region::new(PAGES * PAGE_SIZE as u64, Backing::Memfd, PageSize::Small).unwrap();
    for (asked, lengths) in [
        (1, &[3072 - 412][..]),
        (2, &[1536, 1124]),
        (3, &[1024, 1024, 612]),
        (99, &[512, 512, 512, 512, 512, 100]),
    ] {
        let stripes = register(&region, asked, region.registration().1).unwrap();
        let found: Vec<u64> = stripes.iter().map(|stripe| stripe.pages.count).collect();
        assert_eq!(found, lengths);
        let mut next = PageIndex(0);
        for stripe in &stripes {
            assert_eq!(stripe.pages.start, next);
            assert_eq!(stripe.start, region.addresses(stripe.pages).start);
            next = stripe.pages.end();
        }
        assert_eq!(next, PageIndex(PAGES));
    }
}

#[test]
fn stripes_serve_one_region() {
    const PAGES: u64 = 5 * 512 + 100;
    for stripes in [1, 2, 3, 99] {
        let (_directory, image) = image(PAGES);
        let options = PagerOptions {
            stripes,
            ..Fill::Sequential.into()
        };
        let source = Arc::new(FileSource::new(image, Checksums::On));
        let Fixture {
            pager: _pager,
            region,
            notices,
        } = start(source, PAGES, Backing::Memfd, PageSize::Small, options);
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let region = &region;
                scope.spawn(move || {
                    for page in shuffled(PAGES, seed) {
                        assert_eq!(read_page(region, page), expected(page), "page {page}");
                    }
                });
            }
        });
        assert_all_present(&notices);
    }
}

/// At the end of a fill the zero pages that are left become the kernel's. Whoever looks at the states must not take one that the guest
/// has written to for one that is still at the source, as a snapshot would that is made in that moment.
#[test]
fn what_is_written_at_the_end_of_a_fill_is_known_to_be_there() {
    // Many zero pages, so that giving them up takes its time.
    const PAGES: u64 = 1 << 18;
    const WITH_CONTENT: u64 = 64;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut writer = ImageWriter::create(&path, PAGES * PAGE_SIZE as u64).unwrap();
    for page in (0..PAGES).step_by((PAGES / WITH_CONTENT) as usize) {
        writer.write_page(PageIndex(page), &[7; PAGE_SIZE]).unwrap();
    }
    writer.finish(b"", Existing::Keep).unwrap();
    for round in 0..40 {
        let backing = BACKINGS[round % 2];
        let source = FileSource::new(Image::open(&path).unwrap(), Checksums::On);
        let fixture = start(
            Arc::new(source),
            PAGES,
            backing,
            PageSize::Small,
            Fill::Sequential,
        );
        let states = fixture.pager.states();
        let region = &fixture.region;
        let mut ended = false;
        let mut after = 0;
        for page in (0..PAGES).rev() {
            // SAFETY: within the region, which outlives this; nobody else writes there.
            unsafe {
                region.start().add(page as usize * PAGE_SIZE).write_volatile(1);
            }
            match states.get(PageIndex(page)) {
                PageState::Present => {}
                // It is there, and its state is about to say so.
                PageState::InFlight if region.holds(PageIndex(page)).unwrap() => {}
                state => panic!("round {round}: page {page} was written to and is {state:?}"),
            }
            ended = ended || fixture.notices.try_recv().is_ok();
            after += u64::from(ended);
            if after > 1000 {
                break;
            }
        }
        assert!(ended, "the fill took longer than all of the writing");
    }
}
