//! Random numbers for tests, and seeds to have them again.

// Not every test uses all of it.
#![allow(dead_code)]

/// A generator: splitmix64.
#[derive(Debug)]
pub(crate) struct Random {
    state: u64,
}

impl Random {
    /// Seeded by `UMEM_TEST_SEED` or by the clock. The seed is printed; it is shown when the test fails.
    pub(crate) fn seeded() -> Self {
        let state = std::env::var("UMEM_TEST_SEED").map_or_else(
            |_| {
                let now = std::time::UNIX_EPOCH.elapsed().unwrap();
                now.as_nanos() as u64
            },
            |seed| seed.parse().unwrap(),
        );
        println!("seed: UMEM_TEST_SEED={state}");
        Self::new(state)
    }

    /// That of this seed.
    pub(crate) const fn new(state: u64) -> Self {
        Self { state }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number from 0 up to, and without, `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// How many rounds a test does: `UMEM_TEST_ROUNDS`, or so many.
pub(crate) fn rounds(usual: u64) -> u64 {
    std::env::var("UMEM_TEST_ROUNDS").map_or(usual, |rounds| rounds.parse().unwrap())
}
