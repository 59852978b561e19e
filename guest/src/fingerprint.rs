//! The content that proves a page: every word of it depends on a seed and on where the page belongs.
//!
//! `umem image create --fill pattern:SEED` writes it, workload `verify` checks it. A page that arrives at the wrong
//! address, twice, shifted, or with one bit changed does not match.

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// 64-bit words in a page.
pub const PAGE_WORDS: usize = PAGE_SIZE / 8;

/// The words of one page's fingerprint, in order (the splitmix64 sequence of a state mixed from seed and frame).
#[derive(Clone, Copy, Debug)]
pub struct Fingerprint {
    state: u64,
}

impl Fingerprint {
    /// The fingerprint of guest-physical page frame `frame` (address / 4096) in an image filled with `seed`.
    pub fn new(seed: u64, frame: u64) -> Self {
        // Mixed twice, so that neighbouring frames of one seed and neighbouring seeds of one frame share no words.
        Self {
            state: mix(seed.wrapping_add(GOLDEN_GAMMA)) ^ mix(frame.wrapping_mul(2).wrapping_add(1)),
        }
    }

    /// The word at `index` without computing the ones before it.
    pub fn word(self, index: usize) -> u64 {
        mix(self
            .state
            .wrapping_add(GOLDEN_GAMMA.wrapping_mul(index as u64 + 1)))
    }

    /// Fills a page with the fingerprint, little-endian.
    pub fn fill(self, page: &mut [u8; PAGE_SIZE]) {
        for (index, bytes) in page.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&self.word(index).to_le_bytes());
        }
    }
}

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn fill_writes_the_words_in_order() {
        let fingerprint = Fingerprint::new(7, 42);
        let mut page = [0; PAGE_SIZE];
        fingerprint.fill(&mut page);
        for index in 0..PAGE_WORDS {
            let word = u64::from_le_bytes(page[index * 8..index * 8 + 8].try_into().unwrap());
            assert_eq!(word, fingerprint.word(index));
        }
    }

    #[test]
    fn no_two_pages_of_neighbouring_seeds_share_a_word() {
        let mut seen = HashSet::new();
        for seed in 0..4 {
            for frame in 0..64 {
                for index in 0..PAGE_WORDS {
                    assert!(
                        seen.insert(Fingerprint::new(seed, frame).word(index)),
                        "{seed} {frame} {index}"
                    );
                }
            }
        }
    }

    #[test]
    fn no_word_is_zero_where_a_missing_page_would_read_zero() {
        for frame in 0..1024 {
            assert!((0..PAGE_WORDS).any(|index| Fingerprint::new(0, frame).word(index) != 0));
        }
    }
}
