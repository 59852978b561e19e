//! The structures that a kernel with a PVH entry is handed: Xen's `xen/include/public/arch-x86/hvm/start_info.h`.
//!
//! They take one page of RAM, which the memory map shows as reserved; every other byte of RAM is shown as usable.

use linux_loader::{
    configurator::{self, BootConfigurator, BootParams, pvh::PvhBootConfigurator},
    loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
};
use std::ops::Range;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::layout::ScratchMemory;
use crate::address_map::{BOOT_STRUCTURES, PAGE_SIZE, RamMap};

/// What a kernel gets in EBX.
pub(super) const START_INFO: GuestAddress = GuestAddress(BOOT_STRUCTURES.start);
/// What the structures take.
pub(super) const PAGES: Range<u64> = BOOT_STRUCTURES.start..BOOT_STRUCTURES.start + PAGE_SIZE;

const MODULES: GuestAddress = GuestAddress(START_INFO.0 + 0x40);
const MEMORY_MAP: GuestAddress = GuestAddress(START_INFO.0 + 0x80);
const COMMAND_LINE: GuestAddress = GuestAddress(START_INFO.0 + 0x200);

/// Linux keeps 2,048 bytes on x86, the final zero included (`COMMAND_LINE_SIZE`).
pub(super) const COMMAND_LINE_MAX: usize = 2047;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;

/// Why the structures could not be written.
#[derive(Debug, Error)]
pub enum PvhError {
    /// Longer than the kernel would read.
    #[error("the command line has {0} bytes; a kernel takes {COMMAND_LINE_MAX}")]
    CommandLineTooLong(usize),
    /// It would end there.
    #[error("the command line has a zero byte at {0}")]
    CommandLineHasZero(usize),
    /// The loader refuses.
    #[error("the boot structures cannot be written")]
    Write(#[source] configurator::Error),
    /// Memory refuses.
    #[error("the command line cannot be written")]
    WriteCommandLine(#[source] vm_memory::GuestMemoryError),
}

/// Writes the structures for RAM as in `ram`, with the initramfs, if any, at those addresses.
pub(super) fn write(
    memory: &ScratchMemory,
    ram: RamMap,
    command_line: &str,
    initramfs: Option<&Range<u64>>,
) -> Result<(), PvhError> {
    write_command_line(memory, command_line)?;
    let memory_map = memory_map(ram);
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
        ..Default::default()
    };
    let mut parameters = BootParams::new(&start_info, START_INFO);
    parameters.set_sections(&memory_map, MEMORY_MAP);
    if !modules.is_empty() {
        parameters.set_modules(&modules, MODULES);
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory).map_err(PvhError::Write)
}

fn write_command_line(memory: &ScratchMemory, command_line: &str) -> Result<(), PvhError> {
    if command_line.len() > COMMAND_LINE_MAX {
        return Err(PvhError::CommandLineTooLong(command_line.len()));
    }
    if let Some(at) = command_line.bytes().position(|byte| byte == 0) {
        return Err(PvhError::CommandLineHasZero(at));
    }
    // The zero byte at its end is there: memory starts as zero.
    memory
        .write_slice(command_line.as_bytes(), COMMAND_LINE)
        .map_err(PvhError::WriteCommandLine)
}

fn memory_map(ram: RamMap) -> Vec<hvm_memmap_table_entry> {
    let entry = |range: Range<u64>, type_| hvm_memmap_table_entry {
        addr: range.start,
        size: range.end - range.start,
        type_,
        reserved: 0,
    };
    let mut entries = vec![
        entry(0..PAGES.start, TYPE_RAM),
        entry(PAGES, TYPE_RESERVED),
        entry(PAGES.end..ram.low_size(), TYPE_RAM),
    ];
    entries.extend(
        ram.ranges()
            .skip(1)
            .map(|range| entry(range.guest.0..range.guest.0 + range.size, TYPE_RAM)),
    );
    entries
}

#[cfg(test)]
mod tests {
    use super::super::layout::scratch_memory;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn start_info(memory: &ScratchMemory) -> hvm_start_info {
        memory.read_obj(START_INFO).unwrap()
    }

    #[test]
    fn every_byte_of_ram_is_in_the_memory_map_once() {
        for size in [RamMap::new(1 << 20), RamMap::new(3 * GIB), RamMap::new(64 * GIB)] {
            let ram = size.unwrap();
            let entries = memory_map(ram);
            assert_eq!(entries.iter().map(|entry| entry.size).sum::<u64>(), ram.size());
            assert!(
                entries
                    .windows(2)
                    .all(|pair| pair[0].addr + pair[0].size <= pair[1].addr)
            );
            let reserved: Vec<_> = entries
                .iter()
                .filter(|entry| entry.type_ == TYPE_RESERVED)
                .collect();
            assert_eq!(reserved.len(), 1);
            assert_eq!((reserved[0].addr, reserved[0].size), (0xe_0000, 4096));
            for entry in &entries {
                assert!(ram.offset_of(GuestAddress(entry.addr)).is_some());
                assert!(ram.offset_of(GuestAddress(entry.addr + entry.size - 1)).is_some());
            }
        }
    }

    #[test]
    fn the_structures_point_to_each_other() {
        let memory = scratch_memory(1 << 20).unwrap();
        let ram = RamMap::new(4 * GIB).unwrap();
        write(&memory, ram, "console=ttyS0", Some(&(0x20_0000..0x20_1234))).unwrap();
        let info = start_info(&memory);
        assert_eq!((info.magic, info.version, info.nr_modules), (MAGIC, 1, 1));
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
        let longest = "x".repeat(COMMAND_LINE_MAX);
        write(&memory, ram, &longest, Some(&(0x20_0000..0x20_1000))).unwrap();
        // With its zero byte.
        assert!(COMMAND_LINE.0 + (COMMAND_LINE_MAX as u64) < PAGES.end);
        let memory_map_end =
            start_info(&memory).memmap_paddr + 24 * u64::from(start_info(&memory).memmap_entries);
        assert!(memory_map_end <= COMMAND_LINE.0);
        assert!(matches!(
            write(&memory, ram, &(longest + "x"), None),
            Err(PvhError::CommandLineTooLong(2048))
        ));
        assert!(matches!(
            write(&memory, ram, "a\0b", None),
            Err(PvhError::CommandLineHasZero(1))
        ));
    }
}
