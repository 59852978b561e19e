//! Latencies, counted where they happen: a histogram that any thread may record into without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Buckets a power of two: a recorded value is off by at most one part in 32.
const SUB_BUCKETS: u64 = 32;
const SUB_BITS: u32 = SUB_BUCKETS.trailing_zeros();
/// Values below `SUB_BUCKETS` have a bucket each, then 32 for each power of two from 2^5 to 2^63.
const BUCKETS: usize = (SUB_BUCKETS as usize) * (64 - SUB_BITS as usize + 1);

/// A log-linear histogram of durations in nanoseconds.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    max: AtomicU64,
    /// Of all that was recorded.
    sum: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            max: AtomicU64::new(0),
            sum: AtomicU64::new(0),
        }
    }
}

/// What a histogram says, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Values recorded.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// Largest, exactly.
    pub max: u64,
}

/// How often what was recorded: durations between powers of two of nanoseconds, from 1 us to 17 s.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Distribution {
    /// How many durations were shorter than the first bound, than the second but not the first, and so on, and than none.
    counts: Vec<u64>,
    sum: Duration,
}

impl Distribution {
    const FIRST_BOUND: u32 = 10;
    const LAST_BOUND: u32 = 34;

    /// For each bound, in seconds and ascending, how many durations were shorter than it but than none before; the last is
    /// infinite.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        let bounds = Self::bounds().map(|nanos| nanos as f64 / 1e9);
        let bounds = bounds.chain([f64::INFINITY]);
        // Nothing at all may have been recorded.
        bounds
            .zip(self.counts.iter().copied().chain(std::iter::repeat(0)))
            .collect()
    }

    /// How many durations there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All of them together.
    pub fn sum(&self) -> Duration {
        self.sum
    }

    fn bounds() -> impl Iterator<Item = u64> {
        (Self::FIRST_BOUND..=Self::LAST_BOUND).map(|power| 1 << power)
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(nanos)].fetch_add(1, Relaxed);
        self.max.fetch_max(nanos, Relaxed);
        self.sum.fetch_add(nanos, Relaxed);
    }

    /// The figures of everything recorded so far in all of `histograms`.
    pub fn summary_of(histograms: &[&Self]) -> Summary {
        let merged: Vec<u64> = (0..BUCKETS)
            .map(|index| {
                histograms
                    .iter()
                    .map(|histogram| histogram.buckets[index].load(Relaxed))
                    .sum()
            })
            .collect();
        let count: u64 = merged.iter().sum();
        let max = histograms
            .iter()
            .map(|histogram| histogram.max.load(Relaxed))
            .max()
            .unwrap_or(0);
        // The smallest value that at least `permille` of a thousand values do not exceed.
        let percentile = |permille: u64| {
            let rank = (count * permille).div_ceil(1000).max(1);
            let mut seen = 0;
            let bucket = merged.iter().position(|bucket| {
                seen += bucket;
                seen >= rank
            });
            bucket.map_or(0, |bucket| highest_of(bucket).min(max))
        };
        Summary {
            count,
            p50: percentile(500),
            p90: percentile(900),
            p99: percentile(990),
            p999: percentile(999),
            max,
        }
    }

    /// How many of the recorded durations were shorter than the first of `bounds`, than the second but not the first, and so
    /// on, and than none. The bounds are powers of two of nanoseconds from 32 on, in ascending order.
    fn counts(&self, bounds: &[u64]) -> Vec<u64> {
        let mut counts = vec![0; bounds.len() + 1];
        for (bucket, count) in self.buckets.iter().enumerate() {
            counts[bounds.partition_point(|bound| *bound <= highest_of(bucket))] += count.load(Relaxed);
        }
        counts
    }

    /// Everything recorded so far, by powers of two.
    pub fn distribution(&self) -> Distribution {
        let bounds: Vec<u64> = Distribution::bounds().collect();
        Distribution {
            counts: self.counts(&bounds),
            sum: Duration::from_nanos(self.sum.load(Relaxed)),
        }
    }

    /// The figures of everything recorded so far.
    pub fn summary(&self) -> Summary {
        Self::summary_of(&[self])
    }
}

/// A time for people: `30 s`, `0.5 s`.
pub(crate) fn seconds(time: Duration) -> String {
    format!("{} s", time.as_millis() as f64 / 1000.0)
}

fn bucket_of(value: u64) -> usize {
    if value < SUB_BUCKETS {
        return value as usize;
    }
    let exponent = value.ilog2();
    let sub = (value >> (exponent - SUB_BITS)) - SUB_BUCKETS;
    (u64::from(exponent - SUB_BITS + 1) * SUB_BUCKETS + sub) as usize
}

/// The largest value that falls into `bucket`.
fn highest_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < SUB_BUCKETS {
        return bucket;
    }
    let shift = bucket / SUB_BUCKETS - 1;
    let lowest = (SUB_BUCKETS + bucket % SUB_BUCKETS) << shift;
    lowest + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_value_is_at_most_a_32nd_below_the_top_of_its_bucket(value: u64) {
            let highest = highest_of(bucket_of(value));
            prop_assert!(highest >= value);
            prop_assert!(highest - value <= value / 32);
        }

        #[test]
        fn percentiles_are_those_of_the_sorted_values(mut values in prop::collection::vec(0u64..10_000_000, 1..500)) {
            let histogram = Histogram::default();
            for value in &values {
                histogram.record(Duration::from_nanos(*value));
            }
            values.sort_unstable();
            let summary = histogram.summary();
            prop_assert_eq!(summary.count, values.len() as u64);
            prop_assert_eq!(summary.max, *values.last().unwrap());
            for (permille, got) in [(500, summary.p50), (900, summary.p90), (990, summary.p99), (999, summary.p999)] {
                let exact = values[(values.len() * permille).div_ceil(1000).max(1) - 1];
                prop_assert!(got >= exact && got - exact <= exact / 32, "p{permille}: {got} for {exact}");
            }
        }
    }

    proptest! {
        #[test]
        fn powers_of_two_divide_exactly(values in prop::collection::vec(0u64..1 << 22, 0..200)) {
            let histogram = Histogram::default();
            for value in &values {
                histogram.record(Duration::from_nanos(*value));
            }
            let bounds: Vec<u64> = (5..21).map(|power| 1 << power).collect();
            let counts = histogram.counts(&bounds);
            prop_assert_eq!(counts.iter().sum::<u64>(), values.len() as u64);
            let mut shorter = 0;
            for (bound, count) in bounds.iter().zip(counts) {
                shorter += count;
                prop_assert_eq!(shorter, values.iter().filter(|value| *value < bound).count() as u64);
            }
        }
    }

    #[test]
    fn nothing_recorded_is_all_zero() {
        assert_eq!(Histogram::default().summary(), Summary::default());
        let (nothing, recorded) = (Distribution::default(), Histogram::default().distribution());
        assert_eq!(nothing.buckets(), recorded.buckets());
        assert_eq!(nothing.count(), 0);
    }

    #[test]
    fn a_distribution_has_everything_in_it_once() {
        let histogram = Histogram::default();
        for micros in [0, 1, 2, 3, 1_000, 100_000_000] {
            histogram.record(Duration::from_micros(micros));
        }
        let distribution = histogram.distribution();
        assert_eq!(distribution.count(), 6);
        assert_eq!(distribution.sum(), Duration::from_micros(100_001_006));
        let buckets = distribution.buckets();
        assert_eq!(buckets[0], (1.024e-6, 2));
        assert_eq!(buckets.last(), Some(&(f64::INFINITY, 1)));
    }

    #[test]
    fn the_largest_value_has_a_bucket() {
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(highest_of(BUCKETS - 1), u64::MAX);
    }
}
