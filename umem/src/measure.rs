//! Measuring: the least that a host can do, and what this library makes of it. `umem bench` and the benchmarks are made of this.
//!
//! What is measured runs in slices that alternate with those of what it is compared with, so that what else the machine does falls
//! upon both; and where the threads run is said with every figure, because it makes a factor of ten.

pub mod bulk;
pub mod floor;
pub mod served;
pub mod sockets;

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::thread::CpuSet;

use crate::image::{self, ImageWriter};
use crate::link::ListenError;
use crate::pager::StartError;
use crate::publish::Existing;
use crate::region::{Region, RegionError};
use crate::source::remote::RemoteError;
use crate::uffd;
use crate::units::{PAGE_SIZE, PageIndex};

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// A system call failed.
    #[error("{call} failed")]
    Os {
        /// What was tried.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// No memory.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// No userfaultfd.
    #[error(transparent)]
    Userfaultfd(#[from] uffd::OpenError),
    /// No pager.
    #[error(transparent)]
    Pager(#[from] StartError),
    /// The image could not be made.
    #[error(transparent)]
    Write(#[from] image::WriteError),
    /// The image could not be opened.
    #[error(transparent)]
    Image(#[from] image::OpenError),
    /// No page server.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The page server was not reached.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// What was measured is not what was to be measured.
    #[error("{count} pages came in another way than the one that was to be measured: {way}")]
    OtherWay {
        /// How many.
        count: u64,
        /// In which.
        way: &'static str,
    },
    /// A thread of the measurement panicked.
    #[error("a thread of the measurement ended early")]
    Thread,
}

impl MeasureError {
    fn os<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Os {
            call,
            source: source.into(),
        }
    }
}

/// How long something took, each time, in nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct Waits(Vec<u64>);

impl Waits {
    /// Adds one.
    pub fn push(&mut self, time: Duration) {
        self.0.push(time.as_nanos() as u64);
    }

    /// Adds those of another slice.
    pub fn append(&mut self, mut more: Self) {
        self.0.append(&mut more.0);
    }

    /// What it takes to do both, one after the other: each time here, and the same time of `other`.
    pub fn and(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(one, two)| one + two).collect())
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// All together.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.0.iter().sum())
    }

    /// The least time that so many of a hundred did not exceed, in nanoseconds; 0 if there are none.
    pub fn percentile(&self, percent: usize) -> u64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(0)
    }

    /// How many fall into each of `buckets` parts of a power of two, as (lower bound in nanoseconds, share of all), those
    /// without any left out at both ends.
    pub fn histogram(&self, buckets: u32) -> Vec<(f64, f64)> {
        let bucket = |nanos: u64| ((nanos.max(1) as f64).log2() * f64::from(buckets)).floor() as usize;
        let (Some(least), Some(most)) = (self.0.iter().min(), self.0.iter().max()) else {
            return Vec::new();
        };
        let first = bucket(*least);
        let mut counts = vec![0_u64; bucket(*most) - first + 1];
        for nanos in &self.0 {
            counts[bucket(*nanos) - first] += 1;
        }
        let lower = |index: usize| ((first + index) as f64 / f64::from(buckets)).exp2();
        let share = |count: u64| count as f64 / self.0.len() as f64;
        counts
            .into_iter()
            .enumerate()
            .map(|(index, count)| (lower(index), share(count)))
            .collect()
    }
}

/// Where the thread that waits runs, and where the one that answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Both on one CPU.
    Same,
    /// Each on a CPU of its own.
    Across,
    /// Where the scheduler puts them.
    Free,
}

impl Place {
    /// Those that there can be on the CPUs that this thread may use.
    pub fn all(usable: &CpuSet) -> Vec<Self> {
        if usable.count() > 1 {
            vec![Self::Same, Self::Across, Self::Free]
        } else {
            vec![Self::Same]
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Across => "across",
            Self::Free => "free",
        }
    }

    /// Binds this thread, and those that it starts, to where threads run that answer.
    pub fn run_as_answering(self, usable: &CpuSet) -> Result<(), MeasureError> {
        run_on(&self.cpus(usable, 0))
    }

    /// Binds this thread, and those that it starts, to where threads run that wait.
    pub fn run_as_waiting(self, usable: &CpuSet) -> Result<(), MeasureError> {
        run_on(&self.cpus(usable, usize::from(self == Self::Across)))
    }

    fn cpus(self, usable: &CpuSet, number: usize) -> CpuSet {
        let mut numbers = (0..CpuSet::MAX_CPU).filter(|cpu| usable.is_set(*cpu));
        match numbers.nth(number) {
            Some(cpu) if self != Self::Free => {
                let mut one = CpuSet::new();
                one.set(cpu);
                one
            }
            _ => *usable,
        }
    }
}

/// The CPUs that this thread may use.
pub fn usable_cpus() -> Result<CpuSet, MeasureError> {
    rustix::thread::sched_getaffinity(None).map_err(MeasureError::os("sched_getaffinity"))
}

/// Binds this thread, and those that it starts, to `cpus`.
pub fn run_on(cpus: &CpuSet) -> Result<(), MeasureError> {
    rustix::thread::sched_setaffinity(None, cpus).map_err(MeasureError::os("sched_setaffinity"))
}

/// `0..count` in an order without pattern, for one seed the same every time.
pub fn shuffled(count: u64, seed: u64) -> impl Iterator<Item = u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut random = Random::new(seed);
    for i in (1..order.len()).rev() {
        order.swap(i, (random.next() % (i as u64 + 1)) as usize);
    }
    order.into_iter()
}

/// Numbers without pattern (xorshift64).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// How long it takes to read a byte of `page`.
pub fn touch(region: &Region, page: u64) -> Duration {
    let address = region.start().wrapping_add(page as usize * PAGE_SIZE);
    let since = Instant::now();
    // SAFETY: within the region, which is mapped for as long as it is borrowed.
    std::hint::black_box(unsafe { address.read_volatile() });
    since.elapsed()
}

/// Makes an image of that many pages, each different, none zero, with nothing in it that could be compressed. Being just written,
/// it is in the page cache.
pub fn make_image(path: &Path, pages: u64) -> Result<(), MeasureError> {
    let mut writer = ImageWriter::create(path, pages * PAGE_SIZE as u64)?;
    let mut page = [0; PAGE_SIZE];
    let mut random = Random::new(1);
    for index in 0..pages {
        for word in page.chunks_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
        writer.write_page(PageIndex(index), &page)?;
    }
    writer.finish(b"", Existing::Keep)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(nanos: impl IntoIterator<Item = u64>) -> Waits {
        Waits(nanos.into_iter().collect())
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let waits = waits((1..=200).rev());
        assert_eq!(
            (waits.percentile(50), waits.percentile(99), waits.percentile(100)),
            (100, 198, 200)
        );
        assert_eq!(Waits::default().percentile(50), 0);
    }

    #[test]
    fn a_histogram_has_everything_in_it_once() {
        let histogram = waits([1000, 1001, 1024, 5000, 0]).histogram(4);
        let sum: f64 = histogram.iter().map(|(_, share)| share).sum();
        assert!((sum - 1.0).abs() < 1e-9);
        assert!((histogram[0].0 - 1.0).abs() < 1e-9, "{histogram:?}");
        let (last, share) = histogram[histogram.len() - 1];
        assert!(last <= 5000.0 && 5000.0 < last * 2_f64.powf(0.25) && share > 0.19);
        assert_eq!(Waits::default().histogram(4), []);
    }

    #[test]
    fn an_order_without_pattern_has_every_number_once() {
        let mut order: Vec<u64> = shuffled(1000, 7).collect();
        assert!(shuffled(1000, 7).eq(order.iter().copied()));
        assert!(!order.is_sorted());
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }
}
