//! What dividing a region among several userfaultfds gives, by how many threads fault at a time.
//!
//!     cargo bench -p umem --bench stripes
//!
//! `docs/fault-path.md` says what it means.

use std::path::Path;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use umem::image::{Image, ImageWriter};
use umem::pager::{Fill, Notice, Pager, PagerOptions};
use umem::publish::Existing;
use umem::region::{Backing, PageSize, Region};
use umem::source::file::{Checksums, FileSource};
use umem::units::{PAGE_SIZE, PageIndex};

/// Pages of a region: 128 MiB, which 64 stripes of huge pages can be made of.
const PAGES: usize = 32768;

const STRIPES: [usize; 4] = [1, 2, 4, 8];
const THREADS: [usize; 6] = [1, 2, 4, 8, 16, 32];

/// Of each kind, one of each kind after the other.
const ROUNDS: usize = 7;

fn main() {
    let directory = tempfile::tempdir().expect("a directory for the image");
    let path = directory.path().join("image");
    make_image(&path);
    let cpus = thread::available_parallelism().expect("a number of CPUs");
    for threads in THREADS {
        let mut times = STRIPES.map(|_| Vec::new());
        for _ in 0..ROUNDS {
            for (stripes, times) in STRIPES.into_iter().zip(&mut times) {
                times.push(touch_all(&path, stripes, threads));
            }
        }
        let medians = times.map(|mut times| {
            times.sort_unstable();
            times[ROUNDS / 2]
        });
        for (stripes, median) in STRIPES.into_iter().zip(medians) {
            println!(
                "stripes={stripes} threads={threads} cpus={cpus} faults_per_s={:.0} ratio={:.2}",
                PAGES as f64 / median.as_secs_f64(),
                medians[0].as_secs_f64() / median.as_secs_f64(),
            );
        }
    }
}

fn make_image(path: &Path) {
    let mut writer = ImageWriter::create(path, (PAGES * PAGE_SIZE) as u64).expect("an image");
    for page in 0..PAGES as u64 {
        writer
            .write_page(PageIndex(page), &[page as u8 | 1; PAGE_SIZE])
            .expect("room for the image");
    }
    writer.finish(b"", Existing::Keep).expect("room for the image");
}

/// How long it takes until `threads` threads, all at once, have touched every page between them, in an order without pattern.
fn touch_all(image: &Path, stripes: usize, threads: usize) -> Duration {
    let image = Image::open(image).expect("the image just made");
    let source = Arc::new(FileSource::new(image, Checksums::On));
    let size = (PAGES * PAGE_SIZE) as u64;
    let region = Arc::new(Region::new(size, Backing::Memfd, PageSize::Small).expect("memory"));
    let options = PagerOptions {
        stripes,
        ..Fill::Off.into()
    };
    let observer = |notice| {
        if let Notice::Failed(error) = notice {
            // Whoever touches the page would wait for ever.
            eprintln!("{error:?}");
            std::process::exit(1);
        }
    };
    let _pager = Pager::start(Arc::clone(&region), source, options, observer).expect("a pager");
    let begin = Barrier::new(threads + 1);
    thread::scope(|scope| {
        for first in 0..threads {
            let (region, begin) = (&region, &begin);
            scope.spawn(move || {
                begin.wait();
                for turn in (first..PAGES).step_by(threads) {
                    // An odd factor: every page once.
                    let page = turn * 20_261 % PAGES;
                    let address = region.start().wrapping_add(page * PAGE_SIZE);
                    // SAFETY: within the region, which outlives the scope.
                    std::hint::black_box(unsafe { address.read_volatile() });
                }
            });
        }
        begin.wait();
        Instant::now()
    })
    // The scope has ended, and so all threads have.
    .elapsed()
}
