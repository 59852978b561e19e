//! In which order a fill goes over a region: outward from a pivot, which may move.
//!
//! ```text
//!   chunk   0 1 2 3 4 5 6 7
//!   taken   7 6 5 3 1 0 2 4      after a fault in 5: 5, 4, 6, 3, 7, and then what is left below
//! ```
//!
//! This is the *bubbling* of Hines and Gopalan, "Post-copy based live virtual machine migration using adaptive pre-paging
//! and dynamic self-ballooning" (2009): what a guest touches next is near what it touched last, on either side. With the pivot
//! left at 0 it is plain sequential order.

/// Chunks of a region, each taken once.
#[derive(Debug)]
pub(super) struct Order {
    /// A bit for each chunk that was not taken yet.
    left: Vec<u64>,
    chunks: usize,
    pivot: usize,
    /// No chunk from the pivot to here is left.
    above: usize,
    /// No chunk from here to the pivot is left.
    below: usize,
    /// Whether the last one was taken above the pivot.
    was_above: bool,
}

impl Order {
    /// `chunks` chunks, of which 0 is the first to be taken.
    pub(super) fn new(chunks: usize) -> Self {
        let mut left = vec![u64::MAX; chunks.div_ceil(64)];
        if let Some(last) = left.last_mut()
            && !chunks.is_multiple_of(64)
        {
            *last = (1 << (chunks % 64)) - 1;
        }
        Self {
            left,
            chunks,
            pivot: 0,
            above: 0,
            below: 0,
            was_above: false,
        }
    }

    /// From now on what is nearest to `chunk` is taken first.
    pub(super) fn move_to(&mut self, chunk: usize) {
        if chunk != self.pivot && chunk < self.chunks {
            self.pivot = chunk;
            (self.above, self.below, self.was_above) = (chunk, chunk, false);
        }
    }

    /// Takes the next chunk: above and below the pivot in turn, while there are any on both sides.
    pub(super) fn take(&mut self) -> Option<usize> {
        let (above, below) = (self.first_from(self.above), self.last_before(self.below));
        let chunk = match (above, below) {
            (Some(above), Some(below)) => Some(if self.was_above { below } else { above }),
            (above, below) => above.or(below),
        }?;
        self.left[chunk / 64] &= !(1 << (chunk % 64));
        self.was_above = chunk >= self.pivot;
        if self.was_above {
            self.above = chunk + 1;
        } else {
            self.below = chunk;
        }
        Some(chunk)
    }

    fn first_from(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        let mut bits = self.left.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.left.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    fn last_before(&self, end: usize) -> Option<usize> {
        let last = end.checked_sub(1)?;
        let mut word = last / 64;
        let mut bits = self.left[word] & (u64::MAX >> (63 - last % 64));
        while bits == 0 {
            word = word.checked_sub(1)?;
            bits = self.left[word];
        }
        Some(word * 64 + 63 - bits.leading_zeros() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn without_a_pivot_it_is_sequential() {
        let mut order = Order::new(130);
        let taken: Vec<usize> = std::iter::from_fn(|| order.take()).collect();
        assert_eq!(taken, (0..130).collect::<Vec<_>>());
        assert_eq!(Order::new(0).take(), None);
    }

    #[test]
    fn it_grows_on_both_sides_of_the_pivot() {
        let mut order = Order::new(8);
        order.move_to(5);
        let taken: Vec<usize> = std::iter::from_fn(|| order.take()).collect();
        assert_eq!(taken, [5, 4, 6, 3, 7, 2, 1, 0]);
    }

    proptest! {
        /// However the pivot moves: each chunk once, all of them, and each time the nearest one on its side.
        #[test]
        fn every_chunk_is_taken_once(chunks in 1usize..300, moves in prop::collection::vec(0usize..300, 0..400)) {
            let mut order = Order::new(chunks);
            let mut left: std::collections::BTreeSet<usize> = (0..chunks).collect();
            let mut pivot = 0;
            let mut moves = moves.into_iter();
            while !left.is_empty() {
                if let Some(to) = moves.next().filter(|to| *to < chunks) {
                    order.move_to(to);
                    pivot = to;
                }
                let taken = order.take().unwrap();
                let nearest = if taken >= pivot {
                    left.range(pivot..).next()
                } else {
                    left.range(..pivot).next_back()
                };
                prop_assert_eq!(nearest, Some(&taken));
                left.remove(&taken);
            }
            prop_assert_eq!(order.take(), None);
        }
    }
}
