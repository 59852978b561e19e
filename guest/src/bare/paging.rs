//! Maps RAM beyond the first GiB, which the tables in the file map already.
//!
//! This runs in ring 3: all memory is mapped for it, page tables too. A page directory is filled before it is linked, so that only
//! the link is a write to a table that the processor (or a hypervisor that shadows it) knows.

use core::arch::global_asm;
use core::sync::atomic::{Ordering, compiler_fence};

use guest::memory_map::MemoryMap;
use guest::tables::{PAGE_TABLE_ENTRIES, PDPT_ADDRESS, PRESENT_WRITABLE_USER, large_page_entry};

use super::{Refusal, refuse};

type PageTable = [u64; PAGE_TABLE_ENTRIES];

const FRAMES_PER_GIB: u64 = 1 << 18;

unsafe extern "C" {
    /// One page directory for each GiB but the first; their content is not defined until they are filled.
    static mut page_directories: [PageTable; PAGE_TABLE_ENTRIES - 1];
}

global_asm!(
    ".section .noinit, \"aw\", @nobits",
    ".balign 4096",
    ".global page_directories",
    "page_directories: .skip {size}",
    ".text",
    size = const size_of::<PageTable>() * (PAGE_TABLE_ENTRIES - 1),
);

/// Maps each GiB in which a frame of `map` up to `last` lies, and no more than that, because filling a page directory touches a page.
/// CPU 0 calls this once, before any CPU touches those frames.
pub(super) fn map_up_to(map: &MemoryMap, last: u64) -> Result<(), Refusal> {
    if last / FRAMES_PER_GIB >= PAGE_TABLE_ENTRIES as u64 {
        let limit = PAGE_TABLE_ENTRIES;
        return Err(refuse!(
            Machine,
            "error=too_much_memory last_frame={last:#x} limit_gib={limit}"
        ));
    }
    for gib in 1..=last / FRAMES_PER_GIB {
        if map.has_frame_in(gib * FRAMES_PER_GIB..((gib + 1) * FRAMES_PER_GIB).min(last + 1)) {
            map_gib(gib);
        }
    }
    Ok(())
}

/// Maps the GiB in which a device's registers are, where there is no RAM. CPU 0 calls this once, before it uses them.
pub(super) fn map_device(address: u64) {
    map_gib(address >> 30);
}

fn map_gib(gib: u64) {
    let link = (PDPT_ADDRESS as usize + gib as usize * 8) as *mut u64;
    // SAFETY: `gib` is 1 to 511, so both places exist; only CPU 0 is here, and no table that is in use changes but for one entry
    // that was not present before.
    unsafe {
        let directory = &raw mut page_directories[gib as usize - 1];
        for index in 0..PAGE_TABLE_ENTRIES {
            (&raw mut (*directory)[index]).write(large_page_entry(gib, index));
        }
        compiler_fence(Ordering::Release);
        link.write_volatile(directory.addr() as u64 | PRESENT_WRITABLE_USER);
    }
}
