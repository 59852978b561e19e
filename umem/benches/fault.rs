//! How long a thread waits for a page: the pager on plain memory of this process, against the least that could answer.
//!
//! `docs/fault-path.md` says what is measured and what it means.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, SamplingMode};
use rustix::thread::CpuSet;
use umem::measure::floor::{Answer, Floor};
use umem::measure::served::{Constant, Served, file, touch_many};
use umem::measure::{Place, Waits, make_image, usable_cpus};
use umem::pager::{FaultClass, Fill};
use umem::region::Backing;
use umem::source::PageSource;
use umem::source::file::Checksums;

/// Pages of a region: 64 MiB, more than stays in a processor's own cache.
const PAGES: u64 = 16384;

/// The most touches in one slice. The last page is left alone: with it the pager would leave, and collapse what was touched into
/// huge pages.
const MOST: usize = PAGES as usize - 65;

/// Of each kind of comparison that many slices of time, of each kind alternately.
const SLICES: usize = 20;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let results = compare_all(&mut criterion);
    criterion.final_summary();
    for result in results.iter().filter(|result| result.floor.count() > 0) {
        println!("{result}");
    }
}

#[derive(Clone, Copy)]
struct Setting {
    place: Place,
    usable: CpuSet,
    backing: Backing,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backing = match self.backing {
            Backing::Memfd => "memfd",
            Backing::Anonymous => "anonymous",
        };
        write!(f, "cpus={} backing={backing}", self.place.name())
    }
}

/// The pager with a source against the floor.
struct Comparison {
    setting: Setting,
    source: &'static str,
    umem: Waits,
    floor: Waits,
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            setting,
            source,
            umem,
            floor,
        } = self;
        write!(f, "{setting} source={source} touches={}", umem.count())?;
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
    make_image(&path, PAGES).expect("an image");
    let file = |checksums| file(&path, checksums).expect("the image just made");
    let sources: [(&str, Arc<dyn PageSource>); 3] = [
        ("file", file(Checksums::On)),
        ("file-unchecked", file(Checksums::Off)),
        ("constant", Arc::new(Constant)),
    ];
    let usable = usable_cpus().expect("this thread's CPUs");
    let mut results = Vec::new();
    for place in [Place::Same, Place::Across] {
        if !Place::all(&usable).contains(&place) {
            eprintln!("skipped: across CPUs: this process may use one CPU only");
            continue;
        }
        // Across CPUs the wake-up hides what the parts of the way cost.
        let sources = if place == Place::Same {
            &sources[..]
        } else {
            &sources[..1]
        };
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let setting = Setting {
                place,
                usable,
                backing,
            };
            for (name, source) in sources {
                results.push(compare(criterion, setting, name, source));
            }
        }
    }
    results
}

/// Runs the pager and the floor as two benchmarks. Beside each slice of the one runs a slice of the other, so that what else
/// the machine does falls upon both; the percentiles are those of the pairs.
fn compare(
    criterion: &mut Criterion,
    setting: Setting,
    source: &'static str,
    pages_from: &Arc<dyn PageSource>,
) -> Comparison {
    let mut comparison = Comparison {
        setting,
        source,
        umem: Waits::default(),
        floor: Waits::default(),
    };
    let mut group = criterion.benchmark_group(format!("fault {setting} source={source}"));
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(SLICES / 2)
        .nresamples(10_000)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    for umem_is_measured in [true, false] {
        group.bench_function(if umem_is_measured { "umem" } else { "floor" }, |bencher| {
            bencher.iter_custom(|touches| {
                let umem = touch_umem(setting, touches as usize, pages_from);
                let floor = touch_floor(setting, touches as usize);
                let measured = if umem_is_measured { &umem } else { &floor };
                let total = measured.total();
                comparison.umem.append(umem);
                comparison.floor.append(floor);
                total
            });
        });
    }
    group.finish();
    comparison
}

impl Setting {
    /// Threads run where the thread runs that starts them.
    fn answer(self) {
        self.place.run_as_answering(&self.usable).expect("these CPUs");
    }

    fn wait(self) {
        self.place.run_as_waiting(&self.usable).expect("these CPUs");
    }
}

fn touch_umem(setting: Setting, touches: usize, source: &Arc<dyn PageSource>) -> Waits {
    let mut waits = Waits::default();
    while waits.count() < touches {
        setting.answer();
        let served = Served::start(PAGES, setting.backing, Arc::clone(source), Fill::Off).expect("a pager");
        setting.wait();
        let count = MOST.min(touches - waits.count());
        waits.append(touch_many(served.region(), PAGES - 1, count, 1));
        // All that was measured was the fault thread's own answer, or nothing is said of it.
        served
            .check_class(FaultClass::Immediate)
            .expect("an image in the page cache");
    }
    waits
}

fn touch_floor(setting: Setting, touches: usize) -> Waits {
    let mut waits = Waits::default();
    while waits.count() < touches {
        setting.answer();
        let floor = Floor::start(PAGES, setting.backing, Answer::Copy).expect("memory and a userfaultfd");
        setting.wait();
        let count = MOST.min(touches - waits.count());
        waits.append(touch_many(floor.region(), PAGES - 1, count, 1));
    }
    waits
}
