//! Which page frames the workloads may use: RAM, less what the guest needs for itself.

use core::ops::Range;

use crate::fingerprint::PAGE_SIZE;

/// The most separate ranges that a [`MemoryMap`] can hold.
pub const MAX_RANGES: usize = 64;

/// The memory map has more than [`MAX_RANGES`] pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyRanges;

/// Page frames from `start` up to, not including, `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FrameRange {
    start: u64,
    end: u64,
}

/// A set of page frames, numbered densely from 0 in ascending order.
#[derive(Clone, Debug)]
pub struct MemoryMap {
    /// Ascending, apart from each other, none empty; the first `length` count.
    ranges: [FrameRange; MAX_RANGES],
    length: usize,
}

impl Default for MemoryMap {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryMap {
    /// No frames.
    pub const fn new() -> Self {
        Self {
            ranges: [FrameRange { start: 0, end: 0 }; MAX_RANGES],
            length: 0,
        }
    }

    /// Adds the frames that lie wholly in the `size` bytes from `address`.
    pub fn add(&mut self, address: u64, size: u64) -> Result<(), TooManyRanges> {
        let page = PAGE_SIZE as u64;
        let mut new = FrameRange {
            start: address.div_ceil(page),
            end: address.saturating_add(size) / page,
        };
        if new.start >= new.end {
            return Ok(());
        }
        // The ranges first..last overlap or touch the new one and are merged into it.
        let first = self.position(|range| range.end >= new.start);
        let last = self.position(|range| range.start > new.end);
        if first < last {
            new.start = new.start.min(self.ranges[first].start);
            new.end = new.end.max(self.ranges[last - 1].end);
        }
        self.replace(first, last, &[new])
    }

    /// Takes out every frame that has a byte in the `size` bytes from `address`.
    pub fn remove(&mut self, address: u64, size: u64) -> Result<(), TooManyRanges> {
        if size == 0 {
            return Ok(());
        }
        let page = PAGE_SIZE as u64;
        let start = address / page;
        let end = address.saturating_add(size).div_ceil(page);
        let first = self.position(|range| range.end > start);
        let last = self.position(|range| range.start >= end);
        if first >= last {
            return Ok(());
        }
        let before = FrameRange {
            start: self.ranges[first].start,
            end: start,
        };
        let after = FrameRange {
            start: end,
            end: self.ranges[last - 1].end,
        };
        match (before.start < before.end, after.start < after.end) {
            (false, false) => self.replace(first, last, &[]),
            (true, false) => self.replace(first, last, &[before]),
            (false, true) => self.replace(first, last, &[after]),
            (true, true) => self.replace(first, last, &[before, after]),
        }
    }

    /// Takes out `count` frames that lie together below frame `limit`, and answers the first of them; `None` if nowhere are so many.
    pub fn take(&mut self, count: u64, limit: u64) -> Option<u64> {
        let fits = |range: &&FrameRange| range.end.min(limit).saturating_sub(range.start) >= count;
        let start = self.ranges().iter().find(fits)?.start;
        let page = PAGE_SIZE as u64;
        // From the start of a range: it stays one range.
        self.remove(start * page, count * page).ok()?;
        Some(start)
    }

    /// How many frames there are.
    pub fn count(&self) -> u64 {
        self.ranges().iter().map(|r| r.end - r.start).sum()
    }

    /// The frame with the dense number `index`, or `None` beyond the last. Takes as many steps as there are ranges.
    #[inline]
    pub fn frame(&self, mut index: u64) -> Option<u64> {
        for range in self.ranges() {
            let length = range.end - range.start;
            if index < length {
                return Some(range.start + index);
            }
            index -= length;
        }
        None
    }

    /// Whether one of the frames lies in `wanted`.
    pub fn has_frame_in(&self, wanted: Range<u64>) -> bool {
        self.ranges()
            .iter()
            .any(|range| range.start.max(wanted.start) < range.end.min(wanted.end))
    }

    fn ranges(&self) -> &[FrameRange] {
        &self.ranges[..self.length]
    }

    /// The first range for which `predicate` holds, or the number of ranges.
    fn position(&self, predicate: impl Fn(&FrameRange) -> bool) -> usize {
        self.ranges().iter().position(predicate).unwrap_or(self.length)
    }

    /// Puts `new` in the place of the ranges `first..last`.
    fn replace(&mut self, first: usize, last: usize, new: &[FrameRange]) -> Result<(), TooManyRanges> {
        let length = self.length - (last - first) + new.len();
        if length > MAX_RANGES {
            return Err(TooManyRanges);
        }
        self.ranges.copy_within(last..self.length, first + new.len());
        self.ranges[first..first + new.len()].copy_from_slice(new);
        self.length = length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn frames(map: &MemoryMap) -> Vec<u64> {
        (0..map.count()).map(|i| map.frame(i).unwrap()).collect()
    }

    #[test]
    fn partial_frames_are_neither_added_nor_left() {
        let mut map = MemoryMap::new();
        map.add(0x0fff, 0x5002).unwrap();
        assert_eq!(frames(&map), [1, 2, 3, 4, 5]);
        map.remove(0x2fff, 2).unwrap();
        assert_eq!(frames(&map), [1, 4, 5]);
        map.remove(0x4000, 0).unwrap();
        assert_eq!(frames(&map), [1, 4, 5]);
    }

    #[test]
    fn the_last_byte_of_the_address_space_does_no_harm() {
        let mut map = MemoryMap::new();
        map.add(u64::MAX - 0xffff, u64::MAX).unwrap();
        map.remove(u64::MAX, u64::MAX).unwrap();
        assert_eq!(map.count(), 15);
    }

    #[test]
    fn too_many_ranges_are_refused() {
        let mut map = MemoryMap::new();
        for i in 0..MAX_RANGES as u64 {
            map.add(i * 0x3000, 0x1000).unwrap();
        }
        assert_eq!(map.add(0x10_0000, 0x1000), Err(TooManyRanges));
        assert_eq!(map.count(), MAX_RANGES as u64);
    }

    proptest! {
        #[test]
        fn it_is_the_set_of_frames_that_a_plain_set_is(
            steps in prop::collection::vec((any::<bool>(), 0u64..0x40_0000, 0u64..0x8_0000), 1..40)
        ) {
            let mut map = MemoryMap::new();
            let mut model = BTreeSet::new();
            for (add, address, size) in steps {
                let touches = |frame: &u64| frame * 0x1000 < address + size && (frame + 1) * 0x1000 > address;
                let inside = |frame: &u64| frame * 0x1000 >= address && (frame + 1) * 0x1000 <= address + size;
                if add {
                    map.add(address, size).unwrap();
                    model.extend((0..0x1000).filter(inside));
                } else {
                    map.remove(address, size).unwrap();
                    if size > 0 {
                        model.retain(|frame| !touches(frame));
                    }
                }
                prop_assert_eq!(frames(&map), model.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(map.frame(map.count()), None);
                let (start, end) = (address >> 12, (address + size) >> 12);
                prop_assert_eq!(map.has_frame_in(start..end), model.range(start..end.max(start)).next().is_some());
                prop_assert!(map.ranges().windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}
