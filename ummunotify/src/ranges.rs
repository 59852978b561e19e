//! Ranges of addresses, each with a cookie, and which of them an invalidation hits.
//!
//! An interval tree: a search tree by first address, in which each node knows the furthest end in its subtree. It is kept
//! shallow by random priorities (a treap), so that finding what overlaps a range visits about log n nodes, and a few more
//! for each range found.

use std::hash::{BuildHasher, RandomState};

/// A range of addresses: `start <= address < end`, of any granularity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressRange {
    /// The first address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
}

impl AddressRange {
    /// All addresses.
    pub const ALL: Self = Self::new(0, u64::MAX);

    /// From `start` up to, and without, `end`.
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }

    /// The memory of a slice.
    ///
    /// ```
    /// let buffer = [0_u32; 16];
    /// let range = ummunotify::AddressRange::of(&buffer);
    /// assert_eq!(range.end - range.start, 64);
    /// ```
    pub fn of<T>(slice: &[T]) -> Self {
        let start = slice.as_ptr() as u64;
        Self::new(start, start + size_of_val(slice) as u64)
    }

    /// Whether it has no address.
    pub const fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// Whether there is an address that is in both.
    pub fn overlaps(self, other: Self) -> bool {
        !self.clipped_to(other).is_empty()
    }

    /// What of this lies in `other`.
    #[must_use]
    pub fn clipped_to(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }
}

/// The caller's name for a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

/// Any number of ranges, overlapping or the same, told apart by their cookies.
#[derive(Debug)]
pub struct Ranges {
    nodes: Vec<Node>,
    /// Nodes that are not in use.
    free: Vec<u32>,
    root: u32,
    priorities: RandomState,
}

#[derive(Debug)]
struct Node {
    range: AddressRange,
    cookie: Cookie,
    /// The furthest end in the subtree of a range that is not empty, or 0.
    furthest: u64,
    /// Not lower than those of the children.
    priority: u64,
    left: u32,
    right: u32,
}

/// No node.
const NONE: u32 = u32::MAX;

impl Default for Ranges {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            free: Vec::new(),
            root: NONE,
            priorities: RandomState::new(),
        }
    }
}

impl Ranges {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a range. That no other has this cookie is for the caller to see to.
    pub fn insert(&mut self, range: AddressRange, cookie: Cookie) {
        let node = Node {
            range,
            cookie,
            furthest: reach(range),
            priority: self.priorities.hash_one(cookie),
            left: NONE,
            right: NONE,
        };
        let new = if let Some(free) = self.free.pop() {
            self.nodes[free as usize] = node;
            free
        } else {
            self.nodes.push(node);
            (self.nodes.len() - 1) as u32
        };
        self.root = self.insert_below(self.root, new);
    }

    /// Takes a range away. `false`: there is none with this cookie in that place.
    pub fn remove(&mut self, range: AddressRange, cookie: Cookie) -> bool {
        let before = self.free.len();
        self.root = self.remove_below(self.root, (range.start, cookie));
        self.free.len() > before
    }

    /// Calls `found` for each range that overlaps `range`, in the order of their first addresses.
    pub fn overlapping(&self, range: AddressRange, mut found: impl FnMut(AddressRange, Cookie)) {
        self.visit(self.root, range, &mut found);
    }

    /// Whether some range overlaps `range`.
    pub fn any_overlaps(&self, range: AddressRange) -> bool {
        let mut at = self.root;
        while at != NONE {
            let node = self.node(at);
            if node.range.overlaps(range) {
                return true;
            }
            // If anything on the left ends late enough but none overlaps, the first that does not starts too late, and so
            // does everything on the right.
            at = if node.left != NONE && self.node(node.left).furthest > range.start {
                node.left
            } else {
                node.right
            };
        }
        false
    }

    fn visit(&self, at: u32, range: AddressRange, found: &mut impl FnMut(AddressRange, Cookie)) {
        let mut at = at;
        while at != NONE {
            let node = self.node(at);
            if node.furthest <= range.start {
                return;
            }
            self.visit(node.left, range, found);
            if node.range.start >= range.end {
                return;
            }
            if node.range.overlaps(range) {
                found(node.range, node.cookie);
            }
            at = node.right;
        }
    }

    fn node(&self, at: u32) -> &Node {
        &self.nodes[at as usize]
    }

    fn key(&self, at: u32) -> (u64, Cookie) {
        let node = self.node(at);
        (node.range.start, node.cookie)
    }

    /// After its children changed.
    fn update(&mut self, at: u32) -> u32 {
        let node = self.node(at);
        let below = [node.left, node.right]
            .into_iter()
            .filter(|&child| child != NONE)
            .map(|child| self.node(child).furthest);
        let furthest = below.fold(reach(node.range), u64::max);
        self.nodes[at as usize].furthest = furthest;
        at
    }

    fn insert_below(&mut self, at: u32, new: u32) -> u32 {
        if at == NONE {
            return new;
        }
        if self.node(new).priority > self.node(at).priority {
            let (left, right) = self.split(at, self.key(new));
            let node = &mut self.nodes[new as usize];
            (node.left, node.right) = (left, right);
            return self.update(new);
        }
        if self.key(new) < self.key(at) {
            self.nodes[at as usize].left = self.insert_below(self.node(at).left, new);
        } else {
            self.nodes[at as usize].right = self.insert_below(self.node(at).right, new);
        }
        self.update(at)
    }

    /// What comes before `key` in the subtree, and what comes after.
    fn split(&mut self, at: u32, key: (u64, Cookie)) -> (u32, u32) {
        if at == NONE {
            return (NONE, NONE);
        }
        if self.key(at) < key {
            let (left, right) = self.split(self.node(at).right, key);
            self.nodes[at as usize].right = left;
            (self.update(at), right)
        } else {
            let (left, right) = self.split(self.node(at).left, key);
            self.nodes[at as usize].left = right;
            (left, self.update(at))
        }
    }

    fn remove_below(&mut self, at: u32, key: (u64, Cookie)) -> u32 {
        if at == NONE {
            return NONE;
        }
        let (left, right) = (self.node(at).left, self.node(at).right);
        match key.cmp(&self.key(at)) {
            std::cmp::Ordering::Less => self.nodes[at as usize].left = self.remove_below(left, key),
            std::cmp::Ordering::Greater => self.nodes[at as usize].right = self.remove_below(right, key),
            std::cmp::Ordering::Equal => {
                self.free.push(at);
                return self.merge(left, right);
            }
        }
        self.update(at)
    }

    /// One subtree of two, of which all of the first comes before all of the second.
    fn merge(&mut self, first: u32, second: u32) -> u32 {
        if first == NONE {
            return second;
        }
        if second == NONE {
            return first;
        }
        if self.node(first).priority > self.node(second).priority {
            self.nodes[first as usize].right = self.merge(self.node(first).right, second);
            self.update(first)
        } else {
            self.nodes[second as usize].left = self.merge(first, self.node(second).left);
            self.update(second)
        }
    }
}

/// How far a range goes. An empty one overlaps nothing, wherever it ends.
const fn reach(range: AddressRange) -> u64 {
    if range.is_empty() { 0 } else { range.end }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(AddressRange, u64),
        Remove(u64),
        Find(AddressRange),
    }

    fn a_range() -> impl Strategy<Value = AddressRange> {
        // Few addresses, so that ends meet and ranges are the same; sometimes empty; sometimes long.
        (0_u64..64, prop_oneof![0_u64..4, 0_u64..64])
            .prop_map(|(start, length)| AddressRange::new(start, start + length))
    }

    fn a_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (a_range(), 0_u64..40).prop_map(|(range, cookie)| Step::Insert(range, cookie)),
            2 => (0_u64..40).prop_map(Step::Remove),
            3 => a_range().prop_map(Step::Find),
        ]
    }

    fn found(ranges: &Ranges, range: AddressRange) -> Vec<u64> {
        let mut found = Vec::new();
        ranges.overlapping(range, |_, cookie| found.push(cookie.0));
        found.sort_unstable();
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn as_a_list_that_is_searched_from_end_to_end(steps in proptest::collection::vec(a_step(), 1..200)) {
            let mut ranges = Ranges::default();
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(range, cookie) => {
                        if let Some(old) = model.insert(cookie, range) {
                            prop_assert!(!ranges.remove(AddressRange::new(1000, 1001), Cookie(cookie)));
                            prop_assert!(ranges.remove(old, Cookie(cookie)));
                        }
                        ranges.insert(range, Cookie(cookie));
                    }
                    Step::Remove(cookie) => {
                        if let Some(range) = model.remove(&cookie) {
                            prop_assert!(ranges.remove(range, Cookie(cookie)));
                            prop_assert!(!ranges.remove(range, Cookie(cookie)));
                        }
                    }
                    Step::Find(range) => {
                        let expected: Vec<u64> = model
                            .iter()
                            .filter(|(_, other)| (0..128).any(|at| [**other, range].iter().all(|r| r.start <= at && at < r.end)))
                            .map(|(&cookie, _)| cookie)
                            .collect();
                        prop_assert_eq!(ranges.any_overlaps(range), !expected.is_empty());
                        prop_assert_eq!(found(&ranges, range), expected);
                    }
                }
                prop_assert_eq!(ranges.len(), model.len());
            }
        }
    }

    #[test]
    fn a_search_looks_at_few_of_a_million_ranges() {
        const COUNT: u64 = 1_000_000;
        let mut ranges = Ranges::default();
        for cookie in 0..COUNT {
            // Each overlaps its neighbours.
            ranges.insert(AddressRange::new(cookie * 10, cookie * 10 + 15), Cookie(cookie));
        }
        let visited = |range| ranges.looked_at(ranges.root, range);
        for at in (0..COUNT).step_by(997) {
            let hit = AddressRange::new(at * 10 + 6, at * 10 + 7);
            assert_eq!(found(&ranges, hit), [at]);
            assert!(visited(hit) < 200, "{} nodes", visited(hit));
            let two = AddressRange::new(at * 10 + 12, at * 10 + 13);
            assert_eq!(found(&ranges, two).len(), if at + 1 < COUNT { 2 } else { 1 });
        }
    }

    impl Ranges {
        /// How many nodes [`Ranges::visit`] looks at.
        fn looked_at(&self, at: u32, range: AddressRange) -> usize {
            if at == NONE {
                return 0;
            }
            let node = self.node(at);
            if node.furthest <= range.start {
                return 1;
            }
            let left = self.looked_at(node.left, range);
            if node.range.start >= range.end {
                return 1 + left;
            }
            1 + left + self.looked_at(node.right, range)
        }
    }
}
