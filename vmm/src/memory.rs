//! Guest memory: a umem region, seen by the guest at its guest-physical addresses.

use std::sync::{Arc, OnceLock};

use umem::region::Region;
use umem::units::{PageIndex, PageRange};
use vm_memory::GuestAddress;

use crate::address_map::{PAGE_SIZE, RamMap};
use crate::boot::ReadOnlyPages;
use crate::dirty::OwnWrites;
use crate::kvm::{Vm, VmError};

/// Everything that the guest sees as memory, kept for as long as the guest may look at it.
#[derive(Debug)]
pub struct GuestMemory {
    ram: Arc<Region>,
    map: RamMap,
    read_only: Vec<ReadOnlyPages>,
    own_writes: OnceLock<Arc<OwnWrites>>,
}

impl GuestMemory {
    /// RAM as `map` says, backed by `ram` (whose size is that of `map`), and pages outside RAM that are only read.
    pub fn new(ram: Arc<Region>, map: RamMap, read_only: Vec<ReadOnlyPages>) -> Self {
        debug_assert_eq!(ram.size(), map.size());
        Self {
            ram,
            map,
            read_only,
            own_writes: OnceLock::new(),
        }
    }

    /// The memory slots that RAM has in a VM, each with the pages in it.
    pub fn ram_slots(&self) -> impl Iterator<Item = (u32, PageRange)> + use<> {
        // Of a VM RAM has the first slots.
        (0..).zip(self.map.ranges()).map(|(slot, range)| {
            let start = PageIndex::containing(range.offset);
            (slot, PageRange::new(start, range.size / PAGE_SIZE))
        })
    }

    /// How many pages RAM has.
    pub fn ram_pages(&self) -> u64 {
        self.map.size() / PAGE_SIZE
    }

    /// Where this process notes what it writes to RAM by itself: for one who tells what changes, and any number who write.
    pub fn own_writes(&self) -> Arc<OwnWrites> {
        let own_writes = || Arc::new(OwnWrites::new(self.ram_pages()));
        Arc::clone(self.own_writes.get_or_init(own_writes))
    }

    /// The pages outside RAM.
    pub fn read_only(&self) -> &[ReadOnlyPages] {
        &self.read_only
    }

    /// Shows it to the guest of `vm`, RAM in the first slots.
    ///
    /// # Safety
    ///
    /// `self` must outlive the VM and its vCPUs.
    pub unsafe fn map_into(&self, vm: &Vm) -> Result<(), VmError> {
        let ram = self.map.ranges().map(|range| {
            // Within the region, since the map is as large as it is.
            (
                range.guest,
                self.ram.start().wrapping_add(range.offset as usize),
                range.size,
                false,
            )
        });
        let read_only = self
            .read_only
            .iter()
            .map(|pages| (pages.guest_address(), pages.host_address(), pages.size(), true));
        for (slot, (guest, host, size, read_only)) in (0..).zip(ram.chain(read_only)) {
            let guest: GuestAddress = guest;
            // SAFETY: the memory is mapped for as long as `self`, which the caller keeps.
            unsafe { vm.map(slot, guest, host, size, read_only) }?;
        }
        Ok(())
    }
}
