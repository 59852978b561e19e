//! The workloads. Each runs on every CPU at once, on that CPU's share of the pages, and CPU 0 does the talking.

pub mod balloon;
pub mod dirty;
pub mod hello;
pub mod tasks;
pub mod touch;
pub mod verify;
pub mod watch;

use core::ops::Range;

use crate::machine::Machine;
use crate::memory_map::MemoryMap;
use crate::order::{Order, Sequence};

/// The most pages that are named as wrong, over all CPUs; the rest is only counted.
const MAX_WRONG_LINES: u64 = 16;

/// The pages of a workload, in the order of their turns.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    map: &'a MemoryMap,
    count: u64,
    /// How many pages of the map they are taken from: its first.
    among: u64,
    sequence: Sequence,
}

/// A page whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Its number among the pages of the memory map.
    pub index: u64,
    /// Its page frame.
    pub frame: u64,
}

impl<'a> Pages<'a> {
    /// `count` pages of `map` in the given order: the first, or where the order is random, any. `None` if the map has fewer.
    pub fn new(map: &'a MemoryMap, count: u64, order: Order) -> Option<Self> {
        let among = match order {
            Order::Random { .. } => map.count(),
            Order::Sequential | Order::Stride { .. } => count,
        };
        (count <= map.count()).then(|| Self {
            map,
            count,
            among,
            sequence: order.of(among),
        })
    }

    /// The highest page frame that may be among them.
    pub fn last_frame(&self) -> Option<u64> {
        self.map.frame(self.among.checked_sub(1)?)
    }

    /// How many pages.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The turns that belong to one CPU of the machine.
    fn share(&self, machine: &impl Machine) -> Range<u64> {
        let bound = |cpu| (u128::from(self.count) * u128::from(cpu) / u128::from(machine.cpus())) as u64;
        bound(machine.cpu())..bound(machine.cpu() + 1)
    }

    /// The pages of one CPU's share.
    fn of(&self, machine: &impl Machine) -> impl Iterator<Item = Page> {
        self.share(machine).filter_map(|turn| self.page(turn))
    }

    /// The page of a turn.
    fn page(&self, turn: u64) -> Option<Page> {
        let index = self.sequence.page(turn);
        let frame = self.map.frame(index)?;
        Some(Page { index, frame })
    }
}

/// How many wrong pages one CPU names.
fn wrong_lines_per_cpu(machine: &impl Machine) -> u64 {
    (MAX_WRONG_LINES / machine.cpus()).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::Shared;

    /// Frames 0x10 to 0x1f and 0x40 to 0x4f.
    pub(super) fn map() -> MemoryMap {
        let mut map = MemoryMap::new();
        map.add(0x10_000, 0x10_000).unwrap();
        map.add(0x40_000, 0x10_000).unwrap();
        map
    }

    #[test]
    fn the_shares_of_all_cpus_are_all_pages() {
        let map = map();
        for cpus in [1, 2, 3, 30] {
            assert!(
                frames(&map, 23, Order::Stride { stride: 4 }, cpus)
                    .into_iter()
                    .eq((0x10..0x20).chain(0x40..0x47))
            );
            assert!(
                frames(&map, 32, Order::Random { seed: 3 }, cpus)
                    .into_iter()
                    .eq((0x10..0x20).chain(0x40..0x50))
            );
        }
    }

    #[test]
    fn random_pages_are_of_the_whole_map_and_the_same_for_any_number_of_cpus() {
        let map = map();
        let some = frames(&map, 12, Order::Random { seed: 3 }, 1);
        assert!(some.iter().any(|frame| *frame >= 0x40), "{some:?}");
        assert_eq!(some.len(), 12);
        assert!(some.windows(2).all(|two| two[0] < two[1]), "{some:?}");
        assert_eq!(frames(&map, 12, Order::Random { seed: 3 }, 3), some);
        // All of them have to be mapped.
        assert_eq!(
            Pages::new(&map, 12, Order::Random { seed: 3 })
                .unwrap()
                .last_frame(),
            Some(0x4f)
        );
        assert_eq!(
            Pages::new(&map, 12, Order::Sequential).unwrap().last_frame(),
            Some(0x1b)
        );
    }

    /// The frames that all CPUs visit together, sorted.
    fn frames(map: &MemoryMap, count: u64, order: Order, cpus: usize) -> Vec<u64> {
        let pages = Pages::new(map, count, order).unwrap();
        let shared = Shared::new(cpus);
        shared.run(|machine| {
            let mut frames = shared.touched.lock().unwrap();
            frames.extend(pages.of(machine).map(|page| (machine.cpu(), page.frame)));
        });
        let mut frames: Vec<_> = shared
            .touched
            .lock()
            .unwrap()
            .iter()
            .map(|(_, frame)| *frame)
            .collect();
        frames.sort_unstable();
        frames
    }

    #[test]
    fn more_pages_than_there_are_is_refused() {
        assert!(Pages::new(&map(), 33, Order::Sequential).is_none());
    }
}
