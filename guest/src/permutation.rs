//! A seeded permutation of `0..n` that needs no memory, for visiting every page once in random order.

/// A bijection of `0..n`: a Feistel network over the next even number of bits, walked until it lands inside.
///
/// The network's domain is less than four times `n`, so a walk takes fewer than four steps on average.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

const ROUNDS: usize = 4;

impl Permutation {
    /// The permutation of `0..n` that belongs to `seed`.
    pub fn new(seed: u64, n: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut keys = [0; ROUNDS];
        for (round, key) in keys.iter_mut().enumerate() {
            *key = scramble(seed ^ scramble(round as u64 + 1));
        }
        Self {
            n,
            half_bits: bits.div_ceil(2).max(1),
            keys,
        }
    }

    /// Where `index` goes. `index` must be below `n`.
    pub fn at(&self, index: u64) -> u64 {
        debug_assert!(index < self.n);
        let mut value = index;
        loop {
            value = self.network(value);
            if value < self.n {
                return value;
            }
        }
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (scramble(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// A 64-bit mixing function (the finaliser of MurmurHash3).
fn scramble(mut z: u64) -> u64 {
    z = (z ^ (z >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    z = (z ^ (z >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    z ^ (z >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_number_comes_exactly_once(seed: u64, n in 1u64..5000) {
            let permutation = Permutation::new(seed, n);
            let mut seen = vec![false; n as usize];
            for index in 0..n {
                let value = permutation.at(index) as usize;
                prop_assert!(!seen[value]);
                seen[value] = true;
            }
        }

        #[test]
        fn large_domains_stay_inside(seed: u64, n in 1u64 << 30..1 << 40, index: u64) {
            prop_assert!(Permutation::new(seed, n).at(index % n) < n);
        }
    }

    #[test]
    fn neighbours_are_scattered_and_seeds_differ() {
        let n = 1 << 16;
        let permutation = Permutation::new(1, n);
        let steps = (1..n).filter(|&i| permutation.at(i).abs_diff(permutation.at(i - 1)) == 1);
        assert!(steps.count() < 16);
        let other = Permutation::new(2, n);
        assert!((0..n).filter(|&i| permutation.at(i) == other.at(i)).count() < 16);
    }
}
