//! Moments that nobody chose, and seeds to have them again.

use std::env;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The variable by which a run is repeated.
const VARIABLE: &str = "UMEM_TEST_SEED";

/// The variable by which there are more rounds of a test than there is time for otherwise.
const ROUNDS: &str = "UMEM_TEST_ROUNDS";

/// How many rounds of a test: `UMEM_TEST_ROUNDS`, or else `usual`.
pub fn rounds(usual: u64) -> u64 {
    number(ROUNDS).unwrap_or(usual)
}

/// The number in a variable, if it is set.
pub fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

/// A sequence of numbers (splitmix64).
#[derive(Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// Seeded by `UMEM_TEST_SEED` or by the clock. The seed is printed; it is shown when the test fails.
    pub fn seeded() -> Self {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let state = number(VARIABLE).unwrap_or_else(clock);
        println!("seed: {VARIABLE}={state}");
        Self { state }
    }

    /// That of this seed.
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A number below `end`.
    pub const fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// Any number.
    pub const fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of these.
    pub fn choose<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// True once in `times`.
    pub const fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// A moment within `longest`.
    pub fn moment(&mut self, longest: Duration) -> Duration {
        Duration::from_micros(self.below(longest.as_micros() as u64 + 1))
    }
}
