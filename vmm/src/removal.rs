//! Taking pages out of a guest's RAM while it runs.
//!
//! A page that is removed gives its memory back to the host, and reads zero from then on. The order is what makes it safe:
//!
//! 1. who watches the page from outside is told, and is done with it (`ummunotify::service`);
//! 2. the memory goes: the kernel takes it from the guest first (KVM's MMU notifier), and the call returns when the pager has
//!    marked the page `Removed`, so that it never comes from its source again;
//! 3. it is noted as changed, for snapshots that hold changes alone;
//! 4. the device that asked for it tells the guest.

use std::sync::Arc;

use umem::region::Region;
use umem::units::{PageIndex, PageRange};
use ummunotify::AddressRange;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::address_map::{PAGE_SIZE, RamMap};
use crate::control::{Cause, Control};
use crate::dirty::OwnWrites;

/// RAM as this process may read and write it for the guest.
pub type MappedRam = GuestMemoryMmap<()>;

/// A guest's RAM, for devices: where the guest sees it, and what is in it.
#[derive(Debug)]
pub struct Ram {
    /// Its mapping is that of the region.
    memory: MappedRam,
    region: Arc<Region>,
    map: RamMap,
    own_writes: Arc<OwnWrites>,
}

impl Ram {
    /// The RAM in `region`, which lies as `map` says. What is written to it is noted in `own_writes`. `None`: `map` is not of this
    /// region.
    pub fn new(region: Arc<Region>, map: RamMap, own_writes: Arc<OwnWrites>) -> Option<Self> {
        if region.size() != map.size() {
            return None;
        }
        let pieces = map.ranges().map(|range| {
            let start = region.start().wrapping_add(range.offset as usize);
            let builder = MmapRegionBuilder::new(range.size as usize)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_NORESERVE | libc::MAP_SHARED);
            // SAFETY: the piece is of the region, which this value keeps mapped, and is not unmapped with the builder's.
            let mapping = unsafe { builder.with_raw_mmap_pointer(start) }.build().ok()?;
            GuestRegionMmap::new(mapping, range.guest)
        });
        let pieces = pieces.collect::<Option<Vec<_>>>()?;
        Some(Self {
            memory: GuestMemoryMmap::from_regions(pieces).ok()?,
            region,
            map,
            own_writes,
        })
    }

    /// The memory. Touching a page that is absent waits for it.
    pub fn memory(&self) -> &MappedRam {
        &self.memory
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.region.pages()
    }

    /// The page at a guest-physical address, if it is one of RAM.
    pub fn page_at(&self, address: u64) -> Option<u64> {
        Some(self.map.offset_of(GuestAddress(address))? / PAGE_SIZE)
    }

    /// The pages of RAM that lie wholly in the `size` bytes from a guest-physical address, in runs.
    pub fn pages_within(&self, address: u64, size: u64) -> Vec<PageRange> {
        let end = address.saturating_add(size);
        self.map
            .ranges()
            .filter_map(|range| {
                let start = address.max(range.guest.0).checked_next_multiple_of(PAGE_SIZE)?;
                let end = end.min(range.guest.0 + range.size) / PAGE_SIZE * PAGE_SIZE;
                let count = end.checked_sub(start)? / PAGE_SIZE;
                let first = (start - range.guest.0 + range.offset) / PAGE_SIZE;
                (count > 0).then(|| PageRange::new(PageIndex(first), count))
            })
            .collect()
    }

    /// Where the guest sees pages of RAM.
    pub fn addresses_of(&self, pages: PageRange) -> impl Iterator<Item = AddressRange> {
        let seen = self
            .map
            .addresses_of(pages.start.byte_offset()..pages.end().byte_offset());
        seen.map(|range| AddressRange::new(range.start.0, range.end.0))
    }

    /// This process has written to the `size` bytes from a guest-physical address.
    pub fn note_write(&self, address: GuestAddress, size: u64) {
        let first = address.0 - address.0 % PAGE_SIZE;
        let size = address.0.saturating_add(size).next_multiple_of(PAGE_SIZE) - first;
        for pages in self.pages_within(first, size) {
            self.own_writes.note(pages);
        }
    }
}

/// Takes pages out of RAM.
pub struct Remover {
    ram: Ram,
    control: Control,
}

impl Remover {
    /// One for this RAM. `control` has those who want to hear of it.
    pub fn new(ram: Ram, control: Control) -> Self {
        Self { ram, control }
    }

    /// The RAM.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Removes `pages`: of huge pages only whole ones, and the others stay what they are. When this returns, it has happened, and
    /// who wanted to be done with them before that was.
    ///
    /// It waits for whoever serves the region.
    pub fn remove(&self, pages: &[PageRange], cause: Cause) {
        let unit = self.ram.region.page_size().pages();
        let whole = |run: &PageRange| {
            let (first, end) = (run.start.0.next_multiple_of(unit), run.end().0 / unit * unit);
            PageRange::new(PageIndex(first), end.saturating_sub(first))
        };
        let pages: Vec<PageRange> = pages.iter().map(whole).filter(|run| run.count > 0).collect();
        if pages.is_empty() {
            return;
        }
        let addresses: Vec<AddressRange> = pages.iter().flat_map(|run| self.ram.addresses_of(*run)).collect();
        self.control.changing(cause, &addresses, || {
            for run in &pages {
                if let Err(error) = self.ram.region.remove(*run) {
                    tracing::warn!(%error, pages = %run, "pages stay in memory that the guest has given back");
                }
                self.ram.own_writes.note(*run);
            }
        });
    }
}

/// Page numbers, in order and each once, in runs.
pub fn runs(pages: &[u64]) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.end().0 == *page => run.count += 1,
            _ => runs.push(PageRange::single(PageIndex(*page))),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;
    use proptest::prelude::*;
    use umem::region::{Backing, PageSize};

    const GIB: u64 = 1 << 30;

    /// 4 GiB, a quarter of which lies above the hole.
    fn ram() -> Ram {
        let map = RamMap::new(4 * GIB).unwrap();
        let region = Arc::new(Region::new(map.size(), Backing::Memfd, PageSize::Small).unwrap());
        let memory = GuestMemory::new(Arc::clone(&region), map, Vec::new());
        Ram::new(region, map, memory.own_writes()).unwrap()
    }

    #[test]
    fn pages_are_found_on_both_sides_of_the_hole() {
        let ram = ram();
        let low = 3 * GIB / PAGE_SIZE;
        assert_eq!(ram.page_at(3 * GIB - 1), Some(low - 1));
        assert_eq!(ram.page_at(3 * GIB), None);
        assert_eq!(ram.page_at(4 * GIB), Some(low));
        assert_eq!(ram.page_at(u64::MAX), None);
        let both = ram.pages_within(0, u64::MAX);
        let whole = |first, count| PageRange::new(PageIndex(first), count);
        assert_eq!(both, [whole(0, low), whole(low, GIB / PAGE_SIZE)]);
        // Neighbours in RAM, and far apart where the guest sees them.
        let addresses: Vec<_> = ram.addresses_of(whole(low - 1, 2)).collect();
        assert_eq!(
            addresses,
            [
                AddressRange::new(3 * GIB - PAGE_SIZE, 3 * GIB),
                AddressRange::new(4 * GIB, 4 * GIB + PAGE_SIZE)
            ]
        );
        assert_eq!(ram.pages_within(1, 2 * PAGE_SIZE), [whole(1, 1)]);
        assert_eq!(ram.pages_within(1, PAGE_SIZE), []);
        assert_eq!(ram.pages_within(u64::MAX, u64::MAX), []);
    }

    proptest! {
        #[test]
        fn runs_are_the_same_pages(pages in prop::collection::btree_set(0..500_u64, 0..200)) {
            let pages: Vec<u64> = pages.into_iter().collect();
            let runs = runs(&pages);
            let again: Vec<u64> = runs.iter().flat_map(|run| run.pages()).map(|page| page.0).collect();
            prop_assert_eq!(&again, &pages);
            prop_assert!(runs.windows(2).all(|two| two[0].end() < two[1].start));
        }

        #[test]
        fn what_lies_within_is_in_ram_and_seen_there(address: u64, size: u64) {
            let ram = ram();
            for run in ram.pages_within(address, size) {
                prop_assert!(run.end().0 <= ram.pages());
                for seen in ram.addresses_of(run) {
                    prop_assert!(address <= seen.start && seen.end <= address.saturating_add(size));
                }
            }
        }
    }
}
