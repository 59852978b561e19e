//! Which pages of RAM change from one moment to the next.
//!
//! Pages are written to in two ways, and both are seen:
//!
//! - **by KVM**, for the guest or of its own accord (its clock, steal time, async page faults): KVM's dirty log has them;
//! - **by this process**, through its own mapping of RAM, which KVM does not see: whoever writes says so to [`OwnWrites`],
//!   after the write. Memory that is dropped (`madvise`) is written to in this sense, for it reads zero from then on.
//!
//! A page that a pager installs is not written to: it is what its source has. Nor is one that the guest only reads; but where
//! the host's processor has nested page tables, KVM lets the guest write to a page that it has read, and logs it at once. So
//! what is told is everything that changed, and may be more.
//!
//! While pages are tracked, KVM keeps RAM in small pages and takes a fault at the first write to each page after it was last
//! told of: that is what tracking costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel, Ordering::Release};

use umem::units::{PageIndex, PageRange};

use crate::kvm::{Vm, VmError};
use crate::memory::GuestMemory;

/// A set of pages of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    /// A bit a page, the lowest first.
    words: Vec<u64>,
    pages: u64,
}

impl PageBitmap {
    /// None of `pages` pages.
    pub fn new(pages: u64) -> Self {
        let words = vec![0; pages.div_ceil(64) as usize];
        Self { words, pages }
    }

    /// All of `pages` pages.
    pub fn all(pages: u64) -> Self {
        let mut all = Self::new(pages);
        all.words.fill(u64::MAX);
        if let (Some(last), rest @ 1..) = (all.words.last_mut(), pages % 64) {
            *last = (1 << rest) - 1;
        }
        all
    }

    /// The same in whole units of `unit` pages, of which each that has a page in it is all in it. RAM is a multiple of them.
    #[must_use]
    pub fn in_units(self, unit: u64) -> Self {
        if unit <= 1 {
            return self;
        }
        let mut whole = Self::new(self.pages);
        for run in self.runs() {
            let end = run.end().0.next_multiple_of(unit).min(self.pages);
            for page in run.start.0 - run.start.0 % unit..end {
                whole.insert(PageIndex(page));
            }
        }
        whole
    }

    /// The same without the pages before `page`.
    #[must_use]
    pub fn from(&self, page: PageIndex) -> Self {
        let mut rest = self.clone();
        let word = ((page.0 / 64) as usize).min(rest.words.len());
        rest.words[..word].fill(0);
        if let Some(first) = rest.words.get_mut(word) {
            *first &= u64::MAX << (page.0 % 64);
        }
        rest
    }

    /// How many pages RAM has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are in it.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether a page of RAM is in it.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.words[(page.0 / 64) as usize] >> (page.0 % 64) & 1 == 1
    }

    /// Adds a page of RAM.
    pub fn insert(&mut self, page: PageIndex) {
        self.words[(page.0 / 64) as usize] |= 1 << (page.0 % 64);
    }

    /// Adds all pages of another set of the same RAM.
    pub fn merge(&mut self, other: &Self) {
        self.merge_at(0, &other.words);
    }

    /// Adds the pages that have a bit in `words`, of which the lowest is that of page `first`.
    fn merge_at(&mut self, first: u64, words: &[u64]) {
        let shift = first % 64;
        for (at, word) in (first / 64..).zip(words).filter(|(_, word)| **word != 0) {
            let at = at as usize;
            self.words[at] |= word << shift;
            if shift > 0 && word >> (64 - shift) != 0 {
                self.words[at + 1] |= word >> (64 - shift);
            }
        }
    }

    /// Takes away all pages of another set of the same RAM.
    pub fn subtract(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// Its pages in runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> {
        let mut rest = PageRange::new(PageIndex(0), self.pages);
        std::iter::from_fn(move || {
            let run = self.next_run(rest)?;
            rest = rest.from(run.end());
            Some(run)
        })
    }

    /// The first run of its pages in `within`.
    pub fn next_run(&self, within: PageRange) -> Option<PageRange> {
        let start = self.next(within.start.0, true);
        let end = self.next(start, false);
        let run = PageRange::new(PageIndex(start), end - start).clamp_to(within.end());
        (run.count > 0).then_some(run)
    }

    /// The first page from `from` on that is in it, or is not; the number of pages, if there is none.
    fn next(&self, from: u64, inside: bool) -> u64 {
        let mut at = from;
        while at < self.pages {
            let word = self.words[(at / 64) as usize];
            let wanted = (if inside { word } else { !word }) >> (at % 64);
            if wanted != 0 {
                return (at + u64::from(wanted.trailing_zeros())).min(self.pages);
            }
            at += 64 - at % 64;
        }
        self.pages
    }
}

/// Pages of RAM that this process has written to by itself.
#[derive(Debug)]
pub struct OwnWrites {
    words: Box<[AtomicU64]>,
}

impl OwnWrites {
    pub(crate) fn new(pages: u64) -> Self {
        let words = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words }
    }

    /// Notes that pages of RAM have been written to, or dropped. To be called after the write: whoever takes what was noted reads
    /// the pages afterwards, and would otherwise find what was there before, and not be told again.
    pub fn note(&self, pages: PageRange) {
        for page in pages.pages() {
            self.words[(page.0 / 64) as usize].fetch_or(1 << (page.0 % 64), Release);
        }
    }

    /// What was noted since the last time.
    pub(crate) fn take(&self, into: &mut PageBitmap) {
        for (own, word) in self.words.iter().zip(&mut into.words) {
            *word |= own.swap(0, AcqRel);
        }
    }
}

/// Keeps track of the pages of a VM's RAM that change.
///
/// Its log is kept by KVM, with the VM. So there is one at a time, and whoever drops it without [`Self::stop`] leaves RAM slower
/// than it could be, and nothing else.
#[derive(Debug)]
pub struct DirtyTracker {
    /// The slots of RAM, and which pages are in them.
    slots: Vec<(u32, PageRange)>,
    own: Arc<OwnWrites>,
    /// What was taken and given back.
    kept: PageBitmap,
}

impl DirtyTracker {
    /// Tracks changes of `memory`, which has been mapped into `vm`, from now on.
    ///
    /// # Errors
    /// KVM does not log writes.
    pub fn start(vm: &Vm, memory: &GuestMemory) -> Result<Self, VmError> {
        let tracker = Self {
            slots: memory.ram_slots().collect(),
            own: memory.own_writes(),
            kept: PageBitmap::new(memory.ram_pages()),
        };
        // What was noted before this is not asked for.
        tracker.own.take(&mut PageBitmap::new(memory.ram_pages()));
        for (slot, _) in &tracker.slots {
            if let Err(error) = vm.log_dirty_pages(*slot, true) {
                // It says nothing that the first error does not.
                let _ = tracker.stop(vm);
                return Err(error);
            }
        }
        Ok(tracker)
    }

    /// Where this process notes what it writes to RAM by itself.
    pub fn own_writes(&self) -> Arc<OwnWrites> {
        Arc::clone(&self.own)
    }

    /// The pages that have changed since the tracker was started, or since they were taken last. Not less, and possibly more.
    ///
    /// The guest may run meanwhile. A page that changes while this is called is in this answer, or in the next one, or in both,
    /// so each page is right that is read after this and not in the next answer.
    ///
    /// # Errors
    /// KVM does not tell. What it has told already is in the next answer.
    pub fn take(&mut self, vm: &Vm) -> Result<PageBitmap, VmError> {
        for (slot, pages) in &self.slots {
            let log = vm.take_dirty_log(*slot)?;
            self.kept.merge_at(pages.start.0, &log);
        }
        self.own.take(&mut self.kept);
        let none = PageBitmap::new(self.kept.pages);
        Ok(std::mem::replace(&mut self.kept, none))
    }

    /// The same, without forgetting what KVM need not forget to tell it: that is in the next answer too, unless it is
    /// [forgotten](forget) meanwhile. Whoever looks keeps the answer: of the rest it is the only one.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn look(&mut self, vm: &Vm) -> Result<PageBitmap, VmError> {
        let mut seen = self.kept.clone();
        for (slot, pages) in &self.slots {
            seen.merge_at(pages.start.0, &vm.dirty_log(*slot)?);
        }
        self.own.take(&mut seen);
        Ok(seen)
    }

    /// Takes back what was taken: it is in the next answer again. For whoever could not do with it what was to be done.
    pub fn give_back(&mut self, pages: &PageBitmap) {
        self.kept.merge(pages);
    }

    /// Ends it.
    ///
    /// # Errors
    /// KVM goes on logging writes, which costs the guest time and nothing else.
    pub fn stop(self, vm: &Vm) -> Result<(), VmError> {
        let stopped = self
            .slots
            .iter()
            .map(|(slot, _)| vm.log_dirty_pages(*slot, false));
        // All of them, whatever becomes of one.
        stopped.fold(Ok(()), Result::and)
    }
}

/// Forgets that pages of RAM have changed, right before they are read: what changes from now on is seen, and what changed before need
/// not be read twice.
///
/// # Errors
/// KVM does not forget it.
pub fn forget(vm: &Vm, memory: &GuestMemory, pages: PageRange) -> Result<(), VmError> {
    for (slot, all) in memory.ram_slots() {
        let start = pages.start.max(all.start);
        let end = pages.end().min(all.end());
        if start >= end {
            continue;
        }
        let within = PageRange::new(PageIndex(start.0 - all.start.0), end.0 - start.0);
        let first = within.start.0 - within.start.0 % 64;
        // Exactly these: what else is in their words may have been read already.
        let mut log = PageBitmap::new(within.end().0 - first);
        for page in within.pages() {
            log.insert(PageIndex(page.0 - first));
        }
        vm.clear_dirty_log(slot, first, &mut log.words)?;
    }
    Ok(())
}

/// Changes of a VM's RAM since it was the same as an image, for snapshots that hold nothing else.
#[derive(Debug)]
pub(crate) struct Tracking {
    /// Otherwise nothing is tracked.
    wanted: bool,
    tracker: Option<DirtyTracker>,
    /// The image that RAM was the same as when the tracker was started, or when changes were taken last. `None`: none that is known.
    since: Option<[u8; 32]>,
}

impl Tracking {
    /// Begins at once if RAM, to which nobody has written yet, is the same as the image with the digest `same_as`; otherwise not
    /// before there is a snapshot.
    pub(crate) fn start(
        wanted: bool,
        same_as: Option<[u8; 32]>,
        vm: &Vm,
        memory: &GuestMemory,
    ) -> Result<Self, VmError> {
        let since = same_as.filter(|_| wanted);
        let tracker = since.map(|_| DirtyTracker::start(vm, memory)).transpose()?;
        Ok(Self {
            wanted,
            tracker,
            since,
        })
    }

    /// What has changed, if that is known. From now on other changes are. The guest stands still.
    pub(crate) fn take(&mut self, vm: &Vm, memory: &GuestMemory) -> Result<Option<Changes>, VmError> {
        match &mut self.tracker {
            Some(tracker) => {
                let (pages, since) = (tracker.take(vm)?, self.since);
                Ok(Some(Changes { pages, since }))
            }
            None if self.wanted => {
                self.tracker = Some(DirtyTracker::start(vm, memory)?);
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// Lends the tracker, or a new one, to who has another use for it.
    pub(crate) fn lend(&mut self, vm: &Vm, memory: &GuestMemory) -> Result<DirtyTracker, VmError> {
        // What is taken of it is not known here.
        self.since = None;
        match self.tracker.take() {
            Some(tracker) => Ok(tracker),
            None => DirtyTracker::start(vm, memory),
        }
    }

    /// Takes back what was lent.
    pub(crate) fn give(&mut self, tracker: DirtyTracker, vm: &Vm) {
        if self.wanted {
            self.tracker = Some(tracker);
        } else if let Err(error) = tracker.stop(vm) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "changes of memory are logged on"
            );
        }
    }

    /// When changes were taken last, RAM was the same as the image with this digest.
    pub(crate) fn saved(&mut self, digest: [u8; 32]) {
        self.since = Some(digest);
    }

    /// Nothing came of what was taken.
    pub(crate) fn give_back(&mut self, changes: &Changes) {
        if let Some(tracker) = &mut self.tracker {
            tracker.give_back(&changes.pages);
        }
    }
}

/// What has changed, and since when.
#[derive(Debug)]
pub(crate) struct Changes {
    /// The pages that may be others than in the image.
    pub(crate) pages: PageBitmap,
    /// The image.
    pub(crate) since: Option<[u8; 32]>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set(bitmap: &PageBitmap) -> BTreeSet<u64> {
        bitmap
            .runs()
            .flat_map(|run| run.pages().map(|page| page.0))
            .collect()
    }

    proptest! {
        #[test]
        fn a_bitmap_is_a_set(
            pages in 1..700u64, inserted in prop::collection::btree_set(0..700u64, 0..300), full in 0..700u64
        ) {
            let mut bitmap = PageBitmap::new(pages);
            let mut model: BTreeSet<u64> = inserted.into_iter().chain(0..full).filter(|page| *page < pages).collect();
            for page in &model {
                bitmap.insert(PageIndex(*page));
            }
            prop_assert_eq!(set(&bitmap), model.clone());
            prop_assert_eq!(bitmap.count(), model.len() as u64);
            prop_assert!((0..pages).all(|page| bitmap.contains(PageIndex(page)) == model.contains(&page)));
            let runs: Vec<PageRange> = bitmap.runs().collect();
            prop_assert!(runs.windows(2).all(|two| two[0].end() < two[1].start), "{runs:?}");

            let mut other = PageBitmap::new(pages);
            other.insert(PageIndex(pages - 1));
            bitmap.merge(&other);
            model.insert(pages - 1);
            prop_assert_eq!(set(&bitmap), model);
            prop_assert_eq!(set(&PageBitmap::all(pages)), (0..pages).collect());
            let rest = set(&bitmap.from(PageIndex(full.min(pages))));
            prop_assert_eq!(rest, set(&bitmap).into_iter().filter(|page| *page >= full).collect());
        }

        #[test]
        fn units_are_whole(units in 1..20u64, unit in 1..40u64, inserted in prop::collection::btree_set(0..800u64, 0..20)) {
            let mut bitmap = PageBitmap::new(units * unit);
            let inserted: BTreeSet<u64> = inserted.into_iter().filter(|page| *page < units * unit).collect();
            for page in &inserted {
                bitmap.insert(PageIndex(*page));
            }
            let whole = set(&bitmap.in_units(unit));
            prop_assert_eq!(whole, inserted.iter().flat_map(|page| page / unit * unit..(page / unit + 1) * unit).collect());
        }

        /// A slot may begin at any page.
        #[test]
        fn a_log_is_merged_where_its_slot_is(first in 0..300u64, words in prop::collection::vec(any::<u64>(), 0..6)) {
            let mut bitmap = PageBitmap::new(first + words.len() as u64 * 64);
            bitmap.merge_at(first, &words);
            let expected: BTreeSet<u64> = (0..words.len() as u64 * 64)
                .filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
                .map(|bit| first + bit)
                .collect();
            prop_assert_eq!(set(&bitmap), expected);
        }
    }

    #[test]
    fn own_writes_are_told_once() {
        let own = OwnWrites::new(130);
        own.note(PageRange::new(PageIndex(60), 8));
        own.note(PageRange::single(PageIndex(129)));
        let mut taken = PageBitmap::new(130);
        own.take(&mut taken);
        assert_eq!(set(&taken), (60..68).chain([129]).collect());
        let mut again = PageBitmap::new(130);
        own.take(&mut again);
        assert_eq!(again.count(), 0);
    }
}
