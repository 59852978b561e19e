//! Moments that nobody chose, and seeds to have them again.

use std::env;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The variable by which a run is repeated.
const VARIABLE: &str = "UMEM_TEST_SEED";

/// A sequence of numbers (splitmix64).
#[derive(Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// Seeded by `UMEM_TEST_SEED` or by the clock. The seed is printed; it is shown when the test fails.
    pub fn seeded() -> Self {
        let state = match env::var(VARIABLE) {
            Ok(text) => text
                .parse()
                .unwrap_or_else(|error| panic!("{VARIABLE}={text}: {error}")),
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
        };
        println!("seed: {VARIABLE}={state}");
        Self { state }
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    /// A moment within `longest`.
    pub fn moment(&mut self, longest: Duration) -> Duration {
        Duration::from_micros(self.below(longest.as_micros() as u64 + 1))
    }
}
