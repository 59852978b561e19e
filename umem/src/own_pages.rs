//! Which pages of RAM a layer has, and the how-manieth each of them is.

use crate::units::{PageIndex, PageRange};

/// Words of the map between two numbers of own pages that are kept.
const GROUP: usize = 8;

/// A set of pages in which one finds how many come before a page.
#[derive(Debug, Default)]
pub(crate) struct OwnPages {
    /// A bit a page, the lowest first.
    words: Vec<u64>,
    /// How many pages come before each group of words, and at the end, how many there are.
    before: Vec<u64>,
}

impl OwnPages {
    /// The set whose pages have a bit in `words`.
    pub(crate) fn new(words: Vec<u64>) -> Self {
        let mut before = Vec::with_capacity(words.len().div_ceil(GROUP) + 1);
        let mut count = 0;
        for group in words.chunks(GROUP) {
            before.push(count);
            count += ones(group);
        }
        before.push(count);
        Self { words, before }
    }

    /// How many pages are in it.
    pub(crate) fn count(&self) -> u64 {
        self.before.last().copied().unwrap_or(0)
    }

    /// Whether it has nothing beyond the first `pages` pages.
    pub(crate) fn is_within(&self, pages: u64) -> bool {
        let (whole, rest) = ((pages / 64) as usize, pages % 64);
        let mut words = self.words.iter().skip(whole);
        let in_last = if rest == 0 {
            0
        } else {
            words.next().map_or(0, |word| word >> rest)
        };
        in_last == 0 && words.all(|word| *word == 0)
    }

    /// How many of its pages come before `page`.
    pub(crate) fn rank(&self, page: PageIndex) -> u64 {
        let word = (page.0 / 64) as usize;
        let first = word - word % GROUP;
        let below = self.words[word] & ((1 << (page.0 % 64)) - 1);
        self.before[word / GROUP] + ones(&self.words[first..word]) + u64::from(below.count_ones())
    }

    /// Whether the first of `pages`, of which there is at least one, is in it, and how many of them in a row are like it.
    pub(crate) fn run(&self, pages: PageRange) -> (bool, u64) {
        let inside = self.words[(pages.start.0 / 64) as usize] >> (pages.start.0 % 64) & 1 == 1;
        let mut at = pages.start.0;
        while at < pages.end().0 {
            let word = self.words[(at / 64) as usize];
            let unlike = (if inside { !word } else { word }) >> (at % 64);
            let left = 64 - at % 64;
            let alike = u64::from(unlike.trailing_zeros()).min(left);
            at += alike;
            if alike < left {
                break;
            }
        }
        (inside, at.min(pages.end().0) - pages.start.0)
    }

    /// As it is stored: little-endian words.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The words of which `bytes` are the little-endian form.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let words = bytes.as_chunks::<8>().0;
        Self::new(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}

fn ones(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Words of which many are all or nothing.
    fn words() -> impl Strategy<Value = Vec<u64>> {
        let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
        prop::collection::vec(word, 1..40)
    }

    proptest! {
        #[test]
        fn it_is_the_set_of_its_bits(words in words(), start in 0.0..1.0f64, count in 1..500u64) {
            let bits: Vec<bool> = words.iter().flat_map(|word| (0..64).map(move |bit| word >> bit & 1 == 1)).collect();
            let own = OwnPages::new(words);
            let pages = bits.len() as u64;
            let start = PageIndex((start * pages as f64) as u64);
            let range = PageRange::new(start, count).clamp_to(PageIndex(pages));
            let count = |bits: &[bool]| bits.iter().filter(|bit| **bit).count() as u64;

            prop_assert_eq!(own.count(), count(&bits));
            prop_assert_eq!(own.rank(start), count(&bits[..start.0 as usize]));
            let first = bits[start.0 as usize];
            let alike = range.pages().take_while(|page| bits[page.0 as usize] == first).count() as u64;
            prop_assert_eq!(own.run(range), (first, alike));
            prop_assert_eq!(own.is_within(start.0), !bits[start.0 as usize..].contains(&true));
            prop_assert_eq!(OwnPages::from_bytes(&own.to_bytes()).words, own.words);
        }
    }
}
