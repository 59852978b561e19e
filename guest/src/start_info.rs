//! What a PVH loader hands to the guest: Xen's `hvm_start_info` (`xen/include/public/arch-x86/hvm/start_info.h`).

use core::mem::size_of;

/// The first word of a valid [`StartInfo`].
pub const MAGIC: u32 = 0x336e_c578;

/// The type of a [`MemoryMapEntry`] that is RAM.
pub const MEMORY_TYPE_RAM: u32 = 1;

/// `hvm_start_info`, version 1.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct StartInfo {
    /// [`MAGIC`].
    pub magic: u32,
    /// From version 1 on there is a memory map.
    pub version: u32,
    /// Xen's own flags.
    pub flags: u32,
    /// Number of modules.
    pub module_count: u32,
    /// Guest-physical address of the [`Module`] list.
    pub module_list: u64,
    /// Guest-physical address of the command line, which ends with a zero byte; or 0.
    pub command_line: u64,
    /// Guest-physical address of the ACPI root pointer, or 0.
    pub rsdp: u64,
    /// Guest-physical address of the [`MemoryMapEntry`] table.
    pub memory_map: u64,
    /// Number of entries in it.
    pub memory_map_entries: u32,
    /// Zero.
    pub reserved: u32,
}

/// `hvm_modlist_entry`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Module {
    /// Guest-physical address.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
    /// Guest-physical address of its command line, or 0.
    pub command_line: u64,
    /// Zero.
    pub reserved: u64,
}

/// `hvm_memmap_table_entry`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct MemoryMapEntry {
    /// Guest-physical address.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
    /// As in e820.
    pub memory_type: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<StartInfo>() == 56);
const _: () = assert!(size_of::<Module>() == 32);
const _: () = assert!(size_of::<MemoryMapEntry>() == 24);
