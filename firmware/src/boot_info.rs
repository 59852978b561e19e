//! The boot-information page: the VMM's word to the firmware where to go.
//!
//! It is a read-only page at a fixed guest-physical address outside RAM, so that it neither depends on the ROM in use nor
//! takes a page from the guest. All fields are little-endian:
//!
//! ```text
//! offset  size  field
//!      0     8  magic               "umemboot"
//!      8     4  version             1
//!     12     4  protocol            1 = PVH, 2 = long mode
//!     16     8  entry               guest-physical address to jump to
//!     24     8  argument            PVH: start_info in EBX; long mode: in RSI (Linux' boot_params)
//!     32     8  page_table_root     long mode: CR3, page tables that map at least the entry, the argument and the ROM
//!                                   one to one; PVH: 0
//! ```
//!
//! The entry is reached in the state that its protocol asks for: PVH as in Xen's `docs/misc/pvh.pandoc` (32-bit protected
//! mode, paging off, flat segments, EBX = start_info), long mode as in Linux' `Documentation/arch/x86/boot.rst`, 64-bit
//! boot protocol (64-bit, paging on, `__BOOT_CS` = 0x10, `__BOOT_DS` = 0x18, interrupts off, RSI = boot_params).

/// Where the page lies.
pub const ADDRESS: u64 = 0xfeff_0000;

/// Size of the page in bytes.
pub const SIZE: usize = 4096;

/// The first eight bytes.
pub const MAGIC: [u8; 8] = *b"umemboot";

/// The one version there is.
pub const VERSION: u32 = 1;

/// Offsets of the fields from the start of the page, as the firmware reads them.
#[allow(missing_docs)]
pub mod offset {
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 8;
    pub const PROTOCOL: usize = 12;
    pub const ENTRY: usize = 16;
    pub const ARGUMENT: usize = 24;
    pub const PAGE_TABLE_ROOT: usize = 32;
}

/// In which state the entry is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Protocol {
    /// 32-bit protected mode, paging off, EBX = argument.
    Pvh = 1,
    /// 64-bit mode, paging on with `page_table_root`, RSI = argument.
    LongMode = 2,
}

/// Where the firmware goes, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootInfo {
    /// The state in which the entry is reached.
    pub protocol: Protocol,
    /// Guest-physical address to jump to.
    pub entry: u64,
    /// Handed to the entry in the register that its protocol names.
    pub argument: u64,
    /// CR3 for [`Protocol::LongMode`], else 0.
    pub page_table_root: u64,
}

impl BootInfo {
    /// The page as the firmware reads it.
    pub fn to_page(&self) -> [u8; SIZE] {
        let mut page = [0; SIZE];
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(offset::MAGIC, &MAGIC);
        put(offset::VERSION, &VERSION.to_le_bytes());
        put(offset::PROTOCOL, &(self.protocol as u32).to_le_bytes());
        put(offset::ENTRY, &self.entry.to_le_bytes());
        put(offset::ARGUMENT, &self.argument.to_le_bytes());
        put(offset::PAGE_TABLE_ROOT, &self.page_table_root.to_le_bytes());
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_field_where_the_firmware_reads_it() {
        let page = BootInfo {
            protocol: Protocol::LongMode,
            entry: 0x0102_0304_0506_0708,
            argument: 0x1112_1314_1516_1718,
            page_table_root: 0x2122_2324_2526_2728,
        }
        .to_page();
        assert_eq!(page[..8], *b"umemboot");
        assert_eq!(page[8..16], [1, 0, 0, 0, 2, 0, 0, 0]);
        let field = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
        assert_eq!(field(offset::ENTRY), 0x0102_0304_0506_0708);
        assert_eq!(field(offset::ARGUMENT), 0x1112_1314_1516_1718);
        assert_eq!(field(offset::PAGE_TABLE_ROOT), 0x2122_2324_2526_2728);
        assert!(page[offset::PAGE_TABLE_ROOT + 8..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn the_page_is_aligned_and_apart_from_the_rom() {
        assert_eq!(ADDRESS % SIZE as u64, 0);
        assert!(ADDRESS + SIZE as u64 <= crate::ROM_ADDRESS);
    }
}
