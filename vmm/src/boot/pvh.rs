//! The structures that a kernel with a PVH entry is handed: Xen's `xen/include/public/arch-x86/hvm/start_info.h`.
//!
//! They take one page of RAM, which the memory map shows as reserved; every other byte of RAM is shown as usable.

use linux_loader::{
    configurator::{self, BootConfigurator, BootParams, pvh::PvhBootConfigurator},
    loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
};
use std::ops::Range;
use thiserror::Error;
use vm_memory::GuestAddress;

use super::{
    command_line::{self, CommandLineError},
    layout::ScratchMemory,
    memory_map::memory_map,
};
use crate::address_map::{ACPI_TABLES, BOOT_STRUCTURES, PAGE_SIZE, RamMap};

/// What a kernel gets in EBX.
pub(super) const START_INFO: GuestAddress = GuestAddress(BOOT_STRUCTURES.start);
/// What the structures take.
pub(super) const PAGES: Range<u64> = BOOT_STRUCTURES.start..BOOT_STRUCTURES.start + PAGE_SIZE;

const MODULES: GuestAddress = GuestAddress(START_INFO.0 + 0x40);
const MEMORY_MAP: GuestAddress = GuestAddress(START_INFO.0 + 0x80);
const COMMAND_LINE: GuestAddress = GuestAddress(START_INFO.0 + 0x200);

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// Why the structures could not be written.
#[derive(Debug, Error)]
pub enum PvhError {
    /// The loader refuses.
    #[error("the boot structures cannot be written")]
    Write(#[source] configurator::Error),
    /// Not the command line.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
}

/// Writes the structures for RAM as in `ram`, with the initramfs, if any, at those addresses.
pub(super) fn write(
    memory: &ScratchMemory,
    ram: RamMap,
    command_line: &str,
    initramfs: Option<&Range<u64>>,
) -> Result<(), PvhError> {
    command_line::write(memory, COMMAND_LINE, command_line)?;
    let memory_map = memory_map_entries(ram);
    let modules: Vec<_> = initramfs
        .map(|range| hvm_modlist_entry {
            paddr: range.start,
            size: range.end - range.start,
            ..Default::default()
        })
        .into_iter()
        .collect();
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES.0 },
        cmdline_paddr: COMMAND_LINE.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: memory_map.len() as u32,
        rsdp_paddr: ACPI_TABLES.0,
        ..Default::default()
    };
    let mut parameters = BootParams::new(&start_info, START_INFO);
    parameters.set_sections(&memory_map, MEMORY_MAP);
    if !modules.is_empty() {
        parameters.set_modules(&modules, MODULES);
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory).map_err(PvhError::Write)
}

fn memory_map_entries(ram: RamMap) -> Vec<hvm_memmap_table_entry> {
    memory_map(ram, &PAGES)
        .iter()
        .map(|piece| hvm_memmap_table_entry {
            addr: piece.range.start,
            size: piece.range.end - piece.range.start,
            type_: piece.kind as u32,
            reserved: 0,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::layout::scratch_memory;
    use super::*;
    use vm_memory::Bytes;

    const GIB: u64 = 1 << 30;

    fn start_info(memory: &ScratchMemory) -> hvm_start_info {
        memory.read_obj(START_INFO).unwrap()
    }

    #[test]
    fn the_structures_point_to_each_other() {
        let memory = scratch_memory(1 << 20).unwrap();
        let ram = RamMap::new(4 * GIB).unwrap();
        write(&memory, ram, "console=ttyS0", Some(&(0x20_0000..0x20_1234))).unwrap();
        let info = start_info(&memory);
        assert_eq!((info.magic, info.version, info.nr_modules), (MAGIC, 1, 1));
        assert_eq!(info.rsdp_paddr, ACPI_TABLES.0);
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x20_0000, 0x1234));
        let last: hvm_memmap_table_entry = memory
            .read_obj(GuestAddress(
                info.memmap_paddr + u64::from(info.memmap_entries - 1) * 24,
            ))
            .unwrap();
        assert_eq!((last.addr, last.size), (4 * GIB, GIB));
        let mut command_line = [0; 14];
        memory
            .read_slice(&mut command_line, GuestAddress(info.cmdline_paddr))
            .unwrap();
        assert_eq!(&command_line, b"console=ttyS0\0");
    }

    #[test]
    fn the_longest_command_line_stays_within_the_page() {
        let memory = scratch_memory(1 << 20).unwrap();
        let ram = RamMap::new(64 * GIB).unwrap();
        let longest = "x".repeat(command_line::LENGTH_MAX);
        write(&memory, ram, &longest, Some(&(0x20_0000..0x20_1000))).unwrap();
        // With its zero byte.
        assert!(COMMAND_LINE.0 + (command_line::LENGTH_MAX as u64) < PAGES.end);
        let memory_map_end =
            start_info(&memory).memmap_paddr + 24 * u64::from(start_info(&memory).memmap_entries);
        assert!(memory_map_end <= COMMAND_LINE.0);
    }
}
