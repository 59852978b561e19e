//! How long a thread waits for a page: the pager on plain memory of this process, against the least that could answer.
//!
//! `docs/fault-path.md` says what is measured and what it means.

#[path = "fault/floor.rs"]
mod floor;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode};
use rustix::thread::CpuSet;
use umem::image::{Image, ImageWriter};
use umem::pager::{FaultClass, Fill, Notice, Pager};
use umem::publish::Existing;
use umem::region::{Backing, PageSize, Region};
use umem::source::file::{Checksums, FileSource};
use umem::source::{Class, Content, PageSource, SourceError, SourceStats};
use umem::units::{PAGE_SIZE, PageIndex, PageRange};

use floor::Floor;

/// Pages of a region: 64 MiB, more than stays in a processor's own cache.
const PAGES: u64 = 16384;

/// Touches at the start of each round that are not counted: the threads begin to wait, the first page tables are made.
const UNCOUNTED: usize = 64;

/// Of each kind of comparison that many slices of time, of each kind alternately.
const SLICES: usize = 20;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let results = compare_all(&mut criterion);
    criterion.final_summary();
    for result in results.iter().filter(|result| !result.floor.0.is_empty()) {
        println!("{result}");
    }
}

/// Where the two threads run.
#[derive(Clone, Copy)]
struct Cpus {
    name: &'static str,
    handler: usize,
    toucher: usize,
}

#[derive(Clone, Copy)]
struct Place {
    cpus: Cpus,
    backing: Backing,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backing = match self.backing {
            Backing::Memfd => "memfd",
            Backing::Anonymous => "anonymous",
        };
        write!(f, "cpus={} backing={backing}", self.cpus.name)
    }
}

/// How long touches took, in nanoseconds.
#[derive(Default)]
struct Waits(Vec<u64>);

impl Waits {
    fn total(&self) -> Duration {
        Duration::from_nanos(self.0.iter().sum())
    }

    fn percentile(&self, percent: usize) -> u64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1]
    }
}

/// The pager with a source against the floor.
struct Comparison {
    place: Place,
    source: &'static str,
    umem: Waits,
    floor: Waits,
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            place,
            source,
            umem,
            floor,
        } = self;
        write!(f, "{place} source={source} touches={}", umem.0.len())?;
        for (percentile, percent) in [("p50", 50), ("p99", 99)] {
            let (umem, floor) = (umem.percentile(percent), floor.percentile(percent));
            let ratio = umem as f64 / floor as f64;
            write!(
                f,
                " umem_{percentile}_ns={umem} floor_{percentile}_ns={floor} {percentile}_ratio={ratio:.2}"
            )?;
        }
        Ok(())
    }
}

fn compare_all(criterion: &mut Criterion) -> Vec<Comparison> {
    let directory = tempfile::tempdir().expect("a directory for the image");
    let path = directory.path().join("image");
    make_image(&path);
    let file = |checksums| -> Arc<dyn PageSource> {
        let image = Image::open(&path).expect("the image just made");
        Arc::new(FileSource::new(image, checksums))
    };
    let sources: [(&str, Arc<dyn PageSource>); 3] = [
        ("file", file(Checksums::On)),
        ("file-unchecked", file(Checksums::Off)),
        ("constant", Arc::new(Constant)),
    ];
    let mut results = Vec::new();
    for cpus in placements() {
        // Across CPUs the wake-up hides what the parts of the way cost.
        let sources = if cpus.name == "same" {
            &sources[..]
        } else {
            &sources[..1]
        };
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let place = Place { cpus, backing };
            for (name, source) in sources {
                results.push(compare(criterion, place, name, source));
            }
        }
    }
    results
}

fn placements() -> Vec<Cpus> {
    let allowed = rustix::thread::sched_getaffinity(None).expect("this thread's CPUs");
    let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let handler = allowed.next().expect("a CPU to run on");
    let mut placements = vec![Cpus {
        name: "same",
        handler,
        toucher: handler,
    }];
    match allowed.next() {
        Some(toucher) => placements.push(Cpus {
            name: "across",
            handler,
            toucher,
        }),
        None => eprintln!("skipped: across CPUs: this process may use one CPU only"),
    }
    placements
}

/// Runs the pager and the floor as two benchmarks. Beside each slice of the one runs a slice of the other, so that what else
/// the machine does falls upon both; the percentiles are those of the pairs.
fn compare(
    criterion: &mut Criterion,
    place: Place,
    source: &'static str,
    pages_from: &Arc<dyn PageSource>,
) -> Comparison {
    let mut comparison = Comparison {
        place,
        source,
        umem: Waits::default(),
        floor: Waits::default(),
    };
    let mut group = criterion.benchmark_group(format!("fault {place} source={source}"));
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(SLICES / 2)
        .nresamples(10_000)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    for umem_is_measured in [true, false] {
        group.bench_function(if umem_is_measured { "umem" } else { "floor" }, |bencher| {
            bencher.iter_custom(|touches| {
                let umem = touch_served(place, touches, || Pages::of_umem(place.backing, pages_from));
                let floor = touch_served(place, touches, || Pages::of_floor(place.backing));
                let measured = if umem_is_measured { &umem } else { &floor };
                let total = measured.total();
                comparison.umem.0.extend(umem.0);
                comparison.floor.0.extend(floor.0);
                total
            });
        });
    }
    group.finish();
    comparison
}

/// Memory whose faults somebody answers, until it is dropped.
enum Pages {
    Umem(Pager, Arc<Region>),
    Floor(Floor),
}

impl Pages {
    fn of_umem(backing: Backing, source: &Arc<dyn PageSource>) -> Self {
        let size = PAGES * PAGE_SIZE as u64;
        let region = Arc::new(Region::new(size, backing, PageSize::Small).expect("memory for the pager"));
        let pager = Pager::start(Arc::clone(&region), Arc::clone(source), Fill::Off, |notice| {
            if let Notice::Failed(error) = notice {
                // Whoever touches the page would wait for ever.
                eprintln!("{error:?}");
                std::process::exit(1);
            }
        });
        Self::Umem(pager.expect("a pager"), region)
    }

    fn of_floor(backing: Backing) -> Self {
        Self::Floor(Floor::start(PAGES, backing))
    }

    fn region(&self) -> &Region {
        match self {
            Self::Umem(_, region) => region,
            Self::Floor(floor) => floor.region(),
        }
    }

    /// All that was measured was the fault thread's own answer, or nothing is said of it.
    fn assert_answered_at_once(&self) {
        if let Self::Umem(pager, _) = self {
            let stats = pager.stats();
            for class in [
                FaultClass::Zero,
                FaultClass::Fetched,
                FaultClass::Joined,
                FaultClass::Minor,
            ] {
                let count = stats.fault_classes[class as usize].count;
                assert_eq!(
                    count,
                    0,
                    "{} faults: is the image no longer in the page cache?",
                    class.name()
                );
            }
        }
    }
}

/// Touches that many pages, one after another, in an order without pattern.
fn touch_served(place: Place, touches: u64, serve: impl Fn() -> Pages) -> Waits {
    // The last page is left alone: with it the pager would leave, and collapse what was touched into huge pages.
    let most = PAGES as usize - 1 - UNCOUNTED;
    let mut waits = Waits(Vec::with_capacity(touches as usize));
    while waits.0.len() < touches as usize {
        // Threads run where the thread runs that starts them.
        run_on(place.cpus.handler);
        let pages = serve();
        run_on(place.cpus.toucher);
        let mut order = shuffled(PAGES - 1);
        for page in order.by_ref().take(UNCOUNTED) {
            touch(pages.region(), page);
        }
        let count = most.min(touches as usize - waits.0.len());
        waits
            .0
            .extend(order.take(count).map(|page| touch(pages.region(), page)));
        pages.assert_answered_at_once();
    }
    waits
}

/// How long it takes to read a byte of `page`, in nanoseconds.
fn touch(region: &Region, page: u64) -> u64 {
    let address = region.addresses(PageRange::single(PageIndex(page))).start.0 as *const u8;
    let begin = Instant::now();
    // SAFETY: within the region.
    let byte = unsafe { address.read_volatile() };
    let waited = begin.elapsed();
    assert_ne!(byte, 0, "page {page} is empty");
    waited.as_nanos() as u64
}

fn run_on(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    rustix::thread::sched_setaffinity(None, &cpus).expect("running on one CPU");
}

/// An image without a zero page. Being just written, it is in the page cache.
fn make_image(path: &Path) {
    let mut writer = ImageWriter::create(path, PAGES * PAGE_SIZE as u64).expect("an image");
    for page in 0..PAGES {
        let mut content = [0x5a; PAGE_SIZE];
        content[8..16].copy_from_slice(&page.to_le_bytes());
        writer
            .write_page(PageIndex(page), &content)
            .expect("a page of the image");
    }
    writer.finish(b"", Existing::Keep).expect("the end of the image");
}

/// A source that costs a copy from the processor's cache: what remains is the pager itself.
struct Constant;

static CONTENT: [u8; PAGE_SIZE] = [0x5a; PAGE_SIZE];

impl PageSource for Constant {
    fn url(&self) -> String {
        "bench:constant".into()
    }

    fn try_read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Option<Content>, SourceError> {
        self.read(pages, Class::Demand, buffer).map(Some)
    }

    fn read(&self, _: PageRange, _: Class, buffer: &mut [u8]) -> Result<Content, SourceError> {
        for page in buffer.chunks_mut(PAGE_SIZE) {
            page.copy_from_slice(&CONTENT);
        }
        Ok(Content::Data)
    }

    fn next_data(&self, _: PageRange) -> Result<Option<PageRange>, SourceError> {
        Ok(None)
    }

    fn digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}

/// `0..n` in an order without pattern, the same every time.
fn shuffled(n: u64) -> impl Iterator<Item = u64> {
    let mut order: Vec<u64> = (0..n).collect();
    let mut random: u64 = 1;
    for i in (1..order.len()).rev() {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        order.swap(i, ((random >> 33) % (i as u64 + 1)) as usize);
    }
    order.into_iter()
}
