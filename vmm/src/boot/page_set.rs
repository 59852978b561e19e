//! A set of pages, kept as ranges.

use std::ops::Range;

use crate::address_map::PAGE_SIZE;

/// Page indices, in few ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PageSet {
    /// In order, neither overlapping nor touching each other, none empty.
    ranges: Vec<Range<u64>>,
}

impl PageSet {
    /// Adds every page that has one of these bytes.
    pub(super) fn insert_bytes(&mut self, bytes: Range<u64>) {
        if bytes.is_empty() {
            return;
        }
        let mut new = bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE);
        // Those that end before it stay, those that overlap or touch it become part of it.
        let first = self.ranges.partition_point(|range| range.end < new.start);
        let last = self.ranges.partition_point(|range| range.start <= new.end);
        if let (Some(left), Some(right)) = (self.ranges.get(first), self.ranges[..last].last())
            && first < last
        {
            new = new.start.min(left.start)..new.end.max(right.end);
        }
        self.ranges.splice(first..last, [new]);
    }

    /// Whether a page is in the set.
    pub(super) fn contains(&self, index: u64) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= index);
        self.ranges[..after].last().is_some_and(|range| index < range.end)
    }

    /// All pages, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.ranges.iter().cloned().flatten()
    }

    /// The highest page-aligned address in `within` (whole pages) from which `size` bytes are free, or else how many bytes
    /// the largest free piece has.
    pub(super) fn highest_room(&self, within: Range<u64>, size: u64) -> Result<u64, u64> {
        let mut end = within.end;
        let mut largest = 0;
        for used in self.ranges.iter().rev() {
            let start = (used.end * PAGE_SIZE).clamp(within.start, within.end);
            if let Some(room) = room(start..end, size, &mut largest) {
                return Ok(room);
            }
            end = end.min(used.start * PAGE_SIZE);
        }
        room(within.start..end, size, &mut largest).ok_or(largest)
    }
}

fn room(free: Range<u64>, size: u64, largest: &mut u64) -> Option<u64> {
    let length = free.end.saturating_sub(free.start);
    *largest = (*largest).max(length);
    (size <= length).then(|| (free.end - size) / PAGE_SIZE * PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set(ranges: impl IntoIterator<Item = Range<u64>>) -> PageSet {
        let mut set = PageSet::default();
        for range in ranges {
            set.insert_bytes(range);
        }
        set
    }

    #[test]
    fn a_page_is_in_if_one_of_its_bytes_is() {
        assert_eq!(set(Some(0x1fff..0x2001)).iter().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(set(Some(0x1000..0x1000)).iter().count(), 0);
    }

    #[test]
    fn room_is_found_from_the_top() {
        let set = set([0x3000..0x5000, 0x8000..0x9000]);
        assert_eq!(set.highest_room(0x1000..0x9000, 0x1001), Ok(0x6000));
        assert_eq!(set.highest_room(0x1000..0x9000, 0x3000), Ok(0x5000));
        assert_eq!(set.highest_room(0x1000..0xa000, 0x1000), Ok(0x9000));
        assert_eq!(set.highest_room(0x1000..0x9000, 0x3001), Err(0x3000));
        assert_eq!(set.highest_room(0x4000..0x5000, 1), Err(0));
        assert_eq!(PageSet::default().highest_room(0..0x2000, 0x2000), Ok(0));
    }

    proptest! {
        #[test]
        fn is_a_set(ranges in prop::collection::vec((0_u64..64, 0_u64..12), 0..12)) {
            let mut set = PageSet::default();
            let mut model = BTreeSet::new();
            for (start, length) in ranges {
                set.insert_bytes(start * PAGE_SIZE..(start + length) * PAGE_SIZE);
                model.extend(start..start + length);
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            for index in 0..80 {
                prop_assert_eq!(set.contains(index), model.contains(&index));
            }
            prop_assert!(set.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        #[test]
        fn room_is_free_and_nothing_higher_is(
            used in prop::collection::vec((0_u64..32, 1_u64..6), 0..6), size in 1_u64..12 * PAGE_SIZE
        ) {
            let mut set = PageSet::default();
            for (start, length) in used {
                set.insert_bytes(start * PAGE_SIZE..(start + length) * PAGE_SIZE);
            }
            let free = |page: u64| {
                let end = page + size.div_ceil(PAGE_SIZE);
                end <= 32 && (page..end).all(|page| !set.contains(page))
            };
            let expected = (4..32).rev().find(|page| free(*page)).map(|page| page * PAGE_SIZE);
            prop_assert_eq!(set.highest_room(4 * PAGE_SIZE..32 * PAGE_SIZE, size).ok(), expected);
        }
    }
}
