//! What Linux finds where a PC has its BIOS: the way to reset the machine in real mode.
//!
//! On hardware-reduced ACPI, Linux resets by EFI (`efi_reboot_required` in its `arch/x86/platform/efi/quirks.c`, 6.1 for one),
//! whether there is EFI or not, and where there is none by a jump to the BIOS's entry. It would run through zeros there for
//! ever. Linux keeps its hands off this part of RAM, whatever the memory map says (`trim_bios_range`).

use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::ScratchMemory;
use crate::address_map::{BOOT_STRUCTURES, PAGE_SIZE};
use crate::devices::ResetControl;

/// The page that has it.
pub(super) const PAGE: Range<u64> = BOOT_STRUCTURES.end - PAGE_SIZE..BOOT_STRUCTURES.end;
/// F000:FFF0 of real mode.
const ENTRY: GuestAddress = GuestAddress(PAGE.end - 16);

/// Writes the entry: `mov $6, %al; mov $0xcf9, %dx; out %al, %dx; 1: hlt; jmp 1b`.
pub(super) fn write(memory: &ScratchMemory) -> Result<(), GuestMemoryError> {
    let [low, high] = ResetControl::PORT.to_le_bytes();
    let code = [0xb0, ResetControl::RESET, 0xba, low, high, 0xee, 0xf4, 0xeb, 0xfd];
    memory.write_slice(&code, ENTRY)
}
