//! The question that the BPF program asks of each invalidation: does it overlap any watched range?
//!
//! A B+ tree in memory that user space writes and the program reads, with a million ranges in a few levels. Per page at which
//! a watched range starts it has one entry, with the furthest end of those ranges. A node also has, for each entry, the
//! furthest end of all entries before it. So the program goes down once, towards the last entry that starts before the
//! invalidation's end, and there is an overlap if and only if something left of that way ends after the invalidation's start.
//!
//! Nodes that the program can see are never written. A change copies the nodes from a leaf to the root, and one store makes
//! the new root the root. That word has a version, and nodes that are no longer used are used again only [`GRACE`] versions
//! later. A program that finds a version so much newer than the one it began with may have read anything, and says 'hit'.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use crate::ranges::AddressRange;

/// Entries of a node are one less: a search by halving ends at an entry that is greater than all.
pub(crate) const WIDTH: usize = GROUPS * GROUP;
const FULL: usize = WIDTH - 1;

/// Keys in a line of the processor's cache. First one of the groups is found, then an entry in it: so a search looks at one
/// line of `group_ends` and one of `keys`, where memory is what takes the time.
pub(crate) const GROUP: usize = 8;
pub(crate) const GROUPS: usize = 8;

/// More levels than so many ranges can need. The program has a copy of its code for each.
pub(crate) const LEVELS: u32 = 5;

/// How many versions a node that is no longer used is left alone.
pub(crate) const GRACE: u64 = 128;

/// The root word: version << 32 | levels << 24 | slot.
pub(crate) const VERSION_SHIFT: u32 = 32;
pub(crate) const LEVELS_SHIFT: u32 = 24;
const SLOTS_AT_MOST: u32 = 1 << LEVELS_SHIFT;

/// The greatest address, and the key of entries that are not used. The program compares addresses as signed numbers.
pub(crate) const KEY_MAX: u64 = i64::MAX as u64;

const PAGE: u64 = 4096;

/// A node, in a slot. None lies in two pages.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(2048))]
pub(crate) struct Node {
    /// The last key of each group.
    pub(crate) group_ends: [u64; GROUPS],
    /// Ascending: where entries start.
    pub(crate) keys: [u64; WIDTH],
    /// The furthest end of the entries before this one.
    pub(crate) before: [u64; WIDTH],
    /// Of inner nodes: the slots of the entries' nodes.
    pub(crate) children: [u32; WIDTH],
    /// The furthest end of each entry: for user space.
    furthest: [u64; WIDTH],
    count: u64,
}

/// Memory for nodes, and for the root word.
pub(crate) trait Slots {
    /// How many nodes there is memory for.
    fn capacity(&self) -> u32;

    /// The memory of a node.
    fn node(&mut self, slot: u32) -> &mut Node;

    /// Sets the root word.
    fn publish(&mut self, root: u64);

    /// Makes the capacity greater, at least twice as great. When this returns, the program sees the new memory.
    fn grow(&mut self) -> io::Result<()>;
}

/// The watched ranges, as the program sees them.
#[derive(Debug)]
pub(crate) struct Filter<S> {
    pub(crate) slots: S,
    /// Whole pages, and how many ranges are made of just these.
    watched: BTreeMap<(u64, u64), u32>,
    root: u32,
    levels: u32,
    version: u64,
    /// Slots from here on have never been used.
    unused: u32,
    /// Slots no longer used, with the version that was the first without them.
    retired: VecDeque<(u64, u32)>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: u64,
    furthest: u64,
    child: u32,
}

impl<S: Slots> Filter<S> {
    pub(crate) fn new(slots: S) -> Self {
        Self {
            slots,
            watched: BTreeMap::new(),
            root: 0,
            levels: 0,
            version: 0,
            unused: 0,
            retired: VecDeque::new(),
        }
    }

    /// Adds a range.
    pub(crate) fn add(&mut self, range: AddressRange) -> io::Result<()> {
        let Some((start, end)) = pages(range) else {
            return Ok(());
        };
        self.reserve()?;
        let furthest = self.furthest_from(start);
        *self.watched.entry((start, end)).or_default() += 1;
        if furthest.is_none_or(|furthest| furthest < end) {
            self.set(start, Some(end));
        }
        Ok(())
    }

    /// Takes a range away that was added.
    pub(crate) fn remove(&mut self, range: AddressRange) -> io::Result<()> {
        let Some((start, end)) = pages(range) else {
            return Ok(());
        };
        // Where there is no memory for the copies, the range stays: what the program says of it is checked again.
        self.reserve()?;
        let Some(count) = self.watched.get_mut(&(start, end)) else {
            return Ok(());
        };
        *count -= 1;
        if *count > 0 {
            return Ok(());
        }
        self.watched.remove(&(start, end));
        let furthest = self.furthest_from(start);
        if furthest.is_none_or(|furthest| furthest < end) {
            self.set(start, furthest);
        }
        Ok(())
    }

    fn furthest_from(&self, start: u64) -> Option<u64> {
        let (&(_, end), _) = self.watched.range((start, 0)..=(start, u64::MAX)).next_back()?;
        Some(end)
    }

    /// Changes one entry, or takes it away, and lets the program see that.
    fn set(&mut self, key: u64, furthest: Option<u64>) {
        let top = if self.levels == 0 {
            let entry = furthest.map(|furthest| Entry {
                key,
                furthest,
                child: 0,
            });
            self.levels = 1;
            self.write(entry.as_slice())
        } else {
            self.edit(self.root, self.levels, key, furthest)
        };
        match *top {
            [] => self.levels = 0,
            [entry] => {
                self.root = entry.child;
                self.drop_needless_roots();
            }
            _ => {
                self.levels += 1;
                self.root = self.write(&top)[0].child;
            }
        }
        self.version += 1;
        let root =
            self.version << VERSION_SHIFT | u64::from(self.levels) << LEVELS_SHIFT | u64::from(self.root);
        self.slots.publish(root);
    }

    /// The entries by which a changed copy of a node (none, one, or two of them) appears in the node above.
    fn edit(&mut self, slot: u32, level: u32, key: u64, furthest: Option<u64>) -> Vec<Entry> {
        let mut entries = self.read(slot);
        self.retired.push_back((self.version + 1, slot));
        if level > 1 {
            let at = entries
                .partition_point(|entry| entry.key <= key)
                .saturating_sub(1);
            let changed = self.edit(entries[at].child, level - 1, key, furthest);
            entries.splice(at..=at, changed);
        } else {
            let at = entries.partition_point(|entry| entry.key < key);
            let there = entries.get(at).is_some_and(|entry| entry.key == key);
            let changed = furthest.map(|furthest| Entry {
                key,
                furthest,
                child: 0,
            });
            entries.splice(at..at + usize::from(there), changed);
        }
        self.write(&entries)
    }

    fn read(&mut self, slot: u32) -> Vec<Entry> {
        let node = self.slots.node(slot);
        let mut entries = Vec::with_capacity(WIDTH + 1);
        entries.extend((0..node.count as usize).map(|i| Entry {
            key: node.keys[i],
            furthest: node.furthest[i],
            child: node.children[i],
        }));
        entries
    }

    /// Writes entries to new nodes, as many as it takes, and gives the entries for these.
    fn write(&mut self, entries: &[Entry]) -> Vec<Entry> {
        let halves = if entries.len() > FULL {
            entries.split_at(entries.len() / 2)
        } else {
            (entries, &[][..])
        };
        let mut above = Vec::with_capacity(2);
        for part in [halves.0, halves.1] {
            let Some(first) = part.first() else { continue };
            let slot = self.take_slot();
            let node = self.slots.node(slot);
            node.count = part.len() as u64;
            let mut furthest = 0;
            for i in 0..WIDTH {
                node.before[i] = furthest;
                node.keys[i] = part.get(i).map_or(KEY_MAX, |entry| entry.key);
                if let Some(entry) = part.get(i) {
                    node.furthest[i] = entry.furthest;
                    node.children[i] = entry.child;
                    furthest = furthest.max(entry.furthest);
                }
            }
            for (group, end) in node.group_ends.iter_mut().enumerate() {
                *end = node.keys[group * GROUP + GROUP - 1];
            }
            above.push(Entry {
                key: first.key,
                furthest,
                child: slot,
            });
        }
        above
    }

    fn drop_needless_roots(&mut self) {
        while self.levels > 1 && self.slots.node(self.root).count == 1 {
            // Written for the version to come, and seen by none.
            self.retired.push_back((self.version + 1, self.root));
            self.root = self.slots.node(self.root).children[0];
            self.levels -= 1;
        }
    }

    /// Sees to it that a change will find slots for its nodes.
    fn reserve(&mut self) -> io::Result<()> {
        let needed = 2 * (self.levels as usize + 1);
        let unused = (self.slots.capacity() - self.unused) as usize;
        let again = self
            .retired
            .iter()
            .take(needed)
            .filter(|retired| self.is_over(retired.0));
        if unused + again.count() >= needed {
            return Ok(());
        }
        let full = self.levels == LEVELS && self.slots.node(self.root).count as usize == FULL;
        if full || self.slots.capacity() >= SLOTS_AT_MOST {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.slots.grow()
    }

    /// Whether no program can still read what version `retired` did without, or would find out.
    fn is_over(&self, retired: u64) -> bool {
        // A program that began with the version before and ends now sees a difference of at least GRACE.
        self.version + 1 >= retired + GRACE
    }

    fn take_slot(&mut self) -> u32 {
        match self.retired.front() {
            Some(&(version, slot)) if self.is_over(version) => {
                self.retired.pop_front();
                slot
            }
            _ => {
                self.unused += 1;
                self.unused - 1
            }
        }
    }
}

/// The pages of a range. `None`: it has none that a process can have.
fn pages(range: AddressRange) -> Option<(u64, u64)> {
    if range.is_empty() {
        return None;
    }
    let start = range.start & !(PAGE - 1);
    let end = range
        .end
        .checked_next_multiple_of(PAGE)
        .unwrap_or(KEY_MAX)
        .min(KEY_MAX);
    (start < end).then_some((start, end))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::random::{Random, rounds};

    /// Memory that no program reads.
    #[derive(Default)]
    struct Heap {
        nodes: Vec<Node>,
        root: u64,
    }

    impl Slots for Heap {
        fn capacity(&self) -> u32 {
            self.nodes.len() as u32
        }

        fn node(&mut self, slot: u32) -> &mut Node {
            &mut self.nodes[slot as usize]
        }

        fn publish(&mut self, root: u64) {
            self.root = root;
        }

        fn grow(&mut self) -> io::Result<()> {
            let empty = Node {
                group_ends: [0; GROUPS],
                keys: [0; WIDTH],
                before: [0; WIDTH],
                children: [0; WIDTH],
                furthest: [0; WIDTH],
                count: 0,
            };
            self.nodes.resize(self.nodes.len() * 2 + 16, empty);
            Ok(())
        }
    }

    /// What the program does.
    fn hits(heap: &Heap, invalidated: AddressRange) -> bool {
        let mut slot = heap.root & u64::from(SLOTS_AT_MOST - 1);
        for level in (1..=heap.root >> LEVELS_SHIFT & 0xff).rev() {
            let node = &heap.nodes[slot as usize];
            let count = node.keys.iter().filter(|&&key| key < invalidated.end).count();
            if level == 1 {
                return node.before[count] > invalidated.start;
            }
            if count == 0 {
                return false;
            }
            if node.before[count - 1] > invalidated.start {
                return true;
            }
            slot = node.children[count - 1].into();
        }
        false
    }

    /// Ranges of whole pages, some of them long, near each other.
    pub(crate) fn a_range(random: &mut Random, pages: u64) -> AddressRange {
        let start = random.below(pages);
        let length = match random.below(10) {
            0 => 1 + random.below(pages),
            _ => 1 + random.below(3),
        };
        AddressRange::new(start * PAGE, (start + length) * PAGE)
    }

    #[test]
    fn says_what_a_search_of_all_ranges_says() {
        let mut random = Random::seeded();
        for round in 0..rounds(20) {
            let mut filter = Filter::new(Heap::default());
            let mut model = Vec::new();
            let pages = 1 << random.below(16);
            let most = 1 << random.below(13);
            for step in 0..4000 {
                // Grows first, then shrinks to nothing.
                let shrinks = step > 2500 || model.len() >= most;
                if !model.is_empty() && random.below(10) < if shrinks { 9 } else { 2 } {
                    let range = model.swap_remove(random.below(model.len() as u64) as usize);
                    filter.remove(range).unwrap();
                } else {
                    let range = a_range(&mut random, pages);
                    model.push(range);
                    filter.add(range).unwrap();
                }
                let asked = a_range(&mut random, pages);
                let expected = model.iter().any(|range| range.overlaps(asked));
                assert_eq!(hits(&filter.slots, asked), expected, "round {round}: {asked:?}");
            }
            for range in model {
                filter.remove(range).unwrap();
            }
            assert_eq!(filter.levels, 0);
            assert!(!hits(&filter.slots, AddressRange::ALL));
        }
    }

    #[test]
    fn slots_are_used_again() {
        let mut filter = Filter::new(Heap::default());
        for i in 0..100_000 {
            let range = AddressRange::new(i * PAGE, (i + 1) * PAGE);
            filter.add(range).unwrap();
            filter.remove(range).unwrap();
        }
        assert!(filter.slots.capacity() <= 1024, "{}", filter.slots.capacity());
    }

    #[test]
    fn a_million_ranges_fit() {
        let mut filter = Filter::new(Heap::default());
        for i in 0..1_000_000 {
            filter
                .add(AddressRange::new(2 * i * PAGE, (2 * i + 1) * PAGE))
                .unwrap();
        }
        assert!(filter.levels < LEVELS);
        for i in (0..1_000_000).step_by(991) {
            let at = |page| AddressRange::new(page * PAGE, (page + 1) * PAGE);
            assert!(hits(&filter.slots, at(2 * i)));
            assert!(!hits(&filter.slots, at(2 * i + 1)));
        }
    }

    #[test]
    fn addresses_that_no_process_has_are_left_out() {
        let mut filter = Filter::new(Heap::default());
        filter.add(AddressRange::new(u64::MAX - 5, u64::MAX)).unwrap();
        assert_eq!(filter.levels, 0);
        filter.add(AddressRange::new(0x1234, u64::MAX)).unwrap();
        assert!(hits(&filter.slots, AddressRange::new(0x1000, 0x2000)));
        assert!(!hits(&filter.slots, AddressRange::new(0, 0x1000)));
    }
}
